"""Runs a sweep: asks for trials, starts them, watches their curves, stops the hopeless, records what came out.

``python -m workbench.sweeps.conductor ID`` is a detached process of its own; a lease in the database lets at most one conduct a
sweep. All that it must remember is in the tables: one that is killed is replaced by the next (of a server, or of ``--resume``).
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import threading
import time
import uuid

from engines.errors import FettleError, InputError
from storage import NotFound
from workbench import doctor, runs
from workbench.home import Home
from workbench.sweeps import search
from workbench.sweeps.executors import executor
from workbench.sweeps.plan import SweepPlan

TICK, WATCH, LEASE = 0.2, 1.0, 8.0
"""Seconds between looks at the trials, at their curves, and the length of the lease."""
ATTEMPTS = 3
"""How often a trial may lose its process or its node."""
HOPELESS = 3
"""Failures in a row from the first trial on that end a sweep: the next would fail as well."""
PRUNED = "Stopped by the pruner"
FIGURES = {"quality": "value", "seconds": "seconds", "memory": "peak_bytes", "size": "size_bytes", "trainable": "trainable"}


class Conductor:
    """One sweep; ``work`` returns when it has ended or another conductor has it."""

    def __init__(self, home: Home, sweep_id: int):
        self.home, self.store, self.id = home, home.store, sweep_id
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.row = self.store.sweep(sweep_id)
        self.plan = SweepPlan.read(self.row["spec"], self.row["plan"])
        self.place = executor(home, sweep_id, self.plan.on)
        self.active: dict[int, dict] = {}
        self.waiting: list[tuple[int, dict, int, int | None]] = []
        """Trials to be run again: number, parameters, attempt, the run before."""
        self.curves = search.Curves(self.plan, sweep_id)
        self.ended = threading.Event()
        self.renewed = self.watched = 0.0
        self.began = time.time()
        self.exhausted = False

    # -- life ------------------------------------------------------------------------------------------------
    def work(self) -> None:
        if not self.store.lease(f"sweep-{self.id}", self.owner, LEASE):
            print(f"sweep {self.id} has a conductor", flush=True)
            return
        try:
            self.store.update_sweep(self.id, owner=self.owner, heartbeat=time.time(), message=None,
                                    started=self.row["started"] or self.began)
            self.place.open()
            self.recall()
            while not self.ended.is_set() and self.turn():
                self.ended.wait(TICK)
        except FettleError as e:
            self.end("failed", str(e))
        except NotFound:
            return  # the sweep was deleted
        except Exception as e:
            error = doctor.diagnose(e)
            self.end("failed", f"{error['cause']} {error['remedy']}")
            raise
        finally:
            try:
                self.place.close()
            finally:
                self.store.release(f"sweep-{self.id}", self.owner)

    def recall(self) -> None:
        """Take up what an earlier conductor left: curves of ended trials, and those that still run."""
        for trial in self.store.trials(self.id):
            number, run_id = trial["number"], trial["run_id"]
            run = self.run(run_id)
            if run is not None and trial["state"] in ("complete", "pruned", "running"):
                self.curves.report(number, self.curve(run_id, self.share_of(run_id)))
            if trial["state"] in ("complete", "pruned"):
                self.curves.close(number, trial["state"] == "pruned")
            if trial["state"] != "running":
                continue
            if run is None or (run["status"] == "stopped" and not trial["message"]):
                self.waiting.append((number, trial["params"], trial["attempt"], run_id if run else None))
            else:
                self.active[number] = dict(run=run_id, share=self.share_of(run_id), node=trial["node"])
                if run["status"] not in runs.ENDED:
                    self.place.adopt(run_id, trial["node"])

    def turn(self) -> bool:
        """One look at everything; False: the sweep has ended."""
        now = time.monotonic()
        if now - self.renewed >= 1.0:
            self.renewed = now
            if not self.store.lease(f"sweep-{self.id}", self.owner, LEASE):
                return False  # it slept through its lease, and another has taken over
            self.store.update_sweep(self.id, heartbeat=time.time(), message=getattr(self.place, "trouble", None))
            self.row = self.store.sweep(self.id)
        self.place.poll()
        watch = now - self.watched >= WATCH
        self.watched = now if watch else self.watched
        for number in list(self.active):
            self.look(number, watch)
        if self.row["wish"] == "stop":
            return self.stopping()
        while len(self.active) < self.place.slots() and time.monotonic() - now < 1.0:
            if self.waiting:
                number, params, attempt, parent = self.waiting.pop(0)
                self.begin(number, params, attempt, parent)
            elif not self.next():
                break
        if not self.active and not self.waiting and not self.more():
            self.end("finished", self.last_words())
            return False
        return True

    def stopping(self) -> bool:
        for each in self.active.values():
            run = self.run(each["run"])
            if run and run["status"] not in runs.ENDED and run["wish"] is None:
                runs.stop(each["run"], home=self.home)
        if self.active:
            return True
        for number, *_ in self.waiting:
            self.store.put_trial(self.id, number, state="stopped", message="Stopped before it was run again", ended=time.time())
        self.end("stopped", "Stopped. Resume goes on with the trials that are left.")
        return False

    def end(self, status: str, message: str | None) -> None:
        self.store.update_sweep(self.id, status=status, ended=time.time(), message=message, wish=None)

    def last_words(self) -> str | None:
        trials = self.store.trials(self.id)
        if len(trials) >= self.plan.trials:
            return None
        if self.out_of_time():
            return f"The {self.plan.minutes:g} minutes are used up after {len(trials)} trials."
        return f"Every combination has been tried: {len(trials)} trials."

    # -- trials ------------------------------------------------------------------------------------------------
    def more(self) -> bool:
        trials = self.store.trials(self.id)
        return not self.exhausted and not self.out_of_time() and search.ask(self.plan, trials) is not None

    def out_of_time(self) -> bool:
        """Whether a trial that began now is expected to end after the sweep's minutes."""
        if self.plan.minutes is None:
            return False
        trials = self.store.trials(self.id)
        took = [t["ended"] - t["started"] for t in trials if t["ended"] and t["started"] and t["run_id"]]
        lanes = max(1, self.place.slots())
        before = sum(t["ended"] - t["started"] for t in trials
                     if t["ended"] and t["started"] and t["run_id"] and t["started"] < self.began) / lanes
        one = statistics.median(took) if took else 0.0
        return before + time.time() - self.began + one > self.plan.minutes * 60

    def next(self) -> bool:
        """Begin another trial; False: there is none now."""
        trials = self.store.trials(self.id)
        ended = [t["state"] for t in trials if t["state"] != "running"]
        if len(ended) >= HOPELESS and all(s == "failed" for s in ended):
            raise InputError("sweep", self.row["name"], f"its first {len(ended)} trials all failed",
                             trials[0]["message"] or "Look at the log of the first trial's run")
        if self.exhausted or self.out_of_time():
            return False
        params = search.ask(self.plan, trials)
        if params is None:
            self.exhausted = True
            return False
        number = len(trials)
        self.store.put_trial(self.id, number, params=params, state="running")
        self.begin(number, params)
        return True

    def begin(self, number: int, params: dict, attempt: int = 1, parent: int | None = None) -> None:
        """Plan and start the run of a trial; what does not fit its budget, or is refused, is recorded without being run."""
        try:
            spec = self.plan.spec(params)
            tags = tuple(dict.fromkeys((*spec.tags, f"sweep-{self.id}")))
            spec = spec.replace(name=f"{self.row['name']}-{number + 1}", tags=tags)
            resolved, forecast = runs.prepare(spec, home=self.home)
        except InputError as e:
            fits = not e.field.startswith("budget.")
            text = f"{'Refused' if fits else 'Does not fit'}: {e}"
            self.store.put_trial(self.id, number, state="infeasible", message=text, ended=time.time())
            return
        run_id, node = self.place.begin(spec, resolved, forecast, parent)
        self.store.put_trial(self.id, number, run_id=run_id, node=node, attempt=attempt, state="running", message=None,
                             started=time.time())
        self.active[number] = dict(run=run_id, share=share(resolved.to_dict(), forecast), node=node)

    def look(self, number: int, watch: bool) -> None:
        """One trial: record its end, or judge its curve."""
        each = self.active[number]
        run = self.run(each["run"])
        if run is None:
            self.close(number, "failed", "Its run was deleted")
        elif run["status"] in runs.ENDED:
            self.finish(number, run)
        elif watch and run["status"] == "running" and run["wish"] is None and self.plan.pruner != "none":
            reason = self.curves.report(number, self.curve(run["id"], each["share"]))
            if reason:
                self.store.put_trial(self.id, number, message=reason)
                self.store.event(run["id"], "pruned", reason)
                runs.stop(run["id"], home=self.home)

    def finish(self, number: int, run: dict) -> None:
        trial = next(t for t in self.store.trials(self.id) if t["number"] == number)
        if run["status"] == "lost" and trial["attempt"] < ATTEMPTS:
            self.active.pop(number)
            text = f"{run['message'] or 'Its process is gone.'} Attempt {trial['attempt'] + 1}."
            if self.place.again(run["id"]):
                self.store.put_trial(self.id, number, attempt=trial["attempt"] + 1)
                self.active[number] = dict(run=run["id"], share=self.share_of(run["id"]), node=trial["node"])
            else:
                self.store.event(run["id"], "sweep", f"Trial {number + 1} is run again. {text}")
                self.waiting.append((number, trial["params"], trial["attempt"] + 1, run["id"]))
            return
        values = self.values(run)
        if run["status"] == "finished":
            missing = [o.name for o, v in zip(self.plan.objectives, values) if v is None]
            if missing:
                self.close(number, "failed", f"The run has no figure for {', '.join(missing)}", run, values)
            else:
                self.close(number, "complete", None, run, values)
        elif run["status"] == "stopped":
            pruned = (trial["message"] or "").startswith(PRUNED)
            self.close(number, "pruned" if pruned else "stopped", trial["message"] or "Stopped by a person", run, values)
        else:
            error = run["error"] or {}
            text = f"{error.get('cause') or run['message'] or run['status']} {error.get('remedy') or ''}"
            self.close(number, "failed", text.strip(), run, values)

    def close(self, number: int, state: str, message: str | None, run: dict | None = None, values: list | None = None) -> None:
        self.active.pop(number, None)
        if run is not None and self.plan.pruner != "none":
            self.curves.report(number, self.curve(run["id"], self.share_of(run["id"])))
        self.curves.close(number, state != "complete")
        at = dict(started=run["started"], ended=run["ended"]) if run else dict(ended=time.time())
        self.store.put_trial(self.id, number, state=state, message=message, values=values, **at)

    # -- what a run shows ------------------------------------------------------------------------------------------
    def run(self, run_id: int | None) -> dict | None:
        if run_id is None:
            return None
        try:
            return self.store.light(run_id)
        except NotFound:
            return None

    def values(self, run: dict) -> list[float | None]:
        joules = (self.store.footprint(run["id"]) or {}).get("joules")
        return [joules if o.name == "joules" else run[FIGURES[o.name]] for o in self.plan.objectives]

    def share_of(self, run_id: int):
        forecast = self.store.forecast(run_id) or {}
        return share(forecast.get("resolved") or {}, forecast)

    def curve(self, run_id: int, share_at) -> list[tuple[float, float]]:
        """The held-out loss of a run as (share of its budget, loss)."""
        found = self.store.points(run_id, "loss_eval")
        rows = zip(found["step"], found["value"], found["t"])
        return [(share_at(step, t), value) for step, value, t in rows if value is not None]


def share(resolved: dict, forecast: dict):
    """The function from (step, seconds) to the share of a run's budget that is used then."""
    budget = resolved.get("budget") or {}
    minutes = budget.get("minutes")
    steps = budget.get("steps") or (None if minutes else forecast.get("steps"))

    def at(step: int, t: float) -> float:
        return min(1.0, max(step / steps if steps else 0.0, t / (60 * minutes) if minutes else 0.0))
    return at


def main(arguments: list[str] | None = None) -> int:
    """Entry point; started by ``workbench.sweeps.service``."""
    given = sys.argv[1:] if arguments is None else arguments
    home = Home.open()
    try:
        conductor = Conductor(home, int(given[0]))
    except FettleError as e:  # a field that this version no longer has
        home.store.update_sweep(int(given[0]), status="failed", ended=time.time(), message=str(e), wish=None)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: conductor.ended.set())
    conductor.work()
    return 0


if __name__ == "__main__":
    from workbench.sweeps import conductor as module
    sys.exit(module.main())

"""Executes one run in a process of its own: ``python -m workbench.worker RUN_ID``, or forked by ``workbench.warm``.

It claims the run (process id and start time), beats once a second, asks for the person's wish five times a second, samples
the machine, hands the frozen settings to the pipeline, and records how it ended. It owns nothing that a server must drain:
its output goes to the run's log.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time

from engines.errors import StopRequested
from workbench import crew, doctor, process, telemetry
from workbench.home import Home
from workbench.reporting import StoreReporter

BEAT, ASK, SAMPLE = 1.0, 0.2, 0.5
"""Seconds between heartbeats, looks at the person's wish, and telemetry samples."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code is 0 when the run ended as asked for, 1 when it failed."""
    parser = argparse.ArgumentParser(prog="python -m workbench.worker", description="Execute one queued run.")
    parser.add_argument("run", type=int)
    parser.add_argument("--threads", type=int, default=None, help="threads of the matrix products; default: physical cores")
    given = parser.parse_args(arguments)
    return crew.begin(given.run, given.threads, execute)


def execute(run_id: int, threads: int | None = None, home: Home | None = None, guest: bool = False) -> int:
    """Run ``run_id`` to its end in this process.

    Args:
        guest: the process belongs to somebody else (a server without processes of its own for runs): no signals are taken over,
            its id is not recorded, so that nobody ends it for the run's sake, and a kill is a stop.
    """
    home = home or Home.open()
    return Worker(home, run_id, threads, guest).execute()


class Worker:
    """One run in this process."""

    def __init__(self, home: Home, run_id: int, threads: int | None = None, guest: bool = False):
        self.home, self.store, self.id, self.guest = home, home.store, run_id, guest
        self.threads = threads or telemetry.threads()
        self.folder, self.done = home.folder(run_id), threading.Event()
        self.kills = telemetry.oom_kills()
        self.sampler_thread: telemetry.Sampler | None = None

    # -- life ------------------------------------------------------------------------------------------------
    def execute(self) -> int:
        if not self.claim():
            print(f"run {self.id} does not wait for a worker", flush=True)
            return 0
        if not self.guest:
            faulthandler.enable()
            process.die_first()
        resume, base = self.rewind()
        reporter = self.reporter = StoreReporter(self.store, self.id, base=base, stages=self.stages())
        pulse = threading.Thread(target=self.pulse, name="pulse", daemon=True)
        pulse.start()
        if not self.guest:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: reporter.ask("stop"))
        status, error, outcome, sampler = "failed", None, None, None
        try:
            self.plan_stages()
            sampler = self.sampler()
            sampler.start()
            device = reporter.device = self.device()
            reporter.event("resume" if resume or base else "start", self.greeting(device, resume), oom_kills=self.kills)
            outcome = process.pipeline()(self.spec, reporter=reporter, folder=self.folder, device=device, resume=resume,
                                 estimates=self.estimates())
            status = outcome.status
        except StopRequested as e:
            status = {"pause": "paused"}.get(e.kind, "stopped")
        except BaseException as e:
            error = self.diagnose(e)
            reporter.log(error["trace"] or str(e))
            reporter.event("failure", f"{error['cause']} {error['remedy']}", failure=error["kind"])
        self.done.set()
        if reporter.cap is not None:
            reporter.cap.lift()
        if sampler is not None:
            sampler.stop()
        self.end(status, error, outcome, sampler)
        return 1 if status == "failed" else 0

    def claim(self) -> bool:
        """Make this process the run's; False when the run is not waiting (stopped meanwhile, or claimed by another)."""
        import psutil
        before = self.store.run(self.id)
        now = time.time()
        self.home.exit_note(self.id).unlink(missing_ok=True)
        pid, began = (None, None) if self.guest else (os.getpid(), psutil.Process().create_time())
        mine = self.store.transition(
            self.id, ("starting", "queued"), "running", pid=pid, pid_started=began,
            host=socket.gethostname(), heartbeat=now, started=before["started"] or now, ended=None, error=None, message=None,
            left_seconds=None, phase="start", folder=str(self.folder), log_path=str(self.home.log(self.id)))
        self.again = before["started"] is not None
        self.run = before
        self.resolved = (before.get("forecast") or {}).get("resolved") or before["spec"]
        return mine

    def rewind(self) -> tuple[bool, float]:
        """For a run that has begun before: forget what came after the place it goes on from.

        Returns:
            whether there is such a place (else it begins again), and the seconds on the run's clock at it.
        """
        if not self.again:
            return False, 0.0
        from engines.training import checkpoint
        try:
            facts = json.loads((self.folder / "pipeline.json").read_text())
        except (OSError, ValueError):
            facts = None
        step = -1
        if facts is not None:
            reached = max((s["last_step"] or 0 for s in self.store.series(self.id) if not s["clock"]), default=0)
            step = facts["base_step"]
            while (latest := checkpoint.latest(self.home.checkpoints(self.id))) is not None:
                saved = checkpoint.facts(latest)
                if saved["run_step"] <= reached:
                    step = saved["run_step"] if saved["stage"] == facts["index"] else step
                    break
                # The process died before the points up to this checkpoint were committed: only an older one gives a whole curve.
                shutil.rmtree(latest)
        self.store.rewind(self.id, step)
        return facts is not None, max((s["last_t"] or 0.0 for s in self.store.series(self.id) if not s["clock"]), default=0.0)

    def pulse(self) -> None:
        """The thread that shows that the run lives and listens to the person."""
        from storage import NotFound
        beat = 0.0
        while not self.done.is_set():
            try:
                wish = self.store.wished(self.id)
                if wish in ("stop", "pause") or (wish and self.guest):
                    self.reporter.ask("pause" if wish == "pause" else "stop")
                elif wish == "kill":
                    os.killpg(os.getpgrp(), signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(137)
                if isinstance(self.reporter.writer.error, NotFound):
                    self.reporter.ask("stop")  # deleted while it ran
                if time.monotonic() - beat >= BEAT:
                    beat = time.monotonic()
                    self.reporter.beat()
            except Exception as e:
                self.reporter.note(e)
            self.done.wait(ASK)
        self.store.close()

    # -- preparation -------------------------------------------------------------------------------------------
    @property
    def spec(self):
        from workbench.spec import RunSpec
        return RunSpec.from_dict(self.resolved)

    def stages(self) -> list[dict]:
        stages = self.resolved.get("pipeline") or []
        stages = [{"method": s} if isinstance(s, str) else s for s in stages]
        return [dict(method=s["method"], settings={k: v for k, v in s.items() if k != "method"}) for s in stages]

    def plan_stages(self) -> None:
        """Show every stage with its resolved settings before the first begins; a resumed run keeps what it has."""
        reasons = [s.get("reasons") or {} for s in (self.run.get("forecast") or {}).get("stages") or []]
        known = {s["index"]: s for s in self.store.stages(self.id)}
        for i, stage in enumerate(self.stages()):
            if known.get(i, {}).get("status") != "finished":
                self.store.put_stage(self.id, i, stage["method"], stage["settings"], status="waiting",
                                     reasons=reasons[i] if i < len(reasons) else {})
            if self.again and i < len(self.reporter.stages):
                self.reporter.stages[i]["spent"] = known.get(i, {}).get("seconds") or 0.0
        for path, text in (("spec.yaml", self.run["spec"]), ("resolved.yaml", self.resolved)):
            import yaml
            (self.folder / path).write_text(yaml.safe_dump(text, sort_keys=False, allow_unicode=True))

    def estimates(self) -> dict:
        """What the clock of a limit in minutes sets aside: forecast seconds of stages that do not train, by their place, and of
        the ``save``; where a probe has measured them, those stages (``measured``) and how many times as long evaluations take
        after each (``ratio``).
        """
        forecast = self.run.get("forecast") or {}
        stages, probe = forecast.get("stages") or [], forecast.get("probe") or {}
        found: dict = {i: s["seconds"] for i, s in enumerate(stages) if s.get("seconds") and not s.get("steps")}
        save = [p["seconds"] for p in (forecast.get("seconds") or {}).get("phases") or [] if p.get("phase") == "save"]
        known = {i: r for i, r in enumerate(probe.get("ratios") or []) if r is not None and i in found}
        return found | ({"save": save[0]} if save else {}) | ({"ratio": known, "measured": list(known)} if known else {})

    def device(self) -> str:
        """cuda or cpu; sets threads and the memory cap for it."""
        import torch
        torch.set_num_threads(self.threads)
        gigabytes = (self.resolved.get("budget") or {}).get("memory_gb")
        if os.environ.get("WORKBENCH_DEVICE") == "cpu" or not torch.cuda.is_available():
            if gigabytes and self.sampler_thread is not None:
                self.sampler_thread.memory_limit = gigabytes * 1e9
                self.reporter.cap = None if self.guest else telemetry.DataCap(gigabytes * 1e9)
            return "cpu"
        if gigabytes:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), 0)
        return "cuda"

    def sampler(self) -> telemetry.Sampler:
        reporter, budget = self.reporter, self.resolved.get("budget") or {}
        reporter.joules_limit = budget.get("joules")
        reporter.limit = (budget.get("memory_gb") or 0) * 1e9
        reporter.joules_base = max((s["last_value"] or 0.0 for s in self.store.series(self.id) if s["name"] == "energy/joules"),
                                   default=0.0)
        period = float(os.environ.get("WORKBENCH_SAMPLE_SECONDS") or SAMPLE)
        self.sampler_thread = telemetry.Sampler(reporter.sample, period=period, over=reporter.over_memory)
        return self.sampler_thread

    def greeting(self, device: str, resume: bool) -> str:
        where = f"on {device} with {self.threads} thread{'s' if self.threads != 1 else ''}, process {os.getpid()}"
        if resume:
            return f"Goes on from its checkpoint {where}"
        return (f"Begins again, there was no checkpoint yet, {where}" if self.again else f"Begins {where}")

    # -- the end -------------------------------------------------------------------------------------------------
    def diagnose(self, error: BaseException) -> dict:
        kills = telemetry.oom_kills()
        return doctor.diagnose(error, self.home.log(self.id), device=self.reporter.device,
                               oom_kills=max(0, (kills or 0) - (self.kills or 0)))

    def end(self, status: str, error: dict | None, outcome, sampler) -> None:
        """Record the end: first every point, then the state, so that who sees ``finished`` sees the whole curve."""
        reporter = self.reporter
        phases = reporter.peaks()
        fields: dict = {}
        if outcome is not None:
            reporter.end_stages("finished" if status == "finished" else status, _summaries(outcome))
        else:
            reporter.end_stages(status)
        footprint = merge(self.store.footprint(self.id) if self.again else None, phases, outcome, reporter, sampler)
        fields |= dict(peak_bytes=footprint["peak_bytes"] or None, tokens_per_second=reporter.usual_rate())
        fields |= {key: footprint[key] for key in ("size_bytes", "trainable", "parameters") if footprint.get(key) is not None}
        if status == "finished":
            fields |= dict(progress=1.0, left_seconds=0.0)
        else:
            fields |= dict(progress=min(1.0, reporter.share), left_seconds=None)
        message = None
        if status == "paused":
            message = f"Paused at step {reporter.step:,}; resume goes on exactly from there."
        elif status == "stopped":
            message = f"Stopped at step {reporter.step:,}."
        elif error:
            message = error["cause"]
        reporter.log(f"{status}" + (f": {message}" if message else ""))
        seconds = round(reporter.clock(), 3)
        reporter.close()
        deadline = time.monotonic() + 120
        while True:
            try:
                with self.store.transaction():
                    # Lost: another machine that hears nothing may have given it up too early.
                    known = self.store.transition(
                        self.id, ("running", "starting", "lost"), status, error=error, message=message, wish=None, phase=None,
                        seconds=seconds, heartbeat=time.time(), pid=None, pid_started=None, **fields)
                    if known:
                        self.store.put_footprint(self.id, footprint)
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def merge(earlier: dict | None, phases: list[dict], outcome, reporter, sampler) -> dict:
    """The footprint: what the pipeline counted, with the phases measured in this and in earlier processes of the run."""
    found: dict[str, dict] = {p["phase"]: dict(p) for p in (earlier or {}).get("phases") or ()}
    for part in phases:
        known = found.setdefault(part["phase"], dict(phase=part["phase"]))
        for key, value in part.items():
            if key == "seconds":
                known[key] = round(known.get(key, 0.0) + value, 3)
            elif key != "phase":
                known[key] = max(known.get(key, 0), value)
    counted = dict(getattr(outcome, "measured", None) or {})
    if "weight_bytes" in counted:
        counted["size_bytes"] = counted["weight_bytes"]
    peak = max(found.values(), key=lambda p: p.get("peak_bytes", 0), default=None)
    energy = getattr(sampler, "energy", None)
    return counted | dict(
        phases=list(found.values()), peak_bytes=(peak or {}).get("peak_bytes", 0), peak_phase=(peak or {}).get("phase"),
        how="PyTorch allocator" if reporter.device.startswith("cuda") else "resident set of the process",
        retried=((earlier or {}).get("retried") or []) + reporter.knobs, joules=reporter.joules, energy=(energy.kind or energy.reason) if energy else "",
        telemetry_seconds=round(getattr(sampler, "cost", 0.0), 4))


def _summaries(outcome) -> list[dict]:
    return [s if isinstance(s, dict) else getattr(s, "__dict__", {}) for s in getattr(outcome, "stages", None) or ()]


if __name__ == "__main__":
    from workbench import worker
    sys.exit(worker.main())

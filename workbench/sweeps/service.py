"""What a person does with sweeps: forecast, start, stop, resume. Plain dicts in and out.

Every function takes ``home=None`` (the home of ``WORKBENCH_HOME``) and a sweep's number or name, and raises ``InputError`` or
``StorageError`` with one sentence that says what to do.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import threading
import time

from engines.errors import InputError
from workbench import names, runs, warm
from workbench.home import Home
from workbench.remedies import clock
from workbench.spec import RunSpec
from workbench.sweeps.plan import SweepPlan

SILENT = 12.0
"""Seconds without a heartbeat after which a sweep has no conductor."""
SAMPLES = 8
"""Trials that are forecast to say how long a sweep takes."""


def _home(home: Home | None) -> Home:
    return home or runs._home(None)


# -- before ------------------------------------------------------------------------------------------------------
def prepare(spec: dict | RunSpec, section: dict, home: Home | None = None) -> tuple[SweepPlan, dict]:
    """The plan with the direction of quality known, and what it is expected to take.

    Returns:
        the plan; and ``{"trials", "lanes", "one" ([low, middle, high] seconds of a trial), "seconds", "samples", "infeasible",
        "why", "metric", "text"}``.

    Raises:
        InputError: a field does not exist, a value or the model is refused, or the cluster cannot be reached.
    """
    from workbench import planner
    home = _home(home)
    plan = SweepPlan.read(spec, section)
    if any(o.name == "joules" for o in plan.objectives):
        from workbench.telemetry import device_summary
        known = device_summary()["energy"]
        if known.startswith("no "):
            raise InputError("sweep.objectives", "joules", known, "Choose another objective, such as seconds")
    lanes = 1
    if plan.on is not None:
        from workbench.sweeps.executors.reach import reach
        lanes = max(1, reach(plan.on)["lanes"])
    for parameter in plan.parameters:
        if parameter.path.split(".")[0] in ("model", "data") and parameter.choices:
            for value in parameter.choices:  # each must be there; with the others it may still be refused
                planner.forecast(plan.space.spec({parameter.path: value}), home, remedies=False)
    took, why, task, fits = [], None, None, 0
    sample = samples(plan)
    for params in sample:
        try:
            found = planner.forecast(plan.spec(params), home, remedies=False)
        except InputError as e:
            why = why or str(e)
            continue
        task = task or found["task"]
        took.append(found["seconds"]["total"])
        fits += found["fits"]
        why = why if found["fits"] else why or found["text"]
    if not took:  # nothing could even be forecast: the base says why
        planner.forecast(plan.specs[0] if plan.specs else plan.base, home)
        raise InputError("sweep.over", list(sample[0]), why or "no trial can be forecast", "Narrow the ranges")
    direction = "minimize" if task == "causal-lm" else "maximize"
    plan = plan.directed(direction)
    one = [min(took), statistics.median(took), max(took)]
    total = plan.trials * one[1] / lanes
    if plan.minutes is not None:
        total = min(total, plan.minutes * 60)
    count = plan.trials if plan.minutes is None else min(plan.trials, int(plan.minutes * 60 * lanes / max(one[1], 1e-3)))
    text = f"About {clock(total)} for {max(count, 1)} trials of {clock(one[1])} each"
    text += f", {lanes} at a time" if lanes > 1 else ""
    if fits < len(sample):
        text += f"; {len(sample) - fits} of {len(sample)} sampled do not fit and would be recorded without being run"
    return plan, dict(trials=plan.trials, lanes=lanes, one=one, seconds=total, samples=len(sample), infeasible=len(sample) - fits,
                      why=why if fits < len(sample) else None, metric="bits/byte" if direction == "minimize" else "accuracy",
                      text=text + ".")


def samples(plan: SweepPlan) -> list[dict]:
    """A few points of the space for a forecast: the two ends first, then draws that are the same every time."""
    if plan.sampler == "grid":
        points = plan.points()[:plan.trials]
        return points[::max(1, len(points) // SAMPLES)][:SAMPLES]
    rng = random.Random(plan.seed)
    found = [{p.path: p.ends()[0] for p in plan.parameters}, {p.path: p.ends()[-1] for p in plan.parameters}]
    while len(found) < SAMPLES:
        point = {}
        for p in plan.parameters:
            if p.choices:
                point[p.path] = rng.choice(p.choices)
            elif p.log:
                value = p.low * (p.high / p.low) ** rng.random()
                point[p.path] = round(value) if p.whole else value
            else:
                value = rng.choice(p.values()) if p.values() else rng.uniform(p.low, p.high)
                point[p.path] = value
        found.append(point)
    return [plan.space.used(point) for point in found]


# -- begin and end ---------------------------------------------------------------------------------------------------
def start(spec: dict | RunSpec, section: dict, *, name: str | None = None, home: Home | None = None) -> dict:
    """Record a sweep and start its conductor; returns its row with ``forecast``.

    Raises:
        InputError: nothing was started.
    """
    home = _home(home)
    plan, forecast = prepare(spec, section, home)
    taken = {row["name"] for row in home.store.sweeps(limit=None)}
    wanted = " ".join(str(name or plan.base.name or "").split())
    if wanted.isdigit():
        raise InputError("name", wanted, "a name of digits alone would be read as a sweep's number", "Add a letter")
    made, count = wanted or names.name(taken), 2
    while made in taken:
        made, count = f"{wanted}-{count}", count + 1
    sweep_id = home.store.create_sweep(plan.base.replace(name=None).to_dict(), plan.section(), name=made)
    home.store.update_sweep(sweep_id, heartbeat=time.time())
    conduct(home, sweep_id)
    return home.store.sweep(sweep_id) | {"forecast": forecast}


def stop(sweep: int | str, *, home: Home | None = None) -> dict:
    """Ask for no further trials and stop those that run; what they have learnt is evaluated and kept.

    Raises:
        InputError: it has ended already.
    """
    home = _home(home)
    row = home.store.sweep(sweep)
    if row["status"] != "running":
        raise InputError("sweep", row["name"], f"it has ended already ({row['status']})",
                         "Resume it, or choose one that is running")
    home.store.update_sweep(row["id"], wish="stop")
    if silent(row):
        conduct(home, row["id"])
    return home.store.sweep(row["id"])


def resume(sweep: int | str, *, home: Home | None = None, trials: int | None = None, minutes: float | None = None) -> dict:
    """Go on with a stopped or failed sweep, or with one whose conductor is gone; its stopped trials are run again.

    Args:
        trials, minutes: a new end for the sweep; also lets a finished one go on.

    Raises:
        InputError: it runs, or it has finished and no new end is given.
    """
    home = _home(home)
    row = home.store.sweep(sweep)
    if row["status"] == "running" and not silent(row):
        raise InputError("sweep", row["name"], "it is running already", "Stop it first")
    section = dict(row["plan"])
    if trials is not None or minutes is not None:
        section |= {k: v for k, v in (("trials", trials), ("minutes", minutes)) if v is not None}
        section = SweepPlan.read(row["spec"], section).section()
    elif row["status"] == "finished":
        raise InputError("sweep", row["name"], "it has finished, nothing is left to do",
                         "Give a larger number of trials to go on")
    for trial in home.store.trials(row["id"]):
        failed = row["status"] == "failed" and trial["state"] == "failed"
        if trial["state"] == "stopped" or failed:
            home.store.put_trial(row["id"], trial["number"], state="running", message=None, values=None, ended=None,
                                 attempt=trial["attempt"] + 1, **({"run_id": None} if failed else {}))
    home.store.update_sweep(row["id"], status="running", wish=None, ended=None, message=None, plan=section, heartbeat=time.time())
    conduct(home, row["id"])
    return home.store.sweep(row["id"])


def delete(sweep: int | str, *, home: Home | None = None) -> None:
    """Forget an ended sweep; its runs stay, with their tag.

    Raises:
        InputError: it is running.
    """
    home = _home(home)
    row = home.store.sweep(sweep)
    if row["status"] == "running" and not silent(row):
        raise InputError("sweep", row["name"], "it is running", "Stop it first")
    home.store.delete_sweep(row["id"])


def silent(row: dict) -> bool:
    """Whether a running sweep has no conductor."""
    return row["status"] == "running" and time.time() - (row["heartbeat"] or row["created"]) > SILENT


def conduct(home: Home, sweep_id: int) -> int:
    """Start the conductor's process; harmless when there is one (it leaves at once). Returns its process id."""
    folder = home.path / "sweeps"
    folder.mkdir(exist_ok=True)
    environment = warm.quiet_environment() | {"WORKBENCH_HOME": str(home.path)}
    options = (dict(creationflags=subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP) if os.name == "nt"
               else dict(start_new_session=True))
    with open(folder / f"{sweep_id}.log", "ab") as out:
        process = subprocess.Popen([sys.executable, "-m", "workbench.sweeps.conductor", str(sweep_id)], cwd=warm.ROOT,
                                   env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)
    threading.Thread(target=process.wait, name=f"sweep-{sweep_id}", daemon=True).start()
    return process.pid


def revive(home: Home) -> list[int]:
    """Give every running sweep without a conductor a new one; ids of those."""
    found = [row["id"] for row in home.store.sweeps(status="running", limit=None) if silent(row)]
    for sweep_id in found:
        home.store.update_sweep(sweep_id, heartbeat=time.time())
        conduct(home, sweep_id)
    return found


def keep(home: Home, period: float = 5.0) -> threading.Thread:
    """The server's thread that revives sweeps whose conductor has died."""
    def work():
        while True:
            try:
                revive(home)
            except Exception as e:  # a locked database must not end it
                print(f"sweeps: {type(e).__name__}: {e}", flush=True)
            time.sleep(period)
    thread = threading.Thread(target=work, name="sweeps", daemon=True)
    thread.start()
    return thread

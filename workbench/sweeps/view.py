"""Sweeps as a page and the command line show them. Plain dicts out; nothing is changed here."""

from __future__ import annotations

import time

from workbench.home import Home
from workbench.sweeps.plan import OBJECTIVES, PRUNERS, SAMPLERS, SweepPlan
from workbench.sweeps.service import _home, silent
from workbench.sweeps.space import label

UNITS = {name: unit for name, (unit, _, _) in OBJECTIVES.items()}
_IMPORTANCE: dict[tuple, list] = {}


def listing(home: Home | None = None, limit: int = 50) -> list[dict]:
    """The sweeps, newest first: id, name, status, counts, trials, objectives, message, started, ended, model, data."""
    home = _home(home)
    found = []
    for row in home.store.sweeps(limit=limit):
        plan = row["plan"]
        found.append({k: row[k] for k in ("id", "name", "status", "counts", "message", "created", "started", "ended")} | dict(
            trials=plan.get("trials"), objectives=list(plan.get("objectives") or ()), model=row["spec"].get("model"),
            data=row["spec"].get("data"), on=plan.get("on"), over=list(plan.get("over") or ()), silent=silent(row)))
    return found


def status(sweep: int | str, *, home: Home | None = None, weights: bool = True) -> dict:
    """Everything about a sweep.

    Returns:
        ``id, name, status, message, wish, created, started, ended, spec, plan, yaml``, ``objectives`` (name, direction, unit),
        ``trials`` (number, state, run, name, slot, params, values, attempt, node, progress, message, seconds ...), ``counts``,
        ``front`` (trial numbers), ``best`` ([{trial, count, at, value}] of the first objective), ``importance`` (for each
        objective {path: share}), ``left`` (seconds or None), ``parameters``, ``budget``, ``tag``.
    """
    import yaml

    from workbench.sweeps import search
    home = _home(home)
    row = home.store.sweep(sweep)
    plan = SweepPlan.read(row["spec"], row["plan"])
    with home.store.read():
        trials = home.store.trials(row["id"])
        known = {r["id"]: r for r in home.store.runs(ids=[t["run_id"] for t in trials if t["run_id"]], limit=None, archived=None)}
    metric = next((known[t["run_id"]]["metric"] for t in trials if t["run_id"] in known and known[t["run_id"]]["metric"]), None)
    objectives = [dict(name=o.name, direction=o.direction, unit=metric or "" if o.name == "quality" else UNITS[o.name])
                  for o in plan.objectives]
    rows = []
    for trial in trials:
        run = known.get(trial["run_id"]) or {}
        on = run.get("status") in ("starting", "running")
        rows.append(dict(
            number=trial["number"], state=_shown(trial, run), run=trial["run_id"] if run else None, name=run.get("name"),
            slot=run.get("slot"), params=trial["params"], values=trial["values"], attempt=trial["attempt"], node=trial["node"],
            message=trial["message"], progress=run.get("progress") if on else None, left=run.get("left_seconds") if on else None,
            low=run.get("value_low"), high=run.get("value_high"), started=trial["started"], ended=trial["ended"],
            seconds=run.get("seconds"), label=_spec_label(plan, trial["params"])))
    counts: dict[str, int] = {}
    for trial in rows:
        counts[trial["state"]] = counts.get(trial["state"], 0) + 1
    out = {k: row[k] for k in ("id", "name", "status", "message", "wish", "created", "started", "ended", "note", "spec", "plan")}
    return out | dict(
        yaml=yaml.safe_dump(row["spec"] | {"sweep": row["plan"]}, sort_keys=False, allow_unicode=True, width=110),
        objectives=objectives, trials=rows, counts=counts, front=search.front(plan, trials), best=best(plan, trials),
        budget=plan.base.budget.limits(),
        parameters=[dict(path=p.path, log=p.log, choices=[label(c) for c in p.choices] or None, low=p.low, high=p.high)
                    for p in plan.parameters],
        importance=_importance(row["id"], plan, trials) if weights else [], left=_left(row, plan, trials), silent=silent(row),
        tag=f"sweep-{row['id']}")


def _spec_label(plan: SweepPlan, params: dict) -> str | None:
    """A list's trial is named by its pipeline."""
    if not plan.specs:
        return None
    return " + ".join(m.card.id for m in plan.specs[params["spec"]].pipeline) or "evaluate"


def _shown(trial: dict, run: dict) -> str:
    if trial["state"] != "running":
        return trial["state"]
    if (trial["message"] or "").startswith("Stopped by the pruner"):
        return "pruning"
    return "queued" if run.get("status") == "queued" or not run else "running"


def best(plan: SweepPlan, trials: list[dict]) -> list[dict]:
    """The best value of the first objective so far, each time that a trial improved it."""
    from workbench.sweeps import search
    sign = 1 if plan.objectives[0].direction == "minimize" else -1
    done = sorted((t for t in trials if t["state"] == "complete" and search.usable(t["values"], plan)),
                  key=lambda t: t["ended"] or 0)
    found: list[dict] = []
    for count, t in enumerate(done, 1):
        if not found or sign * t["values"][0] < sign * found[-1]["value"]:
            found.append(dict(trial=t["number"], count=count, at=t["ended"], value=t["values"][0]))
    return found


def _importance(sweep_id: int, plan: SweepPlan, trials: list[dict]) -> list[dict]:
    from workbench.sweeps import search
    key = (sweep_id, sum(t["state"] == "complete" for t in trials))
    if key not in _IMPORTANCE:
        if len(_IMPORTANCE) > 64:
            _IMPORTANCE.clear()
        _IMPORTANCE[key] = search.importance(plan, trials)
    return _IMPORTANCE[key]


def _left(row: dict, plan: SweepPlan, trials: list[dict]) -> float | None:
    """Seconds that a running sweep may still take, from what its trials took."""
    if row["status"] != "running" or row["started"] is None:
        return None
    done = [t for t in trials if t["ended"]]
    ran = [t["ended"] - t["started"] for t in done if t["run_id"] and t["started"]]
    if not ran:
        return None
    rate = len(done) / max(time.time() - row["started"], 1e-3)
    left = (plan.trials - len(done)) / rate
    return max(0.0, min(left, row["started"] + plan.minutes * 60 - time.time()) if plan.minutes else left)


def choices() -> dict:
    """Samplers, pruners and objectives with a line about each, for the page and the help."""
    return dict(samplers=SAMPLERS, pruners=PRUNERS, objectives={k: v[2] for k, v in OBJECTIVES.items()})

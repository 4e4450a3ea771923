"""Live: one run as it happens. The page keeps no state of its own; everything comes from the database by a cursor."""

from __future__ import annotations

import asyncio
import time

from components import new_run
from components.layout import component
from components.shell import machine
from workbench import catalog, runs, spec

SCRIPTS = ("live_bus", "live_clock", "live_head", "live_readouts", "live_loss", "live_charts", "live_diversity", "live_map", "live_side")
WAIT, LOOK = 1.0, 0.03
"""An answer waits up to WAIT seconds for something new and looks every LOOK seconds: few requests, little delay."""
MOVING = ("starting", "running")


def build(home) -> None:
    """The page."""
    store = home.store

    def open_run(given: dict) -> dict:
        """Everything known of a run, or of the one most worth watching; ``{"none": True}`` when there are no runs."""
        wanted = given.get("run")
        run_id = store.run_id(wanted) if wanted else _worth_watching(store)
        if run_id is None:
            return {"none": True, "machine": machine()}
        found = runs.live(run_id, home=home)  # the cursor is as old as the rest or older: nothing can be missed
        full = store.run(run_id)
        return found | {"run": found["run"] | {k: full[k] for k in ("forecast", "footprint")}, "events": found["events"][-500:],
                        "layers": store.layer_figures(run_id), "units": {s["name"]: s["unit"] for s in store.series(run_id)}, "stages": _named(found["stages"], full["spec"]),
                        "evaluations": store.evaluations(run_id), "place": _place(store, found["run"]), "machine": machine()}

    def news(given: dict) -> dict | None:
        """What is new since the reader's marks; None when nothing is."""
        run_id = int(given["run"])
        found = runs.live(run_id, int(given.get("cursor") or 0), given.get("epoch"), int(given.get("event_cursor") or 0),
                          int(given.get("log_offset") or 0), int(given.get("layer_cursor") or 0), home=home)
        row = found["run"]
        stamp = " ".join(str(row[k]) for k in ("status", "wish", "heartbeat", "name", "phase", "size_bytes", "value", "priority"))
        fresh = found["series"] or found["reset"] or found["events"] or found["layers"] or found["log"]
        if not fresh and stamp == given.get("stamp"):
            return None
        settings = row.pop("spec")
        found["stamp"] = stamp
        moved = row["status"] != given.get("status")
        stages = found.pop("stages")
        if moved or found["events"] or "metric" in found["series"] or row["phase"] != given.get("phase"):
            found |= {"stages": _named(stages, settings), "evaluations": store.evaluations(run_id)}
        if row["status"] == "queued":
            found["place"] = _place(store, row)
        if moved:
            row |= {"footprint": store.footprint(run_id), "forecast": store.forecast(run_id)}
        return found

    async def since(given: dict) -> dict:
        """What is new since the reader's marks (cursor, epoch, event, layer, log, stamp); waits a moment for it."""
        until = time.monotonic() + min(float(given.get("wait", WAIT)), 5.0)
        while True:
            answer = await asyncio.to_thread(news, given)
            if answer is not None:
                return answer
            if time.monotonic() >= until:
                return {"same": True, "now": time.time()}
            await asyncio.sleep(LOOK)

    def recent(given: dict) -> list:
        """Runs to switch between: those that move, those that wait, then the latest."""
        keys = ("id", "name", "slot", "status", "progress", "ended", "created", "error")
        active = store.runs(status=("starting", "running", "paused"), limit=6, order="-id")
        queued = store.runs(status="queued", limit=6, order="-priority,id")
        rest = store.runs(status=("finished", "stopped", "failed", "lost"), limit=8, order="-id")
        rows = [{k: r[k] for k in keys} for r in (*active, *queued, *rest)]
        here = given.get("run")
        if here and all(r["id"] != here for r in rows):
            rows.append({k: store.light(here)[k] for k in keys})
        return rows[:14]

    def act(given: dict) -> dict:
        """Stop, pause, resume, kill or rename; answers what has changed of the run."""
        what, run_id = given["what"], int(given["run"])
        if what == "rename":
            row = runs.rename(run_id, given["name"], home=home)
        elif what in ("stop", "pause", "resume", "kill"):
            row = getattr(runs, what)(run_id, home=home)
        else:
            raise ValueError(f"unknown action {what!r}")
        return {k: row[k] for k in ("id", "name", "status", "wish")}

    def start_example(given: dict) -> dict:
        """Start the bundled example; answers its id."""
        return {"id": runs.start(spec.load("example"), home=home)["id"]}

    def points(given: dict) -> dict:
        """All points of some series, for CSV."""
        return store.all_points(int(given["run"]), names=given["names"])

    def as_yaml(given: dict) -> dict:
        """The run's settings as YAML, and the shell command that runs them again."""
        made = spec.RunSpec.from_dict(store.light(int(given["run"]))["spec"]).replace(name=None)
        return {"yaml": made.to_yaml(), "command": new_run.command(made.to_dict(), catalog.presets(), catalog.methods())}

    component("live", server_functions=(open_run, since, recent, act, start_example, points, as_yaml), elem_id="live", scripts=SCRIPTS)


def _worth_watching(store) -> int | None:
    for status in (MOVING, ("paused",), ("queued",)):
        found = store.runs(status=status, limit=1, order="id" if status == ("queued",) else "-id")
        if found:
            return found[0]["id"]
    found = store.runs(limit=1, order="-id")
    return found[0]["id"] if found else None


def _named(stages: list[dict], settings: dict) -> list[dict]:
    """Stages with the method's name and family, for people; from the settings while the run has not begun."""
    if not stages:
        stages = [{"index": i, "method": s if isinstance(s, str) else s.get("method"), "settings": s if isinstance(s, dict) else {},
                   "status": None, "started": None, "ended": None, "seconds": None, "reasons": {}, "summary": {}}
                  for i, s in enumerate(settings.get("pipeline") or [])]
    for row in stages:
        try:
            card = catalog.method(row["method"])
            row["name"], row["family"] = card["name"], card["family"]
        except Exception:  # a method that this version no longer has must not hide its old runs
            row["name"], row["family"] = row["method"], ""
    return stages


def _place(store, row: dict) -> int | None:
    """1 for the run that starts next, None when it does not wait."""
    if row["status"] != "queued":
        return None
    waiting = [r["id"] for r in store.runs(status="queued", limit=500, order="-priority,id")]
    return waiting.index(row["id"]) + 1 if row["id"] in waiting else None

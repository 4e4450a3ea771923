"""What a person does with runs: start, stop, pause, resume, kill, name, tag, clone, watch. Plain dicts in and out.

Every function takes ``home=None`` (the home of ``WORKBENCH_HOME``) and a run's number or name, and raises ``InputError`` or
``StorageError`` with one sentence that says what to do.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from typing import Any

from engines.errors import InputError
from workbench import dispatcher, names, reaper
from workbench.home import Home
from workbench.spec import RunSpec

ENDED = ("finished", "stopped", "failed", "lost")
LIVE = ("queued", "starting", "running", "paused")
TAIL_BYTES = 16_384
FIRST_POINTS = 2_000
"""Points per series (as minimum and maximum of so many ranges) that the first call of ``live`` gets."""


@functools.lru_cache(maxsize=16)
def _opened(path: str, pid: int) -> Home:
    return Home.open(path or None)


def _home(home: Home | None) -> Home:
    return home or _opened(os.environ.get("WORKBENCH_HOME") or "", os.getpid())


# -- begin ---------------------------------------------------------------------------------------------------
def prepare(spec: RunSpec | dict, force: bool = False, home: Home | None = None) -> tuple[RunSpec, dict]:
    """The spec with every ``auto`` resolved, and its forecast.

    Raises:
        InputError: the model, the data or a method refuses it; unless ``force``, also when the forecast goes over the budget.
    """
    from workbench import planner
    home = _home(home)
    if force:
        return planner.resolve(spec, home), planner.forecast(spec, home)
    return planner.demand(spec, home)


def start(spec: RunSpec | dict, queue: bool = False, *, force: bool = False, parent: int | None = None,
          home: Home | None = None) -> dict:
    """Record a run with its settings frozen as they are now; a dispatcher picks it up at once.

    Args:
        queue: False: it is the next to begin; True: it waits behind those already queued.
        force: begin although the forecast says that it does not fit its budget.

    Returns:
        the run's row.

    Raises:
        InputError: nothing was started.
    """
    home = _home(home)
    spec = spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec)
    resolved, forecast = prepare(spec, force, home)
    return record(spec, resolved, forecast, queue=queue, parent=parent, home=home)


def record(spec: RunSpec, resolved: RunSpec, forecast: dict, *, queue: bool = False, parent: int | None = None,
           home: Home | None = None) -> dict:
    """Put a prepared run into the database as queued."""
    home = _home(home)
    store = home.store
    frozen = {**(forecast or {}), "resolved": resolved.to_dict()}
    run_id = store.create_run(spec.to_dict(), name=_free_name(store, spec.name), forecast=frozen, status="queued", parent=parent,
                              priority=0 if queue else 10, tags=spec.tags, note=spec.note)
    store.update_run(run_id, folder=str(home.folder(run_id)), log_path=str(home.log(run_id)))
    dispatcher.wake(home)
    return store.light(run_id)


def _free_name(store, wanted: str | None) -> str:
    def taken(name):
        try:
            return store.run_id(name) is not None
        except LookupError:
            return False
        except Exception as e:
            if type(e).__name__ == "NotFound":
                return False
            raise
    if not wanted:
        return names.name(taken)
    wanted = " ".join(str(wanted).split())
    if wanted.lstrip("#").isdigit():
        raise InputError("name", wanted, "a name of digits alone would be read as a run's number", "Add a letter")
    found, number = wanted, 2
    while taken(found):
        found, number = f"{wanted}-{number}", number + 1
    return found


# -- wishes ----------------------------------------------------------------------------------------------------
def stop(run: int | str, *, home: Home | None = None) -> dict:
    """Ask a run to stop at its next step: it is evaluated, saved and ends as stopped; a queued or paused run ends at once.

    Raises:
        InputError: it has ended already.
    """
    home, store, row = _find(run, home)
    if row["status"] in ENDED:
        raise InputError("run", row["name"], f"it has ended already ({row['status']})",
                         "Choose a run that is queued, running or paused")
    paused = f"Stopped while paused. {reaper.way_on(home.folder(row['id']))}"
    if not (store.transition(row["id"], ("queued",), "stopped", message="Taken out of the queue.")
            or store.transition(row["id"], ("paused",), "stopped", message=paused)):
        store.wish(row["id"], "stop")
    return store.light(row["id"])


def pause(run: int | str, *, home: Home | None = None) -> dict:
    """Ask a run to write a checkpoint at its next step and to leave the device; ``resume`` goes on exactly from there.

    Raises:
        InputError: it is not running.
    """
    home, store, row = _find(run, home)
    if row["status"] not in ("starting", "running", "queued"):
        raise InputError("run", row["name"], f"it is {row['status']}, only a run that is queued or running can be paused",
                         "Resume it first" if row["status"] == "paused" else "Clone its settings to run it again")
    if not store.transition(row["id"], ("queued",), "paused", message="Held back from the queue."):
        store.wish(row["id"], "pause")
    return store.light(row["id"])


def resume(run: int | str, *, home: Home | None = None) -> dict:
    """Put a paused, lost, failed or stopped run back into the queue, ahead of those that have not begun.

    Raises:
        InputError: it has finished, or it is in the queue or running.
    """
    home, store, row = _find(run, home)
    if row["status"] == "finished":
        raise InputError("run", row["name"], "it has finished, nothing is left to resume", "Clone its settings to run it again")
    if row["status"] in ("queued", "starting", "running"):
        raise InputError("run", row["name"], f"it is {row['status']} already", "Pause or stop it first")
    done = store.transition(row["id"], ("paused", "lost", "failed", "stopped"), "queued", wish=None, error=None, ended=None,
                            owner=None, pid=None, pid_started=None, host=None, message=None, priority=20, heartbeat=None)
    if done and row["started"]:
        store.event(row["id"], "queue", f"Resume asked for. {reaper.way_on(home.folder(row['id']))}")
    dispatcher.wake(home)
    return store.light(row["id"])


def kill(run: int | str, *, home: Home | None = None) -> dict:
    """End a run's process at once; what came after its last checkpoint is lost.

    Raises:
        InputError: it has no process.
    """
    home, store, row = _find(run, home)
    if row["status"] in ("queued", "paused"):
        return stop(row["id"], home=home)
    if row["status"] in ENDED:
        raise InputError("run", row["name"], f"it has ended already ({row['status']})", "Choose a run that is running")
    store.wish(row["id"], "kill")
    judge = reaper.Reaper(home)
    row = store.light(row["id"])
    if row["pid"] and (not row["host"] or row["host"] == judge.host) and reaper.alive(row["pid"], row["pid_started"]):
        reaper.end_group(row["pid"], signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        deadline = time.monotonic() + 2
        while reaper.alive(row["pid"], row["pid_started"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        judge.ended(store.light(row["id"]), {"signal": 9})
    return store.light(row["id"])


# -- what a person notes on a run ---------------------------------------------------------------------------------
def rename(run: int | str, name: str, *, home: Home | None = None) -> dict:
    """Give a run another name; a name that is taken gets a number.

    Raises:
        InputError: the name is empty or all digits.
    """
    home, store, row = _find(run, home)
    if not str(name).strip():
        raise InputError("name", name, "a run needs a name", "Give one such as quenched-ingot-41")
    if str(name).strip() != row["name"]:
        store.update_run(row["id"], name=_free_name(store, str(name)))
    return store.light(row["id"])


def tag(run: int | str, tags: list[str] | tuple[str, ...], *, home: Home | None = None) -> dict:
    """Set the tags of a run."""
    return _set(run, home, tags=sorted({" ".join(str(t).split()) for t in tags if str(t).strip()}))


def note(run: int | str, text: str, *, home: Home | None = None) -> dict:
    """Set the note of a run."""
    return _set(run, home, note=str(text))


def star(run: int | str, starred: bool = True, *, home: Home | None = None) -> dict:
    return _set(run, home, starred=bool(starred))


def archive(run: int | str, archived: bool = True, *, home: Home | None = None) -> dict:
    """Hide an ended run from the lists, or show it again; nothing is deleted.

    Raises:
        InputError: it has not ended.
    """
    _, _, row = _find(run, home)
    if archived and row["status"] in LIVE:
        raise InputError("run", row["name"], f"it is {row['status']}", "Stop it first")
    return _set(run, home, archived=bool(archived))


def delete(run: int | str, *, home: Home | None = None) -> None:
    """Remove an ended run with its folder, for ever.

    Raises:
        InputError: it has not ended.
    """
    home, store, row = _find(run, home)
    if row["status"] in LIVE:
        raise InputError("run", row["name"], f"it is {row['status']}", "Stop it first")
    store.delete_run(row["id"])
    shutil.rmtree(home.runs_dir / str(row["id"]), ignore_errors=True)


def clone(run: int | str, *, home: Home | None = None) -> dict:
    """The settings of a run as a spec to start anew; without its name."""
    spec = dict(_find(run, home)[2]["spec"])
    spec.pop("name", None)
    return spec


def _find(run: int | str, home: Home | None) -> tuple[Home, Any, dict]:
    home = _home(home)
    return home, home.store, home.store.light(home.store.run_id(run))


def _set(run, home, **fields) -> dict:
    home, store, row = _find(run, home)
    store.update_run(row["id"], **fields)
    return store.light(row["id"])


# -- watching ------------------------------------------------------------------------------------------------------
def live(run_id: int, cursor: int = 0, epoch: int | None = None, event_cursor: int = 0, log_offset: int = 0,
         layer_cursor: int = 0, *, home: Home | None = None) -> dict:
    """What is new of a run since the last call, in one cheap call.

    Args:
        cursor, epoch, event_cursor, log_offset, layer_cursor: as the last answer gave them; zeros (and None) for all.

    Returns:
        ``run`` (row without forecast and footprint), ``cursor``, ``epoch``, ``reset`` (True: forget the curves and events, this
        is all of it), ``series`` ({name: {step, value, t}}), ``events``, ``event_cursor``, ``stages``, ``layers`` (None:
        unchanged), ``layer_cursor``, ``log`` (new text; on the first call its last part), ``log_offset``, ``now``.
    """
    home = _home(home)
    store = home.store
    with store.read():
        row = store.light(run_id)
        news = store.since(run_id, cursor, epoch=epoch, buckets=FIRST_POINTS)
        reset = cursor == 0 or (epoch is not None and news["epoch"] != epoch)
        events = store.events(run_id, 0 if reset and cursor else event_cursor)
        layers = store.layers(run_id, layer_cursor)
        stages = store.stages(run_id)
    text, log_offset = tail(home, run_id, log_offset)
    return dict(run=row, cursor=news["cursor"], epoch=news["epoch"], reset=reset, series=news["series"], events=events,
                event_cursor=events[-1]["id"] if events else event_cursor, stages=stages, layers=layers,
                layer_cursor=layers["id"] if layers else layer_cursor, log=text, log_offset=log_offset, now=time.time())


def tail(home: Home, run_id: int, offset: int = 0, limit: int = TAIL_BYTES) -> tuple[str, int]:
    """New text of a run's log from ``offset`` on, at most its last ``limit`` bytes, and the offset to ask from next."""
    try:
        with open(home.log(run_id), "rb") as f:
            size = f.seek(0, 2)
            if offset > size:
                offset = 0
            begin = max(offset, size - limit)
            f.seek(begin)
            data = f.read(size - begin)
    except OSError:
        return "", 0
    if begin > offset and (line := data.find(b"\n")) >= 0:
        data = data[line + 1:]
    whole = data.rfind(b"\n") + 1
    if not whole and len(data) > 4096:  # an unfinished line comes with the next call, unless it has no end
        whole = len(data)
    return data[:whole].decode("utf-8", "replace"), size - (len(data) - whole)


def results(run: int | str, *, home: Home | None = None) -> dict:
    """What ``run --json`` and ``show --json`` print: state, stages, evaluation before and after, forecast, footprint, error."""
    home = _home(home)
    store = home.store
    with store.read():
        row = store.run(run)
        stages, evaluations, artifacts = store.stages(row["id"]), store.evaluations(row["id"]), store.artifacts(row["id"])
    before, after = _before(evaluations), _after(evaluations)
    footprint = dict(row["footprint"] or {})
    return dict(
        run=row["id"], name=row["name"],
        **{key: row[key] for key in ("status", "seconds", "progress", "phase", "message", "created", "started", "ended")},
        seed=row["spec"].get("seed", 0), model=row["spec"].get("model"), data=row["spec"].get("data"),
        budget=row["spec"].get("budget") or {},
        stages=[dict(method=s["method"], hyperparameters={k: v for k, v in s["settings"].items() if k != "method"},
                     seconds=s["seconds"], status=s["status"], reasons=s["reasons"] or {}, summary=s["summary"] or {})
                for s in stages],
        evaluation=dict(before=_short(before), after=_short(after),
                        all=[_short(e) | dict(name=e["name"], stage=e["stage"], step=e["step"]) for e in evaluations]),
        forecast=row["forecast"], footprint=_footprint(footprint, row), error=row["error"], tags=row["tags"], note=row["note"],
        parent=row["parent"], folder=row["folder"], log=row["log_path"], artifacts=artifacts, spec=row["spec"])


def _footprint(found: dict, row: dict) -> dict:
    """The measured figures under fixed names, whatever the pipeline added."""
    phases = found.pop("phases", [])
    keys = dict(peak_bytes_by_phase={p["phase"]: p.get("peak_bytes") for p in phases},
                seconds_by_phase={p["phase"]: p["seconds"] for p in phases},
                peak_bytes=found.get("peak_bytes", row["peak_bytes"]), trainable=found.get("trainable", row["trainable"]),
                size_bytes=found.get("size_bytes", row["size_bytes"]), parameters=found.get("parameters", row["parameters"]),
                sparsity=found.get("sparsity"), bits_per_weight=found.get("bits_per_weight"), joules=found.get("joules"))
    return found | keys | dict(phases=phases)


def _before(evaluations: list[dict]) -> dict | None:
    """The evaluation of the model as it came."""
    return next((e for e in evaluations if e["stage"] < 0), None)


def _after(evaluations: list[dict]) -> dict | None:
    """The last evaluation made after the first stage began; one of the finished model is preferred."""
    later = [e for e in evaluations if e["stage"] >= 0]
    final = [e for e in later if e["name"] == "result"]
    return (final or later or [None])[-1]


def _short(evaluation: dict | None) -> dict | None:
    if evaluation is None:
        return None
    extra = evaluation["extra"] or {}
    return dict(metric=evaluation["metric"], value=evaluation["value"], interval=[evaluation["low"], evaluation["high"]],
                n=evaluation["n"], **{k: extra[k] for k in ("loss", "perplexity", "seconds", "tokens_per_second") if k in extra})

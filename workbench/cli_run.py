"""Starting a run from the command line, following it, and telling how it ended."""

from __future__ import annotations

import shutil
import sys
import time

from workbench.cli_shared import complain, emit, giga, home_of, mega, spec_of, table
from workbench.remedies import clock

ENDED = ("finished", "stopped", "failed", "lost")


def run(args) -> int:
    return launch(spec_of(args), args)


def launch(spec, args, *, parent: int | None = None, more=None, tell=None) -> int:
    """Start ``spec`` and follow it as ``args.json`` and ``args.detach`` ask; the exit code.

    Args:
        more: run id -> further entries of the JSON object.
        tell: run id -> None; prints after the result for people.
    """
    from workbench import dispatcher, machine
    from workbench import runs as running

    home = home_of()
    feeder = dispatcher.Dispatcher(home, keep_warm=False)
    row = running.start(spec, queue=bool(home.store.count_runs(status=("queued",))), parent=parent, home=home)
    feeder.start()
    try:
        if args.detach:
            row = begun(home, row["id"])
            text = f"{row['name']} (run {row['id']}) is {row['status']}"
            text += "; it begins when a server or another `run` feeds the queue" if row["status"] == "queued" else ""
            emit({"run": row["id"], "name": row["name"], "status": row["status"]}) if args.json else print(text)
            return 0
        row = follow(home, row["id"], quiet=args.json)
    except KeyboardInterrupt:
        return complain(f"{row['name']} goes on without this terminal; `python -m workbench stop {row['id']}` ends it", 1)
    finally:
        feeder.stop()
    found = running.results(row["id"], home=home)
    emit(found | (more(row["id"]) if more else {})) if args.json else show_result(found)
    if tell and not args.json:
        tell(row["id"])
    if machine.measured(home.store) is None and row["status"] == "finished":
        _measure_later(home)
    if row["status"] in ("failed", "lost"):
        error = found.get("error") or {}
        return complain(f"{error.get('cause') or row['message'] or 'the run ' + row['status']} {error.get('remedy') or ''}", 1)
    return 0


def begun(home, run_id: int, patience: float = 30.0) -> dict:
    """Wait until the run has its process, or until it is plain that another run holds the device."""
    end = time.monotonic() + patience
    while True:
        row = home.store.light(run_id)
        if row["status"] not in ("queued", "starting") or (row["status"] == "starting" and row["pid"]):
            return row
        busy = home.store.count_runs(status=("starting", "running"))
        if time.monotonic() > end or (row["status"] == "queued" and busy):
            return row
        time.sleep(0.1)


def _measure_later(home) -> None:
    """After a first run the machine is idle: measure it once, so that the next forecast is a better one."""
    from workbench import machine

    try:
        if machine.quiet():
            machine.calibrate(home.store)
    except Exception:  # a measurement is a courtesy; the run has ended well without it
        pass


def follow(home, run_id: int, quiet: bool = False) -> dict:
    """Wait for the run to end; one line that renews itself on a terminal, events as lines elsewhere."""
    store, cursor, shown, live = home.store, 0, "", sys.stderr.isatty() and not quiet
    first = True
    while True:
        row = store.light(run_id)
        if not quiet:
            if first:
                print(f"{row['name']} (run {run_id})", file=sys.stderr)
                first = False
            for event in store.events(run_id, cursor):
                cursor = event["id"]
                if event["kind"] in ("stage", "choice", "warning", "memory", "resume", "failure", "freeze", "alarm"):
                    print(("\r\033[K" if live else "") + event["text"], file=sys.stderr)
            if live:
                line = progress_line(row, store)
                if line != shown:
                    print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)
                    shown = line
        if row["status"] in ENDED or row["status"] == "paused":
            if live:
                print("\r\033[K", end="", file=sys.stderr)
            return row
        time.sleep(0.25)


def progress_line(row: dict, store) -> str:
    """``[#####.....]  52 %  2 lora  loss 1.83  3,410/s  0:41 left``."""
    share = row["progress"] or 0.0
    parts = ["[" + "#" * int(20 * share) + "." * (20 - int(20 * share)) + "]", f"{share:4.0%}", row["phase"] or row["status"]]
    latest = {s["name"]: s["last_value"] for s in store.series(row["id"]) if s["name"] in ("loss", "metric")}
    if latest.get("loss") is not None:
        parts.append(f"loss {latest['loss']:.3f}")
    if row["tokens_per_second"]:
        parts.append(f"{row['tokens_per_second']:,.0f}/s")
    if row["left_seconds"] is not None:
        parts.append(f"{clock(row['left_seconds'])} left")
    return "  ".join(parts)


def show_result(found: dict) -> None:
    """A run in lines for people."""
    print(
        f"{found['name']} (run {found['run']}): {found['status']}"
        + (f" in {clock(found['seconds'])}" if found["seconds"] else "")
    )
    table(
        [
            (
                i + 1,
                s["method"],
                clock(s["seconds"] or 0),
                ", ".join(f"{k}={v}" for k, v in s["hyperparameters"].items() if v not in ("", None, False))[:80],
            )
            for i, s in enumerate(found["stages"])
        ],
        ("stage", "method", "time", "hyperparameters"),
    )
    for name in ("before", "after"):
        e = found["evaluation"][name]
        if e:
            print(f"{name}: {e['value']:.4f} [{e['interval'][0]:.4f}, {e['interval'][1]:.4f}] {e['metric']}, n = {e['n']}")
    measured, said = found["footprint"], found["forecast"] or {}
    pairs = (
        ("peak memory", giga, measured.get("peak_bytes"), (said.get("memory") or {}).get("peak_bytes")),
        ("size", mega, measured.get("size_bytes"), (said.get("size") or {}).get("bytes")),
        ("trainable", "{:,}".format, measured.get("trainable"), (said.get("trainable") or {}).get("count")),
    )
    rows = [
        (what, form(b) if b is not None else "", form(a) if a is not None else "")
        for what, form, a, b in pairs
        if a is not None or b is not None
    ]
    if rows:
        table(rows, ("", "forecast", "measured"))
    if found["error"]:
        print(f"{found['error'].get('cause', '')} {found['error'].get('remedy', '')}".strip())

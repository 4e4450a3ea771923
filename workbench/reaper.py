"""Finds runs whose process is gone and says so, and makes a stop happen when the run does not hear it.

A run lives while a process of its id and start time exists. Judged from another machine that shares the home, only the
heartbeat counts. A server that starts anew needs nothing else: runs that go on are simply found alive.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

from workbench import doctor, machine

FAR = 60.0
"""Seconds without a heartbeat after which a run on another machine counts as lost."""
UNSPAWNED = 45.0
"""Seconds after which a run that was claimed, but has no process, goes back to the queue."""
NOTE_WAIT = 1.5
"""Seconds that the parent of a dead process may take to write how it ended."""
GRACE, FORCE = 15.0, 25.0
"""Seconds after a stop that was not heard until SIGTERM, and until SIGKILL."""
HEARD_GRACE, HEARD_FORCE = 240.0, 300.0
"""The same once the loop has heard it and is at its last evaluation and at saving."""
HEARD = "Stopping: the last evaluation and saving are under way."


def alive(pid: int | None, started: float | None) -> bool:
    """True when the process that has this id is the one that began at ``started`` (ids are used again)."""
    import psutil
    if not pid:
        return False
    try:
        process = psutil.Process(pid)
        if started is not None and abs(process.create_time() - started) > 2.0:
            return False
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it exists, but may not be looked at


def checkpoint(folder: Path) -> dict | None:
    """``{"step", "t"}`` of the newest complete checkpoint of a run's folder; t is when it was made."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        facts = path / "checkpoint.json"
        if (found := re.fullmatch(r"step-(\d+)", path.name)) and facts.is_file():
            return dict(step=int(found[1]), t=facts.stat().st_mtime)
    return None


def way_on(folder: Path) -> str:
    """The sentence that says what a resume will do."""
    found = checkpoint(folder)
    if found is None:
        return "There is no checkpoint yet: resume begins again."
    return f"Resume goes on from the checkpoint at step {found['step']:,}."


def exit_note(home, run: dict) -> dict:
    """How the run's process ended, from its parent: code, signal, peak_bytes; empty when nobody was there to see it."""
    try:
        note = json.loads(home.exit_note(run["id"]).read_text())
    except (OSError, ValueError):
        return {}
    return note if not run["pid"] or note.get("pid") == run["pid"] else {}


def end_group(pid: int, number: int) -> bool:
    """Send a signal to the process group of a run; False when it is gone."""
    try:
        if os.name == "nt":
            os.kill(pid, signal.SIGTERM)
        elif os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False


class Reaper:
    """Looks at the runs in progress; ``sweep`` takes a millisecond or two and is called once a second."""

    def __init__(self, home):
        self.home, self.store, self.host = home, home.store, socket.gethostname()
        self.asked: dict[int, tuple[str, float]] = {}
        self.termed: set[int] = set()

    def sweep(self) -> list[int]:
        """Ids of the runs whose state was corrected."""
        changed, seen = [], set()
        for run in self.store.runs(status=("starting", "running"), limit=None, archived=None):
            seen.add(run["id"])
            if self.look(run, time.time()):
                changed.append(run["id"])
        self.asked = {k: v for k, v in self.asked.items() if k in seen}
        self.termed &= seen
        return changed

    def look(self, run: dict, now: float) -> bool:
        """Judge one run; True when its state was corrected."""
        quiet = now - (run["heartbeat"] or run["queued"] or run["created"])
        if run["host"] and run["host"] != self.host:
            return quiet > FAR and self.lost(run, {}, f"Nothing was heard from {run['host']} for {quiet:.0f} s.")
        if run["pid"] is None:
            if run["status"] == "starting" and quiet > UNSPAWNED:
                return self.store.transition(run["id"], ("starting",), "queued", owner=None, message=None)
            return run["status"] == "running" and quiet > FAR and self.lost(run, {})
        if alive(run["pid"], run["pid_started"]):
            self.press(run)
            return False
        note = exit_note(self.home, run)
        if not note and quiet < NOTE_WAIT:
            return False
        return self.ended(run, note)

    # -- a run that is gone ------------------------------------------------------------------------------------
    def ended(self, run: dict, note: dict) -> bool:
        folder = self.home.folder(run["id"])
        if run["wish"] in ("stop", "kill"):
            how = "at once, as asked" if run["wish"] == "kill" else "by force: it did not come to its next step in time"
            return self.store.transition(run["id"], ("starting", "running"), "stopped", wish=None, pid=None, pid_started=None,
                                         left_seconds=None, phase=None, message=f"Ended {how}. {way_on(folder)}")
        kills = self.oom_kills(run)
        series = {s["name"]: s for s in self.store.series(run["id"])}
        peak = max(note.get("peak_bytes") or 0, (series.get("mem/rss") or {}).get("last_value") or 0) or None
        error = doctor.diagnose(None, self.home.log(run["id"]), exit_signal=note.get("signal"), exit_code=note.get("code"),
                                oom_kills=kills, peak_bytes=peak, total_bytes=machine.memory()["total"])
        if error["kind"] == "memory" or note.get("code"):
            return self.close(run, "failed", error, f"{error['cause']} {way_on(folder)}")
        return self.lost(run, error)

    def oom_kills(self, run: dict) -> int:
        """Processes that the kernel has ended for memory since this run's last start."""
        from workbench.telemetry import oom_kills
        starts = [e for kind in ("start", "resume") for e in self.store.events(run["id"], kind=kind)]
        before = max(starts, key=lambda e: e["id"])["data"].get("oom_kills") if starts else None
        now = oom_kills()
        return 0 if before is None or now is None else max(0, now - before)

    def lost(self, run: dict, error: dict, why: str | None = None) -> bool:
        cause = why or error.get("cause") or "The run's process is gone and left no word of the cause."
        error = {"kind": "lost", "cause": cause, "remedy": way_on(self.home.folder(run["id"])), "log": [], **error}
        error["remedy"] = way_on(self.home.folder(run["id"]))
        return self.close(run, "lost", error, f"{cause} {error['remedy']}")

    def close(self, run: dict, state: str, error: dict, message: str) -> bool:
        done = self.store.transition(run["id"], ("starting", "running"), state, error=error, message=message, pid=None,
                                     pid_started=None, left_seconds=None, wish=None, ended=run["heartbeat"] or time.time())
        if done:
            self.store.event(run["id"], state, message)
        return done

    # -- a stop that is not heard ------------------------------------------------------------------------------
    def press(self, run: dict) -> None:
        """Escalate a stop: the flag was set by the person, then SIGTERM, then SIGKILL of the group. A pause is never forced."""
        wish = run["wish"]
        if wish not in ("stop", "kill"):
            self.asked.pop(run["id"], None)
            return
        known = self.asked.get(run["id"])
        heard = run["message"] == HEARD
        if known is None or known[0] != f"{wish}{heard}":
            known = self.asked[run["id"]] = (f"{wish}{heard}", time.monotonic())
        waited = time.monotonic() - known[1]
        grace, force = (HEARD_GRACE, HEARD_FORCE) if heard else (GRACE, FORCE)
        if wish == "kill" or waited > force:
            end_group(run["pid"], signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        elif waited > grace and run["id"] not in self.termed:
            self.termed.add(run["id"])
            self.store.event(run["id"], "warning", f"The stop was not heard within {waited:.0f} s: the process is asked to end")
            try:
                os.kill(run["pid"], signal.SIGTERM)
            except (ProcessLookupError, PermissionError):
                pass


def sweep(home) -> list[int]:
    """One look at the runs in progress, for a program without a dispatcher (the command line)."""
    return Reaper(home).sweep()

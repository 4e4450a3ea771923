"""A probe under way: one child process, watched, ended after a minute at the most; one at a time in a home.

A run always goes first: a probe does not begin beside one, and one that begins meanwhile ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path

from engines.errors import InputError
from workbench import machine, probe, telemetry, warm
from workbench.spec import RunSpec

SECONDS = 60.0
"""The most that a probe takes, its process included."""
OWN = 45.0
"""What the child may plan with."""
LEASE = "probe"
_JOBS: dict[str, Job] = {}


class Job:
    """One probe; ``start`` returns at once, ``wait`` when it has ended. ``state`` is what the page shows."""

    def __init__(self, spec: RunSpec, home, seconds: float = SECONDS):
        from workbench import planner
        self.home, self.store, self.given, self.limit = home, home.store, spec, seconds
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.scene = planner.scene_of(spec, home)
        self.resolved = planner.resolve(spec, home)
        if not self.resolved.pipeline:
            raise InputError("pipeline", [], "there is nothing to probe", "Add a stage")
        self.key = probe.key(self.resolved, self.scene)
        self.forecast = planner.forecast(spec, home, remedies=False)
        self.text, self.share, self.error, self.result = "starting", 0.0, "", None
        self.began = time.monotonic()
        self.disturbed = False
        """Other programs used the processors when it began."""
        self.ended = threading.Event()
        self._cancel = threading.Event()
        self._why = "Cancelled."
        self.pid: int | None = None

    # -- from outside --------------------------------------------------------------------------------------
    def start(self) -> Job:
        """Begin.

        Raises:
            InputError: a run or another probe is on the device.
        """
        if name := busy(self.store):
            raise InputError("probe", name, "a run is on the device, and beside it nothing can be measured",
                             "Wait until it has ended, or pause it")
        if not self.store.lease(LEASE, self.owner, self.limit + 15):
            raise InputError("probe", self.given.model, "another probe is on the device", "Wait until it has ended: a minute at the most")
        threading.Thread(target=self._work, name="probe", daemon=True).start()
        return self

    def cancel(self, why: str = "Cancelled.") -> None:
        self._why = why
        self._cancel.set()

    def wait(self, progress=None) -> dict:
        """The state at the end; ``progress`` is called with each new state meanwhile.

        Raises:
            InputError: it could not measure anything; the text says why.
        """
        last = ""
        while not self.ended.wait(0.1):
            if progress is not None and self.text != last:
                last = self.text
                progress(self.state())
        if self.error:
            raise InputError("probe", self.given.model, self.error.rstrip("."), "Correct that, or go by the forecast")
        return self.state()

    def state(self) -> dict:
        """running, text, share, seconds, key, problem, result (what ``probe.said`` tells of it)."""
        return dict(running=not self.ended.is_set(), text=self.text, share=self.share, seconds=round(time.monotonic() - self.began, 1),
                    key=self.key, problem=self.error, result=self.result)

    # -- inside --------------------------------------------------------------------------------------------
    def _work(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="probe-", dir=self.home.path))
        try:
            self._run(folder)
        except Exception as e:
            self.error = f"The probe could not be made ({type(e).__name__}: {e})"
        finally:
            self._end_process()
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self.store.release(LEASE, self.owner)
            except Exception:
                pass  # it expires by itself
            self.ended.set()
            self.store.close()

    def _run(self, folder: Path) -> None:
        self.disturbed = not machine.quiet(0.3)
        stages = self.forecast.get("stages") or []
        evaluating = next((p for p in self.forecast["seconds"]["phases"] if p["phase"] == "evaluate"), {"seconds": 0.0})
        times = 2 + sum(self.resolved.training.evaluations if m.card.trains else 1 for m in self.resolved.pipeline)
        threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or telemetry.threads()
        device = "cpu" if os.environ.get("WORKBENCH_DEVICE") == "cpu" else machine.device()
        (folder / "request.json").write_text(json.dumps(dict(
            spec=self.resolved.to_dict(), device=device, threads=threads, seconds=OWN * self.limit / SECONDS,
            evaluation=evaluating["seconds"] / times,
            forecast={str(i): s.get("seconds") for i, s in enumerate(stages) if not s.get("steps")})))
        # From the warm worker, as a run is: its resident set begins with the same libraries.
        self.pid = warm.spawn(self.home.path, 0, folder, folder / "log.txt", threads, wait=15.0, probe=True).pid
        asked = 0.0
        while (code := self._ended(folder)) is None:
            self._read(folder)
            if time.monotonic() - asked > 0.5:
                asked = time.monotonic()
                if name := busy(self.store):
                    self.cancel(f"{name} has begun: the probe made room for it.")
            if self._cancel.wait(0.1):
                self.error = self._why
                return
            if time.monotonic() - self.began > self.limit:
                self._end_process()
                self._partial(folder)
                return
        self._finish(folder, code)

    def _ended(self, folder: Path) -> int | None:
        """Exit code of the child, minus the signal that ended it; None while it works."""
        if alive(self.pid):
            return None
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                note = json.loads((folder / "exit.json").read_text())
                return -note["signal"] if note["signal"] else note["code"]
            except (OSError, ValueError):
                time.sleep(0.05)
        return 1

    def _read(self, folder: Path) -> dict:
        try:
            found = json.loads((folder / "progress.json").read_text())
        except (OSError, ValueError):
            return {}
        self.text, self.share = found["text"], found["share"]
        return found

    def _finish(self, folder: Path, code: int) -> None:
        self._read(folder)
        try:
            found = json.loads((folder / "result.json").read_text())
        except (OSError, ValueError):
            found = None
        if found is None:
            if code != -signal.SIGKILL:
                tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
                self.error = f"The probe's process ended with code {code}" + (f" ({tail[0][:160]})" if tail else "")
                return
            # Nobody but the kernel ends it so: the machine's memory was used up.
            found = dict(stages=[], peaks={}, missing=[], seconds=time.monotonic() - self.began,
                         failed=dict(phase=self._phase(), doing=self.text, text="the machine's memory was used up"))
        if found.get("error"):
            self.error = found["error"]
            return
        self._keep(found)

    def _partial(self, folder: Path) -> None:
        """Keep what a probe had measured when its time was over."""
        try:
            found = json.loads((folder / "partial.json").read_text())
        except (OSError, ValueError):
            found = {}
        if not found.get("evaluation"):
            self.error = f"The probe did not get beyond {self.text} within {self.limit:.0f} seconds"
            return
        found["missing"].append(f"time was over while {self.text}")
        self._keep(found | dict(seconds=time.monotonic() - self.began))

    def _keep(self, found: dict) -> None:
        self.store.put_probe(self.key, found | dict(disturbed=self.disturbed))
        self.result = probe.said(self.resolved, self.store.probe(self.key))
        self.text, self.share = "done", 1.0

    def _phase(self) -> str:
        """The phase to which the last words of the child's progress belong."""
        for i, method in enumerate(self.resolved.pipeline):
            if self.text in (f"training with {method.card.name}", f"trying {method.card.name}"):
                return f"{i + 1} {method.card.id}"
        return "evaluate" if "evaluat" in self.text else "save" if "sav" in self.text else "load"

    def _end_process(self) -> None:
        if self.pid is None or not alive(self.pid):
            return
        try:
            os.killpg(self.pid, signal.SIGKILL) if os.name != "nt" else os.kill(self.pid, signal.SIGTERM)
        except OSError:
            pass
        until = time.monotonic() + 10
        while alive(self.pid) and time.monotonic() < until:
            time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its exit code to be taken."""
    import psutil
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def busy(store) -> str:
    """Name of a run that is on the device, or ""."""
    rows = store.runs(status=("starting", "running"), limit=1, archived=None)
    return rows[0]["name"] if rows else ""


# -- for the page, the command line and the endpoints ----------------------------------------------------------------------
def begin(spec: RunSpec | dict, home) -> Job:
    """Start a probe of ``spec``.

    Raises:
        InputError: the spec is refused, or the device is not free.
    """
    job = Job(spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec), home).start()
    _JOBS[str(home.path)] = job
    return job


def run(spec: RunSpec | dict, home, progress=None) -> dict:
    """Probe ``spec`` and wait.

    Returns:
        the state at its end; its ``result`` says what was measured.

    Raises:
        InputError: as ``begin``; or nothing could be measured.
    """
    return begin(spec, home).wait(progress)


def state(home) -> dict:
    """The latest probe of this server: as ``Job.state``; running False and no result when there was none."""
    job = _JOBS.get(str(home.path))
    return job.state() if job else dict(running=False, text="", share=0.0, seconds=0.0, key="", problem="", result=None)


def cancel(home) -> dict:
    """End the probe under way."""
    job = _JOBS.get(str(home.path))
    if job is not None and not job.ended.is_set():
        job.cancel()
        job.ended.wait(5)
    return state(home)

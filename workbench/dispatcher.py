"""Feeds the queue: one thread per server, and exactly one of several servers on a home at a time.

The lease in the database says which; it is renewed every second and falls to another server a few seconds after its
holder has gone. The leader also reaps. Runs are processes of their own, so a server may come and go while they go on.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid

from workbench import crew, doctor, machine, space, telemetry, warm
from workbench.reaper import Reaper

TICK, RENEW, LEASE, KEEP_WARM = 0.2, 1.0, 4.0, 10.0
"""Seconds between looks at the queue, renewals of the lease, its length, and calls that keep the warm worker alive."""
PER_DEVICE = "runs_per_device"
"""Setting: how many runs may share a device; 1, because two training processes on one device slow each other manifold."""
_WAKE: dict[str, threading.Event] = {}


def wake(home) -> None:
    """Let this process's dispatcher look at the queue now."""
    if str(home.path) in _WAKE:
        _WAKE[str(home.path)].set()


class Dispatcher:
    """``start`` returns at once; ``stop`` ends the thread and gives the lease back, runs go on."""

    def __init__(self, home, keep_warm: bool = True):
        self.home, self.store = home, home.store
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.leader = False
        """True while this server feeds the queue."""
        self.trouble = ""
        """The last error of the thread, for the page; empty when all is well."""
        self.keep_warm = keep_warm
        self.reaper = Reaper(home)
        self._end = threading.Event()
        self._wake = _WAKE.setdefault(str(home.path), threading.Event())
        self._thread = threading.Thread(target=self._work, name="dispatcher", daemon=True)

    def start(self) -> Dispatcher:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._end.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            self.store.release("dispatcher", self.owner)
        except Exception:
            pass  # it expires by itself
        self.leader = False

    def _work(self) -> None:
        renewed = reaped = warmed = 0.0
        while not self._end.is_set():
            now = time.monotonic()
            try:
                if now - renewed >= RENEW:
                    renewed = now
                    self.leader = self.store.lease("dispatcher", self.owner, LEASE)
                if self.keep_warm and not machine.zero_gpu() and now - warmed >= KEEP_WARM:
                    warmed = now
                    warm.ensure(self.home.path)
                if self.leader and now - reaped >= RENEW:
                    reaped = now
                    self.reaper.sweep()
                if self.leader:
                    while self.feed():
                        pass
                self.trouble = ""
            except Exception as e:  # a full disk or a locked database must not end the queue
                if str(e) != self.trouble:
                    self.trouble = str(e)
                    print(f"dispatcher: {type(e).__name__}: {e}", flush=True)
            self._wake.wait(TICK)
            self._wake.clear()
        self.store.close()

    # -- the queue -------------------------------------------------------------------------------------------
    def feed(self) -> bool:
        """Start the next queued run if a device is free; False: nothing to do."""
        if not self.store.count_runs(status="queued", archived=None):
            return False
        devices = self.devices()
        per_device = max(1, int(self.store.get_setting(PER_DEVICE, 1)))
        with self.store.transaction():
            # The lease is looked at once more inside: a server that slept through its lease must not feed beside the new leader.
            if not self.store.lease("dispatcher", self.owner, LEASE):
                self.leader = False
                return False
            active = [run for run in self.store.runs(status=("starting", "running"), limit=None, archived=None)
                      if not (run["host"] or "").startswith("ray:")]  # those are on the nodes of a cluster
            if sum(crew.processes(r["spec"]) for r in active) >= devices * per_device:
                return False
            run = self.store.claim_next(self.owner)
            if run is None:
                return False
            wanted, environment = crew.processes(run["spec"]), {}
            if wanted > 1 and active:  # it waits for whole devices, and who stands behind it waits with it
                self.store.transition(run["id"], ("starting",), "queued", owner=None)
                return False
            if devices > 1:
                free = list(range(wanted)) if wanted > 1 else [self.free_device(active, devices)]
                shown = [d for d in (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",") if d]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(shown[i] if shown else str(i) for i in free)
                self.store.event(run["id"], "device", f"GPU {', '.join(map(str, free))}", index=free[0], indices=free)
        threading.Thread(target=self.spawn, args=(run, environment, per_device), name=f"spawn-{run['id']}", daemon=True).start()
        return True

    def devices(self) -> int:
        """GPUs that runs may use; 1 (the processor) where there is none."""
        if machine.device() != "cuda":
            return 1
        shown = [d for d in (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",") if d]
        return max(1, min(machine.gpu()["count"], len(shown) or machine.gpu()["count"]))

    def free_device(self, active: list[dict], devices: int) -> int:
        """Index of the device with the fewest runs."""
        load = [0] * devices
        for run in active:
            events = self.store.events(run["id"], kind="device")
            for index in (events[-1]["data"].get("indices") or [events[-1]["data"].get("index", 0)]) if events else ():
                load[index % devices] += 1
        return load.index(min(load))

    def spawn(self, run: dict, environment: dict, per_device: int = 1) -> None:
        """Start the process of a claimed run; a failure to start is the run's failure, the queue goes on."""
        import psutil
        try:
            if machine.zero_gpu():
                space.run(run["id"], self.home)
                return
            folder, log = self.home.folder(run["id"]), self.home.log(run["id"])
            threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, telemetry.threads() // per_device)
            made = warm.spawn(self.home.path, run["id"], folder, log, threads, environment)
            try:
                started = psutil.Process(made.pid).create_time()
            except psutil.Error:
                started = None
            # Only while it has not claimed itself; the reaper then finds a process that died before it could.
            self.store.transition(run["id"], ("starting",), "starting", pid=made.pid, pid_started=started, heartbeat=time.time())
        except Exception as e:
            error = doctor.diagnose(e)
            self.store.transition(run["id"], ("starting",), "failed", error=error,
                                  message=f"The run's process could not be started. {error['cause']}")
        finally:
            self.store.close()

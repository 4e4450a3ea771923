"""The writer thread of a worker: takes what happens in memory and commits it a few times a second."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from pathlib import Path

from storage.errors import NotFound, StorageError

LIMIT = 2_000_000
"""Calls kept in memory while the database cannot be written; beyond it the oldest points are dropped."""


class Writer:
    """Collects points, events and figures of one run; one transaction takes them all.

    Every call appends to a queue and returns: it neither waits for the disk nor raises because of it. The thread commits
    twice per ``period``, so that a SIGKILL loses at most ``period`` seconds, the time of a commit included. The first
    points of a run are committed at once. A locked database or a full disk is retried; the points wait in memory.

    Args:
        log: file to which ``log`` appends lines; None: lines become events of the kind ``log``.
    """

    def __init__(self, store, run_id: int, period: float = 0.5, log: str | Path | None = None):
        self.store, self.run_id, self.period = store, run_id, period
        self.error: StorageError | None = None
        """The last failure to write, None once it worked again."""
        self.commits = 0
        self._queue: deque = deque()
        self._pending: list = []
        self._step: int | None = None
        self._wake, self._stop = threading.Event(), False
        self._first = True
        self._flushing = threading.Lock()
        self._log = open(log, "a", encoding="utf-8", buffering=1) if log is not None else None
        self._thread = threading.Thread(target=self._work, name=f"writer-{run_id}", daemon=True)
        self._thread.start()
        me = weakref.ref(self)
        self._last_call = lambda: (writer := me()) is not None and writer.close(timeout=5.0, quiet=True)
        atexit.register(self._last_call)

    # -- what a worker calls -----------------------------------------------------------------------------
    def points(self, step: int, values: dict, t: float) -> None:
        """Values of series at a step; ``t`` is seconds since the run started. Tensors are read here, so pass numbers."""
        self._step = step
        self._queue.append(("points", step, [(name, float(value)) for name, value in values.items()], t))
        if self._first:
            self._first = False
            self._wake.set()

    def samples(self, t: float, values: dict) -> None:
        """Values of series that are sampled by time (memory, power); their step is ``t`` in milliseconds."""
        self._queue.append(("samples", round(t * 1000), [(name, float(value)) for name, value in values.items()], t))

    def event(self, kind: str, text: str, t: float | None = None, **data) -> None:
        """A dated fact (``t`` unix seconds, now by default); it belongs to the last step seen unless ``step`` is given."""
        if "step" not in data and self._step is not None:
            data["step"] = self._step
        self._queue.append(("event", kind, text, time.time() if t is None else t, data))

    def layers(self, step: int, figures: dict) -> None:
        """A layer map; of several within a period the last of each figure is written."""
        self._queue.append(("layers", step, figures, time.time()))

    def update(self, **fields) -> None:
        """Columns of the run (progress, left_seconds, phase, heartbeat ...); of several within a period the last counts."""
        self._queue.append(("update", dict(fields)))

    def heartbeat(self, t: float | None = None) -> None:
        """Note that the worker lives."""
        self.update(heartbeat=time.time() if t is None else t)

    def call(self, method: str, *args, **kwargs) -> None:
        """Any writing method of ``Store`` (``put_stage``, ``put_evaluation``...), in order, in the same transaction; without the run id."""
        self._queue.append(("call", method, args, kwargs))

    def log(self, line: str) -> None:
        """One line for the log."""
        if self._log is None:
            self.event("log", line)
        elif not self._log.closed:
            self._log.write(line.rstrip("\n") + "\n")

    def flush(self) -> None:
        """Write now, in the caller's thread.

        Raises:
            StorageError: it could not be written; what was given stays in memory and is tried again.
        """
        with self._flushing:
            self._take()
            if self._pending:
                self._commit()

    def close(self, timeout: float = 30.0, quiet: bool = False) -> None:
        """Write what is left and end the thread; may be called twice.

        Raises:
            StorageError: the database could not be written within ``timeout`` seconds (not when ``quiet``).
        """
        atexit.unregister(self._last_call)
        self._stop = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.flush()
                break
            except StorageError:
                if time.monotonic() > deadline:
                    if quiet:
                        break
                    raise
                time.sleep(min(0.1, self.period))
        if self._log is not None:
            self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------
    def _work(self) -> None:
        due = time.monotonic() + self.period / 2
        while not self._stop:
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            due = time.monotonic() + self.period / 2
            try:
                self.flush()
            except StorageError:
                pass  # kept in self.error; tried again in the next round
        self.store.close()

    def _take(self) -> None:
        for _ in range(len(self._queue)):
            self._pending.append(self._queue.popleft())
        if len(self._pending) > LIMIT:
            del self._pending[: len(self._pending) - LIMIT]

    def _commit(self) -> None:
        points, samples, fields, layers = [], [], {}, None
        others = []
        for item in self._pending:
            kind = item[0]
            if kind == "points":
                _, step, values, t = item
                points += [(name, step, value, t) for name, value in values]
            elif kind == "samples":
                _, step, values, t = item
                samples += [(name, step, value, t) for name, value in values]
            elif kind == "update":
                fields.update(item[1])
            elif kind == "layers":
                figures = {**layers[2], **item[2]} if layers else item[2]
                layers = (*item[:2], figures, *item[3:])
            else:
                others.append(item)
        store, run_id = self.store, self.run_id
        try:
            with store.write():
                if points:
                    store.append(run_id, points)
                if samples:
                    store.append(run_id, samples, clock=True)
                for item in others:
                    if item[0] == "event":
                        store.event(run_id, item[1], item[2], item[3], **item[4])
                    else:
                        getattr(store, item[1])(run_id, *item[2], **item[3])
                if layers is not None:
                    store.put_layers(run_id, layers[1], layers[2], layers[3])
                if fields:
                    store.update_run(run_id, **fields)
        except NotFound as e:
            # The run was deleted: there is nowhere to write to, and waiting will not change it.
            self.error, self._pending = e, []
            return
        except StorageError as e:
            self.error = e
            raise
        self._pending, self.error = [], None
        self.commits += 1

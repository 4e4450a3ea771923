"""Runs on a ZeroGPU Space: a GPU exists only inside a decorated call of about a minute, so a run is one such slice.

The package ``spaces`` forks a worker with the GPU for each call; the run executes there as a guest (no signals, no process of its
own), is asked to stop shortly before the slice ends, and keeps what it has by then. Everywhere else this module does nothing.
"""

from __future__ import annotations

import functools
import os
import threading

SLICE = 60.0
"""Seconds of one slice, ZeroGPU's default; ``FETTLE_SLICE_SECONDS`` overrides it."""
MARGIN = 8.0
"""Seconds before the end of the slice at which the run is asked to stop: checkpoint, evaluation and save fit into it."""


def seconds() -> float:
    """Length of a slice."""
    try:
        return max(MARGIN + 5.0, float(os.environ.get("FETTLE_SLICE_SECONDS") or SLICE))
    except ValueError:
        return SLICE


def execute(run_id: int, home_path: str, length: float) -> int:
    """Execute a claimed run as a guest of this process, stopped at ``length`` less the margin; 0 when it ended as asked for."""
    from workbench.home import Home
    from workbench.worker import Worker

    home = Home.open(home_path)
    worker = Worker(home, run_id, guest=True)

    def end() -> None:
        reporter = getattr(worker, "reporter", None)
        if reporter is not None:
            reporter.event("warning", f"The GPU slice of {length:.0f} s ends: the run stops with what it has")
            reporter.ask("stop")

    timer = threading.Timer(length - MARGIN, end)
    timer.daemon = True
    timer.start()
    try:
        return worker.execute()
    finally:
        timer.cancel()


@functools.cache
def decorated():
    """``execute`` under ``spaces.GPU``; asked for once when the app starts, because ZeroGPU looks for it then."""
    import spaces
    return spaces.GPU(duration=int(seconds()))(execute)


def run(run_id: int, home) -> int:
    """Execute one claimed run in a slice."""
    return decorated()(run_id, str(home.path), seconds())

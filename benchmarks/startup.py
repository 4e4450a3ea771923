"""``python app.py`` to the first page, and Start to the first point: wall-clock seconds.

The app is started on a home and a port of its own; the page counts as there when GET / answers 200. Then the warm worker is
given time to load, a run is started through the named endpoint as the page does, and the time until the first point is in the
database is read (the chart asks every 0.15 s; ``benchmarks.browser`` measures to the pixel).

Run: python -m benchmarks.startup [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks import common

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(home: str, port: int) -> subprocess.Popen:
    """The app as a person starts it."""
    return subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                            env={**os.environ, "WORKBENCH_HOME": home, "PORT": str(port)})


def page_seconds(port: int, began: float, limit: float = 120.0) -> float:
    """Seconds until GET / answers."""
    while time.perf_counter() - began < limit:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                answer.read()
                if answer.status == 200:
                    return time.perf_counter() - began
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the page did not answer")


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    pages, points = [], []
    with tempfile.TemporaryDirectory() as home:
        for turn in range(a.rounds):
            port = free_port()
            began = time.perf_counter()
            app = serve(home, port)
            try:
                pages.append(page_seconds(port, began))
                if turn == a.rounds - 1:
                    points = first_points(home, a.rounds)
            finally:
                end(app)
    rows = [dict(figure="app.py to first page, s", median=statistics.median(pages), worst=max(pages)),
            dict(figure="start to first training point, s", median=statistics.median(points), worst=max(points))]
    common.table("Start", rows)
    common.write("startup", dict(rows=rows, pages=pages, points=points))


def first_points(home: str, rounds: int) -> list[float]:
    """Seconds from ``runs.start`` to the first loss in the database, the worker being warm."""
    from workbench import runs, warm
    from workbench.home import Home
    here = Home.open(home)
    deadline = time.time() + 90
    while time.time() < deadline:
        try:
            warm.call(here.path, {"op": "ping"}, timeout=2)
            break
        except (OSError, ValueError):
            time.sleep(0.5)
    time.sleep(8)  # the warm worker answers before its imports are done
    spec = dict(model="stdlib-lm", data="python-docs", pipeline=[dict(method="lora", rank=8)], budget=dict(steps=200))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run = runs.start(dict(spec), home=here)
        while not any(s["name"] == "loss" and s["count"] for s in here.store.series(run["id"])):
            time.sleep(0.01)
            if time.perf_counter() - began > 120:
                raise SystemExit("no point came within two minutes")
        times.append(time.perf_counter() - began)
        runs.kill(run["id"], home=here)
        while here.store.run(run["id"])["status"] in ("queued", "starting", "running"):
            time.sleep(0.1)
    return times


if __name__ == "__main__":
    main()

"""From a point logged to its pixel, in Chromium; and from Start to the first point on the chart.

A writer (the one that workers use) logs points at 10 Hz whose value is the moment of logging; the page reads, in every
animation frame, the newest point that is drawn, so each new one gives the time from ``log`` to ``drawn``. Then runs of the bundled
model are started with a click, warm, and the time to the first drawn point of the training curve is read.

Run: python -m benchmarks.browser [--seconds 20] [--starts 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time

from benchmarks import common
from benchmarks.startup import end, free_port, page_seconds, serve

WATCH = """() => {
    window.seen = [];
    const last = () => window.fettle?.live?.charts?.loss?.host?.data?.[0]?.y?.at(-1);
    let before = last();
    const tick = () => {
        const now = last();
        if (now !== before && now !== undefined) { before = now; const drawn = Date.now() / 1000; requestAnimationFrame(() => window.seen.push([now, drawn])); }
        requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
}"""


def latencies(page, home, url: str, seconds: float) -> list[float]:
    """Seconds from logging to drawing of each newest point."""
    from storage import Writer
    run = home.store.create_run({"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "lora"}], "budget": {}, "seed": 0}, name="clock-01")
    home.store.update_run(run, status="running", started=time.time(), heartbeat=time.time(), phase="1 lora")
    stop = threading.Event()
    began = time.time()

    def log():
        writer, step = Writer(home.store, run), 0
        while not stop.wait(0.1):
            step += 1
            writer.points(step, {"loss": time.time(), "lr": 1e-3, "tokens_per_second": 1.0, "tokens": step}, time.time() - began)
            writer.heartbeat(time.time())
        writer.close()

    thread = threading.Thread(target=log)
    thread.start()
    try:
        page.goto(f"{url}/live?run={run}")
        page.wait_for_function("() => (window.fettle?.live?.charts?.loss?.host?.data?.[0]?.x?.length || 0) > 5", timeout=60000)
        page.evaluate(WATCH)
        time.sleep(seconds)
        seen = page.evaluate("() => window.seen")
    finally:
        stop.set()
        thread.join()
        home.store.update_run(run, status="stopped", ended=time.time())
    return [drawn - logged for logged, drawn in seen]


def starts(page, home, url: str, count: int) -> list[float]:
    """Seconds from the click on Start to the first drawn point."""
    from workbench import runs
    times = []
    for _ in range(count):
        page.goto(url)
        button = page.get_by_role("button", name="Start run").first
        button.wait_for()
        page.wait_for_timeout(1500)
        began = time.perf_counter()
        button.click()
        page.wait_for_function("() => { const c = window.fettle?.live?.charts; return c && Object.values(c).some(v => (v.host?.data || []).some(d => (d.x?.length || 0) > 0 && d.y?.some(y => y != null))); }",
                               timeout=120000)
        times.append(time.perf_counter() - began)
        for row in home.store.runs(status=("queued", "starting", "running")):
            runs.kill(row["id"], home=home)
        while home.store.count_runs(status=("queued", "starting", "running")):
            time.sleep(0.2)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--starts", type=int, default=3)
    a = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from tests.browser.conftest import ARGUMENTS, CHROMIUM
    from workbench.home import Home
    if CHROMIUM is None:
        print("  no Chromium on this machine; install Debian's package chromium")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        port = free_port()
        app = serve(folder, port)
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page_seconds(port, time.perf_counter())
            page, home, url = browser.new_page(viewport=dict(width=1440, height=900)), Home.open(folder), f"http://127.0.0.1:{port}"
            delays = sorted(latencies(page, home, url, a.seconds))
            time.sleep(10)
            clicks = starts(page, home, url, a.starts)
        finally:
            browser.close()
            end(app)
    p95 = delays[min(len(delays) - 1, int(0.95 * len(delays)))]
    rows = [dict(figure="point logged to pixel, s", median=statistics.median(delays), p95=p95, n=len(delays)),
            dict(figure="click on Start to first point drawn, s", median=statistics.median(clicks), p95=max(clicks), n=len(clicks))]
    common.table("In Chromium", rows)
    common.write("browser", dict(rows=rows, clicks=clicks))


if __name__ == "__main__":
    main()

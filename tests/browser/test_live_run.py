"""A real run of the bundled model, started with a click: reload in the middle, a second tab, stop."""

from __future__ import annotations

import time

import pytest

from tests.browser.conftest import ROOT, Server

STATE = """() => ({ name: document.querySelector('[data-t="name"]').textContent, badge: document.querySelector('[data-t="state"]').textContent,
    run: new URLSearchParams(location.search).get('run'), memory: window.fettle?.live?.charts?.memory?.full.get('mem/rss')?.x.length || 0 })"""


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path, dispatch=True).start()
    yield made
    from workbench import runs
    from workbench.home import Home
    home = Home.open(tmp_path)
    for row in home.store.runs(status=("queued", "starting", "running", "paused")):
        runs.kill(row["id"], home=home)
    made.stop()


@pytest.mark.browser
def test_click_reload_second_tab_stop(server, browse):
    if not (ROOT / "assets/models/stdlib-lm/model.safetensors").is_file():
        pytest.skip("the bundled model is not here")
    page = browse(server.url + "/live")
    page.get_by_role("button", name="Start the example").click()
    # minutes on a machine that does much else: the first start imports torch, transformers and peft
    page.wait_for_function(f"() => document.querySelector('[data-t=\"state\"]')?.textContent === 'Running' && ({STATE})().memory > 3", timeout=300_000)
    before = page.evaluate(STATE)
    page.reload()
    page.wait_for_function(f"n => document.querySelector('[data-t=\"name\"]') && ({STATE})().memory >= n", arg=before["memory"])
    second = browse(f"{server.url}/live", context=page.context)
    second.wait_for_function(f"n => document.querySelector('[data-t=\"name\"]') && ({STATE})().memory >= n", arg=before["memory"])
    for tab in (page, second):
        now = tab.evaluate(STATE)
        assert (now["name"], now["badge"], now["run"]) == (before["name"], "Running", before["run"])

    second.get_by_role("button", name="Stop", exact=True).first.click()
    for tab in (page, second):
        tab.wait_for_function("() => ['Stopping', 'Stopped'].includes(document.querySelector('[data-t=\"state\"]').textContent)")
    from workbench.home import Home
    store, run = Home.open(server.home).store, int(before["run"])
    deadline = time.monotonic() + 240
    while store.light(run)["status"] in ("starting", "running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert store.light(run)["status"] == "stopped", store.light(run)
    assert store.points(run, "mem/rss")["value"], "what was recorded before the stop is kept"
    page.wait_for_function("() => document.querySelector('[data-t=\"state\"]').textContent === 'Stopped'")

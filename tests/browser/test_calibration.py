"""Plan, Calibration in a real browser: empty, with runs, by another figure; how New run says where its figures come from."""

from __future__ import annotations

import re
import time

import pytest

SPEC = {"model": "stdlib-lm", "data": "python-docs", "budget": {"steps": 20}}


def seed(home, count: int = 8) -> None:
    from workbench import planner
    from workbench.spec import RunSpec

    for i in range(count):
        spec = RunSpec.from_dict({**SPEC, "pipeline": [{"method": ("lora", "int8")[i % 2]}]})
        forecast = planner.forecast(spec, home)
        forecast["resolved"] = planner.resolve(spec, home).to_dict()
        run = home.store.create_run(spec.to_dict(), name=f"seeded-{i}", forecast=forecast)
        phases = [dict(phase=p["phase"], peak_bytes=int(p["exact"] + (1.2 + 0.02 * i) * (p["total"] - p["exact"])), seconds=2 * p["seconds"])
                  for p in forecast["raw"]["phases"]]
        home.store.put_footprint(run, dict(phases=phases, peak_bytes=max(p["peak_bytes"] for p in phases),
                                           trainable=forecast["trainable"]["count"], size_bytes=forecast["size"]["bytes"]))
        home.store.event(run, "start", "Begins")
        home.store.update_run(run, status="finished", started=time.time() - 60, ended=time.time(), seconds=sum(p["seconds"] for p in phases),
                              peak_bytes=max(p["peak_bytes"] for p in phases))


@pytest.fixture(scope="module")
def empty_then_seeded(still):
    return still


def test_calibration_section(browse, empty_then_seeded):
    server = empty_then_seeded
    page = browse(server.url + "/plan?view=calibration")
    page.wait_for_selector("text=No finished run to compare with yet")
    seed(server.open_home())
    page.reload()
    page.wait_for_selector(".cal-chart .main-svg")
    page.wait_for_selector("text=8 finished runs")
    rows = page.locator(".cal-table tbody tr")
    assert rows.count() == 3 and rows.last.inner_text().startswith("All")
    assert "exact in 8 of 8 runs" in page.locator(".cal-foot").inner_text()
    page.get_by_role("button", name="By model").click()
    assert page.locator(".cal-table tbody tr").first.inner_text().startswith("stdlib-lm")
    page.get_by_role("button", name="Time").click()
    page.wait_for_function("document.querySelector('.cal-chart').getAttribute('aria-label').startsWith('Time')")
    assert re.search(r"by=model.*figure=seconds|figure=seconds.*by=model", page.url)
    link = page.locator(".cal-list a").first
    assert link.get_attribute("href").startswith("/live?run=") and link.inner_text().startswith("seeded-")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    narrow = browse(server.url + "/plan?view=calibration", width=390)
    narrow.wait_for_selector(".cal-chart .main-svg")
    assert narrow.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_new_run_says_where_its_figures_come_from(browse, empty_then_seeded):
    server = empty_then_seeded
    page = browse(server.url + "/?preset=example")
    page.wait_for_selector("text=How these figures come about")
    assert "from 8 runs on this machine" in page.locator(".nr-corrected").inner_text()
    page.locator(".nr-how summary").click()
    told = page.locator(".nr-how dl").inner_text()
    assert "process and libraries" in told and "Exact:" in told and "steps ×" in told
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

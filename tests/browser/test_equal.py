"""Compare at equal expenditure in Chromium: an axis, a slider, a line in the overlay, tiers, and all of it in the address."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from tests.browser import seeding

PANEL = "section[aria-labelledby=h-equal]"
N = 160


def trained(home, name: str, values: list[float], seconds: float, *, size: int, rank: int = 8, status="finished", metric="bits/byte") -> int:
    """A run with evaluations at equal distances to its end; ``values`` begins with the base's."""
    store, draw, last = home.store, np.random.default_rng(list(name.encode())), len(values) - 1
    run = store.create_run({**seeding.SPEC, "pipeline": [{"method": "lora", "rank": rank}]}, name=name, status=status, forecast=seeding.FORECAST)
    common, own = np.random.default_rng(0).normal(0, 0.15, N), draw.normal(0, 0.05, N)
    store.put_stage(run, 0, "lora", {"rank": rank}, status=status)
    for k, value in enumerate(values):
        scores = (value + common - common.mean() + own - own.mean()).astype(np.float32)
        store.put_evaluation(run, "during" if k else "base", 0 if k else -1, 100 * k // last, max(1.5, seconds * k / last), metric, value,
                             value - 0.02, value + 0.02, N, scores, np.full(N, 1 / np.log(2), np.float32), "same", {"loss": value})
    store.put_evaluation(run, "result", 1, 100, seconds + 0.4, metric, values[-1], values[-1] - 0.02, values[-1] + 0.02, N, scores,
                         np.full(N, 1 / np.log(2), np.float32), "same", {"loss": values[-1]})
    rows = []
    for s in range(1, 101):
        t = seconds * s / 100
        rows += [("loss", s, values[-1] + 0.5 / s ** 0.5 + float(draw.normal(0, 0.01)), t), ("tokens", s, 2048.0 * s, t),
                 ("lr", s, 1e-3 * (1 - s / 100), t), ("metric", s, float(np.interp(s, np.linspace(0, 100, last + 1), values)), t)]
    store.append(run, rows)
    store.update_run(run, metric=metric, value=values[-1], value_low=values[-1] - 0.02, value_high=values[-1] + 0.02, n=N, size_bytes=size,
                     seconds=seconds, trainable=200_000 * rank, parameters=7_475_456, peak_bytes=1e9, started=time.time() - 500, ended=time.time())
    return run


@pytest.fixture(scope="module")
def runs(still):
    home = still.open_home()
    return {"slow": trained(home, "slow-lathe-11", [2.0, 1.70, 1.62, 1.40], 120.0, size=9_000_000, rank=16),
            "quick": trained(home, "quick-file-12", [2.0, 1.60, 1.52, 1.50], 61.0, size=6_000_000),
            "like": trained(home, "like-file-13", [2.0, 1.61, 1.522, 1.502], 60.5, size=6_000_000, rank=4),
            "short": trained(home, "short-rasp-14", [2.0, 1.9, 1.8, 1.7], 30.0, size=4_000_000, rank=2),
            "other": trained(home, "other-task-15", [0.2, 0.4, 0.5], 40.0, size=1_000_000, metric="accuracy")}


def shot(page, name: str) -> None:
    if os.environ.get("SHOTS"):
        page.screenshot(path=f"{os.environ['SHOTS']}/{name}.png", full_page=True)


def opened(still, browse, runs, *chosen, more="", **how):
    page = browse(f"{still.url}/compare?runs={','.join(str(runs[c]) for c in chosen)}{more}", **how)
    page.wait_for_selector("[data-pareto] .ft-over text", state="attached")
    return page


def read(page) -> dict:
    """Name -> (tier, value, state) of the panel's rows, in their order."""
    return {n: (t, v, s) for n, t, v, s in page.eval_on_selector_all(f"{PANEL} tbody tr", """all => all.map(r => [
        r.querySelector('.name').textContent, r.querySelector('.tier').textContent, r.children[2].textContent, r.dataset.state])""")}


def test_an_expenditure_is_chosen_read_and_shared(still, runs, browse):
    page = opened(still, browse, runs, "slow", "quick", "like", "short")
    panel = page.locator(PANEL)
    assert panel.locator("tbody tr").count() == 0 and not panel.get_by_role("slider").is_visible()
    panel.get_by_label("Expenditure").select_option("seconds")
    panel.locator("tbody tr").nth(3).wait_for()
    assert page.evaluate("new URLSearchParams(location.search).get('at')") == "seconds:30", "the most that all reach"
    assert {s for _, _, s in read(page).values()} == {"read"}
    panel.get_by_label("Value", exact=True).fill("60")
    panel.get_by_label("Value", exact=True).press("Enter")
    panel.get_by_text("not reached").first.wait_for()
    found = read(page)
    assert list(found) == ["quick-file-12", "like-file-13", "slow-lathe-11", "short-rasp-14"]
    assert [found[n][0] for n in found] == ["A", "", "B", ""], "two cannot be told apart, one is behind, one is not ranked"
    assert found["short-rasp-14"][1:] == ("(1.700)", "not reached") and found["slow-lathe-11"][1].startswith("1.700 ± 0.020")
    row = panel.locator(f"tr[data-run='{runs['slow']}']")
    assert "read in mid-schedule, learning rate at 68 % of its peak" in row.locator("td.why").text_content()
    assert "mid-schedule" in panel.get_by_role("status").text_content()
    page.wait_for_selector("[data-overlay] .ft-over .equal", state="attached")
    shot(page, "equal-light")
    there = page.evaluate("location.search")
    assert "at=seconds%3A60" in there or "at=seconds:60" in there
    again = browse(still.url + "/compare" + there)
    again.wait_for_selector(f"{PANEL} tbody tr")
    assert read(again) == found
    panel.get_by_label("Expenditure").select_option("")
    page.wait_for_function("() => !document.querySelector('[data-overlay] .ft-over .equal') && !new URLSearchParams(location.search).get('at')")


def test_the_slider_moves_the_reading_and_stops_at_marks(still, runs, browse):
    page = opened(still, browse, runs, "slow", "quick", more="&at=seconds:50")
    panel = page.locator(PANEL)
    panel.locator("tbody tr").nth(1).wait_for()
    slider = panel.get_by_role("slider")
    before, at = read(page), int(slider.input_value())
    slider.evaluate("s => { s.value = 1000; s.dispatchEvent(new Event('input')); }")
    page.wait_for_function("() => new URLSearchParams(location.search).get('at') === 'seconds:120'")
    page.wait_for_function(f"id => document.querySelector(`{PANEL} tr[data-run='${{id}}']`).dataset.state === 'not reached'", arg=runs["quick"])
    assert read(page)["slow-lathe-11"] != before["slow-lathe-11"] and at < 1000
    panel.get_by_role("button", name="61 s").click()
    page.wait_for_function(f"id => document.querySelector(`{PANEL} tr[data-run='${{id}}']`).dataset.state === 'read'", arg=runs["quick"])
    assert panel.get_by_label("Value", exact=True).input_value() == "61"


def test_equal_size_draws_its_line_on_the_front(still, runs, browse):
    page = opened(still, browse, runs, "slow", "quick", "like", "short", more="&at=size:7")
    page.locator(f"{PANEL} tbody tr").first.wait_for()
    found = read(page)
    assert list(found) == ["quick-file-12"] and "best of 3" in page.locator(f"{PANEL} td.why").first.text_content()
    page.wait_for_selector("[data-pareto] .ft-over .equal", state="attached")
    shot(page, "equal-size")


def test_what_cannot_be_read_is_one_sentence(still, runs, browse):
    page = opened(still, browse, runs, "slow", "other", more="&at=seconds:30")
    alert = page.locator(f"{PANEL} [role=alert]")
    alert.wait_for()
    assert "bits/byte" in alert.text_content() and "Choose runs of the same task" in alert.text_content()
    page.get_by_role("checkbox", name="Choose other-task-15").uncheck()
    page.locator(f"{PANEL} tbody tr").wait_for()
    panel = page.locator(PANEL)
    panel.get_by_label("Value", exact=True).fill("-4")
    panel.get_by_label("Value", exact=True).press("Enter")
    alert.wait_for()
    assert "above zero" in alert.text_content()
    panel.get_by_label("Expenditure").select_option("joules")
    page.get_by_text("No run here has a figure for joules").wait_for()


@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_sticks_out(still, runs, browse, width):
    page = opened(still, browse, runs, "slow", "quick", "like", "short", more="&at=seconds:60", width=width, height=900, dark=width == 390)
    page.locator(f"{PANEL} tbody tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(PANEL).scroll_into_view_if_needed()
    shot(page, f"equal-{width}")

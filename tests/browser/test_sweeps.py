"""The Sweeps page in Chromium: setting one up, the view of one that goes on, and what the address keeps."""

from __future__ import annotations

import math
import time

import pytest

from tests.browser import seeding
from workbench.sweeps.plan import SweepPlan

SPEC = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "lora", "rank": 8}], "budget": {"minutes": 1, "size_mb": 12}, "seed": 0}
SECTION = {"over": {"training.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "pipeline.0.rank": [2, 4, 8, 16],
                    "pipeline.0.method": ["lora", "adalora"]},
           "objectives": {"quality": "minimize", "size": "minimize"}, "pruner": "median", "trials": 30}
TRIALS = ".sw-trials tbody tr"


def trial(home, sweep: int, number: int, state: str = "complete", progress: float = 0.4) -> None:
    store, lr = home.store, 10 ** (-4 + 3 * ((number * 7) % 20) / 19)
    params = {"training.lr": float(f"{lr:.4g}"), "pipeline.0.rank": [2, 4, 8, 16][(number * 3) % 4],
              "pipeline.0.method": ["lora", "adalora"][number % 2]}
    if state == "infeasible":
        store.put_trial(sweep, number, params=params, state=state, ended=time.time(), message="Does not fit: budget.size_mb = 12: 14.3 MB of 12 MB.")
        return
    value = round(1.42 + 0.12 * abs(math.log10(lr) + 2.5) + 0.2 / params["pipeline.0.rank"] + 0.01 * (number % 2), 4)
    size = int(9.6e6 + 2e5 * params["pipeline.0.rank"])
    run = store.create_run({**SPEC, "seed": number}, name=f"keen-scale-{number + 1}", status="running" if state == "running" else "finished",
                           forecast=seeding.FORECAST, tags=(f"sweep-{sweep}",))
    began = time.time() - 3000 + 60 * number
    store.update_run(run, metric="bits/byte", value=value, value_low=value - 0.01, value_high=value + 0.01, n=200, size_bytes=size, seconds=58.0,
                     started=began, ended=None if state == "running" else began + 58, progress=progress, heartbeat=time.time())
    fields = {} if state == "running" else dict(values=[value, size], ended=began + 58)
    if state == "pruned":
        fields["message"] = "Stopped by the pruner (median) at 25% of its budget: held-out loss 2.31, place 9 of 10 trials there"
    store.put_trial(sweep, number, params=params, state=state, run_id=run, started=began, **fields)


def seeded(home, name: str, count: int = 16, status: str = "running") -> int:
    plan = SweepPlan.read(SPEC, SECTION)
    sweep = home.store.create_sweep(SPEC, plan.section(), name=name)
    home.store.update_sweep(sweep, status=status, started=time.time() - 900, heartbeat=time.time() + 3600, ended=None)
    for n in range(count):
        trial(home, sweep, n, "infeasible" if n == 5 else "pruned" if n in (7, 11) else "running" if n == count - 1 and status == "running" else "complete")
    return sweep


@pytest.fixture(scope="module")
def home(still):
    return still.open_home()


def test_no_sweeps_teaches_and_the_form_forecasts(still, browse):
    page = browse(still.url + "/sweeps")
    page.get_by_role("heading", name="No sweeps yet").wait_for()
    page.wait_for_function("() => /About .* trials/.test(document.querySelector('.sw-say')?.textContent)")
    values = page.locator(".sw-row input[aria-label='Values']")
    assert values.count() == 2
    page.locator(".sw-row input[aria-label='Field']").first.fill("pipeline.0.sparsty")
    page.get_by_text("has no field of this name. Did you mean sparsity?").wait_for()
    assert page.get_by_role("button", name="Start sweep").is_disabled()
    page.locator(".sw-row input[aria-label='Field']").first.fill("seed")
    values.first.fill("0, 1")
    page.wait_for_function("() => /trials of/.test(document.querySelector('.sw-say')?.textContent)")
    page.get_by_role("button", name="Start sweep").wait_for()
    page.reload()
    page.wait_for_function("() => document.querySelector('.sw-row input')?.value === 'seed'")


def test_the_view_shows_front_best_parallel_and_trials_and_goes_on(still, home, browse):
    sweep = seeded(home, "keen-scale")
    page = browse(f"{still.url}/sweeps?sweep={sweep}")
    page.wait_for_selector("[data-front] .ft-over text", state="attached")
    page.wait_for_selector("[data-par] .parcoords", state="attached")
    assert page.locator(TRIALS).count() == 16
    assert "1 does not fit" in page.locator("[data-counts]").text_content() and "2 pruned" in page.locator("[data-counts]").text_content()
    assert page.locator(f"{TRIALS}[data-trial='5'] .why").text_content().startswith("Does not fit")
    assert "median" in page.locator(f"{TRIALS}[data-trial='7'] .why").text_content()
    assert page.locator(f"{TRIALS}[data-trial='0'] a").get_attribute("href").startswith("/live?run=")
    page.evaluate("window.kept = [document.querySelector('[data-front] .plotly'), document.querySelector('.sw-trials tbody tr[data-trial=\"3\"]')]")
    trial(home, sweep, 16)
    page.wait_for_selector(f"{TRIALS}[data-trial='16']")
    assert page.evaluate("window.kept.every(n => n && n.isConnected)"), "the page was drawn anew instead of going on"
    page.locator("[aria-label='Horizontal axis']").select_option("training.lr")
    page.wait_for_function("() => new URLSearchParams(location.search).get('x') === 'training.lr'")
    page.reload()
    page.wait_for_selector("[data-front] .ft-over text", state="attached")
    assert page.locator("[aria-label='Horizontal axis']").input_value() == "training.lr"


def test_what_moves_the_result_and_the_order_of_the_trials(still, home, browse):
    sweep = seeded(home, "rough-weld", 20, "stopped")
    page = browse(f"{still.url}/sweeps?sweep={sweep}")
    page.locator(".sw-bar").first.wait_for()
    assert page.locator(".sw-imp").count() == 2
    page.locator("[aria-label='Order of the trials']").select_option("0")
    shown = [float(t.split()[0]) for t in page.eval_on_selector_all(f"{TRIALS}:not(.cut) td.r:first-of-type, {TRIALS}:not(.cut) td:nth-child(6)",
                                                                     "all => all.map(a => a.textContent)") if t]
    assert shown == sorted(shown) and len(shown) > 10
    page.get_by_role("button", name="Resume").wait_for()
    page.get_by_role("link", name="All sweeps").click()
    page.get_by_role("link", name="rough-weld").wait_for()


def test_a_list_of_specs_comes_from_the_address(still, browse):
    import json
    from urllib.parse import quote
    specs = [{**SPEC, "pipeline": [{"method": "lora", "rank": r}], "budget": {"minutes": 1}} for r in (2, 4)] + [{**SPEC, "pipeline": ["int8"], "budget": {}}]
    page = browse(f"{still.url}/sweeps?specs={quote(json.dumps(specs))}")
    page.get_by_role("heading", name="3 specs, one trial each").wait_for()
    page.wait_for_function("() => /for 3 trials/.test(document.querySelector('.sw-say')?.textContent)")
    assert page.locator(".sw-specs li").count() == 3


def test_nothing_is_wider_than_a_phone(still, home, browse):
    sweep = seeded(home, "slim-shim", 12)
    for path in ("/sweeps", f"/sweeps?sweep={sweep}"):
        page = browse(still.url + path, width=390, height=844, dark=True)
        page.wait_for_function("() => document.querySelector('.sw-say .ft-note, [data-front] .ft-over text')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_sweep_that_is_not_there_is_one_sentence(still, browse):
    page = browse(still.url + "/sweeps?sweep=999")
    page.get_by_text("There is no sweep 999").wait_for()

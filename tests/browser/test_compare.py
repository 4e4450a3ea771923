"""The Compare page in Chromium: choosing, sharing, editing, and a run that goes on while one looks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.browser import seeding

TABLE = ".ft-runs tbody tr"


def finished(home, name: str, value: float, size: int, *, status="finished", pipeline=None, **fields) -> int:
    store, draw = home.store, np.random.default_rng(len(name) + size)
    run = store.create_run({**seeding.SPEC, **({"pipeline": pipeline} if pipeline else {})}, name=name, status=status, forecast=seeding.FORECAST)
    scores = (value + draw.normal(0, 0.05, 120)).astype(np.float32)
    store.put_evaluation(run, "final", 2, 60, 50.0, "bits/byte", value, value - 0.01, value + 0.01, 120, scores, np.full(120, 1 / np.log(2), np.float32), "same")
    store.append(run, [("loss", s, value + 1.0 / s + float(draw.normal(0, 0.02)), s * 0.8) for s in range(1, 61)])
    store.update_run(run, metric="bits/byte", value=value, value_low=value - 0.01, value_high=value + 0.01, n=120, size_bytes=size, seconds=50.0,
                     peak_bytes=1_040_000_000, base_value=1.98, started=time.time() - 500, ended=time.time() - 450, **fields)
    return run


@pytest.fixture(scope="module")
def home(still):
    return still.open_home()


@pytest.fixture(scope="module")
def runs(home):
    return {"small": finished(home, "small-flask-15", 1.74, 4_000_000, pipeline=[{"method": "lora", "rank": 4}]),
            "best": finished(home, "brisk-rasp-12", 1.57, 9_000_000, starred=True, pipeline=[{"method": "lora", "rank": 16}]),
            "worse": finished(home, "rough-cut-01", 1.90, 9_500_000)}


def ready(page):
    page.wait_for_selector("[data-pareto] .ft-over text", state="attached")
    return page


def names(page) -> list[str]:
    return page.eval_on_selector_all(f"{TABLE} th a", "all => all.map(a => a.textContent)")


def test_no_runs_teaches_and_offers_the_example(still, browse):
    page = browse(still.url + "/compare")
    page.get_by_role("link", name="Start the example").wait_for()
    assert page.locator(".ft-empty h3").text_content() == "No runs yet"
    assert not page.locator("[data-panels]").is_visible() and not page.locator(".ft-runs").is_visible()


def test_selection_is_shown_everywhere_and_travels_in_the_address(still, runs, browse):
    page = ready(browse(still.url + "/compare"))
    page.get_by_role("checkbox", name="Choose rough-cut-01").uncheck()
    page.get_by_role("button", name="step", exact=True).click()
    page.get_by_role("button", name="Quality").click()
    page.wait_for_function("() => new URLSearchParams(location.search).get('sort') === 'value'")
    page.wait_for_function(f"() => document.querySelector('{TABLE} th a').textContent === 'brisk-rasp-12'")
    assert names(page) == ["brisk-rasp-12", "small-flask-15", "rough-cut-01"]
    page.wait_for_selector("[data-paired] .ft-note")
    there = page.evaluate("location.search")
    other = ready(browse(still.url + "/compare" + there))
    other.wait_for_selector("[data-paired] .ft-note")
    seen = [(names(p), p.eval_on_selector_all(f"{TABLE}[aria-selected=true] th a", "a => a.map(x => x.textContent).sort()"),
             p.locator(".ft-seg [aria-pressed=true]").text_content(), p.locator("[data-paired] .ft-note").text_content()) for p in (page, other)]
    assert seen[0] == seen[1] and seen[1][1] == ["brisk-rasp-12", "small-flask-15"] and seen[1][2] == "step"
    assert "brisk-rasp-12" in seen[1][3] and "small-flask-15" in seen[1][3] and "better" in seen[1][3]
    differs = other.eval_on_selector_all("[data-diff] tbody th", "all => all.map(a => a.textContent)")
    assert "stage 1 rank" in differs


def test_a_point_of_the_front_offers_its_settings(still, runs, browse):
    page = ready(browse(f"{still.url}/compare?runs={runs['small']},{runs['best']}"))
    page.locator("[data-pareto] .ft-tall").focus()
    page.keyboard.press("ArrowRight")
    link = page.get_by_role("link", name="Clone settings")
    link.wait_for()
    assert link.get_attribute("href") == f"/?clone={runs['small']}"
    assert "1.740 ± 0.010" in page.locator(".ft-run-card").text_content()


def test_tags_and_notes_are_edited_in_place_and_found_again(still, home, runs, browse):
    page = ready(browse(still.url + "/compare"))
    page.get_by_role("button", name="Edit tags and note of small-flask-15").click()
    page.get_by_role("textbox", name="Tags, divided by commas").fill("tiny, <b>x</b>")
    page.get_by_role("textbox", name="Note").fill("first try")
    page.keyboard.press("Enter")
    page.get_by_text("first try").wait_for()
    assert home.store.light(runs["small"])["tags"] == ["<b>x</b>", "tiny"] and home.store.light(runs["small"])["note"] == "first try"
    page.get_by_role("searchbox", name="Filter runs").fill("tag:tiny")
    page.wait_for_function(f"() => document.querySelectorAll('{TABLE}').length === 1")
    assert names(page) == ["small-flask-15"] and page.locator(f"{TABLE} b").count() == 1, "a tag became markup"
    page.get_by_role("searchbox", name="Filter runs").fill("status:nowhere")
    page.get_by_role("alert").wait_for()
    assert "no such state" in page.get_by_role("alert").text_content()


def test_a_run_goes_on_while_a_note_is_written(still, home, runs, browse):
    story = seeding.Story(home, "keen-anvil-31", started=time.time() - 30).begin().until(30)
    page = ready(browse(f"{still.url}/compare?runs={story.id},{runs['best']}&q=keen"))
    state = page.locator(f"tr[data-run='{story.id}'] .c-state")
    before = state.text_content()
    page.get_by_role("button", name="Edit tags and note of keen-anvil-31").click()
    page.get_by_role("textbox", name="Note").fill("half writt")
    page.evaluate(f"document.querySelector(\"tr[data-run='{story.id}']\").dataset.same = 'yes'")
    story.until(34)
    page.wait_for_function("([id, old]) => document.querySelector(`tr[data-run='${id}'] .c-state`).textContent !== old", arg=[story.id, before])
    assert page.get_by_role("textbox", name="Note").input_value() == "half writt"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Note"
    assert page.locator(f"tr[data-run='{story.id}']").get_attribute("data-same") == "yes", "the row was made anew"
    home.store.transition(story.id, ("running",), "stopped")


@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_sticks_out(still, runs, browse, width):
    page = ready(browse(f"{still.url}/compare", width=width, height=860, dark=width == 390))
    assert page.evaluate("document.documentElement.scrollWidth") <= width

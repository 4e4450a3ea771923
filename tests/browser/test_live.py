"""The Live page in Chromium: a run grows while it is watched; reload, second tab, zoom, theme, states."""

from __future__ import annotations

import time

import pytest

from tests.browser import seeding

LOSS = "window.fettle?.live?.charts?.loss"
CHART = "window.fettle.live.charts.loss"
POINTS = f"() => {LOSS}?.full.get('raw')?.x.length || 0"
DRAWN = f"() => {LOSS}?.host?.data?.[0]?.x.length || 0"


def wait_points(page, at_least: int, timeout: float = 90000) -> None:
    page.wait_for_function(f"n => ({DRAWN})() >= n", arg=at_least, timeout=timeout)


def state(page) -> dict:
    """What a person sees, as figures and words."""
    return page.evaluate(f"""() => ({{
        name: document.querySelector('[data-t="name"]').textContent, badge: document.querySelector('[data-t="state"]').textContent,
        evaluation: document.querySelector('[data-k="eval"] .val').textContent, events: document.querySelectorAll('.ft-events li').length,
        points: ({POINTS})(), last: {CHART}.full.get('raw').y.at(-1), place: location.search }})""")


@pytest.fixture
def story(still):
    return seeding.Story(still.open_home(), "keen-anvil-31", started=time.time() - 30).begin().until(30)


def test_nothing_yet_teaches_and_offers_the_example(still, browse):
    page = browse(still.url + "/live")
    page.get_by_role("button", name="Start the example").wait_for()
    assert page.locator(".ft-empty h3").first.text_content() == "Nothing is running"
    assert not page.locator("[data-part='grid']").is_visible()


def test_curve_grows_in_place_survives_reload_and_second_tab(story, still, browse):
    page = browse(f"{still.url}/live?run={story.id}")
    wait_points(page, story.step)
    page.evaluate(f"() => {{ {CHART}.host.dataset.same = 'yes'; }}")
    before = story.step
    story.until(31.5)
    wait_points(page, story.step)
    assert story.step > before
    assert page.evaluate(f"() => {CHART}.host.dataset.same") == "yes", "the chart was mounted anew"

    seen = state(page)
    assert seen["badge"] == "Running" and seen["evaluation"].startswith("1.487") and seen["points"] == story.step
    page.reload()
    wait_points(page, story.step)
    again = state(page)
    second = browse(f"{still.url}/live", context=page.context)
    wait_points(second, story.step)
    other = state(second)
    assert again == seen and other == seen, "reload or second tab shows something else"

    story.until(33)
    for tab in (page, second):
        wait_points(tab, story.step)
        assert state(tab)["points"] == story.step


def test_zoom_survives_updates_and_reload_and_resets(story, still, browse):
    page = browse(f"{still.url}/live?run={story.id}")
    wait_points(page, story.step)
    box = page.locator("[data-chart='loss'] .nsewdrag").bounding_box()
    x, y = box["x"] + box["width"] * 0.12, box["y"] + box["height"] * 0.2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 120, steps=6)
    page.mouse.up()
    shown = f"() => {CHART}.host._fullLayout.xaxis.range.map(v => new Date(v.replace(' ', 'T') + 'Z').getTime()).join()"
    page.wait_for_function(f"() => {LOSS}?.zoom")
    zoomed = page.evaluate(shown)
    story.until(story.t + 2)
    page.wait_for_function(f"n => ({POINTS})() >= n", arg=story.step)
    page.wait_for_timeout(300)
    assert page.evaluate(shown) == zoomed, "an update lost the zoom"
    page.reload()
    page.wait_for_function(f"() => {LOSS}?.live")
    page.wait_for_function(f"n => ({POINTS})() >= n", arg=story.step)
    assert page.evaluate(shown) == zoomed, "the reload lost the zoom"
    page.evaluate(f"() => {CHART}.reset()")
    page.wait_for_timeout(200)
    assert page.evaluate(shown) != zoomed


def test_axis_smoothing_table_and_theme(story, still, browse):
    page = browse(f"{still.url}/live?run={story.id}")
    wait_points(page, story.step)
    page.locator("[data-seg='x'] [data-v='step']").click()
    page.wait_for_function(f"n => {CHART}.host.data[0].x.at(-1) === n", arg=story.step)
    assert page.locator("[data-seg='x'] [data-v='joules']").is_disabled(), "energy is offered although there is no counter"
    page.locator("[data-seg='y'] [data-v='metric']").click()
    page.wait_for_function(f"() => {CHART}.host.data[2].y.length === 3")
    page.locator("[data-seg='y'] [data-v='loss']").click()
    page.locator("[data-seg='x'] [data-v='t']").click()
    page.locator("[data-panel='loss'] [data-do='table']").click()
    assert page.locator("[data-panel='loss'] .ft-tablebox tbody tr").count() > 50
    with page.expect_download() as download:
        page.locator("[data-panel='loss'] [data-do='csv']").click()
    lines = open(download.value.path()).read().splitlines()
    assert lines[0].startswith("step,seconds,tokens,") and len(lines) == 1 + story.step + len(story.store.evaluations(story.id))
    light = page.evaluate(f"() => {CHART}.host.data[0].line.color")
    page.locator("[data-theme-toggle]").click()
    page.wait_for_function(f"c => {CHART}.host.data[0].line.color !== c", arg=light)
    page.reload()
    page.wait_for_function("() => document.body?.classList.contains('dark') && document.documentElement.classList.contains('dark')")


def test_stop_is_written_as_a_wish_and_the_end_is_shown(story, still, browse):
    page = browse(f"{still.url}/live?run={story.id}")
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.wait_for_function("() => document.querySelector('[data-t=\"state\"]').textContent === 'Stopping'")
    assert story.store.light(story.id)["wish"] == "stop"
    story.finish("stopped", seconds=story.t, wish=None)
    page.wait_for_function("() => document.querySelector('[data-t=\"state\"]').textContent === 'Stopped'")
    page.get_by_role("button", name="Clone settings").first.wait_for()


@pytest.mark.parametrize("seconds, over", [(120.3, False), (123.0, True)])
def test_a_run_is_over_its_minutes_when_the_clock_says_so(still, browse, seconds, over):
    run = seeding.Story(still.open_home(), "level-plane-12").begin().until(33).finish(seconds=seconds)
    page = browse(f"{still.url}/live?run={run.id}")
    page.locator('[data-k="time"]').get_by_text("limit 2:00").wait_for()
    assert page.locator('[data-k="time"] .ft-gauge.over-limit').count() == over


def test_failed_and_lost_say_why_and_what_to_do(still, browse):
    home = still.open_home()
    failed = seeding.Story(home, "hasty-file-44").begin().until(9).finish("failed", error=seeding.FAILED)
    page = browse(f"{still.url}/live?run={failed.id}", width=390, height=844)
    doctor = page.locator("[data-part='doctor']")
    doctor.get_by_text("needed 4.61 GB").wait_for()
    assert "training.batch" in doctor.text_content() and doctor.get_by_role("button", name="Clone settings").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "the page is wider than the phone"
    lost = seeding.Story(home, "late-ladle-09").begin().until(33).finish("lost", error={"cause": "The worker ended without saying why."})
    page.goto(f"{still.url}/live?run={lost.id}")
    page.locator("[data-part='doctor']").get_by_role("button", name="Resume from 0:30").wait_for()


def test_names_and_logs_are_text_never_markup(still, browse):
    home = still.open_home()
    evil = seeding.Story(home, "<img src=x onerror=window.pwned=1>").begin().until(3)
    evil.log("<script>window.pwned=1</script><b>bold</b>")
    evil.store.event(evil.id, "warning", "<img src=x onerror=window.pwned=1>")
    page = browse(f"{still.url}/live?run={evil.id}")
    page.locator(".ft-log").get_by_text("<b>bold</b>").wait_for()
    page.locator(".ft-events").get_by_text("<img src=x").wait_for()
    assert page.locator("[data-t='name']").text_content().startswith("<img") and not page.evaluate("() => window.pwned")


def test_lost_server_is_said_and_the_page_catches_up(story, still, browse):
    page = browse(f"{still.url}/live?run={story.id}")
    wait_points(page, story.step)
    still.stop()
    page.get_by_text("Connection to the workbench lost").wait_for(timeout=90000)
    story.until(story.t + 2)
    still.start()
    page.wait_for_function(f"n => document.querySelector('.ft-live') && ({POINTS})() >= n", arg=story.step, timeout=90000)
    assert state(page)["badge"] == "Running"
    browse.problems.clear()  # Gradio's own client reports the broken connection on the console

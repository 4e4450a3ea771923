"""The Leaderboard shelf of the Library: the plot, the table that sorts, what the address keeps, and the way into a run."""

from __future__ import annotations

import os
import re

import pytest

from tests.browser.conftest import ROOT, Server
from workbench import leaderboard

ROWS = "table.lb-table tbody tr"


@pytest.fixture
def arena():
    found = leaderboard.arena("docs")
    assert len(found["rows"]) > 5
    return found


def open_board(still, browse, query="", **more):
    page = browse(f"{still.url}/library?shelf=leaderboard{query}", **more)
    page.locator(ROWS).first.wait_for()
    page.wait_for_function("() => document.querySelectorAll('.lib-board .scatterlayer .point').length > 3")
    page.locator(".lib-board .ft-over text").first.wait_for(state="attached")  # names are drawn: points can be hit
    return page


def names(page):
    return page.locator(ROWS).evaluate_all("rows => rows.map(r => r.dataset.id)")


def test_chart_and_table_show_the_arena(still, browse, arena):
    page = open_board(still, browse)
    assert names(page) == [r["id"] for r in arena["rows"]]
    drawn = [r for r in arena["rows"] if r["pace"] is not None]
    assert page.locator(".lib-board .scatterlayer .point").count() == len(drawn)
    assert "cannot be told apart" in page.locator(".lb-main .ft-tierline").text_content()
    how = page.locator(".lb-how").text_content()
    assert "Measured by the makers of Fettle on " + arena["date"] in how and arena["machine"] in how and arena["command"] in how
    assert not page.locator(".lib-list").is_visible()
    label = page.locator("[data-chart] .ft-tall").get_attribute("aria-label")
    assert "on the front" in label and "methods" in label


@pytest.mark.parametrize("lacking, first", [((), "pace"), (("pace",), "peak"), (("pace", "peak"), "trainable")])
def test_the_chart_begins_with_a_cost_that_was_measured(still, browse, chromium, lacking, first):
    context = chromium.new_context(viewport={"width": 1440, "height": 900})

    def answer(route):
        got = route.fetch()
        body = got.text()
        for cost in lacking:
            body = re.sub(rf'("{cost}":\s*)[0-9.e+-]+', r"\1null", body)
        route.fulfill(response=got, body=body)
    context.route("**/component_server/**", answer)
    page = open_board(still, browse, "&x=nothing", context=context)
    assert page.locator('.lib-board select[aria-label="Horizontal axis"]').input_value() == first
    context.close()


def test_sorting_by_a_column_and_back(still, browse, arena):
    page = open_board(still, browse)
    peak = page.locator('.lb-table [data-sort="peak"]')
    peak.click()
    weighed = [r for r in arena["rows"] if r["peak"] is not None]
    assert names(page)[:len(weighed)] == [r["id"] for r in sorted(weighed, key=lambda r: r["peak"])], "what was not weighed comes last"
    assert page.locator("th.lb-peak").get_attribute("aria-sort") == "ascending"
    assert peak.evaluate("b => b === document.activeElement")
    page.keyboard.press("Enter")
    assert names(page)[0] == max(weighed, key=lambda r: r["peak"])["id"]
    assert "sort=-peak" in page.url and page.locator("th.lb-peak").get_attribute("aria-sort") == "descending"


def test_a_row_is_chosen_in_the_table_or_the_chart_and_leads_to_its_card(still, browse, arena):
    page = open_board(still, browse)
    page.locator(f'{ROWS}[data-id="lora dora"] td.lb-trainable').click()
    picked = page.locator(".lb-picked")
    picked.get_by_text("LoRA dora").wait_for()
    page.locator(".lib-board .ft-over .ring").wait_for(state="attached")
    page.locator("[data-chart] .ft-tall").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => !document.querySelector('tr[data-id=\"lora dora\"]').matches('[aria-selected=true]')")
    chosen = page.locator(f'{ROWS}[aria-selected="true"]').get_attribute("data-id")
    page.keyboard.press("Enter")
    row = next(r for r in arena["rows"] if r["id"] == chosen)
    assert page.evaluate("document.activeElement.closest('tr').dataset.id") == chosen
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=row["name"], exact=True).wait_for()
    assert f"method={row['method']}" in page.url and page.locator(".lib-list").is_visible() and not page.locator(".lib-board").is_visible()


def test_a_click_on_a_point_chooses_its_row(still, browse, arena):
    page = open_board(still, browse, "&x=peak")
    page.evaluate("window.scrollTo(0, 0)")
    far = max((r for r in arena["rows"] if r["peak"] is not None), key=lambda r: r["peak"])
    spot = page.locator(".lib-board .scatterlayer .point").evaluate_all(
        "points => points.map(p => p.getBoundingClientRect()).map(b => [b.x + b.width / 2, b.y + b.height / 2]).sort((a, b) => b[0] - a[0])[0]")
    page.mouse.click(*spot)
    page.locator(f'{ROWS}[data-id="{far["id"]}"][aria-selected="true"]').wait_for()


def test_axis_side_and_row_survive_a_reload(still, browse, arena):
    page = open_board(still, browse)
    page.get_by_label("Horizontal axis").select_option("trainable")
    page.get_by_role("button", name="Equal seconds").click()
    page.locator(f'{ROWS}[data-id="lora"] td.lb-rate').click()
    page.wait_for_function("() => document.querySelector('[data-chart] .xtick text') && /\\d[kM]/.test(document.querySelector('[data-chart]').textContent)")
    for part in ("shelf=leaderboard", "arena=docs", "at=seconds", "x=trainable", "row=lora"):
        assert part in page.url
    page.reload()
    page.locator(f'{ROWS}[data-id="lora"][aria-selected="true"]').wait_for()
    assert page.get_by_label("Horizontal axis").input_value() == "trainable"
    assert page.get_by_role("button", name="Equal seconds").get_attribute("aria-pressed") == "true"
    measured = [r["id"] for r in leaderboard.ordered(arena["rows"], "seconds")]
    assert names(page) == measured
    page.get_by_role("button", name="Models").click()
    page.locator(".lib-list").wait_for(state="visible")
    assert "arena" not in page.url and "row" not in page.url


def test_searching_leaves_the_rows_with_those_words(still, browse):
    page = open_board(still, browse)
    page.get_by_label("Search the rows").fill("slora")
    page.wait_for_function(f"() => document.querySelectorAll('{ROWS}').length < 3")
    page.get_by_label("Search the rows").fill("nothing of the kind")
    page.get_by_text("Nothing matches").wait_for()


def test_a_form_is_carried_into_a_run(still, browse):
    page = open_board(still, browse, "&row=lora+dora")
    page.locator(".lb-picked").get_by_role("link", name="Use in a run").click()
    page.locator(".nr-pipe").get_by_text("LoRA").first.wait_for()
    page.wait_for_function("() => window.fettle.newRun?.spec?.pipeline.some(s => s.method === 'lora' && s.dora === true)")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_the_table_not_the_page(still, browse, dark):
    page = open_board(still, browse, width=390, height=844, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".lb-scroll").evaluate("n => n.scrollWidth > n.clientWidth")


def test_without_figures_the_shelf_says_how_to_make_them(tmp_path, browse, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("from workbench import leaderboard\nleaderboard.FILE = leaderboard.Path('none.json')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    server = Server(tmp_path)
    try:
        server.start()
        page = browse(f"{server.url}/library?shelf=leaderboard")
        page.get_by_role("heading", name="No leaderboard comes with this copy").wait_for()
        assert "python -m benchmarks.adaptation" in page.locator(".lib-board").text_content()
    finally:
        server.stop()

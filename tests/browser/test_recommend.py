"""Recommend in a real browser: rows with their uncertainty, a row becomes a run, rows a sweep, refusals in one sentence."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlparse

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def known(still):
    """The still server with runs to learn from."""
    from tests.workbench.recommending import finish, usual, varied
    home = still.open_home()
    for i, given in enumerate(varied("stdlib-lm", "python-docs")):
        finish(home, given, usual, seed=i)
    return still


def rows(page):
    page.wait_for_selector(".rc:not([aria-busy]) .rc-fit tbody tr")
    return page.locator(".rc-fit tbody tr")


def test_rows_say_what_is_expected_and_from_where(known, browse):
    page = browse(known.url + "/plan?model=stdlib-lm&data=python-docs&minutes=1&size_mb=6")
    found = rows(page)
    assert found.count() > 3
    first = found.first.inner_text()
    assert "int" in first.lower() or "gptq" in first.lower(), "under 6 MB something packs"
    assert page.locator(".rc-fit .band").count() == found.count()
    foot = page.locator(".rc-foot").inner_text()
    assert "settings at a time" in foot and "90 %" in foot
    assert page.locator(".rc-out tbody tr").count() and "Set up with it" in page.locator(".rc-out").inner_text()
    page.get_by_role("button", name="Quantization").click()
    shown = page.locator(".rc-fit tbody tr")
    assert shown.count() and page.locator(".rc-fit tbody tr:has(.stage[title=Quantization])").count() == shown.count()


def test_a_row_becomes_a_run(known, browse):
    page = browse(known.url + "/plan?model=stdlib-lm&data=python-docs&minutes=1&size_mb=6")
    wanted = rows(page).first.locator(".stage").all_inner_texts()
    page.locator(".rc-fit tbody tr").first.get_by_role("button", name="Set up this run").click()
    page.wait_for_selector(".nr:not([aria-busy])")
    page.wait_for_selector('.ft-fits[data-verdict="Fits"], .ft-fits[data-verdict="Tight"]')
    names = page.locator(".nr-strip .ft-stage header h3").all_inner_texts()
    assert len(names) == len(wanted) and all(w.startswith(n) for n, w in zip(names, wanted))
    assert urlparse(page.url).query == "", "the address forgets the settings"
    page.reload()
    page.wait_for_selector(".nr:not([aria-busy])")
    assert page.locator(".nr-strip .ft-stage header h3").all_inner_texts() == names


def test_rows_become_a_sweep(known, browse):
    page = browse(known.url + "/plan?model=stdlib-lm&data=python-docs&steps=1&minutes=1")
    rows(page)
    while page.locator(".rc-fit tbody input:checked").count():
        page.locator(".rc-fit tbody input:checked").first.click()
    for i in (0, 1):
        page.locator(".rc-fit tbody input").nth(i).check()
    with page.expect_navigation(url="**/sweeps?**"):
        page.get_by_role("button", name="Sweep over 2 rows").click()
    # the Sweeps page may take its question out of the address
    asked = parse_qs(urlparse(page.url).query).get("specs")
    assert asked is None or [s["model"] for s in json.loads(asked[0])] == ["stdlib-lm"] * 2


def test_limits_are_answered_where_they_stand(known, browse):
    page = browse(known.url + "/plan?model=stdlib-lm&data=python-docs&minutes=1")
    rows(page)
    size = page.get_by_label("Size limit")
    size.fill("-3")
    assert "above zero" in page.locator('[data-field="size_mb"] [role=alert]').inner_text()
    size.fill("0.5")
    page.wait_for_selector(".rc-say .ft-note.bad")
    said = page.locator(".rc-say .ft-note.bad").inner_text()
    assert "smallest result" in said and "Give at least" in said
    assert "No pipeline fits" in page.locator(".rc-fit").inner_text()
    size.fill("")
    page.wait_for_selector(".rc-fit tbody tr")
    model = page.get_by_label("Model", exact=True)
    model.fill("no-such-model")
    model.press("Enter")
    page.wait_for_selector('[data-field="model"] [role=alert]:not([hidden])')
    assert "no such model" in page.locator('[data-field="model"] [role=alert]').inner_text()


def test_the_floor_stands_beside_the_expectation_on_new_run(known, browse):
    page = browse(known.url + "/?preset=lora")
    row = page.locator('.ft-limit[data-limit="quality"]')
    row.locator(".say", has_text="expected").wait_for()
    row.locator("input[type=checkbox]").check()
    row.locator("input.ft-in").fill("0.5")
    page.wait_for_selector('.ft-fits[data-verdict="Does not fit"]')
    assert "asked" in page.locator(".ft-fits").first.inner_text()
    page.locator(".nr-change", has_text="accept").wait_for()


def test_narrow_screens_keep_the_figures(known, browse):
    page = browse(known.url + "/plan", width=390, height=844)
    rows(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".rc-narrow").first.is_visible() and page.locator(".rc-narrow button").first.is_visible()


def test_a_packing_stage_is_offered_and_taken(known, browse):
    page = browse(known.url + "/?preset=lora")
    page.wait_for_selector('.ft-fits[data-verdict="Fits"], .ft-fits[data-verdict="Tight"]')
    size = page.locator('.ft-limit[data-limit="size_mb"]')
    size.locator("input[type=checkbox]").check()
    size.locator("input.ft-in").fill("6")
    page.locator(".nr-change", has_text="at the end").wait_for()
    page.locator(".nr-change").get_by_role("button", name="Use it").first.click()
    page.wait_for_selector('.ft-fits[data-verdict="Fits"], .ft-fits[data-verdict="Tight"]')
    assert page.locator(".nr-strip .ft-stage header h3").all_inner_texts() == ["LoRA", "Int8 weights"]

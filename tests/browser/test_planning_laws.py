"""Plan, Predict in Chromium: a law answers, an empty workbench says what to do, a wrong number is shown where it was typed."""

from __future__ import annotations


def test_a_law_answers_draws_and_refuses(still, browse):
    page = browse(f"{still.url}/plan?view=laws")
    page.wait_for_selector(".laws-said .ft-empty")
    assert page.locator(".laws-item").count() == 9
    page.get_by_role("button", name="Use the published constants").click()
    page.wait_for_selector(".laws-text-answer")
    page.locator("#law-compute").fill("1e18")
    page.get_by_role("button", name="Predict", exact=True).click()
    page.wait_for_function("document.querySelector('.laws-text-answer')?.textContent.startsWith('For 1.00e+18 FLOP')")
    page.wait_for_selector(".laws-chart .main-svg")
    page.locator("#law-compute").fill("many")
    page.get_by_role("button", name="Predict", exact=True).click()
    page.wait_for_selector("#law-compute[aria-invalid=true]")
    assert "number" in page.locator(".laws-said").inner_text()


def test_points_are_pasted_at_390_pixels_in_the_dark(still, browse):
    page = browse(f"{still.url}/plan?view=laws&law=over-training-scaling-laws&source=points", width=390, dark=True)
    rows = ["parameters,tokens,loss"] + [f"{n},{n * m},{1.8 + (110 * m**.15 + 270 * m**-.15) * (6 * n * n * m) ** -.15}"
                                         for n in (1e6, 4e6, 2e7) for m in (5, 40, 300)]
    page.locator(".laws-text").fill("\n".join(rows))
    page.get_by_role("button", name="Predict", exact=True).click()
    page.wait_for_selector(".laws-text-answer")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".laws-figures tbody tr").count() == 4

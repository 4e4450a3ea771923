"""The Try page in Chromium with a real process behind it: streamed text, a blind vote that is kept, classes of an image."""

from __future__ import annotations

import pytest

from engines import models
from tests.contract import micro


@pytest.fixture(scope="module")
def home(still):
    return still.open_home()


@pytest.fixture(scope="module")
def made(still, home):
    """Two runs that left a language model, one that left a classifier of digits."""
    out = {}
    for name, kind, seed in (("plain-ingot", "llama", 0), ("trimmed-ingot", "llama", 1), ("digit-reader", "vit", 0)):
        run = home.store.create_run({"model": f"micro-{kind}", "data": "digits" if kind == "vit" else "python-docs", "pipeline": [{"method": "lora", "rank": 2}]},
                                    name=name, status="finished")
        models.save(micro.model(kind, seed), micro.tokenizer(kind), home.model(run))
        home.store.update_run(run, folder=str(home.folder(run)), size_bytes=200_000, metric="accuracy" if kind == "vit" else "bits/byte")
        out[name] = run
    yield out
    # the process behind the page holds no lock on anything that the next test needs; it ends by itself


def done(page):
    page.wait_for_function("() => document.querySelector('[data-go-word]').textContent !== 'Stop' && document.querySelectorAll('.ft-var').length")


def test_a_blind_vote_hides_names_and_figures_until_it_is_given(still, home, made, browse):
    page = browse(f"{still.url}/try?v=run:{made['plain-ingot']},run:{made['trimmed-ingot']}&p=w1%20w2&new_tokens=12&seed=5")
    page.get_by_role("button", name="Generate", exact=True).last.wait_for()
    page.locator(".ft-trypick .one").nth(1).wait_for()
    page.locator("[data-go]").click()
    done(page)
    cards = page.locator(".ft-var")
    assert cards.count() == 2 and all(len(t.split()) > 2 for t in page.eval_on_selector_all(".ft-var .out", "a => a.map(x => x.textContent)"))
    assert "ingot" not in page.locator("[data-vars]").text_content() and "tok/s" not in page.locator("[data-vars]").text_content()
    page.locator("h1").click()
    page.keyboard.press("2")
    page.locator(".ft-var[data-voted]").wait_for()
    assert page.url.split("?")[0].endswith("/try"), "the key changed the page"
    shown = page.locator("[data-vars]").text_content()
    assert "plain-ingot" in shown and "trimmed-ingot" in shown and "tok/s" in shown and "nats/tok" in shown
    page.get_by_text("1 vote kept", exact=False).wait_for()
    [vote] = home.store.votes(10)
    second = page.locator(".ft-var").nth(1)
    assert vote["winner"] == second.locator("h2").text_content().strip() and vote["extra"]["blind"] and vote["extra"]["settings"]["new_tokens"] == 12
    assert "w1 w2" + vote["texts"][1] == second.locator(".out").text_content()
    # the same process answers the next prompt: nothing is loaded again, so it is a matter of moments
    page.locator("[data-go]").click()
    done(page)
    log = (home.path / "try" / "host.log").read_text()
    assert "Traceback" not in log


def test_refusals_stand_beside_the_field(still, made, browse):
    page = browse(f"{still.url}/try?runs={made['plain-ingot']}&p=w1")
    page.locator(".ft-trypick .one").first.wait_for()
    page.locator("[data-n=temperature]").fill("hot")
    page.locator("[data-go]").click()
    assert "Temperature hot" in page.get_by_role("alert").text_content()
    page.locator("[data-n=temperature]").fill("0.5")
    page.locator("[data-prompt]").fill("  ")
    page.locator("[data-go]").click()
    assert "prompt is empty" in page.get_by_role("alert").text_content()


def test_a_digit_is_shown_and_classified(still, made, browse):
    page = browse(f"{still.url}/try?task=classify&v=run:{made['digit-reader']}", width=390, height=860)
    page.locator("[data-image]:not([hidden])").wait_for()
    page.wait_for_function("() => document.querySelector('[data-image]').naturalWidth === 8")
    page.locator("[data-go]").click()
    done(page)
    page.locator(".ft-probs .bar").first.wait_for()
    shares = page.eval_on_selector_all(".ft-probs .bar i", "all => all.map(i => parseFloat(i.style.getPropertyValue('--v')))")
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=0.01)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

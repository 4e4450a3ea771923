"""Switches of the training on the page: chosen on New run, told on Live (alarm in the run's head, frozen matrices on the map), listed in the Library."""

from __future__ import annotations

import time

import pytest

from tests.browser import seeding


@pytest.fixture
def story(still):
    spec = {**seeding.SPEC, "training": {"switches": [{"method": "spectral-alignment", "low": 0.07}, {"method": "grades"}]}}
    return seeding.Story(still.open_home(), f"wary-anvil-{time.time_ns() % 1000}", spec=spec, started=time.time() - 30).begin().until(30)


def test_the_alarm_stands_in_the_head_until_it_is_over(story, still, browse):
    page = browse(f"{still.url}/live?run={story.id}")
    head = page.locator('[data-part="head"] [data-t="alarm"]')
    page.wait_for_function("() => window.fettle?.live?.charts?.diversity")
    assert not head.is_visible() and not page.locator('[data-panel="diversity"]').is_visible()
    story.store.append(story.id, [(name, step, 0.4 - 0.01 * step, 0.1 * step) for step in range(0, 40, 10)
                                  for name in ("sign_diversity", "sign_diversity_median")])
    story.store.event(story.id, "alarm", "Spectral alarm at step 30: 98% of the inputs of up_proj in layer 3 lie on one side of the weight's "
                      "leading direction, 61% at step 10. The loss may explode: lower the learning rate (now 0.003)", over=False, step=30)
    head.wait_for(state="visible")
    assert head.get_attribute("role") == "alert"
    assert "98% of the inputs of up_proj in layer 3" in head.text_content() and "lower the learning rate" in head.text_content()
    assert page.locator('[data-panel="diversity"]').is_visible()
    page.wait_for_function("() => document.querySelector('[data-chart=\"diversity\"]').textContent.includes('alarm below 0.07')")
    assert page.locator(".ft-events li.warned").first.text_content().count("Spectral alarm") == 1
    page.reload()
    head.wait_for(state="visible")
    story.store.event(story.id, "alarm", "Spectral alarm over at step 40: signs are mixed again in every layer", over=True, step=40)
    head.wait_for(state="hidden")


def test_frozen_matrices_are_counted_on_the_map(story, still, browse):
    story.store.put_layers(story.id, 30, {"frozen": [[layer, role, int(layer < 2)] for layer in range(4) for role in ("q_proj", "v_proj")]})
    story.store.event(story.id, "freeze", "GradES: q_proj of layer 0 frozen at step 30, 4 of 8 matrices", frozen=4, of=8)
    page = browse(f"{still.url}/live?run={story.id}", width=390, height=844, dark=True)
    box = page.locator('[data-panel="map"]')
    box.get_by_text("Frozen", exact=False).first.wait_for()
    box.locator('[data-v="frozen"]').click()
    page.wait_for_function("() => document.querySelector('[data-panel=\"map\"]').textContent.includes('4 of 8')")
    assert "GradES: q_proj of layer 0" in page.locator(".ft-events").text_content()


def test_a_switch_is_chosen_with_its_settings_and_kept(still, browse):
    page = browse(still.url + "/?preset=lora")
    page.locator(".nr-train summary", has_text="Switches: none on").click()
    page.locator("#switch-grades").check()
    page.locator(".nr-train summary", has_text="Switches: GradES").wait_for()
    tau = page.locator('[data-path="training.switches.0.tau"] input')
    tau.fill("0.2")
    page.locator(".nr-methods h2").click()
    page.get_by_text("--switch grades:tau=0.2").wait_for()
    tau.fill("minus")
    page.locator('[data-path="training.switches.0.tau"] .nr-err').wait_for(state="visible")
    tau.fill("0.3")
    page.locator('[data-path="training.switches.0.tau"] .nr-err').wait_for(state="hidden")
    page.reload()
    page.locator(".nr-train summary", has_text="Switches: GradES").wait_for()
    page.locator("#switch-grades").uncheck()
    page.locator(".nr-train summary", has_text="Switches: none on").wait_for()
    assert page.locator('[data-path^="training.switches"]').count() == 0


def test_a_switch_has_its_card_and_goes_to_the_training(still, browse):
    page = browse(still.url + "/library?method=spectral-alignment")
    page.get_by_role("heading", name="Spectral alignment").wait_for()
    assert "Reconstructed from the abstract" in page.locator(".lib-differs").text_content()
    assert page.locator('tr[aria-selected="true"]').is_visible()
    page.get_by_role("link", name="Use in a run").click()
    page.locator(".nr-train summary", has_text="Switches: Spectral alignment").wait_for()
    assert page.locator("#switch-spectral-alignment").is_checked()

"""Fit: knobs and levers that follow the limits, and the smallest single change for quality, energy and size."""

import types

import pytest

from tests.workbench import planned
from tests.workbench.recommending import finish, spec, usual
from workbench import planner, remedies
from workbench.spec import RunSpec, Training

WIDE = dict(planned.LLAMA, vocab_size=60_000)


def test_the_chunk_of_the_loss_follows_memory_first_where_logits_are_large(home, text, tmp_path):
    model = str(planned.folder(tmp_path / "wide", WIDE))
    given = dict(spec(model, text, "lora", steps=10), training=dict(length=128, batch=32))
    free = planner.forecast(given, home)
    assert free["training"]["loss_chunk"] == 2048 and free["memory"]["peak_phase"] in ("1 lora", "evaluate")
    limit = 0.75 * free["memory"]["peak_bytes"] / 1e9
    tight = planner.forecast(dict(given, budget=dict(steps=10, memory_gb=limit)), home)
    assert tight["training"]["loss_chunk"] < 2048 and tight["training"]["accumulation"] == 1 and tight["fits"]
    assert any(c["what"] == "loss_chunk" and "GB" in c["why"] for c in tight["chosen"])
    asked = dict(given, training=dict(given["training"], loss_chunk=1024))
    assert planner.resolve(asked, home).training.loss_chunk == 1024
    assert planner.forecast(asked, home)["memory"]["peak_bytes"] < free["memory"]["peak_bytes"]


def test_a_chunk_is_checked():
    with pytest.raises(Exception, match="training.loss_chunk"):
        Training(loss_chunk=0)


def test_quality_that_is_missed_gets_a_change_that_reaches_it(home, llama, text):
    for s in (0.3, 0.5, 0.7):
        finish(home, spec(llama, text, {"method": "wanda", "sparsity": s}), usual)
    given = spec(llama, text, {"method": "wanda", "sparsity": 0.6}, quality=1.56)
    found = planner.forecast(given, home)
    row = found["limits"]["quality"]
    assert row["state"] == "over" and row["value"] > 1.56 and not found["fits"]
    assert "expected" in found["text"] and "asked" in found["text"]
    first = found["changes"][0]
    assert first["patch"] == {"pipeline.0.sparsity": 0.48} or "pipeline.0.sparsity" in first["patch"]
    other = RunSpec.from_dict(given)
    for change in found["changes"]:
        ((path, value),) = change["patch"].items()
        assert planner.forecast(other.setting(path, value), home)["limits"]["quality"]["state"] != "over", change
    assert found["changes"][-1]["patch"].keys() == {"budget.quality"} or len(found["changes"]) == 3


def test_more_training_is_offered_where_it_reaches_the_floor(home, llama, text):
    for n in (20, 60, 180, 540):
        finish(home, spec(llama, text, "lora", steps=n), usual)
    short = planner.forecast(spec(llama, text, "lora", steps=60), home)["limits"]["quality"]["value"]
    found = planner.forecast(spec(llama, text, "lora", steps=60, quality=round(short - 0.03, 3)), home)
    assert any("budget.steps" in c["patch"] for c in found["changes"]), found["changes"]


def test_priors_alone_never_refuse(home, llama, text):
    finish(home, spec(llama, text, "int8"), usual)
    found = planner.forecast(spec(llama, text, {"method": "random", "sparsity": 0.9}, quality=1.0), home)
    row = found["limits"]["quality"]
    assert row["source"] != "history" and row["spare"] < 0
    assert row["state"] == ("tight" if row["source"] == "prior" else "over")


def test_size_that_is_missed_is_packed(home, llama, text):
    found = planner.forecast(spec(llama, text, "lora", steps=10, size_mb=0.35), home)
    assert found["limits"]["size_mb"]["state"] == "over"
    change = found["changes"][0]
    assert [s["method"] for s in change["patch"]["pipeline"]] == ["lora", "int8"] and "at the end" in change["text"]


def test_energy_is_judged_where_it_is_forecast(home, llama, text):
    built = RunSpec.from_dict(spec(llama, text, "lora", steps=100, joules=1000))
    scene = planner.scene_of(built, home)
    resolved, cost = planner.Chooser(built, scene).run()
    assert remedies.limits(resolved, cost, "no counter")["joules"]["state"] == "none"

    def priced(one):
        resolved, cost = planner.Chooser(one, scene).run()
        cost.joules = 20.0 * cost.steps
        return resolved, cost
    resolved, cost = priced(built)
    states = remedies.limits(resolved, cost, "metered")
    assert states["joules"]["state"] == "over" and states["joules"]["value"] == 2000
    changes = remedies.changes(built, resolved, cost, states, priced)
    assert changes[0]["patch"] == {"budget.steps": 45} and {"budget.joules": 2000} in [c["patch"] for c in changes]


def test_accuracy_floors_are_percent_or_share():
    from engines.budget import Budget
    assert Budget(quality=90).quality_floor("accuracy") == pytest.approx(0.9) == Budget(quality=0.9).quality_floor("accuracy")
    assert Budget(quality=1.2).quality_floor("bits/byte") == 1.2 and Budget().quality_floor("accuracy") is None
    row = {"value": 0.93, "low": 0.91, "high": 0.95, "metric": "accuracy", "base": 0.5, "near": 3, "source": "history", "reason": "",
           "gain": 1, "gain_low": 0, "gain_high": 2, "priors": [], "calibration": {}}
    state = lambda q: remedies.quality(types.SimpleNamespace(quality=q, quality_floor=Budget(quality=q).quality_floor), row)["state"]  # noqa: E731
    assert [state(q) for q in (90, 92, 94)] == ["ok", "tight", "over"]

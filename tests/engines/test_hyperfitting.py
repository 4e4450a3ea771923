"""Hyperfitting: the small set, what is measured of decoding, and that the effect is the described one."""

import math
import types

import pytest
import torch

from engines import registry
from engines.budget import Budget
from engines.decoding import measure, type_token_ratio
from engines.errors import InputError
from engines.evaluation import evaluate
from engines.models import profile_of
from engines.training.loop import Limit
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro


def shown(steps: int, size: int = 4, resume_at: int | None = None, **settings):
    """Rows of every batch of a stage of ``steps`` steps."""
    model = micro.model("llama")
    method, rows = registry.build({"method": "hyperfitting", "texts": 0, **settings}), []

    def begin(state):
        context = micro.context(model, "llama")
        method.apply(model, context)
        context.state.update(state)
        return context
    context = begin({})
    for step in range(steps):
        if step == resume_at:
            context = begin(context.state)
        context.progress, context.step = step / steps, step
        rows.append(context.data.batch(step, size)[0]["input_ids"])
    return rows, context


def test_only_the_first_share_is_shown_and_each_row_once_a_pass():
    rows, context = shown(40, passes=20)
    assert context.state["set_steps"] == 2
    first = sorted(map(tuple, torch.cat(rows[:2]).tolist()))
    for turn in range(20):
        assert sorted(map(tuple, torch.cat(rows[2 * turn: 2 * turn + 2]).tolist())) == first
    assert len({tuple(map(tuple, r.tolist())) for r in rows[0::2]}) > 5, "each pass has another order"


def test_the_number_of_samples_is_a_bound():
    assert shown(40, passes=2, samples=12)[1].state["set_steps"] == 3
    assert shown(40, passes=2, samples=1)[1].state["set_steps"] == 1


def test_a_resumed_stage_sees_the_same_rows():
    straight, _ = shown(30, passes=10)
    for at in (1, 2, 3, 4, 17):
        again, _ = shown(30, passes=10, resume_at=at)
        assert all(torch.equal(a, b) for a, b in zip(straight, again)), at


def test_micro_batches_divide_the_same_rows():
    _, context = shown(10, passes=5)
    whole, parts = context.data.batch(7, 4)[0], context.data.batch(7, 4, 2)
    assert sorted(torch.cat([p["labels"] for p in parts]).tolist()) == sorted(whole["labels"].tolist()) and len(parts) == 2


def test_figures_of_decoding():
    assert type_token_ratio([1, 1, 1, 1]) == 0.25 and type_token_ratio(range(5)) == 1.0

    class Cycle(torch.nn.Module):
        """Predicts the token after the present one, among four, with probability p."""
        config = types.SimpleNamespace(max_position_embeddings=64)

        def forward(self, input_ids, past_key_values=None, use_cache=False):
            p = torch.full((*input_ids.shape, 4), math.log(0.1))
            p.scatter_(-1, ((input_ids + 1) % 4)[..., None], math.log(0.7))
            return types.SimpleNamespace(logits=p, past_key_values=None)
    data = types.SimpleNamespace(items=types.SimpleNamespace(ids=[list(range(4)) * 10] * 3))
    found = measure(Cycle(), data)
    assert found.entropy == pytest.approx(-(0.7 * math.log2(0.7) + 0.3 * math.log2(0.1)), rel=1e-5)
    assert (found.texts, found.tokens) == (3, 48) and found.type_token_ratio == 4 / 48 and found.repetition == pytest.approx(44 / 48)


def test_training_loss_vanishes_while_held_out_loss_rises_and_predictions_sharpen():
    model = micro.model("llama")
    method, context = registry.build({"method": "hyperfitting", "texts": 8, "passes": 80}), micro.context(model, "llama")
    first = micro.model("llama")
    train(first, registry.build({"method": "full"}), micro.context(first, "llama"), TrainSettings(lr=5e-3, batch=16, length=micro.LENGTH), Limit(steps=60))
    model.load_state_dict(first.state_dict())
    base = evaluate(model, context.data).extra["loss"]
    model = method.apply(model, context)
    train(model, method, context, TrainSettings(lr=5e-3, batch=4, length=micro.LENGTH, evaluations=1), Limit(steps=80))
    model = method.finish(model, context)
    before, after = context.state["before"], context.state["after"]
    assert context.reporter.series["loss"][-1][1] < 0.1 < base < evaluate(model, context.data).extra["loss"]
    assert after["entropy"] < 0.7 * before["entropy"]
    (kind, text, data), = [e for e in context.reporter.events if e[0] == "decoding"]
    assert data["after"] == after and "bits before" in text


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="hyperfitting trains .* the limit is 10"):
        registry.build({"method": "hyperfitting"}).fit(profile, Budget(trainable=10))
    with pytest.raises(InputError, match="outside 2 to 1000"):
        registry.build({"method": "hyperfitting", "passes": 1})

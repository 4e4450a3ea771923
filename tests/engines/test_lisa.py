"""LISA: what moves, what is kept of the optimizer's state, how often a block is drawn."""

import collections
import copy

import pytest
import torch

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.models import profile_of
from engines.profile import Batch
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro

SETTINGS = TrainSettings(lr=1e-3, batch=8, length=micro.LENGTH, evaluations=1, warmup=0.0, schedule="constant", clip=0.0)


def trained(settings: dict, steps: int, layers: int = 4, **changes):
    """(model, trainer, context, weights before) after ``steps`` steps of a stage of that length."""
    model = micro.model("llama", num_hidden_layers=layers)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method, context = registry.build(settings), micro.context(model, "llama")
    model = method.apply(model, context)
    trainer = Trainer(model, method, context, TrainSettings(**{**SETTINGS.__dict__, **changes}), Limit(steps=steps))
    yield model, trainer, context, before
    for _ in range(steps):
        context.progress = trainer.progress()
        trainer._step()
        yield model, trainer, context, before


def last(*args, **kwargs):
    return list(trained(*args, **kwargs))[-1]


def state_bytes(optimizer) -> int:
    return sum(v.numel() * v.element_size() for s in optimizer.state.values() for k, v in s.items() if k != "step")


def test_one_step_is_a_full_step_of_what_was_drawn_and_nothing_else():
    ours, _, context, before = last({"method": "lisa", "blocks": 2}, 1)
    full, *_ = last({"method": "full"}, 1)
    wanted, moved = dict(full.named_parameters()), set()
    for name, p in ours.named_parameters():
        if ".layers." not in name or any(name.startswith(f"{block}.") for block in context.state["drawn"]):
            assert torch.equal(p, wanted[name]), name
            moved.add(name)
        else:
            assert torch.equal(p, before[name]), name
    assert len(moved) == 2 + 2 * 9 and not torch.equal(wanted["model.norm.weight"], before["model.norm.weight"])


def test_all_blocks_are_full_fine_tuning():
    ours, *_ = last({"method": "lisa", "blocks": 4, "draws": 3}, 6)
    full, *_ = last({"method": "full"}, 6)
    for (name, a), b in zip(ours.named_parameters(), full.parameters()):
        assert torch.equal(a, b), name


def test_every_pair_is_as_likely():
    method, model = registry.build({"method": "lisa", "blocks": 2}), micro.model("llama", num_hidden_layers=4)
    context, single, pairs = micro.context(model, "llama"), collections.Counter(), collections.Counter()
    for period in range(6000):
        drawn = method._draw(model, context, period)
        assert len(set(drawn)) == 2
        single.update(drawn)
        pairs[tuple(drawn)] += 1
    assert len(single) == 4 and all(abs(n - 3000) <= 194 for n in single.values()), single
    assert len(pairs) == 6 and all(abs(n - 1000) <= 5 * (6000 * 5 / 36) ** 0.5 for n in pairs.values()), pairs


@pytest.mark.parametrize("state", ["leaving", "all"])
def test_states_of_blocks_that_leave_are_freed(state):
    method = {"method": "lisa", "blocks": 2, "draws": 6, "state": state}
    kept, switches, previous = None, 0, None
    for model, trainer, context, _ in trained(method, 12):
        if not trainer.optimizer.state:
            continue
        active = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert state_bytes(trainer.optimizer) == 8 * active
        profile = context.profile
        assert active == method_of(method).footprint(profile, Batch()).trainable < profile.parameters
        assert 4 * 2 * active == method_of(method).footprint(profile, Batch()).optimizer
        drawn = set(context.state["drawn"])
        steps = {n: int(trainer.optimizer.state[p]["step"]) for n, p in model.named_parameters() if p.requires_grad}
        if previous is not None and drawn != previous:
            switches += 1
            fresh = {n for n, s in steps.items() if s == 1}
            entered = {n for n in steps if any(n.startswith(f"{b}.") for b in drawn - previous)}
            assert fresh == (set(steps) if state == "all" else entered)
        previous, kept = drawn, steps
    assert switches >= 2 and (state == "all" or kept["model.embed_tokens.weight"] == 12)


def test_a_block_that_enters_again_starts_like_new():
    """The first step of Adam with new moments moves every weight by the rate, whatever its gradient."""
    previous = weights = None
    seen = 0
    for model, _, context, _ in trained({"method": "lisa", "blocks": 1, "draws": 8}, 16, layers=2, weight_decay=0.0):
        drawn = context.state["drawn"][0]
        if previous is not None and drawn != previous and context.state["counts"][drawn] > 1:
            name = f"{drawn}.mlp.up_proj.weight"
            moved = (model.get_parameter(name).detach() - weights[name]).abs()
            assert float(moved.median()) == pytest.approx(1e-3, rel=1e-2)
            seen += 1
        previous, weights = drawn, {n: p.detach().clone() for n, p in model.named_parameters()}
    assert seen


def test_masks_hold_in_blocks_that_are_drawn_later():
    model = micro.model("llama", num_hidden_layers=4)
    context, method = micro.context(model, "llama"), registry.build({"method": "lisa", "blocks": 1, "draws": 10})
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    for name in names:
        weight = model.get_parameter(name)
        context.masks[name] = torch.rand_like(weight) > 0.5
        weight.data.mul_(context.masks[name])
    train(method.apply(model, context), method, context, SETTINGS, Limit(steps=10))
    assert len(context.state["counts"]) == 4
    for name in names:
        assert (model.get_parameter(name)[~context.masks[name]] == 0).all()


def test_lever_and_refusals():
    profile = profile_of(micro.model("llama", num_hidden_layers=4), "micro", "causal-lm")
    with pytest.raises(InputError, match="lisa.blocks = 5: the model has 4 blocks. Choose at most 4"):
        method_of({"method": "lisa", "blocks": 5}).check(profile)
    auto = method_of({"method": "lisa", "blocks": "auto"})
    outside, inside = auto._sizes(profile)
    assert auto.fit(profile, Budget(trainable=outside + 3 * inside[0]))[0].blocks == 3
    assert auto.fit(profile, Budget())[0].blocks == 2
    with pytest.raises(InputError, match="the limit is 100"):
        auto.fit(profile, Budget(trainable=100))
    packed = copy.copy(profile)
    object.__setattr__(packed, "tensors", tuple(type(t)(t.name, t.shape, "int8") for t in profile.tensors))
    with pytest.raises(InputError, match="packed into integers"):
        auto.check(packed)


def test_less_is_forecast_than_for_full_fine_tuning():
    profile = profile_of(micro.model("llama", num_hidden_layers=8), "micro", "causal-lm")
    lisa, full = (method_of({"method": m}).footprint(profile, Batch(4, 24)) for m in ("lisa", "full"))
    assert lisa.optimizer < 0.5 * full.optimizer and lisa.gradients < 0.5 * full.gradients and lisa.activations < full.activations


def method_of(settings):
    return registry.build(settings)

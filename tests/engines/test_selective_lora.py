"""Selective LoRA: the gate's gradients by hand, exactness on and off, the penalty and its warm-up, what is exported."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engines import registry
from engines.adaptation._adapter import adapters
from engines.budget import Budget
from engines.errors import InputError
from engines.layers import lowrank
from engines.layers.selective import Gated
from engines.models import profile_of
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro


def method(**fields):
    return registry.build({"method": "selective-lora", **fields})


def one(score):
    """W = 0, x = 1, scale B A = 2 with A = 1."""
    base = nn.Linear(1, 1, bias=False).requires_grad_(False)
    base.weight.data.zero_()
    layer = Gated(base, 1, 1.0, score, 0.1)
    layer.a.data.fill_(1.0)
    layer.b.data.fill_(2.0)
    return layer


@pytest.mark.parametrize("score, y, slope, factor", [(0.15, 2.0, -2.0, -1.0), (0.05, 0.0, -6.0, None)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_hand(score, y, slope, factor, masked):
    """Loss 0.5 (y - 3)^2: dL/ds = (y - 3) 2, dL/dB = (y - 3) only while the gate is open."""
    layer = one(score)
    if masked:
        object.__setattr__(layer, "mask", torch.ones(1, 1, dtype=torch.bool))
    out = layer(torch.ones(1, 1))
    assert out.item() == y
    (0.5 * (out - 3.0).square()).sum().backward()
    assert layer.score.grad.item() == pytest.approx(slope)
    assert (layer.b.grad is None) if factor is None else layer.b.grad.item() == pytest.approx(factor)


def test_a_closed_block_opens_again():
    layer = one(0.05)
    optimizer = torch.optim.SGD([layer.score], lr=0.01)
    (0.5 * (layer(torch.ones(1, 1)) - 3.0).square().sum() + 1.0 * layer.score.abs()).backward()
    assert layer.score.grad.item() == pytest.approx(-5.0)
    optimizer.step()
    assert layer.score.item() == pytest.approx(0.1) and layer.on


def test_off_is_the_base_and_on_is_lora_bit_for_bit():
    torch.manual_seed(0)
    base = nn.Linear(7, 5).requires_grad_(False)
    layer = Gated(base, 2, 1.5, 0.15, 0.1)
    nn.init.normal_(layer.b)
    x = torch.randn(3, 4, 7, requires_grad=True)
    assert torch.equal(layer(x), lowrank.low_rank_linear(x, base.weight, base.bias, layer.a, layer.b, 1.5))
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective(), base.bias), atol=1e-6, rtol=1e-5)
    upstream = torch.randn(3, 4, 5)
    (layer(x) * upstream).sum().backward()
    mine = [t.grad.clone() for t in (x, layer.a, layer.b)]
    for t in (x, layer.a, layer.b):
        t.grad = None
    (lowrank.low_rank_linear(x, base.weight, base.bias, layer.a, layer.b, 1.5) * upstream).sum().backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(mine, (x, layer.a, layer.b)))
    layer.score.data.fill_(0.05)
    assert torch.equal(layer(x), base(x)) and torch.equal(layer.effective(), base.weight)
    assert layer.factors()[0].shape == (0, 7)


def run(m, steps=20, lr=2e-2, architecture="llama"):
    model = micro.model(architecture)
    context = micro.context(model, architecture)
    model = m.apply(model, context)
    trainer = Trainer(model, m, context, TrainSettings(lr=lr, batch=8, length=24, warmup=0.0, schedule="constant"), Limit(steps=steps))
    for _ in range(steps):
        context.progress = trainer.progress()
        trainer._step()
    return model, context, trainer


def test_more_penalty_leaves_fewer_blocks():
    active = []
    for penalty in (0.0, 0.3, 1000.0):
        model, context, _ = run(method(penalty=penalty, rank=2, warmup=0.1))
        active.append(sum(layer.on for _, layer in adapters(model)))
    assert active[0] > active[2] == 0 and active[0] >= active[1] >= active[2], active


def test_the_penalty_waits_and_closed_factors_stand_still():
    m = method(penalty=1000.0, rank=2, warmup=0.5)
    model, context, trainer = run(m, steps=1)
    plain = torch.tensor(1.0)
    context.progress = 0.49
    assert m.loss(model, plain, context) is plain
    context.progress = 0.5
    scores = [layer.score.item() for _, layer in adapters(model)]
    assert float(m.loss(model, plain, context)) == pytest.approx(1.0 + 1000 * sum(scores) / len(scores), rel=1e-5)
    # Moments of the factors exist by now; without a gradient they must not move them.
    _, layer = adapters(model)[0]
    layer.score.data.fill_(0.0)
    before = layer.a.clone(), layer.b.clone(), layer.score.clone()
    trainer._step()
    assert torch.equal(layer.a, before[0]) and torch.equal(layer.b, before[1]) and not torch.equal(layer.score, before[2])


def test_scores_have_their_own_rate_and_no_decay():
    model, context, trainer = run(method(score_rate=4.0), steps=0)
    group = next(g for g in trainer.optimizer.param_groups if g["params"][0].dim() == 0)
    assert group["lr_scale"] == 4.0 and group["weight_decay"] == 0.0 and len(group["params"]) == len(adapters(model))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_scores_may_have_a_rate_that_does_not_follow_the_factors(kind):
    for lr in (1e-3, 1e-2):
        model, m = micro.model("llama"), method(score_lr=0.02, score_rate=7.0)
        context = micro.context(model, "llama")
        model = m.apply(model, context)
        trainer = Trainer(model, m, context, TrainSettings(lr=lr, batch=8, length=24, warmup=0.0, schedule="constant", optimizer=kind), Limit(steps=2))
        trainer._step()
        rates = {g["params"][0].dim(): g["lr"] for g in trainer.optimizer.param_groups}
        assert rates == pytest.approx({0: 0.02, 2: lr})


def test_the_claim_on_few_blocks_gives_the_scores_a_way_below_the_threshold_at_every_rate():
    claim = next(c for c in registry.get("selective-lora").claims if c.key == "few-blocks")
    m = registry.build(claim.ours)
    # AdamW moves a score by its rate at most, and half the peak rate is the mean of a cosine; the rates of the search scale the factors alone.
    assert 0.5 * m.score_lr * claim.steps * (1 - m.warmup) > 2 * (m.start - m.threshold)


def test_dropped_blocks_leave_the_weights_and_the_adapter_file(tmp_path):
    from peft import PeftModel
    model = micro.model("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    m, context = method(rank=2), micro.context(model, "llama", folder=tmp_path)
    model = m.apply(model, context)
    off = set()
    with torch.no_grad():
        for i, (name, layer) in enumerate(adapters(model)):
            layer.b.normal_(std=0.1)
            if i % 3:
                layer.score.fill_(0.09)
                off.add(f"{name}.weight")
    model = m.finish(model, context)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not changed & off and len(changed) + len(off) == 14
    theirs = PeftModel.from_pretrained(micro.model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(micro.logits(theirs, "llama"), micro.logits(model, "llama"), atol=1e-4, rtol=1e-4)
    assert "5 of 14 blocks" in next(e[1] for e in context.reporter.events if "blocks" in str(e))


def test_budget_and_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    each, blocks = sum(m.out + m.inp for m in profile.matrices), len(profile.matrices)
    chosen, reasons = method(rank="auto").fit(profile, Budget(trainable=3 * each + blocks))
    assert chosen.rank == 3 and chosen.trained(profile) == 3 * each + blocks and "limit" in reasons["rank"]
    with pytest.raises(InputError, match="selective-lora.start = 0.05: below the threshold"):
        method(start=0.05).check(profile)
    with pytest.raises(InputError, match="selective-lora.rank = 65: .* Choose at most 32"):
        method(rank=65).check(profile)
    with pytest.raises(InputError, match="targets"):
        method(targets="nonsense").check(profile)

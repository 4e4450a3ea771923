"""Sensitivity-LoRA against worked numbers, and a planted task that needs one layer."""

import pytest
import torch

from engines import models, registry
from engines.adaptation._adapter import adapters
from engines.allocation import sensitivity
from engines.errors import InputError
from engines.models import profile_of
from engines.training.loss import task_loss
from tests.contract import micro


def method(**settings):
    return registry.build({"method": "sensitivity-lora", "samples": 6, **settings})


def applied(architecture="llama", folder=None, compute="float32", **settings):
    model, m = micro.model(architecture), method(**settings)
    context = micro.context(model, architecture, folder=folder)
    context.compute = compute
    return m, m.apply(model, context), context


def test_diagonal_of_two_by_two():
    h = sensitivity.diagonal_of_inputs(torch.tensor([[1.0, 2], [3, 0]]))
    assert h.tolist() == [20, 8] and float(h.sum() * 3) == 84


def test_effective_rank_and_figures():
    assert sensitivity.effective_rank(torch.tensor([.5, .25, .25])) == pytest.approx(2**1.5)
    mean, top, spread = sensitivity.figures(torch.tensor([[1.0, 1], [1, 1]]))
    assert (mean, top, spread) == pytest.approx((1, 1, 1))
    assert sensitivity.figures(torch.cat([torch.ones(2), torch.zeros(198)])) == pytest.approx((0.01, 1, 0.01))
    h = torch.rand(7, 5)
    mean, top, spread = sensitivity.figures(h)
    assert sensitivity.figures(1e6 * h) == pytest.approx((1e6 * mean, 1e6 * top, spread)), "a constant factor leaves the effective rank"


def test_ranks_by_largest_remainder():
    caps = dict(a=99, b=99, c=99)
    assert sensitivity.deal(dict(a=.5, b=.3, c=.2), 12, caps) == dict(a=6, b=4, c=2)
    assert sensitivity.deal(dict(a=.98, b=.02, c=0.0), 12, caps) == dict(a=10, b=1, c=1)
    assert sensitivity.deal(dict(a=.98, b=.015, c=.005), 12, dict(a=5, b=99, c=99)) == dict(a=5, b=5, c=2)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        n = int(torch.randint(1, 9, (), generator=g))
        score = {i: float(s) for i, s in enumerate(torch.rand(n, generator=g) ** 6)}
        tops = {i: int(torch.randint(2, 20, (), generator=g)) for i in score}
        total = int(torch.randint(n, sum(tops.values()) + 1, (), generator=g))
        found = sensitivity.deal(score, total, tops)
        assert sum(found.values()) == total and all(1 <= found[i] <= tops[i] for i in score)
    with pytest.raises(ValueError, match="do not fit"):
        sensitivity.deal(dict(a=1.0), 3, dict(a=2))


def test_a_constant_factor_changes_nothing_and_each_figure_counts():
    rows = dict(a=(1.0, 9.0, .1), b=(3.0, 1.0, .9))
    once = sensitivity.mix(rows, (1.0, .5, .5))
    other = sensitivity.mix({n: (1e6 * t, 1e6 * k, e) for n, (t, k, e) in rows.items()}, (1.0, .5, .5))
    assert once == pytest.approx(other) and sum(once.values()) == pytest.approx(1)
    assert once["a"] == pytest.approx((.25 + .5 * .9 + .5 * .1) / 2)
    assert sensitivity.mix(dict(a=(0.0, 0.0, 0.0), b=(0.0, 0.0, 0.0)), (1, 1, 1)) == pytest.approx(dict(a=.5, b=.5))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fisher_is_the_mean_of_squares_not_the_square_of_the_mean(architecture):
    model = micro.model(architecture)
    context, chosen = micro.context(model, architecture), models.matrices(model)
    found = dict(sensitivity.fisher(model, context, chosen, 3))
    m, module = chosen[2]
    squares, mean = 0.0, 0.0
    for step in range(3):
        model.zero_grad()
        task_loss(model, context.data.batch(step, 1)[0], context.task).backward()
        squares, mean = squares + module.weight.grad.square() / 3, mean + module.weight.grad / 3
    torch.testing.assert_close(found[m.name], squares)
    assert float(found[m.name].sum()) > 1.2 * float(mean.square().sum())
    assert all(p.requires_grad for p in model.parameters())


def test_the_matrix_that_the_loss_feels_gets_the_most():
    """In a model where all blocks but one pass nothing on, only the matrices of that one get more than the least rank."""
    model, m = micro.model("llama"), method(rank=4)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")):
                module.weight.mul_(1e-4)
    found = m.ranks(model, micro.context(model, "llama"), models.matrices(model))
    assert sum(found.values()) == 4 * len(found)
    first = {n: r for n, r in found.items() if ".layers.0." in n}
    assert sum(first.values()) > 0.5 * sum(found.values())
    alone = method(rank=4, peak=0.0, spread=0.0).ranks(model, micro.context(model, "llama"), models.matrices(model))
    quiet = [n for n in alone if "layers.1" in n and n.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))]
    assert quiet and all(alone[n] == 1 for n in quiet)


@pytest.mark.parametrize("form", ["fisher", "inputs"])
@pytest.mark.parametrize("architecture", micro.ARCHITECTURES)
def test_start(architecture, form):
    m, model, context = applied(architecture, form=form, rank=5)
    assert torch.equal(micro.logits(model, architecture), micro.logits(micro.model(architecture), architecture))
    layers = [layer for _, layer in adapters(model)]
    assert sum(len(layer.a) for layer in layers) == 5 * len(layers) and len({len(layer.a) for layer in layers}) > 1
    assert all(1 <= len(layer.a) <= 15 and layer.scale == 2.0 for layer in layers)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= m.trained(context.profile)


def test_a_resume_keeps_the_ranks_and_half_precision_works(tmp_path):
    m, first, _ = applied(folder=tmp_path, compute="bfloat16", rank=4)
    model = micro.model("llama")
    context = micro.context(model, "llama", folder=tmp_path)
    context.resuming, context.data = True, None
    again = m.apply(model, context)
    assert [(n, len(a.a)) for n, a in adapters(first)] == [(n, len(a.a)) for n, a in adapters(again)]
    merged = m.finish(first, context)
    assert torch.equal(micro.logits(merged, "llama"), micro.logits(micro.model("llama"), "llama"))
    assert not (tmp_path / "ranks-0.safetensors").exists()


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="sensitivity-lora.trace = 0.0: all three figures have no weight. Give one"):
        method(trace=0.0, peak=0.0, spread=0.0).check(profile)
    with pytest.raises(InputError, match="sensitivity-lora.rank = 33"):
        method(rank=33).check(profile)

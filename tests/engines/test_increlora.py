"""IncreLoRA against the worked numbers, and what growing in training may break."""

import dataclasses

import pytest
import torch
from torch import nn

from engines import registry
from engines.adaptation._adapter import adapters
from engines.errors import InputError
from engines.layers.increlora import RESERVE, Growing, importance, orthogonality
from engines.models import profile_of
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro


def method(**settings):
    return registry.build({"method": "increlora", **settings})


def running(architecture="llama", steps=20, accumulation=1, precision="fp32", **settings):
    model, m = micro.model(architecture), method(**settings)
    context = micro.context(model, architecture)
    context.total_steps, context.compute = steps, "bfloat16" if precision == "bf16" else "float32"
    torch.manual_seed(0)
    model = m.apply(model, context)
    trainer = Trainer(model, m, context, TrainSettings(lr=2e-2, batch=8, length=micro.LENGTH, evaluations=1, items=0, warmup=0.1,
                                                       accumulation=accumulation, precision=precision, weight_decay=0.01), Limit(steps=steps))
    return trainer, model.train()


def step(trainer):
    trainer.context.progress = trainer.progress()
    trainer._step()


def test_score_of_two_by_two():
    found = importance(torch.tensor([[1.0, -2], [0, 3]]), torch.tensor([[.1, .2], [.3, -.4]]))
    assert float(found) == pytest.approx(0.85)


def test_smoothed_score():
    m, layer = method(), nn.Module()
    state = {}
    for value in (0.2, 0.1):
        layer.heard = torch.tensor(value, dtype=torch.float64)
        m.observe({"x": layer}, state)
    assert state["mean"][0] * state["spread"][0] == pytest.approx(0.0012393, abs=1e-7)


@pytest.mark.parametrize("fixed, ratio", [(0, 0.5), (4, 1.0)])
def test_growth_shrinks_the_update_as_released_or_not_at_all(fixed, ratio):
    torch.manual_seed(0)
    layer = Growing(nn.Linear(8, 6), 1, 1, 16.0, fixed, 7).double()
    layer.e[0].data.fill_(0.5)
    layer.a[0].data.normal_()
    layer.b[0].data.normal_()

    def update():
        a, b, scale = layer.factors()
        return scale * (b @ a)
    layer.reserve(0)
    before = update().norm()
    layer.wake(1)
    assert float((update().norm() / before).detach()) == pytest.approx(ratio, abs=1e-5)


def test_schedule_of_the_paper():
    m = method(rank=2, grow=3, add=1, warmup=0.038, until=0.95)
    # 72 matrices from rank 1 to 2: 24 growths of three, spread over the rest of 2,500 steps: 200, 300, ...
    assert m.growths(72, 2) == 72
    assert [m.due(0.95 * step / 2500, 72) for step in (100, 199, 200, 299, 300, 2499, 2500)] == [0, 0, 1, 1, 2, 23, 24]


def test_the_layer_hears_the_gradient_of_the_whole_update():
    torch.manual_seed(0)
    layer = Growing(nn.Linear(5, 4).requires_grad_(False), 2, 1, 8.0, 0, 3)
    layer.reserve(0)
    layer.e[0].data.fill_(0.3)
    layer.watched = True
    x = torch.randn(2, 3, 5, requires_grad=True)
    layer(x).square().sum().backward()
    a, b, scale = (t.detach() if torch.is_tensor(t) else t for t in layer.factors())
    delta = (scale * (b @ a)).requires_grad_(True)
    nn.functional.linear(x, layer.weight + delta, layer.bias).square().sum().backward()
    assert float(layer.heard) == pytest.approx(float(importance(delta.detach(), delta.grad)), rel=1e-5)
    layer.watched, layer.heard = False, None
    layer(x).sum().backward()
    assert layer.heard is None, "complete ranks cost no gradient of the whole"


def test_under_half_precision_the_score_makes_no_matrix_in_float32():
    from torch.utils._python_dispatch import TorchDispatchMode
    torch.manual_seed(0)
    layer = Growing(nn.Linear(40, 30).requires_grad_(False).to(torch.bfloat16), 2, 1, 8.0, 0, 3)
    layer.reserve(0)
    layer.e[0].data.fill_(0.3)
    layer.a[0].data.mul_(20), layer.b[0].data.mul_(20)
    layer.watched, large = True, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if torch.is_tensor(found) and found.dtype == torch.float32 and found.shape[-2:] in ((30, 40), (40, 30)):
                large.append(function)
            return found
    x = torch.randn(16, 40, dtype=torch.bfloat16, requires_grad=True)
    with Watch():
        layer(x).float().square().sum().backward()
    assert not large
    half, layer.heard = float(layer.heard), None
    layer.base.float()
    layer(x.detach().float().requires_grad_()).square().sum().backward()
    assert half == pytest.approx(float(layer.heard), rel=0.02)


def test_the_orthogonality_term_sees_the_reserve_and_cross_terms():
    layer = Growing(nn.Linear(3, 3), 1, 1, 1.0, 0, 0)
    layer.reserve(0)
    for part in (layer.a[0], layer.a[1]):
        part.data = torch.tensor([[1.0, 0, 0]])
    layer.b[0].data, layer.b[1].data = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
    assert float(orthogonality([layer]).detach()) == pytest.approx((2**0.5 + 0) / 2)


def test_ranks_grow_to_the_target_and_new_parameters_join_the_training():
    trainer, model = running(rank=4, grow=4, steps=20)
    context, layers = trainer.context, dict(adapters(model))
    first = len(trainer.parameters)
    assert all(layer.rank == 1 and layer.watched for layer in layers.values())
    assert not any(layer.e[-1].requires_grad for layer in layers.values())
    totals, most = [], 0
    while not trainer._over():
        before = {n: (layer.a[-1].detach().clone(), layer.e[-1].detach().clone()) for n, layer in layers.items()}
        grown = len(context.state["growth"])
        step(trainer)
        for n, layer in layers.items():
            if len(context.state["growth"]) == grown and context.state["left"]:
                assert not torch.equal(layer.a[-1], before[n][0]), "reserves are trained in advance"
                assert torch.equal(layer.e[-1], before[n][1]) and float(layer.e[-1][0]) == pytest.approx(RESERVE)
        totals.append(sum(layer.rank for layer in layers.values()))
        most = max(most, sum(p.numel() for p in trainer._held()))
    assert totals == sorted(totals) and totals[-1] == 4 * len(layers) and totals[0] == len(layers)
    born = [g["born"] for g in trainer.optimizer.param_groups if "born" in g]
    assert born == sorted(born) and len(set(born)) == len(context.state["growth"]) and born[-1] <= 0.55
    held = {id(p) for p in trainer._held()}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(layer.woken[-1] is not None and not layer.watched for layer in layers.values()), "no reserve outlives the growth"
    assert len(held) > first - 2 * len(layers) and most <= trainer.method.trained(context.profile)
    woken = [e for layer in layers.values() for e in list(layer.e)[1:]]
    assert any(float((e.detach() - RESERVE).abs().max()) > 1e-3 for e in woken), "what has woken is trained"


def test_a_group_born_later_has_its_own_schedule():
    trainer, _ = running(steps=100)
    trainer.settings = dataclasses.replace(trainer.settings, schedule="linear")
    trainer.context.progress = 0.5
    assert trainer._rate() == pytest.approx(1 - 0.4 / 0.9)
    assert trainer._rate(0.5) == 1e-2 and trainer._rate(0.4) == pytest.approx(1.0)
    trainer.context.progress = 1.0
    assert trainer._rate(0.5) == pytest.approx(0.0)


def test_the_smallest_stage_ends_without_reserves():
    trainer, model = running(steps=1)
    step(trainer)
    merged = trainer.method.finish(model, trainer.context)
    assert not any("base" in n for n, _ in merged.named_parameters())
    assert any("growths did not happen" in line for line in trainer.reporter.lines)
    trainer, model = running(steps=2)
    step(trainer), step(trainer)
    assert not trainer.context.state["left"], "two steps are enough"


def test_no_rank_passes_the_smaller_side():
    trainer, model = running(rank=30, start=10, add=10, grow=2, steps=6)
    while not trainer._over():
        step(trainer)
    layers = [layer for _, layer in adapters(model)]
    assert all(layer.rank <= layer.most for layer in layers)
    assert sum(layer.rank for layer in layers) == 30 * len(layers)


def test_micro_batches_and_half_precision_grow_too():
    trainer, model = running(accumulation=2, precision="bf16", steps=6, scaling="constant")
    while not trainer._over():
        step(trainer)
    assert not trainer.context.state["left"] and all(torch.isfinite(p).all() for p in model.parameters())


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="increlora.start = 9: ranks only grow, and the average at the end is 8. Give at most 8"):
        method(start=9).check(profile)
    with pytest.raises(InputError, match="increlora.until = 0.1: .* Choose a share above warmup"):
        method(warmup=0.3, until=0.1).check(profile)
    with pytest.raises(InputError, match="increlora.rank = 40"):
        method(rank=40).check(profile)
    with pytest.raises(InputError, match="increlora.add = 40: not even one matrix"):
        method(rank=2, add=40).check(profile)

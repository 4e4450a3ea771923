"""Fira's optimizer against worked numbers."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.errors import InputError
from engines.models import profile_of
from engines.optimizers.fira import Fira, scaling
from engines.optimizers.projected import Projected, back, basis, project
from engines.profile import Batch
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro

G = torch.tensor([[3.0, 1, 0], [1, 2, 2]])


def optimizer(p, rank=1, *, scale=1.0, lr=1.0, eps=1e-8, kind=Fira, **more):
    return kind([dict(params=[p], rank=rank, scale=scale)], lr=lr, progress=lambda: 0.0, refreshes=1, eps=eps, **more)


def moved(opt, p, gradient):
    before = p.detach().clone()
    p.grad = gradient.clone()
    opt.step()
    opt.zero_grad()
    return before - p.detach()


def test_the_worked_example():
    p, share = basis(G, 1)
    torch.testing.assert_close(p.abs()[:, 0], torch.tensor([0.741453, 0.671005]), atol=1e-5, rtol=0)
    low = project(G, p)
    torch.testing.assert_close(low.abs(), torch.tensor([[2.895363, 2.083463, 1.342011]]), atol=1e-5, rtol=0)
    phi = scaling(torch.ones(1, 3), low, G.shape)
    torch.testing.assert_close(phi, torch.tensor([[0.345380, 0.479970, 0.745150]]), atol=1e-5, rtol=0)
    rest = G - back(low, p, G.shape)
    assert float((p.t() @ rest).abs().max()) < 1e-6 and float((phi * rest).norm()) == pytest.approx(1.251290, abs=1e-5)
    w = nn.Parameter(torch.zeros(2, 3))
    wanted = torch.tensor([[1.036139, 0.479970, 0], [0.345380, 0.959940, 1.490301]])
    torch.testing.assert_close(moved(optimizer(w), w, G), wanted, atol=2e-5, rtol=0)
    w = nn.Parameter(torch.zeros(3, 2))
    torch.testing.assert_close(moved(optimizer(w), w, G.t()), wanted.t(), atol=2e-5, rtol=0)


def test_the_scale_multiplies_the_whole_update():
    torch.manual_seed(0)
    gradients = [torch.randn(6, 9) for _ in range(3)]
    p, q = nn.Parameter(torch.zeros(6, 9)), nn.Parameter(torch.zeros(6, 9))
    one, quarter = optimizer(p, 2), optimizer(q, 2, scale=0.25)
    for g in gradients:
        torch.testing.assert_close(0.25 * moved(one, p, g), moved(quarter, q, g), atol=1e-6, rtol=1e-5)


def rest_norm(previous: float | None, raw: float, gamma=1.01) -> float:
    """Norm of the rest that an optimizer with this memory lets through when its own would be ``raw``."""
    p = nn.Parameter(torch.zeros(4, 6))
    opt = optimizer(p, 1, gamma=gamma, by="matrix")
    torch.manual_seed(0)
    g = torch.randn(4, 6)
    moved(opt, p, g)
    state = opt.state[p]
    first = float(state["rest"])
    if previous is None:
        return first
    # The first step of Adam again, with the rest's memory set so that the ratio is the one that is asked for.
    memory = torch.tensor(first * previous / raw)
    state.clear()
    opt.collect(p, g)
    state["rest"] = memory
    opt.step()
    return float(state["rest"]) / first * raw


def test_growth_is_limited_and_nothing_else():
    assert rest_norm(1.0, 2.0) == pytest.approx(1.01, rel=1e-4)
    assert rest_norm(1.0, 1.005) == pytest.approx(1.005, rel=1e-4)
    assert rest_norm(1.0, 0.1) == pytest.approx(0.1, rel=1e-4)
    assert rest_norm(1.0, 2.0, gamma=1.5) == pytest.approx(1.5, rel=1e-4)


def test_over_many_steps_the_rest_grows_by_one_percent_at_most():
    torch.manual_seed(1)
    p = nn.Parameter(torch.zeros(8, 12))
    opt, norms = optimizer(p, 2, lr=0.01), []
    for step in range(30):
        moved(opt, p, torch.randn(8, 12) * (1 + step % 5))
        norms.append(float(opt.state[p]["rest"]))
    growth = [b / a for a, b in zip(norms, norms[1:])]
    assert max(growth) <= 1.0101 and min(growth) < 0.99 and sum(g > 1.0099 for g in growth) > 3


def test_the_whole_subspace_leaves_no_rest():
    torch.manual_seed(2)
    p, q = nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(5, 7))
    ours, galore = optimizer(p, 5), optimizer(q, 5, kind=Projected, early=False)
    for _ in range(3):
        g = torch.randn(5, 7)
        torch.testing.assert_close(moved(ours, p, g), moved(galore, q, g), atol=1e-4, rtol=1e-4)
    assert float(ours.state[p]["rest"]) < 1e-4


def test_state_forecast_and_layer_map():
    model = micro.model("llama")
    method, context = registry.build({"method": "fira", "rank": 4}), micro.context(model, "llama")
    t = Trainer(method.apply(model, context), method, context, TrainSettings(lr=5e-3, batch=8, length=micro.LENGTH), Limit(steps=3))
    t._step()
    p = t.optimizer.param_groups[0]["params"][0]
    assert t.optimizer.state[p]["exp_avg"].numel() + t.optimizer.state[p]["exp_avg_sq"].numel() == 2 * 4 * max(p.shape)
    held = sum(v.numel() * v.element_size() for s in t.optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and k not in ("rest", "share"))
    said = method.footprint(context.profile, Batch(2, 24))
    assert said.optimizer == held and said.gradients == 4 * context.profile.parameters
    figures = method.layers(model, context)
    assert len(figures["residual"]) == len(figures["captured"]) == 14 and all(0 < value < 1 for *_, value in figures["residual"])
    method.finish(model, context)
    assert method.layers(model, context) == figures and not any("residual" in p.__dict__ for p in model.parameters())


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="fira.rank = 33: .* Choose at most 32"):
        registry.build({"method": "fira", "rank": 33}).check(profile)


def test_activations_and_gradients_are_not_counted_twice():
    """The worst moment is the beginning of the backward pass (activations, casts, the head's gradient) or its end (all gradients)."""
    profile, batch = profile_of(micro.model("llama"), "micro", "causal-lm"), Batch(2, 24, compute="bfloat16")
    full = registry.build({"method": "full"}).footprint(profile, batch)
    for method in ("fira", "galore"):
        said = registry.build({"method": method, "rank": 4}).footprint(profile, batch)
        rest = said.weights + said.optimizer + said.logits + said.extra
        casts, head = 2 * sum(m.size for m in profile.matrices), 4 * profile.vocab * profile.hidden
        assert said.peak == rest + max(full.activations + casts + head, said.gradients), method
    plain = registry.build({"method": "fira", "rank": 4}).footprint(profile, Batch(64, 24))
    assert plain.peak == plain.weights + plain.optimizer + plain.logits + plain.extra + head + registry.build(
        {"method": "full"}).footprint(profile, Batch(64, 24)).activations

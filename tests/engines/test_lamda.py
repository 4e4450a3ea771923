"""LaMDA: the spectral start, the freezing schedule under AdamW, what is kept for the backward pass, LaMDA++."""

import types

import pytest
import torch
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.lamda import LamDa, energy
from engines.models import profile_of
from engines.optimizers.freezing import FreezingAdamW, FreezingSGD, freeze
from engines.profile import Matrix
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro


def made(out=12, inp=20, rank=3, start="svd", scale=0.25):
    torch.manual_seed(0)
    return LamDa(nn.Linear(inp, out).requires_grad_(False), rank, scale, start, torch.Generator().manual_seed(0))


def method(**fields):
    return registry.build({"method": "lamda", **fields})


def test_start_is_the_spectral_split():
    layer = made()
    assert torch.equal(layer.effective(), layer.weight)
    main = layer.scale * layer.up @ layer.core @ layer.down
    values = torch.linalg.svdvals(layer.weight)
    torch.testing.assert_close(torch.linalg.svdvals(main)[:3], values[:3])
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight - main)[:9], values[3:], atol=1e-6, rtol=1e-5)
    residual = layer.weight - main.detach()
    layer.core.data += torch.randn(3, 3)
    layer.up.data += torch.randn(12, 3)
    torch.testing.assert_close(layer.effective(), residual + layer.scale * layer.up @ layer.core @ layer.down)
    assert torch.equal(made(start="random").effective(), layer.weight)


def test_schedule():
    m, steps = method(freeze_share=0.3), (0, 1, 4, 15, 29, 30, 60)
    assert [m.columns(8, t / 100) for t in steps] == [0, 0, 1, 4, 7, 8, 8]
    assert [method(freeze_share=0.1).columns(3, t / 30) for t in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("rank", [3, 12])
def test_gradients(rank):
    layer = made(rank=rank)
    for p in (layer.up, layer.core):
        p.data += torch.randn(p.shape)
    x, upstream = torch.randn(5, 20, requires_grad=True), torch.randn(5, 12)
    (layer(x) * upstream).sum().backward()
    found = x.grad.clone(), layer.up.grad.clone(), layer.core.grad.clone()
    x.grad = layer.up.grad = layer.core.grad = None
    (nn.functional.linear(x, layer.effective(), layer.bias) * upstream).sum().backward()
    torch.testing.assert_close(found, (x.grad, layer.up.grad, layer.core.grad), atol=1e-4, rtol=1e-4)


def test_only_the_thin_product_is_kept():
    layer, kept = made(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(7, 20, requires_grad=True) * 1.0)
    assert (7, 3) in kept and not [s for s in kept if s[0] == 7 and s[-1] > 3]


def test_with_a_fixed_square_and_a_random_input_projection_it_is_lora_fa():
    layer = made(start="random", scale=1.0)
    layer.core.data = torch.eye(3)
    layer.core.requires_grad_(False)
    b, rate, x, target = torch.zeros(12, 3), 0.1, torch.randn(6, 20), torch.randn(6, 12)
    for _ in range(3):
        layer.up.grad = None
        (layer(x) - target).square().sum().backward()
        layer.up.data -= rate * layer.up.grad
        y = nn.functional.linear(x, layer.weight + b @ layer.down, layer.bias)
        b = b - rate * (2 * (y - target)).t() @ (x @ layer.down.t())
    torch.testing.assert_close(layer.up.data, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind, more", [(FreezingAdamW, {}), (FreezingSGD, {"momentum": 0.9})])
def test_frozen_columns_do_not_move(kind, more):
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = kind([p], lr=0.1, weight_decay=0.5, **more)

    def step():
        p.grad = torch.ones(4, 3)
        optimizer.step()
    step()
    freeze(p, 1)
    before = p.detach().clone()
    step()
    assert torch.equal(p[:, :1], before[:, :1]) and not torch.equal(p[:, 1:], before[:, 1:])
    freeze(p, 3)
    before = p.detach().clone()
    step()
    assert torch.equal(p, before) and p not in optimizer.state


def test_training_freezes_for_good_and_leaves_the_squares():
    model = micro.model("llama")
    context, m = micro.context(model, "llama"), method(rank=4, freeze_share=0.5)
    model = m.apply(model, context)
    settings = TrainSettings(lr=1e-2, batch=4, length=micro.LENGTH, weight_decay=0.1, items=0)
    trainer = Trainer(model, m, context, settings, Limit(steps=8))
    layer = next(x for x in model.modules() if isinstance(x, LamDa))
    history, moved = [], m.after_step

    def after(model, context):
        history.append((context.progress, layer.up.detach().clone(), layer.core.detach().clone(), layer.up.grad is None))
        moved(model, context)
    object.__setattr__(m, "after_step", after)
    trainer.run()
    for (_, old, core, _), (progress, new, changed, none) in zip(history, history[1:]):
        frozen = m.columns(4, progress)
        assert torch.equal(old[:, :frozen], new[:, :frozen]) and not torch.equal(core, changed)
        if frozen < 4:
            assert (old[:, frozen:] != new[:, frozen:]).any()
        assert none == (frozen == 4)
    with_state = [p for p in trainer.optimizer.state if trainer.optimizer.state[p]]
    assert sum(p.numel() for p in with_state) == 16 * len(context.profile.matrices), "rank squared numbers of each matrix remain"
    assert any("are frozen" in line for line in context.reporter.lines)


def test_energy_is_low_for_a_flat_spectrum():
    assert energy(torch.tensor([2.0, 2, 2, 2, 1]), 2) == pytest.approx(0.5)
    assert energy(torch.tensor([4.0, 3, 0, 0, 5]), 2) == 1.0
    assert energy(torch.zeros(4), 2) == 1.0


def test_ranks_by_energy_keep_their_mean_and_flat_matrices_get_more():
    model = micro.model("gpt2", n_layer=3)
    context, m = micro.context(model, "gpt2"), method(rank=8, ranks="energy", targets="c_attn")
    weights = [p for n, p in model.named_parameters() if n.endswith("c_attn.weight")]
    for p, power in zip(weights, (0.0, 1.0, 2.0)):
        u, s, v = torch.linalg.svd(p.detach(), full_matrices=False)
        p.data = u @ torch.diag(torch.arange(1, 65) ** -power) @ v
    model = m.apply(model, context)
    ranks = [layer.rank for layer in model.modules() if isinstance(layer, LamDa)]
    assert ranks == [16, 4, 4] and sum(ranks) == 3 * 8
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == m.trained(context.profile)


def test_spread():
    wide, m = Matrix("m", 0, "m", 64, 64, False), method(rank=8, ranks="energy")
    for number in range(1, 13):
        assert sum(m.spread(wide, number, 8)) == 8 * number
    assert m.spread(wide, 7, 8) == [16, 16, 8, 4, 4, 4, 4]
    assert m.spread(Matrix("m", 0, "m", 12, 64, False), 3, 8) == [8, 8, 8], "no room for twice the rank"
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="lamda.rank = 7: .* Choose 8"):
        method(rank=7, ranks="energy").check(profile)
    chosen, _ = method(rank="auto", ranks="energy").fit(profile, Budget(trainable=m.trained(profile, 6)))
    assert chosen.rank == 6


def test_optimizer_follows_the_settings():
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))]}]
    context = types.SimpleNamespace(task="causal-lm")
    assert isinstance(method().optimizer(groups, TrainSettings(optimizer="sgd"), context), FreezingSGD)
    assert isinstance(method().optimizer(groups, TrainSettings(), context), FreezingAdamW)


def test_pruned_weights_start_at_the_model_in_half_precision():
    torch.manual_seed(0)
    base, mask = nn.Linear(20, 12, bias=False).requires_grad_(False), torch.rand(12, 20) > 0.3
    base.weight.data = (base.weight.data * mask * 20).bfloat16()
    layer, x = LamDa(base, 3, 0.25, mask=mask), torch.randn(40, 20)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), base(x), atol=0, rtol=0)

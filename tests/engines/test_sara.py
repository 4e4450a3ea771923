"""SaRA against the worked example and dense autograd, and what two choices may break."""

import pytest
import torch
from torch import nn

from engines import models, registry
from engines.adaptation._adapter import adapters
from engines.errors import InputError
from engines.layers.sara import Smallest, nuclear
from engines.models import profile_of
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro

W = torch.tensor([[0.001, -0.5], [0.3, -0.0005]])


def running(architecture="llama", steps=6, precision="fp32", masks=None, sizes=None, lr=1e-2, **settings):
    model, m = micro.model(architecture, **(sizes or {})), registry.build({"method": "sara", **settings})
    context = micro.context(model, architecture)
    context.total_steps, context.compute, context.masks = steps, "bfloat16" if precision == "bf16" else "float32", masks or {}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = m.apply(model, context)
    trainer = Trainer(model, m, context, TrainSettings(lr=lr, batch=8, length=micro.LENGTH, evaluations=1, items=0, warmup=0.0,
                                                       precision=precision, weight_decay=0.0), Limit(steps=steps))
    return trainer, model.train(), before


def step(trainer):
    trainer.context.progress = trainer.progress()
    trainer._step()


def test_nuclear_norm_of_two_by_two():
    index = (W.abs() < 2e-3).reshape(-1).nonzero().flatten()
    assert index.tolist() == [0, 3]
    norm, slope = nuclear(W, index, W.reshape(-1)[index])
    assert float(norm) == pytest.approx(0.0015)
    torch.testing.assert_close(slope, torch.tensor([1.0, -1.0]))


def test_the_subgradient_is_that_of_autograd():
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    index = (weight.abs() < 0.8).reshape(-1).nonzero().flatten()
    values = weight.reshape(-1)[index].clone().requires_grad_(True)
    torch.linalg.matrix_norm(torch.zeros(30).index_copy(0, index, values).view(6, 5), "nuc").backward()
    torch.testing.assert_close(nuclear(weight, index, values.detach())[1], values.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradient_is_the_dense_one_at_the_chosen_entries(kind):
    from transformers.pytorch_utils import Conv1D
    torch.manual_seed(0)
    base = nn.Linear(5, 4) if kind == "linear" else Conv1D(4, 5)
    x, dense = torch.randn(2, 3, 5, requires_grad=True), base.weight.detach().clone().requires_grad_(True)
    other = x.detach().clone().requires_grad_(True)
    index = (base.weight.abs() < 0.15).reshape(-1).nonzero().flatten()
    wanted = base(x)
    layer = Smallest(base.requires_grad_(False), index)
    assert torch.equal(layer(x), wanted)
    layer(x).square().sum().backward()
    (nn.functional.linear(other, dense if kind == "linear" else dense.t()) + base.bias).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, dense.grad.reshape(-1)[index], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.values.add_(1.0)
    flat = dense.detach().reshape(-1).clone()
    flat[index] += 1.0
    flat = flat.view(dense.shape)
    torch.testing.assert_close(layer.effective(), flat if kind == "linear" else flat.t())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, flat if kind == "linear" else flat.t(), base.bias))


@pytest.mark.parametrize("architecture", micro.ARCHITECTURES)
def test_starts_at_the_model_bit_for_bit(architecture):
    trainer, model, _ = running(architecture)
    assert torch.equal(micro.logits(model, architecture), micro.logits(micro.model(architecture), architecture))
    layers = [layer for _, layer in adapters(model)]
    total = sum(layer.weight.numel() for layer in layers)
    assert sum(layer.values.numel() for layer in layers) == round(0.1 * total)
    chosen = torch.cat([layer.values.abs() for layer in layers]).max()
    rest = torch.cat([layer.base.weight.reshape(-1)[~torch.isin(torch.arange(layer.weight.numel()), layer.index)].abs() for layer in layers])
    assert chosen <= rest.min(), "the smallest of all matrices together"


@pytest.mark.parametrize("count", [1, 40, 77, 200])
def test_the_smallest_of_all_are_those_of_a_stable_sort(count):
    from engines.adaptation.sara import smallest
    values = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0)).float()
    values[::7] = float("inf")
    order = values.argsort(stable=True)[:count]
    mask, bound = smallest(values, count)
    assert torch.equal(mask.nonzero().flatten(), order.sort().values) and bound == float(values[order[-1]])


def test_the_threshold_of_the_paper():
    trainer, model, before = running(threshold=2e-3, share=1.0)
    for name, layer in adapters(model):
        small = (before[f"{name}.weight"].abs() < 2e-3).reshape(-1)
        assert torch.equal(layer.index, small.nonzero().flatten())
    assert sum(p.numel() for p in trainer.parameters) < trainer.method.trained(trainer.context.profile)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_entries_outside_stay_bit_for_bit_and_the_second_choice_shrinks(precision):
    trainer, model, before = running(precision=precision, steps=8, lr=3e-2)
    layers = dict(adapters(model))
    first = {n: layer.index.clone() for n, layer in layers.items()}
    threshold = trainer.context.state["threshold"]
    while not trainer._over():
        if trainer.context.step == 4:
            held = {n: layer.values.detach().clone() for n, layer in layers.items()}
        step(trainer)
        if trainer.context.step == 4:
            assert "second" not in trainer.context.state
        if trainer.context.step == 5:
            for n, layer in layers.items():
                small = held[n].abs() < threshold
                assert torch.equal(layer.index, first[n][small]) and torch.equal(layer.settled, held[n][~small])
                assert layer.values.numel() == int(small.sum()) < len(first[n])
                state = trainer.optimizer.state[layer.values]
                assert sum(v.numel() for k, v in state.items() if k != "step") == 2 * layer.values.numel()
                assert float(state["step"]) == 1
    values = {n: layer.values.detach().clone() for n, layer in layers.items()}
    used = micro.logits(model, "llama")
    merged = trainer.method.finish(model, trainer.context)
    if precision == "fp32":
        torch.testing.assert_close(micro.logits(merged, "llama"), used)
    for name, layer in layers.items():
        old, new = before[f"{name}.weight"].reshape(-1), merged.get_submodule(name).weight.reshape(-1)
        outside = torch.ones(len(old), dtype=torch.bool)
        outside[first[name]] = False
        assert torch.equal(old[outside], new[outside]), name
        assert torch.equal(new[layer.index], values[name]) and torch.equal(new[layer.settled_index], layer.settled)
    assert not torch.equal(torch.cat([before[f"{n}.weight"].reshape(-1)[first[n]] for n in layers]),
                           torch.cat([merged.get_submodule(n).weight.reshape(-1)[first[n]] for n in layers]))


def test_weight_decay_reaches_the_vectors_before_and_after_the_second_choice():
    trainer, model, _ = running(steps=4, nuclear=0.0, lr=1e-2)
    groups = trainer._decayed([{"params": [layer.values for _, layer in adapters(model)] + [nn.Parameter(torch.zeros(3))], "weight_decay": 0.1}])
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(len(adapters(model)), 0.1), (1, 0.0)]
    for _ in range(4):
        step(trainer)
    assert "second" in trainer.context.state and all(layer.values.decays for _, layer in adapters(model))


def test_the_entries_that_are_chosen_contribute_next_to_nothing():
    """The paper's observation, on the bundled model: its smallest tenth set to zero changes the loss by less than a hundredth."""
    from engines import data as datasets
    from engines.data.tokens import TaskData
    from engines.training.loss import task_loss
    loaded = models.load("stdlib-lm", dtype="float32")
    data = TaskData(datasets.load("python-docs", task="causal-lm"), loaded.tokenizer, length=128, seed=0, items=8)
    context = micro.context(loaded.model, "llama")
    model = registry.build({"method": "sara", "share": 0.1}).apply(loaded.model, context).eval()
    batch, losses = data.batch(0, 4)[0], []
    with torch.no_grad():
        losses.append(float(task_loss(model, batch, "causal-lm")))
        for _, layer in adapters(model):
            layer.values.zero_()
        losses.append(float(task_loss(model, batch, "causal-lm")))
        for _, layer in adapters(model):      # as many others, drawn
            flat = layer.base.weight.data.view(-1)
            flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:len(layer.index)]] = 0.0
        losses.append(float(task_loss(model, batch, "causal-lm")))
    assert abs(losses[1] / losses[0] - 1) < 0.01 < losses[2] / losses[0] - 1


def test_the_nuclear_norm_acts_on_one_wide_matrix_in_each_step():
    slopes = []
    for weight in (0.0, 1.0):
        trainer, model, _ = running(sizes=dict(hidden_size=96, intermediate_size=192), nuclear=weight, share=0.3)
        for batch in trainer._batches():
            from engines.training.loss import task_loss
            task_loss(model, batch, "causal-lm").backward()
        trainer.method.after_backward(model, trainer.context)
        slopes.append({n: layer.values.grad.clone() for n, layer in adapters(model)})
    changed = [n for n in slopes[0] if not torch.equal(slopes[0][n], slopes[1][n])]
    assert len(changed) == 1
    layer = dict(adapters(model))[changed[0]]
    torch.testing.assert_close(slopes[1][changed[0]] - slopes[0][changed[0]], nuclear(layer.base.weight, layer.index, layer.values.detach())[1],
                               atol=1e-4, rtol=1e-3)
    trainer, model, _ = running(nuclear=1.0)       # hidden 64: no side above 64
    trainer.method.after_backward(model, trainer.context)
    assert all(layer.values.grad is None for _, layer in adapters(model))


def test_pruned_zeros_are_not_chosen():
    plain = micro.model("gpt2")
    masks = {f"{m.name}.weight": torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(i)) > 0.5
             for i, (m, module) in enumerate(models.matrices(plain))}
    model, m = micro.model("gpt2"), registry.build({"method": "sara"})
    for name, mask in masks.items():
        dict(model.named_parameters())[name].data.mul_(mask)
    context = micro.context(model, "gpt2")
    context.masks = masks
    model = m.apply(model, context)
    for name, layer in adapters(model):
        assert masks[f"{name}.weight"].reshape(-1)[layer.index].all()
        with torch.no_grad():
            layer.values.add_(1.0)
    merged = m.finish(model, context)
    assert all((dict(merged.named_parameters())[n][~mask] == 0).all() for n, mask in masks.items())


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="sara.share = 1.5"):
        registry.build({"method": "sara", "share": 1.5})
    with pytest.raises(InputError, match="targets = 'nowhere'"):
        registry.build({"method": "sara", "targets": "nowhere"}).check(profile)
    with pytest.raises(InputError, match="sara.threshold = 1e-12: no entry is smaller.* Raise it"):
        running(threshold=1e-12)

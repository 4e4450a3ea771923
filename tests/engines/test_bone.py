"""Bone against worked examples and against peft's layers."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers import bone
from engines.models import profile_of
from tests.contract import micro


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer.requires_grad_(False)


def test_bat_on_two_by_two():
    layer = bone.Bat(linear([[1, 2], [3, 4]]), 2)
    layer.blocks.data = torch.tensor([[[0.1, 0.0], [0.0, 0.2]]])
    torch.testing.assert_close(layer.effective(), torch.tensor([[1.2, 2.4], [3.3, 5.0]]))


def test_bat_guides_by_the_weights_and_may_exceed_the_rank():
    torch.manual_seed(0)
    base = nn.Linear(6, 4, bias=False).requires_grad_(False)
    layer = bone.Bat(base, 2)
    assert layer.blocks.numel() == 2 * 4
    nn.init.normal_(layer.blocks)
    new = layer.effective()
    for o in range(2):
        for i in range(3):
            w = base.weight[2 * o:2 * o + 2, 2 * i:2 * i + 2]
            torch.testing.assert_close(new[2 * o:2 * o + 2, 2 * i:2 * i + 2], w + w @ layer.blocks[o] + layer.blocks[o])
    assert torch.linalg.matrix_rank(new - base.weight) > 2


def test_miss_repeats_rows_over_columns():
    layer = bone.Miss(linear([[0] * 5] * 2), 2)
    layer.blocks.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(layer.effective(), torch.tensor([[1.0, 3, 1, 3, 1], [2, 4, 2, 4, 2]]))


@pytest.mark.parametrize("form, kind", [("bat", "bat"), ("miss", True)])
def test_equals_peft(form, kind):
    from peft import MissConfig, get_peft_model
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8))
    ours = (bone.Bat if form == "bat" else bone.Miss)(model[0], 4)
    theirs = get_peft_model(nn.Sequential(model[0]), MissConfig(r=4, init_weights=kind, target_modules=["0"]))
    weights = next(p for n, p in theirs.named_parameters() if "miss_block" in n)
    nn.init.normal_(ours.blocks, std=0.1)
    assert weights.numel() == ours.blocks.numel()
    weights.data = ours.blocks.detach().reshape(weights.shape).clone()
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_a_side_that_is_not_divided_is_refused():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="bone.rank = 24: it does not divide .* Choose .*32"):
        registry.build({"method": "bone", "rank": 24}).check(profile)
    registry.build({"method": "bone", "rank": 24, "form": "miss"}).check(profile)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_bat_are_those_of_autograd(masked):
    torch.manual_seed(2)
    mask = torch.rand(4, 6) > 0.4 if masked else None
    layer = bone.Bat(nn.Linear(6, 4).requires_grad_(False), 2, mask=mask)
    nn.init.normal_(layer.blocks)
    x, upstream = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(ours) * upstream).sum().backward()
    found, layer.blocks.grad = layer.blocks.grad, None
    (nn.functional.linear(plain, layer.masked(), layer.bias) * upstream).sum().backward()
    torch.testing.assert_close((found, ours.grad), (layer.blocks.grad, plain.grad), atol=1e-5, rtol=1e-5)


def kept(layer, x):
    """What one pass keeps for its backward pass."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        layer(x)
    return found


def test_bat_keeps_its_input_and_not_its_matrix_and_miss_keeps_the_sum_of_shards():
    x = torch.randn(7, 12)
    layer = bone.Bat(nn.Linear(12, 8).requires_grad_(False), 4)
    assert {t.data_ptr() for t in kept(layer, x)} == {t.data_ptr() for t in (x, layer.weight, layer.blocks)}
    layer = bone.Miss(nn.Linear(12, 8).requires_grad_(False), 4)
    found = kept(layer, x)
    assert x.data_ptr() not in {t.data_ptr() for t in found}
    shards = next(t for t in found if t.shape == (7, 4))
    torch.testing.assert_close(shards, x.view(7, 3, 4).sum(1))


def test_no_block_is_chosen_that_the_check_refuses():
    """The keys of this model have 32 outputs, their inputs 64: more than 32 rows would train what no update can use."""
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    for form in ("bat", "miss"):
        chosen, _ = registry.build({"method": "bone", "rank": "auto", "form": form}).fit(profile, Budget(trainable=10**6))
        assert chosen.rank == 32


def test_forecasts():
    from engines.profile import Batch
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    bat, miss, lora = (registry.build(s).footprint(profile, Batch(rows=8, length=24)) for s in (
        {"method": "bone"}, {"method": "bone", "form": "miss"}, {"method": "lora", "rank": 8}))
    assert miss.activations < lora.activations <= bat.activations + 8 * 24 * 4 * 8 * len(profile.matrices)
    assert bat.flops_per_token > lora.flops_per_token > miss.flops_per_token

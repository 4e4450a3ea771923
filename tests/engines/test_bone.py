"""Bone against worked examples and against peft's layers."""

import pytest
import torch
from torch import nn

from engines import registry
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

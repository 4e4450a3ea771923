"""LoLDU against worked examples."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.layers.loldu import EXACT, STARTS, LoLdu, ldu
from engines.models import profile_of
from tests.contract import micro


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer.requires_grad_(False)


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, rtol=1e-6)


def residual(layer):
    return layer.weight - layer.b @ torch.diag(layer.start) @ layer.a


def test_worked_factorisation():
    lower, d, upper = ldu(torch.tensor([[4.0, 3], [6, 3]]))
    close(lower, [[2 / 3, 1.0], [1, 0]])
    close(d, [6.0, 1])
    close(upper, [[1, 0.5], [0, 1]])


def test_worked_example_of_rank_one():
    layer = LoLdu(linear([[4, 3], [6, 3]]), 1, 1.0)
    close(residual(layer), [[0, 1], [0, 0]])
    close(layer.effective(), [[4, 3], [6, 3]], atol=0)
    layer.z.data.fill_(12)
    close(layer.effective(), [[8, 5], [12, 6]])


def test_worked_example_of_full_rank():
    layer = LoLdu(linear([[4, 3], [6, 3]]), 2, 0.5)
    close(residual(layer), [[2, 1.5], [3, 1.5]])
    layer = LoLdu(linear([[4, 3], [6, 3]]), 2, 1.0)
    close(residual(layer), [[0.0, 0], [0, 0]])


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_factors_are_triangles_and_give_the_matrix(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    lower, d, upper = ldu(weight)
    torch.testing.assert_close(lower @ torch.diag(d) @ upper, weight.double(), atol=1e-12, rtol=1e-12)
    k = min(shape)
    assert (torch.diagonal(upper) == 1).all() and (upper.tril(-1) == 0).all()
    order = torch.linalg.lu(weight.double())[0].argmax(dim=0)
    assert torch.equal(lower[order].triu(1), torch.zeros_like(lower)) and (torch.diagonal(lower[order])[:k] == 1).all()


@pytest.mark.parametrize("start", STARTS)
def test_starts(start):
    torch.manual_seed(0)
    base = nn.Linear(9, 6).requires_grad_(False)
    layer = LoLdu(base, 2, 0.5, start, generator=torch.Generator().manual_seed(1))
    pivots = ldu(base.weight)[1][:2].float()
    same = torch.equal(layer.effective(), base.weight)
    assert same == (start in EXACT)
    z = layer.z.detach()
    if start == "constant":
        close(z, [float(pivots.mean())] * 2)
    elif start == "uniform":
        assert (z.abs() <= pivots.mean().abs() / 2).all() and not torch.equal(z, pivots)
    elif start == "lu":
        close(z, pivots)
    elif start == "ones":
        wanted = residual(layer) + 0.5 * layer.b @ layer.a
        close(layer.effective().detach(), wanted)
    assert registry.build({"method": "loldu", "start": start}).identity == same


def test_dead_pivots_stay_finite_and_start_at_the_model():
    weight = torch.randn(6, 6)
    weight[:, 2] = 0
    weight[4] = weight[1]
    base = nn.Linear(6, 6).requires_grad_(False)
    for pruned in (weight, torch.zeros(6, 6)):
        base.weight.data = pruned.clone()
        layer = LoLdu(base, 6, 1 / 6)
        assert torch.isfinite(layer.a).all() and layer.a.abs().max() < 1e6
        assert torch.equal(layer.effective(), base.weight)


@pytest.mark.parametrize("rank", [2, 6])
def test_forward_and_gradients_are_those_of_the_changed_weight(rank):
    torch.manual_seed(2)
    base = nn.Linear(9, 6).requires_grad_(False)
    layer = LoLdu(base, rank, 0.5)
    layer.z.data += torch.randn(rank)
    layer.sigma.data += 0.1
    x, upstream = torch.randn(5, 9), torch.randn(5, 6)
    (layer(x) * upstream).sum().backward()
    found = layer.z.grad.clone(), layer.sigma.grad.clone()
    layer.z.grad = layer.sigma.grad = None
    whole = residual(layer) + layer.sigma * (layer.b @ torch.diag(layer.z) @ layer.a)
    (nn.functional.linear(x, whole, base.bias) * upstream).sum().backward()
    torch.testing.assert_close(found, (layer.z.grad, layer.sigma.grad), atol=1e-4, rtol=1e-4)


def test_counts_with_and_without_the_scale():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    matrices = len(profile.matrices)
    with_scale = registry.build({"method": "loldu", "rank": 1})
    assert with_scale.trained(profile) == 2 * matrices
    assert with_scale.replace(train_scale=False).trained(profile) == matrices
    some, _ = registry.build({"method": "loldu", "rank": "auto"}).fit(profile, Budget(trainable=5 * matrices))
    assert some.rank == 4
    layer = LoLdu(nn.Linear(8, 8).requires_grad_(False), 8, 1 / 8, train_scale=False)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["z"]

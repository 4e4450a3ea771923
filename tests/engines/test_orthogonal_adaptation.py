"""Orthogonal Adaptation: shared columns, no crosstalk where they are disjoint, frozen input side."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.errors import InputError
from engines.layers.orthogonal import Orthogonal, basis
from engines.models import profile_of
from engines.training.loop import Limit
from engines.training.stage import train
from tests.contract import micro
from tests.contract.trial import settings

HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def method(**changes):
    return registry.build({"method": "orthogonal-adaptation", **changes})


def adapters(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Orthogonal)}


def applied(**changes):
    model, seed, data = micro.model("llama"), changes.pop("seed", 0), changes.pop("data", None)
    context = micro.context(model, "llama", seed=seed)
    context.data = data or context.data
    return method(**changes).apply(model, context), context


@pytest.mark.parametrize("second, free", [((2, 3), True), ((1, 2), False)])
def test_inputs_of_one_adapter_do_not_feel_another(second, free):
    torch.manual_seed(0)
    base = nn.Linear(4, 3, bias=False).requires_grad_(False)
    first, other = Orthogonal(base, HADAMARD[:, [0, 1]].t()), Orthogonal(base, HADAMARD[:, list(second)].t())
    for layer in (first, other):
        nn.init.normal_(layer.up)
    x = HADAMARD[:, [0, 1]] @ torch.tensor([1.0, 2.0])
    merged = base.weight + (first.effective() - base.weight) + (other.effective() - base.weight)
    assert torch.allclose(merged @ x, first(x), atol=1e-6) == free


@pytest.mark.parametrize("width, dense", [(64, 2048), (96, 32), (33, 8)])
def test_bases_are_orthonormal_and_need_no_other_columns(width, dense):
    whole = basis(width, torch.arange(width), "orthogonal", 5, dense).double()
    torch.testing.assert_close(whole.t() @ whole, torch.eye(width, dtype=torch.float64), atol=2e-6, rtol=0)
    some = torch.tensor([7, 0, width - 1])
    assert torch.equal(basis(width, some, "orthogonal", 5, dense).double(), whole[:, some])
    assert not torch.allclose(basis(width, some, "orthogonal", 6, dense).double(), whole[:, some])


def test_gaussian_columns_are_orthogonal_in_expectation_only():
    drawn = basis(256, torch.arange(40), "gaussian", 3)
    gram = drawn.t() @ drawn
    assert gram.diagonal().mean() == pytest.approx(1, abs=0.05)
    off = gram - torch.diag(gram.diagonal())
    assert 0.04 < float(off.pow(2).sum() / (40 * 39)) ** 0.5 < 0.09      # 1 / sqrt(256)


def test_columns_are_drawn_without_replacement_and_seldom_shared():
    model = micro.model("llama")
    matrix, context = profile_of(model, "micro", "causal-lm").matrices[0], micro.context(model, "llama")
    assert matrix.inp == 64
    shared, before, ours = [], set(), method(rank=4)
    for seed in range(400):
        context.seed = seed
        found = set(ours.columns(matrix, context, 4).tolist())
        assert len(found) == 4
        shared.append(len(found & before))
        before = found
    assert sum(shared) / len(shared) == pytest.approx(0.25, abs=0.08)      # rank squared over width


def test_other_data_takes_other_columns_at_the_same_seed():
    one, context = applied()
    again, _ = applied()
    other, _ = applied(data=micro.data("llama", 7))
    for name, layer in adapters(one).items():
        assert torch.equal(layer.a, adapters(again)[name].a)
        assert not torch.equal(layer.a, adapters(other)[name].a)


def test_numbers_leave_nothing_in_common_and_the_input_side_is_never_trained():
    first, _ = applied(adapter_number=1, rank=8)
    second, context = applied(adapter_number=8, rank=8)
    ours = adapters(second)
    before = {n: m.a.clone() for n, m in ours.items()}
    context.total_steps = 4
    train(second, method(), context, settings(method()), Limit(steps=4))
    for name, layer in ours.items():
        assert torch.equal(layer.a, before[name]) and layer.up.abs().max() > 0 and not layer.a.requires_grad
        assert (layer.a @ adapters(first)[name].a.t()).abs().max() < 1e-6


def test_deltas_add_up_in_any_order():
    torch.manual_seed(1)
    base = nn.Linear(64, 32)
    layers = [Orthogonal(base, basis(64, torch.arange(4) + 4 * i, "orthogonal", 0).t()) for i in range(3)]
    for layer in layers:
        nn.init.normal_(layer.up)
    deltas = [layer.up.double() @ layer.a.double() for layer in layers]
    torch.testing.assert_close(deltas[0] + deltas[1] + deltas[2], deltas[2] + deltas[0] + deltas[1], atol=1e-12, rtol=0)


def test_more_numbers_than_there_are_directions_are_refused():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="adapter_number = 9: .* 64 input directions, which make 8 adapters of rank 8"):
        method(adapter_number=9).check(profile)
    method(adapter_number=8).check(profile)

"""SpIEL: worked exchanges, moments of regrown entries, SM3, the schedule of windows, exact resume of all of it."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engines import registry
from engines.adaptation._adapter import adapters
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.spiel import SparseDelta, best_products, exchange
from engines.models import matrices, profile_of
from engines.optimizers.spiel import SM3, AgedAdamW
from engines.profile import Batch
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro


def method(**fields):
    return registry.build({"method": "spiel", **fields})


def profile(architecture="llama"):
    return profile_of(micro.model(architecture), "micro", micro.TASKS[architecture])


def layer_of(index, out=2, inp=3, mask=None):
    torch.manual_seed(0)
    return SparseDelta(nn.Linear(inp, out, bias=False).requires_grad_(False), torch.tensor(index), mask=mask)


G1, G2 = [.1, .9, .8, .05, .7, .2], [0, -.9, .1, 0, .3, .2]


def test_worked_exchange():
    """Six weights, four of them changed; the window saw two micro-batches of one step each."""
    layer = layer_of([0, 2, 3, 5])
    layer.values.data = torch.tensor([.5, .01, -.3, .02])
    layer.open()
    for i, g in enumerate((G1, G2)):
        layer.begin(True, fresh=i == 0)
        layer.observe(torch.tensor(g).view(2, 3))
        layer.settle(1)
    assert sorted(layer.candidates.tolist()) == [1, 2, 4, 5]
    sums = dict(zip(layer.candidates.tolist(), layer.sums.tolist()))
    assert sums == pytest.approx({1: 0.0, 2: 0.9, 4: 1.0, 5: 0.4})
    slots, places, seen = exchange(layer.index.long(), layer.values.detach(), layer.candidates.long(), layer.sums.abs(), 2)
    # 2 would both leave and come in, so only 5 gives way to 4.
    assert (slots.tolist(), places.tolist()) == ([3], [4])
    optimizer = AgedAdamW([layer.values], lr=1e-3)
    optimizer.renew(layer.values, slots, layer.sums[seen], layer.squares[seen], 2.0)
    state = optimizer.state[layer.values]
    assert state["age"].tolist() == [0, 0, 0, 2]
    assert state["exp_avg"][3] == pytest.approx(.095, rel=1e-5) and state["exp_avg_sq"][3] == pytest.approx(.00057971, rel=1e-4)


def test_the_first_exchange_replaces_all():
    index, candidates = torch.tensor([0, 1, 2]), torch.tensor([7, 2, 5])
    slots, places, _ = exchange(index, torch.tensor([.3, .2, .1]), candidates, torch.tensor([1., 2., 3.]), 3)
    assert slots.tolist() == [1, 0] and places.tolist() == [5, 7]      # 2 stays where it is


def test_sm3_and_its_growth():
    layer = layer_of([0, 3], 2, 2)      # places (0, 0) and (1, 1)
    optimizer = SM3([{"params": [layer.values], "pull": 0.0}], lr=0.5)
    layer.values.grad = torch.tensor([3.0, 1.0])
    optimizer.step()
    state = optimizer.state[layer.values]
    assert state["row"].tolist() == state["column"].tolist() == [9.0, 1.0]
    torch.testing.assert_close(layer.values.detach(), torch.tensor([-0.5, -0.5]))
    assert torch.outer(state["row"], state["column"]).tolist() == [[81.0, 9.0], [9.0, 1.0]]
    assert sorted(best_products(state["row"], state["column"], torch.tensor([0, 3]), 4).tolist()) == [1, 2]
    mask = torch.tensor([[True, False], [True, True]])
    assert best_products(state["row"], state["column"], torch.tensor([0, 3]), 4, mask).tolist() == [2]


def test_sm3_of_a_whole_matrix_bounds_each_entry():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = SM3([p], lr=1.0)
    p.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    optimizer.step()
    p.grad = torch.ones(2, 2)
    optimizer.step()
    # bounds min(9, 9), min(9, 1), min(1, 9), min(1, 1), each plus 1
    assert optimizer.state[p]["row"].tolist() == optimizer.state[p]["column"].tolist() == [10.0, 2.0]
    assert float(p.detach()[0, 1]) == pytest.approx(-1 / math.sqrt(2.0), rel=1e-5)


def test_aged_adam_is_adam_when_all_have_one_age():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    ours, theirs = AgedAdamW([a], lr=1e-2, eps=1e-12), torch.optim.AdamW([b], lr=1e-2, eps=1e-12, weight_decay=0.0)
    for _ in range(6):
        a.grad = torch.randn(5)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b)
    # An entry seeded with the moments of the same gradient moves like one that has seen it: by the rate, not by a jump.
    ours.renew(a, torch.tensor([0]), torch.tensor([0.4]), torch.tensor([0.08]), 2.0)
    a.data[0], a.grad = 0.0, torch.tensor([.2, 0, 0, 0, 0])
    ours.step()
    assert float(a.detach()[0]) == pytest.approx(-1e-2, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_gradients(masked):
    mask = torch.tensor([[True, True, False], [True, False, True]]) if masked else None
    layer = layer_of([0, 1, 5], mask=mask)
    x, upstream = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    layer.values.data = torch.tensor([.3, -.2, .5])
    (layer(x) * upstream).sum().backward()
    dense = layer.effective().detach().requires_grad_(True)
    got, x.grad = x.grad, None
    (F.linear(x, dense) * upstream).sum().backward()
    torch.testing.assert_close(got, x.grad)
    torch.testing.assert_close(layer.values.grad, dense.grad.view(-1)[[0, 1, 5]])


def trainer_of(m, architecture="llama", steps=12, **settings):
    model = micro.model(architecture)
    context = micro.context(model, architecture)
    context.total_steps = steps
    model = m.apply(model, context)
    return model, context, Trainer(model, m, context, TrainSettings(**{**dict(lr=1e-2, batch=8, length=24, warmup=0.0), **settings}), Limit(steps=steps))


def step(trainer):
    trainer.context.progress = trainer.progress()
    trainer._step()


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_entries_move_and_the_rest_is_the_base(growth):
    m = method(growth=growth, every=6, window=2, density=0.02)
    model, context, trainer = trainer_of(m)
    before = {name: layer.weight.clone() for name, layer in adapters(model)}
    last, moves = {name: layer.index.clone() for name, layer in adapters(model)}, []
    for i in range(12):
        step(trainer)
        moves.append(sum(int((layer.index != last[name]).sum()) for name, layer in adapters(model)))
        last = {name: layer.index.clone() for name, layer in adapters(model)}
        assert all(layer.index.unique().numel() == len(layer.values) for _, layer in adapters(model))
        if growth == "gradient":
            # windows: steps 1 to 2, then 6 to 8
            assert context.state["open"] == (i + 1 in (1, 5, 6, 7, 11, 12)), i
    # All at first, then a share that falls.
    assert [i + 1 for i, n in enumerate(moves) if n] == [2, 8] and moves[1] > 5 * moves[7] and context.state["exchanges"] == 2
    count = sum(len(layer.values) for _, layer in adapters(model))
    assert count == m.footprint(context.profile, Batch(8, 24)).trainable
    places = {name: (layer.index.long(), layer.values.detach().clone()) for name, layer in adapters(model)}
    model = m.finish(model, context)
    for name, (index, values) in places.items():
        wanted = before[name].reshape(-1).clone()
        wanted[index] += values
        assert torch.equal(model.get_submodule(name).weight.reshape(-1), wanted)


def test_windows_with_accumulation_see_the_same_gradients():
    sums = []
    for accumulation in (1, 4):
        m = method(every=10, window=5, density=0.02)
        model, context, trainer = trainer_of(m, accumulation=accumulation)
        # The same candidates for both, so that only the sums are compared.
        for _, layer in adapters(model):
            layer.candidates.copy_(torch.arange(len(layer.values)))
        context.state["fresh"] = False
        step(trainer)
        assert context.state["counted"] == accumulation
        sums.append(torch.cat([layer.sums for _, layer in adapters(model)]) / accumulation)
    torch.testing.assert_close(*sums, atol=2e-5, rtol=1e-3)


def test_the_shares_that_are_exchanged():
    def at(progress, exchanges, **fields):
        return method(**fields).share_now(types.SimpleNamespace(progress=progress, state=dict(exchanges=exchanges)))
    assert at(0.1, 0) == 1.0 and at(0.5, 1) == pytest.approx(0.1) and at(1.0, 3) == pytest.approx(0.0)
    assert at(0.5, 1, policy="cosine") == pytest.approx(0.1) and at(0.25, 1, policy="cosine") > at(0.25, 1)


def test_a_short_stage_has_its_first_exchange():
    m = method(density=0.02)
    _, context, trainer = trainer_of(m, steps=4)
    for _ in range(4):
        step(trainer)
    assert context.state["exchanges"] == 1


def test_pruned_places_stay_zero():
    model = micro.model("gpt2")
    context = micro.context(model, "gpt2")
    for matrix, module in matrices(model):
        keep = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
        context.masks[f"{matrix.name}.weight"] = keep
        module.weight.data *= keep
    m = method(density=0.05, every=4, window=2)
    model = m.apply(model, context)
    trainer = Trainer(model, m, context, TrainSettings(lr=1e-2, batch=8, length=24), Limit(steps=5))
    for _ in range(5):
        step(trainer)
    for _, layer in adapters(model):
        assert layer.mask.reshape(-1)[layer.index.long()].all()
    model = m.finish(model, context)
    weights = dict(model.named_parameters())
    assert all((weights[n][~keep] == 0).all() for n, keep in context.masks.items())


def test_budget_and_refusals():
    p = profile()
    chosen, reasons = method(density="auto").fit(p, Budget(trainable=777))
    assert 777 - len(p.matrices) <= chosen.trained(p) <= 777 and "777" in reasons["density"]
    with pytest.raises(InputError, match="budget.trainable = 3: .* less than one for each"):
        method(density="auto").fit(p, Budget(trainable=3))
    with pytest.raises(InputError, match="spiel.density = 0.5: the chosen matrices have .* Choose at most 0.4717, or more targets"):
        method(density=0.5).check(p)
    with pytest.raises(InputError, match="spiel.density = 1e-06: it leaves less than one entry"):
        method(density=1e-6).check(p)
    with pytest.raises(InputError, match="spiel.window = 20: windows overlap .* Choose at most 19"):
        method(window=20).check(p)
    with pytest.raises(InputError, match="targets"):
        method(targets="nonsense").check(p)


def test_memory_grows_with_the_entries_and_not_with_the_model():
    p, batch = profile(), Batch(8, 24)
    one, two = (method(density=d).footprint(p, batch) for d in (0.01, 0.02))
    assert two.optimizer / one.optimizer == pytest.approx(2.0, rel=0.05)
    few, more = (method(density=d, growth="momentum").footprint(p, batch) for d in (0.01, 0.02))
    assert few.optimizer == more.optimizer < one.optimizer * 2

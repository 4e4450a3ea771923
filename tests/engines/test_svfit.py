"""SVFit against worked examples, on both ways in which its layer multiplies."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.core import SingularValues, apart, thin
from engines.models import profile_of
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer.requires_grad_(False)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, torch.tensor(b) if isinstance(b, (list, tuple)) else b, atol=atol, rtol=1e-5)


def test_worked_example():
    layer = SingularValues(linear([[3, 0], [4, 5]]), 1)
    close(layer.values.detach(), [45 ** 0.5])
    main = layer.b @ torch.diag(layer.start) @ layer.a
    close(main, [[1.5, 1.5], [4.5, 4.5]])
    close(layer.weight - main, [[1.5, -1.5], [-0.5, 0.5]])
    close(layer.effective(), layer.weight, atol=0)
    layer.values.data *= 2
    close(layer.effective(), [[4.5, 1.5], [8.5, 9.5]])


def test_gradient_of_the_values():
    layer = SingularValues(linear([[3, 0], [4, 5]]), 2)
    (layer.effective() * torch.tensor([[1.0, 0], [0, 0]])).sum().backward()
    close(layer.values.grad, [0.22361, 0.67082])
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["values"]


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_forward_and_gradients_are_those_of_the_changed_weight(rank):
    torch.manual_seed(0)
    base = nn.Linear(20, 12).requires_grad_(False)
    layer = SingularValues(base, rank)
    assert thin(12, 20, rank) == (rank < 12), "both ways of multiplying are tried"
    x = torch.randn(3, 5, 20, requires_grad=True)
    assert torch.equal(layer(x), base(x)) if rank == 12 else torch.allclose(layer(x), base(x), atol=1e-6)
    layer.values.data += torch.randn(rank)
    upstream = torch.randn(3, 5, 12)
    (layer(x) * upstream).sum().backward()
    found = x.grad.clone(), layer.values.grad.clone()
    x.grad = layer.values.grad = None
    whole = layer.b @ torch.diag(layer.values) @ layer.a + (layer.weight - layer.b @ torch.diag(layer.start) @ layer.a)
    (nn.functional.linear(x, whole, base.bias) * upstream).sum().backward()
    close(found[0], x.grad)
    close(found[1], layer.values.grad, atol=1e-4)


@pytest.mark.parametrize("out, inp", [(20, 12), (12, 20), (16, 16)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_many_tokens_build_the_weight_and_few_go_through_the_factors(out, inp, compute):
    torch.manual_seed(0)
    base, k = nn.Linear(inp, out).requires_grad_(False), min(out, inp)
    layer = SingularValues(base, k)
    layer.values.data += torch.randn(k)
    for tokens, kind in ((1, "_Diagonal"), (64, "_Built")):
        assert apart(out, inp, k, tokens) == (kind == "_Diagonal")
        x, upstream = torch.randn(tokens, inp, requires_grad=True), torch.randn(tokens, out)
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
            y = layer(x)
        assert y.dtype == compute and layer(x).grad_fn.next_functions and kind in _functions(y.grad_fn)
        (y.float() * upstream).sum().backward()
        found = y.float(), x.grad.clone(), layer.values.grad.clone()
        x.grad = layer.values.grad = None
        wanted = nn.functional.linear(x, layer.effective(), base.bias)
        (wanted * upstream).sum().backward()
        loose = 1e-4 if compute == torch.float32 else 0.05
        for mine, other in zip(found, (wanted, x.grad, layer.values.grad)):
            assert float((mine - other).norm() / other.norm()) < loose
        x.grad = layer.values.grad = None


def _functions(node) -> str:
    names, left = "", [node]
    while left:
        node = left.pop()
        names += node.name() + " "
        left += [n for n, _ in node.next_functions if n is not None]
    return names


def test_training_starts_at_the_model_in_half_precision_too():
    torch.manual_seed(0)
    base = nn.Linear(24, 16).requires_grad_(False)
    base.weight.data = base.weight.data.bfloat16()
    base.bias.data = base.bias.data.bfloat16()
    for rank in (2, 16):
        layer, x = SingularValues(base, rank), torch.randn(40, 24)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), base(x))


def test_the_input_is_not_kept_when_few_values_are_trained():
    kept = []
    layer = SingularValues(nn.Linear(20, 12).requires_grad_(False), 3)
    x = torch.randn(7, 20, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert (7, 3) in kept and (7, 20) not in kept


def test_vectors_and_rest_stay_and_values_are_not_decayed():
    model = micro.model("llama")
    context = micro.context(model, "llama")
    method = registry.build({"method": "svfit"})
    model = method.apply(model, context)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not n.endswith(".values")}
    settings = TrainSettings(lr=1e-2, batch=8, length=micro.LENGTH, weight_decay=0.5, items=0)
    trainer = Trainer(model, method, context, settings, Limit(steps=3))
    assert all(g["weight_decay"] == 0 for g in trainer.optimizer.param_groups)
    trainer.run()
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in frozen.items())
    assert any(not torch.equal(m.values, m.start) for m in model.modules() if isinstance(m, SingularValues))


def test_an_adapter_is_written_where_it_is_smaller_than_the_matrices(tmp_path):
    for rank, written in ((0, False), (4, True)):
        model = micro.model("llama")
        context = micro.context(model, "llama", folder=tmp_path / str(rank))
        method = registry.build({"method": "svfit", "rank": rank})
        method.finish(method.apply(model, context), context)
        assert (context.folder / "adapter").exists() == written
        assert any("larger than the matrices" in line for line in context.reporter.lines) != written


def test_ranks():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    every = registry.build({"method": "svfit"})
    assert every.trained(profile) == sum(min(m.out, m.inp) for m in profile.matrices)
    some, why = registry.build({"method": "svfit", "rank": "auto"}).fit(profile, Budget(trainable=100))
    assert some.rank == 100 // len(profile.matrices) and "limit of 100" in why["rank"]
    assert registry.build({"method": "svfit", "rank": "auto"}).fit(profile, Budget())[0].rank == 0
    with pytest.raises(InputError, match="svfit.rank = 40: .* Choose at most 32"):
        registry.build({"method": "svfit", "rank": 40}).check(profile)

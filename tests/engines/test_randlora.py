"""RandLoRA against peft's layers, worked counts and the sum in the paper."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.randlora import RandLora, bases
from engines.models import profile_of
from tests.contract import micro


def made(out, inp, rank, scale=1.0, kind="uniform", seed=0, mask=None):
    """A layer with random scales, in float32, and its shared bases."""
    torch.manual_seed(seed)
    layer = RandLora(nn.Linear(inp, out).requires_grad_(False), rank, scale, mask=mask)
    a, b = bases(rank, min(out, inp), max(out, inp), kind, 3)
    layer.share(a, b)
    nn.init.normal_(layer.lam)
    nn.init.normal_(layer.gamma)
    return layer, a, b


@pytest.mark.parametrize("out, inp, rank, count", [(6, 4, 2, 12), (4, 6, 2, 12), (5, 4, 3, 14)])
def test_trained_parameters(out, inp, rank, count):
    layer = made(out, inp, rank)[0]
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count
    from engines.profile import Matrix
    assert registry.build({"method": "randlora"}).count(Matrix("m", 0, "m", out, inp, True), rank) == count


def test_starts_at_the_model_and_reaches_full_rank():
    base = nn.Linear(6, 4).requires_grad_(False)
    layer = RandLora(base, 2, 1.0)
    layer.share(*bases(2, 4, 6, "uniform", 0))
    assert torch.equal(layer.effective(), base.weight) and (layer.gamma == 0.25).all()
    changed = made(4, 6, 2)[0]
    assert torch.linalg.matrix_rank(changed.effective() - changed.weight) == 4


@pytest.mark.parametrize("out, inp, rank", [(6, 4, 2), (4, 6, 2), (5, 4, 3)])
def test_update_is_the_permuted_sum(out, inp, rank):
    layer, a, b = made(out, inp, rank, scale=0.7)
    a, b, n = a.double(), b.double(), layer.number
    lam, gamma = layer.lam.detach().double(), layer.gamma.detach().double()
    flat = b[:, :n].flatten(1)
    paired = [flat[:, [k * n + j for k in range(rank)]] for j in range(n)]
    total = sum(paired[j] @ torch.diag(lam[:, j]) @ a[:, 0] @ torch.diag(gamma[j]) for j in range(n))
    plain = sum(b[:, j] @ torch.diag(lam[:, j]) @ a[:, 0] @ torch.diag(gamma[j]) for j in range(n))
    update = (layer.effective() - layer.weight).double()
    update = update if out >= inp else update.t()
    torch.testing.assert_close(update, 0.7 * total, atol=1e-5, rtol=1e-5)
    assert (total - plain).abs().max() > 0.1


@pytest.mark.parametrize("out, inp", [(6, 4), (4, 6), (5, 5)])
def test_update_and_gradients_equal_peft(out, inp):
    from peft import RandLoraConfig, get_peft_model
    layer, a, b = made(out, inp, 2, scale=20.0)
    theirs = get_peft_model(nn.Sequential(nn.Linear(inp, out)), RandLoraConfig(r=2, randlora_alpha=40, target_modules=["0"]))
    peer = theirs.base_model.model[0]
    peer.base_layer.weight.data, peer.base_layer.bias.data = layer.weight.clone(), layer.bias.clone()
    peer.randlora_A["default"].data, peer.randlora_B["default"].data = a.clone(), b.clone()
    peer.randlora_lambda["default"].data = layer.lam.detach().clone()
    peer.randlora_gamma["default"].data = layer.gamma.detach().clone()
    torch.testing.assert_close(layer.effective() - layer.weight, peer.get_delta_weight("default"), atol=2e-5, rtol=1e-5)
    x, upstream = torch.randn(7, inp), torch.randn(7, out)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(mine) * upstream).sum().backward()
    (theirs(other) * upstream).sum().backward()
    for ours, wanted in ((mine.grad, other.grad), (layer.lam.grad, peer.randlora_lambda["default"].grad),
                         (layer.gamma.grad, peer.randlora_gamma["default"].grad)):
        torch.testing.assert_close(ours, wanted, atol=2e-3, rtol=1e-4)


def test_masked_gradients_are_those_of_autograd():
    mask = torch.rand(4, 6) > 0.5
    layer = made(4, 6, 2, mask=mask)[0]
    x, upstream = torch.randn(5, 6), torch.randn(5, 4)
    (layer(x) * upstream).sum().backward()
    found = layer.lam.grad.clone(), layer.gamma.grad.clone()
    layer.lam.grad = layer.gamma.grad = None
    (nn.functional.linear(x, layer.masked(), layer.bias) * upstream).sum().backward()
    torch.testing.assert_close(found, (layer.lam.grad, layer.gamma.grad), atol=1e-4, rtol=1e-4)
    assert (layer.masked()[~mask] == 0).all()


def test_only_input_and_weight_are_kept():
    layer, kept = made(12, 12, 3)[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        x = torch.randn(7, 12)
        layer(x)
    known = {t.data_ptr() for t in (x, layer.weight, layer.lam, layer.gamma, layer.a, layer.b)}
    assert set(kept) == known, "neither the scaled basis nor the changed weight"


@pytest.mark.parametrize("out, inp", [(12, 8), (8, 12)])
def test_half_precision_makes_the_update_in_half_precision(out, inp):
    """A product of this size in float32 costs as much as the whole of LoRA's step."""
    from torch.utils._python_dispatch import TorchDispatchMode
    layer = made(out, inp, 3, scale=0.1)[0]
    exact = layer.effective().detach()
    layer.base.to(torch.bfloat16)
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(found.dtype)
            return found
    x = torch.eye(inp, dtype=torch.bfloat16, requires_grad=True)
    with Watch():
        y = layer(x)
        y.sum().backward()
    assert set(products) == {torch.bfloat16} and len(products) == 6
    seen = (y - layer.base.bias).detach().float().t()
    torch.testing.assert_close(seen, exact, atol=0.02 * float(exact.abs().max()), rtol=0.02)
    assert layer.lam.grad.dtype == layer.gamma.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["uniform", "sparse", "very-sparse"])
def test_bases_follow_from_their_key(kind):
    a, b = bases(8, 64, 96, kind, 5)
    again = bases(8, 64, 96, kind, 5)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    assert not torch.equal(b, bases(8, 64, 96, kind, 6)[1])
    assert a.shape == (8, 1, 64) and b.shape == (96, 8, 8)
    assert float(b.std()) == pytest.approx(1.0, abs=1e-4)
    zeros = {"uniform": 0.0, "sparse": 2 / 3, "very-sparse": 1 - 1 / 8}[kind]
    assert float((b == 0).double().mean()) == pytest.approx(zeros, abs=0.03)


def test_scales():
    method = registry.build({"method": "randlora", "rank": 4})
    assert method.multiplier(16) == pytest.approx(2 / 4)
    assert method.replace(scale="peft", alpha=80.0).multiplier(16) == pytest.approx(20.0)


def test_a_smaller_rank_trains_more_and_the_limit_is_met_from_above():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    method = registry.build({"method": "randlora", "rank": "auto"})
    assert method.trained(profile, 4) > method.trained(profile, 16)
    limit = method.trained(profile, 8)
    chosen, why = method.fit(profile, Budget(trainable=limit))
    assert chosen.rank == 8 and "rank 7 would need" in why["rank"]
    with pytest.raises(InputError, match="which trains the least"):
        method.fit(profile, Budget(trainable=10))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")      # the layers share the two bases, which are stored once
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_peft_loads_the_adapter(architecture, tmp_path):
    from peft import PeftModel
    model = micro.model(architecture)
    context = micro.context(model, architecture, folder=tmp_path)
    method = registry.build({"method": "randlora", "rank": 8})
    model = method.apply(model, context)
    from engines.adaptation._adapter import adapters
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lam.normal_()
            layer.gamma.normal_(std=0.01)
    merged = micro.logits(method.finish(model, context), architecture)
    loaded = PeftModel.from_pretrained(micro.model(architecture), tmp_path / "adapter")
    assert not torch.allclose(merged, micro.logits(micro.model(architecture), architecture), atol=1e-2)
    torch.testing.assert_close(micro.logits(loaded, architecture), merged, atol=2e-4, rtol=1e-3)

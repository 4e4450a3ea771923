"""CorDA against the worked example and against peft's own preprocessing."""

import copy

import pytest
import torch

from engines import models, registry
from engines.adaptation._adapter import adapters
from engines.errors import InputError, RunFailed
from engines.layers.context import SecondMoment, damped, decompose
from engines.models import profile_of
from tests.contract import micro

W, C = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[2.0, 1], [1, 2]])


def applied(architecture="llama", folder=None, compute="float32", masks=None, **settings):
    model = micro.model(architecture)
    for name, mask in (masks or {}).items():
        dict(model.named_parameters())[name].data.mul_(mask)
    method = registry.build({"method": "corda", "samples": 8, **settings})
    context = micro.context(model, architecture, folder=folder)
    context.compute, context.masks = compute, masks or {}
    before = micro.logits(model, architecture)
    return method, method.apply(model, context), context, before


def test_components_of_two_by_two():
    inverse = torch.linalg.inv(C)
    parts = {}
    for form in ("ipm", "kpm"):
        u, s, v, share = decompose(W, C, inverse, 1, form)
        parts[form] = u * s @ v
        assert share == pytest.approx({"ipm": 4.7541, "kpm": 0.6310}[form] ** 2 / 23, abs=1e-4)
    torch.testing.assert_close(parts["ipm"], torch.tensor([[0.7927, 1.1981], [0.4053, 0.6126]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(parts["kpm"], torch.tensor([[0.2073, -0.1981], [-0.4053, 0.3874]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(parts["ipm"] + parts["kpm"], W)
    assert float(((W - parts["ipm"]) @ C).norm()) == pytest.approx(0.6310, abs=1e-4)
    changed, inverse, damping = damped(C)
    torch.testing.assert_close(changed.diagonal(), torch.tensor([2.02, 2.02]))
    _, s, _, _ = decompose(W, changed, inverse, 2, "ipm")
    torch.testing.assert_close(s, torch.tensor([4.7861, 0.6436]), atol=1e-4, rtol=0)
    assert damping == 0.01


def test_with_unit_moments_the_components_are_the_singular_ones():
    weight = torch.randn(5, 7)
    u, s, v, _ = decompose(weight, torch.eye(7), torch.eye(7), 2, "ipm")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(u * s @ v, left[:, :2] * values[:2] @ right[:2])
    u, s, v, _ = decompose(weight, torch.eye(7), torch.eye(7), 2, "kpm")
    torch.testing.assert_close(u * s @ v, left[:, -2:] * values[-2:] @ right[-2:])


def test_moments_are_a_mean_over_samples_and_not_centred():
    found = SecondMoment()
    found(torch.tensor([[2.0, 0.0], [-4.0, 1.0]]))      # divided by 2, its largest entry, not its largest size
    found(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(found.mean(), (torch.tensor([[5.0, -1.0], [-1.0, 0.25]]) + 1.0) / 2)


def test_damping_grows_until_the_inverse_is_accurate_and_zero_inputs_are_refused():
    thin = torch.randn(2, 200)
    changed, inverse, damping = damped(thin.t() @ thin * 1e3 + torch.ones(200, 200) * 1e5, accuracy=1e-4)
    assert damping > 0.01 and torch.dist(changed @ inverse, torch.eye(200)) < 1e-4
    with pytest.raises(RunFailed, match="all zero or not finite"):
        damped(torch.zeros(3, 3))


@pytest.mark.parametrize("form, alpha", [("ipm", 0.0), ("kpm", 24.0)])
def test_equals_peft(form, alpha):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    method, model, context, _ = applied(rank=6, form=form, alpha=alpha)
    theirs = micro.model("llama")
    config = LoraConfig(r=6, lora_alpha=alpha or 6, init_lora_weights="corda", corda_config=CordaConfig(corda_method=form),
                        target_modules=[m.name for m, _ in models.matrices(theirs)])

    def run():
        for sample in context.calibration(8):
            theirs(**sample)

    preprocess_corda(theirs, config, run_model=run)
    layers = {n.removeprefix("base_model.model."): m for n, m in get_peft_model(theirs, config).named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for name, layer in adapters(model):
            other = layers[name]
            a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
            product = b @ a
            torch.testing.assert_close(layer.b @ layer.a, product, atol=1e-3 * float(product.abs().max()), rtol=1e-3)
            torch.testing.assert_close(layer.a.norm(), a.norm(), rtol=1e-3, atol=0)
            torch.testing.assert_close(layer.weight, other.base_layer.weight, atol=1e-3 * float(other.base_layer.weight.abs().max()), rtol=1e-3)
            assert layer.scale == other.scaling["default"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("form", ["ipm", "kpm"])
def test_starts_at_the_model(architecture, form):
    _, model, context, before = applied(architecture, rank=5, form=form, alpha=10.0)
    torch.testing.assert_close(micro.logits(model, architecture), before, atol=1e-4, rtol=1e-4)
    plain = {m.name: module for m, module in models.matrices(micro.model(architecture))}
    for name, layer in adapters(model):
        wanted = plain[name].weight.t() if layer.conv1d else plain[name].weight
        torch.testing.assert_close(layer.effective(), wanted, atol=1e-5, rtol=1e-5)
        assert float((layer.weight - wanted).detach().norm()) > 1e-4 * float(wanted.norm()), "the base is the residual"
    shares = [v for _, _, v in registry.build({"method": "corda"}).layers(model, context)["share"]]
    assert len(shares) == len(context.profile.matrices) and all((v > 0.05) == (form == "ipm") or form == "kpm" and v < 0.05 for v in shares)


def test_the_context_loses_less_without_the_parts_it_uses_least():
    """Removing kpm components hurts the sampled context less than removing as many of the plain smallest ones' random peers."""
    _, model, context, before = applied(rank=12, form="kpm")
    samples = context.calibration(8)
    plain, cut, other = micro.model("llama"), micro.model("llama"), micro.model("llama")
    layers = dict(adapters(model))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (m, a), (_, b) in zip(models.matrices(cut), models.matrices(other)):
            a.weight.copy_(layers[m.name].weight)
            u, s, v = torch.linalg.svd(b.weight, full_matrices=False)
            gone = torch.randperm(len(s), generator=g)[:12]
            b.weight.sub_(u[:, gone] * s[gone] @ v[gone])
        def error(changed):
            return sum(float((changed(**x).logits - plain(**x).logits).square().mean()) for x in samples)
        assert error(cut) < 0.5 * error(other)


def test_masked_zeros_stay_zero(tmp_path):
    plain = micro.model("llama")
    masks = {f"{m.name}.weight": torch.rand(m.out, m.inp, generator=torch.Generator().manual_seed(i)) > 0.5
             for i, (m, _) in enumerate(models.matrices(plain))}
    method, model, context, before = applied(masks=masks, rank=4, dropout=0.1, folder=tmp_path)
    torch.testing.assert_close(micro.logits(model, "llama"), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.b.add_(0.1)
    model = method.finish(model, context)
    params = dict(model.named_parameters())
    assert all((params[n][~mask] == 0).all() for n, mask in masks.items())
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_adapter_is_the_difference_to_the_model_as_it_came(tmp_path, compute):
    from peft import PeftModel
    method, model, context, before = applied(folder=tmp_path, rank=4, alpha=8.0, compute=compute)
    if compute == "bfloat16":
        assert all(layer.base.weight.dtype == torch.bfloat16 for _, layer in adapters(model))
        untouched = method.finish(copy.deepcopy(model), context)
        torch.testing.assert_close(micro.logits(untouched, "llama"), before, atol=1e-4, rtol=1e-4)
        return
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.b.mul_(1.3)
            layer.a.add_(0.01)
    merged = method.finish(model, context)
    assert not (tmp_path / "context-0.safetensors").exists()
    theirs = PeftModel.from_pretrained(micro.model("llama"), tmp_path / "adapter")
    assert theirs.peft_config["default"].r == 8
    torch.testing.assert_close(micro.logits(theirs, "llama"), micro.logits(merged, "llama"), atol=1e-3, rtol=1e-3)
    with theirs.disable_adapter():
        torch.testing.assert_close(micro.logits(theirs, "llama"), before)


def test_a_resume_uses_the_same_residual(tmp_path):
    _, first, _, _ = applied(folder=tmp_path, rank=4)
    method = registry.build({"method": "corda", "samples": 8, "rank": 4})
    model = micro.model("llama")
    context = micro.context(model, "llama", folder=tmp_path)
    context.resuming, context.data = True, None
    for (n, a), (m, b) in zip(adapters(first), adapters(method.apply(model, context))):
        assert n == m and torch.equal(a.base.weight, b.base.weight) and torch.equal(a.a, b.a)


def test_data_to_be_kept(tmp_path):
    (tmp_path / "kept.txt").write_text("\n\n".join("w1 w2 w3 w4 w5 w6 w7 w8 " * 6 for _ in range(30)))
    method, model, context, _ = applied(form="kpm", keep=str(tmp_path / "kept.txt"), rank=4)
    samples = method.context_samples(context)
    assert len(samples) == 8 and {int(i) for s in samples for i in s["input_ids"].flatten()} <= set(range(4, 14)) | {0, 1, 2}
    own = applied(form="kpm", rank=4)
    assert any("keep is empty" in line for line in own[2].reporter.lines)
    assert not any(torch.equal(a.a, b.a) for (_, a), (_, b) in zip(adapters(model), adapters(own[1])))


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="corda.rank = 40: .* Choose at most 32"):
        registry.build({"method": "corda", "rank": 40}).check(profile)
    with pytest.raises(InputError, match="corda.keep = 'python-docs': form ipm looks at the training data only. Set form to kpm"):
        registry.build({"method": "corda", "keep": "python-docs"}).check(profile)

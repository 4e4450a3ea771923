"""EVA against the worked examples and against peft's own initialisation."""

import json

import pytest
import torch

from engines import models, registry
from engines.adaptation import _calibration
from engines.adaptation._adapter import adapters
from engines.allocation.variance import Components, redistribute, same_inputs
from engines.errors import InputError, RunFailed
from engines.models import profile_of
from tests.contract import micro


def applied(architecture="llama", folder=None, resuming=False, compute="float32", **settings):
    model = micro.model(architecture)
    method = registry.build({"method": "eva", "samples": 96, **settings})
    context = micro.context(model, architecture, folder=folder)
    context.resuming, context.compute = resuming, compute
    before = micro.logits(model, architecture)
    return method, method.apply(model, context), context, before


def test_the_decomposition_in_two_halves_has_the_singular_values_of_the_whole():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g, dtype=torch.float64)
    found = Components(6, 0.99)
    for half in (x[:20], x[20:]):
        found.pca.lowrank = False
        found.pca.partial_fit(half)
    wanted = torch.linalg.svdvals(x - x.mean(dim=0))
    torch.testing.assert_close(found.pca.singular_values_, wanted, atol=1e-12, rtol=1e-12)
    variance = (x - x.mean(dim=0)).square().sum()
    torch.testing.assert_close(found.ratios(), wanted**2 / variance)


def test_ranks_are_dealt_out_globally():
    t = torch.tensor
    ratios = dict(a=t([.6, .19, .1]), b=t([.5, .3, .15]), c=t([.3, .25, .2]))
    assert redistribute(ratios, 6) == dict(a=1, b=2, c=3)
    # Of two layers with the same inputs the one that owns the decomposition gets the larger rank, if it has so many.
    same = dict(q=t([.5]), k=t([.5, .4]))
    assert redistribute(same, 3, {"k": "q"}) == dict(q=1, k=2)
    assert redistribute(dict(q=t([.5, .1]), k=t([.5, .4])), 3, {"k": "q"}) == dict(q=2, k=1)


def test_layers_with_equal_inputs_are_found_by_value():
    x = torch.randn(3, 4)
    assert same_inputs(dict(a=x, b=x.clone(), c=x + 1, d=x[:2], e=x)) == dict(b="a", e="a")


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_equals_peft(rho):
    from peft import EvaConfig, LoraConfig, get_eva_state_dict
    method, model, context, _ = applied(rank=8, rho=rho, tau=0.9, samples=1024)
    plain = micro.model("llama")
    batches = [{k: v for k, v in part.items() if k != "labels"} for step in range(64) for part in context.data.batch(step, 16)]
    config = LoraConfig(r=8, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.9),
                        target_modules=[m.name for m, _ in models.matrices(plain)])
    theirs = get_eva_state_dict(plain, batches, peft_config=config, show_progress_bar=False)
    ours = {name: layer.a.detach() for name, layer in adapters(model)}
    assert {n: len(w) for n, w in theirs.items() if len(w)} == {n: len(a) for n, a in ours.items()}
    for name, a in ours.items():
        torch.testing.assert_close(a, theirs[name].float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit"])
def test_start(architecture):
    method, model, context, before = applied(architecture, rank=6)
    layers = adapters(model)
    assert torch.equal(micro.logits(model, architecture), before)
    total = 6 * len(context.profile.matrices)
    assert sum(len(layer.a) for _, layer in layers) == total
    assert len({len(layer.a) for _, layer in layers}) > 1, "ranks follow the variance"
    for _, layer in layers:
        assert len(layer.a) <= 12 and layer.scale == 2.0
        torch.testing.assert_close(layer.a @ layer.a.t(), torch.eye(len(layer.a)), atol=1e-5, rtol=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= method.trained(context.profile)


def test_directions_explain_more_than_random_ones():
    _, model, context, _ = applied(rank=4, rho=1.0)
    plain = micro.model("llama")
    modules = dict(plain.named_modules())
    seen = {}
    with _calibration.frozen(plain, context):
        _calibration.look(plain, context, context.data.batch(90, 16)[0], {modules[n]: (lambda x, n=n: seen.__setitem__(n, x)) for n, _ in adapters(model)})
    for name, layer in adapters(model):
        x = seen[name] - seen[name].mean(dim=0)
        other = torch.linalg.qr(torch.randn(layer.inp, 4, generator=torch.Generator().manual_seed(1)))[0].t()
        assert (x @ layer.a.t()).square().sum() > 2 * (x @ other.t()).square().sum(), name


def test_padding_is_not_an_input():
    model = micro.model("bert")
    context, module = micro.context(model, "bert"), models.matrices(model)[0][1]
    ids = torch.randint(4, micro.VOCAB, (2, 8))
    inputs = dict(input_ids=ids, attention_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]), labels=torch.tensor([0, 1]))
    seen = []
    with _calibration.frozen(model, context):
        _calibration.look(model, context, inputs, {module: seen.append})
    assert seen[0].shape == (13, 64) and not seen[0].requires_grad


def test_own_scales_of_the_authors_and_whitening():
    _, model, _, _ = applied(rank=6, alpha=12.0, adjust=False, whiten=True)
    layers = adapters(model)
    assert all(layer.scale == pytest.approx(12.0 / len(layer.a)) for _, layer in layers)
    assert any(float((layer.a @ layer.a.t() - torch.eye(len(layer.a))).abs().max().detach()) > 0.1 for _, layer in layers)


def test_a_resume_does_not_decide_again(tmp_path):
    _, first, context, _ = applied(folder=tmp_path, rank=6)
    file = tmp_path / "directions-0.safetensors"
    assert file.is_file()
    method, model, context, _ = applied(rank=6)
    context.folder, context.resuming = tmp_path, True
    context.data = None                       # nothing is looked at again
    again = method.apply(micro.model("llama"), context)
    for (n, a), (m, b) in zip(adapters(first), adapters(again)):
        assert n == m and torch.equal(a.a, b.a)
    method.finish(again, context)
    assert not file.exists()


def test_the_adapter_loads_in_peft(tmp_path):
    from peft import PeftModel
    method, model, context, _ = applied(folder=tmp_path, rank=4)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.b.normal_(std=0.05)
    merged = method.finish(model, context)
    theirs = PeftModel.from_pretrained(micro.model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(micro.logits(theirs, "llama"), micro.logits(merged, "llama"), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"], "ranks differ"


def test_half_precision_weights(tmp_path):
    method, model, context, before = applied(compute="bfloat16", rank=4, folder=tmp_path)
    assert all(layer.base.weight.dtype == torch.bfloat16 for _, layer in adapters(model))
    merged = method.finish(model, context)
    assert all(p.dtype == torch.float32 for p in merged.parameters())
    assert torch.equal(micro.logits(merged, "llama"), before), "no update: the original weights are back, those without an adapter too"


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="eva.rank = 65: .* Choose at most 32"):
        registry.build({"method": "eva", "rank": 65}).check(profile)
    with pytest.raises(InputError, match="targets"):
        registry.build({"method": "eva", "targets": "nowhere"}).check(profile)
    method, context = registry.build({"method": "eva", "rank": 32, "samples": 2}), micro.context(micro.model("vit"), "vit")
    method = method.replace(targets="q_proj")
    with pytest.raises(RunFailed, match="no batch of 2 rows has 64 tokens"):
        method.apply(micro.model("vit"), context)

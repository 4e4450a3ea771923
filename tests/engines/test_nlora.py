"""NLoRA, SLoRA and IntTune against worked examples and the Nyström formula."""

import itertools

import pytest
import torch
from torch import nn

from engines import registry
from engines.errors import InputError
from engines.layers.nlora import Structured, nystroem
from engines.models import profile_of
from engines.profile import Matrix
from engines.training.loop import Limit
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro

FORMS = ("nlora", "slora", "inttune")


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer.requires_grad_(False)


def test_worked_example():
    layer = Structured(linear([[2, 1], [4, 3]]), 1, 1.0)
    torch.testing.assert_close(layer.effective() - layer.weight, torch.tensor([[8.0, 4], [16, 8]]))
    a, middle, b = nystroem(torch.tensor([[2.0, 1], [4, 3]]), 1, "pinv")
    torch.testing.assert_close(b @ middle @ a, torch.tensor([[2.0, 1], [4, 2]]))


def test_the_formula_gives_back_a_matrix_of_that_rank():
    torch.manual_seed(0)
    weight = torch.randn(9, 3, dtype=torch.double) @ torch.randn(3, 7, dtype=torch.double)
    a, middle, b = nystroem(weight, 3, "pinv")
    torch.testing.assert_close(middle, torch.linalg.inv(weight[:3, :3]), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(b @ middle @ a, weight, atol=1e-13, rtol=1e-11)


def test_a_singular_corner_does_not_explode():
    weight = torch.randn(6, 6)
    weight[1, :2] = weight[0, :2] * (1 + 1e-7)
    assert nystroem(weight, 2, "pinv")[1].abs().max() < 1e2


@pytest.mark.parametrize("form, residual", [f for f in itertools.product(FORMS, (False, True)) if f != ("slora", True)])
def test_start_and_gradients(form, residual):
    torch.manual_seed(1)
    base = nn.Linear(9, 6).requires_grad_(False)
    layer = Structured(base, 2, 0.7, form, residual=residual, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 9, requires_grad=True)
    starts = torch.allclose(layer.effective(), base.weight, atol=1e-7)
    assert starts == (residual or form == "slora")
    assert starts == registry.build({"method": "nlora", "form": form, "residual": residual}).identity
    for p in (layer.a, layer.middle, layer.b):
        p.data += torch.randn(p.shape)
    upstream, names = torch.randn(5, 6), [n for n, p in layer.named_parameters() if p.requires_grad]
    assert names == (["middle"] if form == "inttune" else ["a", "b", "middle"])
    (layer(x) * upstream).sum().backward()
    found = [x.grad] + [layer.get_parameter(n).grad for n in names]
    x.grad = None
    for n in names:
        layer.get_parameter(n).grad = None
    (nn.functional.linear(x, layer.effective(), base.bias) * upstream).sum().backward()
    for ours, n in zip(found, [None] + names):
        torch.testing.assert_close(ours, x.grad if n is None else layer.get_parameter(n).grad, atol=1e-4, rtol=1e-4)


def test_factors_of_a_transposed_weight_lie_in_plain_order():
    assert all(part.is_contiguous() for part in nystroem(torch.randn(7, 9).t(), 3, "copy"))


def test_counts():
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    matrices = [Matrix(f"m{i}", 0, "m", out, inp, False) for i, (out, inp) in enumerate(shapes)]
    slora = registry.build({"method": "nlora", "form": "slora", "rank": 128})
    lora = sum(128 * (m.out + m.inp) for m in matrices)
    assert 32 * (sum(slora.count(m, 128) for m in matrices) - lora) == 3_670_016
    assert sum(slora.replace(form="inttune").count(m, 128) for m in matrices) == 7 * 128**2


def test_inttune_trains_the_middle_alone_and_keeps_no_input():
    kept, layer = [], Structured(nn.Linear(20, 12).requires_grad_(False), 3, 1.0, "inttune")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(7, 20, requires_grad=True) * 1.0)
    assert (7, 3) in kept and (7, 20) not in kept
    model = micro.model("llama")
    context, method = micro.context(model, "llama"), registry.build({"method": "nlora", "form": "inttune", "rank": 4})
    model = method.apply(model, context)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 * len(context.profile.matrices)
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith((".a", ".b"))}
    middle = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(".middle")}
    train(model, method, context, TrainSettings(lr=1e-2, batch=4, length=micro.LENGTH, items=0), Limit(steps=2))
    after = model.state_dict()
    assert before and all(torch.equal(t, after[n]) for n, t in before.items())
    assert all(not torch.equal(t, after[n]) for n, t in middle.items())
    assert any("the start changes the model" in line for line in context.reporter.lines)


def test_peft_loads_what_training_added_to_the_model(tmp_path):
    from peft import PeftModel
    for form, residual in (("nlora", True), ("nlora", False), ("inttune", True)):
        model = micro.model("llama")
        context = micro.context(model, "llama", folder=tmp_path / f"{form}{residual}")
        method = registry.build({"method": "nlora", "form": form, "residual": residual})
        model = method.apply(model, context)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape)
        merged = micro.logits(method.finish(model, context), "llama")
        loaded = PeftModel.from_pretrained(micro.model("llama"), context.folder / "adapter")
        torch.testing.assert_close(micro.logits(loaded, "llama"), merged, atol=2e-4, rtol=1e-3)


def test_slora_takes_nothing_from_the_matrix():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="nlora.residual = True: SLoRA's update .* Set residual to false"):
        registry.build({"method": "nlora", "form": "slora", "residual": True}).check(profile)


@pytest.mark.parametrize("form", ["nlora", "inttune"])
@pytest.mark.parametrize("masked", [False, True])
def test_with_a_residual_half_precision_starts_at_the_model_too(form, masked):
    """The factor and what is subtracted from it are the same numbers only where both are computed in float32."""
    torch.manual_seed(0)
    base = nn.Linear(48, 32, bias=False).requires_grad_(False)
    base.weight.data = (base.weight.data * 20).bfloat16()
    mask = torch.ones(32, 48, dtype=torch.bool) if masked else None
    layer, x = Structured(base, 8, 1.0, form, residual=True, mask=mask), torch.randn(64, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x).float(), base(x).float()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4

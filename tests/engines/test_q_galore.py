"""Q-GaLore: its integers, its rounding, its lazy subspaces, and that no other copy of the weights exists."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.errors import InputError, RunFailed
from engines.layers import groupwise
from engines.layers.int8_trained import TrainedInt8Linear
from engines.models import profile_of
from engines.optimizers import eight_bit
from engines.optimizers.projected import Projected, basis
from engines.optimizers.q_galore import QProjected
from engines.profile import Batch
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro

SETTINGS = TrainSettings(lr=5e-3, batch=8, length=micro.LENGTH, evaluations=1)


def test_four_bit_group():
    values = torch.zeros(256)
    values[:4] = torch.tensor([-0.75, 0.0, 0.25, 0.75])
    codes, scale, zero = groupwise.quantize(values, 4)
    assert float(scale) == pytest.approx(0.1) and int(zero) == 8 and codes[:4].tolist() == [0, 8, 10, 15]
    torch.testing.assert_close(groupwise.dequantize(codes, scale, zero)[:4], torch.tensor([-0.8, 0.0, 0.2, 0.7]))
    assert (groupwise.dequantize(codes, scale, zero)[4:] == 0).all()


def test_a_group_of_one_sign_does_not_saturate():
    values = torch.tensor([0.5, 0.6, 0.7, 0.8]).repeat(64)
    found = groupwise.dequantize(*groupwise.quantize(values, 4))
    assert float((found - values).abs().max()) <= 0.8 / 15 / 2 + 1e-6


@pytest.mark.parametrize("bits, stochastic", [(8, False), (4, False), (8, True)])
def test_groups_do_not_know_of_each_other(bits, stochastic, monkeypatch):
    """Worked on a few groups at a time, and each group by itself: the same integers, the last group short."""
    torch.manual_seed(0)
    values = torch.randn(256 * 7 + 30) * torch.logspace(-3, 1, 256 * 7 + 30)
    monkeypatch.setattr(groupwise, "PART", 3)
    torch.manual_seed(1)
    codes, scale, zero = groupwise.quantize(values, bits, stochastic)
    torch.manual_seed(1)
    alone = [groupwise.quantize(part, bits, stochastic) for part in values.split(256)]
    assert len(scale) == len(zero) == 8 and len(codes) == len(values)
    if not stochastic:      # the draws of short groups differ
        assert torch.equal(codes, torch.cat([a[0] for a in alone]))
    assert torch.equal(scale, torch.cat([a[1] for a in alone])) and torch.equal(zero, torch.cat([a[2] for a in alone]))
    found = groupwise.dequantize(codes, scale, zero, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.cat([groupwise.dequantize(codes[at:at + 256], scale[i:i + 1], zero[i:i + 1])
                                                                           for i, at in enumerate(range(0, len(values), 256))]).bfloat16())
    assert float((found.float() - values).abs().max()) <= (2 if stochastic else 1.01) * float(scale.max())


@pytest.mark.parametrize("size", [1, 255, 256, 600])
def test_packing_is_lossless(size):
    codes = torch.randint(0, 16, (size,), dtype=torch.uint8)
    packed = groupwise.pack4(codes)
    assert packed.numel() == (size + 1) // 2 and torch.equal(groupwise.unpack4(packed, size), codes)


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    values = torch.full((8_000, 256), 0.3)
    values[:, 0], values[:, 1] = 255.0, 0.0       # one step is 1
    found = groupwise.dequantize(*groupwise.quantize(values, 8, stochastic=True)).view(values.shape)
    inner = found[:, 2:]
    assert set(inner.unique().tolist()) == {0.0, 1.0} and (found[:, 1] == 0).all()
    n = inner.numel()
    assert float(inner.mean()) == pytest.approx(0.3, abs=5 * (0.21 / n) ** 0.5) and float(inner.double().var()) == pytest.approx(0.21, abs=2e-3)


def test_moments_of_eight_bits():
    for signed in (True, False):
        table = eight_bit.values(signed)
        assert len(table) == 256 and len(table.unique()) >= 255 and float(table.max()) == 1.0 and float(table.min()) == pytest.approx(-0.99 if signed else 0.0, abs=0.01)
        torch.manual_seed(0)
        x = torch.randn(3, 1000) * torch.logspace(-4, 0, 1000) if signed else torch.rand(3, 1000) ** 4
        codes, most = eight_bit.encode(x, signed)
        again = eight_bit.decode(codes, most, signed)
        assert codes.dtype == torch.uint8 and most.numel() == 12 and again.shape == x.shape
        assert float((again - x).norm() / x.norm()) < 0.02


@pytest.mark.parametrize("signed", [True, False])
def test_every_moment_is_stored_as_the_nearest_value(signed):
    table = eight_bit.values(signed)
    middles = (table[:-1] + table[1:]) / 2
    torch.manual_seed(0)
    low, none, one = (torch.tensor(v) for v in (-1.0, 0.0, 1.0))
    x = torch.cat([table, middles, torch.nextafter(middles, one), torch.nextafter(middles, low), torch.rand(20_000) ** 12, torch.logspace(-44, 0, 5000)])
    x = torch.cat([x, -x]) if signed else x.clamp(min=0)
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    x = torch.cat([torch.ones(len(x), 1), x], 1)        # the largest of each block is 1: nothing is scaled
    codes, most = eight_bit.encode(x, signed)
    assert (most == 1).all() and torch.equal(codes.int(), torch.bucketize(x, middles, out_int32=True))
    assert torch.equal(eight_bit.decode(codes, most, signed), table[codes.int()])
    zeros, most = eight_bit.encode(torch.zeros(300), signed)
    assert (eight_bit.decode(zeros, most, signed) == none).all()


def count(cosine: float, steps: int = 10_000, gap: int = 200, threshold: float = 0.4) -> list[int]:
    """Steps at which a subspace whose successive first vectors have this cosine is computed."""
    now, seen = [0.0], []
    layer = TrainedInt8Linear(nn.Linear(3, 2))
    p = layer.codes
    opt = QProjected([dict(params=[p], rank=1)], lr=0.1, progress=lambda: now[0], refreshes=steps // gap, threshold=threshold, queue=5, factor=2.0)
    angle = torch.acos(torch.tensor(cosine))
    for step in range(0, steps, gap):
        now[0] = step / steps
        before = opt.state[p].get("refreshes", 0)
        turned = torch.stack([torch.cos(angle * before), torch.sin(angle * before)])
        opt._refresh(p, torch.outer(turned, torch.tensor([1.0, 2.0, -1.0])))
        if opt.state[p]["refreshes"] > before:
            seen.append(step)
    return seen


def test_a_stable_subspace_is_computed_ever_more_rarely():
    assert count(1.0) == [0, 200, 400, 600, 800, 1000, 1200, 1600, 3200, 6400]
    assert len(count(0.2)) == 50, "one that turns is computed every time"


def test_the_sign_of_a_singular_vector_does_not_matter():
    assert count(-1.0) == count(1.0)


def test_coarse_parts_aside_it_is_galore():
    """With float32 in place of its integers a step of the optimizer is the base's; with them it stays near."""
    torch.manual_seed(3)
    base = nn.Linear(512, 64, bias=False)
    layer = TrainedInt8Linear(base)
    plain = nn.Parameter(layer.dequantize().clone())
    start = plain.detach().clone()
    options = dict(lr=0.05, progress=lambda: 0.0, refreshes=1)
    ours = QProjected([dict(params=[layer.codes], rank=8)], threshold=0.4, queue=5, factor=2.0, **options)
    theirs = Projected([dict(params=[plain], rank=8)], early=False, **options)
    for _ in range(3):
        g = torch.randn(64, 8) @ torch.randn(8, 512)
        ours.collect(layer.codes, g)
        plain.grad = g
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
    moved, wanted = layer.dequantize() - start, plain.detach() - start
    assert float((moved - wanted).norm() / wanted.norm()) < 0.25
    assert float(torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)) > 0.97


def test_gradients_of_the_layer():
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    layer, seen = TrainedInt8Linear(base), []
    layer.sink = lambda p, g: seen.append((p, g))
    x = torch.randn(2, 5, 16, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    z, w = x.detach().clone().requires_grad_(), layer.dequantize().requires_grad_()
    other = torch.nn.functional.linear(z, w, layer.bias)
    other.square().sum().backward()
    torch.testing.assert_close(y, other)
    torch.testing.assert_close(x.grad, z.grad)
    assert seen[0][0] is layer.codes and layer.codes.grad is None
    torch.testing.assert_close(seen[0][1], w.grad, atol=1e-4, rtol=1e-4)


def trainer(steps=6, **changes):
    model = micro.model("llama")
    method, context = registry.build({"method": "q-galore", "rank": 8, **changes}), micro.context(model, "llama")
    model = method.apply(model, context)
    return method, context, Trainer(model, method, context, SETTINGS, Limit(steps=steps))


def test_no_other_copy_of_the_weights_exists():
    method, context, t = trainer()
    profile = context.profile
    t._step()
    inside = {f"{m.name}.weight" for m in profile.matrices}
    held = sum(p.numel() * p.element_size() for p in t.model.parameters()) + sum(
        b.numel() * b.element_size() for n, b in t.model.named_buffers() if n.endswith((".scales", ".zeros")))
    assert held == method.footprint(profile, Batch(2, 24)).weights
    assert not [n for n, p in t.model.named_parameters() if p.dtype == torch.float32 and p.numel() >= 1024 and n in inside]
    for _, layer in method.found(t.model):
        assert layer._base[0].weight.numel() == 0 and layer.codes.element_size() == 1
    moments = [v for s in t.optimizer.state.values() for k, v in s.items() if k in ("exp_avg", "exp_avg_sq") and v.numel() >= 4096]
    assert moments and all(v.dtype == torch.uint8 for v in moments)
    stored = sum(v.numel() * v.element_size() for s in t.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    assert stored == method.footprint(profile, Batch(2, 24)).optimizer
    assert t.optimizer.gradient_bytes == sum(4 * 8 * max(m.out, m.inp) for m in profile.matrices)


def test_weights_in_floating_point_are_given_back_to_the_system(monkeypatch):
    from engines import shortage
    asked = []
    monkeypatch.setattr(shortage, "give_back", lambda: asked.append(1))
    trainer()
    assert asked == [1]


def test_nothing_of_the_weight_is_kept_for_the_backward_pass():
    layer, kept = TrainedInt8Linear(nn.Linear(64, 96)), []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.shape for t in kept] == [x.shape]


def test_pruned_zeros_stay():
    model = micro.model("llama")
    method, context = registry.build({"method": "q-galore"}), micro.context(model, "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    context.masks[name] = torch.rand_like(model.get_parameter(name)) > 0.5
    model.get_parameter(name).data.mul_(context.masks[name])
    model = method.apply(model, context)
    train(model, method, context, SETTINGS, Limit(steps=4))
    model = method.finish(model, context)
    weight = model.get_parameter(name)
    assert (weight[~context.masks[name]] == 0).all() and float((weight != 0).float().mean()) > 0.4


def test_refusals(monkeypatch):
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="q-galore.rank = 64: .* Choose at most 32"):
        registry.build({"method": "q-galore", "rank": 64}).check(profile)
    from engines.training import distributed
    monkeypatch.setattr(distributed, "current", lambda: object())
    with pytest.raises(RunFailed, match="one process only"):
        trainer()


def test_basis_in_four_bits_spans_nearly_the_same():
    torch.manual_seed(0)
    p, _ = basis(torch.randn(128, 96), 16)
    codes, scale, zero = groupwise.quantize(p, 4)
    again = groupwise.dequantize(codes, scale, zero).view(p.shape)
    assert float((again - p).norm() / p.norm()) < 0.12


def test_grades_has_nothing_to_follow_in_integers():
    model = micro.model("llama")
    method, context = registry.build({"method": "q-galore"}), micro.context(model, "llama")
    model = method.apply(model, context)
    with pytest.raises(RunFailed, match="GradES has nothing to follow: Q-GaLore"):
        train(model, method, context, TrainSettings(lr=5e-3, batch=8, length=micro.LENGTH, switches=(registry.switch("grades"),)), Limit(steps=2))

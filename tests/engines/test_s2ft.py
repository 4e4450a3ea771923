"""S2FT: permutations that change nothing, gradients of the slice alone, what is kept, the way back to the original order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engines import registry
from engines.adaptation import _coupled
from engines.adaptation._adapter import adapters
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.s2ft import Slice, permute
from engines.models import matrices, profile_of
from engines.profile import Batch
from engines.pruning import _shrink
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro

ALL = dict(d_ratio=0.1, u_ratio=0.1, o_ratio=0.5, v_ratio=0.5)


def method(**fields):
    return registry.build({"method": "s2ft", **fields})


def profile(architecture="llama", **changes):
    return profile_of(micro.model(architecture, **changes), "micro", micro.TASKS[architecture])


def test_permuted_channels_compute_the_same():
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(*s, dtype=torch.float64) for s in ((3, 4), (3, 4), (4, 3)))
    x = torch.randn(7, 3, dtype=torch.float64)
    run = lambda: down(F.silu(gate(x)) * up(x))  # noqa: E731
    before, order = run(), torch.tensor([2, 0, 1, 3])
    for layer in (gate, up):
        permute(layer, False, order, out=True)
    permute(down, False, order, out=False)
    assert float((run() - before).detach().abs().max()) < 1e-15


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit"])
def test_a_reordered_model_computes_the_same(architecture):
    model = micro.model(architecture)
    before, weights = micro.logits(model, architecture), {n: p.clone() for n, p in model.named_parameters()}
    a = _coupled.anatomy(profile(architecture), "s2ft")
    assert (a.heads, a.kv_heads) == ((4, 2) if architecture == "llama" else (4, 4))
    heads, channels = torch.arange(a.kv_heads).flip(0), torch.randperm(a.mlp)
    for block in _coupled.blocks(model):
        _coupled.reorder(block, a, heads, channels)
    changed = sum(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert changed >= (8 if architecture == "gpt2" else 14)
    torch.testing.assert_close(micro.logits(model, architecture), before, atol=2e-6, rtol=1e-5)
    for block in _coupled.blocks(model):
        _coupled.reorder(block, a, torch.argsort(heads), torch.argsort(channels))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_order():
    order, start = _coupled.order_of(torch.tensor([1, 4]), torch.tensor([0, 4]), 6)
    assert order.tolist() == [1, 4, 0, 2, 3, 5] and start == 1      # first: 1, 4; second: 4, 0
    assert _coupled.features(torch.tensor([1, 0]), 2).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_the_slice_of_the_dense_one(columns, masked):
    torch.manual_seed(1)
    base = nn.Linear(6, 5)
    mask = torch.rand(5, 6) > 0.4 if masked else None
    dense = base.weight.detach().clone().requires_grad_(True)
    bias = base.bias
    layer = Slice(base.requires_grad_(False), 1, 3, columns=columns, mask=mask)
    x, upstream = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)
    (layer(x) * upstream).sum().backward()
    got, x.grad = x.grad, None
    (F.linear(x, dense, bias) * upstream).sum().backward()
    wanted = dense.grad if mask is None else dense.grad * mask
    torch.testing.assert_close(layer.delta.grad, wanted[:, 1:4] if columns else wanted[1:4])
    torch.testing.assert_close(got, x.grad)
    with torch.no_grad():
        layer.delta.normal_()
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective(), bias), atol=1e-6, rtol=1e-5)


def test_only_the_slice_of_the_input_is_kept():
    layer, kept = Slice(nn.Linear(64, 32).requires_grad_(False), 8, 4, columns=True), []
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t.untyped_storage().nbytes())
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(100, 64, requires_grad=True))
    assert sum(kept) == 100 * 4 * 4


def trained(fields, architecture="llama", steps=3, compute="float32", **settings):
    """(method, context, model before its end, weights before, trainer) after a few steps."""
    model = micro.model(architecture)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    m, context = method(**fields), micro.context(model, architecture)
    context.compute = compute
    model = m.apply(model, context)
    trainer = Trainer(model, m, context, TrainSettings(lr=1e-2, batch=8, length=24, evaluations=1, warmup=0.0, **settings), Limit(steps=steps))
    for _ in range(steps):
        trainer._step()
    return m, context, model.eval(), before, trainer


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_all_outside_the_chosen_units_is_bit_identical(architecture, compute):
    m, context, model, before, trainer = trained(ALL, architecture, compute=compute, precision="bf16" if compute == "bfloat16" else "fp32")
    index = {name: (layer.index, layer.columns) for name, layer in adapters(model)}
    assert len(index) >= 4 and m.footprint(context.profile, Batch(8, 24)).trainable == sum(p.numel() for p in trainer.parameters)
    state = sum(v.numel() for s in trainer.optimizer.state.values() for k, v in s.items() if k != "step")
    assert state == 2 * sum(p.numel() for p in trainer.parameters)
    model = m.finish(model, context)
    for name, p in model.named_parameters():
        if name.split(".")[0] == "classifier":
            continue
        same = p == before[name]
        places, columns = index.get(name.removesuffix(".weight"), ([], True))
        if not name.endswith(".weight") or not places:
            assert same.all(), name
            continue
        dim = int(columns != (architecture == "gpt2"))
        outside = torch.ones(p.shape[dim], dtype=torch.bool)
        outside[places] = False
        assert same.index_select(dim, outside.nonzero().view(-1)).all(), name
        assert (~same).index_select(dim, torch.tensor(places)).any(dim=1 - dim).all(), name


def test_a_step_equals_a_masked_step_of_the_whole_model():
    """One Adam step on the slices, brought back into order, is one Adam step with the gradient masked to those places."""
    m, context, model, before, _ = trained(ALL, steps=1, clip=0.0)
    index = {name: (layer.index, layer.columns) for name, layer in adapters(model)}
    found = m.finish(model, context).state_dict()
    plain = micro.model("llama")
    plain.requires_grad_(False)
    places = {}
    for name, (rows, columns) in index.items():
        weight = plain.get_submodule(name).weight.requires_grad_(True)
        places[name] = torch.zeros_like(weight, dtype=torch.bool)
        places[name][(slice(None), rows) if columns else rows] = True
        weight.register_hook(lambda g, keep=places[name]: g * keep)
    other = micro.context(plain, "llama")
    trainer = Trainer(plain, registry.build({"method": "full"}), other, TrainSettings(lr=1e-2, batch=8, length=24, warmup=0.0, clip=0.0, weight_decay=0.0),
                      Limit(steps=1))
    trainer.optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    trainer.groups = trainer.optimizer.param_groups
    trainer.parameters = [p for g in trainer.groups for p in g["params"]]
    trainer._step()
    for name in places:
        a, b = found[f"{name}.weight"], plain.get_submodule(name).weight
        # Adam's first step has the size of the rate wherever there is a gradient, so the sign of those that are all rounding is left open.
        sure = (trainer.optimizer.state[b]["exp_avg"].abs() > 1e-7) | ~places[name]
        assert float(sure.float().mean()) > 0.99 and float((a - b).detach().abs()[sure].max()) < 1e-5, name
        assert not torch.equal(a, before[f"{name}.weight"])


def test_scores_choose_the_units_they_name():
    model = micro.model("llama")
    layers = model.model.layers
    with torch.no_grad():
        layers[1].mlp.down_proj.weight[:, 7] *= 50
        layers[0].self_attn.o_proj.weight[:, 32:] *= 20        # the second key-value group
    for select in ("weight", "product", "gradient", "activation"):
        m, context = method(d_ratio=1 / 256, o_ratio=0.25, select=select), micro.context(model, "llama")
        a = _coupled.anatomy(context.profile, "s2ft")
        found = m.choose(model, context, a)
        assert sum(len(v["d"]) for v in found.values()) == 1 and sum(len(v["o"]) for v in found.values()) == 1
        if select in ("weight", "product"):
            assert found[1]["d"] == [7] and found[0]["o"] == [1], select
        least = m.replace(subset="smallest").choose(model, context, a)
        assert least != found
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())
    with torch.no_grad():
        layers[0].mlp.up_proj.weight[3] *= 100
    assert method(d_ratio=1 / 256, select="activation").choose(model, micro.context(model, "llama"), a)[0]["d"] == [3]


def test_adapter_file_is_a_lora_in_the_original_order(tmp_path):
    from peft import PeftModel
    model = micro.model("llama")
    m, context = method(**ALL), micro.context(model, "llama", folder=tmp_path)
    model = m.apply(model, context)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.delta.normal_(std=0.05)
    merged = micro.logits(m.finish(model, context), "llama")
    theirs = PeftModel.from_pretrained(micro.model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(micro.logits(theirs, "llama"), merged, atol=1e-4, rtol=1e-4)


def test_masks_of_an_earlier_stage_are_kept():
    model = micro.model("llama")
    context = micro.context(model, "llama")
    for matrix, module in matrices(model):
        keep = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        context.masks[f"{matrix.name}.weight"] = keep
        module.weight.data *= keep
    m = method(**ALL)
    model = m.apply(model, context)
    trainer = Trainer(model, m, context, TrainSettings(lr=1e-2, batch=8, length=24), Limit(steps=2))
    for _ in range(2):
        trainer._step()
    assert any(float(layer.delta.detach().abs().max()) > 0 for _, layer in adapters(model))
    model = m.finish(model, context)
    weights = dict(model.named_parameters())
    assert all((weights[n][~keep] == 0).all() for n, keep in context.masks.items())


def test_budget_and_refusals():
    p = profile()
    a = _shrink.anatomy(p)
    chosen, reasons = method(d_ratio="auto", o_ratio=0.25).fit(p, Budget(trainable=4000))
    assert chosen.counts(a) == dict(d=(4000 - 32 * 64) // 64, u=0, o=1, v=0) and "limit of 4,000" in reasons["d_ratio"]
    with pytest.raises(InputError, match="budget.trainable = 1000: one channel .* train 2,112 parameters"):
        method(d_ratio="auto", o_ratio=0.25).fit(p, Budget(trainable=1000))
    with pytest.raises(InputError, match="s2ft.d_ratio = 0.001: of 256 channels and 4 heads the ratios choose none. Choose at least 0.004"):
        method(d_ratio=0.001).check(p)
    packed = p.__class__(**{**{f: getattr(p, f) for f in p.__dataclass_fields__}, "matrices": ()})
    with pytest.raises(InputError, match="method = .s2ft.: the model has no dense matrices"):
        method().check(packed)


def test_forecast_of_what_is_kept_grows_with_the_chosen_columns():
    p, batch = profile(), Batch(8, 24)
    few, many = (method(d_ratio=d, o_ratio=0.0).footprint(p, batch) for d in (0.1, 0.2))
    tokens = 8 * 24
    assert many.activations - few.activations == 4 * tokens * (int(0.2 * 256) - int(0.1 * 256))
    lora = registry.build({"method": "lora", "rank": 1}).footprint(p, batch)
    assert few.activations < lora.activations and few.optimizer == 8 * few.trainable

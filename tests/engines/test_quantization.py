"""Int8, int4 and GPTQ: grids, kernels, the paper's arithmetic, exact sizes, packed folders in a fresh process."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError, RunFailed
from engines.layers.int4 import (
    Int4Linear,
    _block,
    _columns,
    find_grid,
    pack_bits,
    project,
    quantize_groups,
    storable,
    to_grid,
    unpack_bits,
)
from engines.layers.int8 import FEW, Int8Embedding, Int8Linear, TiedInt8Head, int8_linear, quantize_rows
from engines.models import packed
from engines.profile import Batch
from engines.quantization._sweep import Hessian, sweep, upper_factor
from tests.contract import micro

ROOT = Path(__file__).resolve().parents[2]


def relative(a, b) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# -- grids and bits ------------------------------------------------------------------------------------------
def test_grid_of_the_paper():
    row = torch.tensor([[-0.6, 0.2, 0.9, 0.3]], dtype=torch.float64)
    s, z = find_grid(row, 2, stored=False)
    assert (s.item(), z.item()) == (pytest.approx(0.5), 1)
    assert to_grid(row, s[:, None], z[:, None], 2).tolist() == [[0, 1, 3, 2]]
    assert project(row, s[:, None], z[:, None], 2).tolist() == [[-0.5, 0, 1, 0.5]]
    s, z = find_grid(row, 2, symmetric=True, stored=False)
    assert (s.item(), z.item()) == (pytest.approx(0.6), 2)
    assert to_grid(row, s[:, None], z[:, None], 2).tolist() == [[1, 2, 3, 2]]
    torch.testing.assert_close(project(row, s[:, None], z[:, None], 2), torch.tensor([[-0.6, 0, 0.6, 0]], dtype=torch.float64))


def test_grid_always_holds_zero():
    w = torch.rand(50, 32) + 0.5            # nothing near zero
    for rows in (w, -w, torch.zeros(3, 32)):
        s, z = find_grid(rows, 4)
        assert (project(torch.zeros(len(rows), 1), s[:, None], z[:, None], 4) == 0).all()
        assert torch.isfinite(s).all() and (s > 0).all()


def test_stored_scales_are_exact_products_in_bf16():
    s = storable(torch.rand(5000).pow(4) + 1e-6)
    k = torch.arange(-8, 9)[:, None]
    exact = k * s
    assert torch.equal((k * s).to(torch.bfloat16).float(), exact)


def test_mse_grid_is_no_worse_in_its_own_measure():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    def cost(mse):
        s, z = find_grid(w, 3, mse=mse)
        return (project(w, s[:, None], z[:, None], 3) - w).abs().pow(2.4).sum(1)
    assert (cost(True) <= cost(False) + 1e-9).all() and cost(True).sum() < 0.9 * cost(False).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n", [8, 32, 13])
def test_bits_come_back(bits, n):
    q = torch.randint(0, 2**bits, (5, n), dtype=torch.uint8)
    bytes_ = pack_bits(q, bits)
    assert bytes_.shape == (5, math.ceil(n / 8) * bits)
    assert torch.equal(unpack_bits(bytes_, bits, n), q)


def test_every_layout_of_the_kernel_is_read_back():
    q = torch.randint(0, 16, (112, 96), dtype=torch.int32)
    layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    assert torch.equal(_columns(layout, 112, 96, _block()), q.t().to(torch.uint8))
    assert torch.equal(_columns(layout, 112, 96, None), q.t().to(torch.uint8))   # by a product with the identity


# -- int8 layers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inp", [64, 40, 33])     # 40 and 33: widths at which the fused kernel must not be called
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_at_every_row_count(inp, rows, dtype):
    g = torch.Generator().manual_seed(rows)
    w, x = torch.randn(24, inp, generator=g), torch.randn(rows, inp, generator=g).to(dtype)
    for mode, bound in (("weight-only", 0.006), ("dynamic", 0.02)):
        layer = Int8Linear(inp, 24, True, mode)
        layer.fill(w)
        layer.bias.data = torch.randn(24, generator=g)
        want = F.linear(x.float(), layer.dequantize(), layer.bias)
        got = layer(x.view(1, rows, inp))
        assert got.shape == (1, rows, 24) and got.dtype == dtype
        assert relative(got[0], want) < bound, mode
    assert relative(quantize_rows(w)[0].float() * quantize_rows(w)[1].float()[:, None], w) < 0.012


def test_int8_wide_results_are_cut_and_joined():
    q, s = quantize_rows(torch.randn(70000, 16))
    x = torch.randn(40, 16)
    for mode in ("weight-only", "dynamic"):
        parts = torch.cat([int8_linear(x[i: i + 20], q, s, mode) for i in (0, 20)])
        assert torch.equal(int8_linear(x, q, s, mode), parts)      # a token's result does not depend on its neighbours


def test_int8_keeps_zero_rows_and_outliers():
    w = torch.zeros(4, 16)
    w[1, 3], w[2] = 1e4, 1e-30
    q, s = quantize_rows(w)
    assert torch.isfinite(s).all() and (q[0] == 0).all() and q[1, 3] == 127 and (q[1, :3] == 0).all()


def test_int8_gradient_reaches_the_input():
    layer = Int8Linear(32, 8, False)
    layer.fill(torch.randn(8, 32))
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 32))


def test_int8_embedding_and_tied_head_share_one_table():
    table = Int8Embedding(50, 32, dtype=torch.float32)
    table.fill(torch.randn(50, 32))
    head = TiedInt8Head(table)
    ids = torch.tensor([[3, 7], [49, 0]])
    assert torch.equal(table(ids), table.dequantize()[ids])
    assert not head.state_dict() and relative(head(table(ids)), table(ids) @ table.dequantize().t()) < 0.006
    moved = copy.deepcopy(torch.nn.ModuleList([table, head])).to(torch.bfloat16)
    assert moved[0](ids).dtype == torch.bfloat16 and moved[1]._table[0] is moved[0]


# -- int4 layer ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inp, out, group, bits, symmetric", [
    (64, 40, 32, 4, False), (96, 33, 96, 3, False), (128, 64, 64, 2, True), (256, 16, 256, 4, False), (64, 80, 64, 4, True)])
def test_int4_layer(inp, out, group, bits, symmetric):
    g = torch.Generator().manual_seed(inp)
    w = torch.randn(out, inp, generator=g)
    w[torch.rand(w.shape, generator=g) < 0.5] = 0
    layer = Int4Linear(inp, out, True, group, bits, symmetric)
    layer.fill(*quantize_groups(w, bits, group, symmetric))
    layer.bias.data = torch.randn(out, generator=g)
    value = layer.dequantize()
    assert (value[w == 0] == 0).all() and value.unique().numel() > 4
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for rows in (1, 5, 250):
        x = torch.randn(rows, inp, generator=g)
        for dtype in (torch.float32, torch.bfloat16):
            got = layer(x.to(dtype))
            assert got.dtype == dtype and relative(got, F.linear(x, value, layer.bias)) < 0.012
    assert layer.qweight is None, "at run time only the kernel's layout is held"
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    # A pruned weight is zero inside the kernel too.
    eye = torch.eye(inp, dtype=torch.bfloat16)
    bare = copy.deepcopy(layer)
    bare.bias = None
    assert (bare(eye).t()[w == 0] == 0).all()
    twin = Int4Linear(inp, out, True, group, bits, symmetric)
    twin.load_state_dict(before)
    twin.bias = None
    assert torch.equal(copy.deepcopy(twin).to(torch.bfloat16).float()(x), bare(x))


def test_int4_layer_survives_inference_mode():
    layer = Int4Linear(64, 16, False, 32)
    layer.fill(*quantize_groups(torch.randn(16, 64), 4, 32))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.inference_mode():
        layer(torch.randn(2, 64))
    assert torch.equal(layer.state_dict()["qweight"], state["qweight"])
    layer(torch.randn(2, 64))
    layer.load_state_dict(state)
    assert torch.equal(layer.state_dict()["qweight"], state["qweight"])


# -- GPTQ arithmetic -----------------------------------------------------------------------------------------
def test_gptq_two_columns_by_hand():
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    w = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    u, _, _ = upper_factor(h, 0.0)
    torch.testing.assert_close(u, torch.tensor([[math.sqrt(2 / 3), -1 / math.sqrt(6)], [0.0, math.sqrt(0.5)]], dtype=torch.float64))
    integers = (torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 8.0, dtype=torch.float64))
    found = sweep(w, h, bits=4, grid=integers, damping=0.0, stored=False)
    assert found.dequantize().tolist() == [[0.0, 1.0]]
    delta = w - found.dequantize()
    assert 2 * found.loss.item() == pytest.approx(0.56, abs=1e-12) == float(delta @ h @ delta.t())
    assert float(w @ h @ w.t()) == pytest.approx(0.96)             # what rounding to nearest costs


def _problem(out=6, inp=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(80, inp, dtype=torch.float64, generator=g) @ torch.randn(inp, inp, dtype=torch.float64, generator=g)
    h = Hessian(inp, dtype=torch.float64)
    h.add(x)
    return torch.randn(out, inp, dtype=torch.float64, generator=g), h.matrix


@pytest.mark.parametrize("options", [dict(), dict(group=8), dict(group=8, static_groups=True), dict(act_order=True), dict(group=8, act_order=True),
                                     dict(symmetric=True), dict(bits=3, group=12, mse=True)])
def test_gptq_loss_is_the_quadratic_error_and_blocks_change_nothing(options):
    w, h = _problem()
    found = [sweep(w, h, block=b, stored=False, **{"bits": 4, **options}) for b in (1, 3, 8, 128)]
    for f in found:
        delta = w - f.dequantize()
        quadratic = (delta @ f.damped * delta).sum()
        assert abs(2 * f.loss.sum() - quadratic) / quadratic < 1e-12
        assert torch.equal(f.q, found[0].q) and torch.equal(f.zero, found[0].zero)
        torch.testing.assert_close(f.scale, found[0].scale, rtol=1e-12, atol=0)


def test_gptq_on_a_diagonal_hessian_is_rounding_to_nearest():
    w, _ = _problem()
    h = torch.diag(torch.rand(24, dtype=torch.float64) + 0.1)
    for group in (0, 8):
        q, s, z = quantize_groups(w.float(), 4, group or 24)
        found = sweep(w.float(), h.float(), bits=4, group=group)
        assert torch.equal(found.q.to(torch.uint8), q) and torch.equal(found.scale, s) and torch.equal(found.zero.to(torch.uint8), z)


def test_gptq_beats_rounding_and_keeps_pruned_weights():
    w, h = _problem(16, 64)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    def nearest(v):
        q, scale, zero = (t.double() for t in quantize_groups(v, 3, 32))
        return (q - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    for pruned, options, bound in ((w, {}, 0.6), (w * mask, {"mask": mask}, 0.9)):   # half the columns cannot make up for errors
        value = sweep(pruned, h, bits=3, group=32, **options).dequantize()
        error = [float(((pruned - v) @ h * (pruned - v)).sum()) for v in (value, nearest(pruned))]
        assert error[0] < bound * error[1]
    assert (value[~mask] == 0).all() and (value[mask] != 0).float().mean() > 0.5


def test_gptq_raises_damping_on_too_few_tokens_and_gives_up_on_garbage():
    w, _ = _problem()
    h = Hessian(24, dtype=torch.float64)
    h.add(torch.ones(1, 24, dtype=torch.float64))
    found = sweep(w, h.matrix, bits=4, damping=0.0)
    assert found.damping > 0 and torch.isfinite(found.loss).all()
    with pytest.raises(RunFailed, match="calibration"):
        sweep(w, torch.full((24, 24), float("nan"), dtype=torch.float64), bits=4)


def test_hessian_is_a_mean_over_sequences():
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    h = Hessian(4, dtype=torch.float64)
    h.add(x)
    h.add(y)
    torch.testing.assert_close(h.matrix, (x.t() @ x + y.t() @ y))      # (2 / 2 sequences) times the sum over all tokens


def test_dead_inputs_are_cleared():
    w, h = _problem()
    h[5], h[:, 5] = 0, 0
    assert (sweep(w, h, bits=4).dequantize()[:, 5] == 0).all()


# -- on models -----------------------------------------------------------------------------------------------
CASES = [{"method": "int8"}, {"method": "int8", "mode": "dynamic", "embedding": "keep"}, {"method": "int4"},
         {"method": "int4", "group": 32, "symmetric": True, "embedding": "int8"}, {"method": "gptq", "samples": 4},
         {"method": "gptq", "samples": 4, "bits": 8, "embedding": "int8"},
         {"method": "gptq", "samples": 4, "bits": 3, "group": 0, "act_order": True, "true_sequential": True},
         {"method": "gptq", "samples": 4, "bits": 2, "group": 32, "mse": True}]


def quantized(architecture: str, settings: dict, masks: dict | None = None, seed: int = 0, **changes):
    """(method, model, profile before, context) after the stage."""
    model = micro.model(architecture, seed, **changes)
    profile = models.profile_of(model, "micro", micro.TASKS[architecture])
    method, _ = registry.build(settings).fit(profile, Budget())
    context = micro.context(model, architecture)
    if masks:
        found = dict(model.named_parameters())
        context.masks.update(masks(found))
        with torch.no_grad():
            for name, mask in context.masks.items():
                found[name].mul_(mask)
    return method, method.finish(method.apply(model, context), context).eval(), profile, context


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(str(v) for v in s.values()))
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_forecast_size_is_the_file(architecture, settings, tmp_path):
    method, model, profile, context = quantized(architecture, settings)
    saved = models.save(model, None, tmp_path / "m")
    assert saved["weight_bytes"] == method.footprint(profile, Batch()).result
    figures = method.layers(model, context)
    assert len(figures["bits"]) == len(figures["error"]) == len(profile.matrices)
    assert all(0 < row[2] < 1 for row in figures["error"])


@pytest.mark.parametrize("settings", [{"method": "int8"}, {"method": "int4"}, {"method": "gptq", "samples": 4}], ids=lambda s: s["method"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_pruned_weights_stay_zero(architecture, settings):
    def half(params):
        g = torch.Generator().manual_seed(3)
        return {n: torch.rand(p.shape, generator=g) > 0.5 for n, p in params.items() if "proj" in n and n.endswith("weight") or ".c_" in n and p.dim() == 2}
    _, model, _, context = quantized(architecture, settings, half)
    layers = packed.packed_layers(model)
    for name, mask in context.masks.items():
        layer = layers[name.removesuffix(".weight")]
        mask = mask.t() if layer.conv1d else mask
        assert (layer.dequantize()[~mask] == 0).all() and (layer.dequantize()[mask] != 0).float().mean() > 0.5


def test_gptq_beats_rounding_on_a_model():
    error = {}
    for settings in ({"method": "int4", "group": 64}, {"method": "gptq", "samples": 32, "group": 64}):
        _, model, _, context = quantized("llama", {**settings, "embedding": "keep"})
        plain = micro.model("llama")
        batch = torch.cat([b["input_ids"] for b in context.calibration(32)])
        with torch.no_grad():
            error[settings["method"]] = relative(model(batch).logits, plain(batch).logits)
    assert error["gptq"] < 0.85 * error["int4"], error


def test_gptq_follows_the_order_of_the_blocks():
    """The second block's Hessian comes from the first block as quantized, not from the model as it was."""
    import engines.quantization._sweep as core
    seen = []
    original = core.Hessian.add
    def spy(self, x, sequences=1):
        seen.append(x.detach().clone())
        original(self, x, sequences)
    core.Hessian.add = spy
    try:
        quantized("llama", {"method": "gptq", "samples": 2, "bits": 2, "skip": "o_proj,k_proj,v_proj,gate_proj,up_proj,down_proj"})
    finally:
        core.Hessian.add = original
    plain = micro.model("llama")
    inputs = []
    plain.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    context = micro.context(plain, "llama")
    with torch.no_grad():
        plain(torch.cat([b["input_ids"] for b in context.calibration(2)]))
    second = seen[-1].reshape(inputs[0].shape)
    assert 1e-3 < relative(second, inputs[0]) < 1.0


def test_int8_reaches_thirty_percent_also_with_a_large_tied_table(tmp_path):
    model = micro.model("llama", vocab_size=4000)
    fp32 = models.save(model, None, tmp_path / "a")["weight_bytes"]
    profile = models.profile_of(model, "micro", "causal-lm")
    context = micro.context(model, "llama")
    method, reasons = registry.build({"method": "int8"}).fit(profile, Budget())
    assert method.embedding == "int8" and "%" in reasons["embedding"]
    small = models.save(method.apply(model, context), None, tmp_path / "b")["weight_bytes"]
    assert small / fp32 <= 0.30


# -- choices and refusals ------------------------------------------------------------------------------------
def _profile(**changes):
    return models.profile_of(micro.model("llama", **changes), "micro", "causal-lm")


def test_levers_follow_the_size():
    profile = _profile(vocab_size=400)
    for id in ("int8", "int4", "gptq"):
        method = registry.get(id)(**({"embedding": "auto"} if id == "gptq" else {}))
        free, _ = method.fit(profile, Budget())
        assert "auto" not in free.settings().values()
        size = free.footprint(profile, Batch()).result
        kept, reasons = method.fit(profile, Budget(size_mb=size / 1e6))
        assert kept == free
        if id == "gptq":
            tight, reasons = method.fit(profile, Budget(size_mb=(size - 1) / 1e6))
            assert tight.footprint(profile, Batch()).result < size and any("MB" in r for r in reasons.values())
    method = registry.get("gptq")(embedding="auto")
    two = method.replace(bits=2, embedding="int8", group=64).footprint(profile, Batch()).result
    assert method.fit(profile, Budget(size_mb=two / 1e6))[0].bits == 2
    for id in ("int8", "int4", "gptq"):
        with pytest.raises(InputError, match="needs at least .* Raise the limit"):
            registry.get(id)().fit(profile, Budget(size_mb=0.001))


def test_a_width_that_no_group_divides_is_refused_with_the_remedy():
    odd = _profile(intermediate_size=144)
    for id in ("int4", "gptq"):
        with pytest.raises(InputError, match="skip: down_proj"):
            registry.get(id)().check(odd)
        registry.get(id)(skip="down_proj").check(odd)
        with pytest.raises(InputError, match="Set group to 32"):
            registry.get(id)(group=64).check(_profile(intermediate_size=96))
    registry.get("gptq")(bits=8).check(odd)
    registry.get("int8")().check(odd)
    with pytest.raises(InputError, match="no layer has this name"):
        registry.get("int8")(skip="nonsense").check(odd)
    with pytest.raises(InputError, match="leaves no layer"):
        registry.get("int8")(skip=",".join(odd.roles)).check(odd)


def test_a_packed_model_is_not_packed_again():
    _, model, _, _ = quantized("llama", {"method": "int8"})
    again = models.profile_of(model, "micro", "causal-lm")
    with pytest.raises(InputError, match="packed already"):
        registry.get("int4")().check(again)


def test_skipped_layers_stay_dense(tmp_path):
    method, model, profile, _ = quantized("llama", {"method": "int4", "skip": "down_proj,model.layers.0.self_attn.q_proj"})
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[1].self_attn.q_proj, Int4Linear)
    assert models.save(model, None, tmp_path / "m")["weight_bytes"] == method.footprint(profile, Batch()).result


# -- a fresh process -----------------------------------------------------------------------------------------
LOADER = """
import json, sys, torch
from engines import models
from tests.contract import micro
out = {}
for folder, architecture, dtype in json.loads(sys.argv[1]):
    model = models.load(folder, dtype=dtype).model
    with torch.inference_mode():
        out[folder] = model(**micro.inputs(architecture)).logits.float().flatten().tolist()
print(json.dumps(out))
"""


def test_a_fresh_process_loads_packed_folders_bit_equal(tmp_path):
    wanted, jobs = {}, []
    cases = [("llama", CASES[0], "float32"), ("llama", CASES[3], "stored"), ("gpt2", CASES[6], "float32"), ("bert", CASES[5], "stored"),
             ("vit", CASES[2], "float32"), ("llama", CASES[4], "bfloat16")]
    for i, (architecture, settings, dtype) in enumerate(cases):
        _, model, _, _ = quantized(architecture, settings)
        folder = str(tmp_path / str(i))
        models.save(model, micro.tokenizer(architecture), folder)
        if dtype != "float32":
            model = micro.cast(model, torch.bfloat16)
        with torch.inference_mode():
            wanted[folder] = model(**micro.inputs(architecture)).logits.float().flatten().tolist()
        jobs.append((folder, architecture, dtype))
    done = subprocess.run([sys.executable, "-c", LOADER, json.dumps(jobs)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, architecture, dtype in jobs:
        assert found[folder] == wanted[folder], (architecture, dtype)


def test_a_damaged_description_is_refused(tmp_path):
    _, model, _, _ = quantized("llama", {"method": "int8"})
    description = packed.pack_description(model)
    with pytest.raises(InputError, match="Update the workbench"):
        packed.rebuild(micro.model("llama"), {**description, "version": 99})
    description["layers"]["model.layers.77.q"] = description["layers"].pop("model.layers.0.self_attn.q_proj")
    with pytest.raises(InputError, match="damaged"):
        packed.rebuild(micro.model("llama"), description)

"""Mixed precision and ranks by gradient: exact totals, sensible choices, decisions that outlive a pause."""

import json

import pytest
import torch

from engines import models, registry
from engines.adaptation import _ranks
from engines.budget import Budget
from engines.errors import InputError
from engines.models import matrices, packed, profile_of
from engines.profile import Batch
from engines.quantization import _total
from tests.contract import micro

BATCH = Batch(rows=4, length=16)


def profile(model, architecture="llama"):
    return profile_of(model, "micro", micro.TASKS[architecture])


def packed_bits(model) -> dict:
    return {name: layer.bits for name, layer in packed.packed_layers(model).items() if layer.kind in ("int8", "int4")}


def test_levels_of_one_shape_are_evenly_spaced():
    for m in profile(micro.model("gpt2"), "gpt2").matrices:
        for levels in _total.LEVELS.values():
            sizes = [sum(t.size * (2 if t.dtype == "bfloat16" else 1) for t in _total.tensors(m, b, 32)) for b in levels]
            assert len({b - a for a, b in zip(sizes, sizes[1:])}) == 1 and sizes == sorted(sizes)


def test_spread_stays_below_the_average():
    rows = profile(micro.model("llama")).matrices
    whole = sum(m.size for m in rows)
    for bits in (4.0, 4.3, 5.0, 6.5, 7.99, 8.0):
        found = _total.spread(rows, (4, 8), bits)
        mean = sum((4, 8)[c] * m.size for c, m in zip(found, rows)) / whole
        assert bits - 4 * max(m.size for m in rows) / whole < mean <= bits + 1e-9


@pytest.mark.parametrize("by", _total.BY)
def test_size_is_as_forecast_whatever_is_chosen(by, tmp_path):
    sizes = set()
    for seed in (0, 1, 2):
        model = micro.model("gpt2", seed)
        context = micro.context(model, "gpt2", seed=seed)
        method = registry.get("mixed")(bits=5.3, by=by, group=32, search_tokens=48, generations=4, embedding="keep")
        forecast = method.footprint(profile(model, "gpt2"), BATCH).result
        model = method.finish(method.apply(model, context), context)
        saved = models.save(model, micro.tokenizer("gpt2"), tmp_path / f"{by}{seed}")
        assert saved["weight_bytes"] == forecast
        sizes.add(tuple(packed_bits(model).values()))
        # The promise survives a load, so a run that goes on in another process keeps it.
        again = models.load(tmp_path / f"{by}{seed}", dtype="stored").model
        assert packed_bits(again) == packed_bits(model)
        assert models.save(again, micro.tokenizer("gpt2"), tmp_path / "again")["weight_bytes"] == forecast
    assert len(sizes) > 1, "the choices differ, the size does not"


def sensitive(model):
    """One matrix with outliers in every group: four bits ruin it."""
    with torch.no_grad():
        for m, module in matrices(model):
            if (m.layer, m.role) == (1, "up_proj"):
                module.weight[:, ::32] *= 60
    return model


@pytest.mark.parametrize("by", _total.BY)
def test_the_matrix_that_four_bits_ruin_gets_eight(by):
    model = sensitive(micro.model("llama"))
    context = micro.context(model, "llama")
    method = registry.get("mixed")(bits=5.0, by=by, group=32, search_tokens=96, generations=15)
    model = method.apply(model, context)
    found = packed_bits(model)
    assert found["model.layers.1.mlp.up_proj"] == 8
    dense = profile(micro.model("llama"))
    plan = method._plan(dense)
    assert sum(plan.bytes[name][plan.levels.index(b)] for name, b in found.items()) == plan.total
    assert {(layer, role): bits for layer, role, bits in method.layers(model, context)["bits"]}[(1, "up_proj")] == 8


def test_auto_takes_the_most_bits_that_fit():
    p = profile(micro.model("llama"))
    cls = registry.get("mixed")
    for share in (0.2, 0.5, 0.9):
        low, high = (cls(bits=b, group=64, embedding="int8").footprint(p, BATCH).result for b in (4.0, 8.0))
        limit = (low + share * (high - low)) / 1e6
        method, reasons = cls(embedding="int8").fit(p, Budget(size_mb=limit))
        assert method.footprint(p, BATCH).result <= limit * 1e6 and "stays under" in reasons["bits"]
        wider = min(8.0, method.bits + 0.5)
        assert method.replace(bits=wider).footprint(p, BATCH).result > limit * 1e6 or method.bits == 8
    with pytest.raises(InputError, match="needs at least"):
        cls().fit(p, Budget(size_mb=0.001))
    with pytest.raises(InputError, match="average lies between 2 and 4"):
        cls(bits=5.0, levels="2,3,4").fit(p, Budget())
    many = cls(bits=3.5, levels="2,3,4").footprint(p, BATCH).result
    assert many < cls(bits=4.0).footprint(p, BATCH).result


# -- ranks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", micro.ARCHITECTURES)
def test_mean_gradients_are_those_of_autograd_and_leave_no_trace(architecture):
    from engines.training.loss import task_loss
    model = micro.model(architecture)
    context = micro.context(model, architecture)
    found = [m for m, _ in matrices(model)][:4]
    got = _ranks.mean_gradients(model, context, found)
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and set(got) == {m.name for m in found}
    m, module = next((m, x) for m, x in matrices(model) if m.name == found[1].name)
    total = 0.0
    for step in range(_ranks.BATCHES):
        for batch in context.data.batch(step, _ranks.ROWS):
            total = total + torch.autograd.grad(task_loss(model, batch, context.task), module.weight)[0]
    wanted = total / _ranks.BATCHES
    assert got[m.name].shape == (m.out, m.inp)
    torch.testing.assert_close(got[m.name], wanted.t() if m.conv1d else wanted, rtol=1e-4, atol=1e-7)


def test_ranks_differ_keep_the_total_and_outlive_a_pause(tmp_path):
    model = micro.model("llama")
    context = micro.context(model, "llama", folder=tmp_path)
    found = [m for m, _ in matrices(model)]
    ranks = _ranks.by_gradient(model, context, found, 8)
    assert sum(ranks[m.name] * (m.out + m.inp) for m in found) == 8 * sum(m.out + m.inp for m in found)
    assert len(set(ranks.values())) > 1 and all(4 <= r <= 16 for r in ranks.values())
    told = next(data for kind, _, data in context.reporter.events if kind == "choice")
    assert told["found"] < told["uniform"]
    # On a resume the decision is read, not made again.
    other = {name: 8 for name in ranks}
    (tmp_path / "ranks-0.json").write_text(json.dumps(other))
    context.resuming = True
    assert _ranks.by_gradient(model, context, found, 8) == other


def test_the_saved_adapter_has_each_matrix_its_own_rank(tmp_path):
    from safetensors.torch import load_file
    model = micro.model("llama")
    method = registry.get("lora")(rank=6, ranks="gradient")
    count = method.footprint(profile(model), BATCH).trainable
    context = micro.context(model, "llama", folder=tmp_path)
    model = method.apply(model, context)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    ranks = {(layer, role): r for layer, role, r in method.layers(model, context)["rank"]}
    assert len(set(ranks.values())) > 1
    method.finish(model, context)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, rank in config["rank_pattern"].items():
        assert state[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank and config["alpha_pattern"][name] == 2 * rank

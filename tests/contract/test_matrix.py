"""Every registered method on every architecture: what it promises before is what is found after.

A new method is covered by being registered; ``trial.VARIANTS`` can name further settings of it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError, StopRequested
from engines.method import AUTO
from engines.models import packed
from engines.training import checkpoint
from engines.training.loop import Limit
from engines.training.stage import train
from tests.contract import micro
from tests.contract.trial import BATCH, build, cases, name, served, settings, stage, trial

ROOT = Path(__file__).resolve().parents[2]
MATRIX = [pytest.param(case, a, id=f"{name(case)}-{a}") for a in micro.ARCHITECTURES for case in cases() if served(case, a)]
TRAINED = [p for p in MATRIX if build(p.values[0]).card.trains]
LEVERS = [pytest.param(id, a, row["name"], row["lever"], id=f"{id}-{row['name']}-{a}")
          for id, cls in registry.methods().items() for row in cls.hyperparameters() if row["lever"] in ("trainable", "size_mb")
          for a in micro.ARCHITECTURES if served((id, ()), a)]
matrix = pytest.mark.parametrize("case, architecture", MATRIX)
trained = pytest.mark.parametrize("case, architecture", TRAINED)


def close(a, b, bound: float) -> None:
    assert a.shape == b.shape and torch.isfinite(a).all()
    error = float((a - b).norm() / b.norm())
    assert error <= bound, f"relative difference {error:.2e}"


# -- before training -----------------------------------------------------------------------------------------
@matrix
def test_forecast_is_complete_and_torch_free_numbers(case, architecture):
    t = trial(case, architecture)
    for key, value in t.footprint.__dict__.items():
        assert isinstance(value, (int, float)) and math.isfinite(value) and value >= 0, key
    assert t.footprint.weights > 0 and t.footprint.result > 0 and t.footprint.result_parameters > 0
    assert AUTO not in t.method.settings().values(), "fit() leaves nothing to choose"


@trained
def test_starts_where_the_model_was(case, architecture):
    t = trial(case, architecture)
    if t.method.card.family == "adaptation" and getattr(t.method, "identity", True):
        close(t.logits_applied, t.logits_before, 1e-5)


@trained
def test_forecast_of_trainable_parameters_is_exact(case, architecture):
    t = trial(case, architecture)
    if getattr(t.method, "exact_count", True):
        assert t.footprint.trainable == t.trainable
    else:       # data or weights decide; told is the most that it can be
        assert 0 < t.trainable <= t.footprint.trainable


# -- training ------------------------------------------------------------------------------------------------
@trained
def test_loss_falls_and_stays_finite(case, architecture):
    t = trial(case, architecture)
    losses = [v for _, v in t.recorder.series["loss"]]
    assert len(losses) == t.result.steps and all(map(math.isfinite, losses))
    # The penalty and the pruning of a gradual schedule may lift single steps, so ends are compared as means.
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5]), losses
    assert all(torch.isfinite(p).all() for p in t.model.parameters())


@trained
def test_merged_equals_unmerged(case, architecture):
    t = trial(case, architecture)
    close(t.logits, t.logits_unmerged, 1e-4)
    assert not any("lora_" in n for n, _ in t.model.named_parameters())


@trained
def test_resume_is_bit_identical(case, architecture, tmp_path):
    if architecture in ("gpt2", "vit") and case[1]:
        pytest.skip("variants resume on two architectures")

    def go(folder, pause_at=None, resume=False):
        model = micro.model(architecture)
        profile = models.profile_of(model, "micro", micro.TASKS[architecture])
        method, _ = build(case).fit(profile, Budget())
        context = micro.context(model, architecture, folder=folder)
        context.total_steps, context.resuming = 8, resume
        context.checkpoint = checkpoint.latest(folder / "checkpoints") if resume else None
        torch.manual_seed(0)
        model = method.apply(model, context)
        if pause_at is not None:
            context.reporter.wants = lambda: "pause" if context.step >= pause_at else None
        losses = context.reporter.series
        try:
            train(model, method, context, settings(method), Limit(steps=8), resume=checkpoint.latest(folder / "checkpoints") if resume else None)
        except StopRequested:
            return losses["loss"], None
        return losses["loss"], method.finish(model, context).state_dict()

    straight, wanted = go(tmp_path / "a")
    first, nothing = go(tmp_path / "b", pause_at=3)
    torch.manual_seed(12345)      # a resumed process has another random state until the checkpoint brings its own
    rest, found = go(tmp_path / "b", resume=True)
    assert nothing is None and len(first) == 3 and first + rest == straight
    assert wanted.keys() == found.keys()
    for key in wanted:
        assert torch.equal(wanted[key], found[key]), key


# -- the result ----------------------------------------------------------------------------------------------
@matrix
def test_outputs_are_finite(case, architecture):
    t = trial(case, architecture)
    assert torch.isfinite(t.logits).all()
    assert not math.isclose(float(t.logits.std()), 0.0)


@matrix
def test_forecast_of_the_stored_size_is_exact(case, architecture):
    t = trial(case, architecture)
    assert t.saved["weight_bytes"] == t.footprint.result
    if t.method.card.packs:
        assert t.footprint.result < 0.5 * t.profile.stored_bytes


@matrix
def test_figures_per_layer_equal_what_is_stored(case, architecture):
    t = trial(case, architecture)
    places = {(m.layer, m.role): m for m in t.profile.matrices}
    assert len(places) == len(t.profile.matrices)
    stored = t.model.state_dict()

    def rows(key):
        for layer, role, value in t.figures.get(key, []):
            yield places[(layer, role)], value

    for m, value in rows("sparsity"):
        weight = stored[f"{m.name}.weight"]
        assert value == pytest.approx(float((weight == 0).double().mean()), abs=1e-7), m.name
        if f"{m.name}.weight" in t.context.masks:
            assert (weight[~t.context.masks[f"{m.name}.weight"]] == 0).all()
    for m, value in rows("bits"):
        assert stored[f"{m.name}.qweight"].numel() * 8 == value * m.size, m.name
    for m, value in rows("rank"):
        delta = (stored[f"{m.name}.weight"] - t.before[f"{m.name}.weight"]).double()
        spectrum = torch.linalg.svdvals(delta)
        if getattr(t.method, "dora", False):
            continue      # its rescaling of the whole matrix has full rank
        counted = int((spectrum > 1e-5 * spectrum[0]).sum()) if spectrum[0] > 0 else 0
        assert counted <= value, (m.name, counted, value)
    for m, value in rows("kept"):
        assert stored[f"{m.name}.weight"].numel() == round(value * m.size), m.name


@matrix
def test_sparsity_as_forecast(case, architecture):
    t = trial(case, architecture)
    if t.method.card.masks:
        zeros = sum(int((module.weight == 0).sum()) for _, module in models.matrices(t.model))
        assert zeros / t.profile.block_parameters == pytest.approx(t.footprint.sparsity, abs=1e-6)
        assert set(t.context.masks) == {f"{m.name}.weight" for m in t.profile.matrices}
    else:
        assert t.footprint.sparsity == 0


@matrix
def test_nothing_packed_remains_trainable(case, architecture):
    t = trial(case, architecture)
    if t.method.card.packs:
        layers = packed.packed_layers(t.model)
        assert len([m for m in layers.values() if m.kind in ("int8", "int4")]) >= len(t.profile.matrices)
        assert not any(p.requires_grad for p in t.model.parameters())
    else:
        assert not packed.packed_layers(t.model)


# -- a fresh process -----------------------------------------------------------------------------------------
LOADER = """
import json, sys, torch
from safetensors.torch import save_file
from engines import models
from tests.contract import micro
out = {}
for key, folder, architecture in json.loads(sys.stdin.read()):
    try:
        out[key] = micro.logits(models.load(folder).model, architecture).contiguous()
    except Exception as e:
        print(key, type(e).__name__, e, file=sys.stderr)
save_file(out, sys.argv[1])
"""


@pytest.fixture(scope="module")
def fresh(request, tmp_path_factory):
    """Logits of every chosen result as another process computes them: one process, because its imports cost seconds."""
    from safetensors.torch import load_file
    chosen = {i.callspec.id for i in request.session.items if getattr(i, "originalname", "") == "test_a_fresh_process_computes_the_same"}
    jobs = [(p.id, str(trial(*p.values).folder), p.values[1]) for p in MATRIX if p.id in chosen]
    target = tmp_path_factory.mktemp("fresh") / "logits.safetensors"
    done = subprocess.run([sys.executable, "-c", LOADER, str(target)], input=json.dumps(jobs), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(target), done.stderr


@matrix
def test_a_fresh_process_computes_the_same(case, architecture, fresh):
    found, said = fresh
    t, key = trial(case, architecture), f"{name(case)}-{architecture}"
    assert key in found, said[-2000:]
    # Weights come back bit by bit; a shape that the memory aligns otherwise may round the last bit of a product.
    close(found[key], t.logits, 1e-6)


# -- levers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("id, architecture, field, limit", LEVERS)
def test_lever_obeys_the_budget(id, architecture, field, limit):
    profile = models.profile_of(micro.model(architecture), "micro", micro.TASKS[architecture])
    method = build((id, ((field, AUTO),)))
    free, _ = method.fit(profile, Budget())

    def use(m):
        found = m.footprint(profile, BATCH)
        return found.trainable if limit == "trainable" else found.result

    obeyed = 0
    for share in (1.0, 0.9, 0.7, 0.5, 0.3, 0.001):
        allowed = max(2, int(use(free) * share))
        budget = Budget(trainable=allowed) if limit == "trainable" else Budget(size_mb=allowed / 1e6)
        try:
            chosen, reasons = method.fit(profile, budget)
        except InputError as refused:
            assert refused.field.startswith(("budget.", f"{id}.")) and refused.remedy
            assert share < 1.0, "what it takes without a limit must be allowed by a limit of that size"
            continue
        assert getattr(chosen, field) != AUTO and reasons.get(field), "every choice has its reason"
        assert use(chosen) <= allowed
        obeyed += 1
    assert obeyed >= 1


# -- stages in order -----------------------------------------------------------------------------------------
MASKING = [id for id, cls in registry.methods().items() if cls.card.masks]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("id", MASKING)
def test_pruned_zeros_outlive_recovery_and_quantization(id, architecture, tmp_path):
    t = stage((id, ()), architecture)
    model, masks = t.model, t.context.masks
    for follower in ("lora", "full", "gptq"):
        profile = models.profile_of(model, "micro", t.task)
        method, _ = build((follower, ())).fit(profile, Budget())
        context = micro.context(model, architecture)
        context.masks, context.total_steps = masks, 4
        model = method.apply(model, context)
        if method.card.trains:
            train(model, method, context, settings(method), Limit(steps=4))
        model = method.finish(model, context).eval()
        layers = packed.packed_layers(model)
        for path, mask in masks.items():
            layer = layers.get(path.removesuffix(".weight"))
            weight = dict(model.named_parameters())[path] if layer is None else layer.dequantize()
            mask = mask.t() if layer is not None and layer.conv1d else mask
            assert (weight[~mask] == 0).all(), (follower, path)
    saved = models.save(model, micro.tokenizer(architecture), tmp_path / "m")
    assert saved["weight_bytes"] < 0.3 * profile.stored_bytes

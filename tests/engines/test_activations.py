"""Bytes of activations counted from shapes against what autograd really keeps."""

import contextlib

import pytest
import torch

from engines import activations, registry
from engines.models import profile_of
from engines.profile import Batch
from tests.engines._micro import ARCHITECTURES, TASKS, VOCAB, context_of, micro

ROWS, LENGTH = 4, 48


def kept_bytes(model, architecture: str, compute: str) -> int:
    """Bytes of distinct storages saved for backward by the body of a model, weights and their casts left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(s) for p in model.parameters() for s in (p.shape, p.shape[::-1])}
    seen = {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in weights and not (t.dtype == torch.bfloat16 and tuple(t.shape) in shapes):
            seen[s.data_ptr()] = (s.nbytes(), t)      # holding t keeps the address from being used again
        return t
    if architecture == "vit":
        batch = dict(pixel_values=torch.randn(ROWS, 1, 16, 16))
    else:
        batch = dict(input_ids=torch.randint(0, VOCAB, (ROWS, LENGTH)))
    body = getattr(model, model.base_model_prefix)
    model.train()
    autocast = torch.autocast("cpu", torch.bfloat16) if compute == "bfloat16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        body(**batch)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compute", ("float32", "bfloat16"))
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_full_training(architecture, compute, dropout):
    if architecture == "vit" and dropout or architecture == "llama" and dropout:
        pytest.skip("no dropout in this architecture's defaults")
    sizes = dict(n_layer=4, n_embd=64) if architecture == "gpt2" else dict(num_hidden_layers=4, hidden_size=64, intermediate_size=160)
    model = micro(architecture, dropout=dropout, **sizes)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    profile = profile_of(model, "micro", TASKS[architecture])
    measured = kept_bytes(model, architecture, compute)
    counted = activations.train_bytes(profile, Batch(rows=ROWS, length=LENGTH, compute=compute))
    assert counted == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compute", ("float32", "bfloat16"))
@pytest.mark.parametrize("targets", ("all-linear", "attention"))
def test_lora(architecture, compute, targets):
    sizes = dict(n_layer=4, n_embd=64) if architecture == "gpt2" else dict(num_hidden_layers=4, hidden_size=64, intermediate_size=160)
    model = micro(architecture, **sizes)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    profile = profile_of(model, "micro", TASKS[architecture])
    method = registry.get("lora")(rank=4, targets=targets)
    model = method.apply(model, context_of(model, architecture, compute=compute))
    measured = kept_bytes(model, architecture, compute)
    counted = method.footprint(profile, Batch(rows=ROWS, length=LENGTH, compute=compute)).activations
    assert counted == pytest.approx(measured, rel=0.15)


def test_checkpointing_fewer_heads_and_chunks_count_less():
    model = micro("llama")
    profile = profile_of(model, "micro", "causal-lm")
    plain, less = Batch(8, 64), Batch(8, 64, checkpointing=True)
    assert activations.train_bytes(profile, less) < activations.train_bytes(profile, plain)
    small = registry.get("structured")(heads=0.5, channels=0.5).result_profile(profile)
    assert activations.block_bytes(small, plain) < activations.block_bytes(profile, plain)
    assert activations.logits_bytes(profile, Batch(64, 64), chunk=256) < activations.logits_bytes(profile, Batch(64, 64), chunk=0)

"""A later stage tried on one block, so that a run under minutes knows early what it must set aside for it."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass

from engines.evaluation import sample_seconds
from engines.lazy import torch
from engines.reporter import Recorder

LARGEST = 256e6
"""Bytes of a model with one block above which it is not copied."""
MOST = 12.0
"""A ratio of evaluation seconds beyond this is a disturbed measurement."""


@dataclass(frozen=True)
class Trial:
    """``seconds`` of the stage on the whole model, and how many times as long an evaluation takes after it."""

    seconds: float
    ratio: float


def one_block(model):
    """A copy of ``model`` whose list of blocks ends after the first; None where it would be large or has no blocks.

    Returns:
        (the copy, its block, number of blocks of the model), or None.
    """
    from engines.models import matrices
    from engines.pruning._blocks import block_list
    found = matrices(model)
    if not found:
        return None
    blocks = block_list(model, found)
    if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) < 2:
        return None
    inside = {id(p) for block in blocks[1:] for p in block.parameters()}
    if sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside) > LARGEST:
        return None
    whole = list(blocks)
    try:
        del blocks[1:]
        small = copy.deepcopy(model)
    finally:
        blocks.extend(whole[len(blocks):])
    for name in ("num_hidden_layers", "n_layer"):
        if getattr(small.config, name, None) is not None:
            setattr(small.config, name, 1)
    return small, block_list(small, matrices(small))[0], len(whole)


def parts(model, block, data, **how) -> tuple[float, float]:
    """Seconds of scoring one batch: inside ``block``, and outside."""
    inside, began = [0.0], [0.0]

    def before(*_):
        began[0] = time.perf_counter()

    def after(*_):
        inside[0] = time.perf_counter() - began[0]

    handles = [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    found = []
    try:
        for _ in range(2):      # the quicker of two: another program's burst would be taken for the model's
            whole = sample_seconds(model, data, **how)
            found.append((inside[0], max(0.0, whole - inside[0])))
    finally:
        for handle in handles:
            handle.remove()
    return min(f[0] for f in found), min(f[1] for f in found)


def rehearse(model, method, context, **how) -> Trial | None:
    """Time ``method``, which does not train, on a copy of ``model`` with one block.

    Args:
        context: that of the stage about to begin; a copy of it with a reporter of its own is used.
        how: precision and loss_chunk of evaluations.

    Returns:
        the figures for all blocks, or None where it cannot be tried.
    """
    from engines.models import profile_of
    made = one_block(model)
    if made is None:
        return None
    small, block, count = made
    how = dict(how, device=context.device)
    profile = profile_of(small, context.profile.source, context.task)
    known = {name for name, _ in small.named_parameters()}
    own = dataclasses.replace(context, profile=profile, reporter=Recorder(), folder=None, state={},
                              masks={k: v for k, v in context.masks.items() if k in known})
    inside, outside = parts(small, block, context.data, **how)
    t0 = time.perf_counter()
    small = method.finish(method.apply(small, own), own)
    took = time.perf_counter() - t0
    small.eval()
    # The block is another object where a method replaces it.
    block = small.get_submodule(next(n for n, m in small.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 1))[0]
    packed_inside, packed_outside = parts(small, block, context.data, **how)
    before, after = outside + count * inside, packed_outside + count * packed_inside
    return Trial(took * count, min(MOST, max(1 / MOST, after / before)) if before > 0 else 1.0)

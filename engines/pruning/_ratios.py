"""Sparsity of each matrix found by measurement, for the pruning methods: one knapsack (rd) or a search (evolution).

One level is the same number of weights in every matrix, so that moving zeros from one to another keeps the total exactly.
"""

from __future__ import annotations

import time

from engines import activations
from engines.errors import InputError
from engines.lazy import torch
from engines.method import hyper
from engines.profile import BYTES, Batch

SEARCHED = ("rd", "evolution")
RATIOS = ("Ratios by rd (RD-Prune) and evolution (EvoPress) move equal numbers of weights between matrices, measure on some thousand tokens "
          "instead of the papers' images or half a million, use this method's own scores instead of OBS, and fall back to equal ratios "
          "where the found ones diverge more from the dense model.")
"""What a card says of them."""
REACH = 8
"""Levels on each side of the uniform one."""
MOST = 0.99
"""Share of a matrix that may become zero: an empty one would cut the path through it."""
POOL = 8
"""Calibration tokens to draw from, in batches of the largest kind."""
CHECK = 1_000_003
"""Number of the batch on which the found ratios are compared with the uniform ones."""


# -- the fields of a method --------------------------------------------------------------------------------------
def step_field():
    return hyper(0.05, "rd, evolution: one level, as a share of the average matrix", low=0.005, high=0.5, advanced=True)


def tokens_field():
    return hyper(1024, "rd, evolution: calibration tokens of one measurement (the search's first choice takes a quarter)", low=16,
                 high=1 << 20, log=True, unit="tokens", advanced=True)


def generations_field():
    return hyper(30, "evolution: generations", low=1, high=10000, log=True, advanced=True)


def offspring_field():
    return hyper(8, "evolution: candidates in a generation", low=2, high=1024, log=True, advanced=True)


def check(method, profile) -> None:
    """Refuse a fixed pattern beside ratios that are sought, and a model with one matrix only.

    Raises:
        InputError: as said.
    """
    if method.distribution not in SEARCHED:
        return
    id = method.card.id
    if method.pattern != "unstructured":
        raise InputError(f"{id}.distribution", method.distribution, f"the pattern {method.pattern} fixes the same share everywhere",
                         "Set distribution to uniform, or pattern to unstructured")
    if len(profile.matrices) < 2:
        raise InputError(f"{id}.distribution", method.distribution, "there is only one matrix", "Set distribution to uniform")


# -- levels --------------------------------------------------------------------------------------------------
def anchors(wanted: list[int], least: list[int], most: list[int]) -> list[int]:
    """``wanted`` counts moved inside their bounds with the total kept; all at a bound when the total lies outside of them."""
    found = [min(max(w, a), b) for w, a, b in zip(wanted, least, most)]
    gap = sum(wanted) - sum(found)
    room = [b - f if gap > 0 else f - a for f, a, b in zip(found, least, most)]
    free, sign = sum(room), 1 if gap > 0 else -1
    move = abs(gap) if abs(gap) < free else free
    if not move:
        return found
    part = [move * r // free for r in room]
    left = move - sum(part)
    for i, r in enumerate(room):
        if left and part[i] < r:
            part[i] += 1
            left -= 1
    return [f + sign * p for f, p in zip(found, part)]


def zero_levels(sizes: list[int], base: list[int], least: list[int], step: float) -> tuple[list[list[int]], list[int]]:
    """Zeros of each matrix at each of its levels, most zeros first, and the index of the level with ``base`` zeros."""
    unit = max(1, round(step * sum(sizes) / len(sizes)))
    levels, reference = [], []
    for n, b, low in zip(sizes, base, least):
        row = [b + k * unit for k in range(REACH, -REACH - 1, -1) if k == 0 or low <= b + k * unit <= int(MOST * n)]
        levels.append(row)
        reference.append(row.index(b))
    return levels, reference


# -- what it costs -------------------------------------------------------------------------------------------
def evaluated(method, profile) -> int:
    """Tokens that go through the model while ratios are sought; torch-free."""
    if method.distribution == "evolution":
        plan = settings(method)
        return plan.evaluated + plan.generations * sum(plan.tokens)      # and the dense pass of each stage
    sizes = [m.size for m in profile.matrices]
    base = [round(method.sparsity * n) for n in sizes]
    levels, _ = zero_levels(sizes, base, [0] * len(sizes), method.step)
    depth = max(1, profile.layers)
    # Blocks before the matrix are not computed again.
    return round(sum(len(row) * (1 - m.layer / depth) for row, m in zip(levels, profile.matrices)) * method.search_tokens)


def footprint(method, profile, batch) -> dict:
    """Changes to a training-free footprint: dense copies, level maps, the passes of the search."""
    length = max(1, min(batch.length, method.search_tokens))
    rows = max(1, min(8, method.search_tokens // length))
    weights = BYTES.get(batch.weights, 4)
    recorded = method.search_tokens * profile.hidden * 4 * (profile.layers + 2)
    logits = min(method.search_tokens * max(profile.vocab, 1), 1 << 25) * 4 + 512 * profile.vocab * 12 if profile.task == "causal-lm" else 0
    return dict(extra=(weights + 1) * profile.block_parameters + recorded + logits, tokens=evaluated(method, profile),
                activations=activations.forward_bytes(profile, Batch(rows=rows, length=length)))


def settings(method):
    """The search that a method's fields describe."""
    from engines.allocation.evolution import Search
    first = max(2, method.offspring // 4)
    survivors = (first, 1) if first < method.offspring else (1,)
    tokens = (max(8, method.search_tokens // 4), method.search_tokens)
    return Search(generations=method.generations, offspring=method.offspring, survivors=survivors, tokens=tokens[-len(survivors):])


# -- the live model ----------------------------------------------------------------------------------------------
def level_map(scores, select, counts: list[int]):
    """uint8 of ``scores``' shape: a weight is zero at level j where the map is above j; ``counts`` fall."""
    found = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for j, count in enumerate(counts):
        found.masked_fill_(select(scores, count), j + 1)
    return found


def sought(method, model, context, found, score, select, base: list[int], least: list[int] | None = None) -> list[int]:
    """Zeros of each matrix of ``found``, ``sum(base)`` in all (more where ``least`` asks for it).

    Args:
        score: (matrix, module) -> scores [out, in], the smallest are pruned first.
        select: (scores, count) -> bool [out, in]; choices of larger counts contain those of smaller ones.
        base: zeros in the uniform setting.
        least: zeros that are there already.

    Raises:
        StopRequested: asked for while measuring.
    """
    from engines.allocation.dynamic import least_error
    from engines.allocation.evolution import search
    from engines.allocation.problem import Level, Problem
    from engines.allocation.tables import Judge, Variants

    began = time.perf_counter()
    sizes = [m.size for m, _ in found]
    least = least or [0] * len(sizes)
    base = anchors(base, least, [max(a, int(MOST * n)) for n, a in zip(sizes, least)])
    levels, reference = zero_levels(sizes, base, least, method.step)
    maps = [level_map(score(m, module), select, row) for (m, module), row in zip(found, levels)]
    variants = Variants(found, lambda i, level, dense: dense.masked_fill(maps[i] > level, 0))
    length = getattr(context.data, "length", 0) or 1
    samples = context.calibration(max(16, POOL * method.search_tokens // max(1, length)))
    judge = Judge(model, variants, samples, task=context.task, device=context.device, seed=context.seed, wants=context.reporter.wants)
    name = method.card.id

    def problem(errors=None):
        rows = [tuple(Level(z, n - z, errors[i][j] if errors else 0.0) for j, z in enumerate(row))
                for i, (n, row) in enumerate(zip(sizes, levels))]
        return Problem(tuple(m.name for m, _ in found), tuple(rows), tuple(reference))

    with judge:
        if method.distribution == "rd":
            def told(done: int):
                if done % 10 == 0:
                    context.reporter.log(f"{name}    distortion of {done} of {len(found)} matrices")
            table = problem(judge.distortion([len(row) for row in levels], method.search_tokens, watch=told))
            result = least_error(table, table.size(table.reference), exact=True)
        else:
            def told(record: dict):
                if (record["generation"] + 1) % 10 == 0:
                    context.reporter.log(f"{name}    generation {record['generation'] + 1}: KL {record['fitness']:.4f} nats")
            result = search(problem(), judge.divergence, settings(method), seed=context.seed * 1009 + context.stage, watch=told)
        uniform, other = judge.divergence([tuple(reference), result.choice], method.search_tokens, CHECK)
    kept = other <= uniform
    choice = result.choice if kept else tuple(reference)
    counts = [row[c] for row, c in zip(levels, choice)]
    shares = [z / n for z, n in zip(counts, sizes)]
    low, high = min(range(len(found)), key=shares.__getitem__), max(range(len(found)), key=shares.__getitem__)
    text = (f"Ratios by {method.distribution}: {shares[low]:.0%} zeros in {found[low][0].name} to {shares[high]:.0%} in {found[high][0].name}; "
            f"KL to the dense model {uniform:.4f} with equal ratios, {other:.4f} with these")
    if not kept:
        text = f"Ratios by {method.distribution} diverge more than equal ones (KL {other:.4f} against {uniform:.4f}): equal ones are kept"
    context.reporter.event("choice", text, by=method.distribution, uniform=uniform, found=other, kept=kept,
                           seconds=time.perf_counter() - began, zeros=sum(counts))
    return counts

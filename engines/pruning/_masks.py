"""Layer ratios, selection of the smallest scores, N:M groups and the gradual schedule, shared by the pruning methods.

Weights are seen as [out, in] whatever the storage order. Counts are exact: an asked sparsity of a matrix with
n entries gives round(sparsity * n) zeros, ties are broken by position.
"""

from __future__ import annotations

import math

from engines.errors import InputError
from engines.lazy import torch

DISTRIBUTIONS = ("uniform", "global", "erk", "rd", "evolution")
PATTERNS = ("unstructured", "2:4", "4:8")


# -- layer ratios, torch-free ----------------------------------------------------------------------------------
def erk_densities(shapes, density: float) -> list[float]:
    """Erdos-Renyi density of each matrix: proportional to (out + in) / (out * in), at most 1, exact in total.

    Layers that would exceed 1 become dense and the others share what is left, until none exceeds it
    ("The Unreasonable Effectiveness of Random Pruning").

    Args:
        shapes: pairs of (out, in).
        density: share of entries kept in all matrices together.
    """
    sizes = [o * i for o, i in shapes]
    raw = [(o + i) / (o * i) for o, i in shapes]
    dense: set[int] = set()
    while True:
        free = [j for j in range(len(sizes)) if j not in dense]
        if not free:
            return [1.0] * len(sizes)
        budget = sum(density * sizes[j] for j in free) - sum((1 - density) * sizes[j] for j in dense)
        scale = max(budget, 0.0) / sum(raw[j] * sizes[j] for j in free)
        top = max(raw[j] for j in free)
        if top * scale <= 1.0:
            return [1.0 if j in dense else raw[j] * scale for j in range(len(sizes))]
        dense |= {j for j in free if raw[j] == top}


def zero_counts(shapes, sparsity: float, distribution: str) -> list[int]:
    """Zeros of each matrix under ``uniform`` or ``erk``; otherwise they depend on scores or measurements, and this is their start."""
    sizes = [o * i for o, i in shapes]
    if distribution == "erk":
        return [round((1.0 - d) * n) for d, n in zip(erk_densities(shapes, 1.0 - sparsity), sizes)]
    return [round(sparsity * n) for n in sizes]


def total_zeros(shapes, sparsity: float, distribution: str) -> int:
    """Zeros of all matrices together, known before the scores are."""
    if distribution == "global":
        return round(sparsity * sum(o * i for o, i in shapes))
    return sum(zero_counts(shapes, sparsity, distribution))


def groups(pattern: str) -> tuple[int, int]:
    """(zeros, group width) of ``2:4`` or ``4:8``."""
    kept, width = (int(part) for part in pattern.split(":"))
    return width - kept, width


def check_pattern(method: str, profile, pattern: str) -> None:
    """Refuse an N:M pattern whose group does not divide a matrix's input width.

    Raises:
        InputError: names the first such matrix.
    """
    if pattern == "unstructured":
        return
    _, width = groups(pattern)
    for m in profile.matrices:
        if m.inp % width:
            raise InputError(f"{method}.pattern", pattern, f"{m.name} has {m.inp} inputs, not a multiple of {width}",
                             "Choose unstructured, or a pattern whose group divides every input width")


def cubic(share: float, start: float, end: float, final: float, initial: float = 0.0) -> float:
    """Sparsity at ``share`` of the budget: ``initial`` before ``start``, ``final`` after ``end``, between them
    final + (initial - final) (1 - t)^3 ("To prune, or not to prune").
    """
    if share <= start:
        return initial
    if share >= end:
        return final
    return final + (initial - final) * (1.0 - (share - start) / (end - start)) ** 3


# -- selection -----------------------------------------------------------------------------------------------
def smallest(scores, count: int):
    """Bool tensor of ``scores``' shape, True at its ``count`` smallest entries; among equals the earlier come first."""
    flat = scores.reshape(-1)
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    if count <= 0:
        return chosen.view(scores.shape)
    if count >= flat.numel():
        return ~chosen.view(scores.shape)
    edge = torch.kthvalue(flat, count).values
    torch.lt(flat, edge, out=chosen)
    missing = count - int(chosen.sum())
    if missing:
        chosen[(flat == edge).nonzero().view(-1)[:missing]] = True
    return chosen.view(scores.shape)


def smallest_per_row(scores, count: int, rows: int = 4096):
    """As ``smallest`` for each row of [out, in], ``rows`` rows at a time."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count > 0:
        for at in range(0, scores.shape[0], rows):
            order = torch.argsort(scores[at: at + rows], dim=1, stable=True)[:, :count]
            chosen[at: at + rows].scatter_(1, order, True)
    return chosen


def smallest_by_row(scores, count: int, rows: int = 4096):
    """``count`` entries of [out, in] in all: the smallest of each row, as many in each; the first rows take the rest."""
    each, rest = divmod(count, scores.shape[0])
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for at in range(0, scores.shape[0], rows):
        part = scores[at: at + rows]
        order = torch.argsort(part, dim=1, stable=True)[:, : each + 1]
        wanted = each + (torch.arange(at, at + len(part), device=scores.device) < rest).long()
        take = torch.arange(order.shape[1], device=scores.device)[None] < wanted[:, None]
        chosen[at: at + rows].scatter_(1, order, take)
    return chosen


def smallest_in_groups(scores, zeros: int, width: int):
    """True at the ``zeros`` smallest of every ``width`` consecutive inputs of a row."""
    out, inp = scores.shape
    grouped = scores.reshape(out, inp // width, width)
    order = torch.argsort(grouped, dim=2, stable=True)[:, :, :zeros]
    return torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device).scatter_(2, order, True).view(out, inp)


def smallest_of_all(score, names: list[str], count: int) -> dict:
    """The ``count`` smallest entries of many matrices together, without holding all scores at once.

    Args:
        score: callable, name -> float tensor [out, in], none negative, equal at each call.
        names: the matrices.

    Returns:
        name -> bool tensor, True at the chosen entries.
    """
    # A float that is not negative orders like the integer with the same bits, so 31 counts find the exact edge.
    low, high = -1, 0x7F800000
    while high - low > 1:
        middle = (low + high) // 2
        below = sum(int((_bits(score(n)) <= middle).sum()) for n in names)
        low, high = (low, middle) if below >= count else (middle, high)
    chosen, left = {}, count
    for n in names:
        chosen[n] = _bits(score(n)) < high
        left -= int(chosen[n].sum())
    for n in names:
        if left <= 0:
            break
        ties = (_bits(score(n)) == high).view(-1).nonzero().view(-1)[:left]
        chosen[n].view(-1)[ties] = True
        left -= len(ties)
    return chosen


def _bits(scores):
    return scores.float().contiguous().view(torch.int32)


# -- masks of a pipeline ---------------------------------------------------------------------------------------
def parameter(matrix) -> str:
    """Name of the weight of ``matrix`` in ``context.masks``."""
    return f"{matrix.name}.weight"


def put(context, matrix, module, pruned) -> None:
    """Add ``pruned`` ([out, in], True = zero) to the masks and write the zeros into the weight."""
    pruned = pruned.t() if matrix.conv1d else pruned
    keep = ~pruned
    old = context.masks.get(parameter(matrix))
    if old is not None:
        keep &= old.to(keep.device)
    keep = keep.contiguous()
    context.masks[parameter(matrix)] = keep
    module.weight.data.masked_fill_(~keep, 0)


def zeros_there(found, context) -> list[int]:
    """Weights of each (matrix, module) that the masks hold at zero already."""
    masks = [context.masks.get(parameter(m)) for m, _ in found]
    return [0 if mask is None else int((~mask).sum()) for mask in masks]


def zero_share(module) -> float:
    """Share of exact zeros in a module's weight."""
    w = module.weight
    return (w.numel() - int(torch.count_nonzero(w))) / max(1, w.numel())


def sparsity_map(model) -> dict[str, list]:
    """Layer map of the share of zeros in every matrix."""
    from engines.models import matrices
    return {"sparsity": [[m.layer, m.role, zero_share(module)] for m, module in matrices(model)]}


def check_share(name: str, start: float, end: float) -> None:
    """Refuse a gradual schedule that ends before it starts."""
    if not start < end:
        raise InputError(name, end, f"the schedule would end at {end} but start at {start} of the budget",
                         "Choose an end above the start")


def floor_count(sparsity: float, width: int) -> int:
    """Zeros of one row: the whole part of sparsity * width, safe against 0.29 * 100 = 28.999..."""
    return math.floor(sparsity * width + 1e-9)

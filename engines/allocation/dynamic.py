"""Dynamic programs over per-layer levels: least size under a cap on the error, least error under a budget of size.

No torch; tables of some hundred layers are solved in well under a second.
"""

from __future__ import annotations

import math

from engines.allocation.problem import Allocation, Problem, answer
from engines.errors import InputError

BUCKETS = 10_000
"""Steps into which L-GreCo divides the cap on the error."""
FINEST = 1_000_000
CELLS = 60_000_000
"""Table entries (layers x budget) up to which a knapsack is solved in its own unit; beyond, sizes are rounded up to a coarser one."""


# -- least size, error capped ----------------------------------------------------------------------------------
def least_size(problem: Problem, *, alpha: float = 1.0, cap: float | None = None, buckets: int = BUCKETS) -> Allocation:
    """The smallest total size whose summed error is at most ``alpha`` times that of the uniform reference.

    Errors are divided into ``buckets`` parts of the cap and rounded up, as in the paper. Rounding up could make the reference
    itself infeasible, so choices that pass the cap by less than one bucket a layer after rounding are looked at with their true
    errors, the buckets are made finer where that hides a smaller choice, and the result is never larger than the reference.

    Args:
        cap: the cap itself, instead of the reference's error.

    Raises:
        InputError: neither a reference nor a cap, or no choice obeys the cap.

    Source: L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep Learning.
    """
    if cap is None:
        if problem.reference is None:
            raise InputError("problem.reference", None, "the cap on the error comes from the uniform setting", "Give a reference or a cap")
        cap = alpha * problem.error(problem.reference)
    allowed = cap * (1 + 1e-12)
    best = None
    if problem.reference is not None and problem.error(problem.reference) <= allowed:
        best = tuple(problem.reference)
    if cap <= 0:
        # Nothing to divide: only levels without any error remain.
        best = _smaller(problem, _errorless(problem), best)
    else:
        while True:
            found, hidden = _capped(problem, cap, buckets, allowed)
            best = _smaller(problem, found, best)
            if not hidden or buckets >= FINEST:
                break
            buckets *= 10
    if best is None:
        lowest = math.fsum(min(level.error for level in levels) for levels in problem.levels)
        raise InputError("cap", cap, f"the best levels together have an error of {lowest:.4g}", "Raise the cap, or add finer levels")
    return answer(problem, best, "lgreco")


def _smaller(problem: Problem, new, old):
    if new is None or old is None:
        return new if old is None else old
    return min((old, new), key=lambda c: (problem.size(c), problem.error(c)))


def _errorless(problem: Problem):
    choice = []
    for levels in problem.levels:
        free = [i for i, level in enumerate(levels) if level.error == 0]
        if not free:
            return None
        choice.append(min(free, key=lambda i: levels[i].size))
    return tuple(choice)


def _capped(problem: Problem, cap: float, buckets: int, allowed: float):
    """(best choice whose true error is allowed, True if a smaller one was found whose error could not be decided)."""
    import numpy as np
    top = buckets + len(problem.levels)
    total = np.zeros(top + 1, dtype=np.int64)
    huge = np.iinfo(np.int64).max // 4
    picks = []
    for levels in problem.levels:
        new = np.full(top + 1, huge, dtype=np.int64)
        pick = np.zeros(top + 1, dtype=np.int16)
        for i, level in enumerate(levels):
            if level.error > allowed:
                continue
            cost = math.ceil(level.error / cap * buckets)
            at = total[: top + 1 - cost] + level.size
            better = at < new[cost:]
            new[cost:][better] = at[better]
            pick[cost:][better] = i
        total = new
        picks.append(pick)
    costs = [[math.ceil(min(level.error, 2 * cap) / cap * buckets) for level in levels] for levels in problem.levels]

    def back(b: int):
        choice = []
        for pick, cost in zip(reversed(picks), reversed(costs)):
            c = int(pick[b])
            choice.append(c)
            b -= cost[c]
        return tuple(reversed(choice))

    best, hidden, seen = None, False, None
    # total falls with b, so from the widest budget on the first allowed choice is the smallest.
    for b in range(top, buckets - 1, -1):
        if total[b] >= huge:
            break
        choice = back(b)
        if choice == seen:
            continue
        seen = choice
        if problem.error(choice) <= allowed:
            best = choice
            break
        hidden = True
    if best is None and total[buckets] < huge:
        best = back(buckets)
    return best, hidden


# -- least error, size budgeted ----------------------------------------------------------------------------------
def least_error(problem: Problem, budget: int | None = None, *, exact: bool = False) -> Allocation:
    """The least summed error with a total size of at most ``budget`` (with ``exact``: of ``budget`` itself).

    A knapsack over levels: g_l(b) = min over levels c of g_{l-1}(b - size_l(c)) + error_l(c), solved in the greatest common
    divisor of the sizes. Where that would need a table beyond ``CELLS`` entries, sizes are rounded up to a coarser unit: the
    budget still holds, the optimum may be missed by that rounding. ``exact`` does not round; there, layers of unlike sizes
    then keep the share of the budget that the reference gives them, if it meets the budget.

    Args:
        budget: taken from the problem when left out.

    Raises:
        InputError: no budget, one below the smallest levels, or none that meets it exactly.

    Source: Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks.
    """
    budget = problem.budget if budget is None else budget
    if budget is None:
        raise InputError("problem.budget", None, "there is no budget to keep", "Give the total size that is allowed")
    if budget < problem.least:
        raise InputError("budget", budget, f"the smallest levels already take {problem.least}", "Raise the budget, or add smaller levels")
    least = [min(level.size for level in levels) for levels in problem.levels]
    more = [[level.size - low for level in levels] for levels, low in zip(problem.levels, least)]
    spare = budget - sum(least) if exact else min(budget, problem.most) - sum(least)
    if exact and budget > problem.most:
        raise InputError("budget", budget, f"the largest levels together take {problem.most}", "Lower the budget, or add larger levels")
    unit = 0
    for m in (m for row in more for m in row):
        unit = math.gcd(unit, m)
    unit = max(unit, 1)
    if exact and spare % unit:
        raise InputError("budget", budget, f"sizes change in steps of {unit}, so no choice has exactly this total",
                         f"Choose {budget - spare % unit}")
    if not exact:
        unit = max(unit, math.ceil(len(more) * spare / CELLS))
    elif len(more) * spare // unit > CELLS and problem.reference is not None and problem.size(problem.reference) == budget:
        parts = _by_shape(problem)
        if len(parts) > 1:
            return answer(problem, _separately(problem, parts), "rd")
    choice = _knapsack(problem, [[-(-m // unit) for m in row] for row in more], spare // unit, exact)
    if choice is None:
        raise InputError("budget", budget, "no choice of levels has exactly this total", "Choose another total, or allow a smaller one")
    return answer(problem, choice, "rd")


def _by_shape(problem: Problem) -> list[list[int]]:
    """Indices of the layers, those with equal sizes of all levels together."""
    found: dict[tuple, list[int]] = {}
    for i, levels in enumerate(problem.levels):
        found.setdefault(tuple(level.size for level in levels), []).append(i)
    return list(found.values())


def _separately(problem: Problem, parts: list[list[int]]):
    choice = [0] * len(problem.names)
    for part in parts:
        reference = tuple(problem.reference[i] for i in part)
        alone = Problem(tuple(problem.names[i] for i in part), tuple(problem.levels[i] for i in part), reference)
        for i, c in zip(part, least_error(alone, alone.size(reference), exact=True).choice):
            choice[i] = c
    return tuple(choice)


def _knapsack(problem: Problem, sizes: list[list[int]], budget: int, exact: bool):
    import numpy as np
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    picks = []
    for levels, row in zip(problem.levels, sizes):
        new = np.full(budget + 1, np.inf)
        pick = np.full(budget + 1, -1, dtype=np.int16)
        for i, (level, size) in enumerate(zip(levels, row)):
            if size > budget:
                continue
            at = best[: budget + 1 - size] + level.error
            better = at < new[size:]
            new[size:][better] = at[better]
            pick[size:][better] = i
        best = new
        picks.append(pick)
    at = budget if exact else int(np.argmin(best))
    if not np.isfinite(best[at]):
        return None
    choice = []
    for pick, row in zip(reversed(picks), reversed(sizes)):
        c = int(pick[at])
        choice.append(c)
        at -= row[c]
    return tuple(reversed(choice))

"""Search over per-layer levels by the measured loss of whole models, with the budget kept exactly; no torch.

Source: EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.allocation.problem import Allocation, Problem, answer
from engines.errors import InputError


@dataclass(frozen=True)
class Search:
    """Settings of the search: (1 + offspring), selected in stages.

    Stage i keeps the best ``survivors[i]`` candidates on a fresh batch of ``tokens[i]`` tokens; the parent joins the last one.

    Raises:
        InputError: survivors that do not fall to one, or batches that do not grow.
    """

    generations: int = 30
    offspring: int = 12
    survivors: tuple[int, ...] = (3, 1)
    tokens: tuple[int, ...] = (512, 2048)
    swaps: int = 3
    """Swaps in one offspring: the smaller of two draws from 1 to this."""
    fresh: bool = True
    """Draw another batch in every stage; False keeps one batch per size, which makes the best value fall steadily."""

    def __post_init__(self):
        s, t = self.survivors, self.tokens
        if not s or s[-1] != 1 or any(a <= b for a, b in zip(s, s[1:])) or s[0] > self.offspring:
            raise InputError("survivors", s, f"they must fall from at most {self.offspring} offspring to one", "Write for example (8, 2, 1)")
        if len(t) != len(s) or any(a > b for a, b in zip(t, t[1:])) or min(t) < 1:
            raise InputError("tokens", t, "each stage needs a batch, not smaller than the one before", "Write for example (512, 2048)")
        for name, low in (("generations", 0), ("offspring", 1), ("swaps", 1)):
            if getattr(self, name) < low:
                raise InputError(name, getattr(self, name), f"below {low}", f"Give at least {low}")

    @property
    def evaluated(self) -> int:
        """Candidate tokens of the whole search, duplicates left out of account."""
        entering = [self.offspring, *self.survivors[:-1]]
        entering[-1] += 1
        return self.generations * sum(n * t for n, t in zip(entering, self.tokens))


def swap(problem: Problem, choice: Sequence[int], rng: random.Random, swaps: int = 3) -> tuple[int, ...]:
    """One offspring: a few times one layer goes a level up and another one down by the same size, so the total stays.

    Levels must be in order of size. A layer whose step no other layer can balance stays as it is.
    """
    choice = list(choice)
    for _ in range(min(rng.randint(1, swaps), rng.randint(1, swaps))):
        falling: dict[int, list[int]] = {}
        for j, levels in enumerate(problem.levels):
            if choice[j] > 0:
                falling.setdefault(levels[choice[j]].size - levels[choice[j] - 1].size, []).append(j)
        # Drawn among all layers that can move, so layers of equal steps are taken in proportion to their number.
        rising = []
        for i, levels in enumerate(problem.levels):
            if choice[i] + 1 < len(levels):
                partners = falling.get(levels[choice[i] + 1].size - levels[choice[i]].size, [])
                if partners and partners != [i]:
                    rising.append((i, partners))
        if not rising:
            break
        i, partners = rng.choice(rising)
        choice[i] += 1
        choice[rng.choice([j for j in partners if j != i])] -= 1
    return tuple(choice)


def search(problem: Problem, fitness: Callable[[list[tuple[int, ...]], int, int], list[float]], settings: Search = Search(), *,
           start: Sequence[int] | None = None, seed: int = 0, watch: Callable[[dict], bool] | None = None) -> Allocation:
    """The survivor after some generations.

    Args:
        fitness: (choices, tokens, draw) -> one figure per choice, lower is better, all on the same batch of ``tokens`` tokens;
            ``draw`` numbers the batch (0 always when ``settings.fresh`` is False).
        start: levels to begin with; the reference of the problem when left out. Its total size is kept in every candidate.
        watch: sees each generation's record (generation, fitness, parent, size, choice); True ends the search.

    Raises:
        InputError: nothing to start from.
    """
    parent = tuple(problem.reference if start is None else start) if (start is not None or problem.reference is not None) else None
    if parent is None:
        raise InputError("problem.reference", None, "the search has no setting to start from", "Give the uniform levels as reference")
    rng, draw, history = random.Random(seed), 0, []
    for generation in range(settings.generations):
        candidates = _offspring(problem, parent, rng, settings)
        if not candidates:
            break       # no swap is possible: every choice of this total has been reached
        scores: list[float] = []
        for stage, (keep, tokens) in enumerate(zip(settings.survivors, settings.tokens)):
            if stage + 1 == len(settings.survivors):
                candidates = [*candidates, parent]
            draw += 1
            scores = fitness(candidates, tokens, draw if settings.fresh else 0)
            order = sorted(range(len(candidates)), key=lambda i: scores[i])
            last = scores[-1]
            candidates, scores = [candidates[i] for i in order[:keep]], [scores[i] for i in order[:keep]]
        parent = candidates[0]
        record = dict(generation=generation, fitness=scores[0], parent=last, size=problem.size(parent), choice=list(parent))
        history.append(record)
        if watch is not None and watch(record):
            break
    return answer(problem, parent, "evolution", history)


def _offspring(problem: Problem, parent, rng: random.Random, settings: Search) -> list[tuple[int, ...]]:
    """Distinct children that differ from their parent; fewer than asked where there are no more."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(8 * settings.offspring):
        child = swap(problem, parent, rng, settings.swaps)
        if child != parent:
            found.setdefault(child)
        if len(found) == settings.offspring:
            break
    return list(found)

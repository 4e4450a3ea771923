"""The table that every allocation starts from, and its answer; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engines.errors import InputError


@dataclass(frozen=True)
class Level:
    """One setting that a layer can take.

    ``value`` is what is set (zeros, bits, rank), ``size`` what it costs in whole units of the budget (weights kept, bytes,
    parameters), ``error`` the damage that it does alone; a search that measures whole models leaves ``error`` at 0.

    Raises:
        InputError: a size that is no whole number above or at zero, or an error that is negative or not finite.
    """

    value: float
    size: int
    error: float = 0.0

    def __post_init__(self):
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 0:
            raise InputError("level.size", self.size, "a size is a whole number from 0 on", "Give sizes in whole units, such as bytes")
        if not math.isfinite(self.error) or self.error < 0:
            raise InputError("level.error", self.error, "an error is a finite number from 0 on",
                             "Measure it again: values that are not finite cannot be compared")


@dataclass(frozen=True)
class Problem:
    """Levels of every layer. ``reference`` is the level of each layer in the uniform setting, ``budget`` the total size allowed.

    Raises:
        InputError: no layers, a layer without levels, or a reference that does not fit them.
    """

    names: tuple[str, ...]
    levels: tuple[tuple[Level, ...], ...]
    reference: tuple[int, ...] | None = None
    budget: int | None = None

    def __post_init__(self):
        if not self.names or len(self.names) != len(self.levels):
            raise InputError("problem.levels", len(self.levels), f"{len(self.names)} layers are named", "Give one list of levels a layer")
        for name, levels in zip(self.names, self.levels):
            if not levels:
                raise InputError("problem.levels", name, "the layer has no level to choose", "Give each layer at least one level")
        if self.reference is not None and (len(self.reference) != len(self.names) or any(
                not 0 <= r < len(levels) for r, levels in zip(self.reference, self.levels))):
            raise InputError("problem.reference", self.reference, "it names a level that a layer does not have",
                             "Give the index of a level for each layer")
        if self.budget is not None and self.budget < self.least:
            raise InputError("problem.budget", self.budget, f"the smallest levels already take {self.least}",
                             "Raise the budget, or add smaller levels")

    @property
    def least(self) -> int:
        """Total size of the smallest levels."""
        return sum(min(level.size for level in levels) for levels in self.levels)

    @property
    def most(self) -> int:
        """Total size of the largest levels."""
        return sum(max(level.size for level in levels) for levels in self.levels)

    def size(self, choice) -> int:
        """Total size of one level per layer."""
        return sum(levels[c].size for levels, c in zip(self.levels, choice))

    def error(self, choice) -> float:
        """Sum of the errors of one level per layer."""
        return math.fsum(levels[c].error for levels, c in zip(self.levels, choice))

    def values(self, choice) -> dict[str, float]:
        """Name -> value of the chosen level."""
        return {name: levels[c].value for name, levels, c in zip(self.names, self.levels, choice)}


@dataclass(frozen=True)
class Allocation:
    """One level per layer, and how it was found.

    ``by``: lgreco, rd or evolution. ``history``: of a search, one dict a generation (fitness of the survivor and of the parent
    on the last batch, total size).
    """

    choice: tuple[int, ...]
    size: int
    error: float
    by: str
    history: tuple[dict, ...] = field(default=(), repr=False)


def answer(problem: Problem, choice, by: str, history=()) -> Allocation:
    """The ``Allocation`` of a choice of levels."""
    choice = tuple(int(c) for c in choice)
    return Allocation(choice, problem.size(choice), problem.error(choice), by, tuple(history))

"""Effects of nested and crossed groups on a logarithm, each a median drawn towards nothing by how few runs stand behind it.

The levels are taken in order, from what many runs share to what only equal ones do; each explains what the ones before leave.
With ``n`` runs in a group its median counts ``n / (n + pull)``: one run moves little, many decide. Medians, because a measurement
beside another program may be off by any factor (empirical-Bayes shrinkage; the backfitting of an additive model, in one pass).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

MOST = 1.2
"""A logarithm further from zero than this (a factor of 3.3) is no error of a formula: it counts as this much."""


def median(values: Sequence[float]) -> float:
    """The middle value; the mean of the two middle ones of an even number. ``values`` is not empty."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The value at which half of the weight lies below; ``values`` are (value, weight > 0), not empty."""
    ordered = sorted(values)
    total, seen = sum(w for _, w in ordered), 0.0
    for i, (value, weight) in enumerate(ordered):
        seen += weight
        if seen > 0.5 * total:
            return value
        if seen == 0.5 * total and i + 1 < len(ordered):
            return 0.5 * (value + ordered[i + 1][0])
    return ordered[-1][0]


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` (not empty) do not exceed, with linear interpolation."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass
class Effects:
    """What ``fit`` found: for each level a map from group to (effect, runs)."""

    base: float = 0.0
    levels: list[dict[Hashable, tuple[float, int]]] = field(default_factory=list)

    def of(self, keys: Sequence[Hashable]) -> float:
        """The sum of the effects of the groups ``keys``, one for each level; a group never seen adds nothing."""
        return self.base + sum(level[key][0] for level, key in zip(self.levels, keys) if key in level)

    def factor(self, keys: Sequence[Hashable]) -> float:
        return math.exp(self.of(keys))


def fit(rows: Sequence[tuple[int, Sequence[Hashable], float, float]], pulls: Sequence[float], center: bool = False) -> Effects:
    """Effects of every group.

    Args:
        rows: (run, its group at each level, logarithm observed, weight from 0 to 1); a run may have several rows and counts as much
            as the heaviest of them.
        pulls: for each level, how many runs weigh as much as the belief that there is no effect.
        center: begin with the median of all, for a quantity whose logarithm has no natural zero.
    """
    found = Effects(median([row[2] for row in rows]) if center and rows else 0.0)
    rest = [max(-MOST, min(MOST, row[2] - found.base)) for row in rows]
    for level, pull in enumerate(pulls):
        groups: dict[Hashable, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row[1][level], []).append(i)
        effects = {}
        for key, members in groups.items():
            heaviest: dict[int, float] = {}
            for i in members:
                heaviest[rows[i][0]] = max(heaviest.get(rows[i][0], 0.0), rows[i][3])
            count = sum(heaviest.values())
            effect = count / (count + pull) * weighted_median([(rest[i], rows[i][3]) for i in members])
            effects[key] = (effect, len(heaviest))
            for i in members:
                rest[i] -= effect
        found.levels.append(effects)
    return found

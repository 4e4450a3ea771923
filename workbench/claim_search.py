"""The small search for a learning rate that both sides of a claim get: planned rates, then further while the best lies at an end."""

from __future__ import annotations

import numpy as np

STEP, FURTHER = 3.0, 2
"""While the best rate lies at an end of the search it goes on by this factor, at most so often."""


def ratio(scores, weights) -> float:
    return float(scores.sum() / (weights.sum() if weights is not None else len(scores)))


def tuned(row: dict) -> float:
    """What the search for a learning rate makes small: the figure of the even items."""
    value = ratio(row["scores"][0::2], None if row["weights"] is None else row["weights"][0::2])
    return value if row["metric"] == "bits/byte" else -value


def best(found: dict) -> float:
    """The rate whose training the even items like best; one that diverged only when all did."""
    finite = [r for r, row in found.items() if np.isfinite(row["scores"]).all()]
    return min(finite or found, key=lambda r: tuned(found[r]))


def further(found: dict, planned: int) -> float | None:
    """A rate beyond the end at which the best one lies, at most ``FURTHER`` times; None: the search is over."""
    return beyond(found, best(found), planned)


def beyond(tried, best: float, planned: int) -> float | None:
    """``further`` where the best rate is known."""
    if planned < 2 or len(tried) >= planned + FURTHER:
        return None
    return best * STEP if best == max(tried) else best / STEP if best == min(tried) else None

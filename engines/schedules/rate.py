"""Learning-rate factor as a function of the share of the budget used, so that every schedule completes."""

from __future__ import annotations

import math


def rate(progress: float, *, schedule: str = "cosine", warmup: float = 0.03, final: float = 0.0) -> float:
    """Factor in [0, 1] on the peak learning rate.

    Args:
        progress: share of the stage's budget used, 0 to 1 (steps or time, whichever is further).
        schedule: cosine, linear or constant, after a linear warm-up.
        warmup: share of the budget spent warming up.
        final: factor at the end.
    """
    progress = min(max(progress, 0.0), 1.0)
    if warmup > 0 and progress < warmup:
        # Never exactly zero: a first step that changes nothing would waste its gradient.
        return max(progress / warmup, 1e-2)
    if schedule == "constant":
        return 1.0
    left = 1.0 - (progress - warmup) / max(1.0 - warmup, 1e-9)
    shape = 0.5 * (1 - math.cos(math.pi * left)) if schedule == "cosine" else left
    return final + (1.0 - final) * shape

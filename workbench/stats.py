"""Honest differences: intervals, paired tests over the same items, tiers. Numpy only.

Every score is per item. A metric with weights (bits/byte) is a ratio of sums: nats of the drawn items over ln 2 times their
bytes; one without (accuracy) is their mean.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (paired resampling, test by the shifted distribution);
McNemar, Note on the sampling error of the difference between correlated proportions or percentages; Holm, A simple
sequentially rejective multiple test procedure; Koehn, Statistical significance tests for machine translation evaluation
(resampling test sets).
"""

from __future__ import annotations

import math

import numpy as np

DRAWS = 10_000
WORK = 20_000_000
"""Item draws that one comparison may cost; with many items there are fewer resamples, at least 1,000."""
CHUNK = 2_000_000
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
           2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def scale(metric: str) -> float:
    """What a sum of scores is divided by besides the weights: ln 2 turns nats into bits."""
    return math.log(2) if metric == "bits/byte" else 1.0


def lower_is_better(metric: str | None) -> bool:
    """True for bits/byte, loss and perplexity; False for accuracy."""
    return metric != "accuracy"


def value(scores, weights=None, unit: float = 1.0) -> float:
    """The metric from its items: ``sum(scores) / (unit * sum(weights))``, weights 1 where there are none."""
    scores = np.asarray(scores, np.float64)
    below = float(np.asarray(weights, np.float64).sum()) if weights is not None else len(scores)
    return float(scores.sum() / (unit * below))


def resample(scores, weights=None, *, unit: float = 1.0, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Values of k models on the same resampled items.

    Args:
        scores: float array [k, n]. weights: [n] or None.

    Returns:
        float64 array [draws, k]; row i holds all models' values on the i-th draw of n items with replacement, so that
        differences between columns are paired. Fewer draws are made where n is large (``WORK``).
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    k, n = scores.shape
    draws = min(draws, max(1000, WORK // max(n, 1)))
    below = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    columns = np.column_stack([scores.T, below])
    rng, out, at = np.random.default_rng(seed), np.empty((draws, k + 1)), 0
    size = max(1, CHUNK // n)
    while at < draws:
        rows = min(size, draws - at)
        picks = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        counts = np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n)
        out[at: at + rows] = counts @ columns
        at += rows
    return out[:, :k] / (unit * out[:, k:])


def mcnemar(a, b) -> tuple[float, int, int]:
    """Exact McNemar test of two rows of right (1) and wrong (0): p, items only ``a`` has right, items only ``b`` has right."""
    a, b = np.asarray(a) > 0.5, np.asarray(b) > 0.5
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return binomial(min(only_a, only_b), only_a + only_b), only_a, only_b


def binomial(k: int, n: int) -> float:
    """Two-sided exact p of at most k of n fair throws on the rarer side."""
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    top = max(logs)
    return min(1.0, 2.0 * math.exp(top) * sum(math.exp(x - top) for x in logs))


def holm(p) -> list[float]:
    """p values adjusted for their number by Holm's method, in the order given."""
    p = np.asarray(p, np.float64)
    order, out, worst = np.argsort(p, kind="stable"), np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, float(p[i]) * (len(p) - rank)))
        out[i] = worst
    return out.tolist()


def _binary(scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def difference(a, b, weights=None, *, unit: float = 1.0, draws: int = DRAWS, seed: int = 0) -> dict:
    """Paired comparison of two score rows over the same n items.

    Returns:
        ``difference`` = value(b) - value(a) with a 95 % percentile interval ``low``, ``high``; ``p``: exact McNemar for right
        and wrong, else the bootstrap test with the distribution shifted to zero; ``test``; ``n``; ``needed``: about how many
        items would show a difference of this size four times in five (None where there is none to show).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    seen = value(b, weights, unit) - value(a, weights, unit)
    drawn = resample([a, b], weights, unit=unit, draws=draws, seed=seed)
    delta = drawn[:, 1] - drawn[:, 0]
    low, high = (float(q) for q in np.quantile(delta, (0.025, 0.975)))
    out = {"difference": seen, "low": low, "high": high, "n": len(a)}
    if weights is None and _binary(a) and _binary(b):
        p, only_a, only_b = mcnemar(a, b)
        out |= {"p": p, "test": "McNemar, exact", "only_a": only_a, "only_b": only_b}
    else:
        p = shifted(delta, seen)
        out |= {"p": p, "test": f"paired bootstrap, {len(delta):,} draws"}
    spread = float(delta.std())
    out["needed"] = math.ceil(len(a) * ((1.96 + 0.84) * spread / seen) ** 2) if seen and spread else None
    return out


def shifted(delta, seen: float) -> float:
    """p of a difference ``seen`` under resampled differences ``delta`` shifted to zero mean effect."""
    return float((1 + (np.abs(delta - seen) >= abs(seen) - 1e-15).sum()) / (1 + len(delta))) if seen else 1.0


def tiers(scores, weights=None, *, unit: float = 1.0, lower: bool = True, level: float = 0.05, seed: int = 0) -> dict:
    """Order k models and divide them where a paired test says so.

    All pairs are tested on the same resamples (McNemar for right and wrong), p is Holm-corrected over the pairs. A tier begins
    with the best model that is left; who cannot be told apart from that one belongs to it.

    Args:
        scores: float array [k, n]. lower: small values are good.

    Returns:
        ``order`` (indices, best first), ``tier`` (0, 1, ... by index), ``p`` (adjusted, [k][k]), ``values``.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    k = len(scores)
    values = [value(row, weights, unit) for row in scores]
    order = sorted(range(k), key=lambda i: values[i] if lower else -values[i])
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    if weights is None and _binary(scores):
        raw = [mcnemar(scores[i], scores[j])[0] for i, j in pairs]
    else:
        drawn = resample(scores, weights, unit=unit, seed=seed)
        raw = [shifted(drawn[:, j] - drawn[:, i], values[j] - values[i]) for i, j in pairs]
    p = [[1.0] * k for _ in range(k)]
    for (i, j), adjusted in zip(pairs, holm(raw)):
        p[i][j] = p[j][i] = adjusted
    tier, leader, now = [0] * k, None, -1
    for i in order:
        if leader is None or p[leader][i] < level:
            leader, now = i, now + 1
        tier[i] = now
    return {"order": order, "tier": tier, "p": p, "values": values}


def summary(values) -> dict:
    """n, mean, sd, min, max and the 95 % interval of the mean (Student's t; None with fewer than two values)."""
    values = np.asarray([v for v in values if v is not None], np.float64)
    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "sd": None, "min": None, "max": None, "low": None, "high": None}
    mean, out = float(values.mean()), {}
    if n > 1:
        sd = float(values.std(ddof=1))
        half = (STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96) * sd / math.sqrt(n)
        out = {"sd": sd, "low": mean - half, "high": mean + half}
    return {"n": n, "mean": mean, "sd": None, "min": float(values.min()), "max": float(values.max()), "low": None, "high": None} | out


def smooth(values, weight: float) -> list:
    """Exponential moving average without the pull towards the start; gaps (None) stay gaps. ``weight`` 0 changes nothing."""
    if not weight:
        return list(values)
    out, mean, norm = [], 0.0, 0.0
    for v in values:
        if v is None:
            out.append(None)
            continue
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def front(x, y, *, lower_x: bool = True, lower_y: bool = True) -> list[bool]:
    """Which points no other point beats: at least as good on both axes and better on one. Missing figures are never on it."""
    points = [(None if a is None else (a if lower_x else -a), None if b is None else (b if lower_y else -b)) for a, b in zip(x, y)]
    full = [p for p in points if None not in p]
    return [None not in p and not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in full) for p in points]

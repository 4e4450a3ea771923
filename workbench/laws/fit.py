"""The robust fitter that the laws share: Huber loss on log errors, many L-BFGS starts, bootstrap intervals.

The recipe is that of "Chinchilla Scaling: A replication attempt": minimise the *sum* of Huber losses (delta 1e-3) of log
prediction minus log measurement from many starts, and take intervals from refits to resampled points. Two things are made
quicker so that a page can wait for it: a large grid is evaluated at once and only its best points start L-BFGS; the refits of
all resamples run together, as one batch of Levenberg-Marquardt iterations that start at the optimum.

A model is a function ``f(theta) -> log prediction`` of ``theta`` [..., p] to [..., n], written with numpy functions that accept
complex numbers: gradients are taken by the complex step, exact to rounding.
"""

from __future__ import annotations

import numpy as np

DELTA = 1e-3
STEP = 1e-30
DRAWS = 200
"""Bootstrap resamples."""
ILL = 1e7
"""Condition number of the scaled Jacobian beyond which constants trade off against one another."""


def logsumexp(*terms):
    """``log(sum(exp(terms)))`` for real or complex arrays of one shape."""
    top = terms[0].real
    for t in terms[1:]:
        top = np.maximum(top, t.real)
    return top + np.log(sum(np.exp(t - top) for t in terms))


def huber(r, delta: float = DELTA):
    """Huber loss of each residual."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def jacobian(f, theta):
    """``(f(theta) [B, n], its derivatives [B, n, p])`` for theta [B, p]."""
    p = theta.shape[-1]
    moved = theta[:, None, :] + 1j * STEP * np.eye(p)
    return f(theta), np.swapaxes(f(moved).imag / STEP, -1, -2)


def lbfgs(f, y, start, low, high, delta: float = DELTA, iterations: int = 500):
    """One L-BFGS-B run; ``(theta, objective)``."""
    from scipy.optimize import minimize

    # The whole objective is scaled by delta: the solver's tolerances are absolute, and delta is small.
    scale = 1.0 / (delta * max(delta, 1e-6) * len(y))

    def objective(theta):
        value, slope = jacobian(f, theta[None])
        r = value[0].real - y
        if not np.all(np.isfinite(r)):
            return 1e300, np.zeros_like(theta)
        return scale * float(huber(r, delta).sum()), scale * (np.clip(r, -delta, delta) @ slope[0])

    done = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(low, high)),
        options={"maxiter": iterations, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 20},
    )
    return done.x, float(done.fun) / scale


def marquardt(f, y, theta, counts, low, high, delta: float = DELTA, iterations: int = 60):
    """Levenberg-Marquardt on reweighted squares for many problems at once.

    Args:
        theta: float64 [B, p], the starts.
        counts: float64 [B, n], how often each resample holds each point.

    Returns:
        ``(theta [B, p], objective [B])``.
    """
    theta = np.array(theta, float)
    y = np.broadcast_to(y, counts.shape)
    damping = np.full(len(theta), 1e-2)

    def cost(t):
        with np.errstate(all="ignore"):
            c = (counts * huber(f(t).real - y, delta)).sum(-1)
        return np.where(np.isfinite(c), c, np.inf)

    best = cost(theta)
    for _ in range(iterations):
        with np.errstate(all="ignore"):
            value, slope = jacobian(f, theta)
        r = value.real - y
        weight = counts / np.maximum(1.0, np.abs(r) / delta)
        grad = np.einsum("bnp,bn->bp", slope, weight * r)
        hess = np.einsum("bnp,bn,bnq->bpq", slope, weight, slope)
        size = np.maximum(np.einsum("bpp->bp", hess), 1e-12)
        hess = hess + np.einsum("bp,pq->bpq", size * damping[:, None] + 1e-14, np.eye(theta.shape[1]))
        bad = ~(np.isfinite(hess).all((1, 2)) & np.isfinite(grad).all(1))
        hess[bad], grad[bad] = np.eye(theta.shape[1]), 0.0
        moved = np.clip(theta - np.linalg.solve(hess, grad[..., None])[..., 0], low, high)
        now = cost(moved)
        better = now < best
        small = better & (best - now <= 1e-9 * best)
        theta[better], best = moved[better], np.where(better, now, best)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
        if np.all(small | (damping >= 1e8)):
            break
    return theta, best


def solve(f, y, grid, low, high, *, delta: float = DELTA, starts: int = 24, iterations: int = 300):
    """The best of many L-BFGS runs.

    Args:
        y: float64 [n], log measurements.
        grid: float64 [G, p], candidates; the best ``starts`` of them begin a run each.

    Returns:
        float64 [p].
    """
    y, grid, low, high = (np.asarray(a, float) for a in (y, grid, low, high))
    grid = np.clip(grid, low, high)
    with np.errstate(all="ignore"):
        first = np.concatenate(
            [
                huber(f(part).real - y, max(delta, 0.05)).sum(-1)
                for part in np.array_split(grid, max(1, len(grid) * len(y) // 2_000_000))
            ]
        )
    chosen = grid[np.argsort(np.where(np.isfinite(first), first, np.inf))[:starts]]
    best = None
    for start in chosen:
        theta, value = lbfgs(f, y, start, low, high, delta, iterations)
        if best is None or value < best[1]:
            best = theta, value
    theta, value = marquardt(f, y, best[0][None], np.ones((1, len(y))), low, high, delta)
    return theta[0] if value[0] <= best[1] else best[0]


def counts_of(n: int, draws: int, seed: int = 0, block: int = 1, least: int = 1):
    """How often each of n points is in each resample, float64 [draws, n]; blocks of neighbours where points are correlated.

    Resamples with fewer than ``least`` distinct points cannot determine the constants and are drawn again.
    """
    rng, out = np.random.default_rng(seed), np.zeros((draws, n))
    blocks = -(-n // block)
    for i in range(draws):
        for _ in range(50):
            if block == 1:
                got = np.bincount(rng.integers(0, n, n), minlength=n)
            else:
                at = (rng.integers(0, max(1, n - block + 1), blocks)[:, None] + np.arange(block)).ravel()
                got = np.bincount(at[at < n], minlength=n)
            if np.count_nonzero(got) >= min(least, n):
                break
        out[i] = got
    return out


def bootstrap(
    f,
    y,
    theta,
    low,
    high,
    *,
    delta: float = DELTA,
    draws: int = DRAWS,
    block: int = 1,
    seed: int = 0,
    least: int | None = None,
    iterations: int = 40,
):
    """Refits to resamples of the points, warm-started at ``theta``; float64 [draws, p]."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    counts = counts_of(len(y), draws, seed, block, len(theta) + 1 if least is None else least)
    # A start some way off keeps a resample from stopping at the first flat place.
    begin = np.clip(np.tile(theta, (draws, 1)), low, high)
    return marquardt(f, np.asarray(y, float), begin, counts, low, high, delta, iterations)[0]


def condition(f, theta) -> float:
    """Condition number of the Jacobian at the solution, columns scaled to length one."""
    _, slope = jacobian(f, np.asarray(theta, float)[None])
    length = np.linalg.norm(slope[0], axis=0)
    if np.any(length < 1e-12):
        return float("inf")
    return float(np.linalg.cond(slope[0] / length))


def power_of_ten(values) -> float:
    """Largest over smallest value."""
    values = np.asarray(values, float)
    return float(values.max() / values.min())


def doubts(constants, n: int, p: int, cond: float) -> list[str]:
    """Warnings that any fit may deserve: few points, bad conditioning, constants that the points leave open."""
    found = []
    if n < 3 * p:
        found.append(f"{n} points for {p} constants: the intervals are too narrow to be believed below about {3 * p} points.")
    loose = [c.name for c in constants if c.low is not None and c.high - c.low > 1.5 * abs(c.value)]
    if cond > ILL:
        found.append(
            "The points are badly conditioned: several sets of constants fit them equally well. Vary size and tokens independently."
        )
    if loose:
        found.append(
            f"The points leave {', '.join(loose)} open: "
            + ("its interval is" if len(loose) == 1 else "their intervals are")
            + " wider than the value."
        )
    return found

"""The order in which examples are seen: a pure function of seed, pass and sizes, so that a plan can know it too. No torch."""

from __future__ import annotations

WINDOW = 50
"""Batches that are sorted by length together."""


def like_lengths(sizes, size: int, seed: int, epoch: int):
    """Indices of one pass in batches of ``size`` examples of like lengths, in random order.

    Args:
        sizes: numpy array [examples] of lengths.

    Returns:
        int array [examples]: row ``i`` of the pass is in batch ``i // size``.
    """
    import numpy as np

    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    # Sorting inside windows of 50 batches keeps the draw random and makes nearly every batch one length.
    window = size * WINDOW
    order = np.concatenate([chunk[np.argsort(sizes[chunk], kind="stable")]
                            for chunk in (order[i: i + window] for i in range(0, len(order), window))])
    full = len(order) // size * size
    blocks = order[:full].reshape(-1, size)[rng.permutation(full // size)].reshape(-1)
    return np.concatenate([blocks, order[full:]])


def longest(sizes, size: int, seed: int, batches: int) -> int:
    """The largest of ``sizes`` among the first ``batches`` batches of the first pass."""
    import numpy as np

    sizes = np.asarray(sizes)
    seen = like_lengths(sizes, size, seed, 0)[: size * batches]
    return int(sizes[seen].max())

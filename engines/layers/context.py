"""A weight decomposed by the directions that its inputs use.

Source: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models.
"""

from __future__ import annotations

import torch

from engines.errors import RunFailed


class SecondMoment:
    """Mean over samples of X^T X, each sample divided by the size of its largest entry: [features, features], float32, not centred."""

    def __init__(self):
        self.total: torch.Tensor | None = None
        self.samples = 0

    def __call__(self, rows: torch.Tensor) -> None:
        """Take in one sample [tokens, features]."""
        x = rows.float()
        # The largest entry and then its size, as released; zero inputs stay zero.
        most = x.max().abs()
        x = x / most if most > 0 else x
        self.total = x.t() @ x if self.total is None else self.total.addmm_(x.t(), x)
        self.samples += 1

    def mean(self) -> torch.Tensor:
        return self.total / max(1, self.samples)


def damped(moment: torch.Tensor, accuracy: float = 0.05) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The matrix with just enough added to its diagonal to be inverted, its inverse, and the damping.

    The damping is a share of the mean of the diagonal; it starts at 0.01 and doubles until ||C C^-1 - I||_F < ``accuracy``.

    Raises:
        RunFailed: the matrix is zero or not finite.
    """
    eye = torch.eye(len(moment), device=moment.device)
    mean, damping = moment.diagonal().mean(), 0.01
    while bool(torch.isfinite(mean)) and mean > 0 and damping < 1e6:
        changed = moment + eye * (mean * damping)
        inverse, failed = torch.linalg.inv_ex(changed)
        if not failed and torch.dist(changed @ inverse, eye) < accuracy:
            return changed, inverse, damping
        damping *= 2
    raise RunFailed("the inputs of a layer are all zero or not finite, so its weight cannot be decomposed by them",
                    "Use other calibration data")


def decompose(weight: torch.Tensor, moment: torch.Tensor, inverse: torch.Tensor, rank: int, form: str):
    """The components of W that the inputs use most (``ipm``) or least (``kpm``).

    W C = U diag(s) V^T, so W = U diag(s) (V^T C^-1).

    Args:
        weight: [out, in]. moment, inverse: as from ``damped``.

    Returns:
        u [out, rank], s [rank], v [rank, in], and the share of ||W C||_F^2 that they hold.
    """
    u, s, v = torch.linalg.svd(weight.float() @ moment, full_matrices=False)
    part = slice(None, rank) if form == "ipm" else slice(len(s) - rank, None)
    share = float(s[part].square().sum() / s.square().sum().clamp_min(1e-30))
    return u[:, part], s[part], v[part] @ inverse, share

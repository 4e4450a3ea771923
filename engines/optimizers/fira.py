"""Fira's optimizer: Adam in a subspace of each gradient, and what the subspace leaves out, scaled as Adam would have scaled it.

Source: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
"""

from __future__ import annotations

import torch

from engines.optimizers.projected import Projected, put

TINY = 1e-8


class Fira(Projected):
    """As ``Projected``, whose full gradients wait for the step because the rest of each is needed there.

    Args:
        gamma: the norm of a matrix's rest grows by this factor at most from one step to the next.
        by: ``column`` scales each index of the larger side by itself, ``matrix`` the whole rest alike.
    """

    def __init__(self, groups, *, gamma: float = 1.01, by: str = "column", **options):
        super().__init__(groups, **{**options, "early": False})
        self.gamma, self.by = gamma, by

    def collect(self, p, gradient) -> None:
        super().collect(p, gradient)
        self.whole = gradient.float()

    def _direction(self, p, group, low: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        turned = self._basis(state)
        found = self._adam(state, low, group)
        # The gradient is used up: the rest, and in the end the whole update, take its place.
        rest, self.whole = _back_onto(self.whole, low, turned, -1.0), None
        rest.mul_(scaling(found, low, p.shape, self.by))
        norm = rest.norm()
        if "rest" in state:
            # Only growth is held back; the limited norm is the next one's measure.
            factor = self.gamma / torch.clamp(norm / (state["rest"] + TINY), min=self.gamma)
            rest.mul_(factor)
            norm = norm * factor
        put(state, "rest", norm)
        # A tensor without dimensions: reading it would make a GPU wait in every step.
        put(state, "share", norm / (norm.square() + found.square().sum()).sqrt().clamp(min=TINY))
        p.residual = state["share"]
        return _back_onto(rest, found, turned, 1.0)

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "share" in state:
                p.residual = state["share"]


def scaling(direction: torch.Tensor, low: torch.Tensor, shape, by: str = "column") -> torch.Tensor:
    """How much Adam changed the norm of the projected gradient ``low`` [m, r] or [r, n]: [m, 1], [1, n] or a scalar."""
    if by == "matrix":
        return direction.norm() / (low.norm() + TINY)
    side = 1 if shape[0] >= shape[1] else 0
    return direction.norm(dim=side, keepdim=True) / (low.norm(dim=side, keepdim=True) + TINY)


def _back_onto(onto: torch.Tensor, low: torch.Tensor, p: torch.Tensor, factor: float) -> torch.Tensor:
    """``onto`` [m, n] plus ``factor`` times ``low`` brought back through ``p``, in place."""
    return onto.addmm_(low, p.t(), alpha=factor) if onto.shape[0] >= onto.shape[1] else onto.addmm_(p, low, alpha=factor)

"""AdamW that keeps no state of what is frozen just now. Used for LISA, whose memory is that of the blocks in training.

``torch.optim.AdamW`` passes a frozen parameter over, and keeps its moments for as long as the optimizer lives.
"""

from __future__ import annotations

import torch


def renew(parameter: torch.nn.Parameter) -> None:
    """Before its next step ``parameter`` loses its moments and its count of steps."""
    parameter.renewed = True


class _Releasing:
    """Mixed into an optimizer: what does not require a gradient loses gradient and state before the step makes any new state."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            if not p.requires_grad:
                p.grad = None
                self.state.pop(p, None)
            if p.__dict__.pop("renewed", False):
                self.state.pop(p, None)
        return super().step(closure)


class ReleasingAdamW(_Releasing, torch.optim.AdamW):
    """AdamW with the states of trained parameters only."""


class ReleasingSGD(_Releasing, torch.optim.SGD):
    """SGD with the momentum of trained parameters only."""

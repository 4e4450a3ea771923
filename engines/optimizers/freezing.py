"""Optimizers that leave the first columns of chosen parameters exactly where they are. Used for LaMDA's gradual freezing.

A zero gradient does not freeze a weight under AdamW: its moments and the weight decay go on moving it.
"""

from __future__ import annotations

import torch


def freeze(parameter: torch.nn.Parameter, columns: int) -> None:
    """From now on the first ``columns`` columns of ``parameter`` ([rows, columns]) keep their values."""
    parameter.frozen_columns = columns


class _Freezing:
    """Mixed into an optimizer: frozen columns are put back after each step, and fully frozen parameters lose their state."""

    @torch.no_grad()
    def step(self, closure=None):
        kept = []
        for p in (p for group in self.param_groups for p in group["params"]):
            columns = getattr(p, "frozen_columns", 0)
            if not columns:
                continue
            if columns >= p.shape[1]:
                p.grad = None
                self.state.pop(p, None)
            elif p.grad is not None:
                p.grad[:, :columns] = 0
                for value in self.state.get(p, {}).values():
                    if torch.is_tensor(value) and value.shape == p.shape:
                        value[:, :columns] = 0
                kept.append((p, columns, p[:, :columns].clone()))
        found = super().step(closure)
        for p, columns, value in kept:
            p[:, :columns] = value
        return found


class FreezingAdamW(_Freezing, torch.optim.AdamW):
    """AdamW that obeys ``freeze``."""


class FreezingSGD(_Freezing, torch.optim.SGD):
    """SGD that obeys ``freeze``."""

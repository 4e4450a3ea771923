"""Planned learning rates, and the two areas under them that the annealing law is made of."""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import InputError
from workbench.laws.base import percent

KINDS = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class Schedule:
    """A planned learning rate: ``rates()`` gives one value for each step."""

    kind: str = "cosine"
    steps: int = 1000
    peak: float = 1e-3
    warmup: float = 0.03
    """Share of the steps."""
    final: float = 0.0
    """Learning rate at the end as a share of the peak."""
    decay: float = 0.2
    """Share of the steps in which warmup-stable-decay falls, linearly."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError("schedule", self.kind, "there is no such schedule", "Choose " + ", ".join(KINDS))
        if self.steps < 2:
            raise InputError("steps", self.steps, "fewer than 2", "Give the number of optimizer steps")
        if self.peak <= 0:
            raise InputError("peak", self.peak, "not above zero", "Give the highest learning rate, such as 1e-3")

    def rates(self):
        """float64 [steps]."""
        import numpy as np

        from engines.schedules.rate import rate

        share = np.arange(self.steps) / self.steps
        if self.kind != "wsd":
            return self.peak * np.array([rate(p, schedule=self.kind, warmup=self.warmup, final=self.final) for p in share])
        held = np.array([rate(p, schedule="constant", warmup=self.warmup, final=self.final) for p in share])
        left = np.clip((1 - share) / max(self.decay, 1e-9), 0, 1)
        return self.peak * held * (self.final + (1 - self.final) * left)

    @property
    def words(self) -> str:
        return f"WSD, falling in the last {percent(self.decay)}" if self.kind == "wsd" else self.kind


def areas(lr, decay: float):
    """``(S1, S2)`` after each step: the area under the learning rate, and the annealing area.

    S1 = sum of lr. S2 = sum of m with m_i = decay m_(i-1) + lr_(i-1) - lr_i from the end of the warm-up on, so that it is zero
    under a constant learning rate; what climbs again later counts against it.
    """
    import numpy as np
    from scipy.signal import lfilter

    lr = np.asarray(lr, float)
    fall = np.zeros_like(lr)
    top = warm(lr)
    fall[top + 1 :] = lr[top:-1] - lr[top + 1 :]
    return np.cumsum(lr), np.cumsum(lfilter([1.0], [1.0, -decay], fall))


def warm(lr) -> int:
    """Index of the last step of the warm-up: where the learning rate first stops climbing."""
    import numpy as np

    falls = np.flatnonzero(np.diff(lr) <= 0)
    return int(falls[0]) if len(falls) else len(lr) - 1

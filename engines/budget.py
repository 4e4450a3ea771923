"""The budget of a run: limits, any of which may be absent."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from engines.errors import InputError

LIMITS = {
    "minutes": "minutes of the whole run, evaluations included",
    "steps": "optimizer steps in all training stages together",
    "tokens": "training tokens (causal-lm) or examples (classification) in all training stages together",
    "memory_gb": "peak memory in GB (1e9 bytes): resident set on a CPU, allocator on a GPU",
    "trainable": "trainable parameters: a share (0.01) or a count (300000)",
    "size_mb": "size of the saved result in MB (1e6 bytes)",
    "joules": "energy in joules, where the device has a counter",
    "quality": "the worst acceptable result: bits/byte at most, or accuracy in % at least (a value of at most 1 is a share)",
}


@dataclass(frozen=True)
class Budget:
    """Limits of a run; ``None`` means no limit.

    Raises:
        InputError: a limit is zero, negative, not a number, both a step and a token limit are set, ``trainable`` is neither a share
            nor a whole count, or ``quality`` can be reached in no metric.
    """

    minutes: float | None = None
    steps: int | None = None
    tokens: int | None = None
    memory_gb: float | None = None
    trainable: float | None = None
    size_mb: float | None = None
    joules: float | None = None
    quality: float | None = None
    """The worst acceptable result in the metric of the task: bits/byte at most, accuracy (in %, or a share of at most 1) at least."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"budget.{field.name}", value, "not a number",
                                 f"Give {LIMITS[field.name]}, or leave it out")
            if value <= 0:
                raise InputError(f"budget.{field.name}", value, "a limit must be above zero",
                                 f"Give {LIMITS[field.name]}, or leave it out for no limit")
            if field.name in ("steps", "tokens"):
                if value != int(value):
                    raise InputError(f"budget.{field.name}", value, "not a whole number", "Give a whole number")
                object.__setattr__(self, field.name, int(value))
        if self.trainable is not None and self.trainable > 1 and self.trainable != int(self.trainable):
            raise InputError("budget.trainable", self.trainable, "neither a share nor a count of parameters",
                             "Give a share of at most 1 such as 0.01, or a whole count such as 300000")
        if self.quality is not None and self.quality > 100:
            raise InputError("budget.quality", self.quality, "no metric reaches this",
                             "Give bits/byte at most, such as 1.2, or accuracy at least, from 0 to 100 %")
        if self.steps is not None and self.tokens is not None:
            raise InputError("budget.tokens", self.tokens, "steps and tokens are two names for one limit",
                             "Keep one of the two")

    def trainable_count(self, parameters: int) -> int | None:
        """The limit on trainable parameters as a count; a value of at most 1 is a share of ``parameters``."""
        if self.trainable is None:
            return None
        return int(self.trainable * parameters) if self.trainable <= 1 else int(self.trainable)

    def quality_floor(self, metric: str) -> float | None:
        """The worst acceptable value as ``metric`` is stored: bits/byte as it is, accuracy as a share; None: no floor."""
        if self.quality is None or metric != "accuracy":
            return self.quality
        return self.quality if self.quality <= 1 else self.quality / 100

    def limits(self) -> dict[str, float]:
        """Only the limits that are set."""
        return {k: v for k, v in vars(self).items() if v is not None}

"""Holding a run to its minutes: how the seconds that are left are divided among what is still to come. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

SPEED = 0.8
"""Seconds that the timing of the result takes (``engines.speed``) unless there are fewer."""
SPEED_LEAST = 0.25
DURING = 0.2
"""Share of a training stage's seconds that evaluations before its end may take."""
TWICE = 0.05
"""An evaluation of the last stage that takes more than this share of the minutes is that of the saved result, done once."""
TAIL = 0.1
"""Seconds between the last evaluation of a stage and the beginning of the next: merging, layer figures, events."""
WRITTEN = 250e6
"""Bytes per second of a write that is waited for, as long as none was timed."""


def evaluations(wanted: int, seconds: float | None, each: float) -> int:
    """Evaluations of a training stage, that at its end included, under a limit of ``seconds`` when one takes ``each`` seconds."""
    if not seconds or each <= 0:
        return wanted
    return max(1, min(wanted, 1 + int(DURING * seconds / each)))


def once(each: float, minutes: float | None) -> bool:
    """True when the last training-free stage is scored by the evaluation of the saved result alone."""
    return minutes is not None and each > TWICE * 60 * minutes


def shares(pipeline) -> dict[int, float]:
    """Share of the training seconds for each training stage, by its place; they add up to 1.

    A method may weigh its stages by an attribute ``time_share`` (1 where it has none).
    """
    weights = {i: float(getattr(m, "time_share", 1.0)) for i, m in enumerate(pipeline) if m.card.trains}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()} if total else {}


@dataclass
class Ahead:
    """What is known of the rest of a run; all in seconds.

    ``evaluation`` is that of the model as it stands, without adapters; ``ratio`` says how many times as long it takes
    after a stage, ``stage`` what a training-free stage takes. Measured figures replace forecast ones as the run goes on.
    """

    evaluation: float = 1.0
    ratio: dict[int, float] = field(default_factory=dict)
    stage: dict[int, float] = field(default_factory=dict)
    save: float = 1.0
    keep: float = 0.1
    checkpoint: float = 0.2

    def after(self, pipeline, index: int, minutes: float | None) -> float:
        """Seconds that the run needs after stage ``index``, without those of later training stages."""
        each, total = self.evaluation, TAIL
        for i in range(index + 1, len(pipeline)):
            each *= self.ratio.get(i, 1.0)
            total += self.keep + TAIL
            if not pipeline[i].card.trains:
                total += self.stage.get(i, 2 * self.evaluation)
                if i + 1 < len(pipeline) or not once(each, minutes):
                    total += each
        return total + self.save + each + SPEED

    def end(self, pipeline, index: int) -> float:
        """Seconds from the evaluation of stage ``index``, the last, to the end of the run, with the shortest timing."""
        return self.save + self.evaluation + SPEED_LEAST

"""How the engines say what happens, without knowing who listens.

The workbench passes a reporter that writes to SQLite; tests pass ``Recorder``. Every call is cheap
(it appends to a queue) and never raises.
"""

from __future__ import annotations

import time
from typing import Any, Protocol


class Reporter(Protocol):
    """What a training run tells the outside world. ``t`` is seconds since the run started."""

    def points(self, step: int, values: dict[str, float]) -> None:
        """One value for each named series at an optimizer step of the whole run (loss, lr, ...)."""

    def event(self, kind: str, text: str, **data: Any) -> None:
        """A dated fact: ``stage``, ``evaluation``, ``checkpoint``, ``warning``, ``choice``, ``memory``."""

    def log(self, line: str) -> None:
        """One line for the log tail."""

    def phase(self, name: str) -> None:
        """The clock and the memory peak now belong to this phase: load, data, evaluate, save or ``N method``."""

    def progress(self, share: float, left: float | None) -> None:
        """Share of the budget used (0 to 1) and seconds left, if known."""

    def layers(self, step: int, figures: dict[str, list]) -> None:
        """Layer map: ``{"rank": [[layer, role, value], ...], "sparsity": [...]}``."""

    def evaluation(self, name: str, stage: int, result: Any) -> None:
        """An ``engines.evaluation.Evaluation`` made at ``stage`` (-1: the model as it came)."""

    def wants(self) -> str | None:
        """``"stop"`` or ``"pause"`` when the person asked for it, else None. Asked once per step."""


class Recorder:
    """A reporter that keeps everything in lists; for tests and scripts."""

    def __init__(self):
        self.series: dict[str, list[tuple[int, float]]] = {}
        self.events: list[tuple[str, str, dict]] = []
        self.lines: list[str] = []
        self.phases: list[tuple[str, float]] = []
        self.maps: list[tuple[int, dict]] = []
        self.evaluations: list[tuple[str, int, Any]] = []
        self.share = 0.0
        self.want: str | None = None

    def points(self, step, values):
        for name, value in values.items():
            self.series.setdefault(name, []).append((step, float(value)))

    def event(self, kind, text, **data):
        self.events.append((kind, text, data))

    def log(self, line):
        self.lines.append(line)

    def phase(self, name):
        self.phases.append((name, time.perf_counter()))

    def progress(self, share, left):
        self.share = share

    def layers(self, step, figures):
        self.maps.append((step, figures))

    def evaluation(self, name, stage, result):
        self.evaluations.append((name, stage, result))

    def wants(self):
        return self.want

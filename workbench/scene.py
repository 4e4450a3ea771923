"""What a forecast is made from and what it is made of: the machine, the scene of a spec, phases, stages and their sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engines.heads import has_head
from engines.method import Footprint, Method
from engines.profile import Batch, ModelProfile
from workbench.sources import DataFacts

PARTS = ("context", "weights", "adapter", "gradients", "optimizer", "activations", "logits", "kv", "extra")
EXACT = ("context", "weights", "adapter", "gradients", "optimizer")
"""Parts that follow from shapes alone, and the process, which was measured; calibration multiplies the others."""
LEAST_STEPS = 10
"""Fewer optimizer steps than this are no training: a minutes limit that leaves less is called over."""


class Held:
    """A profile as a cache argument: compared by identity, because hashing thousands of tensors costs milliseconds."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Held) and self.value is other.value

    def __hash__(self):
        return id(self.value)


@dataclass(frozen=True)
class Machine:
    """What the forecast takes from ``workbench.machine``: rates, bytes of an empty process, and how they are known."""

    device: str = "cpu"
    flops: dict = field(default_factory=lambda: {"float32": 24e9, "bfloat16": 60e9})
    bandwidth: float = 8e9
    context: int = 450_000_000
    """Bytes of the process and its libraries once something was trained; before that ``inference``, at the beginning ``imported``."""
    inference: int = 0
    imported: int = 0
    scale: dict = field(default_factory=dict)
    """Measured over computed seconds of the reference training step, for each type of the products."""
    bf16_gain: float = 1.0
    """How many times faster a training step is in bf16 than in fp32."""
    load_seconds: float = 0.2
    cores: int = 2
    how: str = ""


@dataclass(frozen=True)
class Scene:
    """Everything that a cost depends on besides the spec. ``model`` already carries the head of the task."""

    model: ModelProfile
    stored: ModelProfile
    facts: DataFacts
    task: str
    machine: Machine
    speed: dict = field(default_factory=dict)
    """Measured training units per second from this database, by key (see ``workbench.planner``)."""
    correction: Any = None
    """``workbench.calibration.Correction`` of this machine, or None."""

    @property
    def fresh_labels(self) -> int:
        """Classes of the head that the task adds to the model; 0 where there is none, or the model brings a trained one."""
        return 0 if self.task == "causal-lm" or has_head(self.stored.config) else self.facts.labels


@dataclass
class Phase:
    """One bar of the memory chart and one piece of the clock."""

    name: str
    seconds: float
    parts: dict[str, int]
    times: int = 1
    flops: float = 0.0
    raw: tuple[int, float] | None = None
    """Bytes and seconds before they were corrected."""
    raw_exact: int | None = None

    @property
    def kind(self) -> str:
        """The phase without the number of its stage: load, evaluate, save, speed or the id of a method."""
        return self.name.split(" ", 1)[-1]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def exact(self) -> int:
        return sum(self.parts.get(p, 0) for p in EXACT)

    def correct(self, factor: float, offset: float = 0.0, seconds: float = 1.0) -> None:
        """Multiply the estimated parts by ``factor``, add ``offset`` bytes to the process, multiply the seconds by ``seconds``."""
        self.raw, self.raw_exact = (self.total, self.seconds), self.exact
        self.parts = {p: n if p in EXACT else round(n * factor) for p, n in self.parts.items()}
        self.parts["context"] = max(0, round(self.parts.get("context", 0) + offset))
        self.seconds *= seconds

    def as_dict(self) -> dict:
        return {
            "phase": self.name,
            "seconds": round(self.seconds, 2),
            "parts": {p: int(self.parts.get(p, 0)) for p in PARTS},
            "total": int(self.total),
        }


@dataclass
class StageCost:
    """One stage of the pipeline."""

    method: Method
    footprint: Footprint
    seconds: float
    steps: int
    units: int
    before: int
    after: int
    profile: ModelProfile
    speed: float = 0.0
    how: str = ""
    each: float = 0.0
    """Seconds of one optimizer step by the formula, before any correction."""
    step_flops: float = 0.0
    start: float = 0.0
    """Seconds before the first step of a stage that trains: passes over data, decompositions."""
    start_flops: float = 0.0
    entering: ModelProfile | None = None
    """The model as it enters a stage that trains, and the micro-batch."""
    batch: Batch | None = None


@dataclass
class Cost:
    """The whole run. ``least_seconds`` is what it takes with the smallest training that a schedule can complete in."""

    phases: list[Phase]
    stages: list[StageCost]
    steps: int
    units: int
    least_seconds: float
    size: int
    before_bytes: int
    bits_per_weight: float
    sparsity: float
    trainable: int
    how: str
    kv_per_token: int = 0
    """Bytes of keys and values that decoding keeps for each token of context."""
    joules: float | None = None
    joules_how: str = ""

    @property
    def flops(self) -> float:
        return sum(p.flops for p in self.phases)

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.phases)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda p: p.total)

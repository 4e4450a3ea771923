"""What a sweep is: a base spec with a space over its fields (or a list of specs), objectives, and when it ends."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from engines import registry
from engines.errors import InputError
from workbench.spec import RunSpec
from workbench.sweeps.space import Parameter, Space

SAMPLERS = {
    "tpe": "tree-structured Parzen estimator: learns from the trials so far which values are worth trying",
    "random": "independent draws",
    "grid": "every combination, in order",
    "nsga2": "a genetic algorithm for several objectives",
}
PRUNERS = {
    "none": "every trial runs to its end",
    "median": "a trial whose held-out loss is above the median of the others at the same share of the budget is stopped",
    "hyperband": "successive halving in several brackets of patience",
    "halving": "successive halving: at each rung the better half goes on",
}
OBJECTIVES = {
    "quality": ("", None, "the result's evaluation: bits/byte (lower) or accuracy (higher)"),
    "seconds": ("s", "minimize", "time of the whole run"),
    "memory": ("bytes", "minimize", "peak memory"),
    "size": ("bytes", "minimize", "size of the saved result"),
    "trainable": ("", "minimize", "trainable parameters"),
    "joules": ("J", "minimize", "energy, where there is a meter"),
}
"""Name -> unit, direction (None: by the metric), what it is."""
MOST_TRIALS = 1000


@dataclass(frozen=True)
class Objective:
    """What the trials are judged by."""

    name: str
    direction: str | None = None
    """minimize or maximize; None for quality until the metric is known."""

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise InputError("sweep.objectives", self.name, "there is no such objective",
                             registry.suggestion(str(self.name), OBJECTIVES))
        if self.direction is None:
            object.__setattr__(self, "direction", OBJECTIVES[self.name][1])
        elif self.direction not in ("minimize", "maximize"):
            raise InputError("sweep.objectives", self.direction, "not a direction", "Choose minimize or maximize")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, whole and checked.

    Raises:
        InputError: a field does not exist, a value is refused, or the parts contradict one another.
    """

    base: RunSpec
    parameters: tuple[Parameter, ...] = ()
    specs: tuple[RunSpec, ...] = ()
    objectives: tuple[Objective, ...] = (Objective("quality"),)
    sampler: str = "tpe"
    pruner: str = "none"
    trials: int | None = None
    minutes: float | None = None
    """Minutes of the whole sweep; no trial begins that is expected to end later."""
    seed: int = 0
    on: str | None = None
    """Address of a Ray cluster; None: this machine's queue."""
    space: Space = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if bool(self.parameters) == bool(self.specs):
            raise InputError("sweep.over", None, "a sweep needs fields to vary, or a list of specs, and not both",
                             "Add for example --over pipeline.0.rank=2,4,8")
        for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, name) not in known:
                raise InputError(f"sweep.{name}", getattr(self, name), f"there is no such {name}", "Choose " + ", ".join(known))
        names = [o.name for o in self.objectives]
        if not names or len(set(names)) < len(names):
            raise InputError("sweep.objectives", names, "none, or one twice", "Name each once: " + ", ".join(OBJECTIVES))
        _whole("sweep.seed", self.seed, 0, 2**31 - 1)
        if self.trials is not None:
            _whole("sweep.trials", self.trials, 1, MOST_TRIALS)
        if self.minutes is not None and (isinstance(self.minutes, bool) or not isinstance(self.minutes, (int, float))
                                         or not 0 < self.minutes <= 100_000):
            raise InputError("sweep.minutes", self.minutes, "not a number above zero",
                             "Give the minutes of the whole sweep, or leave it out")
        object.__setattr__(self, "space", Space(self.base, self.parameters))
        if self.specs:
            object.__setattr__(self, "sampler", "grid")
        most = len(self.points()) if self.sampler == "grid" else self.distinct()
        if self.trials is None:
            object.__setattr__(self, "trials", most if self.sampler == "grid" else MOST_TRIALS if self.minutes else 20)
        if most is not None:
            object.__setattr__(self, "trials", min(self.trials, most))
        if self.pruner != "none" and self.base.training.evaluations < 2 and not any(
                p.path == "training.evaluations" for p in self.parameters) and not self.specs:
            raise InputError("sweep.pruner", self.pruner, "a run with one evaluation has no curve to judge it by before its end",
                             "Set training.evaluations to 4 or more, or choose the pruner none")
        if self.on is not None and not (isinstance(self.on, str) and self.on.strip()):
            raise InputError("sweep.on", self.on, "not an address", "Write ray://HOST:PORT, or leave it out for this machine")

    def distinct(self) -> int | None:
        """How many different trials there can be; None: no end."""
        values = [p.values() for p in self.parameters]
        return None if any(v is None for v in values) else math.prod(len(v) for v in values)

    def points(self) -> list[dict[str, Any]]:
        """The trials of a grid, or of a list of specs (``{"spec": index}``), in order."""
        return [{"spec": i} for i in range(len(self.specs))] if self.specs else self.space.grid()

    def spec(self, params: dict[str, Any]) -> RunSpec:
        """The spec of a trial with these parameters.

        Raises:
            InputError: the combination is refused.
        """
        return self.specs[params["spec"]] if self.specs else self.space.spec(params)

    # -- in and out --------------------------------------------------------------------------------------
    @classmethod
    def read(cls, spec: dict | RunSpec, section: dict | None) -> SweepPlan:
        """From a spec and its ``sweep:`` section.

        Args:
            section: ``over`` ({path: list or range}) or ``specs`` (list of specs); ``objectives`` (names, or {name: direction}),
                ``sampler``, ``pruner``, ``trials``, ``minutes``, ``seed``, ``on``.

        Raises:
            InputError: as the constructor.
        """
        section = {} if section is None else section
        if not isinstance(section, dict):
            raise InputError("sweep", section, "not a mapping of fields",
                             "Write sweep: followed by over:, trials: and objectives:")
        known = ("over", "specs", "objectives", "sampler", "pruner", "trials", "minutes", "seed", "on")
        for key in section:
            if key not in known:
                raise InputError(f"sweep.{key}", section[key], "a sweep has no field of this name",
                                 registry.suggestion(str(key), known))
        base = spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec)
        over = section.get("over") or {}
        if not isinstance(over, dict):
            raise InputError("sweep.over", over, "not a mapping of paths to values",
                             "Write for example over: {pipeline.0.rank: [2, 4, 8]}")
        specs = section.get("specs") or ()
        if not isinstance(specs, (list, tuple)):
            raise InputError("sweep.specs", specs, "not a list of specs", "Write a list, each with model:, data: and pipeline:")
        given = {k: section[k] for k in ("sampler", "pruner", "trials", "minutes", "seed", "on") if section.get(k) is not None}
        return cls(base, tuple(Parameter.read(k, v) for k, v in over.items()), tuple(RunSpec.from_dict(s) for s in specs),
                   _objectives(section.get("objectives")), **given)

    def section(self) -> dict:
        """The ``sweep:`` section that reads back as this plan."""
        out: dict[str, Any] = {}
        if self.specs:
            out["specs"] = [s.to_dict() for s in self.specs]
        else:
            out["over"] = {p.path: p.plain() for p in self.parameters}
        out["objectives"] = {o.name: o.direction for o in self.objectives}
        out |= {"sampler": self.sampler, "pruner": self.pruner, "trials": self.trials, "seed": self.seed}
        return out | {k: v for k, v in (("minutes", self.minutes), ("on", self.on)) if v is not None}

    def directed(self, direction: str) -> SweepPlan:
        """The same with the direction of ``quality``, which the task decides."""
        return dataclasses.replace(self, objectives=tuple(
            o if o.direction else Objective(o.name, direction) for o in self.objectives))


def _objectives(given) -> tuple[Objective, ...]:
    if given in (None, (), [], {}):
        return (Objective("quality"),)
    if isinstance(given, str):
        given = [given]
    if isinstance(given, dict):
        return tuple(Objective(k, v) for k, v in given.items())
    if not isinstance(given, (list, tuple)):
        raise InputError("sweep.objectives", given, "not a list of names", "Choose from " + ", ".join(OBJECTIVES))
    return tuple(Objective(g) if not isinstance(g, dict) else Objective(**g) for g in given)


def _whole(field: str, value, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(field, value, f"not a whole number from {low} to {high}", "Choose one inside that range")

"""The space of a sweep: ranges and choices over any field of a spec, each value tried on the spec itself at construction."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

from engines import registry
from engines.errors import InputError
from workbench.spec import RunSpec

MOST_GRID, MOST_SHAPES = 1000, 256


def label(value: Any) -> str:
    """A short text for one choice; the same value has always the same."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(s, (dict, str)) for s in value) and value:
        return " + ".join(_stage(s) for s in value)
    if isinstance(value, dict) and "method" in value:
        return _stage(value)
    return json.dumps(value, sort_keys=True)


def _stage(stage) -> str:
    if isinstance(stage, str):
        return stage
    rest = ",".join(f"{k}={v}" for k, v in stage.items() if k != "method")
    return f"{stage.get('method')}{':' + rest if rest else ''}"


@dataclass(frozen=True)
class Parameter:
    """One dimension: a field's dotted path with a range (``low`` to ``high``) or ``choices``."""

    path: str
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    step: float | int | None = None
    choices: tuple = ()

    def __post_init__(self):
        where = f"sweep.over.{self.path}"
        if not self.path or not all(self.path.split(".")):
            raise InputError("sweep.over", self.path, "not the path of a field", "Use for example training.lr or pipeline.0.rank")
        if self.choices:
            labels = [label(c) for c in self.choices]
            if len(set(labels)) < len(labels):
                raise InputError(where, list(self.choices), "a value is given twice", "Keep each value once")
            return
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"{where}.{name}", value, "not a number", "Give low and high, or a list of values")
        if not self.low < self.high:
            raise InputError(where, [self.low, self.high], "low is not below high", "Give the smaller number first")
        if self.log and self.low <= 0:
            raise InputError(where, self.low, "a logarithmic range begins above zero", "Raise low, or leave log out")
        if self.step is not None:
            number = isinstance(self.step, (int, float)) and not isinstance(self.step, bool)
            if not number or not 0 < self.step <= self.high - self.low:
                raise InputError(f"{where}.step", self.step, "not a step inside the range",
                                 "Give a number above zero, or leave it out")
            if self.log:
                raise InputError(f"{where}.step", self.step, "a logarithmic range has no step", "Leave out step or log")
            if self.whole and not isinstance(self.step, int):
                raise InputError(f"{where}.step", self.step, "not a whole number, as low and high are", "Give a whole number")

    @property
    def whole(self) -> bool:
        """Only whole numbers: both ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def shapes(self) -> bool:
        """Whether it decides which fields there are (the pipeline, a stage, its method)."""
        parts = self.path.split(".")
        return parts[0] == "pipeline" and (len(parts) < 3 or parts[2] == "method")

    def values(self) -> list | None:
        """Every value, or None for a range without steps."""
        if self.choices:
            return list(self.choices)
        if self.step is None and not (self.whole and not self.log):
            return None
        step = self.step or 1
        count = int(math.floor((self.high - self.low) / step + 1e-9)) + 1
        return [self.low + i * step for i in range(count)]

    def ends(self) -> list:
        """The values whose acceptance shows that the whole parameter is accepted."""
        return list(self.choices) if self.choices else [self.low, self.high]

    def plain(self) -> list | dict:
        """As in YAML."""
        if self.choices:
            return list(self.choices)
        extra = ({"log": True} if self.log else {}) | ({"step": self.step} if self.step else {})
        return {"low": self.low, "high": self.high} | extra

    @classmethod
    def read(cls, path: str, given) -> Parameter:
        """From its YAML form: a list of values, or a mapping with low, high and optionally log or step.

        Raises:
            InputError: neither.
        """
        path = str(path).replace("[", ".").replace("]", "").strip()
        if isinstance(given, dict) and set(given) == {"choices"}:
            given = given["choices"]
        if isinstance(given, (list, tuple)):
            if len(given) < 1:
                raise InputError(f"sweep.over.{path}", given, "an empty list", "Give at least two values")
            return cls(path, choices=tuple(given))
        if not isinstance(given, dict):
            raise InputError(f"sweep.over.{path}", given, "neither a list of values nor a range",
                             "Write [2, 4, 8] or {low: 1e-4, high: 1e-2, log: true}")
        for key in given:
            if key not in ("low", "high", "log", "step"):
                raise InputError(f"sweep.over.{path}.{key}", given[key], "a range has no field of this name",
                                 "Use low, high, log and step")
        return cls(path, given.get("low"), given.get("high"), bool(given.get("log", False)), given.get("step"))


@dataclass(frozen=True)
class Space:
    """The parameters of a sweep over a base spec."""

    base: RunSpec
    parameters: tuple[Parameter, ...]

    def __post_init__(self):
        paths = [p.path for p in self.parameters]
        for path in paths:
            if paths.count(path) > 1:
                raise InputError("sweep.over", path, "given twice", "Keep one range for each field")
        shaping = [p for p in self.parameters if p.shapes]
        combinations = list(itertools.islice(itertools.product(*(p.ends() for p in shaping)), MOST_SHAPES))
        bases, refused = [], {}
        for values in combinations:
            chosen = {p.path: v for p, v in zip(shaping, values)}
            try:
                self.spec(chosen)
                bases.append(chosen)
            except InputError as e:
                for path, value in chosen.items():
                    refused.setdefault((path, label(value)), e)
        accepted = {(path, label(value)) for chosen in bases for path, value in chosen.items()}
        for key, error in refused.items():
            if key not in accepted:
                raise error
        for parameter in self.parameters:
            if not parameter.shapes:
                self._check(parameter, bases)

    def _check(self, parameter: Parameter, bases: list[dict]) -> None:
        """Every value must be accepted with at least one choice of the pipeline."""
        for value in parameter.ends():
            error = None
            for chosen in bases:
                try:
                    tree = self.tree(chosen)
                    if not _exists(tree, parameter.path):
                        error = error or _missing(tree, parameter.path, value)
                        continue
                    self.spec({**chosen, parameter.path: value})
                    break
                except InputError as e:
                    error = e
            else:
                raise error

    def tree(self, values: dict[str, Any]) -> dict:
        """The spec as a dict with these fields set; those of a stage whose method has no such field are left out."""
        tree = copy.deepcopy(self.base.to_dict())
        gone = []
        for path in sorted(values, key=lambda p: (p.count("."), not p.endswith(".method"), p)):
            parts, value = path.split("."), copy.deepcopy(values[path])
            if parts[0] == "pipeline" and len(parts) == 2:
                i = _index(tree, path, value)
                if value in (None, "none"):
                    gone.append(i)
                else:
                    tree["pipeline"][i] = {"method": value} if isinstance(value, str) else value
            elif parts[0] == "pipeline" and len(parts) == 3 and parts[2] == "method":
                i = _index(tree, path, value)
                stage = tree["pipeline"][i]
                kept = {row["name"] for row in registry.get(value).hyperparameters()} if isinstance(stage, dict) else set()
                # What both methods call alike stays; a value that only the old one accepts gives way to the new one's default.
                made = {k: v for k, v in (stage if isinstance(stage, dict) else {}).items() if k in kept}
                tree["pipeline"][i] = {"method": value, **_acceptable(value, made)}
            elif parts[0] != "pipeline" or len(parts) == 1 or _exists(tree, path):
                _place(tree, parts, value)
        for i in sorted(gone, reverse=True):
            del tree["pipeline"][i]
        return tree

    def spec(self, values: dict[str, Any]) -> RunSpec:
        """The spec of a trial.

        Raises:
            InputError: a value is refused.
        """
        return RunSpec.from_dict(self.tree(values))

    def used(self, values: dict[str, Any]) -> dict[str, Any]:
        """Only those parameters that this trial's pipeline has."""
        tree = self.tree(values)
        return {p: v for p, v in values.items() if not p.startswith("pipeline.") or p.count(".") < 2 or p.endswith(".method")
                or _exists(tree, p)}

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, the last parameter changing fastest; combinations that differ only in unused fields come once.

        Raises:
            InputError: a parameter has no steps, or there are too many combinations.
        """
        count = 1
        for parameter in self.parameters:
            values = parameter.values()
            if values is None:
                raise InputError(f"sweep.over.{parameter.path}", parameter.plain(), "a grid needs single values",
                                 "Give a list of values or a step, or choose the sampler tpe")
            count *= len(values)
        if count > MOST_GRID:
            raise InputError("sweep.sampler", "grid", f"the grid has {count:,} points",
                             f"Keep it to {MOST_GRID}, or choose the sampler tpe")
        found, seen = [], set()
        for values in itertools.product(*(p.values() for p in self.parameters)):
            point = self.used({p.path: v for p, v in zip(self.parameters, values)})
            key = json.dumps(point, sort_keys=True, default=str)
            if key not in seen:
                seen.add(key)
                found.append(point)
        return found


def _index(tree: dict, path: str, value) -> int:
    part = path.split(".")[1]
    if not part.isdigit() or int(part) >= len(tree["pipeline"]):
        raise InputError(path, value, f"the pipeline has {len(tree['pipeline'])} stages", "Count stages from 0")
    return int(part)


def _acceptable(method: str, settings: dict) -> dict:
    kept = {}
    for name, value in settings.items():
        try:
            registry.build({"method": method, name: value})
            kept[name] = value
        except InputError:
            pass
    return kept


def _exists(tree: dict, path: str) -> bool:
    """False where the stage or its method does not have the field; other paths are judged by the spec itself."""
    parts = path.split(".")
    if parts[0] != "pipeline" or len(parts) < 3:
        return True
    if not parts[1].isdigit() or int(parts[1]) >= len(tree["pipeline"]):
        return False
    stage = tree["pipeline"][int(parts[1])]
    method = stage if isinstance(stage, str) else stage.get("method")
    return parts[2] == "method" or parts[2] in {row["name"] for row in registry.get(method).hyperparameters()}


def _missing(tree: dict, path: str, value) -> InputError:
    """The error of a field of a stage that does not exist, as the spec itself says it."""
    try:
        RunSpec.from_dict(tree).setting(path, value)
    except InputError as e:
        return e
    return InputError(path, value, "there is no such field", "Use for example pipeline.0.rank")


def _place(tree: dict, parts: list[str], value) -> None:
    """Set a nested field; ``RunSpec.from_dict`` judges afterwards whether it exists."""
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, list):
            if isinstance(node[int(part)], str):
                node[int(part)] = {"method": node[int(part)]}
            node = node[int(part)]
            continue
        if part == "data" and isinstance(node.get("data"), str):
            node["data"] = {"source": node["data"]}
        child = node.setdefault(part, {})
        if not isinstance(child, (dict, list)):
            raise InputError(".".join(parts), value, "there is no such field",
                             "Use for example budget.minutes or pipeline.0.rank")
        node = child
    node[parts[-1]] = value


def untried(space: Space, tried: set[str], seed: int) -> dict[str, Any] | None:
    """A combination that is not in ``tried`` (JSON texts with sorted keys); None when the space is used up."""
    import random

    if math.prod(len(p.values()) for p in space.parameters) > MOST_GRID:
        rng = random.Random(seed)
        return space.used({p.path: rng.choice(p.values()) for p in space.parameters})
    left = [p for p in space.grid() if json.dumps(p, sort_keys=True) not in tried]
    return random.Random(seed).choice(left) if left else None

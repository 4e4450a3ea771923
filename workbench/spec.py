"""The exact settings of a run: frozen, checked at construction, the same from page, CLI and YAML."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engines import registry
from engines.budget import LIMITS, Budget
from engines.errors import InputError
from engines.method import Method
from engines.training.switch import Switch


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text and ``2:4`` as the number 124; people mean a number and a pattern."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")]
    for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
    r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either reading would take for a number: a run may be called ``0e0``."""


_Dumper.yaml_implicit_resolvers = {
    key: yaml.SafeDumper.yaml_implicit_resolvers.get(key, []) + _Loader.yaml_implicit_resolvers.get(key, [])
    for key in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}}


def read_yaml(text: str):
    """Parsed YAML, with numbers such as ``1e-3`` and patterns such as ``2:4`` as people mean them.

    Raises:
        ValueError: not YAML; the text says where and why.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the text"
        raise ValueError(f"not YAML at {where} ({getattr(e, 'problem', e)})") from None


@dataclass(frozen=True)
class Training:
    """Knobs of the training loop; ``auto`` leaves the choice to the planner, which records its reason."""

    lr: float | str = "auto"
    head_lr: float | str = "auto"
    """Peak rate of the classification head; 0: that of everything else."""
    batch: int | str = "auto"
    """Rows of one optimizer step (packed rows of ``length`` tokens for causal-lm, examples otherwise)."""
    length: int | str = "auto"
    """Tokens of a packed row, or the longest example kept."""
    accumulation: int | str = "auto"
    checkpointing: bool | str = "auto"
    loss_chunk: int | str = "auto"
    """Tokens whose logits are held at a time (causal-lm)."""
    precision: str = "auto"
    """fp32, bf16 or auto."""
    schedule: str = "cosine"
    warmup: float = 0.03
    """Share of the stage's budget."""
    final: float = 0.0
    """Learning rate at the end as a share of the peak."""
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    evaluations: int = 4
    """Evaluations during each training stage, the one at its end included."""
    items: int = 256
    """Items of each evaluation; 0 means all of them."""
    checkpoint_seconds: float = 30.0
    processes: int = 1
    """Processes that share the rows of each step, one for each GPU, or on CPU cores."""
    switches: tuple = ()
    """What is switched on in every stage that trains: ``grades``, or ``[{method: grades, tau: 0.1}, spectral-alignment]``."""

    def __post_init__(self):
        self._switch()

        def number(name, low, high, auto=False, whole=False):
            value = getattr(self, name)
            if auto and value == "auto":
                return
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                raise InputError(f"training.{name}", value, f"not a {'whole ' if whole else ''}number from {low} to {high}",
                                 "Choose one inside that range" + (" or auto" if auto else ""))
        number("lr", 1e-8, 10.0, auto=True)
        number("head_lr", 0.0, 10.0, auto=True)
        number("batch", 1, 4096, auto=True, whole=True)
        number("length", 8, 131072, auto=True, whole=True)
        number("accumulation", 1, 1024, auto=True, whole=True)
        number("loss_chunk", 16, 1048576, auto=True, whole=True)
        number("warmup", 0.0, 0.9)
        number("final", 0.0, 1.0)
        number("weight_decay", 0.0, 1.0)
        number("clip", 0.0, 1e6)
        number("evaluations", 1, 1000, whole=True)
        number("items", 0, 10_000_000, whole=True)
        number("checkpoint_seconds", 1.0, 86400.0)
        number("processes", 1, 64, whole=True)
        if self.batch != "auto" and self.batch < self.processes:
            raise InputError("training.processes", self.processes, f"a batch of {self.batch} rows cannot be divided among so many",
                             f"Raise training.batch to {self.processes} or more, or choose {self.batch} processes or fewer")
        for name, choices in (("precision", ("auto", "fp32", "bf16")), ("schedule", ("cosine", "linear", "constant")),
                              ("optimizer", ("adamw", "sgd")), ("checkpointing", ("auto", True, False))):
            if getattr(self, name) not in choices:
                raise InputError(f"training.{name}", getattr(self, name), "not one of the choices",
                                 "Choose " + ", ".join(str(c) for c in choices))

    def _switch(self) -> None:
        """Texts and mappings become ``engines.training.switch.Switch`` objects."""
        given = (self.switches,) if isinstance(self.switches, (str, dict)) else () if self.switches is None else self.switches
        if not isinstance(given, (list, tuple)):
            raise InputError("training.switches", given, "not a list of switches", "Write for example [grades]")
        made = tuple(s if isinstance(s, Switch) else registry.switch(s, f"training.switches[{i}]") for i, s in enumerate(given))
        for i, switch in enumerate(made):
            if any(switch.card.id == other.card.id for other in made[:i]):
                raise InputError(f"training.switches[{i}]", switch.card.id, "it is switched on twice", "Name each switch once")
        object.__setattr__(self, "switches", made)

    def plain(self) -> dict[str, Any]:
        """Every field as plain data; a switch as ``{"method": id, field: value, ...}``."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return found | {"switches": [s.settings() for s in self.switches]}


@dataclass(frozen=True)
class Data:
    """Which data and which columns of it; a plain string in YAML is the source alone."""

    source: str
    text: str | None = None
    """Text column; None: the first of text, content, sentence, ... that exists."""
    label: str | None = None
    split: float = 0.1
    """Share held out for evaluation where the source brings no test part."""
    limit: int | None = None
    """Use at most this many training rows."""

    def __post_init__(self):
        if not isinstance(self.source, str) or not self.source.strip():
            raise InputError("data", self.source, "no data named", "Give a bundled id, a file, a folder or a hub id")
        if not isinstance(self.split, (int, float)) or not 0 < self.split < 1:
            raise InputError("data.split", self.split, "not between 0 and 1", "Give for example 0.1")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise InputError("data.limit", self.limit, "not a whole number above zero", "Leave it out to use all rows")

    def plain(self) -> str | dict:
        """The shortest form that reads back as the same object."""
        short = {k: v for k, v in vars(self).items() if v != _DATA_DEFAULTS.get(k)}
        return self.source if list(short) == ["source"] else short


_DATA_DEFAULTS = {"text": None, "label": None, "split": 0.1, "limit": None}


@dataclass(frozen=True)
class RunSpec:
    """One pipeline under one budget with one seed.

    Raises:
        InputError: any field is unknown, out of range, of the wrong type, or the stages cannot follow one another.
    """

    model: str
    data: Data
    pipeline: tuple[Method, ...]
    budget: Budget = field(default_factory=Budget)
    training: Training = field(default_factory=Training)
    task: str = "auto"
    seed: int = 0
    name: str | None = None
    tags: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self):
        if not isinstance(self.model, str) or not self.model.strip():
            raise InputError("model", self.model, "no model named", "Give a bundled id, a local folder or a hub id")
        if self.task not in ("auto", "causal-lm", "text-classification", "image-classification"):
            raise InputError("task", self.task, "not a task", "Choose auto, causal-lm, text-classification or image-classification")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InputError("seed", self.seed, "not a whole number from 0 to 2147483647", "Give for example 0")
        check_order(self.pipeline)
        for switch in self.training.switches:
            switch.check(self.pipeline)

    # -- in and out --------------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, given: dict) -> RunSpec:
        """Build from the parsed form of a YAML spec.

        Raises:
            InputError: a field is unknown, missing or refused.
        """
        if not isinstance(given, dict):
            raise InputError("spec", given, "not a mapping of fields", "Start with model:, data:, pipeline: and budget:")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in given:
            if key not in known:
                raise InputError(str(key), given[key], "a spec has no field of this name", registry.suggestion(str(key), known))
        for key in ("model", "data"):
            if given.get(key) is None:
                raise InputError(key, None, "missing", f"Add a line {key}: ...")
        stages = given.get("pipeline") or []
        if not isinstance(stages, (list, tuple)):
            raise InputError("pipeline", stages, "not a list of stages", "Write a list such as [{method: lora}]")
        data = given["data"]
        return cls(
            model=given["model"], data=Data(data) if isinstance(data, str) else _from(Data, data, "data"),
            pipeline=tuple(registry.build({"method": s} if isinstance(s, str) else s, f"pipeline[{i}]") for i, s in enumerate(stages)),
            budget=_from(Budget, given.get("budget") or {}, "budget"),
            training=_from(Training, given.get("training") or {}, "training"),
            task=given.get("task") or "auto", seed=given.get("seed", 0), name=given.get("name"),
            tags=tuple(given.get("tags") or ()), note=given.get("note") or "")

    @classmethod
    def from_yaml(cls, text: str) -> RunSpec:
        """Build from YAML text.

        Raises:
            InputError: not YAML, or a field is refused.
        """
        try:
            tree = read_yaml(text)
        except ValueError as e:
            raise InputError("spec", text[:40], str(e), "Check indentation, colons and brackets there") from None
        return cls.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """The form that ``from_dict`` reads; budget without the absent limits, training without defaults."""
        default = Training().plain()
        out: dict[str, Any] = {"model": self.model, "data": self.data.plain(), "pipeline": [m.settings() for m in self.pipeline],
                               "budget": self.budget.limits(), "seed": self.seed}
        training = {k: v for k, v in self.training.plain().items() if v != default[k]}
        for key, value in (("training", training), ("name", self.name), ("tags", list(self.tags)), ("note", self.note)):
            if value:
                out[key] = value
        if self.task != "auto":
            out["task"] = self.task
        return out

    def to_yaml(self) -> str:
        """YAML text that reads back as the same spec."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def replace(self, **changes) -> RunSpec:
        return dataclasses.replace(self, **changes)

    def setting(self, path: str, value) -> RunSpec:
        """A copy with the dotted field ``path`` (``budget.minutes``, ``pipeline.0.rank``) set to ``value``.

        Raises:
            InputError: there is no such field, or it refuses the value.
        """
        tree = self.to_dict()
        node, parts = tree, path.replace("[", ".").replace("]", "").split(".")
        for part in parts[:-1]:
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    raise InputError(path, value, f"the pipeline has {len(node)} stages", "Count stages from 0")
                node = node[int(part)]
            else:
                child = node.setdefault(part, {})
                if part == "data" and isinstance(child, str):
                    child = node[part] = {"source": child}
                node = child
            if not isinstance(node, (dict, list)):
                raise InputError(path, value, "there is no such field", "Use for example budget.minutes or pipeline.0.rank")
        if isinstance(node, list):
            raise InputError(path, value, "a stage needs a field name", "Use for example pipeline.0.rank")
        node[parts[-1]] = value
        return RunSpec.from_dict(tree)


def _from(cls, given, where: str):
    if not isinstance(given, dict):
        raise InputError(where, given, "not a mapping of fields", f"Write {where}: followed by indented fields")
    known = {f.name for f in dataclasses.fields(cls)}
    for key in given:
        if key not in known:
            remedy = registry.suggestion(str(key), LIMITS if cls is Budget else known)
            raise InputError(f"{where}.{key}", given[key], "there is no field of this name", remedy)
    try:
        return cls(**given)
    except TypeError as e:
        raise InputError(where, given, str(e), "Add the missing field") from None


def check_order(pipeline: tuple[Method, ...]) -> None:
    """Refuse an order of stages that cannot work.

    Raises:
        InputError: training or pruning after packing, or packing twice.
    """
    packed = None
    for i, method in enumerate(pipeline):
        card = method.card
        if packed is not None:
            where = f"pipeline[{i}]"
            if card.packs:
                raise InputError(where, card.id, f"{packed.name} has already packed the weights", f"Keep one of {packed.id} and {card.id}")
            verb = "train" if card.trains else "change"
            raise InputError(where, card.id, f"{card.name} cannot {verb} weights that {packed.name} has packed into integers",
                             f"Move {packed.id} to the end of the pipeline")
        if card.packs:
            packed = card


def load(source: str) -> RunSpec:
    """A spec from a YAML file's path or the name of a bundled preset.

    Raises:
        InputError: no such file or preset, or a refused field.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        preset = PRESETS / f"{source}.yaml"
        if not preset.is_file():
            names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
            raise InputError("spec", source, "there is no such file or preset", registry.suggestion(source, names))
        path = preset
    return RunSpec.from_yaml(path.read_text())


PRESETS = Path(__file__).resolve().parent.parent / "assets" / "presets"

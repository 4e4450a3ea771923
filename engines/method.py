"""What a method is: a frozen set of hyperparameters, a card, and the hooks of its life in a run.

A method is one file: a class that derives from ``Method``, is decorated with ``@register`` and
carries a ``Card``. The file is found by itself (``engines.registry``); nothing else is edited.
The file must not import torch when it is read (see ``engines.lazy``), because the page and the
planner list cards, hyperparameters and forecasts without it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engines.errors import InputError

FAMILIES = ("adaptation", "pruning", "quantization", "kv_cache", "distillation")
SWITCH = "switch"
"""Family of what is switched on in the training loop beside any stage that trains (``engines.training.switch``)."""
AUTO = "auto"


@dataclass(frozen=True)
class Card:
    """What a person must know of a method before choosing it. Sentences are short and plain."""

    id: str
    name: str
    family: str
    title: str
    """Title of the paper that defines it."""
    summary: str
    """One line: what it does."""
    year: int | None = None
    needs: tuple[str, ...] = ()
    """What it asks for: calibration data, a classification head, a GPU ..."""
    cannot: tuple[str, ...] = ()
    """What it does not do; the first entry is shown on the small card."""
    tasks: tuple[str, ...] = ("causal-lm", "text-classification", "image-classification")
    refuses: dict[str, str] = field(default_factory=dict)
    """Architecture (``llama``, ``gpt2``, ``bert``, ``vit``) -> the reason why it cannot be served."""
    trains: bool = False
    """True: the stage takes part in the training loop and shares the minutes."""
    packs: bool = False
    """True: afterwards weights are packed integers, which later stages can neither train nor prune."""
    shrinks: bool = False
    """True: afterwards tensors have other shapes."""
    masks: bool = False
    """True: leaves zeros that later stages must keep (``context.masks``)."""
    differs: str = ""
    """Where this differs from the paper or from peft, and why; or ``reconstructed from the abstract``."""

    def __post_init__(self):
        if self.family not in (*FAMILIES, SWITCH):
            raise ValueError(f"card {self.id}: family {self.family!r} is none of {(*FAMILIES, SWITCH)}")


def hyper(default, help: str, *, low=None, high=None, choices: tuple | None = None, lever: str | None = None,
          log: bool = False, advanced: bool = False, unit: str = ""):
    """A hyperparameter of a method: a dataclass field that knows its help, range and lever.

    Args:
        lever: the budget limit it obeys (``trainable``, ``size_mb``, ``memory_gb``, ``minutes``); such a
            field also accepts ``"auto"`` and is then chosen by ``Method.fit``.
        log: it is searched and shown on a logarithmic scale.
    """
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, lever=lever,
                                                log=log, advanced=advanced, unit=unit))


@dataclass(frozen=True)
class Footprint:
    """What a stage costs, from shapes alone. Bytes unless named otherwise; a part not concerned is 0.

    ``weights`` are those present during the stage, ``result`` the bytes on disk of the model after it.
    ``activations`` and ``logits`` hold for one batch as given to ``Method.footprint``.
    """

    trainable: int = 0
    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    extra: int = 0
    """Work space of the method: Hessians, calibration activations, masks, scores."""
    flops_per_token: float = 0.0
    """Of one training step per token (forward and backward), or of calibration per calibration token."""
    calibration_tokens: int = 0
    result: int = 0
    result_parameters: int = 0
    bits_per_weight: float = 0.0
    sparsity: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes of all parts together; they coexist at the worst moment of a step."""
        return (self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.logits
                + self.extra)


class Configured:
    """A frozen set of hyperparameters with a card: what methods and switches of the training loop have in common."""

    card: ClassVar[Card]
    claims: ClassVar[tuple] = ()
    """What its paper says, as ``engines.claim.Claim`` objects that ``python -m workbench claims ID`` checks."""

    @classmethod
    def hyperparameters(cls) -> list[dict]:
        """Each field as a dict: name, default, help, low, high, choices, lever, log, advanced, unit, type."""
        rows = []
        for f in dataclasses.fields(cls):
            kind = type(f.default).__name__ if f.default != AUTO else "auto"
            rows.append(dict(name=f.name, default=f.default, type=kind, **f.metadata))
        return rows

    def replace(self, **changes):
        """A copy with other hyperparameters, validated again."""
        return dataclasses.replace(self, **changes)

    def settings(self) -> dict[str, Any]:
        """``{"method": id, field: value, ...}`` as in a spec."""
        return {"method": self.card.id, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def __post_init__(self):
        for f in dataclasses.fields(self):
            _validate(self.card.id, f, getattr(self, f.name))


class Method(Configured):
    """Base of every method. Subclasses are frozen dataclasses made by ``@register``.

    Hooks get ``context`` (``engines.context.Context``); anything a method must remember between calls
    goes into ``context.state`` (numbers, strings, lists, tensors), which is saved with each checkpoint,
    so that exact resume needs nothing more. The order of calls in a stage is::

        apply -> [before_step -> loss (per micro-batch) -> after_backward -> optimizer.step -> after_step]* -> finish

    On resume ``apply`` runs again on the stage's input model with the same random state, then weights,
    optimizer and ``context.state`` are restored.
    """

    learning_rate: ClassVar[float | dict[str, float] | None] = None
    """Peak rate that suits it on models of width 256, where it is not the usual one of its kind (``workbench.levers.usual_rate``); by task
    where that decides: ``{"causal-lm": 3e-2, "": 5e-3}``."""

    # -- before the run ----------------------------------------------------------------------------------
    def own_rate(self, task: str) -> float | None:
        """``learning_rate`` for a task; None: the usual one."""
        found = self.learning_rate
        return found.get(task, found.get("")) if isinstance(found, dict) else found

    def check(self, profile) -> None:
        """Raise ``InputError`` when this cannot be done on a model of this profile (with the remedy)."""

    def fit(self, profile, budget) -> tuple[Method, dict[str, str]]:
        """Choose every field that is ``"auto"`` under ``budget``; return the changed copy and the reasons."""
        return self, {}

    def footprint(self, profile, batch) -> Footprint:
        """Analytic cost on ``profile`` for a ``engines.profile.Batch``; torch-free, well under a millisecond."""
        raise NotImplementedError(f"{type(self).__name__} must say what it costs")

    def start_flops(self, profile, batch) -> float:
        """Work before the first step of a stage that trains, in floating-point operations of products: passes over data, decompositions
        (``engines.cost.SVD`` and its like turn these into products). 0 where it takes no time worth telling."""
        return 0.0

    # -- in the run --------------------------------------------------------------------------------------
    def apply(self, model, context):
        """Insert, mask, decompose or quantize; return the model (the same object or another one)."""
        return model

    def parameter_groups(self, model, context) -> list[dict]:
        """Groups for the optimizer; ``lr_scale`` multiplies the schedule, ``lr`` is a group's own rate on it. Default: all that require gradients."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def before_step(self, model, context) -> None:
        """Called before each optimizer step; ``context.progress`` is the share of this stage's budget used."""

    def loss(self, model, loss, context):
        """Add a term to the loss of one micro-batch."""
        return loss

    def after_backward(self, model, context) -> None:
        """Gradients of the whole step are there, not yet clipped."""

    def after_step(self, model, context) -> None:
        """Weights have changed, gradients are still there (needed by AdaLoRA and others)."""

    def finish(self, model, context):
        """Merge, finalise masks, shrink, pack; return the model that the next stage or the save gets."""
        return model

    def layers(self, model, context) -> dict[str, list]:
        """Figures for the layer map: ``{"rank": [[layer, role, value], ...]}``; empty: nothing to show."""
        return {}


def _validate(method: str, f: dataclasses.Field, value) -> None:
    meta, name = f.metadata, f"{method}.{f.name}"
    if value == AUTO and isinstance(value, str):
        if not meta["lever"]:
            raise InputError(name, value, "this field has no budget limit to follow", f"Give a value such as {f.default!r}")
        return
    if meta["choices"] is not None:
        if value not in meta["choices"]:
            raise InputError(name, value, "not one of the choices",
                             "Choose " + ", ".join(str(c) for c in meta["choices"]))
        return
    default = f.default if f.default != AUTO else (meta["low"] if meta["low"] is not None else 1)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(name, value, "not true or false", "Give true or false")
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(name, value, "not a whole number", f"Give a whole number such as {default}")
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(name, value, "not a number", f"Give a number such as {default}")
    elif isinstance(default, str) and not isinstance(value, str):
        raise InputError(name, value, "not a text", f"Give a text such as {default!r}")
    if meta["low"] is not None and value < meta["low"] or meta["high"] is not None and value > meta["high"]:
        raise InputError(name, value, f"outside {meta['low']} to {meta['high']}",
                         f"Choose a value from {meta['low']} to {meta['high']}")


_REGISTRY: dict[str, type[Method]] = {}
_SWITCHES: dict[str, type[Configured]] = {}


def register(cls):
    """Make ``cls`` a frozen dataclass and add it to the registry of methods, or of switches, under its card's id.

    Raises:
        ValueError: another class already has this id, or a field was not made by ``hyper``.
    """
    cls = dataclass(frozen=True)(cls)
    for f in dataclasses.fields(cls):
        if "help" not in f.metadata:
            raise ValueError(f"{cls.__name__}.{f.name}: make hyperparameters with hyper(...)")
    known = _REGISTRY.get(cls.card.id) or _SWITCHES.get(cls.card.id)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"two methods are called {cls.card.id!r}: {known.__module__} and {cls.__module__}")
    (_SWITCHES if cls.card.family == SWITCH else _REGISTRY)[cls.card.id] = cls
    return cls

"""A finished or a planned run as a point: what its quality is predicted from, the same for both. Torch-free and numpy-free."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass

from engines import registry
from engines.errors import InputError
from workbench.priors import Stage

METRIC = {"causal-lm": "bits/byte", "text-classification": "accuracy", "image-classification": "accuracy"}
NOISE_FLOOR = 1e-3


@dataclass(frozen=True)
class Point:
    """One pipeline (or the first stages of one) with its outcome where it is known.

    ``gain`` is on the additive scale of ``workbench.priors``; ``noise`` its standard deviation from the items alone; ``group`` is equal
    for runs that differ in their seed only; ``whole`` is False for an evaluation after some of the stages.
    """

    model: str
    architecture: str
    parameters: int
    data: str
    task: str
    stages: tuple[Stage, ...]
    lr: float = 0.0
    base: float | None = None
    gain: float | None = None
    noise: float = 0.0
    run: int = 0
    group: str = ""
    whole: bool = True

    @property
    def units(self) -> float:
        return sum(s.units for s in self.stages)

    @property
    def trains(self) -> bool:
        return any(s.trains and s.units > 0 for s in self.stages)

    @property
    def share(self) -> float:
        return max((s.share for s in self.stages if s.trains), default=0.0)

    def last(self, kind: str) -> tuple[Stage | None, float]:
        """The last stage that zeroes (``sparsity``), shrinks (``removed``) or packs (``bits``), and the units trained after it."""
        for i in range(len(self.stages) - 1, -1, -1):
            if getattr(self.stages[i], kind) > 0:
                return self.stages[i], sum(s.units for s in self.stages[i:])
        return None, 0.0


def score(value: float, metric: str, n: int = 10_000) -> float:
    """A metric's value on the additive scale: minus the logarithm of bits/byte, the log-odds of accuracy."""
    if metric == "accuracy":
        least = 0.5 / max(1, n)
        value = min(1 - least, max(least, value))
        return math.log(value / (1 - value))
    return -math.log(max(value, 1e-6))


def value_of(found: float, metric: str) -> float:
    """The inverse of ``score``."""
    found = max(-50.0, min(50.0, found))
    return 1 / (1 + math.exp(-found)) if metric == "accuracy" else math.exp(-found)


@functools.lru_cache(maxsize=512)
def _card(method: str):
    try:
        return registry.get(method).card
    except InputError:  # a method that an earlier version had
        return None


def _stage(method: str, settings: dict, *, sparsity: float, before: int, after: int, bits: float, units: float, trainable: int,
           parameters: int, steps: int) -> Stage:
    card = _card(method)
    packs = bool(card and card.packs)
    given = settings.get("bits")
    if not packs:
        given = 0.0
    elif not isinstance(given, (int, float)) or isinstance(given, bool):
        named = re.search(r"int(\d)", method)
        given = float(named.group(1)) if named else min(8.0, max(1.0, math.floor(bits)))
    return Stage(
        method, card.family if card else "", trains=steps > 0, sparsity=0.0 if packs else float(sparsity or 0.0),
        removed=max(0.0, 1 - after / max(1, before)) if card and card.shrinks else 0.0, bits=float(given),
        calibrated=bool(card and any("calibration" in need for need in card.needs)), units=float(units if steps else 0.0),
        share=trainable / max(1, parameters) if steps else 0.0,
        pattern=settings["pattern"] if isinstance(settings.get("pattern"), str) and ":" in settings["pattern"] else "")


def of_cost(spec, found, scene) -> Point:
    """A planned run. ``spec`` is resolved, ``found`` its ``scene.Cost``."""
    parameters = scene.model.parameters
    stages = tuple(
        _stage(s.method.card.id, s.method.settings(), sparsity=s.footprint.sparsity, before=s.before, after=s.after,
               bits=s.footprint.bits_per_weight, units=s.units, trainable=s.footprint.trainable, parameters=parameters,
               steps=s.steps or 0)
        for s in found.stages)
    return Point(spec.model, scene.model.architecture, parameters, spec.data.source, scene.task, stages, float(spec.training.lr))


def _source(data) -> str:
    return data.get("source", "") if isinstance(data, dict) else str(data)


def of_run(row: dict, evaluations: list[dict], units: float | None) -> list[Point]:
    """A finished run: the point of its result, and one for each evaluation after some of its stages.

    Args:
        row: with forecast (``store.run`` or ``runs(full=True)``).
        units: training tokens or examples that it really saw; None takes the forecast's.
    """
    spec, plan = row["spec"], row.get("forecast") or {}
    planned = plan.get("stages") or []
    before = next((e for e in evaluations if e["name"] == "base"), None)
    base = before["value"] if before else row.get("base_value")
    if not planned or base is None or row.get("value") is None or not row.get("metric"):
        return []
    if any((s.get("settings") or {}).get("from_scratch") is True for s in planned):
        return []
    metric, expected = row["metric"], sum(s.get("units") or 0 for s in planned)
    ratio = units / expected if units is not None and expected else 1.0
    parameters = plan.get("parameters") or row.get("parameters") or 1
    stages = tuple(
        _stage(s["method"], s.get("settings") or {}, sparsity=s.get("sparsity") or 0.0, before=s.get("before_bytes") or 1,
               after=s.get("after_bytes") or 0, bits=s.get("bits_per_weight") or 8.0, units=ratio * (s.get("units") or 0),
               trainable=s.get("trainable") or 0, parameters=parameters, steps=s.get("steps") or 0)
        for s in planned)
    resolved = plan.get("resolved") or {}
    group = json.dumps({k: v for k, v in spec.items() if k in ("model", "data", "pipeline", "budget", "training")}, sort_keys=True)
    task = plan.get("task") or ("causal-lm" if metric == "bits/byte" else "text-classification")
    whole = Point(str(spec.get("model")), _architecture(str(spec.get("model"))), parameters, _source(spec.get("data")), task, stages,
                  float((plan.get("training") or {}).get("lr") or (resolved.get("training") or {}).get("lr") or 0.0),
                  base, _gain(row, base, metric), _noise(row, metric), row["id"], group)
    out = [] if whole.gain is None else [whole]
    for e in evaluations:
        if e["name"] == "stage" and 0 <= e["stage"] < len(stages) - 1 and e["metric"] == metric:
            gain = _gain(e, base, metric)
            if gain is not None:
                out.append(dataclasses.replace(whole, stages=stages[: e["stage"] + 1], gain=gain, whole=False))
    return out


@functools.lru_cache(maxsize=256)
def _architecture(model: str) -> str:
    from workbench import sources
    try:
        return sources.profile(model).architecture if sources.resolve(model).kind != "hub" else ""
    except InputError:
        return ""


def _gain(row: dict, base: float, metric: str) -> float | None:
    value = row.get("value")
    if value is None or not math.isfinite(value):
        return None
    n = row.get("n") or 10_000
    return score(value, metric, n) - score(base, metric, n)


def _noise(row: dict, metric: str) -> float:
    """Only a part of the interval: base and result are scored on the same items."""
    low, high = row.get("value_low"), row.get("value_high")
    if low is None or high is None or not high > low:
        return NOISE_FLOOR
    n = row.get("n") or 10_000
    return max(NOISE_FLOOR, 0.3 * abs(score(high, metric, n) - score(low, metric, n)) / 3.92)

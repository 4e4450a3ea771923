"""Whether a cost keeps the limits of its budget, and the smallest single change after which it does."""

from __future__ import annotations

import math

from engines.errors import InputError
from workbench.scene import Cost
from workbench.spec import RunSpec

TIGHT = 0.05
"""A limit with less than this share to spare is called tight."""


def clock(seconds: float) -> str:
    """``1:57``, ``0:03``, ``1:02:03``."""
    whole = int(round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


# -- limits ------------------------------------------------------------------------------------------------------------
def limits(spec: RunSpec, found: Cost, meter: str | None = None, judge=None) -> dict[str, dict]:
    """Each limit with the value forecast: limit, value, spare (share), state (ok, tight, over, none).

    ``minutes`` counts as over only when not even the shortest schedule fits: training itself follows the clock. ``judge`` is that of
    ``workbench.expected``: (spec, cost) -> expected quality; without it the row ``quality`` knows nothing.
    """
    budget = spec.budget
    count = budget.trainable_count(_parameters(found))
    rows = {
        "minutes": (budget.minutes, found.seconds / 60, found.least_seconds / 60),
        "memory_gb": (budget.memory_gb, found.peak.total / 1e9, None),
        "trainable": (count, found.trainable, None),
        "size_mb": (budget.size_mb, found.size / 1e6, None),
    }
    out = {}
    for name, (limit, value, judged) in rows.items():
        judged = value if judged is None else judged
        if limit is None:
            out[name] = {"limit": None, "value": value, "spare": None, "state": "none"}
            continue
        spare = (limit - judged) / limit
        exact = name in ("trainable", "size_mb")  # counted, not estimated: no reserve is needed
        state = "over" if judged > limit else "tight" if spare < TIGHT and not exact else "ok"
        out[name] = {"limit": limit, "value": value, "spare": spare, "state": state}
    joules, energy = getattr(found, "joules", None), budget.joules
    known = energy is not None and joules is not None
    out["joules"] = {
        "limit": energy,
        "value": joules,
        "spare": (energy - joules) / energy if known else None,
        "state": "none" if not known else "over" if joules > energy else "ok",
        "reason": meter or "no forecast of energy: it is metered while the run is on",
    }
    out["quality"] = quality(budget, judge(spec, found) if judge else None)
    return out


def quality(budget, expected: dict | None) -> dict:
    """The row of the quality floor: limit, value with low, high (90 %), spare, state, metric, base, near, source, reason.

    It is over where the expected value misses the floor and runs say so; priors alone make it tight at the most.
    """
    row = {"limit": budget.quality, "value": None, "low": None, "high": None, "spare": None, "state": "none", "metric": None,
           "base": None, "reason": "nothing known yet"}
    if expected is None:
        return row
    keys = ("value", "low", "high", "metric", "base", "near", "source", "reason", "gain", "gain_low", "gain_high", "priors", "calibration")
    row.update({k: expected[k] for k in keys})
    floor = budget.quality_floor(row["metric"])
    row["limit"] = floor
    if expected["value"] is None:
        row["reason"] = f"nothing known yet: {expected['reason']}"
    elif floor is not None:
        sign = 1.0 if row["metric"] == "accuracy" else -1.0
        worst = row["low"] if sign > 0 else row["high"]
        row["spare"] = sign * (row["value"] - floor) / max(floor, 1e-9)
        missed = sign * (row["value"] - floor) < 0
        row["state"] = "over" if missed and expected["source"] != "prior" else "tight" if sign * (worst - floor) < 0 else "ok"
    return row


def missed(states: dict[str, dict], strict: bool = False) -> list[str]:
    """Names of the limits that are over; ``strict``: also a floor for quality that priors alone expect to be missed."""
    return [name for name, row in states.items()
            if row["state"] == "over" or strict and name == "quality" and row["spare"] is not None and row["spare"] < 0]


def figure(value: float, metric: str) -> str:
    """``1.234 bits/byte``, ``91.2 %``."""
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f} {metric}"


def _parameters(found: Cost) -> int:
    return found.stages[0].profile.parameters if found.stages else 0


def verdict(states: dict[str, dict]) -> str:
    """fits, tight or over: the worst of the limits."""
    seen = {row["state"] for row in states.values()}
    return "over" if "over" in seen else "tight" if "tight" in seen else "fits"


# -- what would make it fit --------------------------------------------------------------------------------------------
def candidates(spec: RunSpec, resolved: RunSpec, found: Cost, over: list[str]) -> list[tuple[str, dict]]:
    """Single changes worth trying, the mildest first: (sentence, patch)."""
    t, rows = resolved.training, []
    if "memory_gb" in over:
        accumulation = t.accumulation * 2
        while accumulation <= t.batch and accumulation <= 1024:
            if t.batch % accumulation == 0:
                rows.append(
                    (
                        f"accumulation {accumulation}: micro-batches of {t.batch // accumulation}",
                        {"training.accumulation": accumulation},
                    )
                )
            accumulation *= 2
        if not t.checkpointing:
            rows.append(("checkpointing on", {"training.checkpointing": True}))
        for batch in _halves(t.batch):
            if batch >= t.accumulation:
                rows.append((f"batch {batch}", {"training.batch": batch}))
        for length in _halves(t.length):
            if length >= 16:
                rows.append((f"length {length}", {"training.length": length}))
    if "quality" in over:
        rows += _better(spec, resolved)
    if "joules" in over:
        rows += _thriftier(spec, found)
    if "minutes" in over:
        for items in _halves(t.items or 1024):
            if items >= 32:
                rows.append((f"evaluate on {items} items", {"training.items": items}))
        if t.evaluations > 1:
            rows.append(("one evaluation at the end of training", {"training.evaluations": 1}))
    if {"trainable", "size_mb", "memory_gb"} & set(over):
        rows += _method_changes(resolved, over)
    if "size_mb" in over and resolved.pipeline and not any(m.card.packs for m in resolved.pipeline):
        rows += _packed(spec)
    for name in over:
        if name in ("quality", "joules"):
            continue
        need = {
            "memory_gb": found.peak.total / 1e9 / (1 - TIGHT),
            "minutes": found.least_seconds / 60 / (1 - TIGHT),
            "trainable": found.trainable,
            "size_mb": found.size / 1e6,
        }[name]
        step = {"memory_gb": 0.1, "minutes": 0.5, "trainable": 1, "size_mb": 0.01}[name]
        need = math.ceil(need / step) * step
        need = int(need) if name == "trainable" else round(need, 2)
        unit = {"memory_gb": "GB of memory", "minutes": "minutes", "trainable": "trainable parameters", "size_mb": "MB on disk"}[
            name
        ]
        rows.append((f"allow {need:,} {unit}", {f"budget.{name}": need}))
    return rows


def _halves(value: int) -> list[int]:
    out = []
    while value >= 2:
        value //= 2
        out.append(value)
    return out


def _method_changes(spec: RunSpec, over: list[str]) -> list[tuple[str, dict]]:
    """Lower the hyperparameter through which a method obeys one of the limits passed."""
    rows = []
    for i, method in enumerate(spec.pipeline):
        for field in method.hyperparameters():
            lever, name = field["lever"], field["name"]
            if lever is None or lever not in over and not (lever == "trainable" and "memory_gb" in over):
                continue
            value = getattr(method, name)
            if field["choices"]:
                smaller = [c for c in field["choices"] if isinstance(c, (int, float)) and not isinstance(c, bool) and c < value]
                tries = sorted(smaller, reverse=True) if isinstance(value, (int, float)) else []
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                tries = []
            elif lever == "size_mb" and isinstance(value, float):  # a share of what is removed: more of it is smaller
                top = field["high"] or 1.0
                tries = [round(value + (top - value) * k / 4, 3) for k in (1, 2, 3)]
            else:
                tries = [v for v in _halves(int(value)) if v >= (field["low"] or 1)]
            rows += [(f"{method.card.name} with {name} {v}", {f"pipeline.{i}.{name}": v}) for v in tries]
    return rows


def _better(spec: RunSpec, resolved: RunSpec) -> list[tuple[str, dict]]:
    """Milder pruning, more bits, a larger rank, more training."""
    rows = []
    for i, method in enumerate(resolved.pipeline):
        for field in method.hyperparameters():
            name, value = field["name"], getattr(method, field["name"])
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if name == "sparsity" or field["lever"] == "size_mb" and isinstance(value, float):
                tries = [round(value * k, 3) for k in (0.8, 0.6, 0.4)] if value else []
            elif name == "bits" and field["choices"]:
                tries = [c for c in field["choices"] if isinstance(c, (int, float)) and c > value]
            elif field["lever"] == "trainable" and name == "rank":
                tries = [v for v in (2 * value, 4 * value) if not field["high"] or v <= field["high"]]
            else:
                continue
            rows += [(f"{method.card.name} with {name} {v}", {f"pipeline.{i}.{name}": v}) for v in tries]
    for name, unit in (("minutes", "minutes"), ("steps", "steps"), ("tokens", "tokens or examples")):
        value = getattr(spec.budget, name)
        if value and any(m.card.trains for m in resolved.pipeline):
            tries = [round(value * k, 3) if name == "minutes" else int(value * k) for k in (1.5, 2, 3, 5)]
            rows += [(f"train for {v:,} {unit}", {f"budget.{name}": v}) for v in tries]
    return rows


def _thriftier(spec: RunSpec, found: Cost) -> list[tuple[str, dict]]:
    """Less work for less energy, then a larger limit."""
    share, rows = spec.budget.joules / found.joules, []
    if spec.budget.minutes:
        tries = [round(spec.budget.minutes * share * k, 3) for k in (0.98, 0.9, 0.75)]
        rows += [(f"{v:g} minutes", {"budget.minutes": v}) for v in tries]
    elif found.steps:
        rows += [(f"{v:,} steps", {"budget.steps": v}) for v in (int(found.steps * share * k) for k in (0.9, 0.75, 0.5)) if v > 0]
    need = math.ceil(found.joules)
    return [*rows, (f"allow {need:,} joules", {"budget.joules": need})]


def _packed(spec: RunSpec) -> list[tuple[str, dict]]:
    """The pipeline with one packing stage more, the most exact first."""
    from engines import registry

    def bits(cls) -> float:
        named = [int(c) for c in cls.card.id if c.isdigit()]
        return -(named[0] if named else 4)

    packing = sorted((c for c in registry.methods().values() if c.card.packs), key=lambda c: (bits(c), len(c.card.needs), c.card.id))
    stages = [m.settings() for m in spec.pipeline]
    return [(f"{c.card.name} at the end", {"pipeline": [*stages, {"method": c.card.id}]}) for c in packing[:4]]


def _floor(states: dict) -> list[tuple[str, dict]]:
    """The floor lowered to what is expected."""
    row = states["quality"]
    value = math.floor(1000 * row["value"]) / 10 if row["metric"] == "accuracy" else math.ceil(1000 * row["value"]) / 1000
    return [(f"accept {figure(value / 100 if row['metric'] == 'accuracy' else value, row['metric'])}", {"budget.quality": value})]


def changes(spec: RunSpec, resolved: RunSpec, found: Cost, states: dict, evaluate, count: int = 3, judge=None, strict: bool = False) -> list[dict]:
    """The smallest single changes after which nothing is over.

    Args:
        evaluate: spec -> (resolved, cost); raises InputError for a change that cannot be.
        count: stop after this many that fit.
        judge: as for ``limits``.
        strict: a floor that priors alone expect to be missed is over, too.

    Returns:
        rows of text, patch, memory_gb, seconds, size_mb; the first changes least.
    """
    over = missed(states, strict)
    rows, seen = [], set()
    tries = candidates(spec, resolved, found, over) + (_floor(states) if "quality" in over else []) if over else ()
    for text, patch in tries:
        ((path, value),) = patch.items()
        if path in seen:  # a milder value of the same knob already does it
            continue
        try:
            other, price = evaluate(spec.setting(path, value))
        except InputError:
            continue
        after = limits(other, price, None, judge if spec.budget.quality is not None else None)
        if missed(after, strict):
            continue
        seen.add(path)
        longer = price.seconds - found.seconds
        tail = f", {clock(abs(longer))} {'longer' if longer > 0 else 'shorter'}" if abs(longer) >= 1 else ""
        rows.append(
            {
                "text": f"{text}: {gigabytes(price.peak.total)}{tail}{_expectation(after)}",
                "patch": patch,
                "memory_gb": price.peak.total / 1e9,
                "seconds": price.seconds,
                "size_mb": price.size / 1e6,
            }
        )
        if len(rows) >= count:
            break
    return rows


def shortfall(row: dict) -> str:
    """How far the expected quality is from the floor, for the verdict's sentence."""
    show = lambda v: figure(v, row["metric"]).split(" ")[0]  # noqa: E731
    word = "at least" if row["metric"] == "accuracy" else "at most"
    return (f"{figure(row['value'], row['metric'])} expected ({show(row['low'])} to {show(row['high'])}, {row['reason']}), "
            f"{word} {figure(row['limit'], row['metric'])} asked")


def _expectation(states: dict) -> str:
    row = states["quality"]
    return f", {figure(row['value'], row['metric'])} expected" if row["limit"] is not None and row["value"] is not None else ""

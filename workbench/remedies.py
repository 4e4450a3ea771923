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
def limits(spec: RunSpec, found: Cost, meter: str | None = None) -> dict[str, dict]:
    """Each limit with the value forecast: limit, value, spare (share), state (ok, tight, over, none).

    ``minutes`` counts as over only when not even the shortest schedule fits: training itself follows the clock.
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
    out["joules"] = {
        "limit": budget.joules,
        "value": None,
        "spare": None,
        "state": "none",
        "reason": meter or "no forecast of energy: it is metered while the run is on",
    }
    return out


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
    if "minutes" in over:
        for items in _halves(t.items or 1024):
            if items >= 32:
                rows.append((f"evaluate on {items} items", {"training.items": items}))
        if t.evaluations > 1:
            rows.append(("one evaluation at the end of training", {"training.evaluations": 1}))
    if {"trainable", "size_mb", "memory_gb"} & set(over):
        rows += _method_changes(resolved, over)
    for name in over:
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


def changes(spec: RunSpec, resolved: RunSpec, found: Cost, states: dict, evaluate, count: int = 3) -> list[dict]:
    """The smallest single changes after which nothing is over.

    Args:
        evaluate: spec -> (resolved, cost); raises InputError for a change that cannot be.
        count: stop after this many that fit.

    Returns:
        rows of text, patch, memory_gb, seconds, size_mb; the first changes least.
    """
    over = [name for name, row in states.items() if row["state"] == "over"]
    rows, seen = [], set()
    for text, patch in candidates(spec, resolved, found, over) if over else ():
        ((path, value),) = patch.items()
        if path in seen:  # a milder value of the same knob already does it
            continue
        try:
            other, price = evaluate(spec.setting(path, value))
        except InputError:
            continue
        if verdict(limits(other, price)) == "over":
            continue
        seen.add(path)
        longer = price.seconds - found.seconds
        tail = f", {clock(abs(longer))} {'longer' if longer > 0 else 'shorter'}" if abs(longer) >= 1 else ""
        rows.append(
            {
                "text": f"{text}: {gigabytes(price.peak.total)}{tail}",
                "patch": patch,
                "memory_gb": price.peak.total / 1e9,
                "seconds": price.seconds,
                "size_mb": price.size / 1e6,
            }
        )
        if len(rows) >= count:
            break
    return rows

"""Which fields of a spec are worth varying, and over what: a start for a person who sets up a sweep."""

from __future__ import annotations

import json

from engines import registry

OVER = {"training.lr": "1e-4..1e-2:log", "training.batch": "4, 8, 16", "training.schedule": "cosine, linear, constant",
        "seed": "0, 1, 2",
        "training.weight_decay": "0, 0.01, 0.1", "training.warmup": "0, 0.03, 0.1", "training.length": "128, 256"}
"""What is proposed for fields that every spec has."""


def proposals(spec) -> list[dict]:
    """Paths of a spec with help and a proposed range: the methods' own fields first."""
    found = []
    for i, method in enumerate(spec.pipeline):
        kind = (method.card.family, method.card.trains)
        like = [m.card for m in registry.methods().values() if (m.card.family, m.card.trains) == kind]
        others = [card.id for card in like if card.id != method.card.id][:2]
        for row in method.hyperparameters():
            value = getattr(method, row["name"])
            proposed = proposal(row, value)
            if proposed:
                found.append(dict(path=f"pipeline.{i}.{row['name']}", help=f"{method.card.name}: {row['help']}", values=proposed))
        if others:
            found.append(dict(path=f"pipeline.{i}.method", help="Another method of the same family",
                              values=", ".join([method.card.id, *others])))
    found += [dict(path=path, help="", values=values) for path, values in OVER.items()]
    for name, value in spec.budget.limits().items():
        found.append(dict(path=f"budget.{name}", help="A limit", values=", ".join(f"{value * k:g}" for k in (0.5, 1, 2))))
    return found


def proposal(row: dict, value) -> str | None:
    """A few values around the present one, inside the field's range."""
    if row.get("choices"):
        return ", ".join(_text(c) for c in row["choices"][:6]) if len(row["choices"]) > 1 else None
    value = value if isinstance(value, (int, float)) else row["default"]
    if isinstance(value, bool):
        return "true, false"
    if not isinstance(value, (int, float)):
        return "4, 8, 16" if row["name"] == "rank" else None
    low = row["low"] if row.get("low") is not None else None
    high = row["high"] if row.get("high") is not None else None
    if isinstance(value, float) and row.get("log") and value > 0:
        return f"{max(low or 0, value / 10):g}..{min(high or value * 10, value * 10):g}:log"
    if not value:
        return None
    near = [value // 2 or 1, value, value * 2] if isinstance(value, int) else [value * 0.5, value, value * 1.5]
    kept = [v for v in dict.fromkeys(near) if (low is None or v >= low) and (high is None or v <= high)]
    return ", ".join(f"{v:g}" for v in kept) if len(kept) > 1 else None


def _text(value) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)

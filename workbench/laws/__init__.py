"""Laws that plan: what loss, time, schedule, split or evaluation a budget calls for, fitted to this database's runs or to given points.

Each law is a ``Planner`` (``workbench.laws.base``) in a file of its own. ``predict`` is the one entry of the command line and the page.
"""

from __future__ import annotations

import importlib

from engines.errors import InputError
from engines.registry import suggestion
from workbench.laws.base import Fitted, Planner, once

_FOUND = (
    ("chinchilla", "Chinchilla"),
    ("annealing", "Annealing"),
    ("time_matters", "TimeMatters"),
    ("learning_curve", "LearningCurve"),
    ("over_training", "OverTraining"),
    ("avgparam", "AverageParameters"),
    ("qat", "ComputeOptimalQat"),
    ("reference_time", "NoTrainNoGain"),
    ("evaluation_size", "EfficientBenchmarking"),
)
SHORT = {
    "chinchilla": "chinchilla-replication",
    "annealing": "lr-annealing-scaling-law",
    "qat": "compute-optimal-qat",
    "avgparam": "avgparamscalinglaw",
    "over-training": "over-training-scaling-laws",
    "learning-curve": "learning-curve-prediction-level",
    "worth": "learning-curve-prediction-level",
    "reference-time": "no-train-no-gain",
    "items": "efficient-benchmarking",
}
SOURCES = ("runs", "points", "published", "example")


def planners() -> dict[str, Planner]:
    """All planners by id, in the order in which they are shown."""
    made = [getattr(importlib.import_module(f"workbench.laws.{module}"), name)() for module, name in _FOUND]
    return {p.card.id: p for p in made}


def get(name: str) -> Planner:
    """The planner of an id or a short name (chinchilla, annealing, qat, worth, items ...).

    Raises:
        InputError: there is none.
    """
    known = planners()
    found = known.get(SHORT.get(str(name), str(name)))
    if found is None:
        raise InputError("law", name, "there is no such planner", suggestion(str(name), [*known, *SHORT]))
    return found


def cards() -> list[dict]:
    """The cards as plain dicts."""
    import dataclasses

    return [dataclasses.asdict(p.card) | {"published": p.published() is not None} for p in planners().values()]


def gather(law: Planner, source: str, *, query: str = "", text: str | None = None, options: dict | None = None, home=None):
    """Data and label of a source; data are None for published constants.

    Raises:
        InputError: there are none to use.
    """
    from workbench.laws import points

    if source not in SOURCES:
        raise InputError("source", source, "there is no such source", "Choose " + ", ".join(SOURCES))
    if source == "published":
        if law.published() is None:
            raise InputError(
                "source", source, f"{law.card.name} has no published constants that can be used", "Use runs or points"
            )
        return None
    if source == "example":
        return law.example()
    if source == "points":
        if law.card.data == "machine":
            raise InputError("points", "", f"{law.card.name} takes no points", "Give its options here and reference")
        if not (text or "").strip():
            raise InputError(
                "points",
                text or "",
                "no points are given",
                "Give columns " + ", ".join(c.name for c in law.card.columns if c.required),
            )
        return law.from_table(points.table(text, law.card), options or {})
    from workbench.runs import _home

    return law.from_history(_home(home), query, options or {})


def predict(
    name: str, source: str = "runs", *, query: str = "", text: str | None = None, options: dict | None = None, home=None
) -> dict:
    """Fit a law and ask it.

    Args:
        source: runs of this database, points (``text`` is a CSV or JSON table), the published constants, or the labelled example.
        query: which runs, in the language of the run table or as numbers.
        options: of the law, as text or numbers.

    Returns:
        JSON-able dict: law, source, fitted (constants with intervals, n, error), text, figures, plot, warnings, seconds.

    Raises:
        InputError, StorageError: one sentence with the remedy.
    """
    import time

    began = time.perf_counter()
    law = get(name)
    asked = law.check(options or {})
    data = gather(law, source, query=query, text=text, options=asked, home=home)
    fitted: Fitted = law.published() if source == "published" else law.fit(data, asked, source)
    found = law.answer(fitted, asked, data)
    warnings = once([*fitted.warnings, *found["warnings"]])
    return {
        "law": law.card.id,
        "name": law.card.name,
        "title": law.card.title,
        "source": source,
        "options": asked,
        "fitted": fitted.plain(),
        "text": found["text"],
        "figures": found["figures"],
        "plot": found["plot"],
        "warnings": warnings,
        "seconds": time.perf_counter() - began,
    }

"""Finds every method: each module in the family folders is imported once, none of them imports torch."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil

from engines.errors import InputError
from engines.method import _REGISTRY, FAMILIES, Method


@functools.cache
def _discover() -> None:
    for family in FAMILIES:
        package = importlib.import_module(f"engines.{family}")
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                importlib.import_module(f"engines.{family}.{info.name}")


def methods() -> dict[str, type[Method]]:
    """Every registered method by id, in order of family and name."""
    _discover()
    return dict(sorted(_REGISTRY.items(), key=lambda kv: (FAMILIES.index(kv[1].card.family), kv[0])))


def suggestion(name: str, known) -> str:
    """The remedy for an unknown name: the nearest known ones, or all of them when few."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(near) + "?"
    return "Known: " + ", ".join(sorted(known)[:40])


def get(id: str) -> type[Method]:
    """The class registered under ``id``.

    Raises:
        InputError: there is none.
    """
    known = methods()
    if id not in known:
        raise InputError("method", id, "there is no such method", suggestion(id, known))
    return known[id]


def build(settings: dict, where: str = "pipeline") -> Method:
    """A method from ``{"method": id, field: value}``.

    Raises:
        InputError: unknown method or field, or a value that its field refuses.
    """
    if not isinstance(settings, dict) or "method" not in settings:
        raise InputError(where, settings, "a stage names its method", "Write for example {method: lora, rank: 8}")
    cls = get(settings["method"])
    fields = {row["name"] for row in cls.hyperparameters()}
    given = {k: v for k, v in settings.items() if k != "method"}
    for name in given:
        if name not in fields:
            raise InputError(f"{where}.{name}", given[name], f"{cls.card.id} has no field of this name",
                             suggestion(name, fields))
    return cls(**given)

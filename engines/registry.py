"""Finds every method and switch: each module in their folders is imported once, none of them imports torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil

from engines.errors import InputError
from engines.method import _REGISTRY, _SWITCHES, FAMILIES, Configured, Method


@functools.cache
def _discover() -> None:
    for folder in (*FAMILIES, "training.switches"):
        package = importlib.import_module(f"engines.{folder}")
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                importlib.import_module(f"engines.{folder}.{info.name}")


def methods() -> dict[str, type[Method]]:
    """Every registered method by id, in order of family and name."""
    _discover()
    return dict(sorted(_REGISTRY.items(), key=lambda kv: (FAMILIES.index(kv[1].card.family), kv[0])))


def switches() -> dict[str, type[Configured]]:
    """Every switch of the training loop by id (``engines.training.switch.Switch``)."""
    _discover()
    return dict(sorted(_SWITCHES.items()))


def suggestion(name: str, known) -> str:
    """The remedy for an unknown name: the nearest known ones, or all of them when few."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(near) + "?"
    return "Known: " + ", ".join(sorted(known)[:40])


def get(id: str) -> type[Method]:
    """The class of the method registered under ``id``.

    Raises:
        InputError: there is none.
    """
    known = methods()
    if id not in known:
        if id in switches():
            raise InputError("method", id, "it is no stage: it is switched on in the training loop, beside any stage that trains",
                             f"Write training: {{switches: [{id}]}}")
        raise InputError("method", id, "there is no such method", suggestion(id, known))
    return known[id]


def described(id: str) -> type[Configured]:
    """The class of the method or switch ``id``: what has a card, hyperparameters and claims.

    Raises:
        InputError: there is none.
    """
    found = switches().get(id) if isinstance(id, str) else None
    return found or get(id)


def switch(settings: dict | str, where: str = "training.switches"):
    """A switch from its id or ``{"method": id, field: value}``.

    Raises:
        InputError: unknown switch or field, or a value that its field refuses.
    """
    settings = {"method": settings} if isinstance(settings, str) else settings
    if not isinstance(settings, dict) or "method" not in settings:
        raise InputError(where, settings, "a switch is named by its id", "Write for example [grades] or [{method: grades, tau: 0.1}]")
    known = switches()
    if settings["method"] not in known:
        raise InputError(where, settings["method"], "there is no such switch", suggestion(settings["method"], known))
    return _made(known[settings["method"]], settings, where)


def build(settings: dict, where: str = "pipeline") -> Method:
    """A method from ``{"method": id, field: value}``.

    Raises:
        InputError: unknown method or field, or a value that its field refuses.
    """
    if not isinstance(settings, dict) or "method" not in settings:
        raise InputError(where, settings, "a stage names its method", "Write for example {method: lora, rank: 8}")
    return _made(get(settings["method"]), settings, where)


def _made(cls, settings: dict, where: str):
    fields = {f.name for f in dataclasses.fields(cls)}
    given = {k: v for k, v in settings.items() if k != "method"}
    for name in given:
        if name not in fields:
            raise InputError(f"{where}.{name}", given[name], f"{cls.card.id} has no field of this name",
                             suggestion(name, fields))
    return cls(**given)

"""Modules imported at their first use.

The page lists every method (card, hyperparameters, forecast) and must be up in seconds, so a
method's file may not import torch when it is read. ``from engines.lazy import torch`` gives a
stand-in that imports the real module at the first attribute access; inside functions it then
reads like the real one. Classes that derive from ``torch.nn.Module`` cannot use it at the top of
a file: put them in ``engines/layers`` and import that inside the function.
"""

import importlib


class Lazy:
    """Stands for a module until one of its attributes is asked for."""

    def __init__(self, name: str):
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str):
        # An import machinery probe (inspect, pytest) must not load torch by accident.
        if attribute.startswith("__") and attribute.endswith("__"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)

    def __repr__(self) -> str:
        return f"<lazy {self._name}>"


torch = Lazy("torch")
F = Lazy("torch.nn.functional")

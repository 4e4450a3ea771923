"""Further commands of the command line, one module each, found by themselves.

A module has ``register(add)``: it calls ``add(name, help, act, spec=False)``, which returns the command's argument parser (``spec=True``
adds SPEC and its flags), and ``act(args)``, which prints text for people, or with ``args.json`` one object or list through
``workbench.cli_shared.emit``. Only standard modules are imported at the top of such a module: ``--help`` must be quick.
"""

from __future__ import annotations

import importlib
import pkgutil


def register(add) -> None:
    """Add the commands of every module in this folder."""
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{found.name}").register(add)

"""Where a model's files are: bundled id, local folder, or hub id. torch-free."""

from __future__ import annotations

from pathlib import Path

from engines.errors import InputError
from engines.registry import suggestion

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "models"
RECIPES = BUNDLED.parent / "recipes"
"""Configurations without weights (``stdlib-lm-init``): what the bundled models were made from."""


def bundled() -> dict[str, Path]:
    """Folders of the bundled models by id."""
    return {p.parent.name: p.parent for p in sorted(BUNDLED.glob("*/config.json"))}


def locate(source: str) -> Path | str:
    """The local folder of ``source``, or ``source`` itself when it has the form of a hub id (``owner/name``).

    Raises:
        InputError: neither bundled, nor a folder, nor the form of a hub id.
    """
    known = bundled()
    if source in known:
        return known[source]
    if (RECIPES / source / "config.json").is_file():
        return RECIPES / source
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    parts = source.split("/")
    if len(parts) == 2 and all(parts) and not source.startswith((".", "~")) and "\\" not in source:
        return source
    if "/" in source:
        raise InputError("model", source, "there is no such folder", "Check the path, or give a hub id of the form owner/name")
    raise InputError("model", source, "there is no such model", suggestion(source, known) + ", or give a folder or a hub id")

"""Verdicts on claims that come with Fettle, measured by its makers (``assets/claims.json``; ``workbench.verdicts`` writes it).

They are shown, named as such, until the same experiment has been carried out on the user's own machine; a row whose experiment
has changed since is not shown.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "assets" / "claims.json"


def digest(mark: str) -> str:
    """Short form of ``claims.mark``."""
    return hashlib.sha256(mark.encode()).hexdigest()[:16]


@functools.cache
def _read(stamp: float) -> dict:
    return json.loads(FILE.read_text())


def bundled() -> dict:
    """``{method: {key: row}}``; a row has what ``claims.check`` found, ``of`` (digest of the experiment), ``date`` and ``machine``."""
    try:
        return _read(FILE.stat().st_mtime)
    except FileNotFoundError:
        return {}


def known(method: str, key: str, mark: str) -> dict:
    """The bundled row of a claim whose experiment is still this one, else an empty dict."""
    row = bundled().get(method, {}).get(key)
    return {k: v for k, v in row.items() if k != "of"} if row and row["of"] == digest(mark) else {}

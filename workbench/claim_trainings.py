"""Trainings of experiments that are kept, so that a baseline which many claims share is trained once.

A training on the processor with fixed seeds gives the same scores again, so a kept one is as good as a new one until the code of the
engines, the model, the data, torch or the number of threads changes: all of these are in its name. Seconds are not: whoever reads a
kept training is told so and shows none.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np

KEEP = 400
"""Trainings in the folder; the oldest go first. One takes some kilobytes."""


@functools.cache
def code() -> str:
    """Digest of all that the engines consist of, and of the experiment itself."""
    root, found = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted([*(root / "engines").rglob("*.py"), Path(__file__).with_name("claiming.py"), Path(__file__).with_name("levers.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def stamp(where) -> list:
    """Names, sizes and times of the files of a model or of data; a bundled name alone stays what it is."""
    path = Path(str(where))
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [str(where), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())]


class Trainings:
    """Trainings in ``folder``; with None nothing is kept and ``take`` only trains."""

    def __init__(self, folder: Path | str | None):
        self.folder, self.reused = Path(folder) if folder else None, 0

    def take(self, what: dict, train) -> dict:
        """The row of ``Bench.train`` for ``what``, which must name all that it depends on; ``kept`` is True when it is an earlier one."""
        if self.folder is None:
            return train() | {"kept": False}
        path = self.folder / f"{hashlib.sha256(json.dumps([code(), what], sort_keys=True).encode()).hexdigest()[:32]}.json"
        try:
            row = json.loads(path.read_text())
        except (OSError, ValueError):
            row = None
        if row is not None:
            self.reused += 1
            return {k: np.asarray(v, float) if isinstance(v, list) else v for k, v in row.items()} | {"kept": True}
        row = train()
        self._write(path, row)
        return row | {"kept": False}

    def _write(self, path: Path, row: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(row, default=lambda a: a.tolist()))
            part.replace(path)
            for old in sorted(self.folder.glob("*.json"), key=lambda f: f.stat().st_mtime)[:-KEEP]:
                old.unlink(missing_ok=True)
        except OSError:
            pass  # a full disk costs the next claim some seconds, not this one its figure

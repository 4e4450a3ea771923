"""Files that a person sends from the browser: kept in the home, so that a run that uses one can be repeated."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from engines.errors import InputError
from workbench.home import Home

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
LARGEST = 2_000_000_000


def keep(home: Home, path: str, name: str, inbox: str | Path) -> str:
    """Copy an uploaded file to ``<home>/uploads`` and return its path there; the same content is kept once.

    Args:
        path: where the server put it.
        name: what it was called in the browser.
        inbox: folder of the server's uploads; a path outside it is refused.

    Raises:
        InputError: not an upload, of a kind that is not read, or larger than 2 GB.
    """
    given, folder = Path(path).resolve(), Path(inbox).resolve()
    plain = re.sub(r"[^\w.-]+", "-", Path(str(name)).name).strip("-.") or "data"
    if not given.is_relative_to(folder) or not given.is_file():
        raise InputError("data", plain, "no file of this name was uploaded", "Choose the file again")
    if Path(plain).suffix.lower() not in KINDS:
        raise InputError("data", plain, "files of this kind are not read", "Choose one of " + ", ".join(KINDS))
    size = given.stat().st_size
    if not size or size > LARGEST:
        raise InputError("data", plain, "the file is empty" if not size else f"{size / 1e9:.1f} GB are too much for a browser",
                         "Choose another file" if not size else "Put it on this machine and give its path")
    with given.open("rb") as f:
        mark = hashlib.file_digest(f, "sha256").hexdigest()[:8]
    target = home.path / "uploads" / mark / plain
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given, target)
    return str(target)

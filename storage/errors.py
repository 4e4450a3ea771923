"""Errors of the storage room; each is one sentence that names the remedy."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


class StorageError(Exception):
    """The database cannot do what was asked; ``str()`` says why and what to do."""

    exit_code = 2


class NotFound(StorageError):
    """There is no such run, evaluation or preset."""


def explain(error: BaseException, path: Path) -> StorageError:
    """The ``StorageError`` that tells a person what an ``sqlite3.Error`` or ``OSError`` on ``path`` means."""
    text = str(error).lower()
    if "not a database" in text or "malformed" in text or "corrupt" in text:
        return StorageError(f"The database {path} is damaged or is not a database. Move it away and put a backup in its place, "
                            "or set WORKBENCH_HOME to another folder.")
    if "disk is full" in text or "no space" in text or "disk i/o" in text:
        return StorageError(f"The disk that holds {path} is full or failing ({error}). Free some space, then try again.")
    if "readonly" in text or "read-only" in text or "unable to open" in text or isinstance(error, OSError):
        return StorageError(f"Cannot write to {path.parent} ({error}). Make the folder writable, or set WORKBENCH_HOME to one that is.")
    if "locked" in text or "busy" in text:
        return StorageError(f"The database {path} stayed locked by another program. Close the program that holds it, then try again.")
    return StorageError(f"The database {path} refused the request ({error}). Check it with `sqlite3 {path} 'PRAGMA integrity_check'`, "
                        "or restore a backup.")


@contextlib.contextmanager
def explained(path: Path):
    """Turn errors of SQLite and of the file system into ``StorageError``; integrity errors are defects and pass through."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except (sqlite3.Error, OSError) as e:
        raise explain(e, path) from e

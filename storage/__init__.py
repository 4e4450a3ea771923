"""The storage room: runs and all that is recorded of them, in SQLite. Knows nothing of models or methods."""

from storage.errors import NotFound, StorageError
from storage.runs import ACTIVE, FINAL, STATES
from storage.store import Store
from storage.writer import Writer

__all__ = ["ACTIVE", "FINAL", "STATES", "NotFound", "StorageError", "Store", "Writer"]

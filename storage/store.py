"""``Store``: everything that the workbench remembers, in one SQLite file that many processes use at once."""

from __future__ import annotations

from storage.connection import Connections
from storage.export import Export
from storage.library import Library
from storage.points import Points
from storage.probes import Probes
from storage.queries import Queries
from storage.records import Records
from storage.runs import Runs
from storage.sweeps import Sweeps


class Store(Connections, Runs, Points, Queries, Records, Library, Sweeps, Probes, Export):
    """Open (and make or migrate) the database at ``path``.

    An instance may be shared between threads: each gets its own connection. It may be pickled and it survives a fork.
    ``with store.transaction():`` around several calls makes them one transaction.

    Raises:
        StorageError: the folder cannot be written, the file is damaged, of another program, or of a newer version.
    """

"""Numbered migrations; ``PRAGMA user_version`` says which of them a database has had.

To change the schema append to ``MIGRATIONS``; what is already there is history and stays as it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from storage import schema, search
from storage.errors import StorageError

APPLICATION = 0x46544C45
"""``PRAGMA application_id`` of our files, so that another program's database is not taken for ours."""


def _core(db: sqlite3.Connection) -> None:
    for statement in schema.CORE:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")


def _search(db: sqlite3.Connection) -> None:
    for statement in schema.SEARCH:
        db.execute(statement)
    for (run_id,) in db.execute("SELECT id FROM runs").fetchall():
        search.index(db, run_id)


def _sweeps(db: sqlite3.Connection) -> None:
    for statement in schema.SWEEPS:
        db.execute(statement)


def _probes(db: sqlite3.Connection) -> None:
    for statement in schema.PROBES:
        db.execute(statement)


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_core, _search, _sweeps, _probes)
VERSION = len(MIGRATIONS)


def version(db: sqlite3.Connection) -> int:
    """Number of migrations that the open database has had; 0 for a new file."""
    return db.execute("PRAGMA user_version").fetchone()[0]


def check(db: sqlite3.Connection, path: Path) -> int:
    """The version of the database.

    Raises:
        StorageError: it is newer than this program, or it belongs to another program.
    """
    # In this order: a process that migrates at this moment sets all three in one transaction.
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    have = version(db)
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION and (have or tables):
        raise StorageError(f"{path} is the database of another program. Set WORKBENCH_HOME to a folder of its own.")
    if have > VERSION:
        raise StorageError(f"The database {path} has version {have}, this program knows versions up to {VERSION}. "
                           "Update the program, or set WORKBENCH_HOME to another folder.")
    return have


def migrate(db: sqlite3.Connection, path: Path, upto: int = VERSION) -> int:
    """Bring the open database up to ``upto``, each migration in a transaction of its own; returns the version it had.

    Safe when several processes open the file at once: each looks again once it holds the write lock.
    A file that already holds data is copied beside itself (``.v1.bak``) before it is changed.
    """
    first = check(db, path)
    if 0 < first < upto:
        copy = path.with_name(f"{path.name}.v{first}.bak")
        if not copy.exists():
            with sqlite3.connect(copy) as target:
                db.backup(target)
            target.close()
    while version(db) < upto:
        db.execute("BEGIN IMMEDIATE")
        try:
            have = check(db, path)
            if have < upto:
                MIGRATIONS[have](db)
                db.execute(f"PRAGMA user_version = {have + 1}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
    return first

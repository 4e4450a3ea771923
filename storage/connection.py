"""Opening the file: one connection per thread and process, journal mode by file system, short write transactions."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from pathlib import Path

from storage import migrations
from storage.errors import StorageError, explain, explained

BUSY_SECONDS = 15.0
REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gluster", "gpfs", "beegfs", "afs", "fuse", "virtiofs", "vboxsf", "davfs", "webdav")
_ABANDONED: list = []


def filesystem(path: Path) -> str:
    """Type of the file system that holds ``path`` (``ext4``, ``nfs4`` ...); empty where the system does not say."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    here, best = str(path.resolve()), ("", "")
    for line in mounts:
        parts = line.split()
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ")
        if (here == point or here.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, parts[2])
    return best[1]


def is_local(path: Path) -> bool:
    """False on network and FUSE file systems, where the shared memory that WAL needs does not work reliably."""
    kind = filesystem(path)
    return kind == "fuseblk" or not kind.startswith(REMOTE)


class Connections:
    """The base of ``Store``: opens, migrates, and hands each thread its own connection.

    Attributes:
        path: the database file.
        journal: ``wal`` or ``delete``.
        notes: sentences for a person about how the file was opened (no WAL, migrated).
    """

    def __init__(self, path: str | Path):
        if sqlite3.sqlite_version_info < (3, 37):
            raise StorageError(f"This Python has SQLite {sqlite3.sqlite_version}, 3.37 or later is needed. Use a newer Python.")
        self.path = Path(path).expanduser().absolute()
        self.notes: list[str] = []
        self.journal = "delete"
        self._local = threading.local()
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise StorageError(f"{self.path} is a folder, not a database. Remove it, or set WORKBENCH_HOME to another folder.")
            if not os.access(self.path.parent, os.W_OK) or (self.path.exists() and not os.access(self.path, os.W_OK)):
                raise PermissionError("permission denied")
            self._prepare()

    def __reduce__(self):
        return type(self), (str(self.path),)

    def _prepare(self) -> None:
        db = self.connection
        migrations.check(db, self.path)
        wanted = "wal" if is_local(self.path.parent) else "delete"
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                # The change of mode needs the file for itself for a moment and does not wait by itself.
                self.journal = db.execute(f"PRAGMA journal_mode = {wanted}").fetchone()[0]
                break
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if self.journal != "wal":
            self.notes.append(f"{self.path.parent} is not a plain local disk ({filesystem(self.path.parent) or 'unknown'}): the database "
                              "works without a write-ahead log, so reading and writing wait for each other.")
        self._tune(db)
        had = migrations.migrate(db, self.path)
        if 0 < had < migrations.VERSION:
            self.notes.append(f"The database was brought from version {had} to {migrations.VERSION}; the old one is kept beside it.")

    def _tune(self, db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA synchronous = {'NORMAL' if self.journal == 'wal' else 'FULL'}")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA cache_size = -16384")
        db.execute("PRAGMA temp_store = MEMORY")

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection in this process, in autocommit mode."""
        local = self._local
        db = getattr(local, "db", None)
        if db is not None and local.pid == os.getpid():
            return db
        if db is not None:
            # A fork brought the parent's connection along; closing it here would break the parent's locks.
            _ABANDONED.append(db)
        with explained(self.path):
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        local.db, local.pid, local.inside = db, os.getpid(), None
        db.row_factory = None
        try:
            self._tune(db)
        except sqlite3.Error as e:
            local.db = None
            db.close()
            raise explain(e, self.path) from e
        return db

    @contextlib.contextmanager
    def write(self):
        """A write transaction (``BEGIN IMMEDIATE``) on this thread's connection; nested uses join the outer one.

        Raises:
            StorageError: the file stayed locked, the disk is full, the file is damaged.
        """
        db = self.connection
        if self._local.inside == "read":
            raise RuntimeError("a read transaction cannot become a write transaction")
        if self._local.inside == "write":
            yield db
            return
        with explained(self.path):
            db.execute("BEGIN IMMEDIATE")
            self._local.inside = "write"
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            finally:
                self._local.inside = None

    @contextlib.contextmanager
    def read(self):
        """A read transaction: all statements inside see one state of the database."""
        db = self.connection
        if self._local.inside:
            yield db
            return
        with explained(self.path):
            db.execute("BEGIN")
            self._local.inside = "read"
            try:
                yield db
            finally:
                self._local.inside = None
                if db.in_transaction:
                    db.execute("COMMIT")

    transaction = write

    def close(self) -> None:
        """Close this thread's connection; the next use opens a new one."""
        db = getattr(self._local, "db", None)
        if db is not None and self._local.pid == os.getpid():
            db.close()
        self._local.db = None

"""Where the workbench keeps its things: database, run folders, logs, the warm worker's socket."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engines.errors import InputError

_STORES: dict[tuple[str, int], object] = {}


@dataclass(frozen=True)
class Home:
    """One folder (``WORKBENCH_HOME``, else ``~/.fettle``) with everything that must outlive a server."""

    path: Path

    @classmethod
    def open(cls, path: str | Path | None = None) -> Home:
        """The home at ``path``, at ``WORKBENCH_HOME`` or at ``~/.fettle``; created when it does not exist.

        Raises:
            InputError: it cannot be created or written to.
        """
        given = path or os.environ.get("WORKBENCH_HOME") or "~/.fettle"
        folder = Path(given).expanduser().absolute()
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise InputError("WORKBENCH_HOME", str(folder), f"the folder cannot be written to ({e.strerror or e})",
                             "Set WORKBENCH_HOME to a folder of your own on a disk with free space") from None
        return cls(folder)

    @property
    def db(self) -> Path:
        return self.path / "fettle.db"

    @property
    def runs_dir(self) -> Path:
        return self.path / "runs"

    runs = runs_dir

    @property
    def store(self):
        """The ``storage.Store`` of this home; one per process (connections must not cross a fork).

        Raises:
            storage.StorageError: the database is of a newer version, corrupt or not writable.
        """
        key = (str(self.db), os.getpid())
        if key not in _STORES:
            from storage import Store
            _STORES[key] = Store(self.db)
        return _STORES[key]

    def folder(self, run_id: int) -> Path:
        """The run's own folder; created when it does not exist."""
        folder = self.runs_dir / str(int(run_id))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self, run_id: int) -> Path:
        """Everything that the run's process printed."""
        return self.runs_dir / str(int(run_id)) / "log.txt"

    def checkpoints(self, run_id: int) -> Path:
        return self.runs_dir / str(int(run_id)) / "checkpoints"

    def model(self, run_id: int) -> Path:
        """The final model of a run that has ended well."""
        return self.runs_dir / str(int(run_id)) / "model"

    def exit_note(self, run_id: int) -> Path:
        """Written by the parent of the run's process when that ends: exit code, signal, peak memory."""
        return self.runs_dir / str(int(run_id)) / "exit.json"

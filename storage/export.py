"""Copies for use elsewhere: a whole-database backup, and chosen runs as Parquet, CSV or JSON."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from pathlib import Path

from storage.errors import StorageError, explain, explained
from storage.runs import COLUMNS

FORMATS = ("parquet", "csv", "json")
_TABLES = {
    "runs": f"SELECT {', '.join(f'r.{c}' for c in COLUMNS)} FROM runs r WHERE r.id = ?",
    "stages": "SELECT * FROM stages WHERE run_id = ? ORDER BY position",
    "points": """SELECT s.run_id, s.name AS series, p.step, p.value, p.t FROM series s JOIN points p ON p.series_id = s.id
                 WHERE s.run_id = ? ORDER BY s.name, p.step""",
    "events": "SELECT run_id, id, kind, text, t, step, data FROM events WHERE run_id = ? ORDER BY id",
    "evaluations": """SELECT run_id, id, name, stage, step, t, metric, value, low, high, n, items_hash, extra FROM evaluations
                      WHERE run_id = ? ORDER BY step, stage""",
    "forecasts": "SELECT run_id, data FROM forecasts WHERE run_id = ?",
    "footprints": "SELECT run_id, data FROM footprints WHERE run_id = ?",
}
_JSON = ("spec", "error", "tags", "settings", "reasons", "summary", "data", "extra")


class Export:
    """Part of ``Store``."""

    def backup(self, path: str | Path) -> Path:
        """Copy the database through SQLite's backup interface while others use it; the copy appears whole or not at all.

        Raises:
            StorageError: the target cannot be written.
        """
        target = Path(path).expanduser().absolute()
        partial = target.with_name(target.name + ".partial")
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = sqlite3.connect(partial)
            try:
                self.connection.backup(copy, pages=2048)
                copy.execute("PRAGMA journal_mode = DELETE")
            finally:
                copy.close()
            os.replace(partial, target)
        return target

    def check(self) -> list[str]:
        """What SQLite's integrity check finds; empty: nothing wrong."""
        with self.read() as db:
            found = [row[0] for row in db.execute("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def inspect(self) -> dict:
        """What is in the file, for people: path, version, journal, bytes, rows of each table, the largest runs by points."""
        import sqlite_utils
        with self.read() as db:
            utils = sqlite_utils.Database(db, recursive_triggers=False)
            tables = {t.name: t.count for t in utils.tables if not t.name.startswith(("sqlite_", "run_search_"))}
            largest = list(utils.query("""SELECT r.id, r.name, sum(s.count) AS points FROM series s JOIN runs r ON r.id = s.run_id
                                          GROUP BY r.id ORDER BY points DESC LIMIT 5"""))
            version = db.execute("PRAGMA user_version").fetchone()[0]
        files = [self.path, self.path.with_name(self.path.name + "-wal")]
        return {"path": str(self.path), "version": version, "journal": self.journal, "notes": list(self.notes),
                "bytes": sum(f.stat().st_size for f in files if f.exists()), "tables": tables, "largest": largest}

    def export(self, run_ids, folder: str | Path, format: str = "parquet") -> list[Path]:
        """Write the tables of some runs (runs, stages, points, events, evaluations, forecasts, footprints) into ``folder``.

        One file per table; nested fields are JSON text in Parquet and CSV and real objects in JSON.

        Raises:
            StorageError: unknown format, the folder cannot be written, or pyarrow is missing for Parquet.
            NotFound: there is no such run.
        """
        if format not in FORMATS:
            raise StorageError(f"There is no export format {format!r}. Choose {', '.join(FORMATS)}.")
        ids = [self.run_id(i) for i in ([run_ids] if isinstance(run_ids, (int, str)) else run_ids)]
        folder = Path(folder).expanduser().absolute()
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.read() as db:
                for table, sql in _TABLES.items():
                    names, rows = [], []
                    for run_id in ids:
                        cursor = db.execute(sql, (run_id,))
                        names = [d[0] for d in cursor.description]
                        rows += cursor.fetchall()
                    path = folder / f"{table}.{format}"
                    _WRITERS[format](path, names, rows)
                    written.append(path)
        except OSError as e:
            raise explain(e, folder / "x") from e
        return written


def _write_csv(path: Path, names: list[str], rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(names)
        writer.writerows(rows)


def _write_json(path: Path, names: list[str], rows: list[tuple]) -> None:
    nested = {i for i, name in enumerate(names) if name in _JSON}
    out = [{name: json.loads(v) if i in nested and v is not None else v for i, (name, v) in enumerate(zip(names, row))} for row in rows]
    text = json.dumps(out, ensure_ascii=False, indent=None if len(out) > 5000 else 1)
    path.write_text(text.replace("Infinity", "null") if path.stem == "points" else text, encoding="utf-8")


def _write_parquet(path: Path, names: list[str], rows: list[tuple]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise StorageError("Parquet needs the package pyarrow. Install it, or export as csv or json.") from e
    columns = list(zip(*rows)) if rows else [()] * len(names)
    table = pyarrow.table({name: pyarrow.array(list(column)) for name, column in zip(names, columns)})
    pyarrow.parquet.write_table(table, path, compression="zstd")


_WRITERS = {"parquet": _write_parquet, "csv": _write_csv, "json": _write_json}

"""Sweeps and their trials: rows only; what a plan means is the workbench's affair."""

from __future__ import annotations

import time
from typing import Any

from storage.codec import decode, encode, number
from storage.errors import NotFound

SWEEP_STATES = ("running", "finished", "stopped", "failed")
TRIAL_STATES = ("running", "complete", "pruned", "infeasible", "failed", "stopped")
SWEEP_COLUMNS = ("id", "name", "status", "spec", "plan", "created", "started", "ended", "owner", "heartbeat", "wish", "message",
                 "note")
TRIAL_COLUMNS = ("sweep_id", "number", "run_id", "state", "params", "vals", "attempt", "node", "created", "started", "ended",
                 "message")
_SWEEPS = f"SELECT {', '.join(SWEEP_COLUMNS)} FROM sweeps"
_TRIALS = f"SELECT {', '.join(TRIAL_COLUMNS)} FROM trials"
_JSON = ("spec", "plan", "params", "vals")


def _row(columns: tuple, values: tuple) -> dict:
    row = dict(zip(columns, values))
    for name in _JSON:
        if name in row:
            row[name] = decode(row[name])
    if "vals" in row:
        row["values"] = row.pop("vals")
    return row


def _bind(column: str, value: Any):
    if column in _JSON:
        return encode(value)
    return value if value is None or isinstance(value, str) else number(value)


class Sweeps:
    """Part of ``Store``. Rows are dicts, keys as in ``SWEEP_COLUMNS`` and ``TRIAL_COLUMNS`` (``vals`` is ``values``)."""

    def create_sweep(self, spec: dict, plan: dict, *, name: str, status: str = "running", note: str = "") -> int:
        """Record a sweep and return its id."""
        if status not in SWEEP_STATES:
            raise ValueError(f"unknown status {status!r}")
        with self.write() as db:
            return db.execute("INSERT INTO sweeps (name, status, spec, plan, created, note) VALUES (?, ?, ?, ?, ?, ?)",
                              (name, status, encode(spec), encode(plan), time.time(), note)).lastrowid

    def sweep_id(self, sweep: int | str) -> int:
        """The id of a sweep given by id (also as text) or by name; of several with one name the newest.

        Raises:
            NotFound: there is none.
        """
        text = str(sweep).lstrip("#").removeprefix("sweep-")
        with self.read() as db:
            found = db.execute("SELECT id FROM sweeps WHERE id = ?", (int(text),)).fetchone() if text.isdigit() else None
            if found is None:
                found = db.execute("SELECT id FROM sweeps WHERE name = ? ORDER BY id DESC LIMIT 1", (str(sweep),)).fetchone()
        if found is None:
            raise NotFound(f"There is no sweep {sweep!r}. List the sweeps to see their numbers and names.")
        return found[0]

    def sweep(self, sweep: int | str) -> dict:
        """The row of a sweep.

        Raises:
            NotFound: there is no sweep of this id or name.
        """
        sweep_id = self.sweep_id(sweep)
        with self.read() as db:
            return _row(SWEEP_COLUMNS, db.execute(f"{_SWEEPS} WHERE id = ?", (sweep_id,)).fetchone())

    def sweeps(self, *, status=None, limit: int | None = 50) -> list[dict]:
        """Rows of the sweeps, newest first, each with ``counts`` ({trial state: how many}); ``status``: one state or several."""
        wanted = SWEEP_STATES if status is None else (status,) if isinstance(status, str) else tuple(status)
        with self.read() as db:
            rows = [_row(SWEEP_COLUMNS, v) for v in db.execute(
                f"{_SWEEPS} WHERE status IN ({', '.join('?' * len(wanted))}) ORDER BY id DESC LIMIT ?",
                (*wanted, -1 if limit is None else limit))]
            for row in rows:
                row["counts"] = dict(db.execute("SELECT state, count(*) FROM trials WHERE sweep_id = ? GROUP BY state",
                                                (row["id"],)).fetchall())
        return rows

    def update_sweep(self, sweep_id: int, **fields) -> None:
        """Set columns of a sweep.

        Raises:
            NotFound: there is no such sweep.
            ValueError: no such column or state.
        """
        if fields.get("status", "running") not in SWEEP_STATES:
            raise ValueError(f"unknown status {fields['status']!r}")
        for name in fields:
            if name not in SWEEP_COLUMNS or name == "id":
                raise ValueError(f"a sweep has no column {name!r}")
        with self.write() as db:
            if not db.execute(f"UPDATE sweeps SET {', '.join(f'{c} = ?' for c in fields)} WHERE id = ?",
                              [*(_bind(c, v) for c, v in fields.items()), sweep_id]).rowcount:
                raise NotFound(f"There is no sweep {sweep_id!r}. List the sweeps to see their numbers and names.")

    def put_trial(self, sweep_id: int, trial: int, **fields) -> None:
        """Record a trial or change it: run_id, state, params, values, attempt, node, started, ended, message; the others stay."""
        if "values" in fields:
            fields["vals"] = fields.pop("values")
        if fields.get("state", "running") not in TRIAL_STATES:
            raise ValueError(f"unknown state {fields['state']!r}")
        for name in fields:
            if name not in TRIAL_COLUMNS[2:]:
                raise ValueError(f"a trial has no column {name!r}")
        bound = {c: _bind(c, v) for c, v in fields.items()}
        new = {"state": "running", "params": "{}", "created": time.time()} | bound
        with self.write() as db:
            if bound and db.execute(f"UPDATE trials SET {', '.join(f'{c} = ?' for c in bound)} WHERE sweep_id = ? AND number = ?",
                                    [*bound.values(), sweep_id, trial]).rowcount:
                return
            db.execute(f"INSERT INTO trials (sweep_id, number, {', '.join(new)}) VALUES (?, ?{', ?' * len(new)})",
                       [sweep_id, trial, *new.values()])

    def trials(self, sweep_id: int) -> list[dict]:
        """The trials of a sweep in order of their number."""
        with self.read() as db:
            return [_row(TRIAL_COLUMNS, v) for v in db.execute(
                f"{_TRIALS} WHERE sweep_id = ? ORDER BY number", (sweep_id,))]

    def trial_of(self, run_id: int) -> dict | None:
        """The trial whose latest attempt is this run, or None."""
        with self.read() as db:
            found = db.execute(f"{_TRIALS} WHERE run_id = ?", (run_id,)).fetchone()
        return None if found is None else _row(TRIAL_COLUMNS, found)

    def delete_sweep(self, sweep_id: int) -> None:
        """Forget a sweep and its trials; their runs stay.

        Raises:
            NotFound: there is no such sweep.
        """
        with self.write() as db:
            if not db.execute("DELETE FROM sweeps WHERE id = ?", (sweep_id,)).rowcount:
                raise NotFound(f"There is no sweep {sweep_id!r}. List the sweeps to see their numbers and names.")

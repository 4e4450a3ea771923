"""Runs: their rows, the queue, the leader's lease."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from storage import search
from storage.codec import decode, encode, number
from storage.errors import NotFound

STATES = ("queued", "starting", "running", "paused", "finished", "stopped", "failed", "lost")
ACTIVE = ("starting", "running")
FINAL = ("finished", "stopped", "failed", "lost")
WISHES = (None, "stop", "pause", "kill")

COLUMNS = ("id", "name", "slot", "status", "spec", "created", "queued", "started", "ended", "pid", "pid_started", "host", "heartbeat",
           "owner", "progress", "left_seconds", "phase", "stage", "message", "error", "wish", "parent", "priority", "tags", "note",
           "starred", "archived", "log_path", "folder", "metric", "base_value", "value", "value_low", "value_high", "n", "seconds",
           "peak_bytes", "size_bytes", "trainable", "parameters", "tokens_per_second")
JSON_COLUMNS = ("spec", "error", "tags")
FLAGS = ("starred", "archived")
WHOLE = ("id", "slot", "pid", "stage", "parent", "priority", "n", "peak_bytes", "size_bytes", "trainable", "parameters")
SEARCHED = ("name", "note", "tags", "spec")
_SELECT = ", ".join(f"r.{c}" for c in COLUMNS)


def _row(values: tuple) -> dict:
    row = dict(zip(COLUMNS, values))
    row["spec"], row["error"], row["tags"] = decode(row["spec"], {}), decode(row["error"]), decode(row["tags"], [])
    for flag in FLAGS:
        row[flag] = bool(row[flag])
    return row


def _bind(column: str, value: Any):
    if column in FLAGS:
        return int(bool(value))
    if column == "tags":
        return encode(list(value or ()))
    if column in JSON_COLUMNS:
        return encode(value)
    if column in WHOLE and value is not None:
        return int(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return number(value)


class Runs:
    """Part of ``Store``; run rows are dicts with the keys of ``COLUMNS``."""

    def create_run(self, spec: dict, *, name: str, forecast: dict | None = None, status: str = "queued", parent: int | None = None,
                   priority: int = 0, tags=(), **fields) -> int:
        """Record a run and return its id; ``fields`` are further columns (note, folder, log_path ...)."""
        if status not in STATES:
            raise ValueError(f"unknown status {status!r}")
        now = time.time()
        row = {"name": name, "status": status, "spec": spec, "created": now, "queued": now if status == "queued" else None,
               "parent": parent, "priority": priority, "tags": tags, **fields}
        names = self._known(row)
        with self.write() as db:
            run_id = db.execute(f"INSERT INTO runs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
                                [_bind(c, row[c]) for c in names]).lastrowid
            db.execute("UPDATE runs SET slot = (id - 1) % 10 WHERE id = ?", (run_id,))
            db.execute("INSERT INTO heads (run_id) VALUES (?)", (run_id,))
            if forecast is not None:
                db.execute("INSERT INTO forecasts (run_id, data) VALUES (?, ?)", (run_id, encode(forecast)))
            search.index(db, run_id)
        return run_id

    @staticmethod
    def _known(fields) -> list[str]:
        for name in fields:
            if name not in COLUMNS or name == "id":
                raise ValueError(f"a run has no column {name!r}")
        return list(fields)

    def run_id(self, run: int | str) -> int:
        """The id of a run given by id (also as text) or by name; of several with one name the newest.

        Raises:
            NotFound: there is none.
        """
        with self.read() as db:
            found = None
            if isinstance(run, int) or str(run).lstrip("#").isdigit():
                found = db.execute("SELECT id FROM runs WHERE id = ?", (int(str(run).lstrip("#")),)).fetchone()
            if found is None:
                found = db.execute("SELECT id FROM runs WHERE name = ? ORDER BY id DESC LIMIT 1", (str(run),)).fetchone()
        if found is None:
            raise NotFound(f"There is no run {run!r}. List the runs to see their numbers and names.")
        return found[0]

    def run(self, run_id: int | str) -> dict:
        """The whole row of a run, with ``forecast`` and ``footprint`` (dict or None) and ``epoch``.

        Raises:
            NotFound: there is no run of this id or name.
        """
        run_id = self.run_id(run_id)
        with self.read() as db:
            return self._full(db, _row(db.execute(f"SELECT {_SELECT} FROM runs r WHERE id = ?", (run_id,)).fetchone()))

    def light(self, run_id: int) -> dict:
        """The row of a run without forecast and footprint: cheap enough for several calls a second.

        Raises:
            NotFound: there is no run of this id.
        """
        with self.read() as db:
            found = db.execute(f"SELECT {_SELECT} FROM runs r WHERE id = ?", (run_id,)).fetchone()
        if found is None:
            raise NotFound(f"There is no run {run_id!r}. List the runs to see their numbers and names.")
        return _row(found)

    @staticmethod
    def _full(db, row: dict) -> dict:
        for table, key in (("forecasts", "forecast"), ("footprints", "footprint")):
            found = db.execute(f"SELECT data FROM {table} WHERE run_id = ?", (row["id"],)).fetchone()
            row[key] = decode(found[0]) if found else None
        row["epoch"] = db.execute("SELECT epoch FROM heads WHERE run_id = ?", (row["id"],)).fetchone()[0]
        return row

    @staticmethod
    def _filter(status=None, search_words=None, tag=None, archived=False, ids=None, where=()) -> tuple[str, list]:
        parts, arguments = [], []
        if archived is not None:
            parts.append("r.archived = ?")
            arguments.append(int(bool(archived)))
        if status is not None:
            wanted = (status,) if isinstance(status, str) else tuple(status)
            parts.append(f"r.status IN ({', '.join('?' * len(wanted))})")
            arguments += wanted
        if ids is not None:
            ids = list(ids)
            parts.append(f"r.id IN ({', '.join('?' * len(ids))})")
            arguments += ids
        if tag is not None:
            sql, given = search.condition("tag", "=", tag)
            parts.append(sql)
            arguments += given
        expression = search.match(search_words or "")
        if expression:
            parts.append("r.id IN (SELECT rowid FROM run_search WHERE run_search MATCH ?)")
            arguments.append(expression)
        for name, operator, value in where:
            sql, given = search.condition(name, operator, value)
            parts.append(sql)
            arguments += given
        return " AND ".join(parts) or "1", arguments

    def runs(self, *, status=None, search: str | None = None, tag: str | None = None, limit: int | None = 50, offset: int = 0,
             order: str = "-created", archived: bool | None = False, ids=None, where=(), full: bool = False) -> list[dict]:
        """Rows of the runs that fit all filters.

        Args:
            status: one state or several.
            search: words; each must begin a word of the name, a tag, the note or a setting.
            order: a column, with ``-`` before it for descending; empty values come last. Several are divided by commas.
            archived: False: without archived runs; True: only these; None: both.
            ids: only these.
            where: comparisons ``(name, operator, value)`` as in ``storage.search.condition``.
            full: with ``forecast``, ``footprint`` and ``epoch``.
        """
        sql, arguments = self._filter(status, search, tag, archived, ids, where)
        terms = []
        for term in order.split(","):
            term = term.strip()
            column = term.lstrip("-")
            if column not in COLUMNS:
                raise ValueError(f"a run has no column {column!r}")
            terms.append(f"r.{column} IS NULL, r.{column} {'COLLATE NOCASE ' if column == 'name' else ''}{'DESC' if term[0] == '-' else 'ASC'}")
        with self.read() as db:
            found = db.execute(f"SELECT {_SELECT} FROM runs r WHERE {sql} ORDER BY {', '.join(terms)}, r.id DESC LIMIT ? OFFSET ?",
                               [*arguments, -1 if limit is None else limit, offset]).fetchall()
            rows = [_row(v) for v in found]
            if full:
                rows = [self._full(db, row) for row in rows]
        return rows

    def count_runs(self, *, status=None, search: str | None = None, tag: str | None = None, archived: bool | None = False, ids=None,
                   where=()) -> int:
        """How many runs fit the filters of ``runs``."""
        sql, arguments = self._filter(status, search, tag, archived, ids, where)
        with self.read() as db:
            return db.execute(f"SELECT count(*) FROM runs r WHERE {sql}", arguments).fetchone()[0]

    def tags(self) -> dict[str, int]:
        """Every tag in use with the number of its runs, the most used first."""
        with self.read() as db:
            return dict(db.execute("SELECT j.value, count(*) FROM runs, json_each(tags) j GROUP BY 1 ORDER BY 2 DESC, 1").fetchall())

    def update_run(self, run_id: int, **fields) -> None:
        """Set columns of a run; ``forecast`` and ``footprint`` are also accepted.

        Raises:
            NotFound: there is no such run.
            ValueError: no such column or state.
        """
        with self.write() as db:
            if "forecast" in fields:
                self.put_forecast(run_id, fields.pop("forecast"))
            if "footprint" in fields:
                self.put_footprint(run_id, fields.pop("footprint"))
            if fields and not self._set(db, fields, "id = ?", [run_id], run_id):
                raise NotFound(f"There is no run {run_id!r}. List the runs to see their numbers and names.")

    def _set(self, db, fields: dict, condition: str, arguments: list, run_id: int) -> bool:
        names = self._known(fields)
        if fields.get("status", "queued") not in STATES:
            raise ValueError(f"unknown status {fields['status']!r}")
        changed = db.execute(f"UPDATE runs SET {', '.join(f'{c} = ?' for c in names)} WHERE {condition}",
                             [_bind(c, fields[c]) for c in names] + arguments).rowcount
        if changed and any(c in SEARCHED for c in names):
            search.index(db, run_id)
        return changed > 0

    def transition(self, run_id: int, from_states: tuple, to: str, **fields) -> bool:
        """Set the state to ``to`` and the columns ``fields`` if the state is one of ``from_states``; False: it was not.

        ``queued`` and ``ended`` are dated by themselves unless given.
        """
        states = (from_states,) if isinstance(from_states, str) else tuple(from_states)
        fields["status"] = to
        if to == "queued":
            fields.setdefault("queued", time.time())
        if to in FINAL:
            fields.setdefault("ended", time.time())
        with self.write() as db:
            return self._set(db, fields, f"id = ? AND status IN ({', '.join('?' * len(states))})", [run_id, *states], run_id)

    def wish(self, run_id: int, what: str | None) -> None:
        """Record what the person wants of a run: stop, pause, kill, or None to take it back.

        Raises:
            NotFound: there is no such run.
        """
        if what not in WISHES:
            raise ValueError(f"unknown wish {what!r}")
        self.update_run(run_id, wish=what)

    def wished(self, run_id: int) -> str | None:
        """The wish of a run; the cheapest question that a worker asks."""
        with self.read() as db:
            found = db.execute("SELECT wish FROM runs WHERE id = ?", (run_id,)).fetchone()
        return found[0] if found else None

    def heartbeat(self, run_id: int, t: float | None = None) -> None:
        """Note that the run's worker was alive at ``t`` (now)."""
        with self.write() as db:
            db.execute("UPDATE runs SET heartbeat = ? WHERE id = ?", (time.time() if t is None else t, run_id))

    def archive_run(self, run_id: int, archived: bool = True) -> None:
        """Hide a run from lists (or show it again); nothing is lost."""
        self.update_run(run_id, archived=archived)

    def delete_run(self, run_id: int) -> None:
        """Remove a run and everything recorded of it; its folder is the caller's affair.

        Raises:
            NotFound: there is no such run.
        """
        with self.write() as db:
            db.execute("DELETE FROM points WHERE series_id IN (SELECT id FROM series WHERE run_id = ?)", (run_id,))
            for table in ("touches", "series", "heads"):
                db.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))
            db.execute("UPDATE trials SET run_id = NULL WHERE run_id = ?", (run_id,))  # a sweep remembers what it tried
            search.forget(db, run_id)
            if not db.execute("DELETE FROM runs WHERE id = ?", (run_id,)).rowcount:
                raise NotFound(f"There is no run {run_id!r}. List the runs to see their numbers and names.")

    # -- the queue ---------------------------------------------------------------------------------------
    def claim_next(self, owner: str) -> dict | None:
        """Take the next queued run (highest priority, then oldest) for ``owner``: it is now ``starting``; None: nothing waits."""
        with self.write() as db:
            found = db.execute(
                """UPDATE runs SET status = 'starting', owner = ?, host = ?, heartbeat = ? WHERE id =
                   (SELECT id FROM runs WHERE status = 'queued' ORDER BY priority DESC, id LIMIT 1) RETURNING id""",
                (owner, socket.gethostname(), time.time())).fetchone()
            return self.run(found[0]) if found else None

    def lease(self, name: str, owner: str, seconds: float) -> bool:
        """Take or renew the lock ``name`` for ``seconds``; False: another owner holds it. At most one owner holds it at a time."""
        now = time.time()
        with self.write() as db:
            return db.execute(
                """INSERT INTO leases (name, owner, until) VALUES (?, ?, ?)
                   ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until
                   WHERE leases.owner = excluded.owner OR leases.until < ?""",
                (name, owner, now + seconds, now)).rowcount > 0

    def release(self, name: str, owner: str) -> None:
        """Give the lock ``name`` back if ``owner`` holds it."""
        with self.write() as db:
            db.execute("DELETE FROM leases WHERE name = ? AND owner = ?", (name, owner))

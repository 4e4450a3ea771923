"""Series and points: append, take back after a resume, and what the cursor needs."""

from __future__ import annotations

import sqlite3

from storage.codec import number
from storage.errors import NotFound

KEEP_TOUCHES = 4096
"""Appends that are remembered one by one; a reader with an older cursor scans the series, which is slower but as exact."""
_INSERT = "INSERT OR REPLACE INTO points (series_id, step, value, t, n) VALUES (?, ?, ?, ?, ?)"


def _group(rows) -> dict[str, list]:
    groups: dict[str, list] = {}
    for name, step, value, t in rows:
        group = groups.get(name)
        if group is None:
            group = groups[name] = []
        group.append((step, value, t))
    return groups


class Points:
    """Part of ``Store``: the writing side of series."""

    def append(self, run_id: int, rows, *, clock: bool = False) -> int:
        """Write points in one transaction; a point of the same series and step replaces the older one.

        Args:
            rows: ``(series name, step, value, t)`` with t in seconds since the run started; a value may be nan or inf.
            clock: the series are sampled by time: ``step`` is t in milliseconds and ``rewind`` goes by t.

        Returns:
            the number of this append, the cursor of a reader that has seen it.

        Raises:
            NotFound: there is no such run.
        """
        groups = _group(rows)
        with self.write() as db:
            found = db.execute("SELECT head, pruned FROM heads WHERE run_id = ?", (run_id,)).fetchone()
            if found is None:
                raise NotFound(f"There is no run {run_id!r} to write points to. It was deleted while its worker was at work.")
            head, pruned = found
            if not groups:
                return head
            n = head + 1
            known = {name: (i, last) for i, name, last in
                     db.execute("SELECT id, name, last_step FROM series WHERE run_id = ?", (run_id,))}
            for name, group in groups.items():
                if name in known:
                    series_id, last = known[name]
                else:
                    last = None
                    series_id = db.execute("INSERT INTO series (run_id, name, clock) VALUES (?, ?, ?)", (run_id, name, int(clock))).lastrowid
                self._write_group(db, run_id, series_id, last, group, n)
            db.execute("UPDATE heads SET head = ? WHERE run_id = ?", (n, run_id))
            if n - pruned > 2 * KEEP_TOUCHES:
                db.execute("DELETE FROM touches WHERE run_id = ? AND n <= ?", (run_id, n - KEEP_TOUCHES))
                db.execute("UPDATE heads SET pruned = ? WHERE run_id = ?", (n - KEEP_TOUCHES, run_id))
        return n

    @staticmethod
    def _write_group(db, run_id: int, series_id: int, last: int | None, group: list, n: int) -> None:
        try:
            db.executemany(_INSERT, [(series_id, step, value, t, n) for step, value, t in group])
        except (sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.IntegrityError, OverflowError):
            # numpy and torch scalars, which sqlite3 cannot bind; replacing makes the repetition harmless
            group = [(int(step), number(value), float(t)) for step, value, t in group]
            db.executemany(_INSERT, [(series_id, step, value, t, n) for step, value, t in group])
        steps = [g[0] for g in group]
        low = steps[0]
        rising = last is None or low > last
        for step in steps[1:]:
            if step <= low:
                rising = False
                break
            low = step
        if rising:
            step, value, t = group[-1]
            db.execute("UPDATE series SET count = count + ?, last_step = ?, last_value = ?, last_t = ? WHERE id = ?",
                       (len(group), step, value, t, series_id))
        else:
            _recount(db, series_id)
        db.execute("INSERT OR REPLACE INTO touches (run_id, n, series_id, low) VALUES (?, ?, ?, ?)",
                   (run_id, n, series_id, steps[0] if rising else min(steps)))

    def set_unit(self, run_id: int, series: str, unit: str) -> None:
        """Name the unit of a series (bytes, nats/token, s); the series is made if it has no points yet."""
        with self.write() as db:
            db.execute("INSERT INTO series (run_id, name, unit) VALUES (?, ?, ?) ON CONFLICT (run_id, name) DO UPDATE SET unit = excluded.unit",
                       (run_id, series, unit))

    def rewind(self, run_id: int, step: int) -> int:
        """Forget what was recorded after ``step``, because the run resumes from there; returns the new epoch.

        Points, events, layer maps and evaluations of a later step go, and those of clock series later than the last kept
        point. Events without a step (the person's doings, the reaper's) stay. Readers see the epoch change and start anew.

        Raises:
            NotFound: there is no such run.
        """
        with self.write() as db:
            found = db.execute("UPDATE heads SET epoch = epoch + 1 WHERE run_id = ? RETURNING epoch", (run_id,)).fetchall()
            if not found:
                raise NotFound(f"There is no run {run_id!r} to resume. List the runs to see their numbers and names.")
            series = db.execute("SELECT id, clock FROM series WHERE run_id = ?", (run_id,)).fetchall()
            end = None
            for series_id, clock in series:
                if not clock:
                    db.execute("DELETE FROM points WHERE series_id = ? AND step > ?", (series_id, step))
                    t = db.execute("SELECT t FROM points WHERE series_id = ? ORDER BY step DESC LIMIT 1", (series_id,)).fetchone()
                    end = max(end or 0.0, t[0]) if t else end
            for series_id, clock in series:
                if clock:
                    db.execute("DELETE FROM points WHERE series_id = ? AND step > ?", (series_id, -1 if end is None else round(end * 1000)))
                _recount(db, series_id)
            for table in ("events", "layer_maps", "evaluations"):
                db.execute(f"DELETE FROM {table} WHERE run_id = ? AND step > ?", (run_id, step))
            return found[0][0]


def _recount(db, series_id: int) -> None:
    db.execute("""UPDATE series SET count = (SELECT count(*) FROM points WHERE series_id = ?1),
                  (last_step, last_value, last_t) = (SELECT step, value, t FROM points WHERE series_id = ?1 ORDER BY step DESC LIMIT 1)
                  WHERE id = ?1""", (series_id,))

"""Reading points: whole, from a step on, since a cursor, or reduced to minimum and maximum per bucket by SQLite itself."""

from __future__ import annotations

from storage.errors import NotFound

_FINITE = "CASE WHEN abs({0}) <= 1.7976931348623157e308 THEN {0} END"
_ROWS = f"SELECT step, {_FINITE.format('value')}, t FROM points"
_PART = "SELECT (SELECT step FROM points WHERE series_id = :series AND step >= low AND step < low + :width AND value IS {0}) FROM bucket"
# A look-up of the lowest and the highest value in each range of steps: one pass over the range, nothing is sorted as a whole.
# The ends of the curve are kept; a value that is not a number is a spike too, so the first of each bucket is kept.
_BUCKETS = """
WITH RECURSIVE bucket (low) AS (SELECT :low UNION ALL SELECT low + :width FROM bucket WHERE low + :width <= :high),
kept (step) AS MATERIALIZED (
    {lowest} UNION {highest} {missing} UNION SELECT :low UNION SELECT :high)
SELECT p.step, {finite}, p.t FROM kept JOIN points p ON p.series_id = :series AND p.step = kept.step ORDER BY p.step"""
_REDUCED, _REDUCED_GAPS = (
    _BUCKETS.format(lowest=_PART.format("NOT NULL ORDER BY value LIMIT 1"), highest=_PART.format("NOT NULL ORDER BY value DESC LIMIT 1"),
                    missing=missing, finite=_FINITE.format("p.value"))
    for missing in ("", "UNION " + _PART.format("NULL LIMIT 1")))


def columns(rows) -> dict[str, list]:
    """``{"step": [...], "value": [...], "t": [...]}`` of rows in this order."""
    step, value, t = [], [], []
    for a, b, c in rows:  # not zip(*rows): as many tuples alive at once set the garbage collector to work
        step.append(a)
        value.append(b)
        t.append(c)
    return {"step": step, "value": value, "t": t}


def read(db, series_id: int, count: int, low: int | None = None, after: int = 0, buckets: int | None = None) -> dict[str, list]:
    """Points of one series in order of step.

    Args:
        count: how many points the series has.
        low: only steps from here on.
        after: only what was appended after this number; not together with ``buckets``.
        buckets: reduce to so many ranges of steps if there are more than two points for each.
    """
    if buckets is not None and count > 2 * buckets:
        first, last, many, valid = db.execute("SELECT min(step), max(step), count(*), count(value) FROM points WHERE series_id = ?1 "
                                              "AND step >= coalesce(?2, -9223372036854775808)", (series_id, low)).fetchone()
        if many > 2 * buckets:
            width = -((first - last - 1) // max(buckets, 1))
            return columns(db.execute(_REDUCED if many == valid else _REDUCED_GAPS,
                                      {"series": series_id, "low": first, "high": last, "width": width}))
    sql, arguments = _ROWS + " WHERE series_id = ?", [series_id]
    if low is not None:
        sql, arguments = sql + " AND step >= ?", [*arguments, low]
    if after:
        sql, arguments = sql + " AND n > ?", [*arguments, after]
    return columns(db.execute(sql + " ORDER BY step", arguments))


class Queries:
    """Part of ``Store``: the reading side of series. Values that were not finite are read as None."""

    def series(self, run_id: int) -> list[dict]:
        """The series of a run by name: id, name, unit, clock, count, last_step, last_value, last_t."""
        with self.read() as db:
            found = db.execute(f"SELECT id, name, unit, clock, count, last_step, {_FINITE.format('last_value')}, last_t FROM series "
                               "WHERE run_id = ? ORDER BY name", (run_id,)).fetchall()
        names = ("id", "name", "unit", "clock", "count", "last_step", "last_value", "last_t")
        return [dict(zip(names, row)) | {"clock": bool(row[3])} for row in found]

    def points(self, run_id: int, series: str, *, since: int | None = None, buckets: int | None = None) -> dict[str, list]:
        """The points of one series in order of step: ``{"step", "value", "t"}``; empty lists where there are none.

        Args:
            since: only steps greater than this.
            buckets: at most this many ranges of steps, each with its minimum and maximum, so that spikes survive.
        """
        with self.read() as db:
            found = db.execute("SELECT id, count FROM series WHERE run_id = ? AND name = ?", (run_id, series)).fetchone()
            if found is None:
                return columns([])
            return read(db, *found, low=None if since is None else since + 1, buckets=buckets)

    def all_points(self, run_id: int, *, names=None, buckets: int | None = None) -> dict[str, dict]:
        """``{series name: {"step", "value", "t"}}`` of a run, all series or those in ``names``, from one state of the database."""
        with self.read() as db:
            rows = db.execute("SELECT name, id, count FROM series WHERE run_id = ? ORDER BY name", (run_id,)).fetchall()
            return {name: read(db, i, count, buckets=buckets) for name, i, count in rows if names is None or name in names}

    def since(self, run_id: int, cursor: int = 0, *, epoch: int | None = None, buckets: int | None = None) -> dict:
        """What was appended to any series after ``cursor``.

        Args:
            cursor: 0, or ``cursor`` of the last answer.
            epoch: ``epoch`` of the last answer; if the run was rewound meanwhile, everything is sent again.
            buckets: reduce what is sent from the beginning (cursor 0) to minimum and maximum in so many ranges.

        Returns:
            ``{"cursor": int, "epoch": int, "series": {name: {"step", "value", "t"}}}``; ``epoch`` other than the reader's
            means: forget what you have, this is all of it.

        Raises:
            NotFound: there is no such run.
        """
        with self.read() as db:
            found = db.execute("SELECT head, epoch, pruned FROM heads WHERE run_id = ?", (run_id,)).fetchone()
            if found is None:
                raise NotFound(f"There is no run {run_id!r}. List the runs to see their numbers and names.")
            head, now, pruned = found
            if (epoch is not None and epoch != now) or cursor > head:
                cursor = 0
            out: dict = {"cursor": head, "epoch": now, "series": {}}
            if cursor >= head:
                return out
            lows = None
            if cursor and cursor >= pruned:
                lows = dict(db.execute("SELECT series_id, min(low) FROM touches WHERE run_id = ? AND n > ? GROUP BY series_id",
                                       (run_id, cursor)).fetchall())
            for name, series_id, count in db.execute("SELECT name, id, count FROM series WHERE run_id = ? ORDER BY name",
                                                     (run_id,)).fetchall():
                if lows is not None and series_id not in lows:
                    continue
                part = read(db, series_id, count, None if lows is None else lows[series_id], cursor, None if cursor else buckets)
                if part["step"]:
                    out["series"][name] = part
        return out

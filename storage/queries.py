"""Reading points: whole, from a step on, since a cursor, or reduced to minimum and maximum per bucket by SQLite itself."""

from __future__ import annotations

from storage.errors import NotFound

_FINITE = "CASE WHEN abs({0}) <= 1.7976931348623157e308 THEN {0} END"
_ROWS = f"SELECT step, {_FINITE.format('value')}, t FROM points"
# In a query with one min() or max(), SQLite takes the other columns from the row that holds it. Points that are not finite
# count as spikes too: the first of each bucket is kept. So are the first and the last point of the range.
_BUCKETS = """
WITH p AS (SELECT step, value, t, (step - :low) * :buckets / :span AS bucket FROM points
           WHERE series_id = :series AND step >= :low AND n > :after)
SELECT step, {finite}, t FROM (
    SELECT step, min(value) AS value, t FROM p WHERE value IS NOT NULL GROUP BY bucket
    UNION SELECT step, max(value), t FROM p WHERE value IS NOT NULL GROUP BY bucket
    UNION SELECT min(step), value, t FROM p WHERE value IS NULL GROUP BY bucket
    UNION SELECT * FROM (SELECT step, value, t FROM p ORDER BY step LIMIT 1)
    UNION SELECT * FROM (SELECT step, value, t FROM p ORDER BY step DESC LIMIT 1)
) ORDER BY step""".format(finite=_FINITE.format("value"))


def columns(rows: list) -> dict[str, list]:
    """``{"step": [...], "value": [...], "t": [...]}`` of rows in this order."""
    if not rows:
        return {"step": [], "value": [], "t": []}
    step, value, t = zip(*rows)
    return {"step": list(step), "value": list(value), "t": list(t)}


def read(db, series_id: int, count: int, low: int | None, after: int = 0, buckets: int | None = None) -> dict[str, list]:
    """Points of one series with step >= low and append number > after; reduced if there are more than two per bucket."""
    if buckets is not None and count > 2 * buckets:
        ends = db.execute("SELECT min(step), max(step), count(*) FROM points WHERE series_id = ? AND step >= coalesce(?, step) AND n > ?",
                          (series_id, low, after)).fetchone()
        if ends[2] > 2 * buckets:
            found = db.execute(_BUCKETS, {"series": series_id, "low": ends[0], "span": ends[1] - ends[0] + 1, "buckets": max(buckets, 1),
                                          "after": after})
            return columns(found.fetchall())
    sql, arguments = _ROWS + " WHERE series_id = ?", [series_id]
    if low is not None:
        sql, arguments = sql + " AND step >= ?", [*arguments, low]
    if after:
        sql, arguments = sql + " AND n > ?", [*arguments, after]
    return columns(db.execute(sql + " ORDER BY step", arguments).fetchall())


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
            return read(db, *found, None if since is None else since + 1, buckets=buckets)

    def all_points(self, run_id: int, *, names=None, buckets: int | None = None) -> dict[str, dict]:
        """``{series name: {"step", "value", "t"}}`` of a run, all series or those in ``names``, from one state of the database."""
        with self.read() as db:
            rows = db.execute("SELECT name, id, count FROM series WHERE run_id = ? ORDER BY name", (run_id,)).fetchall()
            return {name: read(db, i, count, None, buckets=buckets) for name, i, count in rows if names is None or name in names}

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

"""What is recorded of a run besides its points: stages, events, layer maps, evaluations, forecast, footprint, artifacts."""

from __future__ import annotations

import time

from storage.codec import decode, encode, floats, number
from storage.errors import NotFound

STAGE_FIELDS = ("status", "started", "ended", "seconds", "reasons", "summary")
EVALUATION = ("id", "run_id", "name", "stage", "step", "t", "metric", "value", "low", "high", "n", "items_hash", "extra")


class Records:
    """Part of ``Store``."""

    def put_stage(self, run_id: int, index: int, method: str, settings: dict, **fields) -> None:
        """Record a stage or change it: status, started, ended, seconds, reasons (dict), summary (dict); the others stay."""
        for name in fields:
            if name not in STAGE_FIELDS:
                raise ValueError(f"a stage has no field {name!r}")
        names = list(fields)
        values = [encode(fields[c]) if c in ("reasons", "summary") else fields[c] for c in names]
        with self.write() as db:
            db.execute(f"INSERT INTO stages (run_id, position, method, settings{''.join(', ' + c for c in names)}) "
                       f"VALUES (?, ?, ?, ?{', ?' * len(names)}) ON CONFLICT (run_id, position) DO UPDATE SET method = excluded.method, "
                       f"settings = excluded.settings{''.join(f', {c} = excluded.{c}' for c in names)}",
                       [run_id, index, method, encode(settings), *values])

    def stages(self, run_id: int) -> list[dict]:
        """Stages in order: index, method, settings, status, started, ended, seconds, reasons, summary."""
        with self.read() as db:
            found = db.execute("SELECT position, method, settings, status, started, ended, seconds, reasons, summary FROM stages "
                               "WHERE run_id = ? ORDER BY position", (run_id,)).fetchall()
        return [{"index": i, "method": m, "settings": decode(s, {}), "status": status, "started": a, "ended": b, "seconds": sec,
                 "reasons": decode(r, {}), "summary": decode(x, {})} for i, m, s, status, a, b, sec, r, x in found]

    def event(self, run_id: int, kind: str, text: str, t: float | None = None, **data) -> int:
        """Record a dated fact and return its id; ``step`` in ``data`` says where in the run it belongs (see ``rewind``)."""
        step = data.get("step")
        with self.write() as db:
            return db.execute("INSERT INTO events (run_id, kind, text, t, step, data) VALUES (?, ?, ?, ?, ?, ?)",
                              (run_id, kind, text, time.time() if t is None else t, None if step is None else int(step),
                               encode(data))).lastrowid

    def events(self, run_id: int, since: int = 0, limit: int = 500, kind: str | None = None) -> list[dict]:
        """Events with an id above ``since``, oldest first: id, kind, text, t, data."""
        with self.read() as db:
            found = db.execute("SELECT id, kind, text, t, data FROM events WHERE run_id = ? AND id > ? AND kind = coalesce(?, kind) "
                               "ORDER BY id LIMIT ?", (run_id, since, kind, limit)).fetchall()
        return [{"id": i, "kind": k, "text": text, "t": t, "data": decode(data, {})} for i, k, text, t, data in found]

    def put_layers(self, run_id: int, step: int, figures: dict, t: float | None = None) -> int:
        """Record a layer map ``{"rank": [[layer, role, value], ...], ...}``; older ones are kept. Returns its id."""
        with self.write() as db:
            return db.execute("INSERT INTO layer_maps (run_id, step, t, figures) VALUES (?, ?, ?, ?)",
                              (run_id, int(step), time.time() if t is None else t, encode(figures))).lastrowid

    def layers(self, run_id: int, since: int = 0) -> dict | None:
        """The latest layer map: id, step, t, figures; None: there is none with an id above ``since``."""
        with self.read() as db:
            found = db.execute("SELECT id, step, t, figures FROM layer_maps WHERE run_id = ? AND id > ? ORDER BY id DESC LIMIT 1",
                               (run_id, since)).fetchone()
        return None if found is None else {"id": found[0], "step": found[1], "t": found[2], "figures": decode(found[3], {})}

    def layer_figures(self, run_id: int) -> dict | None:
        """The latest of each figure, newest first, whichever map brought it: a stage reports only its own. Shape as of ``layers``."""
        with self.read() as db:
            found = db.execute("SELECT j.key, j.value, m.step, m.t, max(m.id) FROM layer_maps m, json_each(m.figures) j "
                               "WHERE m.run_id = ? GROUP BY j.key", (run_id,)).fetchall()  # bare columns are those of the row with max
        if not found:
            return None
        found.sort(key=lambda row: (-row[4], row[0]))
        _, _, step, t, last = found[0]
        return {"id": last, "step": step, "t": t, "figures": {key: decode(value, []) for key, value, *_ in found}}

    def layer_history(self, run_id: int) -> list[dict]:
        """All layer maps of a run in order of step."""
        with self.read() as db:
            found = db.execute("SELECT id, step, t, figures FROM layer_maps WHERE run_id = ? ORDER BY step, id", (run_id,)).fetchall()
        return [{"id": i, "step": s, "t": t, "figures": decode(f, {})} for i, s, t, f in found]

    # -- evaluations -------------------------------------------------------------------------------------
    def put_evaluation(self, run_id: int, name: str, stage: int, step: int, t: float, metric: str, value, low, high, n: int, scores,
                       weights=None, item_ids_hash: str = "", extra: dict | None = None) -> int:
        """Record an evaluation with its per-item scores and return its id; the same name, stage and step is replaced.

        Args:
            scores, weights: float32 bytes or arrays of length n.
            item_ids_hash: equal for two evaluations over the same items in the same order, which makes them comparable in pairs.
        """
        values = (run_id, name, stage, step, t, metric, number(value), number(low), number(high), int(n), floats(scores), floats(weights),
                  item_ids_hash, encode(extra or {}))
        with self.write() as db:
            return db.execute(
                """INSERT INTO evaluations (run_id, name, stage, step, t, metric, value, low, high, n, scores, weights, items_hash, extra)
                   VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run_id, name, stage, step) DO UPDATE SET
                   t = excluded.t, metric = excluded.metric, value = excluded.value, low = excluded.low, high = excluded.high, n = excluded.n,
                   scores = excluded.scores, weights = excluded.weights, items_hash = excluded.items_hash, extra = excluded.extra
                   RETURNING id""", values).fetchall()[0][0]

    def evaluations(self, run_id: int | None = None, *, ids=None) -> list[dict]:
        """Evaluations of a run (or those with the given ids) in order of step and stage, without their scores."""
        where, arguments = ("run_id = ?", [run_id]) if ids is None else (f"id IN ({', '.join('?' * len(ids))})", list(ids))
        with self.read() as db:
            found = db.execute(f"SELECT {', '.join(EVALUATION)} FROM evaluations WHERE {where} ORDER BY run_id, step, stage, id",
                               arguments).fetchall()
        return [dict(zip(EVALUATION, row)) | {"extra": decode(row[-1], {})} for row in found]

    def scores(self, evaluation_id: int):
        """``(scores, weights)`` as float32 arrays of length n; weights is None where the metric has none.

        Raises:
            NotFound: there is no such evaluation.
        """
        import numpy as np
        with self.read() as db:
            found = db.execute("SELECT scores, weights FROM evaluations WHERE id = ?", (evaluation_id,)).fetchone()
        if found is None:
            raise NotFound(f"There is no evaluation {evaluation_id!r}. It went with its run or was taken back by a resume.")
        return np.frombuffer(found[0], "<f4"), None if found[1] is None else np.frombuffer(found[1], "<f4")

    # -- forecast, footprint, artifacts ------------------------------------------------------------------
    def _put(self, table: str, run_id: int, data: dict) -> None:
        with self.write() as db:
            db.execute(f"INSERT OR REPLACE INTO {table} (run_id, data) VALUES (?, ?)", (run_id, encode(data)))

    def _get(self, table: str, run_id: int) -> dict | None:
        with self.read() as db:
            found = db.execute(f"SELECT data FROM {table} WHERE run_id = ?", (run_id,)).fetchone()
        return decode(found[0]) if found else None

    def put_forecast(self, run_id: int, data: dict) -> None:
        """Record what the planner says of a run before it starts."""
        self._put("forecasts", run_id, data)

    def forecast(self, run_id: int) -> dict | None:
        return self._get("forecasts", run_id)

    def put_footprint(self, run_id: int, data: dict) -> None:
        """Record the measured figures of a run."""
        self._put("footprints", run_id, data)

    def footprint(self, run_id: int) -> dict | None:
        return self._get("footprints", run_id)

    def put_artifact(self, run_id: int, kind: str, path, bytes: int | None = None, sha256: str | None = None, meta: dict | None = None) -> int:
        """Record a file or folder that a run has made; the same kind and path is replaced."""
        with self.write() as db:
            return db.execute(
                """INSERT INTO artifacts (run_id, kind, path, bytes, sha256, meta, created) VALUES (?, ?, ?, ?, ?, ?, ?)
                   ON CONFLICT (run_id, kind, path) DO UPDATE SET bytes = excluded.bytes, sha256 = excluded.sha256, meta = excluded.meta,
                   created = excluded.created RETURNING id""",
                (run_id, kind, str(path), bytes, sha256, encode(meta or {}), time.time())).fetchall()[0][0]

    def artifacts(self, run_id: int) -> list[dict]:
        """What a run has made: id, kind, path, bytes, sha256, meta, created."""
        with self.read() as db:
            found = db.execute("SELECT id, kind, path, bytes, sha256, meta, created FROM artifacts WHERE run_id = ? ORDER BY id",
                               (run_id,)).fetchall()
        return [{"id": i, "kind": k, "path": p, "bytes": b, "sha256": s, "meta": decode(m, {}), "created": c} for i, k, p, b, s, m, c in found]

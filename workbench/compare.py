"""Runs beside one another: the table, overlaid curves, settings that differ, the Pareto front. Torch is not needed.

Every function returns plain dicts and lists and takes ``home=None``, the home in use; runs are given by id or name.
"""

from __future__ import annotations

import math

from engines.errors import InputError
from engines.registry import suggestion
from workbench import query as language
from workbench import stats
from workbench.paired import doubt, paired, tiers
from workbench.rows import APART, brief, chosen, main_evaluation, same_settings, store_of
from workbench.spec import RunSpec

AXES_X = {"step": "optimizer steps", "tokens": "training tokens or examples", "seconds": "s", "joules": "J"}
__all__ = ["compare", "diff", "groups", "paired", "pareto", "settings", "table", "tiers"]

CURVES = ("loss", "loss_eval", "metric")
# id -> (label, unit, smaller is better, how to get it)
AXES = {
    "quality": ("Quality", "", None, lambda r, f: r["value"]),
    "size": ("Size", "MB", True, lambda r, f: _scaled(r["size_bytes"], 1e6)),
    "seconds": ("Time", "s", True, lambda r, f: r["seconds"]),
    "peak": ("Peak memory", "GB", True, lambda r, f: _scaled(r["peak_bytes"], 1e9)),
    "trainable": ("Trainable parameters", "", True, lambda r, f: r["trainable"]),
    "parameters": ("Parameters", "", True, lambda r, f: r["parameters"]),
    "speed": ("Training throughput", "/s", False, lambda r, f: r["tokens_per_second"]),
    "evaluation_speed": ("Evaluation throughput", "/s", False, lambda r, f: f.get("tokens_per_second", f.get("samples_per_second"))),
    "decode": ("Speed of the result", "/s", False, lambda r, f: f.get("decode")),
    "joules": ("Energy", "J", True, lambda r, f: f.get("joules")),
    "drift": ("Loss on the evaluation items", "nats", True, lambda r, f: f.get("loss")),
}
LIMIT_OF = {"size": ("size_mb", 1.0), "seconds": ("minutes", 60.0), "peak": ("memory_gb", 1.0), "joules": ("joules", 1.0)}


def _scaled(value, by: float):
    return None if value is None else value / by


# -- the table -----------------------------------------------------------------------------------------------
def table(query: str = "", sort: str = "-created", page: int = 0, size: int = 50, *, grouped: bool = False, home=None) -> dict:
    """A page of the run table.

    Args:
        query: see ``workbench.query``.
        sort: a column or quality, size, peak, time, speed, age; ``-`` before it for descending.
        page: counted from 0.
        grouped: one row for runs that differ by seed only, with ``group`` (``groups``' entry).

    Returns:
        ``{"rows", "total", "page", "pages", "size"}``; rows are run rows with ``model``, ``data``, ``methods``, ``pipeline``, ``seed``.

    Raises:
        InputError: the query or the column is not understood.
    """
    store, found, by = store_of(home), language.parse(query), language.order(sort)
    filters, size = found.filters(), max(1, int(size))
    try:
        if grouped:
            rows = [members[0] | {"group": _group(members)} for members in _alike(store.runs(**filters, order=by, limit=None))]
            total, page = len(rows), max(0, int(page))
            rows = rows[page * size: (page + 1) * size]
        else:
            total, page = store.count_runs(**filters), max(0, int(page))
            rows = store.runs(**filters, order=by, limit=size, offset=page * size)
    except ValueError as e:
        raise InputError("query", query, str(e), "Compare with a number, such as minutes:<4") from None
    return {"rows": [row | brief(row) for row in rows], "total": total, "page": page, "pages": -(-total // size), "size": size}


def _alike(rows: list[dict]) -> list[list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(same_settings(row["spec"]), []).append(row)
    return list(found.values())


def _group(members: list[dict]) -> dict:
    return {"ids": [r["id"] for r in members], "names": [r["name"] for r in members], "slot": members[0]["slot"],
            "seeds": [r["spec"].get("seed", 0) for r in members], "metric": members[0]["metric"],
            **stats.summary([r["value"] for r in members if r["metric"] == members[0]["metric"]])}


def groups(ids, *, home=None) -> list[dict]:
    """Runs with the same settings but for seed, name, tags and note: ids, names, slot (of the first), seeds, metric, and n, mean, sd,
    min, max, low, high of the main metric (interval of the mean by Student's t; None for one seed)."""
    return _groups(chosen(ids, store_of(home)))


def _groups(rows: list[dict]) -> list[dict]:
    return [_group(members) for members in _alike(rows)]


# -- overlay -------------------------------------------------------------------------------------------------
def compare(ids, x: str = "step", smoothing: float = 0.0, buckets: int = 600, *, names=CURVES, home=None) -> dict:
    """Curves of several runs on one x axis.

    Args:
        x: step, tokens (examples in classification), seconds or joules; other axes than the step are read off at the step's time.
        smoothing: weight of the exponential moving average, 0 to 0.999, applied before the curve is thinned.
        buckets: thin each curve to minimum and maximum in so many ranges; None: all points.
        names: series to overlay.

    Returns:
        ``runs`` (``brief`` with ``group``: index of the seed group), ``available`` (series that any of the runs has),
        ``series`` {name: [{id, x, value, smooth}]} (``smooth`` only if asked for), ``bands`` {name: [{ids, x, mean, low, high}]} for
        seed groups of two and more (low and high: the range of the seeds), ``missing`` [{id, reason}], ``x``, ``unit``.

    Raises:
        InputError: unknown axis, or smoothing out of range.
    """
    if x not in AXES_X:
        raise InputError("x", x, "there is no such axis", suggestion(x, AXES_X))
    if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 <= smoothing < 1:
        raise InputError("smoothing", smoothing, "not a number from 0 to 0.999", "Choose 0 for the points as they are")
    store = store_of(home)
    rows = chosen(ids, store)
    seeds = _groups(rows)
    names = (names,) if isinstance(names, str) else tuple(names)
    member = {i: k for k, g in enumerate(seeds) for i in g["ids"]}
    out = {"x": x, "unit": AXES_X[x], "smoothing": smoothing, "runs": [brief(r) | {"group": member[r["id"]]} for r in rows], "groups": seeds,
           "available": [], "series": {name: [] for name in names}, "bands": {name: [] for name in names}, "missing": []}
    available = set()
    for row in rows:
        present = {s["name"]: s for s in store.series(row["id"])}
        available |= set(present)
        place = ruler(store, row["id"], x, present)
        if place is None:
            out["missing"].append({"id": row["id"], "reason": "no energy counter here" if x == "joules" else f"{x} were not recorded"})
            continue
        for name in names:
            if name in present and present[name]["count"]:
                out["series"][name].append(_curve(store, row["id"], present[name], place, x, smoothing, buckets))
    out["available"] = sorted(available)
    for name in names:
        out["bands"][name] = _bands(out["series"][name], seeds, buckets)
    return out


def ruler(store, run_id: int, x: str, present: dict):
    """Where a point lies on the axis: a function of lists of steps and seconds; None: it cannot be told."""
    import numpy as np
    if x == "step":
        return lambda step, t, clock: None if clock else step
    if x == "seconds":
        return lambda step, t, clock: t
    name = "tokens" if x == "tokens" else "energy/joules"
    if not present.get(name, {}).get("count"):
        trained = any(s["last_step"] for s in present.values() if not s["clock"])
        return None if x == "joules" or trained else lambda step, t, clock: [0.0] * len(step)
    marks = store.points(run_id, name, buckets=2000)
    pairs = [(t, v) for t, v in zip(marks["t"], marks["value"]) if v is not None]
    if x == "tokens":
        steps = [s for s, v in zip(marks["step"], marks["value"]) if v is not None]
        values = [v for _, v in pairs]
        if steps[0] > 0:
            steps, values = [0, *steps], [0.0, *values]
        return lambda step, t, clock: np.interp(t if clock else step, [p[0] for p in pairs] if clock else steps,
                                                [p[1] for p in pairs] if clock else values).tolist()
    return lambda step, t, clock: np.interp(t, [p[0] for p in pairs], [p[1] for p in pairs]).tolist()


def _curve(store, run_id: int, series: dict, place, x: str, smoothing: float, buckets: int | None) -> dict:
    points = store.points(run_id, series["name"], buckets=buckets)
    at = place(points["step"], points["t"], series["clock"])
    if at is None:  # sampled by time: on the step axis its time is what there is
        at = points["t"]
    curve = {"id": run_id, "x": at, "value": points["value"]}
    if smoothing:
        whole = points if buckets is None or len(points["step"]) < 2 * buckets else store.points(run_id, series["name"])
        soft = dict(zip(whole["step"], stats.smooth(whole["value"], smoothing)))
        curve["smooth"] = [soft[s] for s in points["step"]]
    return curve


def _bands(curves: list[dict], seeds: list[dict], buckets: int | None) -> list[dict]:
    """Mean and range of each seed group on a grid over the part of the axis that all its members cover."""
    import numpy as np
    out, by_id = [], {c["id"]: c for c in curves}
    for group in seeds:
        lines = []
        for i in group["ids"]:
            curve = by_id.get(i)
            pairs = [(a, b) for a, b in zip(curve["x"], curve.get("smooth", curve["value"])) if b is not None] if curve else []
            if pairs:
                lines.append(np.asarray(pairs, np.float64).T)
        if len(lines) < 2:
            continue
        low, high = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
        if high < low:
            continue
        grid = np.unique(np.concatenate([line[0] for line in lines]))
        grid = grid[(grid >= low) & (grid <= high)]
        most = buckets or 2000
        if len(grid) > most:
            grid = grid[np.unique(np.linspace(0, len(grid) - 1, most).round().astype(int))]
        values = np.stack([np.interp(grid, *line) for line in lines])
        out.append({"ids": group["ids"], "slot": group["slot"], "n": len(lines), "x": grid.tolist(), "mean": values.mean(0).tolist(),
                    "low": values.min(0).tolist(), "high": values.max(0).tolist()})
    return out


# -- settings that differ ------------------------------------------------------------------------------------
def settings(row: dict, stages=()) -> dict[str, tuple]:
    """``{dotted field: (value, chosen automatically)}`` of a run, defaults written out and ``auto`` replaced by what was chosen."""
    spec = row["spec"]
    try:
        full = RunSpec.from_dict(spec)
        tree = full.to_dict() | {"training": full.training.plain(), "task": full.task}
    except InputError:  # made by another version: what it says is still worth showing
        tree = dict(spec)
    if isinstance(tree.get("data"), str):
        tree["data"] = {"source": tree["data"]}
    out = {path: (value, False) for path, value in _flat({k: v for k, v in tree.items() if k not in APART})}
    for stage in stages:
        for name, value in stage["settings"].items():
            path = f"pipeline.{stage['index']}.{name}"
            if out.get(path, ("auto", False))[0] == "auto" and value != "auto":
                out[path] = (value, path in out)
    return out


def _flat(value, path: str = ""):
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flat(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        for i, child in enumerate(value):
            yield from _flat(child, f"{path}.{i}")
    else:
        yield path, value


def diff(ids, *, everything: bool = False, home=None) -> dict:
    """Settings in which runs differ (or all of them).

    Returns:
        ``ids``, ``names``, ``rows`` [{field, label, values (by run, None: not used), auto (chosen by the planner), differs}],
        ``differ`` and ``total`` (numbers of fields).
    """
    store = store_of(home)
    runs = chosen(ids, store)
    columns = [settings(r, store.stages(r["id"])) for r in runs]
    rows, total, differ = [], 0, 0
    for path in dict.fromkeys(p for c in columns for p in c):
        values = [c.get(path, (None, False)) for c in columns]
        differs = any(v[0] != values[0][0] for v in values)
        total, differ = total + 1, differ + differs
        if differs or everything:
            rows.append({"field": path, "label": _label(path), "values": [v[0] for v in values], "auto": [v[1] for v in values],
                         "differs": differs})
    rows.sort(key=lambda r: _rank(r["field"]))
    return {"ids": [r["id"] for r in runs], "names": [r["name"] for r in runs], "rows": rows, "differ": differ, "total": total}


def _rank(path: str) -> tuple:
    first = path.split(".")[0]
    known = ("model", "data", "task", "pipeline", "budget", "training", "seed")
    stage = path.split(".")[1] if first == "pipeline" and "." in path else ""
    return (known.index(first) if first in known else len(known), int(stage) if stage.isdigit() else 0)


def _label(path: str) -> str:
    parts = path.split(".")
    if parts[0] == "pipeline" and len(parts) > 2:
        return f"stage {int(parts[1]) + 1} {' '.join(parts[2:])}".replace("_", " ")
    return {"data.source": "data"}.get(path, " ".join(parts)).replace("_", " ")


# -- Pareto --------------------------------------------------------------------------------------------------
def pareto(ids, x: str = "size", y: str = "quality", *, home=None) -> dict:
    """Runs on two axes with the front of those that no other beats.

    Returns:
        ``x`` and ``y`` {id, label, unit, lower (smaller is better)}, ``points`` [{``brief``, x, y, x_low, x_high, y_low, y_high (interval
        where there is one), front, near (beaten, but a paired test cannot tell its quality from that of any run that beats it), beaten_by}], ``front`` (ids in order of x),
        ``limits`` [{axis, value, ids}] (the runs' budgets), ``left_out`` [{id, reason}], ``metric``.

    Raises:
        InputError: unknown axis, or one axis given twice.
    """
    for name in (x, y):
        if name not in AXES:
            raise InputError("axis", name, "there is no such axis", suggestion(name, AXES))
    if x == y:
        raise InputError("axis", y, "both axes are the same", "Choose two different ones")
    store = store_of(home)
    rows = chosen(ids, store)
    metrics = [r["metric"] for r in rows if r["metric"] and r["value"] is not None]
    metric = max(dict.fromkeys(metrics), key=metrics.count) if metrics else None
    lower = {name: stats.lower_is_better(metric) if AXES[name][2] is None else AXES[name][2] for name in (x, y)}
    points, left_out = [], []
    for row in rows:
        facts = _facts(store, row)
        point = brief(row) | {"x": AXES[x][3](row, facts), "y": AXES[y][3](row, facts)}
        for axis, name in (("x", x), ("y", y)):
            whole = name == "quality"
            point[f"{axis}_low"], point[f"{axis}_high"] = (row["value_low"], row["value_high"]) if whole else (None, None)
        absent = next((n for a, n in (("x", x), ("y", y)) if point[a] is None or not math.isfinite(point[a])), None)
        if absent:
            left_out.append({"id": row["id"], "reason": f"no figure for {AXES[absent][0].lower()}"})
        elif "quality" in (x, y) and row["metric"] != metric:
            left_out.append({"id": row["id"], "reason": f"measured in {row['metric']}, the others in {metric}"})
        else:
            points.append(point)
    flags = stats.front([p["x"] for p in points], [p["y"] for p in points], lower_x=lower[x], lower_y=lower[y])
    p = doubt([q["id"] for q in points], home=home) if "quality" in (x, y) and not all(flags) else {}
    for point, flag in zip(points, flags):
        beaten = [] if flag else [q for q in points if _beats(q, point, lower[x], lower[y])]
        near = bool(beaten) and "quality" in (x, y) and all(p[q["id"], point["id"]] >= 0.05 if (q["id"], point["id"]) in p else _overlap(q, point)
                                                            for q in beaten)
        point |= {"front": flag, "beaten_by": [q["id"] for q in beaten], "near": near}
    limits: dict[tuple, list] = {}
    for row in rows:
        for axis, name in (("x", x), ("y", y)):
            field, factor = LIMIT_OF.get(name, (None, 1.0))
            limit = (row["spec"].get("budget") or {}).get(field)
            if limit is not None:
                limits.setdefault((axis, limit * factor), []).append(row["id"])
    ends = {name: {"id": name, "label": AXES[name][0], "unit": AXES[name][1] or (metric or "" if name == "quality" else ""),
                   "lower": lower[name]} for name in (x, y)}
    return {"x": ends[x], "y": ends[y], "metric": metric, "points": points, "left_out": left_out,
            "front": [p["id"] for p in sorted((p for p in points if p["front"]), key=lambda p: (p["x"], p["y"]))],
            "limits": [{"axis": axis, "value": value, "ids": members} for (axis, value), members in limits.items()]}


def _facts(store, row: dict) -> dict:
    facts = dict((main_evaluation(store, row["id"]) or {}).get("extra") or {})
    footprint = store.footprint(row["id"]) or {}
    meter = [s["last_value"] for s in store.series(row["id"]) if s["name"] == "energy/joules"]
    facts["joules"] = footprint.get("joules") or (meter[0] if meter else None)
    speed = footprint.get("speed") or {}
    facts["decode"] = speed.get("decode_tokens_per_second", speed.get("samples_per_second"))
    return facts


def _beats(a: dict, b: dict, lower_x: bool, lower_y: bool) -> bool:
    dx, dy = (a["x"] - b["x"]) * (1 if lower_x else -1), (a["y"] - b["y"]) * (1 if lower_y else -1)
    return dx <= 0 and dy <= 0 and (dx < 0 or dy < 0)


def _overlap(a: dict, b: dict) -> bool:
    return any(a[f"{k}_low"] is not None and b[f"{k}_low"] is not None and a[f"{k}_low"] <= b[f"{k}_high"] and b[f"{k}_low"] <= a[f"{k}_high"]
               for k in ("x", "y"))

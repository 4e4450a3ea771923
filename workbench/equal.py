"""Runs read at the same expenditure: seconds, steps, tokens or joules spent, or at most so many trainable parameters or bytes.

What was spent is read off each run's own evaluations: the last one at or before the expenditure, never one that was not made. A
learning-rate schedule that had not ended by then makes a figure look worse than a run planned for that expenditure would be
("No Train No Gain: Revisiting Efficient Training Algorithms For Transformer-based Language Models"), so such a reading is marked.
Torch is not needed.
"""

from __future__ import annotations

import math

from engines.errors import InputError
from engines.registry import methods, suggestion
from workbench import stats
from workbench.compare import ruler
from workbench.paired import LETTERS
from workbench.rows import brief, chosen, main_evaluation, store_of

SPENT = {"seconds": ("s", "of each run's own clock"), "step": ("steps", "optimizer steps"),
         "tokens": ("tokens", "training tokens or examples"), "joules": ("J", "metered")}
FINAL = {"trainable": ("parameters", "trained"), "size": ("MB", "on disk")}
AXES = {**SPENT, **FINAL}
ALIASES = {"steps": ("step", 1.0), "minutes": ("seconds", 60.0), "size_mb": ("size", 1.0), "time": ("seconds", 1.0),
           "energy": ("joules", 1.0)}
QUANTITIES = {"quality": "quality", "loss_eval": "evaluation loss", "loss": "training loss"}
NEAR = 0.05
"""A finished run that spent at most this share less than the expenditure counts as read at it: minutes are held to as much."""
EMPTY = ("value", "low", "high", "n", "spent", "age", "step", "mark", "rate", "tier", "behind", "evaluation")
RECENT = 20
"""Steps whose mean is called the training loss at a point: one step's loss is noise."""
MARKS = {"mid-schedule": "read in mid-schedule", "mid-pipeline": "later stages not yet applied",
         "untrained": "before any training"}


def parse(text: str) -> tuple[str, float]:
    """``seconds=60`` as axis and value.

    Raises:
        InputError: not of this form, an axis that does not exist, or a value that is not above zero.
    """
    name, found, given = str(text).partition("=")
    if not found:
        raise InputError("at", text, "it is not of the form axis=value", "Write for example seconds=60")
    try:
        number = float(given.strip().replace("_", ""))
    except ValueError:
        number = given
    return checked(name.strip(), number)


def checked(axis: str, value) -> tuple[str, float]:
    """Axis and value, aliases (minutes, steps, size_mb) resolved.

    Raises:
        InputError: as ``parse``.
    """
    name, factor = ALIASES.get(axis, (axis, 1.0))
    if name not in AXES:
        raise InputError("at", axis, "runs have no such expenditure", suggestion(axis, AXES))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise InputError(f"at.{axis}", value, "not a number above zero",
                         f"Give the expenditure, for example {axis}={60 if name in SPENT else 10}")
    return name, float(value) * factor


def equal(ids, axis: str, value: float | None = None, y: str = "quality", *, home=None) -> dict:
    """Read every run at one expenditure.

    Args:
        axis: seconds, step, tokens, joules (what had been spent), or trainable, size (final figures: the best run of each
            pipeline at or below the limit). ``trainable`` of at most 1 is a share of the model's parameters.
        value: the expenditure in s, steps, tokens, J, parameters or MB (1e6 bytes); None: the most that all runs reach.
        y: quality (evaluation), loss_eval, or loss (mean of the last 20 training steps); final figures know quality only.

    Returns:
        ``axis``, ``value``, ``unit``, ``how``, ``kind`` (spent, final), ``y``, ``metric``, ``range`` {low, high, default, marks},
        ``rows`` [{``brief``, state (read, not reached, none, over), value, low, high, n, spent, age, total, step, mark
        (mid-schedule, mid-pipeline, untrained or None), rate (share of the peak learning rate), tier, behind {difference, low, high, p}
        of the best, final {value, low, high, spent}, note}], best first, and ``text``.

    Raises:
        InputError: an unknown axis or quantity, a value not above zero, no run, or runs measured in different metrics.
    """
    axis, least = checked(axis, 1.0 if value is None else value)
    value = None if value is None else least
    if y not in QUANTITIES:
        raise InputError("y", y, "there is no such quantity", suggestion(y, QUANTITIES))
    store = store_of(home)
    rows = chosen(ids, store)
    metric = _metric(rows)
    if axis in FINAL:
        if y != "quality":
            raise InputError("y", y, f"{axis} is a final figure, and only quality is kept of the end", "Leave y out")
        found = _final(store, rows, axis, value)
    else:
        found = _spent(store, rows, axis, value, y)
    found["rows"].sort(key=lambda r: (r["state"] != "read", r["value"] is None, _order(r["value"], metric, y)))
    ranked = _rank(store, found["rows"], metric) if y == "quality" else {}
    unit, how = AXES[axis]
    out = {"axis": axis, "unit": unit, "how": how, "kind": "final" if axis in FINAL else "spent", "y": y, "metric": metric,
           **found, **ranked}
    out["text"] = _text(out)
    return out


def _metric(rows: list[dict]) -> str | None:
    kinds: dict[str, list] = {}
    for row in rows:
        if row["metric"]:
            kinds.setdefault(row["metric"], []).append(row["name"])
    if len(kinds) > 1:
        (a, first), (b, second) = list(kinds.items())[:2]
        raise InputError("runs", f"{first[0]}, {second[0]}", f"one is measured in {a}, the other in {b}",
                         "Choose runs of the same task")
    return next(iter(kinds), None)


def _order(value, metric, y) -> float:
    return 0.0 if value is None else value if y != "quality" or stats.lower_is_better(metric) else -value


# -- what had been spent -----------------------------------------------------------------------------------------------
class Course:
    """One run along an axis: its evaluations with what had been spent at each, and what it spent in all."""

    def __init__(self, store, row: dict, axis: str):
        self.store, self.row, self.axis = store, row, axis
        self.series = {s["name"]: s for s in store.series(row["id"])}
        self.ruler = ruler(store, row["id"], axis, self.series)
        self.stages, self.evaluations, self.total = store.stages(row["id"]), [], None
        if self.ruler is None:
            return
        found = [e for e in store.evaluations(row["id"]) if e["value"] is not None]
        found.sort(key=lambda e: (e["step"], e["t"], e["id"]))
        at = self.ruler([e["step"] for e in found], [e["t"] for e in found], False) if found else []
        self.evaluations = [e | {"spent": float(x)} for e, x in zip(found, at)]
        plain = [s for s in self.series.values() if not s["clock"]]
        if axis == "seconds":
            ends = [row["seconds"], *(s["last_t"] for s in plain), *(e["t"] for e in found)]
            known = max((t for t in ends if t is not None), default=None)
            self.total = row["seconds"] if row["status"] == "finished" and row["seconds"] else known
        elif axis == "step":
            self.total = max((s["last_step"] for s in plain if s["last_step"] is not None), default=None)
        else:
            last = self.series.get("tokens" if axis == "tokens" else "energy/joules") or {}
            self.total = last.get("last_value", 0.0 if axis == "tokens" else None)

    def reached(self, value: float) -> bool:
        slack = NEAR if self.row["status"] == "finished" else 0.0
        return self.total is not None and self.total >= value * (1 - slack)

    def mark(self, e: dict) -> str | None:
        """Why a reading at this evaluation is not that of a run planned for the expenditure; None: it is."""
        names, last = [s["method"] for s in self.stages], len(self.stages) - 1
        if e["stage"] < 0:
            return "untrained" if names else None
        done = [self.row["status"] == "finished" or s["status"] == "finished" for s in self.stages]
        decays = (self.row["spec"].get("training") or {}).get("schedule", "cosine") != "constant"
        trains = [decays and n in methods() and methods()[n].card.trains for n in names]
        if e["name"] in ("result", "final") or e["stage"] > last:
            return "mid-schedule" if any(t and not d for t, d in zip(trains, done)) else None
        i = e["stage"]
        end = max((o["step"] for o in self.evaluations if o["stage"] == i), default=e["step"])
        if trains[i] and not (done[i] and e["step"] >= end):
            return "mid-schedule"
        return "mid-pipeline" if i < last else None

    def rate(self, e: dict) -> float | None:
        """Learning rate at an evaluation as a share of its peak."""
        if not self.series.get("lr", {}).get("count"):
            return None
        points = self.store.points(self.row["id"], "lr", buckets=1000)
        known = [(s, v) for s, v in zip(points["step"], points["value"]) if v is not None]
        peak, now = max((v for _, v in known), default=0.0), [v for s, v in known if s <= e["step"]]
        return now[-1] / peak if now and peak else None

    def loss(self, value: float) -> dict | None:
        """Mean training loss of the last ``RECENT`` steps at or before the expenditure."""
        if not self.series.get("loss", {}).get("count"):
            return None
        points = self.store.points(self.row["id"], "loss")
        at = self.ruler(points["step"], points["t"], False)
        seen = [(x, v, s) for x, v, s in zip(at, points["value"], points["step"]) if v is not None and x <= value][-RECENT:]
        if not seen:
            return None
        return {"value": sum(v for _, v, _ in seen) / len(seen), "spent": float(seen[-1][0]), "step": seen[-1][2], "n": len(seen)}


def _spent(store, rows: list[dict], axis: str, value: float | None, y: str) -> dict:
    courses = [Course(store, row, axis) for row in rows]
    scope = _range([c.total for c in courses if c.evaluations or y == "loss"], [c.evaluations for c in courses])
    value = scope["default"] if value is None else value
    return {"value": value, "range": scope, "rows": [_read(c, axis, value, y) for c in courses] if value else []}


def _read(course: Course, axis: str, value: float, y: str) -> dict:
    row, unit = course.row, SPENT[axis][0]
    out = brief(row) | dict.fromkeys(EMPTY)
    out |= {"total": course.total, "final": _figure(course.evaluations[-1], y) if course.evaluations else None}
    if course.ruler is None:
        why = "no energy counter here" if axis == "joules" else f"{unit} were not recorded"
        return out | {"state": "none", "note": why}
    if not course.reached(value):
        going = "is at" if row["status"] in ("starting", "running", "paused", "queued") else "ended at"
        return out | {"state": "not reached", "note": f"{going} {_amount(course.total or 0, axis)}" + (
            "" if out["final"] is None else f"; its last value is {_shown(out['final'], row['metric'], y)}")}
    before = [e for e in course.evaluations if e["spent"] <= value]
    point = course.loss(value) if y == "loss" else None
    if not before or y == "loss" and point is None:
        first = course.evaluations[0]["spent"] if course.evaluations else None
        return out | {"state": "none", "note": "not evaluated" if first is None else f"first evaluated at {_amount(first, axis)}"}
    e = before[-1]
    out |= _figure(e, y) | {"step": e["step"], "evaluation": e["id"]}
    if point is not None:
        out |= {"low": None, "high": None, **point}
        e = e | {"step": point["step"]}
    ended = course.total < value
    out |= {"state": "read", "age": max(0.0, value - out["spent"]), "mark": course.mark(before[-1]), "items": e["items_hash"]}
    notes = [f"ended at {_amount(course.total, axis)}"] if ended else []
    if out["mark"]:
        out["rate"] = course.rate(e) if out["mark"] == "mid-schedule" else None
        still = f", learning rate at {100 * out['rate']:.0f} % of its peak" if out["rate"] is not None else ""
        notes.append(MARKS[out["mark"]] + still)
    return out | {"note": "; ".join(notes)}


def _figure(e: dict, y: str) -> dict:
    if y == "quality":
        return {"value": e["value"], "low": e["low"], "high": e["high"], "n": e["n"], "spent": e.get("spent")}
    return {"value": (e.get("extra") or {}).get("loss"), "low": None, "high": None, "n": e["n"], "spent": e.get("spent")}


def _range(totals: list, evaluations: list[list]) -> dict:
    """Sensible expenditures: the most that all reach, where each ends, and round numbers between."""
    totals = sorted(t for t in totals if t)
    if not totals:
        return {"low": None, "high": None, "default": None, "marks": []}
    firsts = [next((e["spent"] for e in found if e["stage"] >= 0 and e["spent"] > 0), None) for found in evaluations]
    low, high = min((f for f in firsts if f), default=totals[0]), totals[-1]
    marks = {_down(totals[0]), *(_down(t) for t in totals)} | {n for n in _round_numbers(low, high)}
    return {"low": _down(min(low, totals[0])), "high": high, "default": _down(totals[0]), "marks": _thin(marks, _down(totals[0]))}


def _round_numbers(low: float, high: float) -> list[float]:
    out, power = [], 10.0 ** math.floor(math.log10(max(low, 1e-9)))
    while power <= high:
        out += [m * power for m in (1, 2, 5) if low <= m * power <= high]
        power *= 10
    return out


def _thin(marks, keep: float, most: int = 9) -> list[float]:
    """At most nine marks, the one that all runs reach among them."""
    found = sorted(marks)
    if len(found) > most:
        picked = {found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)}
        found = sorted(picked | {keep})
    return found


def _down(value: float) -> float:
    """Three significant digits, never more than the value itself."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    if digits > 0:
        return math.floor(value * 10**digits + 1e-9) / 10**digits
    return float(math.floor(value / 10**-digits) * 10**-digits)


def _up(value: float) -> float:
    """Three significant digits, never less than the value itself."""
    below = _down(value)
    return below if below >= value else _down(value * (1 + 1e-12) + 10.0 ** (math.floor(math.log10(value)) - 2))


# -- final figures -----------------------------------------------------------------------------------------------------
def _final(store, rows: list[dict], axis: str, value: float | None) -> dict:
    """The best run of each pipeline whose size or number of trained parameters is at most ``value``."""
    def figure(row):
        if axis == "size":
            return None if row["size_bytes"] is None else row["size_bytes"] / 1e6
        return None if row["trainable"] is None else float(row["trainable"])

    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(brief(row)["pipeline"], []).append(row)
    able = {name: [r for r in members if figure(r) is not None and r["value"] is not None] for name, members in groups.items()}
    least = [min(map(figure, found)) for found in able.values() if found]
    sizes = sorted({_up(figure(r)) for found in able.values() for r in found if figure(r)})
    default = _up(max(least)) if least and max(least) > 0 else (sizes[0] if sizes else None)
    scope = {"low": sizes[0], "high": sizes[-1], "default": default, "marks": _thin(sizes, default)} if sizes else \
        {"low": None, "high": None, "default": None, "marks": []}
    value = scope["default"] if value is None else value
    share = axis == "trainable" and value is not None and value <= 1
    limit = lambda r: value * (r["parameters"] or 0) if share else value  # noqa: E731
    out = []
    for members in groups.values():
        name, found = brief(members[0])["pipeline"], able[brief(members[0])["pipeline"]]
        inside = [r for r in found if value is not None and figure(r) <= limit(r)]
        better = sorted(inside, key=lambda r: r["value"] if stats.lower_is_better(r["metric"]) else -r["value"])
        row = better[0] if better else min(found, key=figure) if found else members[0]
        e = main_evaluation(store, row["id"]) if better else None
        out.append(brief(row) | dict.fromkeys(EMPTY) | {
            "group": name, "total": figure(row), "evaluation": e and e["id"], "items": e and e["items_hash"],
            "state": "read" if better else "over" if found else "none", "candidates": len(inside), "ids": [r["id"] for r in inside],
            "final": None if row["value"] is None else _ended(row) | {"spent": figure(row)}})
        if better:
            out[-1] |= _ended(row) | {"n": row["n"], "spent": figure(row), "note": "; ".join(
                [f"best of {len(inside)}"] * (len(inside) > 1) + [f"run {row['status']}"] * (row["status"] != "finished"))}
        else:
            said = f"none at or below; the smallest has {_amount(figure(row), axis)}" if found else f"no figure for {axis}"
            out[-1]["note"] = said
    return {"value": value, "range": scope, "rows": out}


def _ended(row: dict) -> dict:
    return {"value": row["value"], "low": row["value_low"], "high": row["value_high"]}


# -- who is ahead ------------------------------------------------------------------------------------------------------
def _rank(store, rows: list[dict], metric: str | None) -> dict:
    """Tiers among the readings over the same items, by paired tests where the per-item scores are kept."""
    import numpy as np
    kinds: dict[tuple, list] = {}
    for row in rows:
        if row["state"] == "read" and row["evaluation"] is not None:
            scores, weights = store.scores(row["evaluation"])
            if len(scores):
                kinds.setdefault((row["items"], len(scores)), []).append((row, scores, weights))
    members = max(kinds.values(), key=len, default=[])
    if len(members) < 2:
        return {"ranked": 0}
    unit, weights, lower = stats.scale(metric), members[0][2], stats.lower_is_better(metric)
    found = stats.tiers(np.stack([s for _, s, _ in members]), weights, unit=unit, lower=lower)
    best = found["order"][0]
    for i, (row, scores, _) in enumerate(members):
        row["tier"] = LETTERS[min(found["tier"][i], 25)]
        if i != best:
            apart = stats.difference(members[best][1], scores, weights, unit=unit, draws=2000)
            row["behind"] = {k: apart[k] for k in ("difference", "low", "high", "n")} | {"p": found["p"][best][i]}
    return {"ranked": len(members), "n": len(members[0][1]),
            "test": "McNemar's exact test" if metric == "accuracy" else "a paired bootstrap"}


def _amount(value: float, axis: str) -> str:
    if axis == "seconds":
        return f"{value:,.1f}".removesuffix(".0") + " s"
    return f"{value:,.2f}".removesuffix(".00") + " MB" if axis == "size" else f"{value:,.0f} {AXES[axis][0]}"


def _shown(figure: dict, metric: str | None, y: str) -> str:
    if figure["value"] is None:
        return "not known"
    return f"{100 * figure['value']:.1f} %" if y == "quality" and metric == "accuracy" else f"{figure['value']:.4g}"


def _text(found: dict) -> str:
    if not found["value"]:
        return f"No run here has a figure for {found['axis']}."
    read = [r for r in found["rows"] if r["state"] == "read"]
    where = f"{'At most' if found['kind'] == 'final' else 'At'} {_amount(found['value'], found['axis'])},"
    if not read:
        return f"{where} nothing can be read."
    if found.get("ranked", 0) > 1:
        first = [r["name"] for r in read if r["tier"] == "A"]
        both = " and ".join(filter(None, (", ".join(first[:-1]), first[-1])))
        said = f"{where} {both} is ahead" if len(first) == 1 else f"{where} {both} cannot be told apart"
        said += f": {found['test']} over the same {found['n']:,} items, Holm-corrected, 5 %."
    elif len(read) == 1:
        said = f"{where} only {read[0]['name']} can be read."
    elif found["y"] != "quality":
        said = f"{where} {len(read)} of {len(found['rows'])} can be read: {QUANTITIES[found['y']]}, without an interval."
    else:
        said = f"{where} {len(read)} of {len(found['rows'])} can be read; no two over the same items, so only the intervals speak."
    mid = sum(r["mark"] == "mid-schedule" for r in read)
    if mid:
        said += (f" {mid} of {len(read)} {'was' if mid == 1 else 'were'} read in mid-schedule: a run planned for this expenditure "
                 "would have lowered its learning rate by then, so this is not a fair comparison.")
    return said

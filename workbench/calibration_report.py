"""How well the forecasts of this database have held: each run's ratio, tables by model, method and machine, and their errors."""

from __future__ import annotations

from pathlib import Path

from workbench import calibration
from workbench.shrinkage import median, quantile

BY = ("model", "method", "machine")
HOW = ("The planner multiplies what it estimates by the median error of earlier runs on this machine, drawn towards 1 where few of them stand "
       "behind it: all runs first, then those with the same methods, the same model, and both. What is counted from shapes is never corrected.")
_MADE: dict[str, tuple[tuple, dict]] = {}


def report(store, home=None) -> dict:
    """Every comparable run, and their errors.

    Returns:
        runs (how many), left_out (reason -> count), how, points (newest first: run, name, slot, model, methods, machine, memory and seconds
        with forecast, corrected and measured, trainable_exact, size_exact, joules), overall and by (model, method, machine -> rows of
        ``summary`` with a ``key``). ``forecast`` is raw, ``corrected`` is what the other runs alone make of it.
    """
    rows, left = calibration.observations(store, home)
    stamp = calibration._ROWS[str(store.path)][0]
    made = _MADE.get(str(store.path))
    if made and made[0] == stamp:
        return made[1]
    held: dict[int, tuple[float, float]] = {}
    for name in {r["machine"] for r in rows}:
        held |= calibration.left_out([r for r in rows if r["machine"] == name])
    points = [point(row, *held[row["run"]]) for row in rows]
    found = dict(runs=len(points), left_out=left, how=HOW, points=points, overall=summary(points),
                 by={kind: table(points, kind) for kind in BY})
    _MADE[str(store.path)] = (stamp, found)
    return found


def point(row: dict, peak: float, seconds: float) -> dict:
    """One run for the page: forecast before and after correction beside the measurement."""
    def exact(pair):
        return None if None in pair else pair[0] == pair[1]
    raw_peak, raw_seconds = max((p[1] for p in row["phases"]), default=0), sum(p[4] for p in row["phases"])
    return dict(run=row["run"], name=row["name"], slot=row["slot"], model=short(row["model"]), methods=row["methods"], machine=row["machine"],
                memory=dict(forecast=raw_peak, corrected=round(peak), measured=row["peak"]),
                seconds=dict(forecast=raw_seconds, corrected=seconds, measured=sum(p[5] for p in row["phases"])),
                trainable_exact=exact(row["trainable"]), size_exact=exact(row["size"]), joules=row["joules"])


def short(model: str) -> str:
    """The last part of a folder's path; an id as it is."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def machine_name(fingerprint: str) -> str:
    """``cpu|AMD EPYC|2`` as ``AMD EPYC, 2 cores``."""
    parts = fingerprint.split("|")
    return f"{parts[1]}, {parts[2]} cores" if len(parts) == 3 else fingerprint


def table(points: list[dict], by: str) -> list[dict]:
    """``summary`` of each group, the largest first. A pipeline counts for each of its methods."""
    groups: dict[str, list[dict]] = {}
    for p in points:
        names = dict.fromkeys(p["methods"]) if by == "method" else [machine_name(p["machine"]) if by == "machine" else p["model"]]
        for name in names:
            groups.setdefault(name, []).append(p)
    return [dict(key=key, **summary(members)) for key, members in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))]


def summary(points: list[dict]) -> dict:
    """n, and for memory and seconds before and after correction: the median ratio forecast / measured, the median and the 90 % quantile of
    the relative error, and the share of runs within 20 %; how many trainable counts and sizes were exact, of how many."""
    out: dict = dict(n=len(points))
    for figure in ("memory", "seconds"):
        out[figure] = {}
        for name, key in (("before", "forecast"), ("after", "corrected")):
            ratios = [p[figure][key] / p[figure]["measured"] for p in points if p[figure]["measured"] and p[figure][key]]
            if not ratios:
                out[figure][name] = None
                continue
            errors = [abs(r - 1) for r in ratios]
            out[figure][name] = dict(ratio=median(ratios), error=median(errors), error90=quantile(errors, 0.9), worst=max(errors),
                                     within20=sum(e <= 0.2 for e in errors) / len(errors), within30=sum(e <= 0.3 for e in errors) / len(errors))
    for name in ("trainable_exact", "size_exact"):
        known = [p[name] for p in points if p[name] is not None]
        out[name] = [sum(known), len(known)]
    return out


def say(left_out: dict[str, int]) -> str:
    """``2 runs left out: resumed or begun again (2).``, or nothing."""
    count = sum(left_out.values())
    if not count:
        return ""
    return f"{count} run{'s' if count != 1 else ''} left out: " + ", ".join(f"{why} ({n})" for why, n in sorted(left_out.items())) + "."

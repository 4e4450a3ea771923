"""One self-contained HTML page about one or several runs: settings, forecast beside measured, curves, evaluations, events.

The page needs no network and no script; charts are SVG. Torch is not needed to write it.
"""

from __future__ import annotations

import datetime
import html
import math
import os
import re
from pathlib import Path

import yaml

from engines.errors import InputError
from workbench import compare, stats, svg
from workbench.rows import brief, chosen, store_of

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "css"
BUCKETS = 300
EVENTS = 500
SMOOTHING = 0.9
NB = "\u00a0"
GAP = '<span class="note">no figure</span>'
FIGURES = ("allocated", "reserved", "process", "device", "rss")


def report(ids, path: str | Path, *, home=None) -> dict:
    """Write the report of some runs to ``path``; an older file of this name is replaced whole.

    Returns:
        ``{"file", "bytes", "runs"}``.

    Raises:
        InputError: no run is chosen, or the file cannot be written. NotFound: there is no such run.
    """
    text, target = page(ids, home=home), Path(path).expanduser().absolute()
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as e:
        raise InputError("report", str(target), f"the file cannot be written ({e.strerror or e})", "Name a file in a folder of your own") from None
    return {"file": str(target), "bytes": target.stat().st_size, "runs": [r["id"] for r in chosen(ids, store_of(home))]}


def data(ids, folder: str | Path, format: str = "parquet", *, home=None) -> list[Path]:
    """Write what is recorded of some runs (points, events, evaluations ...) as parquet, csv or json, one file per table.

    Raises:
        InputError: no run is chosen. StorageError: unknown format, or the folder cannot be written. NotFound: no such run.
    """
    store = store_of(home)
    return store.export([r["id"] for r in chosen(ids, store)], folder, format)


def page(ids, *, home=None) -> str:
    """The HTML text of the report."""
    store = store_of(home)
    rows = [store.run(r["id"]) for r in chosen(ids, store)]
    title = rows[0]["name"] if len(rows) == 1 else f"{len(rows)} runs: {', '.join(r['name'] for r in rows[:4])}{' …' if len(rows) > 4 else ''}"
    body = [f"<h1>{esc(title)}</h1><p class='note'>Fettle report, {datetime.datetime.now():%Y-%m-%d %H:%M}. "
            "Intervals are 95 % over the items of the evaluation.</p>", _section(_overview(rows))]
    if len(rows) > 1:
        body += _together(rows, home)
    for row in rows:
        body += _single(store, row, home, len(rows) > 1)
    return ("<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{esc(title)} · Fettle</title><style>{_style()}</style></head><body><main>" + "\n".join(body) + "</main></body></html>\n")


def _style() -> str:
    """The tokens (first :root rule of the app's stylesheet) and the report's own rules."""
    tokens = re.search(r":root\s*\{.*?\n\}", (ASSETS / "fettle.css").read_text(encoding="utf-8"), re.S)
    return (tokens.group(0) if tokens else "") + (ASSETS / "report.css").read_text(encoding="utf-8")


# -- figures -------------------------------------------------------------------------------------------------
def esc(value) -> str:
    return html.escape(str(value), quote=True)


def figure(value, unit: str = "", by: float = 1.0) -> str:
    """Three significant figures and the unit; whole numbers that were counted stay exact."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return GAP
    if isinstance(value, int) and by == 1.0:
        text = f"{value:,}"
    else:
        value = value / by
        places = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{min(places, 8)}f}"
    return text.replace("-", "−") + (f'{NB}<span class="u">{esc(unit)}</span>' if unit else "")


def setting(value) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    return "not used" if value is None else "none" if value in ("", [], {}) else str(value)


def clock(seconds) -> str:
    """Minutes and seconds: 1:05."""
    return GAP if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def quality(metric, value, low=None, high=None) -> str:
    """A metric with its interval; accuracy in per cent."""
    if value is None:
        return GAP
    by, unit = (0.01, "%") if metric == "accuracy" else (1.0, metric or "")
    places = 1 if metric == "accuracy" else 3
    text = f"{value / by:.{places}f}{NB}<span class='u'>{esc(unit)}</span>"
    return text + (f" <span class='note'>[{low / by:.{places}f}, {high / by:.{places}f}]</span>" if low is not None and high is not None else "")


def grid(heads: list, rows: list, numeric: set[int] = frozenset()) -> str:
    """A table; cells are HTML already. ``numeric``: columns that are set flush right."""
    if not rows:
        return ""
    mark = lambda i: ' class="n"' if i in numeric else ""  # noqa: E731
    head = "".join(f"<th{mark(i)}>{h}</th>" for i, h in enumerate(heads))
    body = "".join("<tr>" + "".join(c if c.startswith("<td") else f"<td{mark(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(*parts: str) -> str:
    return "<section>" + "".join(parts) + "</section>" if any(parts) else ""


def _figure(title: str, unit: str, chart: str) -> str:
    return f"<figure><figcaption>{esc(title)} <span>{esc(unit)}</span></figcaption>{chart}</figure>" if chart else ""


def _charts(*figures: str) -> str:
    return '<div class="charts">' + "".join(figures) + "</div>" if any(figures) else ""


def _name(row: dict) -> str:
    return f'<span class="key" style="border-color:var(--ft-run-{row["slot"] % 10 + 1})"></span>{esc(row["name"])}'


# -- all runs ------------------------------------------------------------------------------------------------
def _overview(rows: list[dict]) -> str:
    out = []
    for row in rows:
        short = brief(row)
        out.append([_name(row), esc(row["status"]), esc(short["model"]), esc(short["data"]), esc(short["pipeline"]),
                    quality(row["metric"], row["base_value"]), quality(row["metric"], row["value"], row["value_low"], row["value_high"]),
                    figure(row["n"]), figure(row["size_bytes"], "MB", 1e6), figure(row["trainable"]), figure(row["peak_bytes"], "GB", 1e9),
                    clock(row["seconds"]), figure(short["seed"])])
    return grid(["Run", "State", "Model", "Data", "Pipeline", "Before", "After", "Items", "Size", "Trainable", "Peak memory", "Time", "Seed"], out,
                set(range(5, 13)))


def _together(rows: list[dict], home) -> list[str]:
    ids = [r["id"] for r in rows]
    out = ["<h2>Side by side</h2>", _section(*_verdicts(rows, home))]
    found = compare.compare(ids, buckets=BUCKETS, home=home)
    slots, names = {r["id"]: r["slot"] for r in rows}, {r["id"]: r["name"] for r in rows}
    panels = []
    for series, title in (("loss", "Training loss"), ("loss_eval", "Evaluation loss"), ("metric", "Quality")):
        curves = [{"x": c["x"], "y": c["value"], "slot": slots[c["id"]], "label": names[c["id"]]} for c in found["series"][series]]
        panels.append(_figure(title, "", svg.lines(curves, name=f"{title} of {len(curves)} runs by step")))
    front = compare.pareto(ids, home=home)
    points = [{"x": p["x"], "y": p["y"], "low": p["y_low"], "high": p["y_high"], "label": p["name"], "slot": p["slot"], "open": not p["front"]}
              for p in front["points"]]
    stair = [next(q for q in front["points"] if q["id"] == i) for i in front["front"]]
    limits = [entry["value"] for entry in front["limits"] if entry["axis"] == "x"]
    out += [_charts(*panels), _figure("Size against quality", f"MB, {front['metric'] or ''}; filled: no other run beats it",
                                      svg.scatter(points, name="Size against quality", x_name="MB", front=stair, limits=limits))]
    different = compare.diff(ids, home=home)
    body = [[esc(r["label"])] + [f'<td class="{"changed" if v != r["values"][0] else ""}">{esc(setting(v))}'
                                 f'{" <span class=note>(auto)</span>" if a else ""}</td>' for v, a in zip(r["values"], r["auto"])]
            for r in different["rows"]]
    out += [f"<h2>Settings that differ</h2><p class='note'>{different['differ']} of {different['total']} fields.</p>",
            _section(grid(["Field", *map(esc, different["names"])], body))]
    return out


def _verdicts(rows: list[dict], home) -> list[str]:
    out = []
    if len(rows) > 2:
        try:
            found = compare.tiers([r["id"] for r in rows], home=home)
            out.append(grid(["Tier", "Run", "Quality"], [[r["tier"], _name(r), quality(found["metric"], r["value"])] for r in found["rows"]], {2}))
            out.append(f"<p class='note'>{esc(found['text'])}</p>")
        except InputError as e:
            out.append(f"<p class='note'>{esc(e)}</p>")
    for other in rows[1:]:
        try:
            out.append(f"<p>{esc(compare.paired(rows[0]['id'], other['id'], home=home)['text'])}</p>")
        except InputError as e:
            out.append(f"<p class='note'>{esc(e)}</p>")
    return out


# -- one run -------------------------------------------------------------------------------------------------
def _single(store, row: dict, home, named: bool) -> list[str]:
    out = [f"<h2>{_name(row)}</h2>" if named else ""]
    if row["error"]:
        out.append(_section(f"<p class='bad'>{esc(row['error'].get('cause', ''))} {esc(row['error'].get('remedy', ''))}</p>"))
    if row["note"] or row["tags"]:
        out.append(f"<p>{esc(row['note'])} <span class='note'>{esc(', '.join(row['tags']))}</span></p>")
    out += ["<h3>Forecast beside measured</h3>", _section(_forecast(row)), "<h3>Stages</h3>", _section(_stages(store.stages(row["id"]))),
            "<h3>Curves</h3>", _curves(store, row), "<h3>Evaluations</h3>", _section(_evaluations(store.evaluations(row["id"]))),
            "<h3>Events</h3>", _section(_events(store.events(row["id"], limit=EVENTS), row)),
            "<h3>Settings</h3>", _section(f"<pre>{esc(yaml.safe_dump(row['spec'], sort_keys=False, allow_unicode=True, width=110))}</pre>"
                                          "<p class='note'>Saved as spec.yaml, this runs again with: python -m workbench run spec.yaml</p>")]
    # a heading with nothing under it says nothing
    return [part for i, part in enumerate(out) if part and not (part.startswith("<h3>") and not out[i + 1])]


def _forecast(row: dict) -> str:
    said, got = row["forecast"] or {}, row["footprint"] or {}
    memory, seconds, size = said.get("memory") or {}, said.get("seconds") or {}, said.get("size") or {}
    budget = row["spec"].get("budget") or {}
    minutes = budget.get("minutes")
    rows = [("Peak memory", memory.get("peak_bytes"), got.get("peak_bytes", row["peak_bytes"]), "GB", 1e9, budget.get("memory_gb"), 1.0),
            ("Time", seconds.get("total"), row["seconds"], "s", 1.0, None if minutes is None else 60.0 * minutes, 1.0),
            ("Size", size.get("bytes"), row["size_bytes"], "MB", 1e6, budget.get("size_mb"), 1.0),
            ("Trainable parameters", (said.get("trainable") or {}).get("count"), row["trainable"], "", 1.0, budget.get("trainable"), 1.0),
            ("Steps", said.get("steps"), got.get("steps"), "", 1.0, budget.get("steps"), 1.0),
            ("Tokens or examples", said.get("tokens"), got.get("tokens"), "", 1.0, budget.get("tokens"), 1.0),
            ("Bits per weight", size.get("bits_per_weight"), got.get("bits_per_weight"), "", 1.0, None, 1.0),
            ("Sparsity", size.get("sparsity"), got.get("sparsity"), "%", 0.01, None, 1.0),
            ("Energy", None, got.get("joules"), "J", 1.0, budget.get("joules"), 1.0)]
    table = grid(["", "Forecast", "Measured", "Measured ÷ forecast", "Limit"],
                 [[what, figure(a, unit, by), figure(b, unit, by), figure(b / a) if a and b else "", figure(limit if isinstance(limit, int) and not unit else float(limit), unit) if limit else ""]
                  for what, a, b, unit, by, limit, _ in rows if a is not None or b is not None or limit], {1, 2, 3, 4})
    before, after = {p["phase"]: p for p in memory.get("phases") or ()}, {p["phase"]: p for p in got.get("phases") or ()}
    spent = {p["phase"]: p["seconds"] for p in seconds.get("phases") or ()}
    phases = grid(["Phase", "Memory, forecast", "Memory, measured", "Time, forecast", "Time, measured"],
                  [[esc(name), figure((before.get(name) or {}).get("total"), "GB", 1e9), figure((after.get(name) or {}).get("peak_bytes"), "GB", 1e9),
                    figure(spent.get(name, (before.get(name) or {}).get("seconds")), "s"), figure((after.get(name) or {}).get("seconds"), "s")]
                   for name in dict.fromkeys([*before, *after])], {1, 2, 3, 4})
    text = f"<p>{esc(said['text'])}</p>" if said.get("text") else ""
    return text + table + (f"<h3>By phase</h3>{phases}" if phases else "")


def _stages(stages: list[dict]) -> str:
    out = []
    for s in stages:
        chosen_by = "; ".join(f"{k}: {v}" for k, v in (s["reasons"] or {}).items())
        values = ", ".join(f"{k} {setting(v)}" for k, v in s["settings"].items() if k != "method")
        out.append([str(s["index"] + 1), esc(s["method"]), esc(values), f"<span class='note'>{esc(chosen_by)}</span>", esc(s["status"] or ""),
                    clock(s["seconds"])])
    return grid(["Stage", "Method", "Settings", "Chosen because", "State", "Time"], out, {5})


def _curves(store, row: dict) -> str:
    points = store.all_points(row["id"], buckets=BUCKETS)
    units = {s["name"]: s["unit"] or "" for s in store.series(row["id"])}

    def curve(name: str, by: str = "step", divide: float = 1.0, slot: int | None = None, text: str = "") -> list[dict]:
        p = points.get(name)
        return [] if not p or not p["step"] else [{"x": p[by], "y": [None if v is None else v / divide for v in p["value"]], "label": text,
                                                   "slot": row["slot"] if slot is None else slot, "dash": ""}]

    losses = curve("loss")
    if losses and len(losses[0]["x"]) > 60:
        soft = stats.smooth(store.points(row["id"], "loss")["value"], SMOOTHING)
        steps, every = store.points(row["id"], "loss")["step"], max(1, len(soft) // BUCKETS)
        losses = [losses[0] | {"faint": True}, losses[0] | {"x": steps[::every], "y": soft[::every]}]
    losses = losses[:-1] + [losses[-1] | {"label": "training"}] if losses else []
    losses += [c | {"points": True, "label": "evaluation"} for c in curve("loss_eval")]
    evaluations = [e for e in store.evaluations(row["id"]) if e["value"] is not None and e["low"] is not None]
    by = 0.01 if row["metric"] == "accuracy" else 1.0
    scored = [{"x": [e["step"] for e in evaluations], **{k: [e[j] / by for e in evaluations] for k, j in (("y", "value"), ("low", "low"), ("high", "high"))},
               "points": True, "slot": row["slot"], "label": ""}] if evaluations else []
    memory = [c for k, name in enumerate(FIGURES) for c in curve(f"mem/{name}", "t", 1e9, k, name)]
    limit = (row["spec"].get("budget") or {}).get("memory_gb")
    speed = next((n for n in ("tokens_per_second", "samples_per_second") if n in points), None)
    return _charts(
        _figure("Loss", "nats", svg.lines(losses, name="Loss by step")),
        _figure("Quality", "%" if by != 1.0 else row["metric"] or "", svg.lines(scored, name="Quality with intervals by step")),
        _figure("Memory", "GB", svg.lines(memory, name="Memory by time", x_name="s", zero=True, limits=[(limit, "limit")] if limit and memory else ())),
        _figure("Throughput", (speed or "").replace("_per_", "/").replace("/second", "/s"),
                svg.lines(curve(speed) if speed else [], name="Throughput by step", zero=True)),
        _figure("Learning rate", "", svg.lines(curve("lr"), name="Learning rate by step", zero=True)),
        _figure("Gradient norm", "", svg.lines(curve("grad_norm"), name="Gradient norm by step", zero=True)),
        *[_figure(title, units.get(name, ""), svg.lines(curve(name, "t"), name=title, x_name="s", zero=True))
          for name, title in (("gpu/util", "GPU utilisation"), ("gpu/power", "GPU power"), ("energy/joules", "Energy"))])


def _evaluations(found: list[dict]) -> str:
    return grid(["Evaluation", "Stage", "Step", "Metric", "Value", "Items", "Loss", "Time"],
                [[esc(e["name"]), "base" if e["stage"] < 0 else str(e["stage"] + 1), figure(e["step"]), esc(e["metric"]),
                  quality(e["metric"], e["value"], e["low"], e["high"]), figure(e["n"]), figure(e["extra"].get("loss"), "nats"),
                  figure(e["extra"].get("seconds"), "s")] for e in found], {1, 2, 4, 5, 6, 7})


def _events(found: list[dict], row: dict) -> str:
    began, out = row["started"] or row["created"], []
    for e in found:
        kind = {"failure": "bad", "warning": "warn", "memory": "warn"}.get(e["kind"], "")
        since = clock(e["t"] - began) if e["t"] >= began else ""
        out.append([since, figure(e["data"].get("step")) if e["data"].get("step") is not None else "", f"<span class='{kind}'>{esc(e['kind'])}</span>",
                    esc(e["text"])])
    return grid(["Time", "Step", "Kind", "Event"], out, {0, 1})

"""Compare: the run table, curves over one axis, the Pareto front, settings that differ, and whether two runs can be told apart."""

from __future__ import annotations

import functools
import hashlib
import json

from components import formats
from components.layout import component

PARTS = ("interval", "run_table", "overlay", "pareto", "diff", "compare_equal", "compare_take")
"""Files of assets/js that make the page, besides its entry compare.js."""
PAGE = 50
ACTIVE = ("queued", "starting", "running")
MOST = 200
"""Runs of the filter that the Pareto plot looks at."""
WEEK = "age:<7d"
# sort as the table's header names it -> as workbench.compare names it
SORTS = {"value": "quality", "size": "size", "peak": "peak", "seconds": "time", "name": "name", "status": "status", "created": "created"}
NAMES = {"loss": "training loss", "loss_eval": "evaluation loss", "metric": "quality"}


def build(home) -> None:
    """The whole page is one component: table, charts and differences show one selection."""
    from workbench import catalog, compare, download, runs

    families = {m["id"]: (m["family"], m["name"]) for m in catalog.methods()}

    @functools.lru_cache(maxsize=4096)
    def expected(run_id: int) -> float | None:
        """Forecast peak in bytes; a forecast never changes once the run is recorded."""
        return ((home.store.forecast(run_id) or {}).get("memory") or {}).get("peak_bytes")

    @functools.lru_cache(maxsize=4096)
    def speed(run_id: int, ended: float) -> tuple[float | None, str]:
        found = (home.store.footprint(run_id) or {}).get("speed") or {}
        if "decode_tokens_per_second" in found:
            return found["decode_tokens_per_second"], "tok/s"
        return found.get("samples_per_second"), "items/s"

    def line(row: dict) -> dict:
        """A run as the table shows it."""
        figures = row.get("group") if (row.get("group") or {}).get("n", 0) > 1 else None
        forecast, fast = expected(row["id"]), speed(row["id"], row["ended"]) if row["ended"] else (None, "")
        found = dict(quality(row["metric"], row["value"], row["value_low"], row["value_high"], row["base_value"]))
        if figures:
            found |= quality(row["metric"], figures["mean"], figures["low"], figures["high"], row["base_value"])
        return found | {
            "id": row["id"], "name": row["name"], "slot": row["slot"], "status": row["status"], "words": words(row), "why": why(row),
            "pipeline": [stage(s, families) for s in row["spec"].get("pipeline") or ()], "model": row["model"], "data": row["data"],
            "size": row["size_bytes"], "speed": fast[0], "speed_unit": fast[1], "peak": row["peak_bytes"], "seconds": row["seconds"],
            "ratio": row["peak_bytes"] / forecast if row["peak_bytes"] and forecast else None, "seed": row["seed"],
            "seeds": (row.get("group") or {}).get("seeds") or [], "ids": (row.get("group") or {}).get("ids") or [row["id"]],
            "tags": row["tags"], "note": row["note"], "starred": row["starred"]}

    def table(given: dict) -> dict:
        """A page of the table and the counts on the chips; ``{"same": hash}`` when nothing has changed since ``seen``."""
        down, column = given["sort"].startswith("-"), given["sort"].lstrip("-")
        page = max(1, int(given.get("page") or 1))
        found = compare.table(given["query"], ("-" if down else "") + SORTS.get(column, "created"), page - 1, PAGE,
                              grouped=bool(given.get("group")), home=home)
        answer = {"rows": [line(r) for r in found["rows"]], "total": found["total"], "page": page, "pages": max(1, found["pages"]),
                  "all": home.store.count_runs(), "active": home.store.count_runs(status=ACTIVE), "chips": chips(home)}
        mark = hashlib.md5(json.dumps(answer, sort_keys=True, default=str).encode()).hexdigest()
        return {"same": mark} if mark == given.get("seen") else answer | {"mark": mark}

    def known(ids) -> list[int]:
        """The runs among ``ids`` that exist: a shared link may name one that was deleted."""
        return [r["id"] for r in home.store.runs(ids=[int(i) for i in ids], limit=None, archived=None, order="id")] if ids else []

    def order(ids) -> list[int]:
        there = set(known(ids))
        return [i for i in dict.fromkeys(int(i) for i in ids) if i in there]

    def curves(given: dict) -> dict:
        """Curves of the chosen runs on the axis asked for, in the shape that the overlay draws."""
        ids = order(given["ids"])
        found = compare.compare(ids, x=given["x"], home=home) if ids else {"runs": [], "series": {}, "bands": {}, "missing": []}
        metrics = {r["id"]: r["metric"] for r in home.store.runs(ids=ids, limit=None, archived=None)} if ids else {}
        return overlay(found, given.get("y"), lambda run_id: marks(home, run_id, given["x"]), set(metrics.values()))

    def front(given: dict) -> dict:
        """The runs of the filter on two axes."""
        from workbench import query
        rows = home.store.runs(**query.parse(given["query"]).filters(), order="-created", limit=MOST)
        rows = {r["id"]: r for r in [*home.store.runs(ids=order(given["ids"]), limit=None, archived=None), *rows] if r["value"] is not None}
        # Figures of other data or another metric do not belong on one axis: the first chosen run decides, else the newest.
        first = next((rows[i] for i in [*order(given["ids"]), *rows] if i in rows), None)
        ids = [i for i, r in rows.items() if (_data(r), r["metric"]) == (_data(first), first["metric"])]
        if not ids:
            return {"points": [], "metric": None, "limit": None}
        return points(compare.pareto(ids, x=given["x"], y="quality", home=home), rows, families)

    def differences(given: dict) -> dict:
        """Settings of the chosen runs."""
        ids = order(given["ids"])[:8]
        if not ids:
            return {"runs": [], "fields": []}
        found = compare.diff(ids, everything=True, home=home)
        rows = {r["id"]: r for r in home.store.runs(ids=ids, limit=None, archived=None)}
        return {"runs": [{"id": i, "name": n, "slot": rows[i]["slot"]} for i, n in zip(found["ids"], found["names"])],
                "fields": fields(found["rows"], [rows[i]["spec"] for i in found["ids"]])}

    def apart(given: dict) -> dict:
        """Whether two runs can be told apart, as one sentence with its figures."""
        from components.layout import user_error
        try:
            found = compare.paired(int(given["a"]), int(given["b"]), home=home)
        except Exception as error:           # "scored on different items" is an answer here, not a failure
            said = user_error(error)
            if said is None:
                raise
            cause, remedy = said.get("problem") or said["text"], said.get("remedy") or ""
            return {"comparable": False, "text": f"Not comparable: {cause.rstrip('.')}. {remedy}".strip()}
        factor = 100 if found["metric"] == "accuracy" else 1
        return {"comparable": True, "text": found["text"], "metric": found["metric"], "p": found["p"], "n": found["n"],
                **{k: factor * found[k] for k in ("difference", "low", "high")}, "unit": "points" if factor == 100 else found["metric"]}

    def ranks(given: dict) -> dict:
        """The chosen runs in tiers: in one tier stand those that cannot be told apart from its best."""
        from components.layout import user_error
        try:
            found = compare.tiers(order(given["ids"])[:10], home=home)
        except Exception as error:           # fewer than two that share items: no tiers, and that is all there is to say
            if user_error(error) is None:
                raise
            return {"rows": [], "text": ""}
        rows = [{"id": r["id"], "name": r["name"], "slot": r["slot"], "tier": r["tier"],
                 "value": quality(found["metric"], r["value"], None, None, None)["value"]} for r in found["rows"]]
        return {"rows": rows, "metric": quality(found["metric"], None, None, None, None)["metric"], "text": found["text"]}

    def at_equal(given: dict) -> dict:
        """The chosen runs at the same expenditure; ``{"trouble"}`` where they cannot be read."""
        from components.layout import user_error
        from workbench import equal
        try:
            return reading(equal.equal(order(given["ids"]), given["axis"], given.get("value"), home=home))
        except Exception as error:           # runs of two tasks: an answer here, not a failure
            said = user_error(error)
            if said is None:
                raise
            return {"trouble": said["text"]}

    def star(given: dict) -> dict:
        return {"starred": runs.star(int(given["id"]), bool(given["starred"]), home=home)["starred"]}

    def keep(given: dict) -> dict:
        """Tags and note of a run."""
        runs.tag(int(given["id"]), list(given["tags"]), home=home)
        row = runs.note(int(given["id"]), given["note"], home=home)
        return {"tags": row["tags"], "note": row["note"]}

    def export(given: dict) -> dict:
        """The chosen runs as a zip of tables (csv, json, parquet) or as one HTML report, for the browser to save."""
        return download.pack(home, order(given["ids"]), given["format"])

    def merge(given: dict) -> dict:
        """Queue a run that adds the adapters of the chosen runs; ``weight`` is that of each."""
        from workbench import merging
        row = merging.start(order(given["ids"]), float(given["weight"]), home=home)
        return {"id": row["id"], "name": row["name"]}

    def formats_offered(given: dict) -> dict:
        return {"formats": download.offered()}

    def names(given: dict) -> dict:
        """Name and slot of runs by id, for the chosen ones that are not on this page of the table."""
        rows = {r["id"]: r for r in home.store.runs(ids=order(given["ids"]), limit=None, archived=None)}
        return {"runs": [{"id": i, "name": rows[i]["name"], "slot": rows[i]["slot"], "status": rows[i]["status"],
                          "has": rows[i]["value"] is not None} for i in order(given["ids"])]}

    component("compare", server_functions=[table, curves, front, differences, apart, ranks, at_equal, star, keep, export, merge, formats_offered, names], elem_id="compare",
              scripts=PARTS)


# -- a run as the page shows it ------------------------------------------------------------------------------------
def quality(metric: str | None, value, low, high, base) -> dict:
    """The main figure and its interval; a share of right answers is shown in per cent."""
    factor, name = (100, "% accuracy") if metric == "accuracy" else (1, metric)
    times = lambda v: None if v is None else factor * v  # noqa: E731
    return {"metric": name, "value": times(value), "low": times(low), "high": times(high), "base": times(base)}


def reading(found: dict) -> dict:
    """The answer of ``workbench.equal`` as the page shows it: accuracy in per cent."""
    shown = quality(found["metric"], None, None, None, None)["metric"]
    factor = 100 if found["metric"] == "accuracy" else 1
    rows = []
    for r in found["rows"]:
        r = r | {k: v for k, v in quality(found["metric"], r["value"], r["low"], r["high"], None).items() if k in ("value", "low", "high")}
        if r["final"]:
            r["final"] = r["final"] | {"value": quality(found["metric"], r["final"]["value"], None, None, None)["value"]}
        if r["behind"]:
            r["behind"] = r["behind"] | {k: factor * r["behind"][k] for k in ("difference", "low", "high")}
        rows.append({k: v for k, v in r.items() if k not in ("items", "evaluation", "methods")})
    return found | {"rows": rows, "metric": shown}


def words(row: dict) -> str:
    """What stands beside the glyph of the state."""
    status = row["status"]
    if status == "running" and row.get("left_seconds") is not None:
        return f"{formats.clock(row['left_seconds'])} left"
    if status == "failed" and row.get("error"):
        kind = str(row["error"].get("kind") or "Failed")
        return (kind[:1].upper() + kind[1:]) if kind not in ("unknown", "run failed", "input") else "Failed"
    return status[:1].upper() + status[1:]


def why(row: dict) -> str:
    """The longer word on a state, for its tool tip."""
    if row.get("error"):
        return " ".join(str(row["error"].get(k) or "") for k in ("cause", "remedy")).strip()
    return row.get("message") or ""


def stage(settings, families: dict) -> dict:
    """A stage in short: its family and its name with the setting that matters most."""
    settings = {"method": settings} if isinstance(settings, str) else settings
    method = settings.get("method", "?")
    family, name = families.get(method, ("", method))
    short = {"int8": "int8", "int4": "int4"}.get(method, name)
    if isinstance(settings.get("rank"), int):
        short += f" r{formats.NB}{settings['rank']}"
    for share in ("sparsity", "heads"):
        if isinstance(settings.get(share), (int, float)) and not isinstance(settings[share], bool):
            short += f" {100 * settings[share]:.0f}{formats.NB}%"
            break
    return {"family": "full" if method == "full" else family, "text": short, "method": method}


def chips(home) -> dict:
    """Counts on the filter chips."""
    from workbench import query
    count = lambda text: home.store.count_runs(**query.parse(text).filters())  # noqa: E731
    return {"starred": count("is:starred"), "week": count(WEEK), "active": count("is:active"), "tags": list(home.store.tags().items())[:2]}


def _data(row: dict) -> str | None:
    data = row["spec"].get("data")
    return data.get("source") if isinstance(data, dict) else data


def fields(rows: list[dict], specs: list[dict]) -> list[dict]:
    """Settings with a mark on the minor ones: a default that one run has only because another method stands there."""
    written = {f"pipeline.{i}.{key}" for spec in specs for i, s in enumerate(spec.get("pipeline") or ()) if isinstance(s, dict) for key in s}
    out = []
    for r in rows:
        used = {json.dumps(v, sort_keys=True) for v in r["values"] if v is not None}
        minor = r["field"].startswith("pipeline.") and not r["field"].endswith(".method") and r["field"] not in written and len(used) < 2
        out.append({"name": r["label"], "values": r["values"], "auto": r["auto"], "minor": minor})
    return out


# -- curves --------------------------------------------------------------------------------------------------------
def marks(home, run_id: int, x: str) -> list[dict]:
    """Evaluations of a run as points with intervals on the axis ``x`` (step or seconds; elsewhere their place is not recorded)."""
    if x not in ("step", "seconds"):
        return []
    out = []
    for e in home.store.evaluations(run_id):
        if e["value"] is None or e["name"] == "base" or e["stage"] < 0:
            continue
        found = quality(e["metric"], e["value"], e["low"], e["high"], None)
        out.append({"x": e["step"] if x == "step" else e["t"], "y": found["value"], "low": found["low"], "high": found["high"]})
    return sorted(out, key=lambda p: p["x"])


def overlay(found: dict, wanted: str | None, evaluations, metrics: set = frozenset()) -> dict:
    """The answer of ``compare`` for one quantity: loss where there is one, unless another is asked for."""
    offered = [name for name in ("loss", "metric", "loss_eval") if found["series"].get(name)]
    y = wanted if wanted in offered else (offered[0] if offered else "loss")
    shown = {c["id"]: c for c in found["series"].get(y, ())}
    bands = {b["ids"][0]: b for b in found["bands"].get(y, ())}
    runs = []
    for run in found["runs"]:
        run_id = run["id"]
        curve = shown.get(run_id, {"x": [], "value": []})
        # a metric is its evaluations: markers with intervals say more than a line through them
        points = evaluations(run_id) if y == "metric" else []
        runs.append({"id": run_id, "name": run["name"], "slot": run["slot"], "x": [] if points else curve["x"],
                     "y": [] if points else curve["value"], "evaluations": points, "band": bands.get(run_id), "front": True})
    main = {m for m in metrics if m}
    one = quality(main.pop(), None, None, None, None)["metric"] if len(main) == 1 else ""
    unit = one if y == "metric" else "nats/token" if one == "bits/byte" else "nats"
    return {"series": [{"id": s, "name": NAMES[s]} for s in offered], "y": y, "name": NAMES.get(y, y), "unit": unit, "runs": runs, "base": None,
            "missing": found["missing"]}


# -- Pareto --------------------------------------------------------------------------------------------------------
def points(found: dict, rows: dict[int, dict], families: dict) -> dict:
    """The answer of ``workbench.compare.pareto`` as the plot draws it; the limit only where all runs had the same."""
    out = []
    for p in found["points"]:
        text = ", ".join(stage(s, families)["text"] for s in rows[p["id"]]["spec"].get("pipeline") or ()) or "evaluation only"
        figures = quality(found["metric"], p["y"], p["y_low"], p["y_high"], None)
        out.append({"id": p["id"], "name": p["name"], "slot": p["slot"], "text": text, "x": p["x"], "y": figures["value"],
                    "low": figures["low"], "high": figures["high"], "front": p["front"], "near": p["near"]})
    limits = {entry["value"] for entry in found["limits"] if entry["axis"] == "x"}
    return {"points": out, "metric": quality(found["metric"], None, None, None, None)["metric"], "limit": limits.pop() if len(limits) == 1 else None}

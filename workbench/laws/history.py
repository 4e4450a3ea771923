"""What this database's runs say to the laws: one point for each run, loss curves with their learning rates, per-item scores."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from engines.errors import InputError
from workbench.laws.points import Points

MOST = 400
"""Runs that are looked at, newest first."""
ENDED = ("finished", "stopped")


@dataclass
class Curve:
    """A logged curve: float64 arrays of one length in order of step."""

    name: str
    step: object
    value: object
    lr: object = None
    """Learning rate of every optimizer step from 1 to the last, float64 [steps]; None where none is logged."""
    run: int | None = None
    metric: str = "loss"
    notes: list[str] = field(default_factory=list)
    unit: str = "nats per token"
    seconds: float | None = None
    planned: int | None = None
    """Steps that the run is meant to have; None when it has ended or a clock decides."""
    progress: float | None = None


@dataclass
class Scores:
    """Per-item scores of several models on the same items."""

    names: list[str]
    matrix: object
    """float64 [models, items]."""
    weights: object = None
    """float64 [items], or None."""
    metric: str = "accuracy"
    source: str = "runs"
    notes: list[str] = field(default_factory=list)


def select(home, query: str, states=ENDED) -> list[dict]:
    """Rows of the runs that a query, or a list of numbers such as ``3, 4 7``, names.

    Raises:
        InputError: the query cannot be read.
        StorageError: a run that is named by number does not exist.
    """
    from workbench import query as language

    query = (query or "").strip()
    if query and re.fullmatch(r"[#\d,\s]+", query):
        ids = [int(i) for i in re.findall(r"\d+", query)]
        return [home.store.light(i) for i in dict.fromkeys(ids)]
    filters = language.parse(query).filters()
    filters["status"] = filters["status"] or states
    return home.store.runs(**filters, limit=MOST, order="-id")


def source_of(row: dict) -> str:
    data = (row["spec"] or {}).get("data")
    return data.get("source", "") if isinstance(data, dict) else str(data)


def alike(rows: list[dict]) -> tuple[list[dict], list[str]]:
    """The rows of the commonest data and metric: losses on different texts do not belong to one law."""
    keys = Counter((source_of(r), r["metric"]) for r in rows)
    if len(keys) <= 1:
        return rows, []
    (data, metric), count = keys.most_common(1)[0]
    return (
        [r for r in rows if (source_of(r), r["metric"]) == (data, metric)],
        [f"Only the {count} runs on {data} ({metric}) were used, of {len(rows)}: losses on different data do not compare."],
    )


def points(home, query: str = "", need: tuple[str, ...] = ("parameters", "tokens", "loss")) -> Points:
    """One row for each finished run that trained.

    Returns:
        columns parameters, tokens, loss (nats), seconds (of training), flops, bits (per weight), sparsity (of the block weights),
        trainable, error (1 - accuracy, where that is the metric), steps, step_seconds, batch, length, layers, hidden, mlp, heads,
        kv_heads, vocab; nan where a run does not tell.

    Raises:
        InputError: no run of the query has what the law needs.
    """
    import numpy as np

    rows = [r for r in select(home, query) if r["value"] is not None]
    rows, notes = alike(rows)
    names = (
        "parameters",
        "tokens",
        "loss",
        "seconds",
        "flops",
        "bits",
        "sparsity",
        "trainable",
        "error",
        "steps",
        "step_seconds",
        "batch",
        "length",
        "layers",
        "hidden",
        "mlp",
        "heads",
        "kv_heads",
        "vocab",
    )
    made, labels, adapted = {n: [] for n in names}, [], 0
    for row in rows:
        found = _point(home, row)
        if found is None or any(not (found.get(n) and found[n] > 0) for n in need):
            continue
        adapted += bool(found.pop("adapted"))
        for n in names:
            made[n].append(float("nan") if found.get(n) is None else float(found[n]))
        labels.append(row["name"])
    if not labels:
        raise InputError(
            "runs",
            query or "all",
            f"no finished run here has {_and(need)}",
            "Train a few models first, give points of your own, or use the published constants",
        )
    if adapted:
        notes.append(
            f"{adapted} of {len(labels)} runs adapted a trained model: their tokens are only those of the adaptation, which the law of "
            "training from scratch does not describe."
        )
    return Points({n: np.array(v) for n, v in made.items()}, labels, "runs", notes)


def _and(names) -> str:
    words = [n.replace("_", " ") for n in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _point(home, row: dict) -> dict | None:
    store = home.store
    footprint = store.footprint(row["id"]) or {}
    resolved = (store.forecast(row["id"]) or {}).get("resolved") or row["spec"] or {}
    training = resolved.get("training") or {}
    last = next((e for e in reversed(store.evaluations(row["id"])) if e["stage"] >= 0), None)
    if last is None or not footprint.get("tokens"):
        return None
    ended = [e["data"] for e in store.events(row["id"], kind="stage", limit=100) if e["data"].get("steps")]
    found = {
        "parameters": row["parameters"] or footprint.get("parameters"),
        "tokens": footprint["tokens"],
        "steps": footprint.get("steps"),
        "trainable": footprint.get("trainable"),
        "sparsity": footprint.get("sparsity") or 0.0,
        "bits": footprint.get("bits_per_weight"),
        "loss": (last["extra"] or {}).get("loss"),
        "error": 1 - last["value"] if last["metric"] == "accuracy" else None,
        "seconds": sum(e.get("seconds") or 0.0 for e in ended) or row["seconds"],
        "batch": training.get("batch"),
        "length": training.get("length"),
        "adapted": True,
    }
    if found["parameters"]:
        found["flops"] = 6.0 * found["parameters"] * found["tokens"]
    found |= shape(row["spec"].get("model"), found)
    scratch = any(s.get("from_scratch") is True for s in resolved.get("pipeline") or () if isinstance(s, dict))
    found["adapted"] = found["adapted"] and not scratch
    found["step_seconds"] = _step_seconds(store, row["id"])
    return found


def shape(source, found: dict | None = None) -> dict:
    """Layers, widths and vocabulary of a model source; empty when it can no longer be read."""
    from workbench import sources

    try:
        model = sources.profile(source)
    except Exception:  # the folder may be gone, the hub unreachable; the run's other figures remain
        return {}
    return {
        "layers": model.layers,
        "hidden": model.hidden,
        "mlp": model.mlp,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "vocab": model.vocab if model.task == "causal-lm" else 0,
        "adapted": model.has_weights,
    }


def _step_seconds(store, run_id: int) -> float | None:
    """Median seconds of an optimizer step, its parts added."""
    import numpy as np

    parts = store.all_points(run_id, names=("time/data", "time/forward", "time/backward", "time/step"))
    if len(parts) < 4:
        return None
    n = min(len(p["value"]) for p in parts.values())
    if n < 3:
        return None
    total = sum(np.array([np.nan if v is None else v for v in p["value"][:n]], float) for p in parts.values())
    return float(np.nanmedian(total[1:]))


# -- curves ------------------------------------------------------------------------------------------------------------
def curve(home, run, series: str = "loss") -> Curve:
    """A run's curve with its learning rates; of several training stages the last.

    Raises:
        InputError: the run has too few points of this series.
    """
    import numpy as np

    store = home.store
    run_id = store.run_id(run)
    row = store.light(run_id)
    got = store.all_points(run_id, names=(series, "lr", "tokens"))
    line = got.get(series, {"step": [], "value": [], "t": []})
    keep = [(s, v, t) for s, v, t in zip(line["step"], line["value"], line["t"]) if v is not None]
    if len(keep) < 3:
        raise InputError("runs", row["name"], f"it has {len(keep)} points of {series}", "Choose a run that trained for longer")
    step, value, t = (np.array(a, float) for a in zip(*keep))
    rates, notes = got.get("lr"), []
    lr = None
    if rates and rates["step"]:
        at, height = np.array(rates["step"], float), np.array(rates["value"], float)
        lr = np.interp(np.arange(1, int(max(at[-1], step[-1])) + 1), at, height)
        begin = last_stage(lr)
        if begin:
            notes.append(f"{row['name']} has more than one training stage; the curve begins at step {begin + 1}.")
            lr, kept = lr[begin:], step > begin
            step, value, t = step[kept] - begin, value[kept], t[kept]
    forecast = store.forecast(run_id) or {}
    planned = None
    if row["status"] not in ("finished", "stopped", "failed", "lost"):
        planned = (row["spec"].get("budget") or {}).get("steps") or forecast.get("steps")
        if row["progress"] and len(step):
            planned = max(int(step[-1]), round(float(step[-1]) / row["progress"])) if row["progress"] > 0.02 else planned
    unit = row["metric"] if series == "metric" else "nats per token" if row["metric"] == "bits/byte" else "nats"
    return Curve(
        row["name"],
        step,
        value,
        lr,
        run_id,
        row["metric"] if series == "metric" else series,
        notes,
        unit or "",
        float(t[-1] - t[0]) if len(t) > 1 else None,
        planned,
        row["progress"],
    )


def last_stage(lr) -> int:
    """Index at which the last warm-up began: where a fallen learning rate jumps down to a small one and climbs again."""
    import numpy as np

    if len(lr) < 10:
        return 0
    peak = np.maximum.accumulate(lr)
    rising = np.flatnonzero((lr[1:-1] < 0.5 * peak[1:-1]) & (lr[2:] > lr[1:-1] * 1.5) & (lr[:-2] <= peak[1:-1]))
    starts = [int(i) + 1 for i in rising if i > 5 and lr[i + 2 : i + 200].max(initial=0) > 5 * max(lr[i + 1], 1e-12)]
    return starts[-1] if starts and len(lr) - starts[-1] > 5 else 0


def curves(home, query: str, series: str = "loss", most: int = 4) -> list[Curve]:
    """Curves of one model, data, pipeline and batch: those of the newest run of the query and of the runs like it.

    With ``most`` fewer than there are, curves of different schedules come first: two that fall alike tell little.

    Raises:
        InputError: no run has a curve with learning rates.
    """
    found, first, left = [], None, 0
    for row in [r for r in select(home, query) if r["metric"]][:60]:
        key = _setting(home, row)
        if first is not None and key != first:
            left += 1
            continue
        try:
            one = curve(home, row["id"], series)
        except InputError:
            continue
        if one.lr is not None and len(one.step) >= 20:
            first = key
            found.append(one)
    if not found:
        raise InputError(
            "runs", query or "all", "no finished run here has a loss curve with 20 steps or more", "Train once, or give a curve"
        )
    if left:
        found[0].notes.append(
            f"{left} further runs have another model, data, pipeline or batch; the law's constants belong to one."
        )
    found.sort(key=lambda c: -len(c.step))
    kinds: dict = {}
    for one in found:
        kinds.setdefault(round(float(one.lr[-1] / one.lr.max()), 1) > 0.5, []).append(one)
    chosen = [c for pair in zip(*kinds.values()) for c in pair] if len(kinds) > 1 else []
    return (chosen + [c for c in found if c not in chosen])[:most]


def _setting(home, row: dict) -> tuple:
    """What must be equal for two curves to follow one law."""
    resolved = (home.store.forecast(row["id"]) or {}).get("resolved") or {}
    training = {**(row["spec"].get("training") or {}), **(resolved.get("training") or {})}
    stages = tuple(s if isinstance(s, str) else s.get("method") for s in row["spec"].get("pipeline") or ())
    return row["spec"].get("model"), source_of(row), stages, training.get("batch"), training.get("length")


# -- per-item scores ---------------------------------------------------------------------------------------------------
def scores(home, query: str = "") -> Scores:
    """Scores of the final evaluations over the same items, of the largest group of runs that share them.

    Raises:
        InputError: fewer than two runs share their items.
    """
    import numpy as np

    store, groups = home.store, {}
    for row in select(home, query):
        last = next((e for e in reversed(store.evaluations(row["id"])) if e["stage"] >= 0), None)
        if last is not None and last["n"] > 1:
            groups.setdefault((last["items_hash"], last["metric"], last["n"]), []).append((row, last["id"], source_of(row)))
    if not groups:
        raise InputError("runs", query or "all", "no finished run here has per-item scores", "Finish a few runs on one data set")
    (_, metric, n), members = max(groups.items(), key=lambda kv: (len(kv[1]), kv[0][2]))
    if len(members) < 2:
        raise InputError("runs", query or "all", "no two runs were scored on the same items", "Finish two runs on the same data")
    rows, weights = [], None
    for _, evaluation, _ in members:
        found, weights = store.scores(evaluation)
        rows.append(np.asarray(found, float))
    left = sum(len(m) for m in groups.values()) - len(members)
    notes = [f"{left} further runs were scored on other items and are left out."] if left else []
    return Scores(
        [r["name"] for r, _, _ in members],
        np.array(rows),
        None if weights is None else np.asarray(weights, float),
        metric,
        "runs",
        [f"{n} items of {members[0][2]}.", *notes],
    )

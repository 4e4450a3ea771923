"""Adapters of several runs added to their common model: a run of its own, with its parents' data to be scored on."""

from __future__ import annotations

import json

from engines import registry
from engines.errors import InputError
from workbench.spec import RunSpec

LEAST = 2


def spec(ids, weights=None, name: str | None = None, *, home) -> RunSpec:
    """The run that merges the runs ``ids`` (numbers or names).

    Args:
        weights: one number for each run, one for all, or None for 1.

    Raises:
        InputError: fewer than two runs, one without an adapter, or runs of other models.
    """
    rows = [home.store.run(home.store.run_id(i)) for i in ids]
    if len({r["id"] for r in rows}) < max(LEAST, len(rows)):
        raise InputError("runs", ", ".join(r["name"] for r in rows) or "none", "a merge takes two different runs or more", "Choose at least two")
    for row in rows:
        if not (home.folder(row["id"]) / "adapter" / "adapter_config.json").is_file():
            raise InputError("runs", row["name"], _why(row), "Choose runs of LoRA's kind without pruning before it, such as lora or orthogonal-adaptation")
        if row["spec"]["model"] != rows[0]["spec"]["model"]:
            raise InputError("runs", row["name"], f"it adapts {row['spec']['model']}, {rows[0]['name']} {rows[0]['spec']['model']}",
                             "Choose runs that began with the same model")
    shares = [1.0] if weights is None else [weights] if isinstance(weights, (int, float)) else list(weights)
    if len(shares) not in (1, len(rows)):
        raise InputError("weights", ", ".join(f"{w:g}" for w in shares), f"{len(rows)} runs take as many weights, or one for all", "Give them in the order of the runs")
    resolved = (rows[0]["forecast"] or {}).get("resolved") or rows[0]["spec"]
    kept = {k: v for k, v in (resolved.get("training") or {}).items() if k in ("length", "items", "precision", "loss_chunk")}
    stage = dict(method="merge-adapters", adapters=";".join(str(home.folder(r["id"]) / "adapter") for r in rows),
                 weights=";".join(f"{w:g}" for w in shares), data=json.dumps([r["spec"]["data"] for r in rows]))
    tree = dict(model=rows[0]["spec"]["model"], data=rows[0]["spec"]["data"], pipeline=[stage], training=kept, seed=rows[0]["spec"].get("seed", 0),
                note="Merged from " + ", ".join(f"{r['name']} (run {r['id']})" for r in rows))
    if rows[0]["spec"].get("task"):
        tree["task"] = rows[0]["spec"]["task"]
    if name:
        tree["name"] = name
    return RunSpec.from_dict(tree)


def _why(row: dict) -> str:
    """Why a run has nothing that could be added, in words."""
    if row["status"] not in ("finished", "stopped"):
        return f"it is {row['status']} and has left no adapter"
    methods = [s if isinstance(s, str) else s.get("method") for s in row["spec"].get("pipeline") or ()]
    cards = [registry.methods()[m].card.name for m in methods if m in registry.methods()]
    return f"its stages ({', '.join(cards) or 'none'}) left no separate adapter that could be added"


def start(ids, weights=None, name: str | None = None, *, home) -> dict:
    """Queue the merge as a run and return its row; raises as ``spec`` and ``runs.start`` do."""
    from workbench import runs
    made = spec(ids, weights, name, home=home)
    return runs.start(made, parent=home.store.run_id(ids[0]), home=home)


def figures(run_id: int, home) -> dict:
    """What the merge found: ``parents`` (alone and merged on each one's data), ``overlap`` and ``crosstalk`` by matrix; empty before its end."""
    try:
        return json.loads((home.folder(run_id) / "merge.json").read_text())
    except (OSError, ValueError):
        return {}

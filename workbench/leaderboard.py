"""The leaderboard of adaptation methods that comes with Fettle: every method tuned alike in the same arena; torch-free.

``assets/leaderboard.json`` is written by ``python -m benchmarks.adaptation``. Its figures were measured by the makers of Fettle; nothing
here measures.
"""

from __future__ import annotations

import json
from pathlib import Path

from engines import registry
from engines.errors import InputError

FILE = Path(__file__).resolve().parent.parent / "assets" / "leaderboard.json"
COMMAND = "python -m benchmarks.adaptation --arena {}"
SIDES = ("steps", "seconds")
"""A figure is read after equal steps, or after the seconds that LoRA needs for them."""
COSTS = ("pace", "peak", "trainable")
"""What a figure may cost: seconds a step (LoRA = 1), peak memory above the loaded model, trained parameters."""


def arenas(file: Path | None = None) -> list[dict]:
    """What was measured, best first after equal steps; empty where this copy has no leaderboard.

    Returns:
        for each arena: id, title, setting (a sentence), seeds, metric, lower (small is good), date, machine, command, reference (seconds
        a step of LoRA), failed (name and reason) and rows. A row: id, method, name, short (name without its brackets), form, family, use (the stage as the command line
        writes it), rate, trainable, seconds_a_step, pace, peak, gradients, optimizer (bytes), ``steps`` and ``seconds`` (value, low and
        high over the seeds, tier, rank, steps; None where not measured) and ``front`` (side -> cost -> no other row is better in both).
        Rows of methods that this copy lacks are left out.
    """
    try:
        kept = json.loads((file or FILE).read_text())
    except (OSError, ValueError):
        return []
    return [_arena(id, found, kept) for id, found in kept.get("arenas", {}).items()]


def arena(id: str, file: Path | None = None) -> dict:
    """One arena of ``arenas``.

    Raises:
        InputError: there is none of this id.
    """
    found = {a["id"]: a for a in arenas(file)}
    if id not in found:
        remedy = registry.suggestion(id, found) if found else "This copy comes without a leaderboard"
        raise InputError("arena", id, "the leaderboard has no such arena", remedy)
    return found[id]


def ordered(rows: list[dict], side: str) -> list[dict]:
    """Best first at equal steps or seconds; what was not measured there comes last."""
    return sorted(rows, key=lambda row: (row[side] is None, row[side]["rank"] if row[side] else 0))


def _arena(id: str, found: dict, kept: dict) -> dict:
    known, setting = registry.methods(), found.get("setting", {})
    whole = [row for row in found["rows"] if "error" not in row and _method(row) in known]
    metric = whole[0]["metric"] if whole else ""
    lower, seeds = "accuracy" not in metric, setting.get("seeds", kept.get("seeds"))
    reference = next((row.get("seconds a step") for row in whole if row["method"] == "lora"), None)
    rows = [_row(row, known, reference) for row in whole]
    for side in SIDES:
        able = sorted((row for row in rows if row[side]), key=lambda row: row[side]["value"], reverse=not lower)
        for rank, row in enumerate(able, 1):
            row[side]["rank"] = rank
        for cost in COSTS:
            front = _front([(row["id"], row[cost], row[side]["value"] if lower else -row[side]["value"]) for row in able if row[cost] is not None])
            for row in rows:
                row["front"].setdefault(side, {})[cost] = row["id"] in front
    failed = [{"name": _name(row, known), "reason": row["error"]} for row in found["rows"] if "error" in row and _method(row) in known]
    return {"id": id, "title": found.get("title") or id, "setting": _sentence(setting), "seeds": seeds, "metric": metric, "lower": lower,
            "date": found.get("date", kept.get("date", "")), "machine": _machine(found.get("machine") or kept.get("machine") or {}),
            "command": COMMAND.format(id), "steps": setting.get("steps"), "reference": reference, "failed": failed, "rows": ordered(rows, "steps")}


def _method(row: dict) -> str:
    """A row's label is a method's id, with a form of it behind a space where it has several."""
    return row["method"].partition(" ")[0]


def _name(row: dict, known: dict) -> str:
    return " ".join(filter(None, (known[_method(row)].card.name, row["method"].partition(" ")[2])))


def _row(row: dict, known: dict, reference: float | None) -> dict:
    id = _method(row)
    step = row.get("seconds a step")
    chosen = {k: v for k, v in row.get("stage", {}).items() if k != "method" and v != "auto"}
    sides = {side: None if row.get(side) is None else {
        "value": row[side], "low": row.get(f"{side} from"), "high": row.get(f"{side} to"), "tier": row.get(f"{side} tier", ""),
        "steps": row.get(f"{side} n")} for side in SIDES}
    return {"id": row["method"], "method": id, "name": known[id].card.name, "short": known[id].card.name.partition(" (")[0], "form": row["method"].partition(" ")[2], "family": known[id].card.family,
            "use": id + "".join(f"{':' if not i else ','}{k}={json.dumps(v) if isinstance(v, bool) else v}" for i, (k, v) in enumerate(chosen.items())),
            "rate": row.get("rate"), "trainable": row.get("trainable"), "seconds_a_step": step, "pace": step / reference if step and reference else None,
            "peak": row.get("peak"), "gradients": row.get("gradients"), "optimizer": row.get("optimizer"), **sides, "front": {}}


def _front(points: list[tuple]) -> set:
    """Ids of the points (id, cost, loss) that no other point beats or equals in both, better in one."""
    return {id for id, x, y in points if not any(a <= x and b <= y and (a < x or b < y) for _, a, b in points)}


def _sentence(setting: dict) -> str:
    """The setting in words."""
    if not setting:
        return ""
    limit = setting["trainable"]
    share = f"{limit:.0%} of the parameters" if limit < 1 else f"{limit:,} parameters"
    head = f"the new head's set to {setting['head_lr']:g} for all, " if setting.get("head_lr") else ""
    return (f"{setting['model']} on {setting['data']}: {setting['steps']} steps of batch {setting['batch']} × {setting['length']} tokens in "
            f"{setting['precision']}, at most {share} trained where the method has a lever for it, each method's learning rate searched alike, "
            f"{head}told on {setting['items']} held-out items that the search did not see")


def _machine(found: dict) -> str:
    parts = (found.get("processor"), f"{found['cores']} cores" if found.get("cores") else "", f"torch {found['torch']}" if found.get("torch") else "")
    return ", ".join(filter(None, parts))

"""Which pipelines are worth a forecast: every method alone, then the sensible orders of the best of them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engines import registry
from engines.errors import InputError
from engines.method import AUTO, Method

GRID = {"sparsity": (0.5, 0.7), "rank": (8, 32), "heads": (0.25, 0.5), "channels": (0.25, 0.5)}
"""Values tried where no limit of the budget decides; fields that move together keep the same place in their lists."""
ADAPT, PRUNE, SHRINK, PACK = 3, 3, 2, 3
"""How many methods of a role take part in combinations."""


@dataclass(frozen=True)
class Role:
    """What a method can do in a pipeline; a method may have several roles."""

    adapts: bool
    prunes: bool
    shrinks: bool
    packs: bool


def role(cls: type[Method]) -> Role:
    card = cls.card
    return Role(card.trains and not card.packs, card.masks and not card.trains, card.shrinks, card.packs)


def variants(cls: type[Method], budget) -> list[dict]:
    """Stages of one method: levers on ``auto`` where the budget has their limit, a few values where nothing decides.

    Args:
        budget: ``engines.budget.Budget``.
    """
    fields = {f["name"]: f for f in cls.hyperparameters()}
    set_limits = budget.limits()
    stage: dict = {"method": cls.card.id}
    free: dict[str, tuple] = {}
    for name, field in fields.items():
        if field["lever"] and (field["lever"] in set_limits or field["default"] == AUTO):
            stage[name] = AUTO
        if name in GRID and not (field["lever"] and field["lever"] in set_limits):
            stage.pop(name, None)
            free[name] = tuple(v for v in GRID[name] if _allowed(field, v))
    rows = [stage]
    if free:
        count = max(len(v) for v in free.values())
        rows = [{**stage, **{n: v[min(i, len(v) - 1)] for n, v in free.items() if v}} for i in range(count)] or rows
    return [r for r in rows if _builds(r)] or [{"method": cls.card.id}]


def _allowed(field: dict, value) -> bool:
    if field["choices"] is not None:
        return value in field["choices"]
    if isinstance(value, int) and isinstance(field["default"], float):
        value = float(value)
    low, high = field["low"], field["high"]
    return (low is None or value >= low) and (high is None or value <= high)


def _builds(stage: dict) -> bool:
    try:
        registry.build(stage)
    except InputError:
        return False
    return True


def singles(budget) -> list[tuple[dict, ...]]:
    """Each registered method alone; first variants first, for a search that may run out of time."""
    rows = [variants(cls, budget) for cls in registry.methods().values()]
    return [(row[i],) for i in range(max(map(len, rows))) for row in rows if i < len(row)]


def combinations(best: dict[str, list[dict]]) -> list[tuple[dict, ...]]:
    """Adapt then pack; prune, recover, pack; prune then pack or recover; shrink likewise.

    Args:
        best: stages by role (``adapt``, ``prune``, ``shrink``, ``pack``), the most promising first.
    """
    adapt, pack = best.get("adapt", ())[:ADAPT], best.get("pack", ())[:PACK]
    remove = [*best.get("prune", ())[:PRUNE], *best.get("shrink", ())[:SHRINK]]
    rows: list[tuple[dict, ...]] = [(a, p) for a in adapt for p in pack]
    rows += [(r, a) for r in remove for a in adapt[:2]]
    # Before a packing stage the size limit is not the removing stage's alone to keep: fixed shares instead of its lever.
    fixed = [stage for r in remove for stage in _fixed(r)]
    rows += [(r, p) for r in fixed for p in pack[:2]]
    rows += [(r, a, p) for r in fixed for a in adapt[:2] for p in pack[:2]]
    return rows


def _fixed(stage: dict) -> list[dict]:
    levers = [name for name, value in stage.items() if value == AUTO and name in GRID and name != "rank"]
    if not levers:
        return [stage]
    return [{**stage, **{n: GRID[n][i] for n in levers}} for i in range(len(GRID[levers[0]]))]


def smallest(profile) -> list[tuple[dict, ...]]:
    """Pipelines with every lever on size at its end: how small this model can get at all."""
    packs, shrinks = [], []
    for cls in registry.methods().values():
        stage: dict = {"method": cls.card.id}
        for f in cls.hyperparameters():
            if f["lever"] != "size_mb":
                continue
            numbers = [c for c in f["choices"] or () if isinstance(c, (int, float)) and not isinstance(c, bool)]
            if numbers:
                stage[f["name"]] = max(numbers) if f["name"] == "group" else min(numbers)
            elif f["choices"] and "int8" in f["choices"]:
                stage[f["name"]] = "int8"
            elif f["high"] is not None and f["high"] <= 1:
                stage[f["name"]] = 0.95 if f["high"] >= 0.95 else f["high"]
        if cls.card.packs:
            packs.append(stage)
        elif cls.card.shrinks:
            shrinks.append(stage)
    return [(p,) for p in packs] + [(s,) for s in shrinks] + [(s, p) for s in shrinks for p in packs]


def short(method: Method) -> str:
    """``LoRA rank 8``: a stage in a few words."""
    name, values = method.card.name, []
    defaults = {f["name"]: f["default"] for f in type(method).hyperparameters()}
    for field in ("sparsity", "rank", "bits", "heads", "channels"):
        value = getattr(method, field, None)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if field == "bits" and field in defaults or field in ("sparsity", "rank"):
            values.append({"sparsity": f"{100 * value:g} %", "rank": f"rank {value}", "bits": f"{value:g} bits"}[field])
        elif field in ("heads", "channels") and value:
            values.append(f"{field} −{100 * value:g} %")
    return f"{name} {', '.join(values)}".strip()


def compact(method: Method) -> dict:
    """The stage with what differs from its defaults."""
    defaults = {f["name"]: f["default"] for f in type(method).hyperparameters()}
    return {"method": method.card.id, **{k: v for k, v in method.settings().items() if k != "method" and v != defaults.get(k)}}

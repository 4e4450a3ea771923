"""Votes given on the Try page: kept with texts and settings, and what they say so far."""

from __future__ import annotations

from engines.errors import InputError
from workbench.tryout import resolve


def vote(home, *, prompt: str, refs: list[str], winner: int | None, seed: int, texts: list[str], blind: bool, settings: dict) -> int:
    """Keep one comparison with its text and settings.

    Args:
        refs: the variants in the order in which ``texts`` stand. winner: index into it, or None for a tie.
        blind: whether names were hidden when the vote was given; only such votes count as preference.
    """
    if winner is not None and not 0 <= winner < len(refs):
        raise InputError("winner", winner, "not one of the variants shown", f"Choose 0 to {len(refs) - 1}, or a tie")
    chosen = [resolve(home, ref) for ref in refs]
    rows = [{k: v.get(k) for k in ("ref", "name", "text", "slot", "kind")} for v in chosen]
    agrees = _agrees(home, chosen, winner)
    return home.store.put_vote(prompt, rows, None if winner is None else chosen[winner]["name"], seed, texts,
                               {"blind": bool(blind), "settings": settings, "held_out": agrees})


def _agrees(home, chosen: list[dict], winner: int | None) -> dict | None:
    """Whether the held-out figure of the winner is the best one; None where the figures are not of the same data and metric."""
    if winner is None or len(chosen) < 2:
        return None
    runs = [v for v in chosen if v["kind"] == "run"]
    if not runs or len({(v["data"], v["metric"], v["model"]) for v in runs}) != 1:
        return None
    figures = [v["value"] if v["kind"] == "run" else (runs[0]["base_value"] if v["model"] == runs[0]["model"] else None) for v in chosen]
    if any(f is None for f in figures):
        return None
    higher = runs[0]["metric"] == "accuracy"
    best = (max if higher else min)(figures)
    return {"agrees": figures[winner] == best, "by": abs(figures[winner] - best), "metric": runs[0]["metric"]}


def votes(home, limit: int = 50) -> dict:
    """The kept comparisons, newest first, with their number and the preference so far (blind votes only)."""
    rows = home.store.votes(limit=100_000)
    return {"total": len(rows), "rows": rows[:limit], "preference": preference(rows)}


def preference(rows: list[dict]) -> list[dict]:
    """Share of the blind votes that each variant won, where it took part, with Wilson's 95 % interval.

    Returns:
        rows of ref, name, slot, wins, n, share, low, high; best share first. A tie counts as a vote that nobody won.
    """
    tally: dict[str, dict] = {}
    for row in rows:
        if not (row.get("extra") or {}).get("blind"):
            continue
        for variant in row["variants"]:
            entry = tally.setdefault(variant["ref"], {**variant, "wins": 0, "n": 0})
            entry["n"] += 1
            entry["wins"] += variant["name"] == row["winner"]
    for entry in tally.values():
        entry["share"], entry["low"], entry["high"] = wilson(entry["wins"], entry["n"])
    return sorted(tally.values(), key=lambda e: (-e["share"], -e["n"], e["name"]))


def wilson(wins: int, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """Share and its 95 % interval (Wilson, "Probable Inference, the Law of Succession, and Statistical Inference")."""
    if n == 0:
        return 0.0, 0.0, 1.0
    p, middle = wins / n, (wins / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, max(0.0, middle - half), min(1.0, middle + half)

"""``compare --at``: the tables that the command prints."""

from __future__ import annotations

from workbench import equal
from workbench.cli_shared import table


def read(given: list[str], runs: list, y: str, home) -> list[dict]:
    """One reading for each ``--at``; all of them are checked before the first is read."""
    wanted = [equal.parse(text) for text in given]
    return [equal.equal(runs, axis, value, y, home=home) for axis, value in wanted]


def show(found: dict) -> None:
    """One reading in lines for people."""
    print(found["text"])
    percent = found["y"] == "quality" and found["metric"] == "accuracy"
    figure = (lambda v: f"{100 * v:.1f}") if percent else (lambda v: f"{v:.4f}")
    name = equal.QUANTITIES[found["y"]]
    if found["y"] == "quality" and found["metric"]:
        name = "accuracy %" if percent else found["metric"]

    def shown(row):
        if row["value"] is None:
            return f"({row['state']})"
        return figure(row["value"]) + (f" [{figure(row['low'])}, {figure(row['high'])}]" if row["low"] is not None else "")

    def at(row):
        return "" if row["spent"] is None else f"{row['spent']:,.4g}" if row["spent"] < 1e4 else f"{row['spent']:,.0f}"

    def behind(row):
        if not row["behind"]:
            return ""
        b, factor = row["behind"], 100 if percent else 1
        p = f"p = {b['p']:.2g}" if b["p"] >= 0.001 else "p < 0.001"
        return f"{factor * b['difference']:+.4g} [{factor * b['low']:+.4g}, {factor * b['high']:+.4g}], {p}"

    spent = found["kind"] == "spent"
    table(
        [(r["tier"] or "", r["id"], r["name"], r["pipeline"], shown(r), at(r), (f"{r['age']:,.4g}" if r["age"] is not None else "") if spent
          else "", behind(r), r["note"]) for r in found["rows"]],
        ("tier", "run", "name", "pipeline", name, f"evaluated at {found['unit']}" if spent else f"{found['axis']} {found['unit']}",
         f"age {found['unit']}" if spent else "", "to the best", "note"),
    )

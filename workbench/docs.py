"""docs/METHODS.md from the cards of the registered methods: ``python -m workbench.docs`` writes it, a test holds it current."""

from __future__ import annotations

from pathlib import Path

from engines.method import FAMILIES, SWITCH
from engines.registry import methods, switches

PAGE = Path(__file__).resolve().parent.parent / "docs" / "METHODS.md"
TITLES = dict(adaptation="Adaptation", pruning="Pruning and sparse training", quantization="Quantization", kv_cache="KV-cache compression",
              distillation="Distillation", switch="Switches of the training loop")


def page() -> str:
    """The text of docs/METHODS.md."""
    lines = ["# Methods", "", "Generated from the methods' own cards by `python -m workbench.docs`; do not edit by hand.", ""]
    for family in (*FAMILIES, SWITCH):
        members = [c for c in (*methods().values(), *switches().values()) if c.card.family == family]
        if not members:
            continue
        lines += [f"## {TITLES[family]}", ""]
        for cls in members:
            lines += _one(cls)
    return "\n".join(lines).rstrip() + "\n"


def _one(cls) -> list[str]:
    card = cls.card
    lines = [f"### {card.name} (`{card.id}`)", "", card.summary, "", f"- Paper: {card.title}{f' ({card.year})' if card.year else ''}"]
    facts = [text for flag, text in ((card.trains, "trains"), (card.masks, "leaves a mask that later stages keep"), (card.shrinks, "shrinks tensors"),
                                     (card.packs, "packs weights, so it comes last")) if flag]
    if card.family == SWITCH:
        lines.append(f"- Switched on beside any stage that trains: `training: {{switches: [{card.id}]}}`, or `--switch {card.id}`")
    if facts:
        lines.append("- In a pipeline: " + "; ".join(facts))
    for title, entries in (("Needs", card.needs), ("Cannot", card.cannot)):
        if entries:
            lines.append(f"- {title}: " + "; ".join(entries))
    for architecture, why in card.refuses.items():
        lines.append(f"- Refuses {architecture}: {why}")
    if card.differs:
        lines.append(f"- Differs: {card.differs}")
    rows = cls.hyperparameters()
    if rows:
        lines += ["", "| field | default | range | lever | what it does |", "|---|---|---|---|---|"]
        for row in rows:
            span = ", ".join(map(str, row["choices"])) if row["choices"] else _span(row)
            lines.append(f"| `{row['name']}` | {row['default']} | {span} | {row['lever'] or ''} | {row['help']} |".replace("\n", " "))
    return [*lines, ""]


def _span(row: dict) -> str:
    if row["low"] is None and row["high"] is None:
        return ""
    return f"{row['low']} to {row['high']}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE} written")

"""Tables that people give: CSV or JSON, read into columns of numbers with one-sentence errors."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import InputError
from engines.registry import suggestion
from workbench.laws.base import Card, quantity

LARGEST = 5_000_000
"""Bytes of a table; points of a law are few, so anything larger is a mistake."""
SAME = {
    "n": "parameters",
    "params": "parameters",
    "d": "tokens",
    "l": "loss",
    "time": "seconds",
    "c": "flops",
    "compute": "flops",
    "bit": "bits",
    "final_loss": "loss",
    "val_loss": "loss",
    "learning_rate": "lr",
    "err": "error",
}
TEXT = ("name", "curve", "run", "label")


@dataclass
class Points:
    """Columns of equal length; ``labels`` name the rows."""

    columns: dict
    """Name to float64 array."""
    labels: list[str] = field(default_factory=list)
    source: str = "points"
    notes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    """Which curve each row belongs to, where the table holds several."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str):
        return self.columns[name]

    def get(self, name: str):
        return self.columns.get(name)

    def keep(self, mask) -> Points:
        """The rows where ``mask`` is true."""
        import numpy as np

        mask = np.asarray(mask, bool)
        return Points(
            {k: v[mask] for k, v in self.columns.items()},
            [x for x, m in zip(self.labels, mask) if m],
            self.source,
            list(self.notes),
            [x for x, m in zip(self.groups, mask) if m],
        )


def load(source: str | Path) -> str:
    """Text of a points file.

    Raises:
        InputError: there is no such file, it is too large or not text.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError("points", str(source), "there is no such file", "Give a CSV or JSON file with one row for each run")
    if path.stat().st_size > LARGEST:
        raise InputError(
            "points", str(source), f"larger than {LARGEST // 1_000_000} MB", "Give one row for each run, not for each step"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("points", str(source), "not a text file", "Save it as CSV or JSON in UTF-8") from None


def rows_of(text: str) -> list[dict]:
    """Rows of a CSV (comma, semicolon or tab; a first line of names) or JSON text (list of objects, or object of lists).

    Raises:
        InputError: neither, or empty.
    """
    text = text.strip()
    if not text:
        raise InputError("points", "", "the table is empty", "Give a first line of column names and one line for each run")
    if len(text) > LARGEST:
        raise InputError(
            "points", text[:20], f"longer than {LARGEST // 1_000_000} MB", "Give one row for each run, not for each step"
        )
    if text[0] in "[{":
        try:
            tree = json.loads(text)
        except ValueError as e:
            raise InputError("points", text[:40], f"not valid JSON ({e})", "Check commas and quotes there") from None
        if isinstance(tree, dict):
            tree = tree.get("points", tree)
        if isinstance(tree, dict):
            sizes = {len(v) for v in tree.values() if isinstance(v, list)}
            if len(sizes) != 1 or not all(isinstance(v, list) for v in tree.values()):
                raise InputError(
                    "points", list(tree)[:5], "the columns are not lists of one length", "Give as many values in each column"
                )
            tree = [dict(zip(tree, values)) for values in zip(*tree.values())]
        if not isinstance(tree, list) or not tree or not all(isinstance(r, dict) for r in tree):
            raise InputError(
                "points",
                text[:40],
                "not a list of objects",
                'Write for example [{"parameters": 5e6, "tokens": 1e8, "loss": 3.1}]',
            )
        return tree
    first = text.splitlines()[0]
    mark = max(",;\t", key=first.count)
    rows = list(csv.reader(io.StringIO(text), delimiter=mark))
    heads = [h.strip() for h in rows[0]]
    found = [dict(zip(heads, (c.strip() for c in row))) for row in rows[1:] if any(c.strip() for c in row)]
    if not found:
        raise InputError("points", first[:60], "there is no row below the column names", "Add one line for each run")
    return found


def table(text: str, card: Card, source: str = "points") -> Points:
    """The columns that a law needs.

    Raises:
        InputError: a column is missing or holds something that is not a positive number; the text names line and column.
    """
    import numpy as np

    rows = rows_of(text)
    wanted = {c.name: c for c in card.columns}
    heads = {}
    for name in rows[0]:
        plain = str(name).strip().lower().replace(" ", "_").replace("-", "_")
        heads[plain if plain in wanted or plain in TEXT else SAME.get(plain, plain)] = name
    for column in card.columns:
        if column.required and column.name not in heads:
            close = suggestion(column.name, [str(h) for h in rows[0]])
            raise InputError(
                "points", ", ".join(str(h) for h in rows[0])[:60], f"the column {column.name} ({column.help}) is missing", close
            )
    columns = {}
    for name in wanted:
        if name not in heads:
            continue
        values = []
        for line, row in enumerate(rows, start=2):
            cell = row.get(heads[name])
            number = quantity(cell) if cell not in (None, "") else None
            if number is None and (wanted[name].required or cell not in (None, "")):
                raise InputError(f"points, row {line - 1}, {name}", cell, "not a number", "Give a number such as 5.3M or 1e8")
            if number is not None and number < 0:
                raise InputError(f"points, row {line - 1}, {name}", cell, "below zero", "Give a number above zero")
            values.append(np.nan if number is None else number)
        columns[name] = np.array(values, float)
    name = next((heads[t] for t in ("name", "run", "label") if t in heads), None)
    labels = [str(r.get(name)) if name else f"row {i}" for i, r in enumerate(rows, 1)]
    groups = [str(r.get(heads["curve"])) for r in rows] if "curve" in heads else []
    return Points(columns, labels, source, groups=groups)


def positive(points: Points, *names: str) -> Points:
    """Only rows where every named column is finite and above zero; a note says how many were left out."""
    import numpy as np

    keep = np.ones(len(points), bool)
    for name in names:
        keep &= np.isfinite(points[name]) & (points[name] > 0)
    if keep.all():
        return points
    left = points.keep(keep)
    left.notes.append(f"{int((~keep).sum())} of {len(points)} rows were left out: {', '.join(names)} must be above zero.")
    return left

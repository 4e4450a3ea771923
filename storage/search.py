"""Finding runs: free words (FTS5 over name, tags, note and the values of the settings) and single settings."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable

from storage.codec import decode, leaves

OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "~")
NUMBERS = ("id", "slot", "created", "queued", "started", "ended", "progress", "priority", "starred", "archived", "base_value", "value",
           "value_low", "value_high", "n", "seconds", "peak_bytes", "size_bytes", "trainable", "parameters", "tokens_per_second",
           "parent", "stage", "left_seconds")
TEXTS = ("name", "status", "metric", "host", "phase", "note", "message")


def _text(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        value = int(value)
    return str(value).lower()[:200]


def _number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def index(db: sqlite3.Connection, run_id: int) -> None:
    """Write the facets and words of one run anew, inside the caller's transaction."""
    name, tags, note, spec = db.execute("SELECT name, tags, note, spec FROM runs WHERE id = ?", (run_id,)).fetchone()
    tags, found = decode(tags, []), list(leaves(decode(spec, {})))
    db.execute("DELETE FROM facets WHERE run_id = ?", (run_id,))
    rows = [(run_id, path, leaf, _text(value), None if isinstance(value, str) else _number(value))
            for path, leaf, value in found if path not in ("name", "note", "tags")]
    rows += [(run_id, "tags", "tag", _text(tag), None) for tag in tags]
    db.executemany("INSERT INTO facets (run_id, path, leaf, text, number) VALUES (?, ?, ?, ?, ?)", rows)
    db.execute("DELETE FROM run_search WHERE rowid = ?", (run_id,))
    words = " ".join(f"{leaf} {value}" if isinstance(value, (int, float)) else str(value) for _, leaf, value in found)
    db.execute("INSERT INTO run_search (rowid, name, tags, note, settings) VALUES (?, ?, ?, ?, ?)",
               (run_id, name, " ".join(map(str, tags)), note, words))


def forget(db: sqlite3.Connection, run_id: int) -> None:
    """Remove a run from the search tables, inside the caller's transaction."""
    db.execute("DELETE FROM facets WHERE run_id = ?", (run_id,))
    db.execute("DELETE FROM run_search WHERE rowid = ?", (run_id,))


def match(words: str) -> str | None:
    """The FTS5 expression for free words: each must occur, the beginning of a word is enough; None: nothing to look for."""
    terms = [w for w in words.replace('"', " ").split() if re.search(r"\w", w)]
    return " AND ".join(f'"{w}"*' for w in terms) or None


def condition(name: str | Iterable[str], operator: str, value) -> tuple[str, list]:
    """SQL and arguments for one comparison with a run's column or with a setting.

    Args:
        name: a column of a run (``seconds``), the last key of a setting (``minutes``), its dotted path without
            positions (``budget.minutes``, ``pipeline.rank``), or several of these of which one must fit.
        operator: one of ``= != < <= > >=``, or ``~``: begins with.
        value: a text or a number, or several of these of which one must fit (none may, for ``!=``).

    Raises:
        ValueError: unknown operator, or an order comparison with something that is not a number.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}")
    names = (name,) if isinstance(name, str) else tuple(name)
    parts, arguments = [], []
    for one in names:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            sql, given = _one(one, operator, each)
            parts.append(sql)
            arguments += given
    return "(" + (" AND " if operator == "!=" else " OR ").join(parts) + ")", arguments


def _one(name: str, operator: str, value) -> tuple[str, list]:
    number = _number(value)
    if operator in ("<", "<=", ">", ">=") and number is None:
        raise ValueError(f"{name} {operator} needs a number, not {value!r}")
    if name in NUMBERS or name in TEXTS:
        column = f"r.{name}"
        if operator == "~" or (name in TEXTS and operator in ("=", "!=")):
            pattern = str(value).replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + ("%" if operator == "~" else "")
            return f"coalesce({column}, '') {'NOT ' if operator == '!=' else ''}LIKE ? ESCAPE '\\'", [pattern]
        return f"{column} {operator} ?", [number if number is not None else str(value)]
    key = "path" if "." in name else "leaf"
    found = f"r.id {'NOT ' if operator == '!=' else ''}IN (SELECT run_id FROM facets WHERE {key} = ? AND "
    if operator in ("=", "!="):
        if number is not None and not isinstance(value, bool):
            return found + "(text = ? OR number = ?))", [name, _text(value), number]
        return found + "text = ?)", [name, _text(value)]
    if operator == "~":
        low = _text(value)
        return found + "text >= ? AND text < ?)", [name, low, low + "\U0010ffff"]
    return found + f"number {operator} ?)", [name, number]

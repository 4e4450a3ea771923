"""The query language of the run table: ``data:python-docs minutes:2 method:lora status:finished free words``.

``key:value`` compares a column or a setting; also ``key:>1``, ``key:<=2``, ``key:1..4``, ``key:a,b`` (one of them), ``key:beg*``
(begins with), ``-key:value`` (not). ``tag:x``, ``is:starred``, ``is:archived``, ``is:active``, ``age:<7d``, ``#12`` and free words,
each of which must begin a word of the name, a tag, the note or a setting. Quotes keep spaces: ``tag:"first try"``.
"""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import dataclass, field

from engines.errors import InputError
from engines.registry import suggestion
from storage import ACTIVE, FINAL, STATES
from storage.runs import COLUMNS

# name in a query -> (column or setting(s), factor to the stored unit)
NAMES: dict[str, tuple] = {
    "data": (("data", "data.source"), 1), "method": ("pipeline.method", 1), "model": ("model", 1), "seed": ("seed", 1),
    "tag": ("tag", 1), "quality": ("value", 1), "size": ("size_bytes", 1e6), "peak": ("peak_bytes", 1e9), "time": ("seconds", 1),
    "memory": ("budget.memory_gb", 1), "minutes": ("budget.minutes", 1), "steps": ("budget.steps", 1), "tokens": ("budget.tokens", 1),
    "speed": ("tokens_per_second", 1), "id": ("id", 1),
}
SORTS = {"quality": "value", "size": "size_bytes", "peak": "peak_bytes", "time": "seconds", "speed": "tokens_per_second", "age": "-created"}
AGES = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
HIDDEN = ("spec", "error", "tags", "log_path", "folder", "owner", "pid", "pid_started", "host", "heartbeat")


@dataclass
class Query:
    """A parsed query, as the filters of ``Store.runs``."""

    words: list[str] = field(default_factory=list)
    where: list[tuple] = field(default_factory=list)
    ids: list[int] | None = None
    status: tuple[str, ...] | None = None
    archived: bool | None = False

    def filters(self) -> dict:
        """Keyword arguments for ``Store.runs`` and ``Store.count_runs``."""
        return {"search": " ".join(self.words) or None, "where": self.where, "ids": self.ids, "status": self.status,
                "archived": self.archived}


def parse(text: str) -> Query:
    """Read a query.

    Raises:
        InputError: an order comparison without a number, an unknown state or ``is:``, a range with no ends.
    """
    query = Query()
    for token in _tokens(text):
        if re.fullmatch(r"#\d+", token):
            query.ids = [*(query.ids or []), int(token[1:])]
            continue
        found = re.fullmatch(r"(-?)([\w.]+):(.+)", token, re.S)
        if not found or found.group(2) in ("http", "https"):
            query.words.append(token)
            continue
        _term(query, bool(found.group(1)), found.group(2).lower() if "." not in found.group(2) else found.group(2), found.group(3), token)
    return query


def _tokens(text: str) -> list[str]:
    lexer = shlex.shlex(text or "", posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.quotes, lexer.escape = True, "", '"', ""
    try:
        return list(lexer)
    except ValueError:  # a quote that is still being typed
        return (text or "").replace('"', " ").split()


def _term(query: Query, negated: bool, key: str, value: str, token: str) -> None:
    if key == "is":
        _is(query, negated, value, token)
        return
    if key == "age":
        found = re.fullmatch(r"([<>])(\d+(?:\.\d+)?)([mhdw])", value)
        if not found:
            raise InputError("query", token, "an age is compared with a number and m, h, d or w", "Write for example age:<7d")
        sign = "<" if (found.group(1) == ">") != negated else ">"
        query.where.append(("created", sign, time.time() - float(found.group(2)) * AGES[found.group(3)]))
        return
    if key == "status":
        states = tuple(value.lower().split(","))
        for state in states:
            if state not in STATES:
                raise InputError("query", token, "there is no such state", suggestion(state, STATES))
        chosen = tuple(s for s in STATES if (s in states) != negated)
        query.status = tuple(s for s in chosen if query.status is None or s in query.status) or ("none",)
        return
    name, factor = NAMES.get(key, (key, 1))
    for operator, operand in _comparisons(value, negated, token):
        if factor != 1:
            operand = [_number(v, token) * factor for v in operand] if isinstance(operand, list) else _number(operand, token) * factor
        query.where.append((name, operator, operand))


def _number(value, token: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError("query", token, "this is compared with a number", "Write for example size:<10 or minutes:1..4") from None


def _comparisons(value: str, negated: bool, token: str):
    """Pairs of operator and operand that must all hold."""
    order = re.fullmatch(r"(<=|>=|<|>)(.+)", value)
    if order:
        operator = {"<": ">=", ">": "<=", "<=": ">", ">=": "<"}[order.group(1)] if negated else order.group(1)
        return [(operator, _number(order.group(2), token))]
    span = re.fullmatch(r"(-?[\d.eE+-]*?)\.\.(-?[\d.eE+-]*)", value)
    if span and (span.group(1) or span.group(2)):
        if negated:
            raise InputError("query", token, "a range cannot be turned round", "Write two comparisons, such as minutes:<1")
        return [(operator, _number(end, token)) for operator, end in ((">=", span.group(1)), ("<=", span.group(2))) if end]
    if value.endswith("*") and not negated:
        return [("~", value[:-1])]
    values = [v for v in value.split(",") if v]
    return [("!=" if negated else "=", values if len(values) > 1 else value)]


def _is(query: Query, negated: bool, value: str, token: str) -> None:
    if value == "starred":
        query.where.append(("starred", "=", int(not negated)))
    elif value == "archived":
        query.archived = not negated
    elif value in ("active", "final"):
        states = ACTIVE if value == "active" else FINAL
        query.status = tuple(s for s in STATES if (s in states) != negated)
    else:
        raise InputError("query", token, "there is no such mark", "Write is:starred, is:archived, is:active or is:final")


def order(sort: str | None) -> str:
    """The order for ``Store.runs`` of a column, a short name (quality, size, peak, time, speed, age), with ``-`` for descending.

    Raises:
        InputError: there is no such column.
    """
    sort = (sort or "-created").strip()
    down, name = sort.startswith("-"), sort.lstrip("-")
    column = SORTS.get(name, name)
    if column.startswith("-"):
        down, column = not down, column[1:]
    if column not in COLUMNS or column in HIDDEN:
        raise InputError("sort", sort, "the table has no column of this name",
                         suggestion(name, [c for c in (*COLUMNS, *SORTS) if c not in HIDDEN]))
    return ("-" if down else "") + column

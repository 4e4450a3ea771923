"""Rows of a data set before any tokenizer has seen them; torch-free."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from engines.errors import InputError

TEXT_COLUMNS = ("text", "content", "sentence", "code", "document", "prompt", "question", "query", "body", "review")
LABEL_COLUMNS = ("label", "labels", "category", "class", "intent", "target", "y")
IMAGE_COLUMNS = ("image", "img", "picture")


@dataclass
class Rows:
    """One part of a data set. ``labels`` are indices into ``Table.labels``; exactly one of ``texts`` and ``images`` is set."""

    texts: list[str] | None = None
    images: list | None = None
    """numpy uint8 arrays [height, width, channels]."""
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.images)

    def take(self, indices) -> Rows:
        pick = lambda column: None if column is None else [column[i] for i in indices]  # noqa: E731
        return Rows(pick(self.texts), pick(self.images), pick(self.labels))


@dataclass
class Table:
    """A data set with its parts. ``documents``: training texts are long and are packed; ``fingerprint`` identifies the content."""

    source: str
    task: str
    train: Rows
    evaluation: Rows
    labels: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    text_column: str | None = None
    label_column: str | None = None

    def __post_init__(self):
        if len(self.train) == 0:
            raise InputError("data", self.source, "the data set is empty", "Give data with at least one training row")
        if len(self.evaluation) == 0:
            raise InputError("data", self.source, f"nothing is left for evaluation of {len(self.train)} rows",
                             "Give more rows or a larger data.split")

    @property
    def fingerprint(self) -> str:
        """Hash of the evaluation part: two runs are compared item by item only when it agrees."""
        digest = hashlib.sha256()
        for text in self.evaluation.texts or ():
            digest.update(text.encode("utf-8", "replace") + b"\0")
        for image in self.evaluation.images or ():
            digest.update(image.tobytes())
        digest.update(repr(self.evaluation.labels).encode())
        return digest.hexdigest()[:16]


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same split on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def pick_column(columns: list[str], asked: str | None, known: tuple[str, ...], what: str, source: str) -> str | None:
    """The column asked for, or the first of the usual names.

    Raises:
        InputError: a column was asked for that does not exist.
    """
    if asked is not None:
        if asked not in columns:
            raise InputError(f"data.{what}", asked, f"{source} has no such column",
                             "Its columns are " + ", ".join(map(str, columns)))
        return asked
    lower = {str(c).lower(): c for c in columns}
    return next((lower[name] for name in known if name in lower), None)


def split_rows(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Training and evaluation rows; a row's part depends on its content, so a longer file keeps earlier choices."""
    keys = rows.texts if rows.texts is not None else [hashlib.sha256(i.tobytes()).hexdigest() for i in rows.images]
    held = [i for i, key in enumerate(keys) if unit_hash(key) < share]
    if not held and len(keys) > 1:
        held = [min(range(len(keys)), key=lambda i: unit_hash(keys[i]))]
    chosen = set(held)
    return rows.take([i for i in range(len(keys)) if i not in chosen]), rows.take(held)

"""Data sets: bundled ids, local files and folders, hub ids. Reading is torch-free; ``tokens`` makes tensors."""

from __future__ import annotations

from pathlib import Path

from engines.data import bundled, files
from engines.data.table import Rows, Table, pick_column, split_rows
from engines.errors import InputError
from engines.registry import suggestion

__all__ = ["BUNDLED", "Rows", "Table", "describe", "load", "pick_column", "split_rows"]

BUNDLED = bundled.CARDS


def load(source: str, *, task: str = "auto", text: str | None = None, label: str | None = None, split: float = 0.1,
         limit: int | None = None) -> Table:
    """Read a data set.

    Args:
        source: bundled id, path of a file or folder, or hub id (``owner/name``).
        task: ``auto`` infers it from the columns.
        text, label: column names; None takes the usual ones.
        split: share held out where the source has no evaluation part.
        limit: at most this many training rows.

    Raises:
        InputError: it does not exist, is empty, or lacks the columns that the task needs.
    """
    if source in BUNDLED:
        table = bundled.load(source)
        if task == "causal-lm" and table.task == "text-classification":
            table = Table(source, task, Rows(table.train.texts), Rows(table.evaluation.texts), columns=table.columns, text_column=table.text_column)
        elif task not in ("auto", table.task):
            raise InputError("data", source, f"it is for {table.task}, not for {task}", "Choose data that the model's task can use")
    elif Path(source).expanduser().exists():
        table = files.load(source, text=text, label=label, split=split, task=task)
    elif "/" in source and not source.startswith((".", "/", "~")) and source.count("/") == 1 and "." not in source.rsplit("/", 1)[-1][-6:]:
        table = files.from_hub(source, text=text, label=label, split=split, task=task)
    else:
        looks_like_path = "/" in source or "." in source
        remedy = "Check the path" if looks_like_path else suggestion(source, BUNDLED) + ", or give a file, a folder or a hub id"
        raise InputError("data", source, "there is no such data", remedy)
    if task not in ("auto", table.task):
        raise InputError("data", source, f"it is for {table.task}, not for {task}", "Choose data that the model's task can use")
    if limit is not None and limit < len(table.train):
        step = len(table.train) / limit
        table = Table(table.source, table.task, table.train.take([int(i * step) for i in range(limit)]), table.evaluation,
                      table.labels, table.columns, table.warnings, table.text_column, table.label_column)
    return table


def describe(source: str, *, task: str = "auto", text: str | None = None, label: str | None = None, split: float = 0.1,
             rows: int = 5) -> dict:
    """What a person wants to see of a data set before using it; torch-free.

    Returns:
        source, task, columns, text_column, label_column, labels, train, evaluation (row counts), characters (of the
        training texts), bytes_evaluation, lengths (characters of each training text, at most 5,000 of them), rows
        (the first few, ``text`` / ``label`` / ``image`` as nested lists), warnings.
    """
    table = load(source, task=task, text=text, label=label, split=split)
    shown = []
    for i in range(min(rows, len(table.train))):
        row = {}
        if table.train.texts is not None:
            row["text"] = table.train.texts[i][:400]
        else:
            row["image"] = table.train.images[i].tolist() if table.train.images[i].size <= 4096 else list(table.train.images[i].shape)
        if table.train.labels is not None:
            row["label"] = table.labels[table.train.labels[i]]
        shown.append(row)
    lengths = [len(t) for t in table.train.texts] if table.train.texts is not None else []
    step = max(1, len(lengths) // 5000)
    return dict(source=source, task=table.task, columns=table.columns, text_column=table.text_column, label_column=table.label_column,
                labels=table.labels, train=len(table.train), evaluation=len(table.evaluation), characters=sum(lengths),
                evaluation_characters=sum(map(len, table.evaluation.texts or ())), lengths=lengths[::step], rows=shown,
                warnings=table.warnings)

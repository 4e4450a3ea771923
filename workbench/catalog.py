"""What there is to choose from: models, data and methods, as plain dicts for the page and the CLI; torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from engines import registry
from engines.errors import InputError
from engines.profile import BYTES, ModelProfile
from workbench import sources

INT4_GROUP = 32


def models() -> list[dict]:
    """The bundled models: id, title, architecture, task, parameters, dtype, size_bytes, card."""
    rows = []
    for id, folder in sources.bundled().items():
        try:
            rows.append(_model_row(id, folder, sources.profile(id)))
        except InputError as e:  # one damaged folder must not hide the others
            rows.append(
                {
                    "id": id,
                    "title": id,
                    "architecture": "",
                    "task": "",
                    "parameters": 0,
                    "dtype": "",
                    "size_bytes": 0,
                    "card": {},
                    "error": str(e),
                }
            )
    return rows


def _card(folder: Path | None) -> dict:
    try:
        return json.loads((folder / "card.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}


def _model_row(id: str, folder: Path | None, profile: ModelProfile) -> dict:
    card = _card(folder)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder else profile.stored_bytes
    return {
        "id": id,
        "title": card.get("title") or id,
        "architecture": profile.architecture,
        "task": profile.task,
        "parameters": profile.parameters,
        "dtype": profile.dtype,
        "size_bytes": size or profile.stored_bytes,
        "card": card,
    }


def model(source: str) -> dict:
    """The profile of any model source (bundled id, folder, hub id).

    Returns:
        the row of ``models`` plus source, kind, layers, hidden, heads, kv_heads, mlp, vocab, context, labels, tied, has_weights,
        roles and bytes_by_dtype (fp32, bf16, int8 and int4: matrices inside blocks packed, the rest as stored).

    Raises:
        InputError: the source cannot be used.
    """
    found, profile = sources.resolve(source), sources.profile(source)
    return {
        **_model_row(source, found.folder, profile),
        "source": source,
        "kind": found.kind,
        "layers": profile.layers,
        "hidden": profile.hidden,
        "heads": profile.heads,
        "kv_heads": profile.kv_heads,
        "mlp": profile.mlp,
        "vocab": profile.vocab,
        "context": profile.context,
        "labels": profile.labels,
        "tied": profile.tied,
        "has_weights": profile.has_weights,
        "roles": list(profile.roles),
        "bytes_by_dtype": bytes_by_dtype(profile),
    }


def bytes_by_dtype(profile: ModelProfile) -> dict[str, int]:
    """Weights in bytes for each precision; int8 with a scale per output row, int4 with a scale and zero per group of 32."""
    count, blocks = profile.parameters, profile.block_parameters
    rest = (count - blocks) * BYTES.get(profile.dtype, 4)
    rows = sum(m.out for m in profile.matrices)
    groups = sum(m.out * -(-m.inp // INT4_GROUP) for m in profile.matrices)
    return {"fp32": 4 * count, "bf16": 2 * count, "int8": blocks + 4 * rows + rest, "int4": blocks // 2 + 4 * groups + rest}


def data(counts: bool = True) -> list[dict]:
    """The bundled data sets: id, title, task, card and, unless ``counts`` is False, train, evaluation and labels.

    Counting reads the corpora, which takes about two seconds the first time.
    """
    from engines.data import BUNDLED

    if not counts:
        return [{"id": id, "title": card["title"], "task": card["task"], "card": dict(card)} for id, card in BUNDLED.items()]
    rows = []
    for id, card in BUNDLED.items():
        try:
            found = sources.description(id)
            figures = {"train": found["train"], "evaluation": found["evaluation"], "labels": len(found["labels"])}
        except InputError as e:  # a Python without its documentation still offers the other three
            figures = {"train": 0, "evaluation": 0, "labels": 0, "error": str(e)}
        rows.append({"id": id, "title": card["title"], "task": card["task"], **figures, "card": dict(card)})
    return rows


def data_card(id: str) -> dict:
    """Card and counts of a bundled data set.

    Raises:
        InputError: there is none of this id.
    """
    known = {row["id"]: row for row in data()}
    if id not in known:
        raise InputError("data", id, "there is no such bundled data", registry.suggestion(id, known))
    return known[id]


def preview(
    source: str,
    rows: int = 5,
    task: str | None = None,
    text: str | None = None,
    *,
    label: str | None = None,
    split: float = 0.1,
    model: str | None = None,
) -> dict:
    """What a person wants to see of a data set before using it.

    Args:
        rows: how many example rows, at most 48.
        model: a model source; lengths are then in its tokens, else in characters.

    Returns:
        source, task, columns, text_column, label_column, labels, rows, counts (train, evaluation, tokens, characters),
        lengths (histogram: edges, counts, unit, mean, longest, or None for images), warnings.

    Raises:
        InputError: the data cannot be used; the sentence names the columns that exist.
    """
    found = sources.description(source, task=task or "auto", text=text, label=label, split=split)
    counts = {"train": found["train"], "evaluation": found["evaluation"], "characters": found["characters"], "tokens": None}
    unit, lengths = "characters", list(found["lengths"])
    if model and lengths:
        ratio, _ = sources.characters_per_token(sources.profile(model), found)
        unit, lengths = "tokens", [max(1, round(n / ratio)) for n in lengths]
        counts["tokens"] = round(found["characters"] / ratio)
    return {
        "source": source,
        "task": found["task"],
        "columns": found["columns"],
        "text_column": found["text_column"],
        "label_column": found["label_column"],
        "labels": found["labels"],
        "rows": found["rows"][:rows],
        "counts": counts,
        "lengths": histogram(lengths, unit) if lengths else None,
        "warnings": list(found["warnings"]),
    }


def histogram(lengths: list[int], unit: str, bars: int = 24) -> dict:
    """Counts over equal steps up to the longest: edges (bars + 1), counts, unit, mean, median, longest."""
    ordered = sorted(lengths)
    # The last bar collects the longest hundredth, so that one outlier does not flatten the rest.
    top = max(1, ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
    width = max(1, -(-top // bars))
    counts = [0] * bars
    for n in ordered:
        counts[min(bars - 1, n // width)] += 1
    return {
        "edges": [i * width for i in range(bars + 1)],
        "counts": counts,
        "unit": unit,
        "mean": sum(ordered) / len(ordered),
        "median": ordered[len(ordered) // 2],
        "longest": ordered[-1],
    }


def methods() -> list[dict]:
    """Every registered method: the fields of its card and its hyperparameters."""
    return [method(id) for id in registry.methods()]


def switches() -> list[dict]:
    """Every switch of the training loop, in the form of ``methods``; its family is ``switch``."""
    return [method(id) for id in registry.switches()]


def method(id: str) -> dict:
    """Card and hyperparameters of one method or switch.

    Raises:
        InputError: there is none of this id.
    """
    cls = registry.described(id)
    card = cls.card
    return {
        "id": card.id,
        "name": card.name,
        "family": card.family,
        "title": card.title,
        "year": card.year,
        "summary": card.summary,
        "needs": list(card.needs),
        "cannot": list(card.cannot),
        "tasks": list(card.tasks),
        "refuses": dict(card.refuses),
        "trains": card.trains,
        "packs": card.packs,
        "shrinks": card.shrinks,
        "masks": card.masks,
        "differs": card.differs,
        "hyperparameters": cls.hyperparameters(),
    }


def presets() -> list[dict]:
    """The bundled specs: id, title (the first comment line of the file), yaml, spec (as a dict)."""
    from workbench.spec import PRESETS, RunSpec

    rows = []
    for path in sorted(PRESETS.glob("*.yaml"), key=lambda p: (p.stem != "example", p.stem)):
        text = path.read_text()
        first = text.splitlines()[0] if text else ""
        title = first.lstrip("# ").strip() if first.startswith("#") else path.stem
        try:
            rows.append({"id": path.stem, "title": title, "yaml": text, "spec": RunSpec.from_yaml(text).to_dict()})
        except InputError:  # a preset of a method that this installation lacks
            continue
    return rows

"""Local files and folders, and hub ids: csv, jsonl, json, parquet, txt, image folders."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from engines.data.table import IMAGE_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS, Rows, Table, pick_column, split_rows
from engines.errors import InputError

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".md", ".py")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
EVALUATION_NAMES = ("test", "eval", "evaluation", "validation", "valid", "dev")


def _read(path: Path) -> tuple[list[str], list[dict]]:
    """Columns and rows of one file.

    Raises:
        InputError: the file cannot be parsed, with the line where it can be told.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8-sig") as f:
                csv.field_size_limit(2**31 - 1)
                reader = csv.DictReader(f, delimiter="\t" if kind == ".tsv" else ",")
                rows = list(reader)
                return list(reader.fieldnames or []), rows
        if kind == ".jsonl":
            rows = []
            with open(path, encoding="utf-8") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        try:
                            row = json.loads(line)
                        except ValueError as e:
                            raise InputError("data", str(path), f"line {number} is not JSON ({e})", "Mend or remove that line") from None
                        rows.append(row if isinstance(row, dict) else {"text": str(row)})
            return list(rows[0]) if rows else [], rows
        if kind == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or (rows and not isinstance(rows[0], dict)):
                raise InputError("data", str(path), "not a list of objects", "Use JSON Lines, one object in each line")
            return list(rows[0]) if rows else [], rows
        if kind == ".parquet":
            import pyarrow.parquet as parquet
            table = parquet.read_table(path)
            return table.column_names, table.to_pylist()
        text = path.read_text(encoding="utf-8")
        return ["text"], [{"text": text}] if text.strip() else []
    except UnicodeDecodeError as e:
        raise InputError("data", str(path), f"not UTF-8 at byte {e.start}", "Save the file as UTF-8") from None
    except (OSError, ValueError, csv.Error) as e:
        if isinstance(e, InputError):
            raise
        raise InputError("data", str(path), f"it cannot be read as {kind[1:]} ({e})", "Check the file") from None
    except Exception as e:  # pyarrow raises its own family, which is not imported here
        if isinstance(e, InputError):
            raise
        raise InputError("data", str(path), f"it cannot be read as {kind[1:]} ({type(e).__name__})", "Check the file") from None


def _is_evaluation(path: Path) -> bool:
    words = path.stem.lower().replace("-", "_").replace(".", "_").split("_")
    return any(word in EVALUATION_NAMES for word in words)


def _sibling(path: Path) -> Path | None:
    """``x_test.csv`` beside ``x_train.csv``."""
    if "train" in path.stem.lower():
        for name in EVALUATION_NAMES:
            for other in (path.stem.replace("train", name), path.stem.lower().replace("train", name)):
                if path.with_name(other + path.suffix).is_file():
                    return path.with_name(other + path.suffix)
    return None


def load(source: str, *, text: str | None, label: str | None, split: float, task: str) -> Table:
    """A local file or folder as a table.

    Raises:
        InputError: unknown kind, unreadable, empty, or without the columns that the task needs.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if any(p.suffix.lower() in IMAGES for p in path.rglob("*")):
            return _image_folder(path, split)
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TABLES)
        if not files:
            raise InputError("data", source, "the folder holds neither tables, texts nor images",
                             "Put csv, jsonl, parquet, txt or images (one folder for each class) into it")
        held = [p for p in files if _is_evaluation(p)]
        files = [p for p in files if p not in held] or held
        held = held if files != held else []
    else:
        if path.suffix.lower() not in TABLES:
            raise InputError("data", source, f"files of the kind {path.suffix or 'without ending'} are not read",
                             "Give csv, tsv, jsonl, json, parquet, txt or a folder of images")
        sibling = _sibling(path)
        files, held = [path], [sibling] if sibling else []
    columns, rows = _read_all(files)
    held_rows = _read_all(held)[1]
    return from_rows(source, columns, rows, held_rows, text=text, label=label, split=split, task=task)


def _read_all(files) -> tuple[list[str], list[dict]]:
    columns, rows = [], []
    for file in files:
        found, more = _read(file)
        columns += [c for c in found if c not in columns]
        rows += more
    return columns, rows


def from_rows(source: str, columns: list[str], rows: list[dict], held: list[dict], *, text: str | None, label: str | None,
              split: float, task: str) -> Table:
    """A table from dict rows; task ``auto`` becomes classification when there is a label column with few values."""
    if not rows:
        raise InputError("data", source, "the data set is empty", "Give data with at least two rows")
    name = pick_column(columns, text, TEXT_COLUMNS, "text", source)
    label_name = pick_column(columns, label, LABEL_COLUMNS, "label", source)
    if name is None:
        strings = [c for c in columns if c != label_name and isinstance(rows[0].get(c), str)]
        # One column of strings leaves no choice; several need the person's word.
        if len(strings) != 1:
            raise InputError("data.text", None, f"{source} has no text column that can be told",
                             "Set data.text to one of " + ", ".join(map(str, columns)))
        name = strings[0]
    if task == "auto":
        values = {str(r.get(label_name)) for r in rows} if label_name else set()
        task = "text-classification" if label_name and 2 <= len(values) <= max(2, min(1000, len(rows) // 2)) else "causal-lm"
    warnings, kept, labels = [], [], None
    everything = rows + held
    texts = [r.get(name) for r in everything]
    blank = [i for i, t in enumerate(texts) if not isinstance(t, str) or not t.strip()]
    if blank:
        warnings.append(f"{len(blank)} rows without text in {name} were left out")
    missing = set(blank)
    names: list[str] = []
    if task == "text-classification":
        if label_name is None:
            raise InputError("data.label", None, f"{source} has no label column that can be told",
                             "Set data.label to one of " + ", ".join(map(str, columns)))
        values = [r.get(label_name) for r in everything]
        missing |= {i for i, v in enumerate(values) if v is None or v == ""}
        distinct = {str(v) for i, v in enumerate(values) if i not in missing}
        names = sorted(distinct, key=lambda v: (0, int(v), "") if v.lstrip("-").isdigit() else (1, 0, v))
        index = {v: i for i, v in enumerate(names)}
        labels = [index.get(str(v), -1) for v in values]
        if len(names) < 2:
            raise InputError("data.label", label_name, f"it has {len(names)} distinct value", "Choose a column with two or more labels")
    kept = [i for i in range(len(everything)) if i not in missing]
    pick = lambda part: Rows([texts[i] for i in part], None, [labels[i] for i in part] if labels else None)  # noqa: E731
    train = pick([i for i in kept if i < len(rows)])
    if held:
        evaluation = pick([i for i in kept if i >= len(rows)])
    elif task == "causal-lm" and len(train) < 20:
        train, evaluation = _split_documents(train, split)
    else:
        train, evaluation = split_rows(train, split)
    return Table(source, task, train, evaluation, labels=names, columns=[str(c) for c in columns], warnings=warnings,
                 text_column=name, label_column=label_name if task == "text-classification" else None)


def _split_documents(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """A few long texts: the end of each is held out, cut at a line."""
    train, held = [], []
    for text in rows.texts:
        at = text.rfind("\n", 0, int(len(text) * (1 - share)))
        at = at if at > len(text) // 2 else int(len(text) * (1 - share))
        train.append(text[:at])
        held.append(text[at:])
    return Rows([t for t in train if t.strip()]), Rows([t for t in held if t.strip()])


def _image_folder(path: Path, split: float) -> Table:
    """``folder/class/image.png`` or ``folder/train/class/...`` with ``folder/test/class/...``."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
    names = sorted({p.parent.name for p in files})
    if len(names) < 2 or path.name in names:
        raise InputError("data", str(path), "images must lie in one folder for each class", "Sort them into folders named after their label")
    parts, warnings = {False: Rows(None, [], []), True: Rows(None, [], [])}, []
    for file in files:
        try:
            with Image.open(file) as image:
                array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        except (UnidentifiedImageError, OSError):
            warnings.append(f"{file.name} is not a readable image and was left out")
            continue
        rows = parts[any(p.lower() in EVALUATION_NAMES for p in file.relative_to(path).parts[:-2])]
        rows.images.append(array if array.ndim == 3 else array[:, :, None])
        rows.labels.append(names.index(file.parent.name))
    train, held = parts[False], parts[True]
    if len(held) == 0 and len(train):
        train, held = split_rows(train, split)
    return Table(str(path), "image-classification", train, held, labels=names, columns=["image", "label"], warnings=warnings[:20],
                 label_column="label")


def from_hub(source: str, *, text: str | None, label: str | None, split: float, task: str) -> Table:
    """A data set from the hub by its id (``owner/name`` or ``owner/name:config``), through the ``datasets`` library.

    Raises:
        InputError: it is not there, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("data", source, "hub data needs the package datasets", "Run pip install datasets") from None
    name, _, config = source.partition(":")
    try:
        parts = datasets.load_dataset(name, config or None, trust_remote_code=False)
    except Exception as e:
        raise InputError("data", source, f"the hub gave no such data set ({type(e).__name__})",
                         "Check the id and the network, or give a local file") from None
    train = parts["train"] if "train" in parts else parts[next(iter(parts))]
    held = next((parts[n] for n in EVALUATION_NAMES if n in parts), None)
    columns = list(train.column_names)
    image = pick_column(columns, None, IMAGE_COLUMNS, "image", source)
    if image is not None and task in ("auto", "image-classification"):
        return _hub_images(source, train, held, image, pick_column(columns, label, LABEL_COLUMNS, "label", source), split)
    feature = train.features.get(label or pick_column(columns, label, LABEL_COLUMNS, "label", source) or "")
    named = getattr(feature, "names", None)
    rows, other = train.to_list(), held.to_list() if held is not None else []
    if named:
        column = label or pick_column(columns, label, LABEL_COLUMNS, "label", source)
        for row in rows + other:
            row[column] = named[row[column]] if isinstance(row[column], int) and 0 <= row[column] < len(named) else row[column]
    return from_rows(source, columns, rows, other, text=text, label=label, split=split, task=task)


def _hub_images(source, train, held, image: str, label: str | None, split: float) -> Table:
    import numpy as np

    if label is None:
        raise InputError("data.label", None, f"{source} has no label column that can be told", "Set data.label")
    def rows(part):
        arrays = [np.asarray(row[image].convert("L" if row[image].mode in ("1", "L") else "RGB")) for row in part]
        return Rows(None, [a if a.ndim == 3 else a[:, :, None] for a in arrays], [int(v) for v in part[label]])
    names = getattr(train.features[label], "names", None) or [str(i) for i in range(max(train[label]) + 1)]
    first = rows(train)
    first, second = (first, rows(held)) if held is not None else split_rows(first, split)
    return Table(source, "image-classification", first, second, labels=list(names), columns=[image, label], label_column=label)

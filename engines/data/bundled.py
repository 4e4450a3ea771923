"""Data that every Python installation carries: nothing is downloaded, nothing is shipped.

The split of each set depends on names or contents alone, so it is the same on every machine with the
same Python version.
"""

from __future__ import annotations

import ast
import functools
import gzip
import importlib.util
import inspect
import os
import sysconfig
import threading
from pathlib import Path

from engines.data.table import Rows, Table, unit_hash
from engines.errors import InputError

CARDS = {
    "python-code": dict(task="causal-lm", title="Source of the Python standard library",
                        text="Every module of the running Python's standard library, tests included; one module in twenty-five "
                             "is held out whole, together with the tests named after it."),
    "python-docs": dict(task="causal-lm", title="Reference prose of Python",
                        text="The language reference that pydoc carries as topics, cut into passages; whole topics are held out. "
                             "The shift from code to prose to which a code model is adapted."),
    "stdlib-modules": dict(task="text-classification", title="Which package does this docstring come from?",
                           text="Docstrings of functions and classes of ten standard-library packages, to be told apart."),
    "digits": dict(task="image-classification", title="Handwritten digits, 8 x 8",
                   text="1,797 grey images from scikit-learn (UCI optical recognition of handwritten digits)."),
}
PACKAGES = ("asyncio", "concurrent", "ctypes", "distutils", "email", "http", "idlelib", "importlib", "lib2to3", "logging",
            "multiprocessing", "tkinter", "unittest", "urllib", "xml")
_SKIP = ("site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "turtledemo", "ensurepip")


def load(name: str) -> Table:
    """One of the bundled sets by id."""
    return {"python-code": python_code, "python-docs": python_docs, "stdlib-modules": stdlib_modules, "digits": digits}[name]()


def _modules():
    """(path relative to the library, text) of every readable module, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in _SKIP]
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    for path in sorted(found):
        try:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def _is_test(name: str) -> bool:
    parts = name.split("/")
    return "test" in parts or "tests" in parts or parts[-1].startswith("test_")


@functools.lru_cache(maxsize=1)
def python_code() -> Table:
    """Modules as documents, held-out modules for evaluation."""
    train, held, names = [], [], set()
    modules = list(_modules())
    for name, text in modules:
        if not _is_test(name) and unit_hash(name) < 0.04 and len(text) > 400:
            held.append(text)
            names.add(name.rsplit("/", 1)[-1].removesuffix(".py"))
    chosen = set(held)
    for name, text in modules:
        # A test quotes the module that it tests, so the tests of held-out modules are held out as well.
        if text in chosen or len(text) < 40 or name.rsplit("/", 1)[-1].removesuffix(".py").removeprefix("test_") in names:
            continue
        train.append(text)
    return Table("python-code", "causal-lm", Rows(train), Rows(held), columns=["text"], text_column="text")


@functools.lru_cache(maxsize=1)
def python_docs() -> Table:
    """Passages of about 350 characters from pydoc's topics, whole topics held out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("data", "python-docs", "this Python has no pydoc topics", "Install Python's full standard library") from None
    paragraphs = {name: "\n".join(line.rstrip() for line in topics[name].splitlines()).strip().split("\n\n") for name in sorted(topics)}
    held_topics = {name for name in paragraphs if unit_hash(name) < 0.14}
    # Topics quote one another (compound statements hold the text of each): what is held out may not come back in training.
    known = {p.strip() for name in held_topics for p in paragraphs[name] if p.strip()}
    train, held = [], []
    for name, parts in paragraphs.items():
        if name in held_topics:
            held += _passages(parts)
        else:
            train += _passages([p for p in parts if p.strip() not in known])
    seen = set(held)
    train = [t for t in train if t not in seen]
    return Table("python-docs", "causal-lm", Rows(train), Rows(held), columns=["text"], text_column="text")


def _passages(paragraphs: list[str], size: int = 350) -> list[str]:
    """Neighbouring paragraphs joined up to about ``size`` characters."""
    out, passage = [], ""
    for paragraph in paragraphs:
        if passage and len(passage) + len(paragraph) > size:
            out.append(passage)
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    return out + [passage] if passage.strip() else out


_PARSING = threading.Lock()
"""CPython 3.11 counts the depth of all parsers of a process together: two that run at once fail ("AST constructor recursion depth mismatch")."""


def stdlib_modules() -> Table:
    """Docstrings labelled with their package; a docstring that occurs twice is kept once, split by content."""
    with _PARSING:
        return _stdlib_modules()


@functools.lru_cache(maxsize=1)
def _stdlib_modules() -> Table:
    seen, texts, labels = set(), [], []
    for name, text in _modules():
        package = name.split("/")[0]
        if package not in PACKAGES or _is_test(name):
            continue
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                doc = ast.get_docstring(node)
                if doc and 24 <= len(doc) and doc not in seen:
                    seen.add(doc)
                    texts.append(inspect.cleandoc(doc)[:1000])
                    labels.append(package)
    present = [p for p in PACKAGES if labels.count(p) >= 40]
    keep = [i for i, p in enumerate(labels) if p in present]
    rows = Rows([texts[i] for i in keep], None, [present.index(labels[i]) for i in keep])
    held = [i for i, t in enumerate(rows.texts) if unit_hash(t) < 0.2]
    chosen = set(held)
    return Table("stdlib-modules", "text-classification", rows.take([i for i in range(len(rows)) if i not in chosen]),
                 rows.take(held), labels=present, columns=["docstring", "package"], text_column="docstring", label_column="package")


@functools.lru_cache(maxsize=1)
def digits() -> Table:
    """8 x 8 grey images with values 0 to 255; one in four is held out."""
    import numpy as np

    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("data", "digits", "scikit-learn is not installed", "Install the packages of requirements.txt")
    # Read the file itself: importing scikit-learn costs a second and nothing else of it is needed.
    with gzip.open(Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz"), "rt") as f:
        values = np.loadtxt(f, delimiter=",", dtype=np.int64)
    images = [np.round(row[:64].reshape(8, 8, 1) * (255 / 16)).astype(np.uint8) for row in values]
    rows = Rows(None, images, [int(row[64]) for row in values])
    held = [i for i in range(len(rows)) if unit_hash(f"digit {i}") < 0.25]
    chosen = set(held)
    return Table("digits", "image-classification", rows.take([i for i in range(len(rows)) if i not in chosen]), rows.take(held),
                 labels=[str(d) for d in range(10)], columns=["image", "label"], label_column="label")

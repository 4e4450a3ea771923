"""Data: bundled sets, files of every kind, the sentences for what cannot be read."""

import json

import numpy as np
import pytest

from engines import data
from engines.errors import InputError


@pytest.mark.parametrize("name, task", [("python-code", "causal-lm"), ("python-docs", "causal-lm"), ("stdlib-modules", "text-classification"),
                                        ("digits", "image-classification")])
def test_bundled_sets_hold_out_what_is_not_trained_on(name, task):
    table = data.load(name)
    assert table.task == task and len(table.train) > len(table.evaluation) > 20
    if table.train.texts is not None:
        assert not set(table.train.texts) & set(table.evaluation.texts)
    assert table.fingerprint == data.load(name).fingerprint
    if table.labels:
        assert set(table.train.labels) == set(range(len(table.labels)))


def test_no_paragraph_of_the_held_out_topics_is_trained_on():
    table = data.load("python-docs")
    paragraphs = lambda rows: {p.strip() for t in rows.texts for p in t.split("\n\n") if len(p.strip()) > 20}  # noqa: E731
    assert not paragraphs(table.train) & paragraphs(table.evaluation)


def test_python_code_leaves_out_the_docs_and_the_tests_of_held_out_modules():
    table = data.load("python-code")
    from pydoc_data.topics import topics
    topic = max(topics.values(), key=len)[:400]
    assert not any(topic in text for text in table.train.texts)


@pytest.fixture
def rows():
    return [dict(text=f"sentence number {i} about {'cats' if i % 2 else 'dogs'}", label="cat" if i % 2 else "dog") for i in range(60)]


def write(path, rows):
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_tables_of_every_kind_give_the_same_rows(kind, rows, tmp_path):
    table = data.load(str(write(tmp_path / f"x.{kind}", rows)), task="text-classification")
    assert table.labels == ["cat", "dog"] and len(table.train) + len(table.evaluation) == 60
    assert all(table.labels[y] in t.replace("cats", "cat").replace("dogs", "dog") for t, y in zip(table.train.texts, table.train.labels))


def test_a_split_does_not_move_when_the_file_grows(rows, tmp_path):
    first = data.load(str(write(tmp_path / "a.csv", rows)), task="text-classification")
    more = rows + [dict(text=f"more {i}", label="cat") for i in range(30)]
    second = data.load(str(write(tmp_path / "b.csv", more)), task="text-classification")
    assert set(first.evaluation.texts) <= set(second.evaluation.texts)


def test_a_test_file_beside_the_training_file_is_the_evaluation(rows, tmp_path):
    write(tmp_path / "x_train.csv", rows)
    write(tmp_path / "x_test.csv", rows[:10])
    table = data.load(str(tmp_path / "x_train.csv"), task="text-classification")
    assert len(table.train) == 60 and len(table.evaluation) == 10


def test_one_long_text_keeps_its_end_for_evaluation(tmp_path):
    lines = [f"line {i}" for i in range(500)]
    (tmp_path / "book.txt").write_text("\n".join(lines))
    table = data.load(str(tmp_path / "book.txt"))
    assert table.task == "causal-lm" and "line 499" in table.evaluation.texts[0] and "line 0\n" in table.train.texts[0]


def test_image_folders_are_sorted_by_class(tmp_path):
    from PIL import Image
    for label in ("circle", "square"):
        (tmp_path / label).mkdir()
        for i in range(12):
            Image.fromarray(np.full((6, 6, 3), i * 9 + (100 if label == "square" else 0), np.uint8)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "square" / "broken.png").write_bytes(b"no image")
    table = data.load(str(tmp_path), split=0.3)
    assert table.task == "image-classification" and table.labels == ["circle", "square"]
    assert len(table.train) + len(table.evaluation) == 24 and any("broken" in w for w in table.warnings)


@pytest.mark.parametrize("content, name, options, words", [
    ("a,b\n1,2\n3,4\n", "x.csv", {}, "text column"), ("text,label\n", "x.csv", {}, "empty"), ("text\nhello\nworld\n", "x.csv", dict(text="body"), "no such column"),
    ("{not json}\n", "x.jsonl", {}, "line 1"), ("x", "x.docx", {}, "not read"), ("", "x.txt", {}, "empty"),
    ("text,label\nonly,one\nother,one\n", "x.csv", dict(task="text-classification"), "distinct")])
def test_what_cannot_be_used_is_said_in_one_sentence(content, name, options, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        data.load(str(tmp_path / name), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_data_names_what_there_is():
    with pytest.raises(InputError, match="python-docs"):
        data.load("python-doc")
    with pytest.raises(InputError, match="not for"):
        data.load("digits", task="causal-lm")


def test_two_threads_may_ask_for_the_parsed_library_at_once():
    """The page's warm-up and a request did: CPython 3.11 refuses two parsers of one process."""
    from concurrent.futures import ThreadPoolExecutor

    from engines.data import bundled
    bundled._stdlib_modules.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: bundled.stdlib_modules(), range(4)))
    assert all(f is found[0] for f in found) and len(found[0].train) > 1000

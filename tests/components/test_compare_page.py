"""What the Compare page asks of the workbench, without a browser."""

import base64
import io
import zipfile

import numpy as np
import pytest

from components import compare
from workbench.home import Home

SPEC = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "wanda", "sparsity": 0.5}, {"method": "lora", "rank": 8}, {"method": "int8"}],
        "budget": {"minutes": 2, "size_mb": 10}, "seed": 0}


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path)


@pytest.fixture
def ask(home, monkeypatch):
    """The server functions of the page by name."""
    found = {}
    monkeypatch.setattr(compare, "component", lambda name, server_functions, **_: found.update({f.__name__: f for f in server_functions}))
    compare.build(home)
    return found


def add(home, name, value=1.6, size=8_000_000, metric="bits/byte", noise=0.0, items="h", **spec):
    store = home.store
    run = store.create_run(SPEC | spec, name=name, status="finished", forecast={"memory": {"peak_bytes": 1e9}})
    scores = np.full(200, value) + np.random.default_rng(run).normal(0, noise, 200)
    if metric == "accuracy":
        scores = (np.arange(200) < 200 * value).astype(float)
    weights = np.full(200, 1 / np.log(2)) if metric == "bits/byte" else None
    store.put_evaluation(run, "final", 2, 30, 20.0, metric, value, value - 0.02, value + 0.02, 200, scores.astype(np.float32),
                         None if weights is None else weights.astype(np.float32), items)
    store.append(run, [("loss", s, 2.0 - 0.01 * s, s / 2) for s in range(1, 31)] + [("tokens", s, 100.0 * s, s / 2) for s in range(1, 31)])
    store.update_run(run, metric=metric, value=value, value_low=value - 0.02, value_high=value + 0.02, n=200, size_bytes=size, peak_bytes=9e8,
                     seconds=15.0, base_value=1.9, ended=100.0)
    store.put_footprint(run, {"speed": {"decode_tokens_per_second": 412.0}})
    return run


def rows(ask, query="", **given):
    return ask["table"]({"query": query, "sort": "-created", "page": 1, **given})


def test_a_row_says_what_the_table_shows(ask, home):
    run = add(home, "quiet-lathe")
    [row] = rows(ask)["rows"]
    assert (row["id"], row["name"], row["value"], row["metric"], row["base"]) == (run, "quiet-lathe", 1.6, "bits/byte", 1.9)
    assert [p["text"] for p in row["pipeline"]][1:] == ["LoRA r\u00a08", "int8"] and "50\u00a0%" in row["pipeline"][0]["text"]
    assert row["pipeline"][0]["family"] == "pruning" and row["ratio"] == pytest.approx(0.9)
    assert (row["speed"], row["speed_unit"]) == (412.0, "tok/s")


def test_accuracy_is_shown_in_per_cent(ask, home):
    add(home, "digits", value=0.95, metric="accuracy")
    [row] = rows(ask)["rows"]
    assert row["metric"] == "% accuracy" and row["value"] == pytest.approx(95) and row["low"] == pytest.approx(93)


def test_an_unchanged_table_is_answered_with_its_mark_alone(ask, home):
    add(home, "one")
    first = rows(ask)
    assert rows(ask, seen=first["mark"]) == {"same": first["mark"]}
    add(home, "two")
    assert len(rows(ask, seen=first["mark"])["rows"]) == 2


def test_fifty_rows_a_page_sorted_and_counted(ask, home):
    for i in range(53):
        home.store.create_run(SPEC, name=f"run-{i:02d}", status="queued")
    first, second = rows(ask, sort="name"), rows(ask, sort="name", page=2)
    assert [r["name"] for r in first["rows"]] == [f"run-{i:02d}" for i in range(50)] and len(second["rows"]) == 3
    assert (first["total"], first["pages"], first["active"]) == (53, 2, 53)


def test_seed_groups_are_one_row_with_the_mean(ask, home):
    ids = [add(home, f"s{s}", value=1.6 + 0.01 * s, seed=s) for s in range(3)]
    [row] = rows(ask, group=True)["rows"]
    assert row["value"] == pytest.approx(1.61) and sorted(row["seeds"]) == [0, 1, 2] and sorted(row["ids"]) == ids
    assert row["low"] < 1.6 and row["high"] > 1.62           # Student's t with two degrees of freedom is wide


def test_words_beside_the_glyph():
    assert compare.words({"status": "running", "left_seconds": 37.2}) == "0:37 left"
    assert compare.words({"status": "failed", "error": {"kind": "out of memory"}}) == "Out of memory"
    assert compare.words({"status": "failed", "error": {"kind": "unknown"}}) == "Failed"
    assert compare.words({"status": "lost"}) == "Lost"


def test_curves_follow_the_axis_and_name_what_is_missing(ask, home):
    run = add(home, "one")
    by = {x: ask["curves"]({"ids": [run, 999], "x": x, "y": None}) for x in ("step", "tokens", "seconds", "joules")}
    assert by["step"]["runs"][0]["x"][-1] == 30 and by["tokens"]["runs"][0]["x"][-1] == 3000 and by["seconds"]["runs"][0]["x"][-1] == 15
    assert by["step"]["unit"] == "nats/token" and len(by["step"]["runs"]) == 1
    assert by["joules"]["runs"][0]["x"] == [] and by["joules"]["missing"][0]["reason"] == "no energy counter here"


def test_pareto_keeps_to_one_data_set_and_metric(ask, home):
    small, large, worse = add(home, "small", 1.7, 4e6), add(home, "large", 1.5, 9e6), add(home, "worse", 1.8, 9e6)
    add(home, "elsewhere", 1.2, 1e6, data="python-code")
    found = ask["front"]({"ids": [small], "query": "", "x": "size"})
    assert {p["id"]: p["front"] for p in found["points"]} == {small: True, large: True, worse: False}
    assert found["limit"] == 10 and found["metric"] == "bits/byte"


def test_a_default_of_another_method_is_a_minor_difference(ask, home):
    ids = [add(home, "a"), add(home, "b", pipeline=[{"method": "magnitude", "sparsity": 0.5}, {"method": "lora", "rank": 16}])]
    fields = {f["name"]: f for f in ask["differences"]({"ids": ids})["fields"]}
    assert fields["stage 2 rank"]["values"] == [8, 16] and not fields["stage 2 rank"]["minor"]
    assert not fields["stage 1 method"]["minor"]
    only = [f for f in fields.values() if f["name"].startswith("stage 1") and f["values"].count(None) == 1 and f["name"] != "stage 1 sparsity"]
    assert only and all(f["minor"] for f in only)


def test_told_apart_or_not_or_not_comparable(ask, home):
    a, b, c = add(home, "a", 1.60, noise=0.02), add(home, "b", 1.90, noise=0.02), add(home, "c", 1.60, noise=0.02)
    other = add(home, "other", 1.6, items="else")
    apart = ask["apart"]({"a": a, "b": b})
    assert apart["comparable"] and apart["difference"] == pytest.approx(0.3, abs=0.02) and apart["low"] > 0
    assert "cannot be told apart" in ask["apart"]({"a": a, "b": c})["text"]
    refused = ask["apart"]({"a": a, "b": other})
    assert not refused["comparable"] and "different items" in refused["text"]
    assert [r["tier"] for r in ask["ranks"]({"ids": [a, b, c]})["rows"]] == ["A", "A", "B"]
    assert ask["ranks"]({"ids": [a]})["rows"] == []


def test_star_tags_and_note_are_kept(ask, home):
    run = add(home, "one")
    ask["star"]({"id": run, "starred": True})
    ask["keep"]({"id": run, "tags": ["b", "a "], "note": "damping"})
    [row] = rows(ask, "is:starred tag:a")["rows"]
    assert row["tags"] == ["a", "b"] and row["note"] == "damping"
    assert rows(ask)["chips"]["starred"] == 1


def test_export_is_a_zip_of_tables_of_the_chosen_runs(ask, home):
    ids = [add(home, "one"), add(home, "two")]
    pack = ask["export"]({"ids": ids[:1], "format": "csv"})
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(pack["body"]))) as files:
        assert pack["name"].endswith(".zip") and "points.csv" in files.namelist()
        table = files.read("runs.csv").decode()
    assert "one" in table and "two" not in table
    page = base64.b64decode(ask["export"]({"ids": ids, "format": "report"})["body"]).decode()
    assert page.lower().startswith("<!doctype html>") and "two" in page
    with pytest.raises(Exception, match="no run is chosen"):
        ask["export"]({"ids": [], "format": "csv"})
    with pytest.raises(Exception, match="no such format"):
        ask["export"]({"ids": ids, "format": "pickle"})

"""Stages, events, layer maps, evaluations, artifacts, library, backup and export."""

import csv
import json
import sqlite3

import numpy as np
import pytest

from storage import NotFound, StorageError, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "fettle.db")


@pytest.fixture
def run(store):
    return store.create_run({"data": "digits"}, name="r", forecast={"fits": True})


def test_stages_are_changed_in_part(store, run):
    store.put_stage(run, 1, "int8", {"group": 32})
    store.put_stage(run, 0, "lora", {"rank": 8}, status="running", started=1.0, reasons={"rank": "follows trainable"})
    store.put_stage(run, 0, "lora", {"rank": 8}, status="finished", seconds=2.5, summary={"trainable": 10})
    first, second = store.stages(run)
    assert first == {"index": 0, "method": "lora", "settings": {"rank": 8}, "status": "finished", "started": 1.0, "ended": None, "seconds": 2.5,
                     "reasons": {"rank": "follows trainable"}, "summary": {"trainable": 10}}
    assert second["method"] == "int8" and second["reasons"] == {}
    with pytest.raises(ValueError):
        store.put_stage(run, 0, "lora", {}, colour="red")


def test_events_and_layer_maps_after_a_cursor(store, run):
    ids = [store.event(run, "note", f"text {i}", float(i), step=i, share=0.5) for i in range(5)]
    assert [e["text"] for e in store.events(run, since=ids[2])] == ["text 3", "text 4"]
    assert store.events(run, limit=1)[0] == {"id": ids[0], "kind": "note", "text": "text 0", "t": 0.0, "data": {"step": 0, "share": 0.5}}
    assert store.events(run, kind="none") == [] and store.layers(run) is None
    store.put_layers(run, 1, {"rank": [[0, "q_proj", 8]]})
    last = store.put_layers(run, 5, {"rank": [[0, "q_proj", np.int64(4)]]})
    assert store.layers(run)["figures"] == {"rank": [[0, "q_proj", 4]]} and store.layers(run, since=last) is None
    assert [m["step"] for m in store.layer_history(run)] == [1, 5]


def test_scores_come_back_and_an_evaluation_is_replaced(store, run):
    scores, weights = np.random.default_rng(0).random(1000, dtype=np.float32), np.arange(1000, dtype=np.float32)
    first = store.put_evaluation(run, "after", 0, 10, 1.5, "bits/byte", 1.2, 1.1, np.float32(1.5), 1000, scores, weights, "abc", {"loss": 3.0})
    a, b = store.scores(first)
    assert np.array_equal(a, scores) and np.array_equal(b, weights) and a.dtype == np.float32
    assert store.put_evaluation(run, "after", 0, 10, 1.5, "bits/byte", 1.0, 0.9, 1.1, 2, scores[:2].tobytes(), None, "abd") == first
    a, b = store.scores(first)
    assert len(a) == 2 and b is None
    (row,) = store.evaluations(run)
    assert row["value"] == 1.0 and row["items_hash"] == "abd" and "scores" not in row and row["extra"] == {}
    assert store.evaluations(ids=[first]) == [row]
    with pytest.raises(NotFound):
        store.scores(77)


def test_forecast_footprint_artifacts(store, run):
    assert store.forecast(run) == {"fits": True} and store.footprint(run) is None
    store.put_footprint(run, {"peak_bytes": 5})
    store.put_artifact(run, "model", "model", 5, "00", {"files": 2})
    store.put_artifact(run, "model", "model", 6)
    assert store.footprint(run) == {"peak_bytes": 5}
    assert [(a["bytes"], a["meta"]) for a in store.artifacts(run)] == [(6, {})]


def test_library(store):
    store.set_setting("theme", {"dark": True})
    assert store.get_setting("theme") == {"dark": True} and store.get_setting("none", 3) == 3
    store.set_setting("theme", None)
    assert store.get_setting("theme") is None
    store.put_preset("quick", {"model": "m"}, "two minutes")
    store.put_preset("quick", {"model": "n"})
    assert [(p["name"], p["spec"], p["note"]) for p in store.presets()] == [("quick", {"model": "n"}, "")]
    store.delete_preset("quick")
    with pytest.raises(NotFound):
        store.delete_preset("quick")
    store.put_vote("def f(", ["a", "b"], "b", 3, ["x", "y"], {"blind": True})
    store.put_vote("def g(", ["a", "b"], None, None, ["x", "y"])
    assert [v["winner"] for v in store.votes()] == [None, "b"] and store.votes(1)[0]["prompt"] == "def g("
    store.put_claim("lora", "table 2", verdict=None, paper=91.3)
    store.put_claim("lora", "table 2", verdict="reproduced", paper=91.3, ours=91.1)
    store.put_claim("gptq", "x", verdict="not comparable")
    assert [(c["verdict"], c["ours"]) for c in store.claims("lora")] == [("reproduced", 91.1)] and len(store.claims()) == 2


def test_backup_is_a_whole_database(store, run, tmp_path):
    store.append(run, [("x", i, 1.0, 0.0) for i in range(5000)])
    copy = store.backup(tmp_path / "deep" / "copy.db")
    again = Store(copy)
    assert again.run(run)["name"] == "r" and len(again.points(run, "x")["step"]) == 5000 and again.check() == [] == store.check()
    with pytest.raises(StorageError):
        store.backup("/proc/nowhere/copy.db")


def test_inspect_counts_what_is_there(store, run, tmp_path):
    store.append(run, [("x", i, 1.0, 0.0) for i in range(7)])
    found = store.inspect()
    assert found["tables"]["runs"] == 1 and found["tables"]["points"] == 7 and found["tables"]["presets"] == 0
    assert found["largest"] == [{"id": run, "name": "r", "points": 7}] and found["bytes"] > 4096 and found["journal"] == store.journal
    store.event(run, "still", "writable")


def test_export_in_three_formats_says_the_same(store, run, tmp_path):
    import pyarrow.parquet
    other = store.create_run({}, name="without points")
    store.append(run, [("x", i, i / 3, i / 7) for i in range(10)] + [("y", 0, float("nan"), 0.0), ("y", 1, float("inf"), 0.0)])
    store.event(run, "note", 'with "quotes", commas\nand lines', 1.0, more=[1])
    for format in ("parquet", "csv", "json"):
        written = store.export([run, "without points"], tmp_path / format, format)
        assert {p.name for p in written} >= {f"runs.{format}", f"points.{format}", f"events.{format}", f"evaluations.{format}"}
    table = pyarrow.parquet.read_table(tmp_path / "parquet" / "points.parquet").to_pylist()
    assert [r["value"] for r in table if r["series"] == "x"] == [i / 3 for i in range(10)] and table[0]["run_id"] == run
    with open(tmp_path / "csv" / "points.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["value"]) for r in rows if r["series"] == "x"] == [i / 3 for i in range(10)] and len(rows) == 12
    parsed = json.loads((tmp_path / "json" / "points.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert [r["value"] for r in parsed] == [i / 3 for i in range(10)] + [None, None]
    events = json.loads((tmp_path / "json" / "events.json").read_text())
    assert events[0]["text"] == 'with "quotes", commas\nand lines' and events[0]["data"] == {"more": [1]}
    assert [r["id"] for r in json.loads((tmp_path / "json" / "runs.json").read_text())] == [run, other]


def test_export_refuses_with_the_remedy(store, run, tmp_path):
    with pytest.raises(StorageError, match="parquet, csv, json"):
        store.export([run], tmp_path, "xlsx")
    with pytest.raises(NotFound):
        store.export([99], tmp_path, "csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writable"):
        store.export([run], tmp_path / "file" / "x", "csv")


def test_a_locked_database_is_told(store, run, tmp_path, monkeypatch):
    from storage import connection
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.1)
    holder = sqlite3.connect(tmp_path / "fettle.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="locked"):
        Store(tmp_path / "fettle.db").event(run, "x", "y")
    holder.execute("ROLLBACK")
    store.event(run, "x", "y")

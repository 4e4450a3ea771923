"""Run rows, the queue, the lease, search; and what the file does when it cannot be used."""

import sqlite3
import threading
import time

import pytest

from storage import NotFound, StorageError, Store

SPEC = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "wanda", "sparsity": 0.5}, {"method": "lora", "rank": 8}],
        "budget": {"minutes": 2, "memory_gb": 1.5}, "seed": 0}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "fettle.db")


def test_a_run_comes_back_as_it_was_given(store):
    run_id = store.create_run(SPEC, name="amber-finch", forecast={"fits": True}, tags=["first", "a b"], note="näher", priority=3)
    row = store.run("amber-finch")
    assert row["id"] == run_id and row["spec"] == SPEC and row["forecast"] == {"fits": True} and row["footprint"] is None
    assert row["tags"] == ["first", "a b"] and row["note"] == "näher" and row["status"] == "queued" and row["priority"] == 3
    assert row["starred"] is False and row["epoch"] == 0 and row["queued"] == row["created"]
    assert store.run(str(run_id)) == row == store.run(f"#{run_id}")
    assert "forecast" not in store.runs()[0] and store.runs(full=True)[0]["forecast"] == {"fits": True}


def test_update_refuses_unknown_columns_and_keeps_types(store):
    run_id = store.create_run(SPEC, name="a")
    store.update_run(run_id, starred=True, error={"cause": "c", "remedy": "r"}, progress=0.25, peak_bytes=12.0, tags=("x",),
                     footprint={"peak": float("nan")})
    row = store.run(run_id)
    assert row["starred"] is True and row["error"]["remedy"] == "r" and row["peak_bytes"] == 12 and row["footprint"] == {"peak": None}
    with pytest.raises(ValueError):
        store.update_run(run_id, nonsense=1)
    with pytest.raises(ValueError):
        store.update_run(run_id, status="sleeping")
    with pytest.raises(NotFound):
        store.update_run(99, note="x")
    with pytest.raises(NotFound, match="no run 'nobody'"):
        store.run("nobody")


def test_transition_is_compare_and_set(store):
    run_id = store.create_run(SPEC, name="a")
    assert store.transition(run_id, ("queued",), "starting", pid=7)
    assert not store.transition(run_id, ("queued",), "starting", pid=8)
    assert store.transition(run_id, ("starting", "running"), "finished")
    row = store.run(run_id)
    assert row["pid"] == 7 and row["status"] == "finished" and row["ended"] is not None


def test_claims_go_by_priority_then_age(store):
    first, second, urgent = (store.create_run(SPEC, name=n, priority=p) for n, p in (("a", 0), ("b", 0), ("c", 5)))
    store.create_run(SPEC, name="done", status="finished", priority=9)
    taken = [store.claim_next("w")["id"] for _ in range(3)]
    assert taken == [urgent, first, second] and store.claim_next("w") is None
    assert store.run(first)["status"] == "starting"


def test_lease_has_one_owner_until_it_ends(store):
    assert store.lease("queue", "one", 60) and store.lease("queue", "one", 60)
    assert not store.lease("queue", "two", 60)
    assert store.lease("queue", "one", -1)
    assert store.lease("queue", "two", 60) and not store.lease("queue", "one", 60)
    store.release("queue", "one")
    assert not store.lease("queue", "one", 60)
    store.release("queue", "two")
    assert store.lease("queue", "one", 60)


def test_slots_repeat_after_ten_and_ids_are_not_reused(store):
    ids = [store.create_run(SPEC, name=f"r{i}") for i in range(11)]
    assert [store.run(i)["slot"] for i in ids] == [*range(10), 0]
    store.delete_run(ids[-1])
    assert store.create_run(SPEC, name="new") == ids[-1] + 1


def test_delete_removes_every_trace(store):
    run_id = store.create_run(SPEC, name="gone", forecast={"a": 1}, tags=["t"])
    other = store.create_run(SPEC, name="stays", forecast={"a": 1})
    sweep = store.create_sweep({}, {}, name="s")
    for i in (run_id, other):
        store.append(i, [("loss", 0, 1.0, 0.0)])
        store.event(i, "note", "x")
        store.put_stage(i, 0, "lora", {})
        store.put_layers(i, 0, {})
        store.put_footprint(i, {})
        store.put_artifact(i, "model", "p")
        store.put_evaluation(i, "before", -1, 0, 0.0, "accuracy", 1, 1, 1, 1, [1.0])
        store.put_trial(sweep, i, run_id=i)
    store.delete_run(run_id)
    tables = [r[0] for r in store.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'run_search_%' "
                                                     "AND name NOT LIKE 'sqlite%'")]
    for table in tables:
        names = [c[1] for c in store.connection.execute(f"PRAGMA table_info({table})")]
        if "run_id" in names:
            assert {r[0] for r in store.connection.execute(f"SELECT run_id FROM {table}")} - {None} == {other}, table
    assert store.connection.execute("SELECT count(*) FROM points").fetchone()[0] == 1
    assert store.runs(search="gone") == [] and [r["id"] for r in store.runs(search="stays")] == [other]
    with pytest.raises(NotFound):
        store.delete_run(run_id)


def test_filters_and_order(store):
    for i in range(6):
        run_id = store.create_run({**SPEC, "seed": i, "budget": {"minutes": i}}, name=f"run-{i}", tags=["even"] if i % 2 == 0 else [])
        store.update_run(run_id, value=None if i == 5 else -i, status="finished" if i < 3 else "failed")
    store.archive_run(1)
    assert [r["name"] for r in store.runs(order="value")] == ["run-4", "run-3", "run-2", "run-1", "run-5"]
    assert [r["name"] for r in store.runs(order="-value", limit=2, offset=1)] == ["run-2", "run-3"]
    assert store.count_runs(status="finished") == 2 and store.count_runs(status=("finished", "failed"), archived=None) == 6
    assert store.count_runs(tag="even") == 2 and store.count_runs(tag="even", archived=True) == 1
    assert store.tags() == {"even": 3}
    with pytest.raises(ValueError):
        store.runs(order="value; DROP TABLE runs")


@pytest.mark.parametrize("where, names", [
    ([("minutes", "=", "2")], ["a"]), ([("minutes", "=", 2.0)], ["a"]), ([("budget.minutes", ">", 2)], ["b"]), ([("minutes", "<=", 10)], ["a", "b"]),
    ([("method", "=", "lora")], ["a", "b"]), ([("pipeline.method", "=", "WANDA")], ["a", "b"]), ([("method", "!=", "gptq")], ["a", "b"]),
    ([("method", "=", "gptq")], []), ([("data", "~", "python")], ["a"]), ([(("data", "source"), "=", "digits")], ["b"]),
    ([("seconds", ">=", 5)], ["b"]), ([("name", "~", "A")], ["a"]), ([("status", "!=", "queued")], []), ([("data", "=", ["python-docs", "x"])], ["a"]),
    ([("minutes", "!=", (2, 10))], []), ([("minutes", "=", (2, 10))], ["a", "b"]), ([("tag", "=", "x_y")], ["a"])])
def test_comparisons_with_settings_and_columns(store, where, names):
    store.create_run(SPEC, name="a", tags=["x_y"])
    second = store.create_run({**SPEC, "data": {"source": "digits", "limit": 5}, "budget": {"minutes": 10}}, name="b", tags=["xzy"])
    store.update_run(second, seconds=6.0)
    assert sorted(r["name"] for r in store.runs(where=where)) == names


def test_search_finds_names_notes_tags_and_settings_and_follows_changes(store):
    run_id = store.create_run(SPEC, name="amber-finch", note="second try", tags=["baseline"])
    store.create_run({**SPEC, "data": "digits"}, name="slate-heron")
    for words in ("amber", "fin", "second TRY", "base", "python-docs", "lor amber", 'amber "lora', "rank"):
        assert [r["id"] for r in store.runs(search=words)][-1] == run_id, words
    assert store.runs(search="amber heron") == [] and store.count_runs(search="lora") == 2
    assert store.count_runs(search="* ( ) \" -") == 2, "nothing to look for means no filter"
    store.update_run(run_id, name="jade-owl", tags=["other"])
    assert store.runs(search="amber") == [] and store.count_runs(search="jade other") == 1 and store.count_runs(tag="baseline") == 0


def test_one_connection_per_thread(store):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(store.connection))
    thread.start()
    thread.join()
    assert seen[0] is not store.connection and store.connection is store.connection


def test_nested_writes_are_one_transaction(store):
    run_id = store.create_run(SPEC, name="a")
    with pytest.raises(KeyError), store.transaction():
        store.append(run_id, [("loss", 0, 1.0, 0.0)])
        store.event(run_id, "x", "y")
        raise KeyError
    assert store.series(run_id) == [] and store.events(run_id) == []


def test_unusable_places_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "text.db").write_text("this is no database, only text that is long enough to have a header" * 20)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE x (a)").connection.close()
    for path in ("file/fettle.db", "folder.db", "text.db", "other.db"):
        with pytest.raises(StorageError, match="WORKBENCH_HOME"):
            Store(tmp_path / path)
    with pytest.raises(StorageError, match="WORKBENCH_HOME"):
        Store("/proc/nowhere/fettle.db")


def test_damage_in_the_middle_of_the_file_is_told(tmp_path):
    store = Store(tmp_path / "fettle.db")
    run_id = store.create_run(SPEC, name="a")
    store.append(run_id, [("loss", i, 1.0, 0.0) for i in range(20_000)])
    store.close()
    size = (tmp_path / "fettle.db").stat().st_size
    with open(tmp_path / "fettle.db", "r+b") as f:
        f.seek(size // 2)
        f.write(b"\xff" * 65536)
    with pytest.raises(StorageError, match="damaged"):
        Store(tmp_path / "fettle.db").points(run_id, "loss")


def test_search_is_quick_among_thousands(store):
    with store.transaction():
        for i in range(3000):
            store.create_run({**SPEC, "seed": i, "budget": {"minutes": i % 50}}, name=f"run-{i}", tags=[f"t{i % 7}"])
    began = time.process_time()
    assert store.count_runs(search="run 77") == 11 and len(store.runs(search="lora", tag="t3")) == 50
    assert store.count_runs(where=[("method", "=", "lora"), ("minutes", "=", 3), ("data", "=", "python-docs")]) == 60
    assert time.process_time() - began < 0.5, "some 20 ms on an idle machine; seconds without the indexes"

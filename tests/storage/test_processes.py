"""Several real processes on one file, and the writer thread under SIGKILL, locks and loss of its run."""

import multiprocessing
import os
import signal
import sqlite3
import threading
import time

import pytest

from storage import StorageError, Store, Writer
from storage import connection as connections

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "fettle.db")


def _train(path, run_id, steps):
    with Writer(Store(path), run_id, period=0.02) as writer:
        for step in range(steps):
            writer.points(step, {"loss": 1.0 / (step + 1), "lr": 0.1}, step * 0.01)
            writer.update(progress=step / steps)
            if step % 50 == 0:
                writer.event("note", f"{step}")
            time.sleep(0.0005)


def _claim(path, results):
    store, mine = Store(path), []
    while (run := store.claim_next(str(os.getpid()))) is not None:
        mine.append(run["id"])
    results.put(mine)


def _lead(path, results, barrier):
    store = Store(path)
    barrier.wait()
    results.put(store.lease("dispatcher", str(os.getpid()), 30))


def test_workers_write_while_a_server_reads(store):
    runs = [store.create_run({}, name=f"r{i}") for i in range(3)]
    workers = [FORK.Process(target=_train, args=(store.path, i, 300)) for i in runs]
    for w in workers:
        w.start()
    cursors, mirror = dict.fromkeys(runs, 0), {i: {} for i in runs}
    while any(w.is_alive() for w in workers):
        for i in runs:
            new = store.since(i, cursors[i])
            cursors[i] = new["cursor"]
            if "loss" in new["series"]:
                mirror[i].update(zip(new["series"]["loss"]["step"], new["series"]["loss"]["value"]))
        store.set_setting("seen", cursors[runs[0]])
        time.sleep(0.005)
    for i, w in zip(runs, workers):
        w.join()
        assert w.exitcode == 0
        new = store.since(i, cursors[i])["series"].get("loss", {"step": [], "value": []})
        mirror[i].update(zip(new["step"], new["value"]))
        assert mirror[i] == {s: 1.0 / (s + 1) for s in range(300)}
        assert len(store.events(i)) == 6 and store.run(i)["progress"] == pytest.approx(299 / 300)


def test_each_queued_run_is_claimed_once(store):
    ids = [store.create_run({}, name=f"r{i}") for i in range(40)]
    results = FORK.Queue()
    claimers = [FORK.Process(target=_claim, args=(store.path, results)) for _ in range(4)]
    for c in claimers:
        c.start()
    taken = [i for _ in claimers for i in results.get(timeout=30)]
    for c in claimers:
        c.join(10)
    assert sorted(taken) == ids


def test_one_of_many_processes_gets_the_lease(store):
    results, barrier = FORK.Queue(), FORK.Barrier(6)
    leaders = [FORK.Process(target=_lead, args=(store.path, results, barrier)) for _ in range(6)]
    for p in leaders:
        p.start()
    assert sorted(results.get(timeout=30) for _ in leaders) == [False] * 5 + [True]
    for p in leaders:
        p.join(10)


def _endless(path, run_id, said):
    writer = Writer(Store(path), run_id, period=0.5)
    for step in range(10**9):
        writer.points(step, {"loss": float(step)}, time.time())
        said.value = time.time()
        time.sleep(0.002)


def test_a_killed_worker_loses_at_most_the_period(store):
    run_id, said = store.create_run({}, name="r"), FORK.Value("d", 0.0)
    worker = FORK.Process(target=_endless, args=(store.path, run_id, said))
    worker.start()
    while said.value == 0.0:
        time.sleep(0.01)
    time.sleep(1.13)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    found = store.points(run_id, "loss")
    assert found["step"] == list(range(len(found["step"]))) and len(found["step"]) > 50
    assert said.value - found["t"][-1] <= 0.5
    assert store.check() == []


def test_a_forked_child_gets_its_own_connection(store):
    run_id, results = store.create_run({}, name="r"), FORK.Queue()
    parent = id(store.connection)

    def child():
        store.event(run_id, "from", "child")
        results.put(id(store.connection) != parent)

    process = FORK.Process(target=child)
    process.start()
    assert results.get(timeout=10) is True
    process.join(10)
    store.event(run_id, "from", "parent")
    assert [e["text"] for e in store.events(run_id)] == ["child", "parent"] and store.check() == []


def test_the_writer_flushes_everything_when_closed(store, tmp_path):
    run_id = store.create_run({}, name="r")
    writer = Writer(store, run_id, period=60, log=tmp_path / "log.txt")
    for step in range(1000):
        writer.points(step, {"loss": step * 0.5, "lr": 0.1}, step * 0.01)
    writer.samples(1.2345, {"mem/rss": 5})
    writer.event("note", "at the end")
    writer.layers(3, {"rank": []})
    writer.layers(4, {"rank": [[0, "q", 1]]})
    writer.update(progress=0.5, phase="load")
    writer.update(progress=0.75)
    writer.call("put_stage", 0, "lora", {"rank": 8})
    writer.log("a line")
    writer.close()
    writer.close()
    assert store.points(run_id, "loss")["step"] == list(range(1000))
    assert store.points(run_id, "mem/rss") == {"step": [1234], "value": [5.0], "t": [1.2345]}
    assert store.events(run_id)[0]["data"] == {"step": 999} and store.layers(run_id)["step"] == 4
    assert len(store.layer_history(run_id)) == 1
    row = store.run(run_id)
    assert row["progress"] == 0.75 and row["phase"] == "load" and store.stages(run_id)[0]["method"] == "lora"
    assert (tmp_path / "log.txt").read_text() == "a line\n" and writer.commits <= 3


def test_the_first_points_are_there_at_once(store):
    run_id = store.create_run({}, name="r")
    with Writer(store, run_id, period=30) as writer:
        writer.points(0, {"loss": 1.0}, 0.0)
        deadline = time.monotonic() + 5
        while not store.series(run_id) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.points(run_id, "loss")["value"] == [1.0]


def test_a_locked_database_blocks_nobody_and_loses_nothing(store, monkeypatch):
    monkeypatch.setattr(connections, "BUSY_SECONDS", 0.05)
    run_id = store.create_run({}, name="r")
    holder = sqlite3.connect(store.path, isolation_level=None)
    writer = Writer(store, run_id, period=0.05)
    holder.execute("BEGIN IMMEDIATE")
    slowest = 0.0
    for step in range(200):
        t = time.perf_counter()
        writer.points(step, {"loss": 1.0}, 0.0)
        slowest = max(slowest, time.perf_counter() - t)
        time.sleep(0.002)
    assert isinstance(writer.error, StorageError) and slowest < 0.1
    holder.execute("ROLLBACK")
    writer.close()
    assert writer.error is None and store.points(run_id, "loss")["step"] == list(range(200))


def test_a_deleted_run_does_not_stop_its_writer(store):
    run_id = store.create_run({}, name="r")
    writer = Writer(store, run_id, period=0.02)
    store.delete_run(run_id)
    writer.points(0, {"loss": 1.0}, 0.0)
    writer.close()
    assert "deleted" in str(writer.error)


def test_many_threads_share_one_writer(store):
    run_id = store.create_run({}, name="r")
    with Writer(store, run_id, period=0.02) as writer:
        def work(name):
            for step in range(500):
                writer.points(step, {name: float(step)}, 0.0)
        threads = [threading.Thread(target=work, args=(f"s{i}",)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert {s["name"]: s["count"] for s in store.series(run_id)} == {f"s{i}": 500 for i in range(4)}


def test_the_cost_of_a_call_is_small(store):
    run_id = store.create_run({}, name="r")
    with Writer(store, run_id) as writer:
        values = {f"s{i}": 1.0 for i in range(10)}
        t = time.thread_time()
        for step in range(2000):
            writer.points(step, values, 0.0)
        spent = (time.thread_time() - t) / 2000
    assert spent < 200e-6, f"{spent * 1e6:.0f} microseconds for ten values"


def test_a_full_disk_is_told_and_the_points_wait(store):
    run_id = store.create_run({}, name="r")
    writer = Writer(store, run_id, period=30)
    writer.flush()
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    for step in range(5000):
        writer.points(step, {"loss": 1.0}, 0.0)
    try:
        with pytest.raises(StorageError, match="full"):
            while True:  # the thread's own connection has no such limit and may have taken the first points
                writer.points(step := step + 1, {f"s{i}": 1.0 for i in range(2000)}, 0.0)
                writer.flush()
    finally:
        store.connection.execute("PRAGMA max_page_count = 1073741823")
    writer.close()
    assert len(store.points(run_id, "loss")["step"]) == 5000 and store.series(run_id)[-1]["count"] >= 1 and store.check() == []

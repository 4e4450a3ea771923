"""Processes that die, hang or do not listen: what the workbench says of them and what can be resumed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from engines.errors import InputError
from tests.faults.pipelines import _loss
from workbench import reaper, runs, warm
from workbench.dispatcher import Dispatcher


def test_killed_worker_is_lost_within_5_seconds_and_resumes_to_the_same_curve(home, server, begin, wait, curve):
    run_id = begin(steps=160)
    row = wait(run_id, lambda r: len(curve(run_id)) > 50)
    os.killpg(row["pid"], signal.SIGKILL)
    killed = time.time()
    row = wait(run_id, "lost", 5)
    assert time.time() - killed <= 5
    assert row["error"]["kind"] == "killed" and "SIGKILL" in row["error"]["cause"]
    assert f"step {reaper.checkpoint(home.folder(run_id))['step']}" in row["message"]
    last_t = max(home.store.points(run_id, "loss")["t"])
    assert row["started"] + last_t >= killed - 1.0, "more than 1 s of points is missing"
    runs.resume(run_id, home=home)
    wait(run_id, "finished")
    assert curve(run_id) == {step: _loss(step) for step in range(1, 161)}
    assert home.store.run(run_id)["epoch"] >= 1  # an open page learns that points were taken back


def test_checkpoint_that_is_newer_than_the_recorded_points_is_not_trusted(home, server, begin, wait, curve, monkeypatch):
    """A process may die between a checkpoint and the commit of the points before it."""
    run_id = begin(steps=80)
    row = wait(run_id, lambda r: len(curve(run_id)) > 41)
    os.killpg(row["pid"], signal.SIGKILL)
    wait(run_id, "lost", 5)
    newest = reaper.checkpoint(home.folder(run_id))["step"]
    home.store.rewind(run_id, newest - 5)
    runs.resume(run_id, home=home)
    wait(run_id, "finished")
    assert curve(run_id) == {step: _loss(step) for step in range(1, 81)}


def test_pause_and_resume_leave_one_whole_curve(home, server, begin, wait, curve):
    run_id = begin(steps=120)
    wait(run_id, lambda r: len(curve(run_id)) > 20)
    runs.pause(run_id, home=home)
    row = wait(run_id, "paused", 5)
    assert row["pid"] is None and 0 < row["progress"] < 1 and row["left_seconds"] is None
    with pytest.raises(InputError, match="paused"):
        runs.pause(run_id, home=home)
    runs.resume(run_id, home=home)
    row = wait(run_id, "finished")
    assert curve(run_id) == {step: _loss(step) for step in range(1, 121)}
    t = home.store.points(run_id, "loss")["t"]
    assert t == sorted(t) and t[-1] < 60  # the run's own clock does not count the pause


def test_stop_ends_at_the_next_step_with_a_result(home, server, begin, wait, curve):
    run_id = begin(steps=5000)
    wait(run_id, lambda r: len(curve(run_id)) > 5)
    asked = time.monotonic()
    runs.stop(run_id, home=home)
    row = wait(run_id, "stopped", 5)
    assert time.monotonic() - asked < 2
    assert row["value"] == 1.5 and row["wish"] is None


def test_sigterm_is_a_stop(home, server, begin, wait, curve):
    run_id = begin(steps=5000)
    row = wait(run_id, lambda r: len(curve(run_id)) > 5)
    os.kill(row["pid"], signal.SIGTERM)
    assert wait(run_id, "stopped", 5)["value"] == 1.5


def test_stop_that_is_not_heard_is_forced(home, server, begin, wait, monkeypatch):
    monkeypatch.setattr(reaper, "GRACE", 0.2)
    monkeypatch.setattr(reaper, "FORCE", 2.5)
    run_id = begin("deaf")
    row = wait(run_id, lambda r: r["phase"] == "1 lora")
    runs.stop(run_id, home=home)
    row = wait(run_id, "stopped", 10)
    assert "by force" in row["message"] and "begins again" in row["message"]
    assert any("asked to end" in e["text"] for e in home.store.events(run_id))


def test_kill_ends_the_process_at_once(home, server, begin, wait):
    run_id = begin("deaf")
    row = wait(run_id, lambda r: r["phase"] == "1 lora")
    assert runs.kill(run_id, home=home)["status"] == "stopped"
    assert not reaper.alive(row["pid"], row["pid_started"])


def test_crash_in_native_code_is_named(home, server, begin, wait):
    run_id = begin("vanish")
    row = wait(run_id, "lost", 10)
    assert row["error"]["kind"] == "crash" and "SIGSEGV" in row["error"]["cause"]


def test_queue_goes_on_after_a_failure_and_keeps_its_order(home, server, begin, wait):
    first, second = begin("fail"), None
    row = wait(first, "failed")
    assert row["error"]["kind"] == "memory" and "ran out of memory" in row["error"]["cause"] and row["error"]["log"]
    second = begin("curve", 5)
    assert wait(second, "finished")["metric"] == "bits/byte"
    assert home.store.light(first)["status"] == "failed"


def test_over_the_memory_budget_is_told_to_the_loop(home, server, begin, wait):
    run_id = begin("hungry", memory_gb=0.5)
    row = wait(run_id, "failed")
    assert row["error"]["kind"] == "memory"
    event = next(e for e in home.store.events(run_id) if e["kind"] == "memory")
    assert event["data"]["bytes"] > event["data"]["limit"] == 500_000_000


def test_run_goes_on_without_its_server_and_a_new_one_feeds_the_queue(home, begin, wait, curve):
    code = ("import time; from workbench import warm\nfrom workbench.home import Home\nfrom workbench.dispatcher import Dispatcher\n"
            f"warm.stamp = lambda: {warm.stamp()!r}\n"
            "d = Dispatcher(Home.open()).start()\nprint('up', flush=True)\ntime.sleep(600)")
    first, second = begin(steps=150), begin(steps=5)
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.getcwd())
    try:
        assert server.stdout.readline() == b"up\n"
        wait(first, lambda r: len(curve(first)) > 10)
    finally:
        server.kill()
        server.wait()
    assert home.store.light(first)["status"] == "running"
    wait(first, "finished")
    assert curve(first) == {step: _loss(step) for step in range(1, 151)}
    assert home.store.light(second)["status"] == "queued"
    another = Dispatcher(home).start()
    try:
        wait(second, "finished", 15)
    finally:
        another.stop()


def test_two_servers_feed_the_queue_one_at_a_time(home, begin, wait):
    servers = [Dispatcher(home).start(), Dispatcher(home).start()]
    try:
        ids = [begin(steps=12) for _ in range(5)]
        most = 0
        while any(home.store.light(i)["status"] in ("queued", "starting", "running") for i in ids):
            most = max(most, home.store.count_runs(status=("starting", "running")))
            assert sum(s.leader for s in servers) <= 1
            time.sleep(0.01)
        assert most == 1
        assert [home.store.light(i)["status"] for i in ids] == ["finished"] * 5
        started = [home.store.light(i)["started"] for i in ids]
        assert started == sorted(started)
        leader = next(s for s in servers if s.leader)
        other = next(s for s in servers if s is not leader)
        leader.stop()
        wait(begin(steps=5), "finished", 15)
        assert other.leader
    finally:
        for each in servers:
            each.stop()


def test_a_busy_database_costs_no_point(home, server, begin, wait, curve):
    run_id = begin(steps=200)
    wait(run_id, lambda r: len(curve(run_id)) > 10)
    blocker = sqlite3.connect(home.db, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    time.sleep(2.5)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert wait(run_id, "finished")["status"] == "finished"
    assert curve(run_id) == {step: _loss(step) for step in range(1, 201)}


def test_claimed_run_without_a_process_returns_to_the_queue(home, begin, monkeypatch):
    run_id = begin(steps=5)
    assert home.store.claim_next("a server that died")["id"] == run_id
    judge = reaper.Reaper(home)
    assert judge.sweep() == []
    monkeypatch.setattr(reaper, "UNSPAWNED", 0.0)
    assert judge.sweep() == [run_id] and home.store.light(run_id)["status"] == "queued"


def test_a_process_id_that_is_used_again_does_not_keep_a_run_alive(home, begin):
    run_id = begin(steps=5)
    home.store.transition(run_id, ("queued",), "running", pid=os.getpid(), pid_started=1.0, started=time.time() - 60,
                          heartbeat=time.time() - 30)
    assert reaper.sweep(home) == [run_id]
    assert home.store.light(run_id)["status"] == "lost"


def test_deleted_run_does_not_end_the_dispatcher(home, server, begin, wait, curve):
    gone = begin(steps=3000)
    row = wait(gone, lambda r: len(curve(gone)) > 5)
    home.store.delete_run(gone)
    deadline = time.monotonic() + 10
    while reaper.alive(row["pid"], row["pid_started"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not reaper.alive(row["pid"], row["pid_started"])
    wait(begin(steps=3), "finished")


def test_many_readers_of_a_run_see_every_point_once(home, server, begin, wait, curve):
    """What two tabs do: each with its own cursor, while points arrive."""
    run_id = begin(steps=120)
    seen: list[dict] = [{}, {}]

    def follow(mine):
        cursor, epoch = 0, None
        while True:
            news = runs.live(run_id, cursor, epoch, home=home)
            cursor, epoch = news["cursor"], news["epoch"]
            part = news["series"].get("loss", {"step": [], "value": []})
            for step, value in zip(part["step"], part["value"]):
                assert step not in mine
                mine[step] = value
            if news["run"]["status"] == "finished":
                return
            time.sleep(0.05)

    threads = [threading.Thread(target=follow, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen[0] == seen[1] == curve(run_id) and len(seen[0]) == 120

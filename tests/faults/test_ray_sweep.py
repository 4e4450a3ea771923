"""Sweeps on a real Ray cluster of two nodes on this machine: a node that dies, a conductor that dies, files, an address that is none."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import time

import pytest

from engines.errors import InputError
from storage import NotFound
from workbench import reaper, runs
from workbench.home import Home
from workbench.sweeps import service, view
from workbench.sweeps.executors import host, node, reach

BASE = dict(model="stdlib-lm", data="python-docs", pipeline=[{"method": "lora", "rank": 8}], budget={"steps": 20},
            training={"lr": 1e-3, "precision": "fp32"})
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None,
                               reason="Ray is not installed: pip install -r requirements-ray.txt")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a second node, each lending one processor, and a home for the sweeps."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WORKBENCH_HOME", str(tmp_path_factory.mktemp("home")))
    patch.setenv("WORKBENCH_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
    patch.setenv("WORKBENCH_PIPELINE", "tests.workbench.sweeping:hill")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("WORKBENCH_COLD", "1")  # four short runs: a warm worker on each node would import more than they all do
    from ray.cluster_utils import Cluster
    made = Cluster()
    small = dict(num_cpus=1, object_store_memory=80_000_000)
    made.add_node(include_dashboard=False, **small)
    made.second = made.add_node(**small)
    yield made
    for row in Home.open().store.sweeps(status="running"):
        service.stop(row["id"], home=Home.open())
    made.shutdown()
    patch.undo()


def wait(home, sweep_id, condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = view.status(sweep_id, home=home, weights=False)
        if condition(found):
            return found
        time.sleep(0.1)
    log = (home.path / "sweeps" / f"{sweep_id}.log").read_text()
    raise AssertionError(f"{found['status']} {found['message']} {found['counts']}: {log[-2000:]}")


def lost_points(home, run_id):
    found = home.store.points(run_id, "loss")
    return dict(zip(found["step"], found["value"]))


@needs_ray
@pytest.mark.slow
def test_a_conductor_that_dies_finds_its_runs_on_the_nodes_again(cluster):
    home = Home.open()
    spec = BASE | {"tags": ["patient"]}
    row = service.start(spec, dict(over={"pipeline.0.rank": [2, 4]}, on=cluster.address), home=home)
    wait(home, row["id"], lambda f: sum(t["run"] is not None and bool(lost_points(home, t["run"])) for t in f["trials"]) == 2)
    os.kill(int(home.store.sweep(row["id"])["owner"].split(":")[1]), signal.SIGKILL)
    home.store.update_sweep(row["id"], heartbeat=time.time() - 60)
    time.sleep(8.5)  # the lease of the dead one
    assert service.revive(home) == [row["id"]]
    found = wait(home, row["id"], lambda f: f["status"] != "running")
    assert found["status"] == "finished" and found["counts"] == {"complete": 2}, found["message"]
    assert home.store.count_runs(tag=found["tag"]) == 2 and {t["attempt"] for t in found["trials"]} == {1}
    for trial in found["trials"]:
        assert sorted(lost_points(home, trial["run"])) == list(range(1, 21))
        events = [e["text"] for e in home.store.events(trial["run"])]
        assert len(events) == len(set(events)), "an event was told twice"


@needs_ray
@pytest.mark.slow
def test_a_node_killed_in_mid_sweep_loses_no_recorded_point_and_its_trial_is_run_again(cluster):
    home = Home.open()
    specs = [BASE | {"tags": ["patient"], "pipeline": [{"method": "lora", "rank": r}]} for r in (2, 4, 8)]
    row = service.start(BASE, dict(specs=specs, objectives=["quality", "size"], on=f"ray://{cluster.address}"), home=home)
    second = f"/{cluster.second.node_id[:6]}"

    def on_second(found):
        return next((t for t in found["trials"] if (t["node"] or "").endswith(second) and t["run"]), None)
    found = wait(home, row["id"], lambda f: (t := on_second(f)) and len(lost_points(home, t["run"])) >= 5)
    trial = on_second(found)
    before = lost_points(home, trial["run"])
    assert home.store.light(trial["run"])["status"] == "running" and home.store.light(trial["run"])["host"].startswith("ray:")
    assert reaper.sweep(home) == []  # a run on a node is not this machine's to judge
    cluster.remove_node(cluster.second, allow_graceful=False)
    found = wait(home, row["id"], lambda f: f["status"] != "running")
    assert found["status"] == "finished" and found["counts"] == {"complete": 3}, (found["message"], found["counts"])
    again = found["trials"][trial["number"]]
    assert again["attempt"] == 2 and again["run"] != trial["run"] and not again["node"].endswith(second)
    lost = home.store.light(trial["run"])
    assert lost["status"] == "lost" and "was lost at step" in lost["message"]
    kept = lost_points(home, trial["run"])
    assert {step: kept[step] for step in before} == before
    assert home.store.light(again["run"])["parent"] == trial["run"]
    for t in found["trials"]:
        run = home.store.run(t["run"])
        assert run["status"] == "finished" and t["values"] == [run["value"], run["size_bytes"]]
        evaluation = next(e for e in home.store.evaluations(run["id"]) if e["name"] == "result")
        assert list(home.store.scores(evaluation["id"])[0]) == pytest.approx([run["value"]] * 4)
        assert run["footprint"]["phases"] and home.store.stages(run["id"])[0]["status"] == "finished"
        assert (home.model(run["id"]) / "weights.bin").stat().st_size == 5_000_000
        assert "Begins on" in home.log(run["id"]).read_text()
    deadline = time.monotonic() + host.LEASH + 20
    scratch = node.scratch("x").parent
    while list(scratch.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(scratch.iterdir()), "a lane left its folder behind"


def test_an_address_where_nobody_answers_is_one_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    for address in (f"ray://127.0.0.1:{port}", f"127.0.0.1:{port}"):
        with pytest.raises(InputError) as e:
            reach.reach(address)
        assert address in str(e.value) and "\n" not in str(e.value) and ("nobody answers" in str(e.value) or "not installed" in str(e.value))
        assert "ray start --head" in e.value.remedy or "requirements-ray" in e.value.remedy
    assert time.monotonic() - began < 15


@needs_ray
def test_a_listener_that_is_no_cluster_is_told_in_time(monkeypatch):
    monkeypatch.setattr(reach, "ANSWER", 4.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(InputError, match="no Ray cluster answers"):
            reach.reach(f"ray://127.0.0.1:{listener.getsockname()[1]}")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("address", ["", "ray://", "ray://a/b", "host:port", "host:0", "host:99999"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="not an address"):
        reach.parse(address)
    assert reach.parse("ray://h:6379") == ("ray", "h", 6379) and reach.parse("h") == ("gcs", "h", 6379)


@pytest.fixture
def lane(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(node.Lane, "host", lambda self: None)
    return node.Lane("key", 1)


def test_files_that_a_node_lacks_are_sent_once(lane, tmp_path):
    model = tmp_path / "here" / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "w.bin").write_bytes(os.urandom(3_000_000))
    text = json.dumps(node.manifest(model))
    assert lane.has(str(model), text) == str(model)  # the same file system
    away = str(tmp_path / "elsewhere" / "model")
    assert lane.has(away, text) is None
    for name, size, _ in json.loads(text):
        data = (model / name).read_bytes()
        for offset in range(0, max(size, 1), 1 << 20):
            there = lane.put(away, text, name, offset, data[offset:offset + (1 << 20)])
    assert lane.has(away, text) == there and (lane.place(away, text) / "sub" / "w.bin").read_bytes() == data
    (model / "sub" / "w.bin").write_bytes(os.urandom(3_000_000))
    assert lane.has(str(model), text) == there, "a file that has changed since is not taken for the same"
    single = tmp_path / "rows.jsonl"
    single.write_text('{"text": "a"}\n')
    listed = json.dumps(node.manifest(single))
    sent = lane.put("/far/rows.jsonl", listed, "rows.jsonl", 0, single.read_bytes())
    assert lane.has("/far/rows.jsonl", listed) == sent and open(sent).read() == single.read_text()


def test_a_lane_gives_no_file_outside_its_runs(lane):
    run_id = lane.begin(json.dumps(dict(of=7, name="a", spec=BASE, forecast={})))
    assert lane.begin(json.dumps(dict(of=7, name="a", spec=BASE, forecast={}))) == run_id == lane.find(7) and lane.find(8) is None
    with pytest.raises(ValueError, match="outside"):
        lane.read(run_id, "../../fettle.db", 0, 10)
    with pytest.raises(ValueError, match="outside"):
        lane.put("/m", json.dumps([["../../../../x", 1, ""]]), "../../../../x", 0, b"x")
    lane.wish(run_id, "stop")
    told = json.loads(lane.news(json.dumps(dict(run=run_id, cursor=0, epoch=None, events=0, layers=0, evaluations=0, log=0))))
    assert told["row"]["status"] == "stopped"
    lane.forget(run_id)
    with pytest.raises(NotFound):
        lane.store.light(run_id)
    assert not runs.LIVE.count("lost") and not (lane.home.runs_dir / str(run_id)).exists()

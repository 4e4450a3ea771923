"""Whole sweeps with a stand-in pipeline: the conductor in its own process, the queue, pruning, stop, resume, a conductor that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from engines.errors import InputError
from workbench import cli, warm
from workbench.home import Home
from workbench.sweeps import service, view

BASE = dict(model="stdlib-lm", data="python-docs", pipeline=[{"method": "lora", "rank": 8}], budget={"steps": 20},
            training={"lr": 1e-3, "precision": "fp32"})


@pytest.fixture(scope="module")
def sweeps_home(tmp_path_factory):
    """One home with one warm worker for the whole file: its imports are paid once."""
    patch = pytest.MonkeyPatch()
    path = tmp_path_factory.mktemp("sweeps")
    patch.setenv("WORKBENCH_HOME", str(path))
    patch.setenv("WORKBENCH_PIPELINE", "tests.workbench.sweeping:hill")
    patch.setenv("WORKBENCH_WARM_IDLE", "30")
    home, mark = Home.open(), warm.stamp()
    patch.setattr(warm, "stamp", lambda: mark)  # an editor that saves a file meanwhile must not cost another start

    def conduct(home, sweep_id):
        code = (f"from workbench import warm\nwarm.stamp = lambda: {mark!r}\n"
                f"from workbench.sweeps import conductor\nconductor.main(['{sweep_id}'])")
        (home.path / "sweeps").mkdir(exist_ok=True)
        with open(home.path / "sweeps" / f"{sweep_id}.log", "ab") as out:
            return subprocess.Popen([sys.executable, "-c", code], cwd=warm.ROOT, stdout=out, stderr=out, start_new_session=True).pid
    patch.setattr(service, "conduct", conduct)
    warm.ensure(home.path)
    yield home
    for row in home.store.sweeps(status="running"):
        service.stop(row["id"], home=home)
    try:
        warm.call(home.path, {"op": "end"}, mark=mark)
    except OSError:
        pass
    patch.undo()


@pytest.fixture
def home(sweeps_home):
    return sweeps_home


def wait(home, sweep_id, condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = view.status(sweep_id, home=home, weights=False)
        if condition(found):
            return found
        time.sleep(0.1)
    log = home.path / "sweeps" / f"{sweep_id}.log"
    raise AssertionError(f"{found['status']} {found['message']} {found['counts']}: {log.read_text() if log.exists() else ''}")


def ended(found):
    return found["status"] != "running"


def test_a_grid_runs_through_the_queue_and_has_a_front(home):
    row = service.start(BASE, dict(over={"pipeline.0.rank": [2, 8], "training.lr": [1e-3, 1e-2]}, sampler="grid",
                                   objectives=["quality", "size"]), home=home)
    assert row["forecast"]["metric"] == "bits/byte" and row["forecast"]["trials"] == 4
    found = wait(home, row["id"], ended)
    assert found["status"] == "finished" and found["counts"] == {"complete": 4}, found["message"]
    by = {(t["params"]["pipeline.0.rank"], t["params"]["training.lr"]): t for t in found["trials"]}
    assert by[2, 1e-3]["values"] == [pytest.approx(0.5), 2000] and by[8, 1e-2]["values"] == [pytest.approx(1.125), 8000]
    assert {found["trials"][n]["params"]["training.lr"] for n in found["front"]} == {1e-3} and len(found["front"]) == 2
    assert found["best"][-1]["value"] == pytest.approx(0.125)
    # trials are ordinary runs
    run = home.store.run(by[2, 1e-3]["run"])
    assert run["tags"] == [found["tag"]] and run["spec"]["pipeline"][0]["rank"] == 2 and run["status"] == "finished"
    assert home.store.count_runs(tag=found["tag"]) == 4
    assert home.store.points(run["id"], "loss_eval")["step"] == [5, 10, 15, 20]
    listed = next(s for s in view.listing(home) if s["id"] == row["id"])
    assert listed["counts"] == {"complete": 4} and listed["over"] == ["pipeline.0.rank", "training.lr"]


def test_hopeless_trials_are_stopped_early_and_counted(home):
    specs = [BASE | {"tags": ["patient"], "training": {"lr": lr, "precision": "fp32"}} for lr in (1e-3, 2e-3, 5e-4, 3e-3, 1.0, 0.9)]
    row = service.start(BASE, dict(specs=specs, pruner="median"), home=home)
    found = wait(home, row["id"], ended, 120)
    states = [t["state"] for t in found["trials"]]
    assert states[:4] == ["complete"] * 4 and states[4:] == ["pruned"] * 2, states
    poor = found["trials"][4]
    assert "median" in poor["message"] and "held-out loss" in poor["message"]
    events = home.store.events(poor["run"], kind="pruned")
    assert [e["text"] for e in events] == [poor["message"]]
    assert home.store.light(poor["run"])["status"] == "stopped"
    assert home.store.points(poor["run"], "loss")["step"][-1] < 20
    assert not set(found["front"]) & {4, 5}


def test_what_does_not_fit_is_recorded_without_being_run(home):
    row = service.start(BASE | {"budget": {"steps": 20, "trainable": 60_000}},
                        dict(over={"pipeline.0.rank": [1, 64], "seed": [0, 13]}, sampler="grid"), home=home)
    found = wait(home, row["id"], ended)
    states = {(t["params"]["pipeline.0.rank"], t["params"]["seed"]): t for t in found["trials"]}
    assert states[1, 0]["state"] == "complete" and states[1, 13]["state"] == "failed"
    for seed in (0, 13):
        assert states[64, seed]["state"] == "infeasible" and states[64, seed]["run"] is None
        assert states[64, seed]["message"].startswith("Does not fit")


def test_a_sweep_whose_first_trials_all_fail_ends_with_the_cause(home):
    row = service.start(BASE | {"seed": 13}, dict(over={"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, trials=10), home=home)
    found = wait(home, row["id"], ended)
    assert found["status"] == "failed" and found["counts"] == {"failed": 3} and "all failed" in found["message"]


def test_a_conductor_that_is_killed_is_replaced_and_nothing_is_run_twice(home):
    row = service.start(BASE, dict(over={"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, trials=6), name="slow", home=home)
    wait(home, row["id"], lambda f: f["counts"].get("complete", 0) >= 1 and home.store.count_runs(status="running"))
    owner = home.store.sweep(row["id"])["owner"]
    os.kill(int(owner.split(":")[1]), signal.SIGKILL)
    killed = time.time()
    deadline = time.monotonic() + 40
    while not service.revive(home) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert service.SILENT - 1 < time.time() - killed < 30
    found = wait(home, row["id"], ended)
    assert found["status"] == "finished" and found["counts"] == {"complete": 6}
    assert home.store.count_runs(tag=found["tag"]) == 6
    assert home.store.sweep(row["id"])["owner"] != owner


def test_stop_and_resume(home):
    row = service.start(BASE, dict(over={"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, trials=4), name="slow-two", home=home)
    with pytest.raises(InputError, match="running already"):
        service.resume(row["id"], home=home)
    wait(home, row["id"], lambda f: f["counts"].get("running") and f["counts"].get("complete"))
    service.stop(row["id"], home=home)
    found = wait(home, row["id"], ended)
    assert found["status"] == "stopped" and found["counts"].get("stopped", 0) == 1
    with pytest.raises(InputError, match="ended already"):
        service.stop(row["id"], home=home)
    service.resume(row["id"], home=home)
    found = wait(home, row["id"], ended)
    assert found["status"] == "finished" and found["counts"] == {"complete": 4}, found["counts"]
    again = next(t for t in found["trials"] if t["attempt"] == 2)
    assert home.store.light(home.store.light(again["run"])["parent"])["status"] == "stopped"
    with pytest.raises(InputError, match="finished"):
        service.resume(row["id"], home=home)
    service.resume(row["id"], trials=5, home=home)
    assert wait(home, row["id"], ended)["counts"] == {"complete": 5}


def test_minutes_of_the_whole_sweep_end_it(home):
    row = service.start(BASE, dict(over={"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, minutes=0.05), home=home)
    found = wait(home, row["id"], ended, 30)
    assert "minutes are used up" in found["message"] and 1 <= len(found["trials"]) < 20


def test_command_line(home, capsys, tmp_path):
    text = tmp_path / "s.yaml"
    text.write_text("model: stdlib-lm\ndata: python-docs\npipeline: [{method: lora, rank: 8}]\nbudget: {steps: 20}\n"
                    "training: {lr: 1e-3, precision: fp32}\nsweep:\n  over: {pipeline.0.rank: [2, 4]}\n  objectives: [quality, trainable]\n")
    assert cli.main(["sweep", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "finished" and found["counts"] == {"complete": 2} and len(found["front"]) == 2
    assert cli.main(["sweep", "--show", str(found["id"])]) == 0
    shown = capsys.readouterr().out
    assert "Pareto front" in shown and "pipeline.0.rank=4" in shown
    assert cli.main(["sweep", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == found["id"]
    assert cli.main(["sweep", str(text), "--over", "training.lrr=1,2"]) == 2
    assert capsys.readouterr().err == "training.lrr = 1: there is no field of this name. Did you mean lr?\n"
    assert cli.main(["sweep", str(text), "--over", "model=nowhere,stdlib-lm"]) == 2
    assert "no such model" in capsys.readouterr().err
    assert cli.main(["sweep", "--stop", str(found["id"])]) == 2

"""A run in two processes through queue, torchrun and database: paused, resumed, finished; and one whose second process is killed."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from engines.errors import InputError
from tests.faults.test_distributed import TRAINING, micro  # noqa: F401
from workbench import crew, runs
from workbench.spec import RunSpec

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are ended by POSIX signals here")


@pytest.fixture
def start(home, micro, monkeypatch):  # noqa: F811
    monkeypatch.delenv("WORKBENCH_PIPELINE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(crew, "check", lambda *_: None)  # a machine with one core runs two processes too, only slowly

    def begin(steps: int, **training):
        spec = RunSpec.from_dict(dict(model=str(micro / "llama"), data=str(micro / "text.txt"), pipeline=[{"method": "lora", "rank": 4}],
                                      budget={"steps": steps}, training={**TRAINING, "processes": 2, **training}))
        return runs.start(spec, home=home)["id"]
    return begin


@pytest.mark.slow
def test_pause_resume_and_the_loss_of_a_process(home, server, start, wait, curve):
    run_id = start(600, checkpoint_seconds=3600.0)
    wait(run_id, lambda r: max(curve(run_id), default=0) >= 5 or r["status"] == "finished", 120)
    runs.pause(run_id, home=home)
    row = wait(run_id, ("paused", "finished"), 60)
    assert row["status"] == "paused", "the machine is too fast for this test: raise steps"
    reached = max(curve(run_id))
    assert "2 processes over gloo" in home.log(run_id).read_text()
    runs.resume(run_id, home=home)
    row = wait(run_id, lambda r: max(curve(run_id)) > reached + 5, 120)
    assert sorted(curve(run_id))[: reached + 1] == list(range(1, reached + 2))
    others = [p for p in psutil.Process(row["pid"]).parent().children() if p.pid != row["pid"] and p.name().startswith("python")]
    assert len(others) == 1
    os.kill(others[0].pid, signal.SIGKILL)
    row = wait(run_id, ("failed", "lost", "finished"), 60)
    assert row["status"] == "failed" and "nother of the run's 2 processes ended without a word" in row["error"]["cause"]
    assert not psutil.pid_exists(others[0].pid) or psutil.Process(others[0].pid).status() == psutil.STATUS_ZOMBIE


def test_what_this_machine_cannot_do_is_refused():
    spec = RunSpec.from_dict(dict(model="m", data="d", pipeline=["lora"], training={"processes": 3}))
    crew.check(spec, "cpu", 0, 4)
    crew.check(spec, "cuda", 4, 1)
    for where in (("cpu", 0, 2), ("cuda", 2, 64)):
        with pytest.raises(InputError, match="this machine has 2 (cores|GPUs). Give at most 2"):
            crew.check(spec, *where)
    with pytest.raises(InputError, match="only training is divided"):
        crew.check(spec.replace(pipeline=()), "cuda", 8, 8)
    with pytest.raises(InputError, match="Raise training.batch to 3"):
        spec.setting("training.batch", 2)


def test_a_forecast_counts_each_process(monkeypatch, tmp_path):
    """A wide batch: half the rows in each process, the same memory for weights, the exchange of gradients on top."""
    from workbench import planner
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    monkeypatch.setattr(crew, "check", lambda *_: None)
    given = dict(model="stdlib-lm", data="python-docs", pipeline=["full"], budget={"steps": 50},
                 training={"batch": 64, "length": 256, "accumulation": 1, "checkpointing": False, "precision": "fp32"})
    one = planner.forecast(given)
    two = planner.forecast({**given, "training": {**given["training"], "processes": 2}})
    parts = [next(p for p in f["memory"]["phases"] if p["phase"] == "1 full")["parts"] for f in (one, two)]
    assert parts[0]["weights"] == parts[1]["weights"] and parts[0]["optimizer"] == parts[1]["optimizer"]
    assert 0.4 < parts[1]["activations"] / parts[0]["activations"] < 0.7
    assert two["training"]["micro_batch"] == 32 and two["memory"]["how"].startswith("each of 2 processes")
    assert parts[1]["gradients"] > parts[0]["gradients"] and two["steps"] == one["steps"] == 50
    gpu = crew.exchange_seconds(1e9, 4, "cuda"), crew.exchange_seconds(1e9, 2, "cuda"), crew.exchange_seconds(1e9, 1, "cuda")
    assert gpu[0] > gpu[1] > gpu[2] == 0.0

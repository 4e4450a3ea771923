"""One home with one warm worker for all fault tests: its imports are paid once."""

from __future__ import annotations

import os
import time

import pytest

from workbench import runs, warm
from workbench.dispatcher import Dispatcher
from workbench.home import Home
from workbench.spec import RunSpec

PIPELINES = "tests.faults.pipelines"


@pytest.fixture(scope="package")
def faults_home(tmp_path_factory):
    before = {k: os.environ.get(k) for k in ("WORKBENCH_HOME", "WORKBENCH_WARM_IDLE")}
    path = tmp_path_factory.mktemp("faults")
    os.environ.update(WORKBENCH_HOME=str(path), WORKBENCH_WARM_IDLE="30")
    home, mark = Home.open(), warm.stamp()
    patch = pytest.MonkeyPatch()
    patch.setattr(warm, "stamp", lambda: mark)  # an editor that saves a file meanwhile must not cost another start
    warm.ensure(home.path)
    yield home
    patch.undo()
    for mark in path.glob("warm-*.sock"):
        try:
            warm.call(home.path, {"op": "end"}, mark=mark.stem.removeprefix("warm-"))
        except OSError:
            pass
    for key, value in before.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


@pytest.fixture
def home(faults_home, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(faults_home.path))
    yield faults_home
    for row in faults_home.store.runs(status=runs.LIVE, limit=None):
        runs.kill(row["id"], home=faults_home)


@pytest.fixture
def server(home):
    dispatcher = Dispatcher(home).start()
    yield dispatcher
    dispatcher.stop()


@pytest.fixture
def begin(home, monkeypatch):
    """Queue a run of one of the test pipelines."""
    def start(pipeline: str = "curve", steps: int = 100, **budget):
        monkeypatch.setenv("WORKBENCH_PIPELINE", f"{PIPELINES}:{pipeline}")
        spec = RunSpec.from_dict(dict(model="m", data="d", pipeline=["lora"], budget={"steps": steps, **budget}))
        return runs.record(spec, spec, {}, queue=True, home=home)["id"]
    return start


@pytest.fixture
def wait(home):
    """Wait for a state, or for a condition on the row; returns the row."""
    def until(run_id: int, condition, seconds: float = 30.0):
        wanted = (condition,) if isinstance(condition, str) else condition
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            row = home.store.light(run_id)
            if wanted(row) if callable(wanted) else row["status"] in wanted:
                return row
            time.sleep(0.02)
        log = home.log(run_id)
        text = log.read_text() if log.exists() else ""
        raise AssertionError(f"run {run_id} is {row['status']} ({row['message']}) after {seconds} s: {text}")
    return until


@pytest.fixture
def curve(home):
    """All points of a series, as {step: value}."""
    def read(run_id: int, series: str = "loss"):
        found = home.store.points(run_id, series)
        return dict(zip(found["step"], found["value"]))
    return read

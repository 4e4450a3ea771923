"""A ZeroGPU Space: the run is one slice under ``spaces.GPU``, executed as a guest."""

import sys
import types

import pytest

from workbench import dispatcher, machine, space


@pytest.fixture
def zero_gpu(monkeypatch, tmp_path):
    """A stand-in for the package ``spaces`` that records what was decorated and calls it in this process."""
    calls = []
    package = types.ModuleType("spaces")

    def gpu(duration=60):
        def wrap(fn):
            def call(*a):
                calls.append((duration, a[0]))
                return fn(*a)
            return call
        return wrap

    package.GPU = gpu
    package.__spec__ = types.SimpleNamespace(name="spaces")
    monkeypatch.setitem(sys.modules, "spaces", package)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setenv("WORKBENCH_PIPELINE", "tests.faults.pipelines:steps")
    space.decorated.cache_clear()
    yield calls
    space.decorated.cache_clear()


def test_elsewhere_nothing_is_a_slice(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert not machine.zero_gpu()


def test_slice_length_is_read_and_has_a_floor(monkeypatch):
    monkeypatch.setenv("FETTLE_SLICE_SECONDS", "120")
    assert space.seconds() == 120
    monkeypatch.setenv("FETTLE_SLICE_SECONDS", "1")
    assert space.seconds() > space.MARGIN
    monkeypatch.setenv("FETTLE_SLICE_SECONDS", "soon")
    assert space.seconds() == space.SLICE


def test_dispatcher_hands_the_run_to_the_slice(zero_gpu, tmp_path, monkeypatch):
    from workbench.home import Home
    home = Home.open(tmp_path)
    run = home.store.create_run({"model": "none", "data": "none", "pipeline": [], "budget": {}, "seed": 0}, name="slice")
    monkeypatch.setattr(space, "execute", lambda run_id, path, length: home.store.transition(run_id, ("starting",), "finished") and 0)
    feeder = dispatcher.Dispatcher(home, keep_warm=False)
    claimed = home.store.claim_next(feeder.owner)
    assert claimed["id"] == run
    feeder.spawn(claimed, {})
    assert zero_gpu == [(60, run)]
    assert home.store.run(run)["status"] == "finished"

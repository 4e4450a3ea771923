"""The warm worker: one per home, private, replaced after an upgrade, gone when nobody needs it."""

from __future__ import annotations

import os
import stat
import time

import pytest

from workbench import telemetry, warm

pytestmark = pytest.mark.skipif(not warm.supported(), reason="forking is for Linux")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_WARM_IDLE", "1.0")
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    mark = warm.stamp()
    monkeypatch.setattr(warm, "stamp", lambda: mark)
    return tmp_path


def _ready(home, seconds=60.0) -> dict:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return warm.call(home, {"op": "ping"}, timeout=seconds)
        except OSError:
            time.sleep(0.05)
    raise AssertionError((home / "warm.log").read_text())


def test_one_private_process_that_ends_by_itself(home):
    mark = warm.ensure(home)
    path = warm.socket_path(home, mark)
    first = _ready(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    warm.ensure(home)
    assert _ready(home)["pid"] == first["pid"] and first["ready"]
    while (known := _ready(home))["loading"]:
        time.sleep(0.1)
    assert known["threads"] == 1  # a fork copies one thread only; a lock that another one holds would stay locked
    with open(f"/proc/{first['pid']}/maps") as maps:
        loaded = maps.read()
    assert "libtorch_cpu" in loaded and "libcuda.so" not in loaded  # ready to compute, no CUDA context
    deadline = time.monotonic() + 15
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not path.exists() and not list(home.glob("warm-*.lock"))


def test_stamp_changes_with_sources_and_import_settings_only(tmp_path, monkeypatch):
    (tmp_path / "engines").mkdir()
    source = tmp_path / "engines" / "x.py"
    source.write_text("a = 1")
    monkeypatch.setattr(warm, "ROOT", tmp_path)
    first = warm.stamp()
    assert warm.stamp() == first
    (tmp_path / "engines" / "notes.txt").write_text("no source")
    monkeypatch.setenv("WORKBENCH_HOME", "/elsewhere")
    assert warm.stamp() == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if os.environ.get("HF_HUB_OFFLINE") != "1" else "0")
    second = warm.stamp()
    source.write_text("a = 12")
    assert len({first, second, warm.stamp()}) == 3


def test_a_long_home_gets_a_private_socket_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = warm.socket_path(tmp_path / ("x" * 120), "abc")
    assert len(os.fsencode(path)) < 108 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(OSError, match="somebody else"):
        warm.socket_path(tmp_path / ("x" * 120), "abc")


def test_computing_processes_sleep_while_they_wait():
    made = warm.quiet_environment({})
    assert made["GOMP_SPINCOUNT"] == "20000" and made["KMP_BLOCKTIME"] == "1"
    assert warm.quiet_environment({"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"
    assert 1 <= telemetry.threads() <= (os.cpu_count() or 1)

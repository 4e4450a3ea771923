"""Real exceptions, made here, and what the failure doctor says of them."""

from __future__ import annotations

import errno
import json
import signal
import sqlite3

import numpy as np
import pytest

from engines.errors import InputError, RunFailed
from workbench import doctor


def _raised(make) -> BaseException:
    try:
        make()
    except BaseException as e:
        return e
    raise AssertionError("nothing was raised")


def _torch_memory():
    import torch
    torch.empty(2**50, dtype=torch.uint8)


def _label():
    import torch
    torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 7]))


def _token():
    import torch
    torch.nn.Embedding(4, 2)(torch.tensor([9]))


def _shapes():
    import torch
    torch.zeros(2, 3) @ torch.zeros(4, 5)


def _cholesky():
    import torch
    torch.linalg.cholesky(-torch.eye(3))


def _state_dict():
    import torch
    torch.nn.Linear(2, 3).load_state_dict({"weight": torch.zeros(5, 2), "bias": torch.zeros(3)})


def _safetensors(tmp):
    from safetensors import safe_open
    (tmp / "bad.safetensors").write_bytes(b"\xff" * 64)
    safe_open(tmp / "bad.safetensors", "np")


def _architecture(tmp):
    from transformers import AutoConfig
    (tmp / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    AutoConfig.from_pretrained(tmp)


def _column():
    rows = {"content": ["a"]}
    raise_at = compile("rows['text']", "engines/data/table.py", "eval")
    eval(raise_at, {"rows": rows})


def _disk():
    raise OSError(errno.ENOSPC, "No space left on device", "/x/y")


def _chained():
    try:
        _disk()
    except OSError as e:
        raise ValueError("the checkpoint could not be written") from e


def _full_database():
    db = sqlite3.connect(":memory:")
    db.execute("PRAGMA max_page_count = 2")
    db.execute("CREATE TABLE t (x)")
    db.execute("INSERT INTO t VALUES (zeroblob(100000))")


def _locked(tmp):
    a = sqlite3.connect(tmp / "x.db", isolation_level=None)
    b = sqlite3.connect(tmp / "x.db", timeout=0)
    a.execute("CREATE TABLE t (x)")
    a.execute("BEGIN EXCLUSIVE")
    try:
        b.execute("INSERT INTO t VALUES (1)")
    finally:
        a.close()


def _hub():
    import socket
    socket.create_connection(("no-such-host.invalid", 443), timeout=2)


CASES = [
    ("memory", lambda tmp: np.ones(2**48)), ("memory", lambda tmp: _torch_memory()), ("label mismatch", lambda tmp: _label()),
    ("token out of range", lambda tmp: _token()), ("shapes", lambda tmp: _shapes()), ("not positive definite", lambda tmp: _cholesky()),
    ("wrong architecture", lambda tmp: _state_dict()), ("broken weights", _safetensors), ("wrong architecture", _architecture),
    ("bad data column", lambda tmp: _column()), ("disk full", lambda tmp: _disk()), ("disk full", lambda tmp: _chained()),
    ("disk full", lambda tmp: _full_database()), ("database busy", _locked), ("hub unreachable", lambda tmp: _hub()),
    ("missing file", lambda tmp: open(tmp / "nothing.csv")), ("bad data", lambda tmp: json.loads("{")),
    ("bad data", lambda tmp: b"\xff\xfe".decode()), ("missing package", lambda tmp: __import__("no_such_package")),
    ("unknown", lambda tmp: {}["x"]),
]


@pytest.mark.parametrize("kind,make", CASES, ids=[f"{i}-{k}" for i, (k, _) in enumerate(CASES)])
def test_real_exceptions_get_a_cause_and_a_remedy(kind, make, tmp_path):
    found = doctor.diagnose(_raised(lambda: make(tmp_path)), "first line\nlast line\n")
    assert found["kind"] == kind, found
    for text in (found["cause"], found["remedy"]):
        assert text.endswith(".") and not text.endswith("..") and "\n" not in text and "{" not in text
    assert found["log"] == ["first line", "last line"] and "Traceback" in found["trace"] and found["exception"]


def test_names_what_is_missing(tmp_path):
    assert "nothing.csv" in doctor.diagnose(_raised(lambda: open(tmp_path / "nothing.csv")))["cause"]
    assert "text" in doctor.diagnose(_raised(_column))["cause"]
    assert "no_such_package" in doctor.diagnose(_raised(lambda: __import__("no_such_package")))["remedy"]
    assert "7" in doctor.diagnose(_raised(_label))["cause"]


def test_our_own_errors_keep_their_words():
    found = doctor.diagnose(InputError("data.text", "body", "there is no such column", "Choose one of title, content"))
    assert found["kind"] == "input" and "body" in found["cause"] and found["remedy"] == "Choose one of title, content."
    failed = RunFailed("the loss stopped being a finite number at step 3", "Lower the learning rate")
    found = doctor.diagnose(failed)
    assert found["kind"] == "not finite" and "step 3" in found["cause"] and found["remedy"] == "Lower the learning rate."


@pytest.mark.parametrize("given,kind", [
    (dict(exit_signal=signal.SIGKILL), "killed"), (dict(exit_signal=signal.SIGKILL, oom_kills=1), "memory"),
    (dict(exit_signal=signal.SIGKILL, peak_bytes=90, total_bytes=100), "memory"),
    (dict(exit_signal=signal.SIGKILL, peak_bytes=50, total_bytes=100), "killed"),
    (dict(exit_signal=signal.SIGSEGV), "crash"), (dict(exit_signal=signal.SIGTERM), "ended"), (dict(), "unknown"),
    (dict(exit_code=3), "unknown")])
def test_processes_that_could_not_speak(given, kind):
    assert doctor.diagnose(None, "all was well\n", **given)["kind"] == kind


@pytest.mark.parametrize("line,kind", [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "gpu memory"),
    ("RuntimeError: CUDA error: an illegal memory access was encountered", "gpu"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "memory"),
    ("OSError: [Errno 28] No space left on device", "disk full"),
    ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "hub access")])
def test_the_log_speaks_for_a_process_that_died(line, kind):
    found = doctor.diagnose(None, f"loading\n  File \"x.py\", line 3\n{line}\n", exit_code=1)
    assert found["kind"] == kind and found["log"][-1] == line


def test_words_of_an_ordinary_log_are_no_diagnosis():
    log = "the table is empty of nothing\nloss 0.3, nan never\nno rows of this kind\nCUDA error handling enabled: False\n"
    assert doctor.diagnose(None, log, exit_code=1)["kind"] == "unknown"

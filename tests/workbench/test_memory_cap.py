"""The memory limit on the processor: the kernel refuses what would pass it, the reporter judges refusals and keeps what was lowered."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage import Store
from workbench import reporting, telemetry
from workbench.reporting import StoreReporter
from workbench.worker import merge

ROOT = Path(__file__).resolve().parents[2]
CAPPED = """
import torch
from engines.shortage import short
from workbench import telemetry
import psutil
kept = torch.ones(1_000_000)
cap = telemetry.DataCap(psutil.Process().memory_info().rss + 200_000_000)
assert cap.renew() and cap.soft
small = torch.ones(25_000_000)
try:
    torch.ones(60_000_000)
    raise SystemExit("nothing was refused")
except RuntimeError as e:
    assert short(e), e
assert telemetry.peak_rss() < cap.limit, (telemetry.peak_rss(), cap.limit)
assert not cap.renew(), "what was refused was not there"
cap.lift()
print(len(torch.ones(60_000_000)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA covers memory maps on Linux only")
def test_the_kernel_keeps_the_limit_and_the_refusal_is_recognised():
    done = subprocess.run([sys.executable, "-c", CAPPED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "60000000", done.stderr


@pytest.fixture
def reporter(tmp_path):
    store = Store(tmp_path / "f.db")
    run = store.create_run({"model": "m"}, name="r", status="running")
    made = StoreReporter(store, run, stages=[{"method": "lora", "settings": {}}])
    yield made
    made.close()


class Cap:
    """Notes what is asked of it."""

    limit, soft = 1000, None

    def __init__(self, room):
        self.room, self.asked = room, []

    def renew(self):
        self.asked.append("renew")
        self.soft = 1
        return self.room

    def lift(self):
        self.asked.append("lift")
        self.soft = None


def test_the_limit_is_kept_from_the_first_evaluation_to_the_save(reporter):
    reporter.cap = Cap(True)
    for phase in ("load", "evaluate", "1 lora", "evaluate", "save", "evaluate", "speed"):
        reporter.phase(phase)
    assert reporter.cap.asked == ["lift", "renew", "lift", "renew", "lift"]


def test_a_refusal_far_below_the_limit_is_not_believed(reporter, monkeypatch):
    peak = [700]
    monkeypatch.setattr(telemetry, "peak_rss", lambda: peak[0])
    monkeypatch.setattr(reporting, "give_back", lambda: None)
    reporter.cap = Cap(True)
    reporter.phase("1 lora")
    assert reporter.relax()
    peak[0] = 900
    assert not reporter.relax(), "nine tenths were resident"
    peak[0], reporter.cap.room = 700, False
    assert not reporter.relax(), "there is no more room than before"


def test_a_peak_between_two_samples_is_heard_at_the_next_step(reporter, monkeypatch):
    monkeypatch.setattr(reporting, "give_back", lambda: None)
    monkeypatch.setattr(telemetry, "reset_peak", lambda: None)
    monkeypatch.setattr(telemetry, "peak_rss", lambda: 400)
    reporter.limit = 500.0
    reporter.phase("1 lora")
    assert reporter.wants() is None
    monkeypatch.setattr(telemetry, "peak_rss", lambda: 600)
    assert reporter.wants() == "memory" and reporter.phases["1 lora"]["peak_bytes"] == 600
    monkeypatch.setattr(telemetry, "peak_rss", lambda: 400)
    assert reporter.wants() is None
    assert reporter.phases["1 lora"]["peak_bytes"] == 600


def test_what_was_lowered_is_in_the_footprint(reporter):
    reporter.phase("1 lora")
    reporter.event("memory", "Out of memory", knob="accumulation", before=1, after=2)
    reporter.event("memory", "Main memory is at 1 GB", bytes=1)
    outcome = SimpleNamespace(measured={})
    found = merge({"retried": [{"knob": "evaluation_tokens", "before": 8192, "after": 4096, "phase": "evaluate"}]}, [], outcome, reporter, None)
    assert found["retried"][1] == {"knob": "accumulation", "before": 1, "after": 2, "phase": "1 lora"} and len(found["retried"]) == 2

"""The sampler: what it reads, what it costs, and what it says where there is no GPU or no counter."""

from __future__ import annotations

import subprocess
import sys
import time
import types

import psutil
import pytest

from workbench import telemetry


def _sampled(seconds: float, period: float = 0.05, **options):
    got = []
    sampler = telemetry.Sampler(got.append, period=period, **options)
    sampler.start()
    time.sleep(seconds)
    sampler.stop()
    return got, sampler


def test_reads_memory_and_processor_of_the_process_tree():
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(80_000_000); import time; time.sleep(20)"])
    try:
        time.sleep(0.5)
        got, _ = _sampled(1.3)
    finally:
        child.kill()
        child.wait()
    own = psutil.Process().memory_info().rss
    assert max(g["mem/rss"] for g in got) > own + 60e6
    assert any("cpu/percent" in g for g in got) and all(g.get("cpu/percent", 0) >= 0 for g in got)


def test_ten_samples_a_second_ask_the_costly_questions_once_a_second(monkeypatch):
    clock, walked = [100.0], []
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(telemetry, "_descendants", lambda root: walked.append(clock[0]) or [])
    sampler = telemetry.Sampler(lambda _: None, period=0.1)
    sampler._root = psutil.Process()
    got = []
    for _ in range(30):
        got.append(sampler.sample())
        clock[0] += 0.1
    assert all(g["mem/rss"] > 0 for g in got) and sum("cpu/percent" in g for g in got) == 29
    assert 3 <= len(walked) <= 4


def test_a_sample_costs_a_few_reads_of_proc(monkeypatch):
    """For each process of the tree; what a run pays in percent is measured by benchmarks/logging.py; seconds on a machine that idles between samples say little."""
    monkeypatch.setattr(telemetry, "_descendants", lambda root: [])
    sampler = telemetry.Sampler(lambda _: None)
    sampler._root = psutil.Process()  # without NVML and energy counters, whose answers take what the driver takes

    def least(action) -> float:
        def once() -> float:
            began = time.thread_time()
            for _ in range(50):
                action()
            return time.thread_time() - began
        return min(once() for _ in range(10))

    def read():
        with open("/proc/self/stat") as f:
            f.read()
    if not telemetry.Path("/proc/self/stat").exists():
        pytest.skip("this system has no /proc to compare with")
    sampler.sample()
    assert least(sampler.sample) < 12 * least(read), "about 3 reads without a GPU"


def test_memory_over_the_limit_is_told_after_two_samples():
    told = []
    sampler = telemetry.Sampler(lambda _: None, memory_limit=100, over=told.append)
    sampler._watch(200)
    assert told == []
    sampler._watch(200)
    assert told == [200]
    sampler._watch(50)
    sampler._watch(200)
    assert told == [200]  # one sample alone may be a copy that is freed at once


def test_a_failing_sink_does_not_end_the_thread(capsys):
    calls = []

    def sink(values):
        calls.append(values)
        raise ValueError("full")
    sampler = telemetry.Sampler(sink, period=0.02)
    sampler.start()
    time.sleep(0.3)
    sampler.stop()
    assert len(calls) > 3 and "full" in capsys.readouterr().err


def test_peak_of_the_resident_set_is_that_of_the_phase():
    if not telemetry.reset_peak():
        pytest.skip("this kernel does not let a process reset its high-water mark")
    before = telemetry.peak_rss()
    held = bytearray(b"x" * 120_000_000)
    high = telemetry.peak_rss()
    assert high > before + 100e6
    del held
    telemetry.reset_peak()
    assert telemetry.peak_rss() < high - 50e6


class _Error(Exception):
    pass


def _fake(monkeypatch, **answers):
    """A pynvml whose questions have these answers; what is not named is refused."""
    asked = []

    def get(name):
        def answer(*args):
            asked.append(name)
            if name not in answers:
                raise _Error("Insufficient Permissions")
            value = answers[name]
            if isinstance(value, list) and name == "TotalEnergyConsumption":
                return value.pop(0) if len(value) > 1 else value[0]
            return value
        return answer
    module = types.ModuleType("pynvml")
    module.NVMLError, module.nvmlInit = _Error, lambda: None
    names = ("Count", "HandleByIndex", "Name", "MemoryInfo", "ComputeRunningProcesses", "GraphicsRunningProcesses", "UtilizationRates",
             "PowerUsage", "Temperature", "ClockInfo", "TotalEnergyConsumption")
    for name in names:
        setattr(module, f"nvmlDeviceGet{name}", get(name))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return asked


def test_gpu_figures_and_energy(monkeypatch):
    process = types.SimpleNamespace(pid=psutil.Process().pid, usedGpuMemory=700)
    other = types.SimpleNamespace(pid=1, usedGpuMemory=9000)
    _fake(monkeypatch, Count=1, HandleByIndex="h", Name="NVIDIA H200", MemoryInfo=types.SimpleNamespace(used=9700, total=20000),
          ComputeRunningProcesses=[process, other], GraphicsRunningProcesses=[], UtilizationRates=types.SimpleNamespace(gpu=83),
          PowerUsage=412_000, Temperature=55, ClockInfo=1980, TotalEnergyConsumption=[1_000_000, 1_002_500])
    got, sampler = _sampled(0.3)
    assert got[-1] | {"gpu/util": 83, "gpu/power": 412, "gpu/temperature": 55, "gpu/clock": 1980, "mem/device": 9700,
                      "mem/process": 700, "energy/joules": 2.5} == got[-1]
    assert sampler.energy.kind == "NVML energy counter"


def test_refused_counters_are_left_out_and_not_asked_again(monkeypatch):
    """A MIG slice answers memory, but neither utilisation nor power nor energy."""
    asked = _fake(monkeypatch, Count=1, HandleByIndex="h", Name="NVIDIA H200 MIG 1g", ComputeRunningProcesses=[],
                  MemoryInfo=types.SimpleNamespace(used=5, total=10), GraphicsRunningProcesses=[])
    got, sampler = _sampled(0.4)
    assert got[-1]["mem/device"] == 5 and not any(k.startswith("gpu/") or k == "mem/process" for k in got[-1])
    assert asked.count("UtilizationRates") == 1
    assert sampler.energy.kind in (None, "RAPL")


@pytest.mark.parametrize("shown,reason", [("", "hides"), ("-1", "hides")])
def test_hidden_gpus_are_named_as_the_reason(monkeypatch, shown, reason):
    _fake(monkeypatch, Count=1, HandleByIndex="h")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert reason in telemetry.Nvml().reason


def test_says_why_there_is_no_gpu(monkeypatch):
    module = types.ModuleType("pynvml")
    module.NVMLError = _Error

    def init():
        raise _Error("NVML Shared Library Not Found")
    module.nvmlInit = init
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert telemetry.Nvml().reason == "No NVIDIA driver answered (library not found)"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in telemetry.Nvml().reason


def test_energy_of_the_processor_survives_a_wrap(monkeypatch, tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("9000000")
    (zone / "max_energy_range_uj").write_text("10000000")
    monkeypatch.setattr(telemetry, "RAPL", tmp_path)
    energy = telemetry.Energy(None)
    (zone / "energy_uj").write_text("1000000")
    assert energy.kind == "RAPL" and energy.read() == pytest.approx(2.0)
    monkeypatch.setattr(telemetry, "RAPL", tmp_path / "nothing")
    none = telemetry.Energy(None)
    assert none.read() is None and none.reason == "no energy counter here"


def test_device_summary_needs_no_torch_and_little_time():
    code = ("import json, sys, time; from workbench.telemetry import device_summary; device_summary(); took = []\n"
            "for _ in range(10):\n t = time.perf_counter(); found = device_summary(); took.append(time.perf_counter() - t)\n"
            "print(json.dumps([found, min(took), 'torch' in sys.modules]))")
    found, seconds, torch = __import__("json").loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not torch and seconds < 0.02
    assert found["kind"] == "cuda" or found["reason"]
    assert found["memory"]["total"] > found["memory"]["used"] > 0 and found["cpu"]["cores"] >= 1 and found["text"]

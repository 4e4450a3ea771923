"""Pipelines for tests of the run's life: no model, a curve that depends on the step alone, checkpoints like the real ones."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import numpy as np

from engines.errors import StopRequested


def _loss(step: int) -> float:
    return 4.0 / (1 + step) ** 0.5 + 0.01 * ((step * 2654435761) % 97)


def curve(spec, *, reporter, folder, device="cpu", resume=False, estimates=None):
    """``budget.steps`` steps of 10 ms; a checkpoint every 20 of them; stops, pauses and resumes as the real loop does."""
    reporter.phase("load")
    total, step = spec.budget.steps or 200, 0
    place = folder / "pipeline.json"
    if resume and place.exists():
        found = sorted((folder / "checkpoints").glob("step-*"))
        step = json.loads((found[-1] / "checkpoint.json").read_text())["facts"]["run_step"] if found else 0
        reporter.event("resume", f"Resumed from step {step}", step=step)
    else:
        place.write_text(json.dumps(dict(index=0, base_step=0)))
    reporter.phase("1 lora")
    status = "finished"
    while step < total:
        time.sleep(0.01)
        step += 1
        reporter.points(step, {"loss": _loss(step), "tokens_per_second": 1000.0})
        reporter.progress(step / total, (total - step) * 0.01)
        if step % 20 == 0:
            _checkpoint(folder, step)
            reporter.event("checkpoint", f"Checkpoint at step {step}", step=step)
        if (want := reporter.wants()) in ("stop", "pause"):
            _checkpoint(folder, step)
            if want == "pause":
                raise StopRequested("pause")
            status = "stopped"
            break
    reporter.phase("evaluate")
    scores = np.linspace(1, 2, 16, dtype=np.float32)
    reporter.evaluation("result", 1, SimpleNamespace(metric="bits/byte", value=1.5, low=1.4, high=1.6, n=16, scores=scores,
                                                     weights=scores, items_hash="x", seconds=0.1, extra={"loss": 1.0}))
    return SimpleNamespace(status=status, folder=folder, stages=[dict(index=0, steps=step)],
                           measured=dict(trainable=10, parameters=100, weight_bytes=400, sparsity=0.0, bits_per_weight=32.0))


def _checkpoint(folder, step):
    path = folder / "checkpoints" / f"step-{step:09d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "checkpoint.safetensors").write_bytes(b"")
    (path / "checkpoint.json").write_text(json.dumps(dict(facts=dict(run_step=step, step=step, stage=0, used=step * 0.01))))


def fail(spec, *, reporter, folder, **_):
    reporter.phase("load")
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.")


def deaf(spec, *, reporter, folder, **_):
    """Never asks what the person wants."""
    reporter.phase("1 lora")
    time.sleep(600)


def vanish(spec, *, reporter, folder, **_):
    """Ends the process without a word, as a crash in native code does."""
    os.kill(os.getpid(), 11)
    time.sleep(60)


def hungry(spec, *, reporter, folder, **_):
    """Holds more memory than ``budget.memory_gb`` until it is told so."""
    held = np.ones(60_000_000)  # 480 MB
    reporter.phase("1 lora")
    for step in range(1, 1000):
        time.sleep(0.01)
        reporter.points(step, {"loss": 1.0})
        if reporter.wants() == "memory":
            del held
            raise MemoryError("the memory limit was passed")
    raise AssertionError("nobody said that memory is short")

"""The measurement behind ``workbench.machine.calibrate``: ``python -m workbench.machine_speed`` prints it as one line of JSON."""

from __future__ import annotations

import json
import os
import time

from workbench import preload
from workbench.machine import REFERENCE, REFERENCE_BATCH, WORKER_BYTES


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def measure() -> dict:
    """The measurement itself; imports torch, so it runs in a child process only.

    Matrix products 1024 x 1024 x 1024 (about the size of a training step's on small models), best of several; the
    resident set after importing what a run imports and one training step of a tiny network.
    """
    import importlib

    import torch

    started = time.perf_counter()
    for name in ("transformers", "peft"):
        importlib.import_module(name)
    imports = time.perf_counter() - started
    preload.everything()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    imported, inference, resident = _forked(_levels) if where == "cpu" and hasattr(os, "fork") else _levels(where)
    from transformers import AutoModelForCausalLM, LlamaConfig

    steps = {
        kind: _reference_step(AutoModelForCausalLM.from_config(LlamaConfig(**REFERENCE)).to(where), kind, where)
        for kind in ("float32", "bfloat16")
    }
    large = torch.zeros(64_000_000, dtype=torch.uint8, device=where)
    copied = min(_timed(lambda: large.clone(), where) for _ in range(5))
    size, flops = (8192 if where == "cuda" else 1024), {}
    for kind in ("float32", "bfloat16"):
        a = torch.randn(size, size, device=where).to(getattr(torch, kind))
        best, until = float("inf"), time.perf_counter() + 1.0
        a @ a
        while time.perf_counter() < until:
            if where == "cuda":
                torch.cuda.synchronize()
            t = time.perf_counter()
            a @ a
            if where == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - t)
        flops[kind] = 2 * size**3 / best
    return {
        "flops": flops,
        "context_bytes": resident + WORKER_BYTES,
        "imported_bytes": imported + WORKER_BYTES,
        "inference_bytes": inference + WORKER_BYTES,
        "bandwidth": 2 * large.numel() / copied,
        "reference": steps,
        "import_seconds": imports,
        "threads": torch.get_num_threads(),
        "how": f"best product of two {size} x {size} matrices in one second each; best of five copies of 64 MB; best of three "
        "training steps of a small Llama; resident set of a process with torch, transformers and peft after one training "
        "step of a tiny model",
    }


def _levels(where: str = "cpu") -> list[int]:
    """Resident bytes after the imports, after forward passes, and after training steps of a tiny model in both precisions."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=256)
    found = [_resident()]
    micro = AutoModelForCausalLM.from_config(LlamaConfig(**{**REFERENCE, **sizes})).to(where)
    ids = torch.zeros(4, 32, dtype=torch.long, device=where)
    for train in (False, True):
        optimizer = torch.optim.AdamW(micro.parameters(), fused=True) if train else None
        for half in (False, True):
            with torch.inference_mode(not train), torch.autocast(where, torch.bfloat16, enabled=half):
                loss = micro(input_ids=ids, labels=ids).loss
            if train:
                loss.backward()
                optimizer.step()
        found.append(_resident())
    return found


def _forked(work) -> list[int]:
    """The numbers that ``work`` returns in a forked child, which is how the warm worker begins a run: files that were mapped before
    the fork count there only once they are touched."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def _timed(work, where: str) -> float:
    import torch

    if where == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if where == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _reference_step(model, kind: str, where: str) -> float:
    """Seconds of the best of three training steps of the reference model."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, REFERENCE["vocab_size"], REFERENCE_BATCH, device=where)

    def step():
        with torch.autocast(where, torch.bfloat16, enabled=kind == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return min(_timed(step, where) for _ in range(3))


if __name__ == "__main__":
    print(json.dumps(measure()))

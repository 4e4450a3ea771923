"""What this machine is and how fast it multiplies; torch is only imported in a child process (``workbench.machine_speed``).

The planner needs three figures: FLOP/s of a training-sized matrix product in fp32 and bf16, and the resident memory
of a process that has imported what a run imports. They are measured once per home by ``calibrate`` (about ten
seconds in a child process) and kept in its database; until then careful defaults are used, and ``how`` says so.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

SETTING = "machine"
CONTEXT_BYTES = 430_000_000
"""Resident set of a process with torch, transformers and peft after its first training step, when not yet measured."""
WORKER_BYTES = 25_000_000
"""What a run's threads, database and log add to a process that has imported the rest."""
DEFAULT_FLOPS_PER_CORE = (("avx512f", 45e9), ("avx2", 22e9), ("asimd", 15e9), ("", 6e9))
"""Matrix-product FLOP/s of one core by its widest instructions, on a machine that was never measured; on the low side."""
REFERENCE = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=2048,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
"""A small model whose training step is timed: what the formulas say of it, beside what it takes, scales every forecast."""
REFERENCE_BATCH = (8, 128)
DEFAULT_GPU_FLOPS = {"float32": 20e12, "bfloat16": 80e12}


def cores() -> int:
    """Processors that this process may use, a container's share included."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            usable = min(usable, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return usable


def memory() -> dict:
    """``{"total", "available"}`` bytes of this machine or container."""
    import psutil

    seen = psutil.virtual_memory()
    total, available = seen.total, seen.available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            total = min(total, int(limit))
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return {"total": total, "available": available}


@functools.cache
def cpu() -> dict:
    """``{"name", "flags"}``; flags are those that decide a precision or a kernel."""
    wanted = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "bf16", "asimd"}
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features") and not flags:
                flags = wanted & set(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    except OSError:
        pass
    return {"name": name, "flags": sorted(flags)}


@functools.cache
def gpu() -> dict:
    """The first NVIDIA device through NVML, or why there is none.

    Returns:
        dict: ``name``, ``total`` bytes, ``count``, ``capability`` and ``reason`` ("" when there is one usable by torch).
    """
    none = {"name": None, "total": 0, "count": 0, "capability": None}
    if os.environ.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1"):
        return {**none, "reason": "CUDA_VISIBLE_DEVICES hides every GPU"}
    try:
        import pynvml
    except ImportError:
        return {**none, "reason": "the package nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return {**none, "reason": f"NVML finds no NVIDIA driver ({e})"}
    try:
        count = pynvml.nvmlDeviceGetCount()
        if not count:
            return {**none, "reason": "the NVIDIA driver reports no GPU"}
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        try:
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        except pynvml.NVMLError:
            capability = None
        found = {
            "name": name if isinstance(name, str) else name.decode(),
            "total": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            "count": count,
            "capability": capability,
            "reason": "",
        }
        if version("torch").endswith("+cpu"):
            found["reason"] = "the installed torch was built without CUDA"
        return found
    except pynvml.NVMLError as e:
        return {**none, "reason": f"NVML cannot read the GPU ({e})"}
    finally:
        pynvml.nvmlShutdown()


@functools.cache
def version(package: str) -> str:
    """Installed version without importing the package; "" when absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device() -> str:
    """``cuda`` when torch can use a GPU, else ``cpu``."""
    return "cuda" if gpu()["count"] and not gpu()["reason"] else "cpu"


def zero_gpu() -> bool:
    """True on a ZeroGPU Space, which lends its GPU by the slice: its variable is set and the package ``spaces`` is there."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true") and importlib.util.find_spec("spaces") is not None


def bf16() -> tuple[bool, str]:
    """Whether matrix products in bf16 are faster than in fp32 here, and why."""
    if device() == "cuda":
        capability = gpu()["capability"]
        fast = capability is None or tuple(capability) >= (8, 0)
        return fast, "this GPU has bf16 tensor cores" if fast else "this GPU is older than bf16 tensor cores"
    flags = set(cpu()["flags"])
    if "amx_bf16" in flags:
        return True, "this CPU has AMX bf16"
    if "avx512_bf16" in flags:
        return True, "this CPU has AVX-512 bf16"
    return False, "this CPU has no bf16 instructions"


def describe(store=None) -> dict:
    """The machine as a JSON-able dict: device, processors, memory, bf16, versions, and what was measured (or None)."""
    fast, why = bf16()
    graphics, space = gpu(), memory()
    known = measured(store)
    return {
        "device": device(),
        "name": graphics["name"] if device() == "cuda" else cpu()["name"],
        "host": platform.node(),
        "cores": cores(),
        "flags": cpu()["flags"],
        "memory_bytes": graphics["total"] if device() == "cuda" else space["total"],
        "host_memory_bytes": space["total"],
        "available_bytes": space["available"],
        "gpu": graphics,
        "gpu_reason": graphics["reason"],
        "bf16": fast,
        "bf16_reason": why,
        "python": platform.python_version(),
        "measured": known,
        "flops": {kind: throughput(kind, known) for kind in ("float32", "bfloat16")},
        "context_bytes": context_bytes(known),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "gradio", "plotly", "safetensors", "numpy")},
    }


# -- measured figures --------------------------------------------------------------------------------------------------
def fingerprint() -> str:
    """Changes when a stored measurement no longer describes this machine."""
    return "|".join([device(), gpu()["name"] or cpu()["name"], str(cores()), version("torch"), version("transformers")])


def measured(store) -> dict | None:
    """What ``calibrate`` stored for this machine, or None."""
    if store is None:
        return None
    found = store.get_setting(SETTING, None)
    return found if isinstance(found, dict) and found.get("fingerprint") == fingerprint() else None


def throughput(kind: str, known: dict | None) -> float:
    """FLOP/s of a large matrix product in ``kind`` (float32 or bfloat16), measured or the careful default."""
    if known and known.get("flops", {}).get(kind):
        return float(known["flops"][kind])
    if device() == "cuda":
        return DEFAULT_GPU_FLOPS[kind]
    rate = next(r for flag, r in DEFAULT_FLOPS_PER_CORE if not flag or flag in cpu()["flags"]) * cores()
    if kind == "bfloat16":
        rate *= 4.0 if "amx_bf16" in cpu()["flags"] else 2.0 if bf16()[0] else 0.5
    return rate


def context_bytes(known: dict | None) -> int:
    """Resident bytes of a run's process before any model, measured or the default."""
    return int(known["context_bytes"]) if known and known.get("context_bytes") else CONTEXT_BYTES


def idle_bytes(known: dict | None) -> tuple[int, int]:
    """The same before anything was computed, and before anything was trained: code that never ran is not resident."""
    context = context_bytes(known)
    return int((known or {}).get("imported_bytes") or 0.85 * context), int((known or {}).get("inference_bytes") or 0.93 * context)


def hardware(of: str = "") -> str:
    """The part of a fingerprint that an upgrade of a package leaves as it is; of this machine when none is given."""
    return "|".join((of or fingerprint()).split("|")[:3])


def calibrate(store, force: bool = False, timeout: float = 120.0) -> dict:
    """Measure in a child process and keep the result in ``store``; returns it (at once when it is there already).

    Raises:
        RuntimeError: the child failed; the text is its last line.
    """
    found = measured(store)
    if found and not force:
        return found
    done = subprocess.run(
        [sys.executable, "-m", "workbench.machine_speed"],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.DEVNULL,
    )
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError((done.stderr.strip().splitlines() or ["the measurement printed nothing"])[-1]) from None
    found["fingerprint"], found["measured"] = fingerprint(), time.time()
    if store is not None:
        store.set_setting(SETTING, found)
    return found


def quiet(seconds: float = 0.5) -> bool:
    """Whether other programs leave the processors alone; a measurement beside them would be kept and wrong."""
    import psutil

    return psutil.cpu_percent(interval=seconds) < 35


def calibrate_when_idle(store, after: float = 30.0, patience: float = 3600.0) -> None:
    """Measure once in the background of a server: from ``after`` seconds on, while no run is on; nothing when it is known."""
    import threading

    def wait():
        end = time.monotonic() + patience
        time.sleep(after)
        try:
            while measured(store) is None and time.monotonic() < end:
                if not store.count_runs(status=("queued", "starting", "running")) and quiet():
                    calibrate(store)
                    return
                time.sleep(10)
        except Exception as e:  # a courtesy of the server: forecasts do without it
            print(f"machine: not measured ({type(e).__name__}: {e})", flush=True)

    if measured(store) is None:
        threading.Thread(target=wait, name="calibrate", daemon=True).start()

"""Checks of this installation: what is there, what is missing, and what to do about it; torch is not imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from engines.errors import InputError
from workbench.home import Home


def checks(measure: bool = False) -> list[dict]:
    """Each check as name, ok, needed, text and remedy; none of them imports torch in this process."""
    from storage import StorageError
    from workbench import machine, sources

    rows: list[dict] = []

    def add(name, ok, text, remedy="", needed=True):
        rows.append({"name": name, "ok": bool(ok), "needed": needed, "text": text, "remedy": "" if ok else remedy})

    add("python", sys.version_info >= (3, 11), sys.version.split()[0], "Install Python 3.11 or later.")
    for package in ("torch", "transformers", "peft", "safetensors", "tokenizers", "gradio", "plotly", "numpy", "psutil"):
        found = machine.version(package)
        add(package, found, found or "not installed", "Run make install.")
    for package in ("pyarrow", "datasets", "huggingface_hub"):
        found = machine.version(package)
        add(
            package,
            found,
            found or "not installed",
            "Needed for parquet and hub data: pip install " + package + ".",
            needed=False,
        )
    store = None
    try:
        home = Home.open()
        add("home", True, str(home.path))
        store = home.store
        add("database", True, f"{home.db}, {store.count_runs()} runs")
    except (InputError, StorageError) as e:
        add("home", False, str(e), "Set WORKBENCH_HOME to a folder that you may write to.")
    where = next(
        p
        for p in (Path(os.environ.get("WORKBENCH_HOME") or "~/.fettle").expanduser().absolute(), *Path.home().parents, Path("/"))
        if p.exists()
    )
    free = shutil.disk_usage(where).free
    add("disk", free > 1e9, f"{free / 1e9:.1f} GB free", "Free some space: checkpoints need it.", needed=False)
    known = sources.bundled()
    add(
        "models", known, ", ".join(known) or "no bundled model", "The folder assets/models is missing: clone again.", needed=False
    )
    about = machine.describe(store)
    add(
        "device",
        True,
        f"{about['device']}: {about['name']}, {about['cores']} cores, {about['host_memory_bytes'] / 1e9:.1f} GB of main memory",
    )
    add("gpu", not about["gpu_reason"], about["gpu"]["name"] or "none", f"Not needed; {about['gpu_reason']}.", needed=False)
    add("bf16", about["bf16"], about["bf16_reason"], "Runs use fp32.", needed=False)
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    add(
        "threads",
        not threads or threads <= about["cores"],
        f"OMP_NUM_THREADS={threads or 'unset'}, {about['cores']} cores",
        "More threads than cores slow every run: unset OMP_NUM_THREADS.",
        needed=False,
    )
    add("port", *_port())
    if measure and store is not None:
        try:
            about["measured"] = machine.calibrate(store, force=True)
        except Exception as e:
            add("measure", False, f"failed: {e}", "Forecasts use default rates.", needed=False)
    rates = about["measured"]
    add(
        "rates",
        rates,
        f"fp32 {rates['flops']['float32'] / 1e9:.0f}, bf16 {rates['flops']['bfloat16'] / 1e9:.0f} GFLOP/s, empty process "
        f"{rates['context_bytes'] / 1e6:.0f} MB"
        if rates
        else "not measured yet",
        "Run doctor --measure on an idle machine.",
        needed=False,
    )
    add(
        "chromium",
        True,
        "only the browser tests need it" + ("" if importlib.util.find_spec("playwright") else "; playwright is not installed"),
        needed=False,
    )
    return rows


def _port() -> tuple[bool, str, str, bool]:
    import socket

    port = int(os.environ.get("PORT") or 7860) if (os.environ.get("PORT") or "7860").isdigit() else 7860
    with socket.socket() as s:
        s.settimeout(0.3)
        busy = s.connect_ex((os.environ.get("HOST") or "127.0.0.1", port)) == 0
    return (
        not busy,
        f"{port} is {'in use' if busy else 'free'}",
        "A server may be running already; set PORT to another number for a second one.",
        False,
    )

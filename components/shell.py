"""The app bar on every page and what it asks of the machine."""

from __future__ import annotations

from components.layout import ASSETS, component

PAGES = (("New run", "/", "new_run"), ("Plan", "/plan", "planning"), ("Live", "/live", "live"), ("Sweeps", "/sweeps", "sweeps"),
         ("Compare", "/compare", "compare"), ("Try", "/try", "try_page"), ("Library", "/library", "library"))
"""Title, path and module of each page, in the order of the app bar."""


def machine() -> dict:
    """``{device, detail, load (0..1), used, total (bytes), gpu | None, energy}``; a few milliseconds, no torch."""
    from workbench.telemetry import device_summary
    seen = device_summary()
    cpu, memory = seen["cpu"], seen["memory"]
    cores = cpu["cores"]
    found = {"device": f"CPU, {cores} core{'' if cores == 1 else 's'}", "detail": f"{cpu['name']}. {seen['reason']}".strip(". "),
             "load": cpu["percent"] / 100, "used": memory["used"], "total": memory["total"], "gpu": None, "cores": cores,
             "reason": seen["reason"], "energy": seen["energy"]}
    if seen["gpus"]:
        gpu = seen["gpus"][0]
        short = gpu["name"].replace("NVIDIA ", "")
        found.update(device=short if len(seen["gpus"]) == 1 else f"{len(seen['gpus'])} × {short}",
                     gpu={**gpu, "util": (gpu.get("util") or 0) / 100})
    return found


def bar(home) -> None:
    """The app bar; first thing of every route."""
    store = home.store

    def status(given: dict) -> dict:
        return {"running": store.count_runs(status=("starting", "running")), "queued": store.count_runs(status=("queued",)),
                **machine()}

    template = (ASSETS / "html" / "shell.html").read_text().replace(
        '<div class="ft-sprite"></div>', (ASSETS / "icons.svg").read_text().strip())
    component("shell", template=template, server_functions=[status], elem_id="shell")

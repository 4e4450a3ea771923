"""Recommend: the pipelines that fit a model, data and budget, by expected quality."""

from __future__ import annotations

from components.layout import component

LIMITS = (
    dict(key="minutes", name="Minutes", unit="min", example="2 or 1:30"),
    dict(key="memory_gb", name="Memory", unit="GB", example="2"),
    dict(key="trainable", name="Trainable", unit="", example="5 % or 300,000"),
    dict(key="size_mb", name="Size", unit="MB", example="6"),
    dict(key="joules", name="Energy", unit="J", example="5000"),
    dict(key="quality", name="Quality", unit="", example="1.4"),
)
"""Limits in the order of the form; an empty field is no limit."""
START = {"model": "stdlib-lm", "data": "python-docs", "budget": {"minutes": 2, "memory_gb": 2}}


def server_functions(home) -> list:
    """What the section asks for; each takes one JSON object and returns one."""

    def boot(given: dict) -> dict:
        from workbench import catalog, machine
        methods = catalog.methods()
        found = machine.describe(home.store)
        return {"models": [{"id": m["id"], "task": m["task"]} for m in catalog.models()],
                "data": [{"id": d["id"], "task": d["task"]} for d in catalog.data(counts=False)],
                "families": list(dict.fromkeys(m["family"] for m in methods)), "methods": {m["id"]: m["family"] for m in methods},
                "limits": list(LIMITS), "start": START, "energy": bool((found.get("gpu") or {}).get("energy"))}

    def recommend(given: dict) -> dict:
        from workbench import recommend as search
        spec = {k: v for k, v in given["spec"].items() if v is not None}
        spec["budget"] = {k: v for k, v in (spec.get("budget") or {}).items() if v is not None}
        return search.recommend(spec, home)

    def command(given: dict) -> dict:
        from workbench.commands.recommend import flags
        return {"run": f"python -m workbench run {flags(given['spec'])}",
                "recommend": f"python -m workbench recommend {flags({**given['spec'], 'pipeline': []})}"}

    return [boot, recommend, command]


def build(home) -> None:
    """The section of ``/plan``."""
    component("planning_recommend", scripts=("form", "interval"), server_functions=server_functions(home))

"""A database of finished runs whose quality follows a rule of the test's own, so that what is expected can be checked."""

from __future__ import annotations

import math
import random

import numpy as np

from workbench import planner
from workbench.points import of_cost, score, value_of
from workbench.spec import RunSpec

BASE = 1.5


def spec(model, data, *stages, **budget) -> dict:
    return dict(model=model, data=data, pipeline=[s if isinstance(s, dict) else {"method": s} for s in stages], budget=budget)


def finish(home, given: dict, truth, *, base: float = BASE, metric: str = "bits/byte", seed: int = 0, noise: float = 0.002) -> int:
    """Record a finished run. ``truth``: workbench.points.Point -> gain on the additive scale."""
    built = RunSpec.from_dict({**given, "seed": seed})
    plan = planner.forecast(built, home, remedies=False)
    scene = planner.scene_of(built, home)
    resolved, cost = planner.Chooser(built, scene).run()
    gain = truth(of_cost(resolved, cost, scene)) + random.Random(f"{given}{seed}").gauss(0, noise)
    value = value_of(score(base, metric) + gain, metric)
    store = home.store
    run = store.create_run(built.to_dict(), name=f"run-{store.count_runs() + 1}", status="running",
                           forecast={**plan, "resolved": resolved.to_dict()})
    scores = np.ones(4, np.float32)
    for name, stage, v in (("base", -1, base), ("result", len(given["pipeline"]), value)):
        store.put_evaluation(run, name, stage, int(cost.steps) if stage >= 0 else 0, 1.0, metric, v, v * 0.99, v * 1.01, 200, scores, scores, "h")
    if cost.steps:
        store.append(run, [("tokens", int(cost.steps), float(cost.units), 1.0)])
    store.transition(run, ("running",), "finished", metric=metric, base_value=base, value=value, value_low=value * 0.99,
                     value_high=value * 1.01, n=200, seconds=1.0)
    return run


def usual(point) -> float:
    """A world of small losses and much to learn, unlike the published figures."""
    gain = 0.03 * math.log2(1 + point.units / 1000) if point.trains else 0.0
    for s in point.stages:
        gain -= 0.05 * (s.sparsity / (1 - s.sparsity)) ** 2 * (4 if s.method == "magnitude" else 40 if s.method == "random" else 1)
        gain -= 0.2 * s.removed
        gain -= 0.02 * 4 ** (4 - s.bits) if s.bits else 0.0
    return gain


def varied(model, data) -> list[dict]:
    """Twenty-six unlike specs."""
    rows = [spec(model, data, "lora", steps=n) for n in (20, 60, 200, 600)]
    rows += [spec(model, data, {"method": "lora", "rank": r}, steps=100) for r in (2, 16)]
    rows += [spec(model, data, "full", steps=n) for n in (20, 80, 300)] + [spec(model, data, "adalora", steps=100)]
    rows += [spec(model, data, {"method": m, "sparsity": s}) for m in ("wanda", "magnitude", "random") for s in (0.3, 0.5, 0.7)]
    rows += [spec(model, data, "int8"), spec(model, data, "int4"), spec(model, data, "structured")]
    rows += [spec(model, data, {"method": "wanda", "sparsity": 0.5}, "lora", "int8", steps=n) for n in (30, 120)]
    return rows + [spec(model, data, "full", "int8", steps=100), spec(model, data, "lora", "int4", steps=100)]

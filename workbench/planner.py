"""Says before a run what it costs, whether it fits its budget, and what the automatic settings become; torch-free.

``forecast`` answers in milliseconds from shapes (config.json and safetensors headers), from this machine's measured
rates and from the runs that this database already holds. ``resolve`` is the same decision, as a spec without ``auto``.
"""

from __future__ import annotations

import dataclasses
import functools
import time

from engines.errors import InputError
from engines.method import AUTO
from workbench import calibration, document, expected, machine, probe
from workbench.levers import Chooser
from workbench.remedies import changes, limits, verdict
from workbench.scene import Scene
from workbench.spec import RunSpec
from workbench.staging import plain_scene, store_of


def forecast(spec: RunSpec | dict, home=None, *, remedies: bool = True) -> dict:
    """What ``spec`` will cost and whether it fits.

    Args:
        spec: a ``RunSpec`` or its dict form.
        home: a ``workbench.home.Home`` whose database holds this machine's measurements and history; None opens the default
            one, and does without where that is not possible.
        remedies: also search for the changes that would make it fit, which takes a dozen forecasts.

    Returns:
        a JSON-able dict: fits, verdict (fits, tight, over), text, milliseconds, limits, memory (peak_bytes, peak_phase,
        phases, how), seconds (total, phases), tokens, steps, trainable, size, flops, joules, kv, stages, training, chosen,
        changes, task, derivations (how each headline figure comes about), calibration (what earlier runs corrected), raw
        (the figures before that).

    Raises:
        InputError: a field is refused, or the model or the data cannot be used.
    """
    began = time.perf_counter()
    spec = spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec)
    scene = scene_of(spec, home)
    chooser = Chooser(spec, scene)
    resolved, found = chooser.run()
    told, plain = scene.correction.told(resolved, found), calibration.raw(found, scene)
    found, probed = probe.apply(resolved, scene, found, store_of(home))
    found.joules, found.joules_how = scene.correction.joules(resolved, found.seconds)
    judge = expected.judge(scene, store_of(home))
    states = limits(resolved, found, meter(), judge)

    def evaluate(other: RunSpec):
        tried, price = Chooser(other, scene).run()
        price.joules, price.joules_how = scene.correction.joules(tried, price.seconds)
        return tried, price

    over = remedies and verdict(states) == "over"
    fixes = changes(spec, resolved, found, states, evaluate, judge=judge) if over else []
    out = probe.tell(document.build(spec, resolved, scene, chooser, found, states, fixes, meter(), told), probed)
    out["raw"] = plain
    if probed and not probed["failed"]:
        out["derivations"] |= {"memory.peak": out["memory"]["how"], "seconds": out["seconds"]["how"]}
    out["milliseconds"] = round((time.perf_counter() - began) * 1e3, 2)
    return out


def resolve(spec: RunSpec | dict, home=None) -> RunSpec:
    """The spec with every ``auto`` replaced: task, training knobs, levers and, where no limit says when to stop, steps.

    Raises:
        InputError: as ``forecast``.
    """
    spec = spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec)
    scene = scene_of(spec, home)
    resolved, _ = Chooser(spec, scene).run()
    return resolved.replace(task=scene.task)


def demand(spec: RunSpec | dict, home=None) -> tuple[RunSpec, dict]:
    """The resolved spec and its forecast, for a run that is about to start.

    Raises:
        InputError: as ``forecast``; also when no choice keeps a limit (the remedy is the smallest change that does).
    """
    spec = spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec)
    found = forecast(spec, home)
    if not found["fits"]:
        name = next(k for k, row in found["limits"].items() if row["state"] == "over")
        remedy = found["changes"][0]["text"] if found["changes"] else "raise the limit, or choose a smaller model"
        raise InputError(
            f"budget.{name}", found["limits"][name]["limit"], found["text"].rstrip("."), f"Smallest change that fits: {remedy}"
        )
    return resolve(spec, home), found


# -- the scene ---------------------------------------------------------------------------------------------------------
def scene_of(spec: RunSpec, home=None) -> Scene:
    """Profile, data counts, machine, history and correction for a spec.

    Raises:
        InputError: the model or the data cannot be used, or they do not go together.
    """
    scene, store = plain_scene(spec, home), store_of(home)
    return dataclasses.replace(scene, speed=history(store, spec), correction=calibration.correction(store, home))


_HISTORY: dict[tuple, tuple[float, dict]] = {}
HISTORY_SECONDS = 5.0


def history(store, spec: RunSpec) -> dict:
    """Training speed of earlier finished runs with the same model, data, training methods and knobs: {} when there is none."""
    if store is None:
        return {}
    wanted = signature(spec.to_dict())
    key = (id(store), wanted)
    when, kept = _HISTORY.get(key, (0.0, {}))
    if time.time() - when < HISTORY_SECONDS:
        return kept
    speeds = [
        row["tokens_per_second"]
        for row in store.runs(status="finished", limit=200)
        if row.get("tokens_per_second") and signature(row["spec"]) == wanted
    ]
    found = {}
    if speeds:
        speeds = sorted(speeds[:9])
        runs = "1 earlier run" if len(speeds) == 1 else f"{len(speeds)} earlier runs"
        found = {"units_per_second": speeds[len(speeds) // 2], "how": f"the speed of {runs} like this one"}
    if len(_HISTORY) > 200:
        _HISTORY.clear()
    _HISTORY[key] = (time.time(), found)
    return found


def signature(spec: dict) -> str:
    """What decides the speed of a step; ``auto`` and an absent knob are the same."""
    knobs = {
        k: v
        for k, v in (spec.get("training") or {}).items()
        if k in ("batch", "length", "accumulation", "checkpointing", "precision", "processes", "switches") and v != AUTO
    }
    data = spec.get("data")
    return repr(
        (
            spec.get("model"),
            data if isinstance(data, str) else (data or {}).get("source"),
            [s["method"] if isinstance(s, dict) else s for s in spec.get("pipeline") or ()],
            sorted(knobs.items()),
        )
    )


@functools.cache
def meter() -> str:
    """Which energy counter runs here have, or that there is none."""
    from workbench import telemetry

    meter, reason = telemetry.Energy(telemetry.Nvml()), machine.gpu()["reason"]
    if meter.kind:
        return f"metered with {meter.kind} while the run is on"
    return f"no energy counter here: {reason}" if reason else meter.reason

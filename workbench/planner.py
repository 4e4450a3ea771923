"""Says before a run what it costs, whether it fits its budget, and what the automatic settings become; torch-free.

``forecast`` answers in milliseconds from shapes (config.json and safetensors headers), from this machine's measured
rates and from the runs that this database already holds. ``resolve`` is the same decision, as a spec without ``auto``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time

from engines import shapes
from engines.errors import InputError
from engines.method import AUTO
from engines.profile import Batch, ModelProfile, from_config
from workbench import calibration, crew, document, expected, machine, probe, sources
from workbench.levers import Chooser
from workbench.remedies import changes, limits, verdict
from workbench.scene import Held, Machine, Scene
from workbench.spec import RunSpec
from workbench.work import step_formula


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
    found, probed = probe.apply(resolved, scene, found, _store(home))
    found.joules, found.joules_how = scene.correction.joules(resolved, found.seconds)
    judge = expected.judge(scene, _store(home))
    states = limits(resolved, found, _meter(), judge)

    def evaluate(other: RunSpec):
        tried, price = Chooser(other, scene).run()
        price.joules, price.joules_how = scene.correction.joules(tried, price.seconds)
        return tried, price

    over = remedies and verdict(states) == "over"
    fixes = changes(spec, resolved, found, states, evaluate, judge=judge) if over else []
    out = probe.tell(document.build(spec, resolved, scene, chooser, found, states, fixes, _meter(), told), probed)
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
    scene, store = plain_scene(spec, home), _store(home)
    return dataclasses.replace(scene, speed=history(store, spec), correction=calibration.correction(store, home))


def plain_scene(spec: RunSpec, home=None, facts=None) -> Scene:
    """The scene without what earlier runs say.

    Args:
        facts: counts of the data (``sources.DataFacts``) when they are known; None reads the data.

    Raises:
        InputError: the model or the data cannot be used, or they do not go together.
    """
    stored = sources.profile(spec.model)
    store = _store(home)
    scratch = any(getattr(m, "from_scratch", False) is True for m in spec.pipeline)
    if not stored.has_weights and not scratch:
        raise InputError(
            "model",
            spec.model,
            "the folder has a config.json but no *.safetensors",
            "Add the weights, or train from random weights with {method: full, from_scratch: true}",
        )
    task = facts.task if facts is not None else spec.task
    if task == "auto":
        task = "image-classification" if stored.task == "image-classification" else sources.facts(spec.data, stored, "auto").task
        if task == "image-classification" and stored.task != "image-classification":
            raise InputError(
                "data", spec.data.source, f"it holds images, and {spec.model} reads text", "Choose an image model, or text data"
            )
    facts = facts if facts is not None else sources.facts(spec.data, stored, task)
    if task != "image-classification":
        sources.check_tokenizer(stored)
    check_head(spec, stored, facts, task)
    if spec.training.processes > 1:
        crew.check(spec, machine.device(), machine.gpu()["count"], machine.cores())
    return Scene(_task_profile(stored, task, facts.labels), stored, facts, task, machine_of(store))


@functools.lru_cache(maxsize=32)
def _task_profile_cached(key, task: str, labels: int, profile) -> ModelProfile:
    return shapes.for_task(profile.value, task, labels)


def _task_profile(stored: ModelProfile, task: str, labels: int) -> ModelProfile:
    return _task_profile_cached(stored.source, task, labels, Held(stored))


def check_head(spec: RunSpec, stored: ModelProfile, facts, task: str) -> None:
    """Refuse data whose labels do not fit the head that the model brings.

    Raises:
        InputError: a trained head of another size.
    """
    if task == "causal-lm":
        return
    trained = any(
        name.endswith(("ForSequenceClassification", "ForImageClassification"))
        for name in stored.config.get("architectures") or ()
    )
    known = stored.labels or 2
    scratch = any(getattr(m, "from_scratch", False) is True for m in spec.pipeline)
    if trained and stored.has_weights and not scratch and facts.labels != known:
        raise InputError(
            "data",
            spec.data.source,
            f"it has {facts.labels} labels and the head of {spec.model} was trained for {known}",
            f"Choose data with {known} labels, or a model without a classification head",
        )


def _store(home):
    if home is not None:
        return home.store
    from storage import StorageError
    from workbench.home import Home

    try:
        return Home.open().store
    except (InputError, StorageError):
        return None


def machine_of(store) -> Machine:
    """This machine's rates, measured or the careful defaults."""
    known = machine.measured(store)
    stamp = json.dumps(known, sort_keys=True) if known else ""
    return _machine(stamp, machine.device())


@functools.lru_cache(maxsize=4)
def _machine(stamp: str, device: str) -> Machine:
    known = json.loads(stamp) if stamp else None
    flops = {kind: machine.throughput(kind, known) for kind in ("float32", "bfloat16")}
    how = "this machine's measured rates" if known else "default rates for this kind of machine, not yet measured"
    # On a GPU the limit and the measured peak are the allocator's: the CUDA context is outside both.
    imported, inference = (0, 0) if device == "cuda" else machine.idle_bytes(known)
    plain = Machine(
        device=device,
        flops=flops,
        context=0 if device == "cuda" else machine.context_bytes(known),
        inference=inference,
        imported=imported,
        cores=machine.cores(),
        how=how,
        bandwidth=(known or {}).get("bandwidth") or (1e12 if device == "cuda" else Machine.bandwidth),
    )
    rows, length = machine.REFERENCE_BATCH
    profile = from_config("reference", machine.REFERENCE, shapes.tensors(machine.REFERENCE))
    scale = {}
    for kind, seconds in ((known or {}).get("reference") or {}).items():
        flops_per_token = 3 * (profile.flops_per_token + profile.attention_flops_per_token(length))
        scale[kind] = seconds / step_formula(
            plain, profile, Batch(rows, length, compute=kind), flops_per_token, profile.parameters
        )
    times = (known or {}).get("reference") or {}
    # Whole steps gain less than products alone, where only these are known.
    gain = times["float32"] / times["bfloat16"] if len(times) == 2 else 1 + 0.5 * (flops["bfloat16"] / flops["float32"] - 1)
    return dataclasses.replace(plain, scale=scale, bf16_gain=gain)


_HISTORY: dict[tuple, tuple[float, dict]] = {}
HISTORY_SECONDS = 5.0


def history(store, spec: RunSpec) -> dict:
    """Training speed of earlier finished runs with the same model, data, training methods and knobs: {} when there is none."""
    if store is None:
        return {}
    wanted = _signature(spec.to_dict())
    key = (id(store), wanted)
    when, kept = _HISTORY.get(key, (0.0, {}))
    if time.time() - when < HISTORY_SECONDS:
        return kept
    speeds = [
        row["tokens_per_second"]
        for row in store.runs(status="finished", limit=200)
        if row.get("tokens_per_second") and _signature(row["spec"]) == wanted
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


def _signature(spec: dict) -> str:
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
def _meter() -> str:
    """Which energy counter runs here have, or that there is none."""
    from workbench import telemetry

    meter, reason = telemetry.Energy(telemetry.Nvml()), machine.gpu()["reason"]
    if meter.kind:
        return f"metered with {meter.kind} while the run is on"
    return f"no energy counter here: {reason}" if reason else meter.reason

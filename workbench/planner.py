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
from workbench import crew, expected, machine, probe, sources
from workbench.forecast import step_formula
from workbench.levers import Chooser
from workbench.remedies import changes, clock, gigabytes, limits, shortfall, verdict
from workbench.scene import Cost, Machine, Scene
from workbench.spec import RunSpec


def forecast(spec: RunSpec | dict, home=None, *, remedies: bool = True) -> dict:
    """What ``spec`` will cost and whether it fits.

    Args:
        spec: a ``RunSpec`` or its dict form.
        home: a ``workbench.home.Home`` whose database holds this machine's measurements and history; None opens the default
            one, and does without where that is not possible.
        remedies: also search for the changes that would make it fit, which takes a dozen forecasts.

    Returns:
        a JSON-able dict: fits, verdict (fits, tight, over), text, milliseconds, limits, memory (peak_bytes, peak_phase,
        phases, how), seconds (total, phases), tokens, steps, trainable, size, stages, training, chosen, changes, task, how.

    Raises:
        InputError: a field is refused, or the model or the data cannot be used.
    """
    began = time.perf_counter()
    spec = spec if isinstance(spec, RunSpec) else RunSpec.from_dict(spec)
    scene = scene_of(spec, home)
    chooser = Chooser(spec, scene)
    resolved, found = chooser.run()
    found, probed = probe.apply(resolved, scene, found, _store(home))
    judge = expected.judge(scene, _store(home))
    states = limits(resolved, found, _meter(), judge)

    def evaluate(other: RunSpec):
        return Chooser(other, scene).run()

    over = remedies and verdict(states) == "over"
    fixes = changes(spec, resolved, found, states, evaluate, judge=judge) if over else []
    out = probe.tell(_document(spec, resolved, scene, chooser, found, states, fixes), probed)
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
    """Profile, data counts, machine and history for a spec.

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
    task = spec.task
    if task == "auto":
        task = "image-classification" if stored.task == "image-classification" else sources.facts(spec.data, stored, "auto").task
        if task == "image-classification" and stored.task != "image-classification":
            raise InputError(
                "data", spec.data.source, f"it holds images, and {spec.model} reads text", "Choose an image model, or text data"
            )
    facts = sources.facts(spec.data, stored, task)
    if task != "image-classification":
        sources.check_tokenizer(stored)
    check_head(spec, stored, facts, task)
    if spec.training.processes > 1:
        crew.check(spec, machine.device(), machine.gpu()["count"], machine.cores())
    return Scene(_task_profile(stored, task, facts.labels), stored, facts, task, machine_of(store), history(store, spec))


@functools.lru_cache(maxsize=32)
def _task_profile_cached(key, task: str, labels: int, profile) -> ModelProfile:
    return shapes.for_task(profile.value, task, labels)


class _Held:
    """A profile as a cache argument: compared by identity, because hashing thousands of tensors costs milliseconds."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Held) and self.value is other.value

    def __hash__(self):
        return id(self.value)


def _task_profile(stored: ModelProfile, task: str, labels: int) -> ModelProfile:
    return _task_profile_cached(stored.source, task, labels, _Held(stored))


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
    plain = Machine(
        device=device,
        flops=flops,
        context=0 if device == "cuda" else machine.context_bytes(known),
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
        if k in ("batch", "length", "accumulation", "checkpointing", "precision", "processes") and v != AUTO
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
    reason = machine.gpu()["reason"]
    return f"no energy counter here: {reason}" if reason else "metered with NVML while the run is on"


# -- the document ------------------------------------------------------------------------------------------------------
def _document(spec, resolved, scene: Scene, chooser: Chooser, found: Cost, states: dict, fixes: list[dict]) -> dict:
    t, peak = resolved.training, found.peak
    worst = verdict(states)
    parameters = scene.model.parameters
    training = {
        "lr": t.lr,
        "batch": t.batch,
        "length": t.length,
        "accumulation": t.accumulation,
        "checkpointing": t.checkpointing,
        "loss_chunk": t.loss_chunk,
        "precision": t.precision,
        "micro_batch": -(-t.batch // (t.accumulation * t.processes)),
        "processes": t.processes,
    }
    return {
        "fits": worst != "over",
        "verdict": worst,
        "text": _sentence(resolved, found, states, worst),
        "limits": states,
        "memory": {
            "peak_bytes": int(peak.total),
            "peak_phase": peak.name,
            "phases": [p.as_dict() for p in found.phases],
            "limit_bytes": int(resolved.budget.memory_gb * 1e9) if resolved.budget.memory_gb else None,
            "device": scene.machine.device,
            "how": f"each of {t.processes} processes: " * (t.processes > 1)
            + ("PyTorch's allocator: live tensors counted from shapes; the CUDA context is not in it"
            if scene.machine.device == "cuda"
            else "resident set: weights, adapter, gradients and optimizer counted from shapes; activations by the formulas "
            "of each block, and half as much again or twice for the holes between them; process and libraries as measured "
            "on an empty process; what the "
            "C allocator keeps of earlier phases as extra"),
        },
        "seconds": {
            "total": round(found.seconds, 2),
            "phases": [{"phase": p.name, "seconds": round(p.seconds, 2)} for p in found.phases],
            "how": found.how,
        },
        "tokens": int(found.units),
        "units": "tokens" if scene.task == "causal-lm" else "examples",
        "steps": int(found.steps),
        "passes": round(found.units / max(1, scene.facts.tokens if scene.task == "causal-lm" else scene.facts.train), 2),
        "trainable": {"count": int(found.trainable), "share": found.trainable / max(1, parameters)},
        "parameters": int(parameters),
        "size": {
            "bytes": int(found.size),
            "before_bytes": int(found.before_bytes),
            "bits_per_weight": round(found.bits_per_weight, 3),
            "sparsity": round(found.sparsity, 4),
            "exact": True,
        },
        "stages": [_stage(i, s, chooser, found, scene) for i, s in enumerate(found.stages)],
        "training": training,
        "chosen": chooser.chosen,
        "changes": fixes,
        "task": scene.task,
        "data": {
            "train": scene.facts.train,
            "evaluation": scene.facts.evaluation,
            "tokens": scene.facts.tokens,
            "labels": scene.facts.labels,
            "warnings": list(scene.facts.warnings),
            "how": scene.facts.how,
        },
    }


def _stage(i: int, stage, chooser: Chooser, found: Cost, scene: Scene) -> dict:
    method = stage.method
    phase = next(p for p in found.phases if p.name == f"{i + 1} {method.card.id}")
    text = f"{clock(stage.seconds)}, {gigabytes(phase.total)}"
    if stage.steps:
        text += f", {stage.steps:,} steps"
    return {
        "method": method.card.id,
        "name": method.card.name,
        "settings": {k: v for k, v in method.settings().items() if k != "method"},
        "reasons": chooser.reasons[i],
        "seconds": round(stage.seconds, 2),
        "peak_bytes": int(phase.total),
        "before_bytes": int(stage.before),
        "after_bytes": int(stage.after),
        "trainable": int(stage.footprint.trainable),
        "steps": int(stage.steps or 0),
        "units": int(stage.units),
        "units_per_second": round(stage.speed, 1),
        "sparsity": stage.footprint.sparsity,
        "bits_per_weight": stage.footprint.bits_per_weight,
        "flops_per_token": stage.footprint.flops_per_token,
        "text": text,
    }


_OVER = {
    "minutes": lambda s, c: f"it needs at least {clock(c.least_seconds)}, the limit is {clock(s.budget.minutes * 60)}",
    "memory_gb": lambda s, c: (
        f"{gigabytes(c.peak.total)} in phase {c.peak.name}, {gigabytes(c.peak.total - s.budget.memory_gb * 1e9)} over"
    ),
    "trainable": lambda s, c: f"{c.trainable:,} trainable parameters, more than the limit",
    "size_mb": lambda s, c: f"{c.size / 1e6:.2f} MB on disk, {c.size / 1e6 - s.budget.size_mb:.2f} MB over",
    "joules": lambda s, c: f"about {c.joules:,.0f} joules, the limit is {s.budget.joules:,.0f}",
}


def _sentence(spec: RunSpec, found: Cost, states: dict, worst: str) -> str:
    if worst == "over":
        return "Does not fit: " + "; ".join(
            shortfall(row) if k == "quality" else _OVER[k](spec, found) for k, row in states.items() if row["state"] == "over"
        ) + "."
    parts = []
    if spec.budget.memory_gb:
        parts.append(f"{gigabytes(spec.budget.memory_gb * 1e9 - found.peak.total)} of memory to spare")
    if spec.budget.minutes:
        left = spec.budget.minutes * 60 - found.seconds
        trains = any(s.method.card.trains for s in found.stages)
        parts.append("the schedule completes inside the minutes" if trains and left < 2 else f"{clock(max(0, left))} to spare")
    if not parts:
        parts.append(f"{gigabytes(found.peak.total)} at most, about {clock(found.seconds)}")
    return f"{'Fits' if worst == 'fits' else 'Fits, but tightly'}: {' and '.join(parts)}."

"""What a forecast reasons about, before earlier runs have their say: profile, counts of the data, and this machine's rates. Torch-free."""

from __future__ import annotations

import dataclasses
import functools
import json

from engines import shapes
from engines.errors import InputError
from engines.heads import has_head
from engines.profile import Batch, ModelProfile, from_config
from workbench import crew, machine, sources
from workbench.scene import Held, Machine, Scene
from workbench.spec import RunSpec
from workbench.work import step_formula


def plain_scene(spec: RunSpec, home=None, facts=None) -> Scene:
    """The scene without what earlier runs say.

    Args:
        facts: counts of the data (``sources.DataFacts``) when they are known; None reads the data.

    Raises:
        InputError: the model or the data cannot be used, or they do not go together.
    """
    stored = sources.profile(spec.model)
    store = store_of(home)
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
    known = stored.labels or 2
    scratch = any(getattr(m, "from_scratch", False) is True for m in spec.pipeline)
    if has_head(stored.config) and stored.has_weights and not scratch and facts.labels != known:
        raise InputError(
            "data",
            spec.data.source,
            f"it has {facts.labels} labels and the head of {spec.model} was trained for {known}",
            f"Choose data with {known} labels, or a model without a classification head",
        )


def store_of(home):
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

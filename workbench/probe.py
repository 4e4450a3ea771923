"""What a probe measured, in place of the forecast's figures: for the spec that was probed and for every spec whose cost is
decided by the same things (another number of steps or minutes, another seed, another learning rate). No torch.

The probe itself is ``workbench.probe_job`` (the process) and ``workbench.probing`` (what it does).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time

from workbench import machine
from workbench.minutes import Clock
from workbench.remedies import clock, gigabytes
from workbench.scene import Cost, Scene
from workbench.spec import RunSpec

FREE = ("lr", "head_lr", "schedule", "warmup", "final", "weight_decay", "clip", "evaluations", "checkpoint_seconds")
"""Training knobs that do not change what a step, an evaluation or a byte costs."""
VERSION = 1


def key(spec: RunSpec, scene: Scene) -> str:
    """Twenty hex digits of what decides the cost of a resolved spec on this machine."""
    training = {k: v for k, v in spec.training.plain().items() if k not in FREE}
    facts = [scene.model.parameters, scene.stored.stored_bytes, scene.facts.train, scene.facts.tokens]
    wanted = [VERSION, spec.model, dataclasses.asdict(spec.data), scene.task, [m.settings() for m in spec.pipeline], training, facts,
              machine.fingerprint()]
    return hashlib.sha256(json.dumps(wanted, sort_keys=True, default=str).encode()).hexdigest()[:20]


def apply(spec: RunSpec, scene: Scene, found: Cost, store) -> tuple[Cost, dict | None]:
    """The cost with measured figures where a probe of this spec is at hand, and what is to be said of the probe.

    Args:
        spec: resolved.
        found: from ``workbench.forecast.cost``; it is changed.

    Returns:
        the cost, and None or a dict: text, created, age, seconds, missing, failed, change, ratios, measured.
    """
    row = store.probe(key(spec, scene)) if store is not None else None
    if row is None:
        return found, None
    if not row.get("failed"):
        _memory(found, row)
        Clock(spec, scene, found, row).apply()
        found.how = f"measured by a probe {age(row['created'])}"
    return found, said(spec, row)


def tell(document: dict, probed: dict | None) -> dict:
    """Put what is to be said of a probe into a forecast's document."""
    document["probe"] = probed
    if probed and not probed["failed"]:
        document["memory"]["how"] = f"peak of each phase {probed['text']}; parts counted from shapes, the rest as extra"
        document["seconds"]["how"] = probed["text"]
    return document


# -- words -------------------------------------------------------------------------------------------------------------
def age(created: float, now: float | None = None) -> str:
    """``just now``, ``2 minutes ago``, ``3 hours ago``, ``5 days ago``."""
    seconds = max(0.0, (time.time() if now is None else now) - created)
    if seconds < 60:
        return "just now"
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count != 1 else ''} ago"
    return "just now"


def said(spec: RunSpec, row: dict) -> dict:
    """What people are told of a stored probe."""
    failed, when = row.get("failed"), age(row["created"])
    out = dict(created=row["created"], age=when, seconds=row.get("seconds"), missing=row.get("missing") or [], failed=failed, change=None,
               ratios=[s.get("ratio") for s in row.get("stages") or []], measured=None)
    if failed:
        change = smallest(spec, failed)
        out |= dict(change=change, text=f"The probe ran out of memory {_place(spec, failed)}, {when}. Smallest change: {change['text']}.")
        return out
    peak = max((row.get("peaks") or {"": 0}).values())
    steps = [s for s in row["stages"] if s.get("step_seconds")]
    parts = [f"peak {gigabytes(peak)}"]
    parts += [f"{_seconds(s['step_seconds'])} a step" + (f" with {s['method']}" if len(steps) > 1 else "") for s in steps]
    if row.get("evaluation"):
        parts.append(f"{_seconds(row['evaluation'])} an evaluation")
        ratio = math.prod(s.get("ratio") or 1.0 for s in row["stages"])
        if abs(ratio - 1) > 0.1:
            parts.append(f"{_seconds(row['evaluation'] * ratio)} of the result")
    if row.get("disturbed"):
        parts.append("while other programs were busy, so that its seconds may be too long")
    return out | dict(text=f"measured by a probe {when}", measured=", ".join(parts))


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else clock(value)


def _place(spec: RunSpec, failed: dict) -> str:
    phase = str(failed.get("phase") or "")
    head, _, name = phase.partition(" ")
    if head.isdigit():
        index = int(head) - 1
        trains = index < len(spec.pipeline) and spec.pipeline[index].card.trains
        return "in the training step" if trains else f"in {spec.pipeline[index].card.name}" if index < len(spec.pipeline) else f"in {name}"
    return {"load": "while it loaded the model", "evaluate": "in an evaluation", "save": "while it saved"}.get(phase, f"while {failed['doing']}")


def smallest(spec: RunSpec, failed: dict) -> dict:
    """The smallest change of a resolved spec after a shortage of memory: text and patch."""
    t, phase = spec.training, str(failed.get("phase") or "")
    micro = -(-t.batch // t.accumulation)
    if phase[:1].isdigit() and spec.pipeline[int(phase.split(" ")[0]) - 1].card.trains:
        if micro > 1:
            return dict(text=f"micro-batches of {-(-micro // 2)} rows (training.accumulation {t.accumulation * 2})",
                        patch={"training.accumulation": t.accumulation * 2})
        if not t.checkpointing:
            return dict(text="training.checkpointing on", patch={"training.checkpointing": True})
    if phase != "load" and t.length > 16:
        return dict(text=f"training.length {t.length // 2}", patch={"training.length": t.length // 2})
    return dict(text="a smaller model, or a machine with more memory", patch={})


# -- memory ------------------------------------------------------------------------------------------------------------
def _memory(found: Cost, row: dict) -> None:
    """Each measured phase gets its peak as total: what the formulas of its parts do not explain goes to or comes from ``extra``."""
    for phase in found.phases:
        peak = (row.get("peaks") or {}).get(phase.name)
        if not peak:
            continue
        rest = int(peak) - phase.total
        for part in ("extra", "activations", "logits", "context"):
            given = max(rest, -int(phase.parts.get(part, 0)))
            phase.parts[part] = int(phase.parts.get(part, 0)) + given
            rest -= given
            if not rest:
                break

"""A forecast as plain data: what the page, the command line and the run's record hold."""

from __future__ import annotations

import dataclasses

from engines import activations
from workbench import derivations
from workbench.remedies import clock, gigabytes, shortfall, verdict
from workbench.scene import Cost, Scene, StageCost
from workbench.spec import RunSpec


def build(spec, resolved, scene: Scene, chooser, found: Cost, states: dict, fixes: list[dict], meter: str, told: dict) -> dict:
    """The JSON-able form of a forecast; its fields are those of ``workbench.planner.forecast``."""
    t, peak = resolved.training, found.peak
    worst = verdict(states)
    parameters = scene.model.parameters
    training = {
        "lr": t.lr,
        "head_lr": t.head_lr,
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
        "flops": {"total": found.flops, "phases": [{"phase": p.name, "flops": p.flops} for p in found.phases if p.flops]},
        "joules": {"total": found.joules, "how": found.joules_how or meter},
        "kv": {"bytes_per_token": found.kv_per_token, "context": scene.model.context, "bytes": found.kv_per_token * scene.model.context},
        "derivations": derivations.derive(resolved, scene, found, meter, told),
        "calibration": told,
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


def _activations(stage: StageCost) -> dict[str, int]:
    """Bytes of activations of a training stage without and with checkpointing, by the formulas."""
    other = dataclasses.replace(stage.batch, checkpointing=not stage.batch.checkpointing)
    share = activations.train_bytes(stage.entering, other) / max(1, activations.train_bytes(stage.entering, stage.batch))
    known = stage.footprint.activations
    found = {stage.batch.checkpointing: known, other.checkpointing: round(share * known)}
    return {"without_checkpointing": found[False], "with_checkpointing": found[True]}


def _stage(i: int, stage, chooser, found: Cost, scene: Scene) -> dict:
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
        "activations": _activations(stage) if stage.batch is not None else None,
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

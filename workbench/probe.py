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

from engines import pace
from workbench import machine
from workbench.remedies import clock, gigabytes
from workbench.scene import LEAST_STEPS, Cost, Phase, Scene
from workbench.spec import RunSpec

FREE = ("lr", "schedule", "warmup", "final", "weight_decay", "clip", "evaluations", "checkpoint_seconds")
"""Training knobs that do not change what a step, an evaluation or a byte costs."""
VERSION = 1


def key(spec: RunSpec, scene: Scene) -> str:
    """Twenty hex digits of what decides the cost of a resolved spec on this machine."""
    training = {k: v for k, v in dataclasses.asdict(spec.training).items() if k not in FREE}
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


# -- seconds -----------------------------------------------------------------------------------------------------------
class Clock:
    """The seconds of each phase and the steps under a limit, from measured seconds of steps, evaluations and stages."""

    def __init__(self, spec: RunSpec, scene: Scene, found: Cost, row: dict):
        self.spec, self.scene, self.found, self.row = spec, scene, found, row
        self.phases: dict[str, Phase] = {p.name: p for p in found.phases}
        self.evaluation = row.get("evaluation") or self._each(found)
        self.minutes = spec.budget.minutes
        self.rows = list(row.get("stages") or []) + [{}] * len(spec.pipeline)

    def _each(self, found: Cost) -> float:
        phase = next((p for p in found.phases if p.name == "evaluate"), None)
        return phase.seconds / max(1, phase.times) if phase else 1.0

    def apply(self) -> None:
        found, spec, row = self.found, self.spec, self.row
        for name in ("load", "save"):
            if row.get(name) and name in self.phases:
                self.phases[name].seconds = row[name]
        ahead = pace.Ahead(evaluation=self.evaluation, save=self.phases["save"].seconds, keep=row.get("keep") or 0.05)
        each, evaluations = self.evaluation, self.evaluation        # the model as it came
        trains = any(m.card.trains for m in spec.pipeline)
        fixed = sum(p.seconds for p in found.phases if p.name in ("load", "save", "speed"))
        for i, (stage, measured) in enumerate(zip(found.stages, self.rows)):
            each *= measured.get("ratio") or 1.0
            fixed += (ahead.keep if i else 0.0) + pace.TAIL
            if not stage.method.card.trains:
                if measured.get("seconds") is not None:
                    stage.seconds = measured["seconds"]
                fixed += stage.seconds
                last = i + 1 == len(found.stages) and trains
                evaluations += 0.0 if last and pace.once(each, self.minutes) else each
        evaluations += each                                         # the saved result
        training = [i for i, s in enumerate(found.stages) if s.method.card.trains]
        rest = None if self.minutes is None else 60 * self.minutes - fixed - evaluations
        parts = pace.shares([s.method for s in found.stages])
        least, during = fixed + evaluations, 0
        for i in training:
            seconds, made, smallest_seconds = self._train(i, None if rest is None else rest * parts[i])
            evaluations += made * self.adapted(i)
            during, least = during + made, least + smallest_seconds
            self.found.stages[i].seconds = seconds
        for i, stage in enumerate(found.stages):
            self.phases[f"{i + 1} {stage.method.card.id}"].seconds = stage.seconds
        if "evaluate" in self.phases:
            self.phases["evaluate"].seconds = evaluations
        found.steps, found.units = sum(s.steps or 0 for s in found.stages), sum(s.units for s in found.stages)
        # Copies between stages and the pauses around them have no bar of their own: they go to the stage that causes them.
        spare = fixed + sum(s.seconds for s in found.stages if s.method.card.trains) + evaluations - found.seconds
        if found.stages:
            last = self.phases[f"{len(found.stages)} {found.stages[-1].method.card.id}"]
            last.seconds = max(0.0, last.seconds + spare)
        found.least_seconds = min(least, found.seconds)
        found.how = f"measured by a probe {age(self.row['created'])}"

    def adapted(self, i: int) -> float:
        """Seconds of an evaluation during training stage ``i``."""
        before = math.prod(r.get("ratio") or 1.0 for r in self.rows[:i])
        return self.evaluation * before * (self.rows[i].get("adapted") or 1.0)

    def _train(self, i: int, seconds: float | None) -> tuple[float, int, float]:
        """Steps of a training stage.

        Returns:
            its seconds without evaluations, its evaluations, and the seconds of its smallest schedule with one evaluation.
        """
        stage, measured, spec = self.found.stages[i], self.rows[i], self.spec
        units = spec.training.batch * (spec.training.length if self.scene.task == "causal-lm" else 1)
        step = measured.get("step_seconds") or (units / stage.speed if stage.speed else 1.0)
        saved = measured.get("checkpoint_seconds") or 0.1
        wanted, each = spec.training.evaluations, self.adapted(i)
        stage.speed = units / step
        least = LEAST_STEPS * step + saved + each
        asked = self._asked()
        steps, made = asked, wanted
        if seconds is not None:
            made = pace.evaluations(wanted, seconds, each)
            room = seconds - made * each - saved - max(0.0, (measured.get("first_seconds") or 0.0) - (measured.get("longest_seconds") or 0.0))
            possible = max(LEAST_STEPS, int(room / step))
            steps = possible if asked is None else min(asked, possible)
        stage.steps = steps or 0
        stage.units = round(units * stage.steps)
        took = stage.steps * step + max(0.0, (measured.get("first_seconds") or 0.0) - (measured.get("longest_seconds") or 0.0))
        checkpoints = 1 + int(took / spec.training.checkpoint_seconds)
        return took + checkpoints * saved, made, least

    def _asked(self) -> int | None:
        """Optimizer steps of each training stage where the limit is in steps or tokens."""
        budget, count = self.spec.budget, max(1, sum(m.card.trains for m in self.spec.pipeline))
        units = self.spec.training.batch * (self.spec.training.length if self.scene.task == "causal-lm" else 1)
        total = budget.steps or (math.ceil(budget.tokens / units) if budget.tokens else None)
        return None if total is None else max(1, total // count)

"""Seconds of a run and its steps under a limit in minutes, counted as the run itself will divide them. No torch."""

from __future__ import annotations

import math

from engines import pace
from workbench.scene import LEAST_STEPS, Cost, Phase, Scene
from workbench.spec import RunSpec


def hold(spec: RunSpec, scene: Scene, found: Cost) -> Cost:
    """The cost under a limit in minutes: evaluations give way as they do in the run, training gets what is left; else as it is."""
    if spec.budget.minutes is not None and any(s.method.card.trains for s in found.stages):
        Clock(spec, scene, found, {}).apply()
    return found


class Clock:
    """The seconds of each phase and the steps under a limit, with the rules by which a run holds its minutes (``engines.pace``).

    Args:
        found: from ``workbench.forecast``; ``apply`` changes it.
        row: what a probe measured, {} for none: seconds of load, save, keep, evaluation; for each stage seconds (without training),
            start_seconds, step_seconds, checkpoint_seconds, ratio (of evaluations after it to those before), adapted (during it).
    """

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
        each, evaluations, times = self.evaluation, self.evaluation, 2      # the model as it came, the saved result
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
                if not (last and pace.once(each, self.minutes)):
                    evaluations, times = evaluations + each, times + 1
        evaluations += each
        training = [i for i, s in enumerate(found.stages) if s.method.card.trains]
        rest = None if self.minutes is None else 60 * self.minutes - fixed - evaluations
        parts = pace.shares([s.method for s in found.stages])
        least = fixed + evaluations
        for i in training:
            seconds, made, smallest_seconds = self._train(i, None if rest is None else rest * parts[i])
            evaluations, times, least = evaluations + made * self.adapted(i), times + made, least + smallest_seconds
            self.found.stages[i].seconds = seconds
        for i, stage in enumerate(found.stages):
            phase = self.phases[f"{i + 1} {stage.method.card.id}"]
            phase.seconds = stage.seconds
            if i in training:
                phase.flops = stage.start_flops + stage.steps * stage.step_flops
                phase.raw = (phase.raw[0], stage.start + stage.steps * stage.each) if phase.raw is not None else None
        if (phase := self.phases.get("evaluate")) is not None:
            share = evaluations / phase.seconds if phase.seconds else 1.0
            phase.flops *= times / max(1, phase.times)
            if phase.raw is not None and not self.row:
                phase.raw = (phase.raw[0], phase.raw[1] * share)
            phase.seconds, phase.times = evaluations, times
        found.steps, found.units = sum(s.steps or 0 for s in found.stages), sum(s.units for s in found.stages)
        # Copies between stages and the pauses around them have no bar of their own: they go to the stage that causes them.
        spare = fixed + sum(s.seconds for s in found.stages if s.method.card.trains) + evaluations - found.seconds
        if found.stages:
            last = self.phases[f"{len(found.stages)} {found.stages[-1].method.card.id}"]
            last.seconds = max(0.0, last.seconds + spare)
        found.least_seconds = min(least, found.seconds)

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
        start = measured.get("start_seconds", stage.start)
        wanted, each = spec.training.evaluations, self.adapted(i)
        stage.speed = units / step
        least = LEAST_STEPS * step + saved + each + start
        asked = self._asked()
        steps, made = asked, wanted
        if seconds is not None:
            made = pace.evaluations(wanted, seconds, each)
            room = seconds - made * each - saved - start - max(0.0, (measured.get("first_seconds") or 0.0) - (measured.get("longest_seconds") or 0.0))
            possible = max(LEAST_STEPS, int(room / step))
            steps = possible if asked is None else min(asked, possible)
        stage.steps = steps or 0
        stage.units = round(units * stage.steps)
        took = start + stage.steps * step + max(0.0, (measured.get("first_seconds") or 0.0) - (measured.get("longest_seconds") or 0.0))
        checkpoints = 1 + int(took / spec.training.checkpoint_seconds)
        return took + checkpoints * saved, made, least

    def _asked(self) -> int | None:
        """Optimizer steps of each training stage where the limit is in steps or tokens."""
        budget, count = self.spec.budget, max(1, sum(m.card.trains for m in self.spec.pipeline))
        units = self.spec.training.batch * (self.spec.training.length if self.scene.task == "causal-lm" else 1)
        total = budget.steps or (math.ceil(budget.tokens / units) if budget.tokens else None)
        return None if total is None else max(1, total // count)

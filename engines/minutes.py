"""How a run keeps a limit in minutes: what each training stage may use, and what is tried early to know it."""

from __future__ import annotations

import time

from engines.errors import FettleError
from engines.lazy import torch
from engines.pace import SPEED, SPEED_LEAST, once, shares


class Minutes:
    """Part of ``engines.pipeline.Run``."""

    @property
    def how(self) -> dict:
        return dict(precision=self.settings.precision, loss_chunk=self.settings.loss_chunk)

    def look_ahead(self, index: int) -> None:
        """Under a limit in minutes: try the training-free stages after ``index`` on one block; what cannot be tried stays as forecast."""
        minutes, pipeline = self.spec.budget.minutes, self.spec.pipeline
        for i in range(index + 1, len(pipeline)):
            method = pipeline[i]
            blocks = max(2, self.loaded.profile.layers)
            if (minutes is None or method.card.trains or i in self.known
                    or self.ahead.stage.get(i, 0.0) / blocks > 0.05 * 60 * minutes):
                continue
            self.known.add(i)
            t0 = time.perf_counter()
            try:
                from engines.rehearsal import rehearse
                with torch.random.fork_rng(devices=[]):
                    found = rehearse(self.model, method, self.context(i), **self.how)
            except (FettleError, RuntimeError, ValueError, AttributeError, StopIteration) as e:
                self.reporter.log(f"ahead    stage {i + 1} was not tried ({type(e).__name__}: {str(e)[:120]})")
                continue
            if found is not None:
                self.ahead.stage[i], self.ahead.ratio[i] = found.seconds, found.ratio
                self.reporter.log(f"ahead    stage {i + 1}, {method.card.name}: {found.seconds:.2f} s, then evaluations take "
                                  f"{found.ratio:.2f} times as long (one block tried in {time.perf_counter() - t0:.2f} s)")

    def adapted(self, plain: float | None) -> float:
        """Seconds of an evaluation of the model as the training stage holds it, from one batch with and without its adapter."""
        if plain is None:
            return self.ahead.evaluation
        return self.ahead.evaluation * min(5.0, max(0.5, self.sample() / max(1e-6, plain)))

    def sample(self) -> float:
        from engines.evaluation import sample_seconds
        return sample_seconds(self.model, self.data, device=self.device, **self.how)

    def limit(self, index: int):
        """What training stage ``index`` may use of what is left of the budget."""
        from engines.training.loop import Limit
        spec, pipeline = self.spec, self.spec.pipeline
        left = [i for i in range(index, len(pipeline)) if pipeline[i].card.trains]
        budget, steps, seconds = spec.budget, None, None
        per_step = self.settings.batch * (self.data.length if self.task == "causal-lm" else 1)
        total = budget.steps or (-(-budget.tokens // per_step) if budget.tokens else None)
        if total is not None:
            steps = max(1, (total - self.base_step) // len(left))
        after = self.ahead.after(pipeline, index, budget.minutes)
        others = 0.0
        if budget.minutes is not None:
            rest = budget.minutes * 60 - self.elapsed() - after
            part = shares(pipeline)
            seconds = max(0.1, rest * part[index] / sum(part[i] for i in left))
            others = max(0.0, rest - seconds)
        if steps is None and seconds is None:
            steps = max(20, -(-self.data.rows // self.settings.batch))
        return Limit(steps, seconds, after + others)

    def scored_at_the_end(self, index: int) -> bool:
        """True when the evaluation of stage ``index``, the last, is left to that of the saved result: the minutes want it."""
        minutes = self.spec.budget.minutes
        if minutes is None or index + 1 < len(self.spec.pipeline) or not any(m.card.trains for m in self.spec.pipeline):
            return False
        each = self.ahead.evaluation = self.ahead.evaluation * self.ahead.ratio.get(index, 1.0)
        return once(each, minutes) or self.elapsed() + each + self.ahead.end(self.spec.pipeline, index) > 60 * minutes

    def timing(self) -> float:
        """Seconds for the timing of the result: the last place where a limit in minutes can still be met."""
        minutes = self.spec.budget.minutes
        if minutes is None:
            return SPEED - 0.2
        left = 60 * minutes - self.elapsed() - 0.1
        return min(max(SPEED_LEAST, left), SPEED - 0.2 + 0.03 * 60 * minutes)

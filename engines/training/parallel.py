"""The training loop in several processes: each computes its share of a step's rows, gradients are added, all take the same step.

A step's batch is the global one. Its micro-batches are dealt out in turn; the loss of each is weighted by its share of all targets
of the step, so that the sum over processes is the mean over the batch, as in one process ("Accurate, Large Minibatch SGD: Training
ImageNet in 1 Hour" says how such shares go wrong). Dropout draws differ between processes and are a function of seed, stage, step and
rank, so that a resumed run goes on exactly.
"""

from __future__ import annotations

import time

import torch

from engines.errors import RunFailed
from engines.shortage import short
from engines.training import distributed
from engines.training.loop import Limit, Trainer


class ParallelTrainer(Trainer):
    """``Trainer`` as one of the processes of ``engines.training.distributed.Group``."""

    def __init__(self, model, method, context, settings, limit: Limit, *, group, first_evaluation: float = 0.0,
                 first_checkpoint: float = 0.0, **more):
        self.group, self.processes = group, group.size
        if settings.batch < group.size:
            raise RunFailed(f"a batch of {settings.batch} rows cannot be divided among {group.size} processes",
                            f"Raise training.batch to {group.size} or more, or lower training.processes")
        known = group.same([limit.steps, limit.seconds, limit.after, first_evaluation, first_checkpoint])
        super().__init__(model, method, context, settings, Limit(*known[:3]), first_evaluation=known[3],
                         first_checkpoint=known[4], **more)

    # -- one clock: rank 0's -------------------------------------------------------------------------------
    def _synchronise(self) -> None:
        known = [self.used, self.recent[-1] if self.recent else 0.0, self.eval_seconds, self.checkpoint_seconds]
        self.used, last, self.eval_seconds, self.checkpoint_seconds = self.group.figures(known)
        if self.recent:
            self.recent[-1] = last

    def _over(self) -> bool:
        self._synchronise()
        return super()._over()

    def _tell(self) -> None:
        self._synchronise()
        super()._tell()

    def _wants(self) -> str | None:
        return distributed.wish(self.reporter)

    # -- a step --------------------------------------------------------------------------------------------
    def _batches(self):
        context, settings = self.context, self.settings
        whole = context.data.batch(context.step, settings.batch, min(settings.batch, self.accumulation * self.processes))
        self._whole = sum(b["labels"].numel() for b in whole)
        self._idle = len(whole) < self.processes
        return whole[self.group.rank:: self.processes]

    def _targets(self, batches) -> int:
        return self._whole

    def _gradients(self, batches):
        clock = time.perf_counter
        found, lack = (0.0, self._whole, 0.0, 0.0), ""
        devices = [torch.cuda.current_device()] if self.device != "cpu" else []
        with torch.random.fork_rng(devices=devices):
            context = self.context
            torch.manual_seed(hash((context.seed, context.stage, context.step, self.group.rank)) % 2**63)
            try:
                found = super()._gradients(batches)
            except (RuntimeError, MemoryError) as e:
                if not (lack := short(e)):
                    raise
        if self.group.most(bool(lack)) > 0:
            # All of them repeat the step, or their weights would part.
            raise MemoryError(lack or "in another process of this run")
        t0 = clock()
        mean, units, forward, backward = found
        mean = torch.as_tensor(mean, dtype=torch.float32, device=self.parameters[0].device).reshape(1)
        if self._idle:
            self._fill()
        self.group.add([mean, *(p.grad for p in self.parameters if p.grad is not None)])
        return mean[0], units, forward, backward + clock() - t0

    def _fill(self) -> None:
        """Zeros for a process without rows, in the places where the others have gradients."""
        has = torch.tensor([float(p.grad is not None) for p in self.parameters], dtype=torch.float64).numpy()
        for p, n in zip(self.parameters, self.group.total(has)):
            if n > 0 and p.grad is None:
                p.grad = torch.zeros_like(p)

    # -- what one process does for all ---------------------------------------------------------------------
    def evaluate(self):
        if self.group.drifted(self.parameters):
            raise RunFailed("the weights of the processes have drifted apart: "
                            f"{self.method.card.name} decides on one process's own figures", "Set training.processes to 1")
        return super().evaluate()

    def save(self, final: bool = False) -> None:
        if self.group.rank == 0:
            super().save(final)
        else:
            self.last_checkpoint = time.perf_counter()
            self._flush()

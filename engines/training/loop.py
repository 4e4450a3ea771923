"""The one training loop: every method that trains goes through it, methods hook into it.

A step is: batch -> forward and backward of each micro-batch -> clip -> optimizer -> after_step. Progress is
the further of step share and time share, and drives every schedule, so that a stage ends with a completed
schedule whatever limit it had.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.errors import RunFailed, StopRequested
from engines.evaluation import Evaluation, evaluate
from engines.heads import is_head
from engines.pace import evaluations
from engines.schedules.rate import rate
from engines.shortage import Width, short
from engines.training import checkpoint
from engines.training.loss import task_loss
from engines.training.settings import TrainSettings


@dataclass
class Limit:
    """What one training stage may use: optimizer steps, seconds (its evaluations included), or both."""

    steps: int | None = None
    seconds: float | None = None
    after: float = 0.0
    """Seconds that the run still needs after this stage; only told, for the time left of the whole run."""


@dataclass
class Result:
    """How a training stage ended."""

    steps: int
    tokens: int
    seconds: float
    evaluation: Evaluation | None
    status: str
    """finished or stopped."""


class Trainer:
    """One training stage; ``run`` is the loop, the rest are its parts."""

    processes = 1
    """Processes among which the rows of a step are divided (``engines.training.parallel``)."""

    def __init__(self, model, method, context, settings: TrainSettings, limit: Limit, *, base_step: int = 0, base_tokens: int = 0,
                 first_evaluation: float = 0.0, first_checkpoint: float = 0.0, width: Width | None = None):
        self.model, self.method, self.context, self.settings, self.limit = model, method, context, settings, limit
        self.base_step, self.base_tokens, self.tokens, self.used = base_step, base_tokens, 0, 0.0
        self.reporter, self.device = context.reporter, context.device
        self.eval_seconds, self.checkpoint_seconds = first_evaluation, first_checkpoint
        self.width = width or Width(self.reporter)
        self.evaluations = evaluations(settings.evaluations, limit.seconds, first_evaluation)
        self.accumulation, self.retried = settings.accumulation, False
        self.recent: deque[float] = deque(maxlen=50)
        self.pending: list[tuple] = []
        self.last_checkpoint = self.last_layers = time.perf_counter()
        self.done_evaluations = 0
        groups = method.parameter_groups(model, context)
        self.groups = self._decayed(groups)
        self.optimizer = self._optimizer()
        context.optimizer = self.optimizer
        self.parameters = self._held()
        if not self.parameters:
            raise RunFailed(f"{method.card.name} leaves nothing to train in this model", "Choose other targets")
        self.observers = [switch.observer(self) for switch in settings.switches]

    # -- set-up ------------------------------------------------------------------------------------------
    def _decayed(self, groups: list[dict]) -> list[dict]:
        out, heads = [], set()
        if self.settings.head_lr:
            heads = {id(p) for name, p in self.model.named_parameters() if is_head(name)}
        for g in [part for group in groups for part in self._headed(group, heads)]:
            scale = g["lr"] / self.settings.lr if g.get("lr") else g.get("lr_scale", 1.0)
            decay = g.get("weight_decay", self.settings.weight_decay)
            extra = {k: v for k, v in g.items() if k not in ("params", "lr", "lr_scale", "weight_decay")}
            params = list(g["params"])
            # Norm gains and biases are not decayed: they have no scale to keep small. A vector of a matrix's entries is marked ``decays``.
            matrices = [p for p in params if p.dim() >= 2 or getattr(p, "decays", False)]
            vectors = [p for p in params if p.dim() < 2 and not getattr(p, "decays", False)]
            out += [dict(params=part, lr_scale=scale, weight_decay=wd, **extra) for part, wd in ((matrices, decay), (vectors, 0.0)) if part]
        return out

    def _headed(self, group: dict, heads: set) -> list[dict]:
        """A group, or its two parts where the head has a rate of its own."""
        params = list(group["params"])
        mine = [p for p in params if id(p) in heads]
        rest = {**group, "params": [p for p in params if id(p) not in heads]}
        return [rest, {**group, "params": mine, "lr": self.settings.head_lr}] if mine else [rest]

    def _optimizer(self):
        custom = getattr(self.method, "optimizer", None)
        if callable(custom):
            return custom(self.groups, self.settings, self.context)
        if self.settings.optimizer == "sgd":
            return torch.optim.SGD(self.groups, lr=self.settings.lr, momentum=0.9)
        betas = (0.9, 0.95) if self.context.task == "causal-lm" else (0.9, 0.999)
        return torch.optim.AdamW(self.groups, lr=self.settings.lr, betas=betas, fused=True)

    def _held(self) -> list:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    # -- budget ------------------------------------------------------------------------------------------
    def progress(self) -> float:
        """Share of the stage's budget used; the time of its last evaluation and checkpoint is set aside."""
        shares = [0.0]
        if self.limit.steps:
            shares.append(self.context.step / self.limit.steps)
        if self.limit.seconds:
            shares.append(self.used / max(1e-6, self.room()))
        return min(1.0, max(shares))

    def room(self) -> float:
        """Seconds of the limit that steps may use."""
        return self.limit.seconds - self.eval_seconds - (self.checkpoint_seconds if self.context.folder is not None else 0.0)

    def _over(self) -> bool:
        if any(o.ended for o in self.observers):
            return True
        if self.limit.steps and self.context.step >= self.limit.steps:
            return True
        if self.limit.seconds:
            usual = statistics.median(self.recent) if self.recent else 0.0
            # A step that would end further beyond the limit than the present moment is before it is not begun.
            return self.used + usual / 2 >= self.room() and self.context.step > 0
        return False

    # -- the loop ----------------------------------------------------------------------------------------
    def run(self, resume: Path | None = None) -> Result:
        """Train until the limit. Raises ``StopRequested("pause")`` after a checkpoint; returns ``stopped`` on a stop."""
        context, settings = self.context, self.settings
        if settings.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        status, evaluation = "finished", None
        if resume is not None:
            self._restore(resume)
        self.model.train()
        began = time.perf_counter() - self.used
        self.reporter.points(self.run_step, {"trainable": sum(p.numel() for p in self.parameters if p.requires_grad)})
        if self.evaluations < settings.evaluations:
            self.reporter.event("choice", f"{self.evaluations} of {settings.evaluations} evaluations in this stage: one takes "
                                f"{self.eval_seconds:.1f} s of its {self.limit.seconds:.0f} s", evaluations=self.evaluations)
        try:
            while not self._over():
                context.progress = self.progress()
                context.total_steps = self.limit.steps or self._estimated_steps()
                self._step()
                self.used = time.perf_counter() - began
                self._tell()
                if self._evaluation_due():
                    evaluation = self.evaluate()
                    self.used = time.perf_counter() - began
                if time.perf_counter() - self.last_checkpoint >= settings.checkpoint_seconds and self._affordable(self.checkpoint_seconds):
                    self.save()
                    self.used = time.perf_counter() - began
                want = self._wants()
                if want == "memory":
                    self._lower("the memory limit was passed")
                elif want is not None:
                    self._flush()
                    self.save()
                    if want == "pause":
                        raise StopRequested("pause")
                    status = "stopped"
                    break
            context.progress = 1.0 if status == "finished" else self.progress()
            self._flush()
            self._tell_layers(force=True)
            if evaluation is None or evaluation.extra.get("step") != self.run_step:
                evaluation = self.evaluate()
            self.used = time.perf_counter() - began
        finally:
            if settings.checkpointing:
                self.model.gradient_checkpointing_disable()
            self.model.eval()
        self.save(final=True)
        return Result(context.step, self.tokens, self.used, evaluation, status)

    @property
    def run_step(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.base_step + self.context.step

    def _estimated_steps(self) -> int:
        if not self.recent or not self.limit.seconds:
            return self.context.step + 1
        left = max(0.0, self.room() - self.used)
        return max(self.context.step + 1, self.context.step + int(left / max(1e-6, statistics.median(self.recent))))

    def _step(self) -> None:
        context, settings, method, model = self.context, self.settings, self.method, self.model
        clock = time.perf_counter
        t0 = clock()
        factor = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * self._rate(group.get("born", 0.0)) * group.get("lr_scale", 1.0)
        method.before_step(model, context)
        self.parameters = self._held()      # some may have joined or left
        for observer in self.observers:
            observer.before_step()
        batches = self._batches()
        t1 = clock()
        why = ""
        try:
            loss, units, forward, backward = self._gradients(batches)
        except (RuntimeError, MemoryError) as e:
            if not (why := short(e)):
                raise
        if why:     # out here the error's frames, and the activations that they hold, are gone
            del batches
            self.optimizer.zero_grad(set_to_none=True)
            if not self.shortage(why):
                self._lower(why)
            return
        t2 = clock()
        method.after_backward(model, context)
        for observer in self.observers:
            observer.after_backward()
        # An optimizer that keeps gradients in a form of its own clips them with the others.
        clip = getattr(self.optimizer, "clip", None) or (lambda most: torch.nn.utils.clip_grad_norm_(self.parameters, most, foreach=True))
        norm = clip(settings.clip or math.inf)
        self.optimizer.step()
        context.step += 1
        method.after_step(model, context)
        for observer in self.observers:
            observer.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        self._keep_masks()
        self.tokens += units
        t3 = clock()
        self.recent.append(t3 - t0)
        self.pending.append((self.run_step, loss, norm, settings.lr * factor, units, self.base_tokens + self.tokens,
                             t1 - t0, forward, backward, t3 - t2, t3 - t0))

    def _rate(self, born: float = 0.0) -> float:
        """Share of the peak rate now; parameters that joined at ``born`` of the budget have a schedule of their own from there on."""
        settings, left = self.settings, max(1e-9, 1.0 - born)
        return rate((self.context.progress - born) / left, schedule=settings.schedule, warmup=min(1.0, settings.warmup / left),
                    final=settings.final)

    def _wants(self) -> str | None:
        return self.reporter.wants()

    def _batches(self) -> list[dict]:
        """This process's micro-batches of the step."""
        return self.context.data.batch(self.context.step, self.settings.batch, self.accumulation)

    def _targets(self, batches) -> int:
        """Targets of the whole step: tokens or examples."""
        return sum(b["labels"].numel() for b in batches)

    def _gradients(self, batches):
        """Backward through every micro-batch, weighted by its share of targets; mean loss, units, seconds."""
        context, clock = self.context, time.perf_counter
        total = self._targets(batches)
        autocast = torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.settings.precision == "bf16")
        mean, forward, backward = 0.0, 0.0, 0.0
        for batch in batches:
            t0 = clock()
            if self.device != "cpu":
                batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            share = batch["labels"].numel() / total
            with autocast:
                loss = task_loss(self.model, batch, context.task, chunk=self.settings.loss_chunk)
                full = self.method.loss(self.model, loss, context)
            t1 = clock()
            (full * share if share != 1.0 else full).backward()
            forward, backward = forward + t1 - t0, backward + clock() - t1
            mean = mean + loss.detach() * share
        return mean, total, forward, backward

    def _keep_masks(self) -> None:
        """Weights that an earlier stage pruned stay zero, when this stage trains them directly."""
        if not self.context.masks:
            return
        if not hasattr(self, "_masked"):
            params = dict(self.model.named_parameters())
            held = {id(p) for p in self.parameters}     # some may be frozen just now and trained later
            self._masked = [(params[n], n) for n in self.context.masks if n in params and id(params[n]) in held]
        with torch.no_grad():
            for p, name in self._masked:
                p.mul_(self.context.masks[name])

    # -- what is told ------------------------------------------------------------------------------------
    def _tell(self) -> None:
        if self.device == "cpu" or len(self.pending) >= 16:
            self._flush()
        share = self.progress()
        left = None
        if share > 0.01:
            left = (self.limit.seconds - self.used) if self.limit.seconds else self.used * (1 - share) / share
            left = max(0.0, left) + self.limit.after
        self.reporter.progress(share, left)
        self._tell_layers()

    def _flush(self) -> None:
        """Read losses (a synchronisation on a GPU, hence many at a time) and report them."""
        for step, loss, norm, lr, units, tokens, data, forward, backward, update, whole in self.pending:
            loss, norm = float(loss), float(norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                self.pending.clear()
                raise RunFailed(f"the {'loss' if not math.isfinite(loss) else 'gradient'} stopped being a finite number at step {step}",
                                f"Lower the learning rate (now {self.settings.lr:g}), for example to {self.settings.lr / 4:.1g}")
            speed = "tokens_per_second" if self.context.task == "causal-lm" else "samples_per_second"
            self.reporter.points(step, {"loss": loss, "lr": lr, "grad_norm": norm, speed: units / whole, "tokens": tokens, "time/data": data,
                                        "time/forward": forward, "time/backward": backward, "time/step": update})
        self.pending.clear()

    def _tell_layers(self, force: bool = False) -> None:
        now = time.perf_counter()
        if force or now - self.last_layers > 1.0:
            self.last_layers = now
            figures = self.method.layers(self.model, self.context)
            for observer in self.observers:
                figures = {**figures, **observer.layers()}
            if figures:
                self.reporter.layers(self.run_step, figures)

    # -- evaluation, checkpoints, memory -----------------------------------------------------------------
    def _evaluation_due(self) -> bool:
        # The last of the planned evaluations is the one at the end of the stage.
        due = int(self.progress() * self.evaluations)
        if due > self.done_evaluations and due < self.evaluations:
            self.done_evaluations = due
            return self._affordable(self.eval_seconds)
        return False

    def _affordable(self, seconds: float) -> bool:
        """Under a limit in seconds: whether this leaves most of what remains to training."""
        return not self.limit.seconds or seconds <= 0.5 * (self.room() - self.used)

    def evaluate(self) -> Evaluation:
        """Score the held-out items and report it at the present step."""
        self._flush()
        self.reporter.phase("evaluate")
        result = evaluate(self.model, self.context.data, device=self.device, precision=self.settings.precision,
                          loss_chunk=self.settings.loss_chunk, width=self.width)
        self.eval_seconds = result.usual or result.seconds
        result.extra["step"] = self.run_step
        self.reporter.evaluation("during", self.context.stage, result)
        self.reporter.points(self.run_step, {"loss_eval": result.extra["loss"], "metric": result.value})
        self.reporter.phase(f"{self.context.stage + 1} {self.method.card.id}")
        return result

    def save(self, final: bool = False) -> None:
        """Write a checkpoint (not in tests without a folder)."""
        self.last_checkpoint = time.perf_counter()
        if self.context.folder is None:
            return
        self._flush()
        # What the checkpoint covers must be recorded first, or a kill just after it would lose points that are not made again.
        getattr(self.reporter, "flush", lambda: None)()
        facts = dict(stage=self.context.stage, step=self.context.step, run_step=self.run_step, base_step=self.base_step,
                     base_tokens=self.base_tokens, tokens=self.tokens, used=self.used, eval_seconds=self.eval_seconds,
                     accumulation=self.accumulation, retried=self.retried, done_evaluations=self.done_evaluations, final=final)
        path, size = checkpoint.save(self.context.folder / "checkpoints", model=self.model, optimizer=self.optimizer,
                                     context=self.context, facts=facts)
        took = self.checkpoint_seconds = time.perf_counter() - self.last_checkpoint
        self.reporter.event("checkpoint", f"Checkpoint at step {self.run_step:,}: {size / 1e6:.1f} MB in {took:.2f} s",
                            step=self.run_step, bytes=size, path=str(path), used=self.used)

    def _restore(self, path: Path) -> None:
        facts = checkpoint.restore(path, model=self.model, optimizer=self.optimizer, context=self.context)
        self.context.step, self.tokens, self.used = facts["step"], facts["tokens"], facts["used"]
        self.accumulation, self.retried = facts["accumulation"], facts["retried"]
        self.eval_seconds, self.done_evaluations = facts["eval_seconds"], facts["done_evaluations"]
        self.context.resuming = False
        for observer in self.observers:
            observer.restored()

    def shortage(self, why: str) -> bool:
        """True when the reporter finds room after all (see its ``relax``): the step is repeated as it was."""
        relax = getattr(self.reporter, "relax", None)
        return relax is not None and relax()

    def _lower(self, why: str) -> None:
        """One retry with half the micro-batch; a second shortage ends the run with the remedy."""
        micro = max(1, self.settings.batch // (self.accumulation * self.processes))
        if self.retried or micro == 1:
            raise RunFailed(f"out of memory in the training step ({why}), also with micro-batches of {micro}",
                            "Lower the batch or the length, switch checkpointing on, or raise budget.memory_gb")
        self.retried, self.accumulation = True, self.accumulation * 2
        if self.device != "cpu":
            torch.cuda.empty_cache()
        self.reporter.event("memory", f"Out of memory ({why}): micro-batch lowered from {micro} to {max(1, micro // 2)}, step repeated",
                            knob="accumulation", before=self.accumulation // 2, after=self.accumulation)

"""Automatic choices, each with its reason."""

from __future__ import annotations

import dataclasses
import math

from engines.errors import InputError
from engines.method import AUTO
from engines.profile import Batch
from workbench.forecast import after, cost
from workbench.remedies import TIGHT, clock
from workbench.scene import Cost, Scene
from workbench.spec import RunSpec

GOOD_STEPS = 150
"""Under a limit in minutes the batch is made small enough for at least this many optimizer steps."""
PASSES = 3
"""Passes over the training data when no limit says when to stop."""
LEAST_ROWS = {"causal-lm": 4, "text-classification": 16, "image-classification": 16}
HEAD_RATE, POOLED_RATE = 1.25, 20.0
"""Over the width: a new head's peak learning rate, because a step of Adam moves a label's score by rate x width x the size of its inputs.
These are normed in most models; behind BERT's pooler, a tanh of small numbers, the best rate was ten times as large (docs/LOG.md). Its
relatives have a matrix of the model's width inside the head, for which such a rate was never measured."""
TOKENS_PER_STEP = 4096
LOSS_CHUNK, LEAST_CHUNK = 2048, 128
"""Tokens whose logits the loss holds at a time, without a limit on memory and at the least."""


def knobs(spec: RunSpec, **changes) -> RunSpec:
    """A copy with other training knobs."""
    return spec.replace(training=dataclasses.replace(spec.training, **changes))


def usual_rate(training, profile, task: str) -> tuple[float, str]:
    """A peak learning rate by kind of training, and why; adapters take larger steps than whole weights.

    Args:
        training: the methods that train, in order.
        profile: the ``ModelProfile`` that they train.
    """
    hinted = next(((rate, m) for m in training if (rate := m.own_rate(task))), None)
    if hinted:
        value, method = hinted
        # Such hints were found on models of width 256; a wider one takes smaller steps, as with all other methods below.
        wider = min(1.0, math.sqrt(256 / max(1, profile.hidden)))
        return float(f"{value * wider:.2g}"), f"{method.card.name}'s own default" + (f", scaled by the width {profile.hidden}" if wider < 1 else "")
    scratch = any(getattr(m, "from_scratch", False) is True for m in training)
    whole = any(getattr(m, "whole", False) or m.footprint(profile, Batch(1, 8)).trainable > 0.5 * profile.parameters for m in training)
    width = max(1, profile.hidden)
    scale = math.sqrt(256 / width)
    if scratch:
        value, why = 3e-3 * scale, "training from random weights"
    elif whole and task == "text-classification":
        value, why = 2e-4 * scale, "all weights move, the head is new"
    elif whole:
        value, why = 6e-4 * scale, "all weights move"
    elif training:
        value, why = 3e-3 * scale, "adapters start at zero and take larger steps than whole weights"
    else:
        return 1e-3, "no stage trains"
    value = float(f"{min(5e-3, max(1e-5, value)):.1e}")
    return value, f"{why}; scaled by the width {width}"


class Chooser:
    """Replaces every ``auto`` of a spec; ``chosen`` and ``reasons`` tell why."""

    def __init__(self, spec: RunSpec, scene: Scene):
        self.spec, self.scene = spec, scene
        self.asked = spec.training
        self.chosen: list[dict] = []
        self.reasons: list[dict[str, str]] = []
        self.priced: tuple[RunSpec, Cost] | None = None

    def auto(self, name: str) -> bool:
        return getattr(self.asked, name) == AUTO

    def note(self, what: str, value, why: str) -> None:
        self.chosen = [c for c in self.chosen if c["what"] != what] + [{"what": what, "value": value, "why": why}]

    # -- first choices ----------------------------------------------------------------------------------
    def length(self) -> tuple[int, str]:
        model, facts, task = self.scene.model, self.scene.facts, self.scene.task
        if task == "image-classification":
            return max(8, model.context), f"{model.context} positions fill an image"
        if task == "causal-lm":
            wanted = min(model.context, 512)
            available = max(8, facts.tokens // 2)
            if available < wanted:
                return max(8, available // 8 * 8), f"the data has only {facts.tokens:,} tokens"
            why = "the model's whole context" if wanted == model.context else "rows of 512 tokens; the context would allow more"
            return max(8, wanted), f"{why}, packed without padding"
        longest = facts.length_at(0.99) or model.context
        wanted = max(16, min(model.context, -(-longest // 8) * 8, 512))
        return wanted, f"99 % of the examples are no longer than {min(longest, wanted)} tokens"

    def precision(self) -> tuple[str, str]:
        machine, model = self.scene.machine, self.scene.model
        ratio = machine.bf16_gain
        if ratio < 1.15:
            return "fp32", "bf16 is not faster on this machine"
        if machine.device == "cpu" and model.hidden < 128:
            return "fp32", f"matrices of width {model.hidden} are too small to gain from bf16"
        return "bf16", f"bf16 runs at {ratio:.1f} times the rate of fp32 on this machine"

    def batch(self, length: int) -> tuple[int, str]:
        task, facts = self.scene.task, self.scene.facts
        if task == "causal-lm":
            rows = max(4, min(64, 2 ** round(math.log2(max(1.0, TOKENS_PER_STEP / length)))))
            return rows, f"{rows * length:,} tokens in each step"
        rows = 32 if task == "text-classification" else 64
        while rows > 4 and rows * 4 > facts.train:
            rows //= 2
        return rows, "the usual size for " + task

    def rate(self, spec: RunSpec) -> tuple[float, str]:
        return usual_rate([m for m in spec.pipeline if m.card.trains], self.scene.model, self.scene.task)

    def head_rate(self, spec: RunSpec) -> tuple[float, str]:
        """A rate for a head that starts at random beside weights that do not; 0 where it has that of all the rest."""
        trained = [m for m in spec.pipeline if m.card.trains]
        labels, width = self.scene.fresh_labels, max(1, self.scene.model.hidden)
        if not trained or not labels or any(getattr(m, "from_scratch", False) is True for m in trained):
            return 0.0, ""
        pooled = self.scene.model.architecture == "bert"
        value = max(float(f"{min(0.1, (POOLED_RATE if pooled else HEAD_RATE) / width):.1g}"), spec.training.lr)
        why = "" if not pooled else ", above all behind a pooler"
        return value, f"a new head for {labels} labels starts at random and takes larger steps than trained weights{why}; over the width {width}"

    # -- all of it --------------------------------------------------------------------------------------
    def run(self) -> tuple[RunSpec, Cost]:
        """The resolved spec and its cost.

        Raises:
            InputError: a method cannot be done on this model, or a lever finds no value inside its limit.
        """
        spec, t = self.spec, self.asked
        first = {}
        for name, choose in (("length", self.length), ("precision", self.precision)):
            if self.auto(name):
                first[name], why = choose()
                self.note(name, first[name], why)
        length = first.get("length", t.length)
        if self.scene.task != "image-classification" and self.scene.model.context and length > self.scene.model.context:
            raise InputError(
                "training.length",
                length,
                f"{spec.model} reads at most {self.scene.model.context} tokens",
                f"Give at most {self.scene.model.context}, or auto",
            )
        if self.auto("batch"):
            first["batch"], why = self.batch(length)
            first["batch"] = max(first["batch"], t.processes)
            self.note("batch", first["batch"], why)
        for name, value in (("accumulation", 1), ("checkpointing", False), ("loss_chunk", LOSS_CHUNK)):
            if self.auto(name):
                first[name] = value
        rows = first.get("batch", t.batch)
        if not self.auto("accumulation") and t.accumulation > rows:
            raise InputError(
                "training.accumulation", t.accumulation, f"a batch of {rows} cannot be divided so often", f"Give at most {rows}"
            )
        spec = knobs(spec, **first)
        spec = self.fit_methods(spec)
        if self.auto("lr"):
            value, why = self.rate(spec)
            spec = knobs(spec, lr=value)
            if any(m.card.trains for m in spec.pipeline):
                self.note("lr", value, why)
        if self.auto("head_lr"):
            value, why = self.head_rate(spec)
            spec = knobs(spec, head_lr=value)
            if why:
                self.note("head_lr", value, why)
        spec = self.default_steps(spec)
        spec = self.enough_steps(spec)
        spec, found = self.inside_memory(spec)
        if found.steps:
            self.note("batch", spec.training.batch, self.batch_reason(spec))
        return spec, found

    def fit_methods(self, spec: RunSpec) -> RunSpec:
        """Each method chooses its levers on the model that the stage before leaves."""
        profile, stages, self.reasons = self.scene.model, [], []
        for i, method in enumerate(spec.pipeline):
            try:
                method.check(profile)
                refused = method.card.refuses.get(profile.architecture)
                if refused:
                    raise InputError(
                        "method",
                        method.card.id,
                        f"it cannot serve a {profile.architecture} model: {refused}",
                        "Choose another method",
                    )
                if self.scene.task not in method.card.tasks:
                    raise InputError("method", method.card.id, f"it does not serve {self.scene.task}", "Choose another method")
                method, why = method.fit(profile, spec.budget)
            except InputError as e:
                field = e.field.split(".", 1)[-1] if e.field.startswith(method.card.id + ".") else e.field
                place = f"pipeline[{i}]" + ("" if field in ("method", "model", f"pipeline[{i}]") else f".{field}")
                raise InputError(
                    e.field if e.field.startswith(("pipeline[", "budget", "model")) else place, e.value, e.problem, e.remedy
                ) from None
            stages.append(method)
            self.reasons.append(dict(why))
            for name, reason in why.items():
                self.note(f"{method.card.id} {name}", getattr(method, name, None), reason)
            profile = after(method, profile)
        return spec.replace(pipeline=tuple(stages))

    def default_steps(self, spec: RunSpec) -> RunSpec:
        budget = spec.budget
        if budget.minutes or budget.steps or budget.tokens or not any(m.card.trains for m in spec.pipeline):
            return spec
        units = self.scene.facts.tokens / spec.training.length if self.scene.task == "causal-lm" else self.scene.facts.train
        count = sum(m.card.trains for m in spec.pipeline)
        steps = max(20, min(5000, math.ceil(PASSES * units / spec.training.batch))) * count
        self.note("steps", steps, f"no limit on time, steps or tokens: {PASSES} passes over the data, at most 5,000 steps")
        return spec.replace(budget=dataclasses.replace(budget, steps=steps))

    def price(self, spec: RunSpec) -> Cost:
        """The cost of a resolved spec; the last one is kept, because one choice ends where the next begins."""
        if self.priced is None or self.priced[0] is not spec:
            self.priced = (spec, cost(spec, self.scene))
        return self.priced[1]

    def enough_steps(self, spec: RunSpec) -> RunSpec:
        """Under minutes alone a batch that leaves too few steps is halved."""
        least = LEAST_ROWS[self.scene.task]
        while self.auto("batch") and spec.budget.minutes and not spec.budget.steps and not spec.budget.tokens:
            found = self.price(spec)
            rows = spec.training.batch
            count = sum(m.card.trains for m in spec.pipeline)
            if not count or found.steps >= GOOD_STEPS * count or rows // 2 < max(least, spec.training.accumulation, spec.training.processes):
                break
            spec = knobs(spec, batch=rows // 2)
        return spec

    def inside_memory(self, spec: RunSpec) -> tuple[RunSpec, Cost]:
        """Smaller micro-batches and loss chunks first (same mathematics), then checkpointing, then shorter rows."""
        found = self.price(spec)
        limit = (spec.budget.memory_gb or math.inf) * 1e9 * (1 - TIGHT)
        trains = any(m.card.trains for m in spec.pipeline)
        while found.peak.total > limit and trains:
            for change, what, why in self.smaller(spec, found):
                other = knobs(spec, **change)
                price = self.price(other)
                # Later phases keep what training leaves behind, so any phase may gain; where none does, the knob is left alone.
                if price.peak.total < 0.995 * found.peak.total:
                    spec, found = other, price
                    self.note(what, change[what], why)
                    break
            else:
                break
        return spec, found

    def smaller(self, spec: RunSpec, found: Cost):
        """Knobs that may be lowered for memory, the mildest first: (change, name, reason)."""
        t, limit = spec.training, f"{spec.budget.memory_gb:g} GB"
        chunk = None
        if self.auto("loss_chunk") and self.scene.task == "causal-lm" and t.loss_chunk // 2 >= LEAST_CHUNK:
            chunk = ({"loss_chunk": t.loss_chunk // 2}, "loss_chunk",
                     f"logits of {t.loss_chunk // 2} tokens at a time keep the run below {limit}; the result is the same")
        # With a large vocabulary the logits are what is large, and smaller chunks of them cost next to no time.
        first = chunk is not None and found.peak.parts.get("logits", 0) > 0.25 * found.peak.total
        if first:
            yield chunk
        if self.auto("accumulation") and t.accumulation * 2 * t.processes <= t.batch and t.batch % (t.accumulation * 2) == 0:
            yield (
                {"accumulation": t.accumulation * 2},
                "accumulation",
                f"micro-batches of {t.batch // (t.accumulation * 2)} rows keep the run below {limit}",
            )
        if chunk and not first:
            yield chunk
        if self.auto("checkpointing") and not t.checkpointing:
            yield {"checkpointing": True}, "checkpointing", f"the step would pass {limit} without it; about a third slower"
        if self.auto("length") and self.scene.task == "causal-lm" and t.length >= 128:
            yield {"length": t.length // 2}, "length", f"longer rows would pass {limit}"

    def batch_reason(self, spec: RunSpec) -> str:
        rows = spec.training.batch
        if not self.auto("batch"):
            return "as asked"
        text = (
            f"{rows * spec.training.length:,} tokens in each step"
            if self.scene.task == "causal-lm"
            else f"{rows} examples in each step"
        )
        first, _ = self.batch(spec.training.length)  # of shorter rows, which a limit on memory may have asked for, more would be usual
        if rows < first and spec.budget.minutes:
            return f"{text}; a larger one leaves fewer than {GOOD_STEPS} steps in {clock(spec.budget.minutes * 60)}"
        return text


"""The work of a resolved spec: tokens, floating-point operations and seconds of its passes over data. Torch-free."""

from __future__ import annotations

import dataclasses
import math

from engines import activations
from engines.cost import held_bytes
from engines.method import Footprint, Method
from engines.profile import Batch, ModelProfile, working_dtype
from workbench import crew
from workbench.scene import Machine, Scene
from workbench.sources import longest_row
from workbench.spec import RunSpec

EVALUATION_TOKENS = 8192
EVALUATION_IMAGES = 256

# Share of the measured product rate that whole training steps reach, and what elementwise work and calls add.
EFFICIENCY = 0.55
ELEMENTWISE_PASSES = 4.0
CALL_SECONDS = 0.0009
"""Python and operator calls per block and training step (forward, backward)."""
OPTIMIZER_PASSES = 6.0


def micro_batch(spec: RunSpec, scene: Scene) -> Batch:
    """The micro-batch of the resolved training knobs."""
    t = spec.training
    length = scene.model.context if scene.task == "image-classification" else t.length
    if scene.task == "text-classification" and spec.budget.steps and scene.facts.lengths:
        # Batches are of like lengths: a few steps do not meet the longest one.
        steps = max(1, spec.budget.steps // max(1, sum(m.card.trains for m in spec.pipeline)))
        length = min(length, longest_row(scene.facts, t.batch, spec.seed, steps))
    return Batch(
        rows=max(1, math.ceil(t.batch / (t.accumulation * t.processes))),
        length=length,
        checkpointing=bool(t.checkpointing),
        compute="bfloat16" if t.precision == "bf16" else "float32",
        accumulation=t.accumulation,
        weights=working_dtype(scene.model),
        chunk=t.loss_chunk,
    )


def mean_length(spec: RunSpec, scene: Scene) -> float:
    """Tokens of a usual row: packed rows are full, examples are bucketed by length, images fill their patches."""
    if scene.task == "causal-lm":
        return float(spec.training.length)
    if scene.task == "image-classification" or not scene.facts.lengths:
        return float(scene.model.context)
    lengths = scene.facts.lengths
    return max(1.0, 1.05 * sum(min(n, spec.training.length) for n in lengths) / len(lengths))


def step_formula(
    machine: Machine, profile: ModelProfile, batch: Batch, flops_per_token: float, trainable: float, calls: float = 1.0
) -> float:
    """Seconds of forward and backward of one micro-batch, and of the optimizer on ``trainable`` parameters."""
    compute = flops_per_token * batch.tokens / (machine.flops[batch.compute] * EFFICIENCY)
    moved = ELEMENTWISE_PASSES * activations.train_bytes(profile, batch) + OPTIMIZER_PASSES * 4 * trainable
    found = compute + moved / machine.bandwidth + profile.layers * CALL_SECONDS * calls
    return found * machine.scale.get(batch.compute, 1.0)


class Work:
    """Batches and seconds of one resolved spec on one scene."""

    def __init__(self, spec: RunSpec, scene: Scene):
        self.spec, self.scene, self.machine = spec, scene, scene.machine
        self.processes = spec.training.processes
        if self.processes > 1 and self.machine.device == "cpu":  # they share the cores
            self.machine = dataclasses.replace(
                self.machine,
                flops={kind: rate / self.processes for kind, rate in self.machine.flops.items()},
                bandwidth=self.machine.bandwidth / self.processes,
            )
        self.dtype = working_dtype(scene.model)
        self.batch = micro_batch(spec, scene)
        self.length = mean_length(spec, scene)
        self.training = [i for i, m in enumerate(spec.pipeline) if m.card.trains]

    # -- rates -------------------------------------------------------------------------------------------
    def forward_seconds(self, profile: ModelProfile, tokens: float, calls: int = 1) -> float:
        """Seconds of forward passes over ``tokens`` in ``calls`` batches."""
        flops = (profile.flops_per_token + profile.attention_flops_per_token(int(self.length))) * tokens
        rate = self.machine.flops[self.batch.compute] * EFFICIENCY
        moved = 10.0 * tokens * profile.hidden * max(1, profile.layers) * 4
        found = flops / rate + moved / self.machine.bandwidth + calls * profile.layers * CALL_SECONDS / 3
        return found * self.machine.scale.get(self.batch.compute, 1.0)

    def step_seconds(self, method: Method, footprint: Footprint, profile: ModelProfile) -> float:
        """Seconds of one optimizer step by the formula."""
        t = self.spec.training
        usual = Batch(self.batch.rows, max(1, round(self.length)), False, self.batch.compute, 1, self.batch.weights)
        flops = footprint.flops_per_token or 3 * profile.flops_per_token
        exchange = crew.exchange_seconds(footprint.gradients, self.processes, self.machine.device)
        return exchange + t.accumulation * step_formula(
            self.machine, profile, usual, flops, footprint.trainable / t.accumulation, 1.4 if t.checkpointing else 1.0
        )

    def switch_seconds(self, switch, profile: ModelProfile, footprint: Footprint) -> float:
        """Seconds that a switch of the training loop adds to a step."""
        flops, moved = switch.step_cost(profile, footprint)
        return flops / self.machine.flops["float32"] + moved / self.machine.bandwidth

    def step_flops(self, method: Method, footprint: Footprint, profile: ModelProfile) -> float:
        """Floating-point operations of one optimizer step: products, attention scores, recomputation."""
        t = self.spec.training
        forward = profile.flops_per_token
        each = (footprint.flops_per_token or 3 * forward) * (1 + (1 / 3 if t.checkpointing else 0))
        each += 3 * profile.attention_flops_per_token(int(self.length))
        rows = self.length if self.scene.task != "causal-lm" else t.length
        return each * t.batch * rows

    def evaluation_seconds(self, profile: ModelProfile) -> float:
        """One evaluation of the held-out items."""
        tokens = self.evaluation_items() * self.item_length() / self.processes
        return self.forward_seconds(profile, tokens, math.ceil(tokens / EVALUATION_TOKENS))

    def evaluation_flops(self, profile: ModelProfile) -> float:
        length = self.item_length()
        return (profile.flops_per_token + profile.attention_flops_per_token(int(length))) * self.evaluation_items() * length

    def evaluation_items(self) -> int:
        facts, wanted = self.scene.facts, self.spec.training.items
        available = facts.evaluation
        if self.scene.task == "causal-lm" and facts.evaluation:
            # Long texts are cut into windows of the training length.
            available = max(facts.evaluation, math.ceil(facts.evaluation_tokens / max(8, self.spec.training.length - 1)))
        return min(available, wanted) if wanted else available

    def item_length(self) -> float:
        facts = self.scene.facts
        if self.scene.task == "image-classification":
            return float(self.scene.model.context)
        mean = facts.evaluation_tokens / max(1, facts.evaluation)
        return max(1.0, min(mean, float(self.spec.training.length)))

    def calibration_seconds(self, method: Method, f: Footprint, profile: ModelProfile) -> tuple[float, float]:
        """A training-free stage: its calibration passes, and one read and write of every weight. Seconds, and FLOPs."""
        tokens, work = f.calibration_tokens, 0.0
        seconds = 0.05 + 12 * held_bytes(profile, self.dtype) / self.machine.bandwidth
        if tokens:
            work = max(f.flops_per_token, profile.flops_per_token) * tokens
            seconds += (tokens / 128) * profile.layers * CALL_SECONDS / 3
        extra = getattr(method, "work_flops", None)
        work += extra(profile) if callable(extra) else 0.0
        return seconds + work / (self.machine.flops["float32"] * EFFICIENCY), work

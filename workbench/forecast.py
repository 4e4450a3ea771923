"""What a fully resolved spec costs: memory by phase and part, seconds by phase, size; from shapes, no torch.

Two kinds of figures are mixed and kept apart in ``how``: what follows from shapes alone (parameters, weights, gradients,
optimizer, size on disk) is exact; what depends on the allocator and the processor (activations, seconds) uses constants
that were fitted to measured runs of the bundled models and is corrected by this machine's own measurements.
"""

from __future__ import annotations

import dataclasses
import math

from engines import activations, shapes
from engines.method import Footprint, Method
from engines.profile import BYTES, Batch, ModelProfile, Tensor, working_dtype
from engines.training import distributed
from workbench import crew
from workbench.scene import LEAST_STEPS, Cost, Machine, Phase, Scene, StageCost
from workbench.spec import RunSpec

EVALUATION_TOKENS = 8192
EVALUATION_IMAGES = 256

# Share of the measured product rate that whole training steps reach, and what elementwise work and calls add.
EFFICIENCY = 0.55
ELEMENTWISE_PASSES = 4.0
CALL_SECONDS = 0.0009
"""Python and operator calls per block and training step (forward, backward)."""
OPTIMIZER_PASSES = 6.0
CHARACTERS_PER_SECOND = 6e6
"""Tokenizing on one core."""
DISK_BYTES_PER_SECOND = 400e6
FRAGMENTS = 1.4
"""Resident bytes for each byte of live activations on a CPU: the C allocator's holes between blocks of unlike sizes."""
FRAGMENTS_VARIED = 2.0
"""The same where micro-batches have all lengths: what one freed seldom fits the next."""
RECOMPUTED = 2.2
"""The same under checkpointing, where a block's activations and the gradients inside it exist together."""
KEPT_EVALUATION, KEPT_STAGE = 0.4, 0.9
"""Shares of an evaluation's and of a stage's temporary memory that the C allocator keeps afterwards."""
SPEED_SECONDS = 1.0
"""The latency measurement at the end."""
TOKENIZER_BYTES_PER_TOKEN = 60
"""Ids, offsets and masks that the tokenizer holds for a text while it is being encoded."""


def micro_batch(spec: RunSpec, scene: Scene) -> Batch:
    """The micro-batch of the resolved training knobs."""
    t = spec.training
    length = scene.model.context if scene.task == "image-classification" else t.length
    if scene.task == "text-classification" and spec.budget.steps and scene.facts.lengths:
        # Batches are of like lengths: a few steps do not meet the longest one.
        length = min(length, 8 + scene.facts.length_at(1 - 1 / (spec.budget.steps + 1)))
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


def weight_bytes(profile: ModelProfile, dtype: str) -> int:
    """Bytes of the weights as the engines hold them: floating-point tensors in the working type."""
    return sum(
        t.size * (BYTES.get(dtype, 4) if t.dtype in ("float32", "bfloat16", "float16", "float64") else BYTES.get(t.dtype, 4))
        for t in profile.tensors
    )


def after(method: Method, profile: ModelProfile) -> ModelProfile:
    """The profile of the model that a stage leaves; shapes change only where the method says so."""
    change = getattr(method, "result_profile", None)
    return change(profile) if callable(change) else profile


def stored_tensors(profile: ModelProfile, dtype: str) -> tuple[Tensor, ...]:
    """The tensors of the saved file when nothing is packed."""
    return tuple(
        Tensor(t.name, t.shape, dtype if t.dtype in ("float32", "bfloat16", "float16") else t.dtype) for t in profile.tensors
    )


def step_formula(
    machine: Machine, profile: ModelProfile, batch: Batch, flops_per_token: float, trainable: float, calls: float = 1.0
) -> float:
    """Seconds of forward and backward of one micro-batch, and of the optimizer on ``trainable`` parameters."""
    compute = flops_per_token * batch.tokens / (machine.flops[batch.compute] * EFFICIENCY)
    moved = ELEMENTWISE_PASSES * activations.train_bytes(profile, batch) + OPTIMIZER_PASSES * 4 * trainable
    found = compute + moved / machine.bandwidth + profile.layers * CALL_SECONDS * calls
    return found * machine.scale.get(batch.compute, 1.0)


class Costing:
    """Adds up one resolved spec; ``run`` is the only entry."""

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

    def step_seconds(self, method: Method, footprint: Footprint, profile: ModelProfile) -> tuple[float, str]:
        """Seconds of one optimizer step and how they are known."""
        t = self.spec.training
        known = self.scene.speed.get("units_per_second")
        if known:
            return self.units_of(1) / known, self.scene.speed.get("how", "measured in an earlier run")
        usual = Batch(self.batch.rows, max(1, round(self.length)), False, self.batch.compute, 1, self.batch.weights)
        flops = footprint.flops_per_token or 3 * profile.flops_per_token
        exchange = crew.exchange_seconds(footprint.gradients, self.processes, self.machine.device)
        return exchange + t.accumulation * step_formula(
            self.machine, profile, usual, flops, footprint.trainable / t.accumulation, 1.4 if t.checkpointing else 1.0
        ), self.machine.how

    def evaluation_seconds(self, profile: ModelProfile) -> float:
        """One evaluation of the held-out items."""
        items = self.evaluation_items()
        tokens = items * self.item_length() / self.processes
        batches = math.ceil(tokens / EVALUATION_TOKENS)
        return self.forward_seconds(profile, tokens, batches)

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

    # -- memory ------------------------------------------------------------------------------------------
    def base(self, profile: ModelProfile) -> dict[str, int]:
        return {"context": self.machine.context, "weights": weight_bytes(profile, self.dtype)}

    def data_bytes(self) -> int:
        """Rows and token ids that stay in memory while the run is on."""
        facts = self.scene.facts
        if self.scene.task == "image-classification":
            return 0 if self.machine.device == "cuda" else facts.train * self.image_bytes()
        return facts.characters + 4 * facts.tokens

    def image_bytes(self) -> int:
        config = self.scene.model.config
        size = config.get("image_size") or 224
        height, width = (size, size) if isinstance(size, int) else size
        return 4 * int(config.get("num_channels", 3)) * height * width

    def evaluation_need(self, profile: ModelProfile) -> dict[str, int]:
        """Activations and logits of the widest evaluation batch."""
        length = (
            max(1, min(round(self.scene.facts.length_at(0.99) or self.item_length()), self.spec.training.length))
            if self.scene.task != "image-classification"
            else profile.context
        )
        rows = EVALUATION_IMAGES if self.scene.task == "image-classification" else max(1, EVALUATION_TOKENS // length)
        rows = min(rows, max(1, self.evaluation_items()))
        found = {
            "activations": activations.forward_bytes(profile, Batch(rows, length, False, self.batch.compute, 1, self.dtype)),
            "logits": 0,
        }
        if self.scene.task == "causal-lm":
            found["logits"] = min(rows * length, self.batch.chunk) * profile.vocab * (4 + 4 + BYTES[self.batch.compute])
        self.evaluated = rows * length
        return found

    def packed_work(self, method: Method, profile: ModelProfile) -> int:
        """Temporary bytes of the integer kernels at the evaluation's batch: int8 parts of activations and int32 results."""
        if not method.card.packs or self.machine.device == "cuda":
            return 0
        layers = 0
        if method.card.id == "int8" or getattr(method, "bits", 0) == 8:
            layers = max((22 * m.inp + 16 * m.out for m in profile.matrices), default=0) * self.evaluated
        table = getattr(method, "embedding", "keep") == "int8" and self.scene.task == "causal-lm"
        return max(layers, 20 * profile.vocab * min(self.evaluated, self.batch.chunk) if table else 0)

    # -- the sum -----------------------------------------------------------------------------------------
    def run(self) -> Cost:
        spec, scene, machine = self.spec, self.scene, self.machine
        profile = scene.model
        phases: list[Phase] = []
        load = self.base(profile)
        stored = scene.stored.stored_bytes if scene.stored.has_weights else 0
        # The file is mapped while it is read, the tokenizer's records live while texts are encoded: not at the same time.
        load["extra"] = self.data_bytes() + max(
            stored, TOKENIZER_BYTES_PER_TOKEN * (scene.facts.tokens if scene.facts.characters else 0)
        )
        characters = scene.facts.characters * (1 + scene.facts.evaluation_tokens / max(1, scene.facts.tokens))
        phases.append(
            Phase("load", machine.load_seconds + stored / DISK_BYTES_PER_SECOND + characters / CHARACTERS_PER_SECOND, load)
        )
        need = self.evaluation_need(profile)
        needed = sum(need.values())
        # What the C allocator does not give back; a caching GPU allocator's figure is that of live tensors.
        roomy = machine.device != "cuda"
        held = round(KEPT_EVALUATION * needed) if roomy else 0
        tokenized = round(KEPT_STAGE * TOKENIZER_BYTES_PER_TOKEN * scene.facts.tokens) if roomy and scene.facts.characters else 0
        stages: list[StageCost] = []
        work, packed, adapter = 0, None, 0
        for i, method in enumerate(spec.pipeline):
            footprint = method.footprint(profile, self.batch)
            following = after(method, profile)
            before = stages[-1].after if stages else self.file_bytes(profile)
            stage = StageCost(method, footprint, 0.0, 0, 0, before, self.result_bytes(method, footprint, following), following)
            if method.card.trains:
                each, stage.how = self.step_seconds(method, footprint, profile)
                stage.steps, stage.speed = self.steps_each(), self.units_of(1) / each
                stage.seconds = each * (stage.steps or 0)
                adapter = max(adapter, footprint.adapter)
            else:
                stage.seconds = self.calibration_seconds(method, footprint, profile)
            stages.append(stage)
            parts = self.stage_parts(method, footprint, profile)
            temporary = sum(parts[p] for p in ("gradients", "optimizer", "activations", "logits")) + footprint.extra
            # Small pieces that the tokenizer left are used again, by this stage's own needs first.
            parts["extra"] += max(held, tokenized - temporary) if roomy else 0
            phases.append(Phase(f"{i + 1} {method.card.id}", stage.seconds, parts))
            if roomy:
                held = max(held, round(KEPT_STAGE * temporary), tokenized)
            profile = following
            if method.card.packs:
                packed, work = method, self.packed_work(method, profile)
        # The model as it came, after each training-free stage, during and at the end of each training stage,
        # and the saved result.
        times = 2 + len(spec.pipeline) - len(self.training) + spec.training.evaluations * len(self.training)
        evaluate = dict(self.base(scene.model), **need, adapter=adapter)
        evaluate["extra"] = (
            self.data_bytes() + work + max(held - needed, tokenized - needed, round(KEPT_EVALUATION * needed) if roomy else 0)
        )
        phases.append(Phase("evaluate", times * self.evaluation_seconds(scene.model), evaluate, times))
        size = stages[-1].after if stages else self.file_bytes(profile)
        save = self.base(profile)
        if packed is not None:
            save["weights"] = min(save["weights"], size)
        phases.append(Phase("save", 0.3 + size / DISK_BYTES_PER_SECOND, dict(save, extra=size + self.data_bytes() + held)))
        phases.append(Phase("speed", SPEED_SECONDS, dict(save, extra=self.data_bytes() + held)))
        least = self.share_minutes(stages, phases)
        trainable = max((s.footprint.trainable for s in stages), default=0)
        return Cost(
            phases,
            stages,
            sum(s.steps for s in stages),
            sum(s.units for s in stages),
            least,
            size,
            self.file_bytes(scene.model),
            8.0 * size / max(1, scene.model.parameters),
            self.final_sparsity(stages),
            trainable,
            next((s.how for s in stages if s.how), machine.how),
        )

    def final_sparsity(self, stages: list[StageCost]) -> float:
        """Share of zeros among the weights inside blocks of the result; later stages keep earlier masks."""
        found = 0.0
        for stage in stages:
            if getattr(stage.method, "from_scratch", False) is True or getattr(stage.method, "keep_mask", True) is False:
                found = 0.0
            found = max(found, stage.footprint.sparsity)
        return found

    def stored_dtype(self) -> str:
        kind = self.scene.stored.dtype
        return kind if kind in ("float32", "bfloat16", "float16") else "float32"

    def file_bytes(self, profile: ModelProfile) -> int:
        return shapes.file_bytes(stored_tensors(profile, self.stored_dtype()))

    def result_bytes(self, method: Method, footprint: Footprint, following: ModelProfile) -> int:
        """Exact bytes of model.safetensors if the run were saved after this stage."""
        return footprint.result if method.card.packs else self.file_bytes(following)

    def units_of(self, steps: int) -> float:
        """Tokens (causal-lm) or examples of ``steps`` optimizer steps."""
        t = self.spec.training
        return steps * t.batch * (t.length if self.scene.task == "causal-lm" else 1)

    def steps_each(self) -> int | None:
        """Optimizer steps of each training stage when the limit is in steps or tokens; None under minutes alone."""
        budget, count = self.spec.budget, len(self.training)
        if not count:
            return 0
        if budget.steps:
            return max(1, budget.steps // count)
        if budget.tokens:
            return max(1, math.ceil(budget.tokens / count / max(1.0, self.units_of(1))))
        return None

    def share_minutes(self, stages: list[StageCost], phases: list[Phase]) -> float:
        """Give training stages their steps and seconds under a limit in minutes; the seconds that the run needs at least."""
        fixed = sum(p.seconds for p in phases) - sum(s.seconds for s in stages if s.method.card.trains)
        training = [s for s in stages if s.method.card.trains]
        each = {id(s): self.units_of(1) / s.speed for s in training if s.speed}
        least = fixed + sum(LEAST_STEPS * each[id(s)] for s in training)
        minutes = self.spec.budget.minutes
        if minutes and training:
            share = max(0.0, minutes * 60 - fixed) / len(training)
            for s in training:
                possible = max(LEAST_STEPS, int(share / each[id(s)]))
                s.steps = possible if s.steps is None else min(s.steps, possible)
        for s, phase in ((s, p) for s in training for p in phases if p.name == f"{stages.index(s) + 1} {s.method.card.id}"):
            s.steps = s.steps or 0
            s.units = round(self.units_of(s.steps))
            s.seconds = phase.seconds = s.steps * each[id(s)]
        return min(least, sum(p.seconds for p in phases))

    def looseness(self, method: Method) -> float:
        """Resident bytes for each byte of activations of a stage."""
        if self.machine.device == "cuda":
            return 1.0
        if not method.card.trains:
            return FRAGMENTS
        varied = FRAGMENTS_VARIED if self.scene.task == "text-classification" else FRAGMENTS
        return max(varied, RECOMPUTED) if self.spec.training.checkpointing else varied

    def stage_parts(self, method: Method, f: Footprint, profile: ModelProfile) -> dict[str, int]:
        parts = self.base(profile)
        loose = self.looseness(method)
        parts.update(
            weights=f.weights or parts["weights"],
            adapter=f.adapter,
            gradients=f.gradients + (min(f.gradients, distributed.BUCKET) if self.processes > 1 else 0),
            optimizer=f.optimizer,
            activations=round(loose * f.activations),
            logits=round(loose * f.logits),
            extra=f.extra + self.data_bytes(),
        )
        return parts

    def calibration_seconds(self, method: Method, f: Footprint, profile: ModelProfile) -> float:
        """A training-free stage: its calibration passes, and one read and write of every weight."""
        tokens = f.calibration_tokens
        seconds = 0.05 + 12 * weight_bytes(profile, self.dtype) / self.machine.bandwidth
        if tokens:
            flops = max(f.flops_per_token, profile.flops_per_token) * tokens
            seconds += flops / (self.machine.flops["float32"] * EFFICIENCY) + (tokens / 128) * profile.layers * CALL_SECONDS / 3
        extra = getattr(method, "work_flops", None)
        if callable(extra):
            seconds += extra(profile) / (self.machine.flops["float32"] * EFFICIENCY)
        return seconds


def cost(spec: RunSpec, scene: Scene) -> Cost:
    """Everything that ``spec`` costs; no field of it may be ``auto`` any more.

    Raises:
        InputError: a method cannot be done on this model.
    """
    return Costing(spec, scene).run()

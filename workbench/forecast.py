"""What a fully resolved spec costs: memory by phase and part, seconds by phase, size; from shapes, no torch.

Two kinds of figures are mixed and kept apart in ``how``: what follows from shapes alone (parameters, weights, gradients,
optimizer, size on disk) is exact; what depends on the allocator and the processor (activations, seconds) uses constants
that were fitted to measured runs of the bundled models and is corrected by this machine's own measurements.
"""

from __future__ import annotations

import functools
import math

from engines import cost as cost_parts
from engines import shapes
from engines.method import Footprint, Method
from engines.profile import BYTES, Batch, ModelProfile, Tensor
from engines.training import distributed
from workbench import minutes, resident
from workbench.resident import KEPT, TOKENIZER_BYTES_PER_TOKEN, UNFIT
from workbench.scene import LEAST_STEPS, Cost, Held, Phase, Scene, StageCost
from workbench.spec import RunSpec
from workbench.work import EFFICIENCY, EVALUATION_IMAGES, EVALUATION_TOKENS, Work

CHARACTERS_PER_SECOND = 6e6
"""Tokenizing on one core."""
DISK_BYTES_PER_SECOND = 400e6
SPEED_SECONDS = 1.0
"""The latency measurement at the end."""
DECODED, DECODED_SECONDS = 64, 0.6
"""Tokens of prompt and answer when the result's decoding is timed, and the seconds that this takes (``engines.speed``)."""


def weight_bytes(profile: ModelProfile, dtype: str) -> int:
    """Bytes of the weights as the engines hold them: floating-point tensors in the working type."""
    return cost_parts.held_bytes(profile, dtype)


@functools.lru_cache(maxsize=512)
def _after(method: Method, profile: Held) -> ModelProfile:
    change = getattr(method, "result_profile", None)
    return change(profile.value) if callable(change) else profile.value


@functools.lru_cache(maxsize=2048)
def _footprint(method: Method, profile: Held, batch: Batch) -> Footprint:
    return method.footprint(profile.value, batch)


def after(method: Method, profile: ModelProfile) -> ModelProfile:
    """The profile of the model that a stage leaves; shapes change only where the method says so."""
    return _after(method, Held(profile))


def footprint(method: Method, profile: ModelProfile, batch: Batch) -> Footprint:
    """What a stage costs. Rows, accumulation and checkpointing are nothing to a stage that does not train."""
    if not method.card.trains:
        batch = Batch(length=batch.length, compute=batch.compute, weights=batch.weights)
    return _footprint(method, Held(profile), batch)


def stored_tensors(profile: ModelProfile, dtype: str) -> tuple[Tensor, ...]:
    """The tensors of the saved file when nothing is packed."""
    return tuple(
        Tensor(t.name, t.shape, dtype if t.dtype in ("float32", "bfloat16", "float16") else t.dtype) for t in profile.tensors
    )


class Costing(Work):
    """Adds up one resolved spec; ``run`` is the only entry."""

    # -- memory ------------------------------------------------------------------------------------------
    def base(self, profile: ModelProfile, trained: bool | None = True) -> dict[str, int]:
        """Process and weights; ``trained``: None before anything was computed, False before anything was trained."""
        here = self.machine
        idle = here.imported if trained is None else here.context if trained else here.inference
        return {"context": idle or here.context, "weights": weight_bytes(profile, self.dtype)}

    def kv_per_token(self, profile: ModelProfile) -> int:
        """Bytes of keys and values of all layers for one token of context."""
        if self.scene.task != "causal-lm":
            return 0
        return 2 * profile.layers * profile.kv_heads * profile.head_dim * BYTES[self.dtype]

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

    def evaluation_batch(self, profile: ModelProfile) -> Batch:
        """The widest evaluation batch."""
        image = self.scene.task == "image-classification"
        length = profile.context if image else round(self.scene.facts.length_at(0.99) or self.item_length())
        length = length if image else max(1, min(length, self.spec.training.length))
        rows = EVALUATION_IMAGES if image else max(1, EVALUATION_TOKENS // length)
        return Batch(min(rows, max(1, self.evaluation_items())), length, False, self.batch.compute, 1, self.dtype, self.batch.chunk)

    # -- the sum -----------------------------------------------------------------------------------------
    def run(self) -> Cost:
        spec, scene, machine = self.spec, self.scene, self.machine
        profile, device = scene.model, machine.device
        stored = scene.stored.stored_bytes if scene.stored.has_weights else 0
        texts = TOKENIZER_BYTES_PER_TOKEN * scene.facts.tokens if scene.facts.characters else 0
        # The file is mapped while it is read, the tokenizer's records live while texts are encoded: not at the same time.
        load = dict(self.base(profile, None), extra=self.data_bytes() + max(stored, texts))
        characters = scene.facts.characters * (1 + scene.facts.evaluation_tokens / max(1, scene.facts.tokens))
        phases = [Phase("load", machine.load_seconds + stored / DISK_BYTES_PER_SECOND + characters / CHARACTERS_PER_SECOND, load)]
        widest = self.evaluation_batch(profile)
        need = resident.evaluation(profile, widest, device, scene.task)
        kept = resident.Kept(device != "cuda", round(KEPT * texts))
        kept.after(need.small, KEPT)
        stages: list[StageCost] = []
        packed, adapter, optimizer, trained = None, 0, 0, False
        for i, method in enumerate(spec.pipeline):
            trained = trained or method.card.trains
            stage, phase, small = self.stage(i, method, profile, stages[-1].after if stages else self.file_bytes(profile), trained)
            left = max(round(UNFIT * kept.held), kept.tokenized - small) if method.card.trains else kept.beside(small)
            phase.parts["extra"] += left if kept.roomy else 0
            kept.after(small, KEPT)
            stages.append(stage)
            phases.append(phase)
            if method.card.trains:
                adapter, optimizer = max(adapter, stage.footprint.adapter), max(optimizer, stage.footprint.optimizer)
            profile, packed = stage.profile, method if method.card.packs else packed
        # The model as it came, after each training-free stage, during and at the end of each training stage (whose optimizer
        # is still there), and the saved result.
        times = 2 + len(spec.pipeline) - len(self.training) + spec.training.evaluations * len(self.training)
        evaluate = dict(self.base(scene.model, trained), activations=need.activations, logits=need.logits, adapter=adapter, optimizer=optimizer)
        # The first evaluation has the heap to itself; each one after it finds what the one before left.
        again = round(resident.UNFIT * resident.KEPT * need.small) if kept.roomy else 0
        size = stages[-1].after if stages else self.file_bytes(profile)
        spare = max(kept.beside(need.small), again if packed is None or len(stages) > 1 else 0)
        if packed is not None:
            integer = resident.evaluation(profile, widest, device, scene.task, packed)
            less = max(0, evaluate["weights"] - size) + adapter + optimizer
            spare = max(spare, integer.total - need.total + max(kept.beside(integer.small), again) - less)
        evaluate["extra"] = self.data_bytes() + spare
        seconds = times * self.evaluation_seconds(scene.model)
        phases.append(Phase("evaluate", seconds, evaluate, times, times * self.evaluation_flops(scene.model)))
        save = self.base(profile, trained)
        if packed is not None:
            save["weights"] = min(save["weights"], size)
        held, per_token = kept.held if kept.roomy else 0, self.kv_per_token(profile)
        phases.append(Phase("save", 0.3 + size / DISK_BYTES_PER_SECOND, dict(save, extra=size + self.data_bytes() + held)))
        decoding = dict(save, kv=per_token * min(DECODED, scene.model.context), extra=self.data_bytes() + held)
        phases.append(Phase("speed", SPEED_SECONDS, decoding))
        self.correct(phases, stages)
        least = self.share_minutes(stages, phases)
        found = Cost(
            phases,
            stages,
            sum(s.steps for s in stages),
            sum(s.units for s in stages),
            least,
            size,
            self.file_bytes(scene.model),
            8.0 * size / max(1, scene.model.parameters),
            self.final_sparsity(stages),
            max((s.footprint.trainable for s in stages), default=0),
            next((s.how for s in stages if s.how), machine.how),
            per_token,
        )
        if scene.correction is not None:
            found.joules, found.joules_how = scene.correction.joules(spec, found.seconds)
        return found

    def stage(self, i: int, method: Method, profile: ModelProfile, before: int, trained: bool) -> tuple[StageCost, Phase, int]:
        """One stage: its cost, its bar, and the bytes of its small temporary blocks."""
        found, following = footprint(method, profile, self.batch), after(method, profile)
        stage = StageCost(method, found, 0.0, 0, 0, before, self.result_bytes(method, found, following), following)
        trains, switched = method.card.trains, 0
        if trains:
            switches = self.spec.training.switches
            switched = sum(s.extra_bytes(profile, found) for s in switches)
            stage.each = self.step_seconds(method, found, profile) + sum(self.switch_seconds(s, profile, found) for s in switches)
            known = self.scene.speed.get("units_per_second")
            stage.speed = known or self.units_of(1) / stage.each
            stage.how = self.scene.speed.get("how", "measured in an earlier run") if known else self.machine.how
            stage.steps = self.steps_each()
            stage.seconds = (stage.steps or 0) * self.units_of(1) / stage.speed
            stage.step_flops, stage.start_flops = self.step_flops(method, found, profile), method.start_flops(profile, self.batch)
            stage.start = stage.start_flops / (self.machine.flops[self.batch.compute] * EFFICIENCY)
            stage.seconds += stage.start
            stage.entering, stage.batch, work = profile, self.batch, 0.0
        else:
            stage.seconds, work = self.calibration_seconds(method, found, profile)
        loose = resident.looseness(self.scene.task, self.machine.device, trains, self.batch.checkpointing)
        need = resident.training(profile, self.batch, found.activations, found.logits, loose, self.machine.device, trains)
        parts = self.base(profile, trained)
        parts.update(
            weights=found.weights or parts["weights"],
            adapter=found.adapter,
            gradients=found.gradients + (min(found.gradients, distributed.BUCKET) if self.processes > 1 else 0),
            optimizer=found.optimizer,
            activations=need.activations,
            logits=need.logits,
            extra=found.extra + self.data_bytes() + switched,
        )
        small = need.small + parts["gradients"] + parts["optimizer"] + found.extra
        return stage, Phase(f"{i + 1} {method.card.id}", stage.seconds, parts, 1, work), small

    def correct(self, phases: list[Phase], stages: list[StageCost]) -> None:
        """What earlier runs on this machine say of forecasts like this one."""
        known = self.scene.correction
        for phase in phases:
            stage = stages[int(phase.name.split(" ")[0]) - 1] if phase.name[0].isdigit() else None
            memory, offset, seconds = known.factors(self.spec, phase.kind) if known is not None else (1.0, 0.0, 1.0)
            measured = stage is not None and stage.method.card.trains and self.scene.speed.get("units_per_second")
            phase.correct(memory, offset, 1.0 if measured else seconds)
            if stage is not None:
                stage.seconds = phase.seconds
                stage.start *= 1.0 if measured else seconds
                if not measured and stage.speed:
                    stage.speed /= seconds
                    if known is not None and abs(math.log(seconds)) > 0.01:
                        stage.how = f"{stage.how}, corrected by {known.runs} earlier runs"

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
        key = ("file", self.stored_dtype())
        if key not in profile.memo:
            profile.memo[key] = shapes.file_bytes(stored_tensors(profile, self.stored_dtype()))
        return profile.memo[key]

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
        fixed += sum(s.start for s in training)
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
            s.seconds = phase.seconds = s.start + s.steps * each[id(s)]
            phase.flops, phase.raw = s.start_flops + s.steps * s.step_flops, (phase.raw[0], s.start + s.steps * s.each)
        return min(least, sum(p.seconds for p in phases))


def cost(spec: RunSpec, scene: Scene) -> Cost:
    """Everything that ``spec`` costs; no field of it may be ``auto`` any more.

    Raises:
        InputError: a method cannot be done on this model.
    """
    return minutes.hold(spec, scene, Costing(spec, scene).run())

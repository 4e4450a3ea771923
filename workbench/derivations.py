"""How each headline figure of a forecast comes about, in a sentence with its numbers."""

from __future__ import annotations

from engines.profile import BYTES, working_dtype
from workbench.remedies import clock
from workbench.scene import EXACT, Cost, Phase, Scene
from workbench.spec import RunSpec

NAMES = {"context": "process and libraries", "weights": "weights", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer",
         "activations": "activations", "logits": "logits", "kv": "KV cache", "extra": "work space"}


def size(count: float) -> str:
    """``318 B``, ``4.2 kB``, ``21.3 MB``, ``1.27 GB``."""
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if abs(count) >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} B"


def operations(count: float) -> str:
    """``3.1 GFLOP``, ``1.27 TFLOP``."""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} FLOP"


def derive(spec: RunSpec, scene: Scene, found: Cost, meter: str, told: dict) -> dict[str, str]:
    """Sentences by figure: memory.peak, seconds, trainable, size, flops, joules, kv."""
    return {
        "memory.peak": _memory(spec, scene, found, told),
        "seconds": _seconds(spec, scene, found),
        "trainable": _trainable(scene, found),
        "size": _size(scene, found),
        "flops": _flops(spec, scene, found),
        "joules": _joules(found, meter),
        "kv": _kv(scene, found),
    }


def _stage_of(found: Cost, phase: Phase):
    head = phase.name.split(" ")[0]
    return found.stages[int(head) - 1] if head.isdigit() else None


def _memory(spec: RunSpec, scene: Scene, found: Cost, told: dict) -> str:
    phase, model, t = found.peak, scene.model, spec.training
    stage, dtype = _stage_of(found, phase), working_dtype(scene.model)
    trained = max((s.footprint.trainable for s in found.stages), default=0)
    rows = -(-t.batch // (t.accumulation * t.processes))
    length = model.context if scene.task == "image-classification" else t.length
    notes = {
        "context": "as measured on this machine",
        "weights": f"{model.parameters:,} parameters in {dtype}, {BYTES[dtype]} bytes each",
        "gradients": f"{trained:,} trainable × 4 bytes",
        "optimizer": f"{trained:,} × two moments × 4 bytes",
        "activations": f"{rows} rows × {length} positions through {model.layers} blocks"
        + (", checkpointed" if t.checkpointing else "") if stage is not None and stage.method.card.trains else "the widest batch of a forward pass",
        "logits": f"{min(t.loss_chunk, rows * length):,} positions × {model.vocab:,} entries at a time" if scene.task == "causal-lm" else "one row of labels an item",
        "extra": "data and tokens, the method's own, and on a CPU what the C library keeps of earlier phases",
    }
    parts = [f"{NAMES[name]} {size(count)}" + (f" ({notes[name]})" if name in notes else "")
             for name, count in sorted(phase.parts.items(), key=lambda x: -x[1]) if count and (count >= 0.001 * phase.total or name in EXACT)]
    text = f"{size(phase.total)} in phase {phase.name}: " + " + ".join(parts)
    if told["runs"] and abs(told["factor"] - 1) >= 0.005:
        text += f". Before the correction by {told['runs']} earlier runs: {size(phase.total / told['factor'])}"
    return text + "."


def _seconds(spec: RunSpec, scene: Scene, found: Cost) -> str:
    parts = []
    for phase in found.phases:
        stage = _stage_of(found, phase)
        if stage is not None and stage.steps:
            each = stage.seconds / stage.steps
            parts.append(f"{phase.name} {stage.steps:,} steps × {each:.3f} s")
        elif phase.times > 1:
            parts.append(f"{phase.times} evaluations × {phase.seconds / phase.times:.2f} s")
        else:
            parts.append(f"{phase.name} {phase.seconds:.1f} s")
    limit = f"; training fills what the limit of {clock(60 * spec.budget.minutes)} leaves" if spec.budget.minutes and found.steps else ""
    return f"{clock(found.seconds)} = " + " + ".join(parts) + f" ({found.how}){limit}."


def _trainable(scene: Scene, found: Cost) -> str:
    rows = [f"{s.method.card.name}: {s.footprint.trainable:,}" for s in found.stages if s.method.card.trains]
    if not rows:
        return "0: no stage trains."
    return f"Exact: the shapes of what each stage trains, added up ({'; '.join(rows)}) of {scene.model.parameters:,} parameters; the largest counts."


def _size(scene: Scene, found: Cost) -> str:
    last = found.stages[-1] if found.stages else None
    profile = last.profile if last else scene.model
    how = f"packed by {last.method.card.name}" if last and last.method.card.packs else f"stored as {scene.stored.dtype}"
    return (f"Exact: {found.size:,} bytes of model.safetensors = the header with {len(profile.tensors)} names and shapes "
            f"+ {profile.parameters:,} values, {how}; {found.bits_per_weight:.2f} bits a parameter.")


def _flops(spec: RunSpec, scene: Scene, found: Cost) -> str:
    parts = [f"{p.name} {operations(p.flops)}" for p in found.phases if p.flops]
    trained = [s for s in found.stages if s.steps]
    text = f"{operations(found.flops)} = " + (" + ".join(parts) or "no products")
    if trained:
        s = trained[-1]
        text += (f". A step of {s.method.card.name} is {operations(s.step_flops)}: {s.footprint.flops_per_token / 1e6:.3g} MFLOP a position forward and "
                 f"backward, attention scores, {spec.training.batch} rows")
    return text + "."


def _joules(found: Cost, meter: str) -> str:
    if found.joules is None:
        return meter[:1].upper() + meter[1:] + ("" if meter.startswith("no ") else ": no run has been metered here yet") + "."
    return f"{found.joules:,.0f} J = {found.joules_how}."


def _kv(scene: Scene, found: Cost) -> str:
    if not found.kv_per_token:
        return "None: this task does not decode."
    m, kind = scene.model, working_dtype(scene.model)
    return (f"{size(found.kv_per_token * m.context)} for the whole context = {m.context:,} tokens × 2 (keys, values) × {m.layers} layers × "
            f"{m.kv_heads} heads × {m.head_dim} × {BYTES[kind]} bytes ({kind}), one sequence.")

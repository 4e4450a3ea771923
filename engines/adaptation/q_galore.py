"""Q-GaLore: GaLore with 8-bit weights that are never kept in another form, 4-bit projections and lazily renewed subspaces."""

from __future__ import annotations

import math

from engines import cost
from engines.adaptation import _peft
from engines.adaptation._projected import ProjectedMethod
from engines.claim import LARGER, Claim
from engines.errors import RunFailed
from engines.method import Card, Footprint, hyper, register
from engines.profile import BYTES

GROUP = 256
LEAST = 4096
"""``engines.optimizers.eight_bit``: smaller states stay float32."""


@register
class QGaLore(ProjectedMethod):
    """Weights of the projected matrices are integers of 8 bits; updates are added and rounded stochastically.

    Source: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients.
    """

    card = Card(
        id="q-galore", name="Q-GaLore", family="adaptation",
        title="Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", year=2024,
        summary="GaLore with 8-bit weights and moments and 4-bit projections: no copy of the weights in higher precision exists.",
        needs=("training data", "a little patience: weights are unpacked in each pass and rounded again in each step"),
        cannot=("no separate adapter file: whole weights move", "does not start exactly where the model was: its weights are rounded to 8 bits",
                "embeddings, norms and output layer stay in floating point", "cannot run in several processes"),
        trains=True,
        differs="Subspaces are renewed by shares of the stage's budget, and the absolute cosine is compared, because a singular vector has no sign of "
                "its own. Ranges of a group always contain zero (the released formula saturates where they do not), and 4-bit values are packed two "
                "to a byte. Gradients are projected in the backward pass and kept projected until the step, so that accumulation and clipping "
                "work. The integers are plain rounded weights in groups of 256; the result is saved dequantized.")

    claims = (
        Claim("on-par-with-galore", "Pre-training and fine-tuning at GaLore's quality with far less memory (LLaMA 60 M on C4: perplexity 34.88 for GaLore, "
              "34.88 for Q-GaLore).", ours={"method": "q-galore", "rank": 64}, against={"method": "galore", "rank": 64}, expect="not worse",
              differs="fine-tuning of a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("optimizer-below-galore", "Moments of 8 bits and projections of 4 bits take about a quarter of float32 ones.",
              ours={"method": "q-galore", "rank": 64}, against={"method": "galore", "rank": 64}, measure="optimizer", expect="at most", factor=0.35,
              differs="a model of 5.3 M parameters, whose embeddings are a larger share"),
        Claim("memory-below-lora", "Fine-tuning takes up to 50 % less memory than LoRA and GaLore (LLaMA-3 8B, Gemma 7B, Mistral 7B, weights of 8 bits "
              "against 16).", ours={"method": "q-galore", "rank": 16}, against={"method": "lora", "rank": 16}, measure="memory", expect="at most",
              factor=1.0, batch=2, shape=LARGER,
              differs="embeddings, which are trained in float32, are a third of these 20.5 M parameters with random weights; LoRA does not train them; "
                      "the peak counts what is above the loaded model"),
    )

    rank: int = hyper(16, "Rank of the subspace; the paper takes a quarter of the width in pre-training", low=1, high=4096, log=True)
    scale: float = hyper(4.0, "Factor on the update of projected matrices: 4 as in GaLore's fine-tuning, where the rate is that of Adam; 0.25 in "
                              "pre-training, with a rate ten times as large", low=0.001, high=256.0, log=True)
    refreshes: int = hyper(10, "How often each subspace would be computed in the stage if it never became stable (the paper: every 200 steps)", low=1,
                           high=10000, log=True)
    threshold: float = hyper(0.4, "Mean cosine of the last first vectors from which a subspace is stable and its gap grows", low=0.0, high=1.0,
                             advanced=True)
    queue: int = hyper(5, "First vectors whose cosines are averaged", low=1, high=100, advanced=True)
    growth: float = hyper(2.0, "Factor on the gap between renewals of a stable subspace; 1 renews all alike", low=1.0, high=16.0, advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP.replace("adapted", "projected and held in 8 bits"))

    identity = False

    # -- from shapes -------------------------------------------------------------------------------------
    def footprint(self, profile, batch) -> Footprint:
        found, outside, low, _ = self.numbers(profile)
        size, widest = BYTES.get(batch.weights, 4), max(found, key=lambda m: m.size)
        names, c = {f"{m.name}.weight" for m in found}, 2 if batch.compute == "bfloat16" else 4
        parts = cost.with_training(profile, batch, trainable=profile.parameters, frozen=False, backward=2.0, size=size)
        inside = sum(m.size for m in found)
        parts["weights"] -= size * inside - sum(m.size + 5 * _ceil(m.size, GROUP) for m in found)
        parts["gradients"] = size * outside + 4 * low + c * widest.size
        moments = sum(_moments(self.rank * max(m.out, m.inp)) for m in found) + sum(_moments(t.size) for t in profile.tensors if t.name not in names)
        entries = [self.rank * min(m.out, m.inp) for m in found]
        projections = sum((n + 1) // 2 + 5 * _ceil(n, GROUP) for n in entries) + sum(4 * min(m.out, m.inp) for m in found)
        parts["optimizer"] = moments + projections
        # Or the update of the widest matrix and its new weight, both float32; what is not projected is moved in pieces.
        parts["extra"] = max(self.work(widest), 8 * widest.size)
        self.together(parts, profile, batch, kept=0)
        return Footprint(**parts)

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.layers.int8_trained import TrainedInt8Linear
        from engines.shortage import give_back
        model.requires_grad_(True)
        for m, module in self.chosen(model):
            mask = context.masks.get(f"{m.name}.weight")
            if mask is not None:
                mask = (mask.t() if m.conv1d else mask).to(module.weight.device)
            parent, _, leaf = m.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, TrainedInt8Linear(module, mask))
        give_back()     # the room of the weights in floating point: holes in the heap, which training would hardly fill
        return model

    @staticmethod
    def found(model) -> list:
        """(name, layer) of every layer with trained integers."""
        from engines.layers.int8_trained import TrainedInt8Linear
        return [(n, m) for n, m in model.named_modules() if isinstance(m, TrainedInt8Linear)]

    def parameter_groups(self, model, context):
        integers = [layer.codes for _, layer in self.found(model)]
        known = {id(p) for p in integers}
        return [{"params": integers, "rank": self.rank, "scale": self.scale},
                {"params": [p for p in model.parameters() if id(p) not in known], "rank": 0, "scale": 1.0}]

    def made(self, groups, context, **options):
        from engines.optimizers.q_galore import QProjected
        if not options["early"]:
            raise RunFailed("Q-GaLore's gradients exist inside one process only", "Set training.processes to 1")
        return QProjected(groups, threshold=self.threshold, queue=self.queue, factor=self.growth, **options)

    def captured(self, model) -> list:
        return _peft.place_map(model, self.found(model), "captured", lambda layer: getattr(layer.codes, "captured", None)).get("captured", [])

    def finish(self, model, context):
        context.state["captured"] = self.captured(model)
        for name, layer in self.found(model):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.restored())
        return model


def _ceil(size: int, by: int) -> int:
    return math.ceil(size / by)


def _moments(size: int) -> int:
    """Bytes of two moments of ``size`` entries."""
    return 8 * size if size < LEAST else 2 * size + 8 * _ceil(size, GROUP)

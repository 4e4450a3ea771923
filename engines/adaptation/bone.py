"""Bone: one small square matrix for each row of blocks, multiplied with the frozen blocks themselves."""

from __future__ import annotations

import dataclasses

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, change_map
from engines.adaptation._frozen import FrozenInput
from engines.claim import LARGER, Claim
from engines.errors import InputError
from engines.method import AUTO, Card, hyper, register


@register
class Bone(FrozenInput):
    """Blocks of W are changed by W[o, i] D[o] + D[o] (``bat``), or column groups of W share one added matrix (``miss``).

    Source: Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models.
    """

    card = Card(
        id="bone", name="Bone", family="adaptation",
        title="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models", year=2024,
        summary="Cuts each frozen matrix into square blocks and trains one small matrix for each row of them, guided by the blocks.",
        needs=("training data", "a block size that divides both sides of every matrix (form bat)"),
        cannot=("does not make the model smaller or faster", "no separate adapter file in the form bat: its update has full rank",
                "has no scale: the learning rate does all", "form bat takes a whole gradient of every matrix, half as much work again as LoRA"),
        trains=True,
        differs="Own layers with the result of peft's MissConfig: form bat is Bone of the paper's first three versions (later called Bat), form "
                "miss is Bone of the later ones, without the product, whose update has at most the rank of a block. Form bat makes its "
                "matrix again in the backward pass, form miss keeps the sum of the input's shards instead of the input. The paper takes blocks "
                "of 64 and a rate of 2e-5 over a whole epoch; the usual rate here is for some hundred steps.")

    claims = (
        Claim("above-lora", "With equal trained parameters it is above LoRA-style adapters without a special start (LLaMA2-7B on MetaMathQA: GSM8k "
              "49.36, 5.84 above PiSSA).", ours={"method": "bone", "rank": 32}, against={"method": "lora", "rank": 16},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, against LoRA at about equal trained parameters"),
        Claim("weight-guide", "Guiding the update by the weights (Bat) is above the same blocks without it (ablation of the later versions).",
              ours={"method": "bone", "rank": 16}, against={"method": "bone", "form": "miss", "rank": 16},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, equal trained parameters"),
        Claim("miss-less-memory", "Bone without the product takes much less memory than LoRA (later versions; no figure in the abstract).",
              ours={"method": "bone", "form": "miss", "rank": 32}, against={"method": "lora", "rank": 16}, measure="memory", expect="at most",
              batch=8, length=256, shape=LARGER,
              differs="20.5 M parameters with random weights on a CPU, about equal trained parameters; lower at all is asked, not a factor"),
        Claim("miss-faster", "Bone without the product computes faster than LoRA (later versions; no figure in the abstract).",
              ours={"method": "bone", "form": "miss", "rank": 32}, against={"method": "lora", "rank": 16}, measure="seconds", expect="at most",
              batch=8, length=256, differs="a model of 5.3 M parameters on a CPU, about equal trained parameters; faster at all is asked, not a factor"),
    )

    rank: int = hyper(8, "Side of the blocks; auto takes the largest that obeys the limit on trainable parameters", low=1, high=1024,
                      lever="trainable", log=True)
    form: str = hyper("bat", "bat: guided by the weights, recomputes the matrix in each pass; miss: a shared sum, cheaper",
                      choices=("bat", "miss"))
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    learning_rate = 1e-3

    def count(self, matrix, size: int) -> int:
        return matrix.out * size

    def allowed(self, found, size: int) -> bool:
        return self.form == "miss" or all(m.out % size == 0 and m.inp % size == 0 for m in found)

    def check(self, profile) -> None:
        super().check(profile)
        if self.rank == AUTO or self.form == "miss":
            return
        found = self.targeted(profile)
        for m in found:
            if m.out % self.rank or m.inp % self.rank:
                able = [n for n in range(1, self.top(found) + 1) if self.allowed(found, n)]
                raise InputError("bone.rank", self.rank, f"it does not divide {m.name}, which is {m.out} by {m.inp}",
                                 "Choose " + ", ".join(map(str, able[-6:])) + ", or the form miss")

    # The forecast of form miss: its sum of shards is kept for each token, its place of every column lies beside the weights.
    def width(self, matrix, size: int) -> int:
        return size

    def frozen_numbers(self, matrix, size: int) -> int:
        return size * matrix.inp

    # That of form bat: inputs are kept; one layer at a time has its changed weight, a copy to multiply with and a whole gradient.
    def inner_rank(self, size: int) -> int:
        return 0

    def extra_bytes(self, profile, batch, found) -> int:
        return 12 * max(m.size for m in found)

    def footprint(self, profile, batch):
        if self.form == "miss":
            return super().footprint(profile, batch)
        made, found, tokens = AdapterMethod.footprint(self, profile, batch), self.targeted(profile), batch.tokens * batch.accumulation
        # A whole gradient for each token; the matrix made twice and its gradient pulled back once, for each step.
        work = sum(2.0 * m.size * (1 + 3 * self.size() / max(1, tokens)) for m in found)
        return dataclasses.replace(made, flops_per_token=made.flops_per_token + work)

    # -- in a live model ---------------------------------------------------------------------------------
    def build(self, matrix, module, context, generator, mask):
        from engines.layers import bone
        return (bone.Bat if self.form == "bat" else bone.Miss)(module, self.rank, mask=mask)

    def finish(self, model, context):
        return AdapterMethod.finish(self, model, context)

    def layers(self, model, context):
        return change_map(model)

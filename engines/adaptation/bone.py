"""Bone: one small square matrix for each row of blocks, multiplied with the frozen blocks themselves."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, change_map
from engines.claim import Claim
from engines.errors import InputError
from engines.method import AUTO, Card, hyper, register


@register
class Bone(AdapterMethod):
    """Blocks of W are changed by W[o, i] D[o] + D[o] (``bat``), or column groups of W share one added matrix (``miss``).

    Source: Bone: Block-Affine Adaptation of Large Language Models.
    """

    card = Card(
        id="bone", name="Bone", family="adaptation", title="Bone: Block-Affine Adaptation of Large Language Models", year=2024,
        summary="Cuts each frozen matrix into square blocks and trains one small matrix for each row of them, guided by the blocks.",
        needs=("training data", "a block size that divides both sides of every matrix (form bat)"),
        cannot=("does not make the model smaller or faster", "no separate adapter file in the form bat: its update has full rank",
                "has no scale: the learning rate does all"),
        trains=True,
        differs="Own layers with the result of peft's MissConfig: form bat is the paper's first version, form miss the authors' later one "
                "without the product, whose update has at most the rank of a block.")

    claims = (
        Claim("above-lora", "With equal trained parameters it is above LoRA-style adapters without a special start (LLaMA2-7B on MetaMathQA: GSM8k "
              "49.36, 5.84 above PiSSA).", ours={"method": "bone", "rank": 32}, against={"method": "lora", "rank": 16},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, against LoRA at about equal trained parameters"),
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

    def top(self, found) -> int:
        return min(m.inp for m in found) if self.form == "miss" else min(min(m.out, m.inp) for m in found)

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

    def extra_bytes(self, profile, batch, found) -> int:
        # bat builds the changed weight of a layer in each pass and keeps it for the backward one.
        return 4 * sum(2 * m.size for m in found) if self.form == "bat" else 0

    def build(self, matrix, module, context, generator, mask):
        from engines.layers import bone
        return (bone.Bat if self.form == "bat" else bone.Miss)(module, self.rank, mask=mask)

    def layers(self, model, context):
        return change_map(model)

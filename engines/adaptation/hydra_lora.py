"""Hydra: a LoRA branch that reads a layer's input beside one that reads its output."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters, merge, save_lora
from engines.claim import Claim
from engines.errors import InputError
from engines.method import AUTO, Card, hyper, register


@register
class HydraLora(AdapterMethod):
    """W' = W + s (B_p A_p + B_s A_s W), b' = b + s B_s A_s b: new features from the input, new combinations of the pretrained ones.

    Source: Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning.
    """

    card = Card(
        id="hydra-lora", name="Hydra", family="adaptation", title="Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
        year=2023,
        summary="Trains two low-rank branches per matrix, one on its input and one on its output, merged exactly at the end.",
        needs=("training data",),
        cannot=("does not make the model smaller or faster", "its dropout is left out on pruned weights",
                "trained biases only where the layer has a bias that can take them up", "no separate adapter file after pruning"),
        trains=True,
        differs="Merged by the formula; the released code for images uses another layer's weight in its merge and the released one for language "
                "never switches the method on. In training the branch on the output is computed as B_s ((A_s W) x + A_s b), which is the same "
                "without keeping the output. Ranks are equal unless told otherwise (images: 2 and 2; language: 4 and 8). Not to be mixed up with "
                "HydraLoRA, which routes among several B.")

    claims = (
        Claim("above-lora", "Better than adapters of a single branch over vision and language tasks (no figure in the abstract).",
              ours={"method": "hydra-lora", "rank": 8}, against={"method": "lora", "rank": 12, "targets": "down_proj"},
              differs="a language model of 5.3 M parameters on Python's reference prose, 60 steps, against LoRA on the same matrices with "
                      "equal trained parameters"),
        Claim("above-sequential", "The same against the branch on the output alone, a linear adapter behind the layer.",
              ours={"method": "hydra-lora", "rank": 8}, against={"method": "hydra-lora", "branches": "sequential", "rank": 24},
              differs="a language model of 5.3 M parameters on Python's reference prose, 60 steps, equal trained parameters"),
    )

    rank: int = hyper(4, "Rank of the branch on the input; auto takes the largest that obeys the limit on trainable parameters",
                      low=1, high=1024, lever="trainable", log=True)
    sequential_rank: int = hyper(0, "Rank of the branch on the output; 0 means the same", low=0, high=1024)
    branches: str = hyper("both", "Which branches there are: parallel alone is LoRA, sequential alone a linear adapter behind the layer",
                          choices=("both", "parallel", "sequential"))
    scale: float = hyper(1.0, "What both branches are multiplied with", low=0.001, high=100.0, log=True)
    dropout: float = hyper(0.0, "Dropout between the factors of a branch, in training (the paper's image tasks use 0.2)", low=0.0, high=0.9)
    biases: bool = hyper(False, "Trained biases in the branches, as in the released code for images", advanced=True)
    targets: str = hyper("mlp-output", "mlp-output: the last matrix of every MLP, as in the paper; " + _peft.TARGETS_HELP[0].lower() + _peft.TARGETS_HELP[1:])

    usual = 4

    def ranks(self, size: int) -> tuple[int, int]:
        """Ranks of the parallel and the sequential branch when ``rank`` is ``size``."""
        return (0 if self.branches == "sequential" else size), (0 if self.branches == "parallel" else self.sequential_rank or size)

    def count(self, matrix, size: int) -> int:
        p, s = self.ranks(size)
        biases = (p + bool(p) * matrix.out + s + bool(s) * matrix.out) if self.biases and matrix.bias else 0
        return p * (matrix.inp + matrix.out) + 2 * s * matrix.out + biases

    def inner_rank(self, size: int) -> int:
        return sum(self.ranks(size))

    def size(self) -> int:
        return self.usual if self.rank == AUTO else self.rank

    def pick(self, found, roles) -> list:
        return last_of_mlps(found) if self.targets == "mlp-output" else super().pick(found, roles)

    def check(self, profile) -> None:
        super().check(profile)
        s = self.ranks(self.size())[1]
        for m in self.targeted(profile):
            if s > m.out:
                raise InputError("hydra-lora.sequential_rank", s, f"{m.name} has {m.out} outputs, so no branch on them has a higher rank",
                                 f"Choose at most {min(x.out for x in self.targeted(profile))}")

    def extra_bytes(self, profile, batch, found) -> int:
        p, s = self.ranks(self.size())
        # The joined factors of each matrix, and under dropout what the branches keep: the output, and an inner product before and after.
        kept = 4 * sum((p + s) * (m.out + m.inp) for m in found) if s else 0
        if self.dropout:
            tokens = batch.rows * (profile.context if profile.task == "image-classification" else batch.length)
            kept += tokens * (2 if batch.compute == "bfloat16" else 4) * sum(m.out + p + s for m in found)
        return kept

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.hydra import Hydra
        p, s = self.ranks(self.rank)
        return Hydra(module, p, s, self.scale, biases=self.biases, dropout=self.dropout, generator=generator, mask=mask)

    def finish(self, model, context):
        # A_s W is part of the adapter's factors: it is made of the weights as they were given, not of their rounded copies.
        _peft.restore(model, adapters(model))
        model._fettle_kept.file = None
        save_lora(model, context)
        return merge(model)


def last_of_mlps(found) -> list:
    """Of each block the matrix outside attention that narrows most: the last one of its MLP."""
    best: dict[int, object] = {}
    for m in found:
        if "att" not in m.name.lower() and m.out <= m.inp:
            old = best.get(m.layer)
            if old is None or m.inp - m.out > old.inp - old.out:
                best[m.layer] = m
    return list(best.values())

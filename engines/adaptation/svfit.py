"""SVFit: the largest singular values of each frozen matrix are trained, and nothing else."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _peft
from engines.adaptation._adapter import change_map
from engines.adaptation._frozen import Diagonal
from engines.claim import Claim
from engines.method import Card, hyper, register


@register
class SvFit(Diagonal):
    """W = U diag(s) V^T with the first ``rank`` entries of s trained; singular vectors and the remaining values are frozen.

    Source: SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values.
    """

    card = Card(
        id="svfit", name="SVFit", family="adaptation",
        title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", year=2024,
        summary="Trains the largest singular values of each frozen matrix: one number for each direction that the matrix already "
                "has.",
        needs=("training data", "one singular value decomposition of each matrix before the first step",
               "a larger learning rate than LoRA, since every number moves alone"),
        cannot=("does not make the model smaller or faster", "learns no direction that the matrix does not have already",
                "holds the singular vectors in memory: two more matrices when all values are trained",
                "no separate adapter file where its factors would be larger than the matrices, as with the default"),
        trains=True,
        differs="reconstructed from the abstract, the introduction and the published parameter counts: no scale beside the "
                "values, biases frozen, and by default every singular value (the counts fit 768 of 768; the text speaks of those "
                "that hold over 99 % of a matrix, by which measure is not told). W itself is kept and the change of the values is "
                "added, which equals the paper's sum with the frozen rest and starts exactly at the model. No weight decay on the "
                "values.")

    claims = (
        Claim("above-lora", "Beats LoRA with 16 times fewer trained parameters (language understanding, images).", ours={"method": "svfit"},
              against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; 23 times fewer parameters than LoRA of rank 8"),
    )

    rank: int = hyper(0, "Singular values trained in each matrix, the largest first; 0 means all of them; auto takes as many as "
                         "the limit on trainable parameters allows", low=0, high=8192, lever="trainable", log=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP + "; the paper's counts fit the query and value matrices")

    learning_rate = 5e-2
    whole = "every singular value"

    def start_flops(self, profile, batch) -> float:
        return cost.decompositions(self.targeted(profile))

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.core import SingularValues
        return SingularValues(module, self.chosen(matrix, self.rank), mask=mask)

    def layers(self, model, context):
        return change_map(model, lambda layer: float(layer.difference().norm() / layer.start.norm().clamp_min(1e-12)))

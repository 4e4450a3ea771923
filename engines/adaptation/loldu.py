"""LoLDU: a pivoted lower-diagonal-upper factorisation of each frozen matrix, of which the diagonal is trained."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import change_map
from engines.adaptation._frozen import Diagonal
from engines.claim import Claim
from engines.method import Card, hyper, register

EXACT = ("lu", "uniform", "normal", "constant")


@register
class LoLdu(Diagonal):
    """W' = R + sigma P L_r diag(z) U_r; z and sigma are trained, R is what is missing from W at the start.

    Source: LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning.
    """

    card = Card(
        id="loldu", name="LoLDU", family="adaptation",
        title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", year=2024,
        summary="Factors each frozen matrix into triangles and a diagonal, and trains only the diagonal and one scale.",
        needs=("training data", "one LU factorisation of each matrix before the first step",
               "a larger learning rate than LoRA: the scale divides every step by the rank"),
        cannot=("does not make the model smaller or faster", "cannot choose directions: pivots come in the order of the "
                                        "factorisation, not of size",
                "holds the triangles in memory: two more matrices when the whole diagonal is trained",
                "no separate adapter file where its factors would be larger than the matrices, as with the default"),
        trains=True,
        differs="The scale sigma is trained, as the paper counts it (rank + 1 numbers per matrix); the released code selects "
                "only the diagonal, which is train_scale = false and what the published counts fit. The permutation is applied "
                "once instead of kept as a matrix, the factorisation is in float64, and vanishing pivots of pruned or dependent "
                "rows are set to zero instead of divided by. W itself is kept and the change of the diagonal is added, which "
                "equals the paper's sum with the residual. The starts s_uniform, s_normal, ones and zeros do not begin at the "
                "model, as in the released code.")

    claims = (
        Claim("not-worse-than-lora", "Comparable quality with far fewer trained parameters than usual adapters (up to 2600 times fewer on instruction, "
              "language understanding and images).", ours={"method": "loldu"}, against={"method": "lora", "rank": 8}, expect="not worse",
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; the whole diagonal, 23 times fewer than LoRA of rank 8"),
    )

    rank: int = hyper(0, "Diagonal entries trained in each matrix, in the order of the pivots; 0 means all of them (the paper's "
                         "default, 768, for a width of 768); auto takes as many as the limit on trainable parameters "
                         "allows", low=0, high=8192, lever="trainable",
                      log=True)
    alpha: float = hyper(1.0, "The scale starts at alpha divided by the number of trained entries", low=0.0001, high=8192.0)
    start: str = hyper("lu", "Where the diagonal starts: the pivots (lu), drawn or constant around their mean (uniform, normal, "
                             "constant), or apart from them (s_uniform, s_normal, ones, zeros), which changes the model before "
                             "the first step",
                       choices=("lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros"))
    train_scale: bool = hyper(True, "Train the scale beside the diagonal", advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP + "; the paper's counts fit the query and value matrices")

    learning_rate = 3e-2
    whole = "the whole diagonal"

    @property
    def identity(self) -> bool:
        """Whether training starts exactly at the model."""
        return self.start in EXACT

    def count(self, matrix, size: int) -> int:
        return self.chosen(matrix, size) + self.train_scale

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.loldu import LoLdu as Layer
        rank = self.chosen(matrix, self.rank)
        return Layer(module, rank, self.alpha / rank, self.start, self.train_scale, generator, mask=mask)

    def layers(self, model, context):
        return change_map(model)

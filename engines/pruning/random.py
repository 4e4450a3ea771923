"""Random pruning: the baseline that every other pruning method has to beat."""

from __future__ import annotations

import zlib

from engines.lazy import torch
from engines.method import Card, register
from engines.pruning import _masks
from engines.pruning._ratios import RATIOS
from engines.pruning._scored import CardBySchedule, Scored


@register
class Random(Scored):
    """Weights are chosen by chance, an exact number in each matrix.

    Source: The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training.
    """

    card = CardBySchedule(Card(
        id="random", name="Random pruning", family="pruning",
        title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training", year=2022,
        summary="Zeroes weights chosen by chance: the baseline for every other pruning method.",
        needs=("training afterwards (lora or full), or the gradual schedule", "calibration data (no labels) for rd and evolution"),
        cannot=("not smaller and not faster: zeros are stored and multiplied", "loses far more quality than methods that look at the weights",
                "cannot prune packed int8 or int4 weights"),
        masks=True,
        differs="Draws an exact number of weights instead of one coin for each. With global the chance is the same everywhere and only "
                "the total is exact. " + RATIOS))

    def score(self, matrix, module, context):
        # One draw per matrix and run: later updates of a gradual schedule add to the zeros of earlier ones.
        g = context.generator(zlib.crc32(matrix.name.encode()))
        scores = torch.rand(matrix.out, matrix.inp, generator=g).clamp_min_(1e-7).to(module.weight.device)
        old = context.masks.get(_masks.parameter(matrix))
        if old is not None:
            scores.mul_((old.t() if matrix.conv1d else old).to(scores.device))
        return scores

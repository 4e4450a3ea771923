"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

from engines.method import Card, hyper, register
from engines.pruning import _masks
from engines.pruning._ratios import RATIOS
from engines.pruning._scored import CardBySchedule, Scored


@register
class Magnitude(Scored):
    """Weights of smallest absolute value are zeroed, at once or along a cubic schedule while the model is trained.

    Sources: Learning both Weights and Connections for Efficient Neural Networks; the gradual schedule: To prune, or not to
    prune: exploring the efficacy of pruning for model compression.
    """

    card = CardBySchedule(Card(
        id="magnitude", name="Magnitude pruning", family="pruning",
        title="Learning both Weights and Connections for Efficient Neural Networks", year=2015,
        summary="Zeroes the weights of smallest absolute value, at once or gradually while training.",
        needs=("no data when it is done at once with uniform, global or erk", "calibration data (no labels) for rd and evolution",
               "training data for the gradual schedule"),
        cannot=("not smaller and not faster: zeros are stored and multiplied", "looks at weights only, not at what flows through them",
                "cannot prune packed int8 or int4 weights"),
        masks=True,
        differs="Zeros are added a fixed number of times along the progress through the budget instead of every so many steps. " + RATIOS))

    pattern: str = hyper("unstructured", "Anywhere, or so many kept of every so many inputs in a row (2:4 has kernels on GPUs)",
                         choices=_masks.PATTERNS)

    def score(self, matrix, module, context):
        from engines.models import weight
        return weight(module).detach().abs()

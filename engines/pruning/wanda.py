"""Wanda: a weight's size times the norm of the input that it multiplies."""

from __future__ import annotations

from engines import cost
from engines.errors import InputError, StopRequested
from engines.lazy import torch
from engines.method import Card, Footprint, Method, hyper, register
from engines.pruning import _masks


@register
class Wanda(Method):
    """In every output row the weights of smallest |w| ||x|| become zero; block by block, no gradient, no update of the rest.

    Source: A Simple and Effective Pruning Approach for Large Language Models.
    """

    card = Card(
        id="wanda", name="Wanda", family="pruning", title="A Simple and Effective Pruning Approach for Large Language Models", year=2023,
        summary="Zeroes weights whose size times the norm of their input is smallest, row by row, without training.",
        needs=("calibration sequences from the training data (no labels)",),
        cannot=("not smaller and not faster: zeros are stored and multiplied", "kept weights are not adjusted",
                "cannot prune packed int8 or int4 weights"),
        masks=True,
        differs="Calibrates on the run's own training data instead of C4.")

    sparsity: float = hyper(0.5, "Share of the weights inside the blocks that become zero", low=0.0, high=0.99)
    pattern: str = hyper("unstructured", "Anywhere in a row, or so many kept of every so many inputs", choices=_masks.PATTERNS)
    samples: int = hyper(128, "Calibration sequences", low=1, high=4096)
    length: int = hyper(0, "Tokens of a calibration sequence; 0 takes the data's own length", low=0, high=32768, unit="tokens")
    group: str = hyper("row", "Weights are compared inside one output row (the paper) or inside the whole matrix", choices=("row", "layer"),
                       advanced=True)
    variant: bool = hyper(False, "Rows may differ: prune the longest prefix whose scores sum to one share of the row's (paper's appendix)",
                          advanced=True)

    def check(self, profile) -> None:
        if not profile.matrices:
            raise InputError("model", profile.source, "it has no dense matrices inside blocks (perhaps they are packed already)",
                             "Start from a model that is not quantized")
        if self.pattern != "unstructured":
            zeros, width = _masks.groups(self.pattern)
            if abs(self.sparsity - zeros / width) > 1e-9:
                raise InputError("wanda.sparsity", self.sparsity, f"the pattern {self.pattern} fixes it at {zeros / width}",
                                 f"Set sparsity to {zeros / width}, or pattern to unstructured")
            _masks.check_pattern("wanda", profile, self.pattern)
            if self.variant or self.group != "row":
                raise InputError("wanda.pattern", self.pattern, "the groups of a pattern lie inside one row and have a fixed count",
                                 "Set group to row and variant to false")
        elif self.variant and self.group != "row":
            raise InputError("wanda.variant", True, "it compares inside rows", "Set group to row")

    def zeros(self, out: int, inp: int) -> int:
        """Zeros of one [out, in] matrix."""
        if self.pattern != "unstructured":
            zeros, width = _masks.groups(self.pattern)
            return out * (inp // width) * zeros
        return out * _masks.floor_count(self.sparsity, inp) if self.group == "row" else _masks.floor_count(self.sparsity, out * inp)

    def footprint(self, profile, batch) -> Footprint:
        length = self.length or min(profile.context, 2048, batch.length)
        share = sum(self.zeros(m.out, m.inp) for m in profile.matrices) / max(1, profile.block_parameters)
        # Scores and the order of at most 4096 rows at a time, masks, one norm per input.
        rows = max((min(m.out, 4096) * m.inp for m in profile.matrices), default=0)
        extra = 20 * rows + profile.block_parameters + 4 * sum(m.inp for m in profile.matrices if m.layer == 0)
        return cost.without_training(profile, batch, extra=extra, sequences=self.samples, length=length, sparsity=share)

    def apply(self, model, context):
        from engines.pruning._blocks import BlockWalk, InputNorms
        walk = BlockWalk(model, context.calibration(self.samples, self.length or None), device=context.device, compute=context.compute)
        count, done = len(walk.blocks), []
        for layer, block, linears in walk:
            norms = {module: InputNorms(m.inp, module.weight.device) for m, module in linears}
            walk.run(block, norms)
            for m, module in linears:
                _masks.put(context, m, module, self.select(module, norms[module].norms()))
                done.append([m.layer, m.role, _masks.zero_share(module)])
            if layer + 1 < count:
                walk.advance(block)
            context.reporter.log(f"wanda    block {layer + 1} of {count}")
            context.reporter.layers(context.step, {"sparsity": list(done)})
            if context.reporter.wants() in ("stop", "pause"):
                raise StopRequested(context.reporter.wants())
        return model

    def select(self, module, norms):
        """Bool [out, in], True at the weights to prune.

        Args:
            norms: [in], norm of each input feature.
        """
        from engines.models import weight
        w = weight(module).detach()
        scores = w.abs().float() * norms
        if self.pattern != "unstructured":
            return _masks.smallest_in_groups(scores, *_masks.groups(self.pattern))
        if self.group == "layer":
            return _masks.smallest(scores, _masks.floor_count(self.sparsity, scores.numel()))
        if self.variant:
            return by_row_share(scores, self.sparsity)
        return _masks.smallest_per_row(scores, _masks.floor_count(self.sparsity, scores.shape[1]))

    def layers(self, model, context):
        return _masks.sparsity_map(model)


def by_row_share(scores, sparsity: float, tolerance: float = 1e-3):
    """In each row the longest ascending prefix whose sum is at most alpha times the row's; alpha is bisected in [0, 0.8]
    until the whole matrix has the asked sparsity within ``tolerance``.
    """
    values, order = torch.sort(scores, dim=1, stable=True)
    share = values.double().cumsum(dim=1)
    share /= share[:, -1:].clamp_min(1e-300)
    low, high, alpha = 0.0, 0.8, 0.4
    for _ in range(60):
        chosen = share <= alpha
        found = float(chosen.double().mean())
        if abs(found - sparsity) <= tolerance:
            break
        low, high = (alpha, high) if found < sparsity else (low, alpha)
        alpha = (low + high) / 2
    return torch.zeros_like(chosen).scatter_(1, order, chosen)

"""Wanda: a weight's size times the norm of the input that it multiplies."""

from __future__ import annotations

import dataclasses

from engines import cost
from engines.errors import InputError, StopRequested
from engines.lazy import torch
from engines.method import Card, Footprint, Method, hyper, register
from engines.pruning import _masks, _ratios


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
        differs="Calibrates on the run's own training data instead of C4. " + _ratios.RATIOS)

    sparsity: float = hyper(0.5, "Share of the weights inside the blocks that become zero", low=0.0, high=0.99)
    pattern: str = hyper("unstructured", "Anywhere in a row, or so many kept of every so many inputs", choices=_masks.PATTERNS)
    samples: int = hyper(128, "Calibration sequences", low=1, high=4096)
    length: int = hyper(0, "Tokens of a calibration sequence; 0 takes the data's own length", low=0, high=32768, unit="tokens")
    group: str = hyper("row", "Weights are compared inside one output row (the paper) or inside the whole matrix", choices=("row", "layer"),
                       advanced=True)
    distribution: str = hyper("uniform", "How zeros are shared out: the same share in every matrix (the paper), more in larger ones (erk), "
                                         "least measured distortion of the output (rd, RD-Prune's dynamic program), or a search by the "
                                         "whole model's divergence (evolution, EvoPress)",
                              choices=tuple(d for d in _masks.DISTRIBUTIONS if d != "global"))
    variant: bool = hyper(False, "Rows may differ: prune the longest prefix whose scores sum to one share of the row's (paper's appendix)",
                          advanced=True)
    step: float = _ratios.step_field()
    search_tokens: int = _ratios.tokens_field()
    generations: int = _ratios.generations_field()
    offspring: int = _ratios.offspring_field()

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
        if self.distribution != "uniform" and (self.variant or self.pattern != "unstructured"):
            raise InputError("wanda.distribution", self.distribution, "a fixed pattern, and rows that differ by their scores, know no other shares",
                             "Set distribution to uniform, or pattern to unstructured and variant to false")
        _ratios.check(self, profile)

    def zeros(self, out: int, inp: int) -> int:
        """Zeros of one [out, in] matrix."""
        if self.pattern != "unstructured":
            zeros, width = _masks.groups(self.pattern)
            return out * (inp // width) * zeros
        return out * _masks.floor_count(self.sparsity, inp) if self.group == "row" else _masks.floor_count(self.sparsity, out * inp)

    def counts(self, matrices) -> list[int]:
        """Zeros of each matrix before anything is measured; rd and evolution move them and keep their sum."""
        if self.distribution == "erk":
            return _masks.zero_counts([(m.out, m.inp) for m in matrices], self.sparsity, "erk")
        return [self.zeros(m.out, m.inp) for m in matrices]

    def footprint(self, profile, batch) -> Footprint:
        length = self.length or min(profile.context, 2048, batch.length)
        share = sum(self.counts(profile.matrices)) / max(1, profile.block_parameters)
        # Scores and the order of at most 4096 rows at a time, masks, one norm per input.
        rows = max((min(m.out, 4096) * m.inp for m in profile.matrices), default=0)
        extra = 20 * rows + profile.block_parameters + 4 * sum(m.inp for m in profile.matrices if m.layer == 0)
        found = cost.without_training(profile, batch, extra=extra, sequences=self.samples, length=length, sparsity=share)
        if self.distribution not in _ratios.SEARCHED:
            return found
        more, norms = _ratios.footprint(self, profile, batch), found.calibration_tokens
        # The norms are taken twice: in the dense model for the search, then block by block.
        flops = (2 * norms * found.flops_per_token + more["tokens"] * profile.flops_per_token) / (2 * norms + more["tokens"])
        return dataclasses.replace(found, extra=found.extra + more["extra"], activations=max(found.activations, more["activations"]),
                                   calibration_tokens=2 * norms + more["tokens"], flops_per_token=flops)

    def apply(self, model, context):
        from engines.pruning._blocks import BlockWalk, InputNorms
        samples = context.calibration(self.samples, self.length or None)
        counts = self._allotted(model, context, samples)
        walk = BlockWalk(model, samples, device=context.device, compute=context.compute)
        count, done = len(walk.blocks), []
        for layer, block, linears in walk:
            norms = {module: InputNorms(m.inp, module.weight.device) for m, module in linears}
            walk.run(block, norms)
            for m, module in linears:
                _masks.put(context, m, module, self.select(module, norms[module].norms(), counts.get(m.name)))
                done.append([m.layer, m.role, _masks.zero_share(module)])
            if layer + 1 < count:
                walk.advance(block)
            context.reporter.log(f"wanda    block {layer + 1} of {count}")
            context.reporter.layers(context.step, {"sparsity": list(done)})
            if context.reporter.wants() in ("stop", "pause"):
                raise StopRequested(context.reporter.wants())
        return model

    def _allotted(self, model, context, samples) -> dict[str, int]:
        """Zeros by matrix where they are not the same share everywhere."""
        from engines.models import matrices, weight
        if self.distribution == "uniform":
            return {}
        found = matrices(model)
        counts = self.counts([m for m, _ in found])
        if self.distribution in _ratios.SEARCHED:
            norms = self._dense_norms(model, context, samples)
            counts = _ratios.sought(self, model, context, found, lambda m, module: weight(module).detach().abs().float() * norms[m.name],
                                    self._smallest, counts, _masks.zeros_there(found, context))
        return {m.name: count for (m, _), count in zip(found, counts)}

    def _dense_norms(self, model, context, samples) -> dict:
        """Norms of every matrix's inputs in the model as it is: [in] by name."""
        from engines.pruning._blocks import BlockWalk, InputNorms
        walk, out = BlockWalk(model, samples, device=context.device, compute=context.compute), {}
        for layer, block, linears in walk:
            norms = {module: InputNorms(m.inp, module.weight.device) for m, module in linears}
            walk.run(block, norms)
            out.update({m.name: norms[module].norms() for m, module in linears})
            if layer + 1 < len(walk.blocks):
                walk.advance(block)
        return out

    def _smallest(self, scores, count: int):
        return (_masks.smallest_by_row if self.group == "row" else _masks.smallest)(scores, count)

    def select(self, module, norms, count: int | None = None):
        """Bool [out, in], True at the weights to prune.

        Args:
            norms: [in], norm of each input feature.
            count: how many; the method's own share when left out.
        """
        from engines.models import weight
        w = weight(module).detach()
        scores = w.abs().float() * norms
        if count is not None:
            return self._smallest(scores, count)
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

"""EVA: LoRA that starts from the directions in which each layer's inputs vary most, with more rank where they explain more."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _calibration, _peft
from engines.adaptation._adapter import AdapterMethod, adapters, wrap
from engines.claim import Claim
from engines.errors import RunFailed
from engines.lazy import torch
from engines.method import Card, hyper, register

ROUNDS = 16
"""Batches after which the directions have usually settled; only the forecast rests on it."""


@register
class Eva(AdapterMethod):
    """W + s B A, both trained; rows of A start as the leading principal components of the layer's inputs, B as zero.

    Source: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation. Library: peft's incremental PCA.
    """

    card = Card(
        id="eva", name="EVA", family="adaptation", title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
        year=2024,
        summary="LoRA whose input factor starts from the leading directions of the layer's own inputs, with ranks dealt out by them.",
        needs=("training data", "a few forward passes over it before the first step"),
        cannot=("does not make the model smaller or faster", "the exact number of trained parameters is known only once the data have been seen",
                "no separate adapter file after pruning"),
        trains=True,
        differs="The same decomposition, sharing of equal inputs, convergence test and redistribution as peft's, with an end: peft goes on "
                "until every component has settled, here samples is the most. A rank is at most the smaller side of the matrix. The "
                "directions of a layer with few inputs come from the exact decomposition where peft's randomized one cannot be drawn. "
                "The scale is alpha / rank for every matrix as in peft (the authors divide by each matrix's own rank and take alpha 1; "
                "adjust = false). Every token counts: there is no mask of labels.")

    claims = (
        Claim("above-lora", "Converges fastest and has the highest average score over language generation and understanding, images and "
              "reinforcement learning (no figures in the abstract).", ours={"method": "eva", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; rank 8 on average on both sides"),
        Claim("faster-start", "Converges fastest: ahead already early in training.", ours={"method": "eva", "rank": 8},
              against={"method": "lora", "rank": 8}, steps=20,
              differs="the end of a whole schedule of 20 steps instead of a point on a longer curve; a model of 5.3 M parameters on Python's "
                      "reference prose, rank 8 on average on both sides"),
    )

    rank: int = hyper(8, "Average rank of the updates; auto takes the largest whose dearest distribution obeys the limit on trainable "
                         "parameters", low=1, high=1024, lever="trainable", log=True)
    rho: float = hyper(2.0, "A matrix gets at most this multiple of the average rank; 1 leaves all ranks equal", low=1.0, high=8.0)
    tau: float = hyper(0.99, "A direction counts as settled when it has this cosine with its value one batch earlier", low=0.5, high=0.9999)
    samples: int = hyper(1024, "Sequences or examples that are looked at, at most, 16 at a time", low=2, high=100000)
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means twice the rank", low=0.0, high=4096.0)
    dropout: float = hyper(0.0, "Dropout before the update, in training", low=0.0, high=0.9)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)
    whiten: bool = hyper(False, "Divide each direction by the square root of its singular value", advanced=True)
    adjust: bool = hyper(True, "One scale for all matrices; false divides alpha by each matrix's own rank", advanced=True)

    @property
    def rows(self) -> int:
        """Sequences or examples of one batch of the decomposition."""
        return min(16, self.samples)

    @property
    def exact_count(self) -> bool:
        """False: the forecast of trained parameters is the most that the data can lead to."""
        return self.rho == 1.0

    # -- from shapes -------------------------------------------------------------------------------------
    def cap(self, matrix, size: int) -> int:
        return min(round(size * self.rho), matrix.out, matrix.inp)

    def inner_rank(self, size: int) -> int:
        return size

    def trained(self, profile, size: int | None = None) -> int:
        size, found = self.size() if size is None else size, self.targeted(profile)
        caps = [self.cap(m, size) for m in found]
        return _calibration.most_parameters(found, size * len(found), caps) + _peft.head_parameters(profile)

    def extra_bytes(self, profile, batch, found) -> int:
        # The decomposition of one batch in float64 beside all components; gone before the optimizer has its moments.
        tokens = self.rows * (profile.context if profile.task == "image-classification" else batch.length)
        work = 8 * (sum(self.cap(m, self.size()) * m.inp for m in found) + 2 * tokens * max(m.inp for m in found))
        return max(0, work - 16 * self.trained(profile))

    def start_flops(self, profile, batch) -> float:
        # Most often every layer has settled long before; each batch costs a pass and the decomposition of its inputs beside the components.
        rounds, found = min(ROUNDS, self.samples // self.rows), self.targeted(profile)
        tokens = self.rows * (profile.context if profile.task == "image-classification" else batch.length)
        inputs = {(m.layer, m.inp): m for m in found}.values()
        work = sum(4.0 * cost.SVD * self.cap(m, self.size()) * (tokens + self.cap(m, self.size())) * m.inp for m in inputs)
        return rounds * (work + cost.passes(profile, self.rows, batch.length))

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.models import matrices
        named = matrices(model)
        found = {m.name for m in _peft.choose([m for m, _ in named], self.targets, tuple(dict.fromkeys(m.role for m, _ in named)))}
        chosen = [(m, module) for m, module in named if m.name in found]
        start = _calibration.once(context, "directions", lambda: self.directions(model, context, chosen))
        chosen = [(m, module) for m, module in chosen if m.name in start]
        _peft.prepare(model, context, [m.name for m, _ in chosen])

        def build(matrix, module, context, generator, mask):
            from engines.layers.factors import Factors
            a = start[matrix.name]
            scale = (self.alpha or 2.0 * self.rank) / (self.rank if self.adjust else a.shape[0])
            return Factors(module, a, torch.zeros(matrix.out, a.shape[0]), scale, dropout=self.dropout, mask=mask)
        wrap(model, context, chosen, build)
        return model

    def directions(self, model, context, chosen) -> dict:
        """Rows [rank, in] of the input factor by the matrix's name; matrices of rank 0 are left out."""
        from engines.allocation.variance import explain
        modules = {m.name: module for m, module in chosen}

        def run(batch, see):
            _calibration.look(model, context, batch, {modules[n]: callback for n, callback in see.items()})

        stream = (part for step in range(self.samples // self.rows) for part in context.data.batch(step, self.rows))
        with _calibration.frozen(model, context):
            found = explain(list(modules), {m.name: self.cap(m, self.rank) for m, _ in chosen}, self.rank * len(chosen), stream, run,
                            tau=self.tau, whiten=self.whiten)
        if found is None:
            raise RunFailed(f"no batch of {self.rows} rows has {max(self.cap(m, self.rank) for m, _ in chosen)} tokens, the components of a layer",
                            "Lower eva.rank or eva.rho, or raise training.length")
        least, most = min(found.ranks, key=found.ranks.get), max(found.ranks, key=found.ranks.get)
        mean = sum(found.share.values()) / len(found.share)
        context.reporter.event(
            "choice", f"Ranks by the variance of the inputs: {found.ranks[least]} in {least} to {found.ranks[most]} in {most}; the directions hold "
            f"{mean:.1%} of it on average; {found.batches} batches" + (f", {found.open} layers had not settled" if found.open else ""),
            by="eva", batches=found.batches, open=found.open, share=mean)
        return found.rows

    def finish(self, model, context):
        model = super().finish(model, context)
        file = _calibration.start_file(context, "directions")
        if file is not None:
            file.unlink(missing_ok=True)
        return model

    def layers(self, model, context):
        return _peft.place_map(model, adapters(model), "rank", lambda layer: int(layer.a.shape[0]))

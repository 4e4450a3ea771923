"""Sensitivity-LoRA: ranks of the updates by second-order sensitivity, measured once before training."""

from __future__ import annotations

import time

from engines import cost
from engines.adaptation import _calibration, _peft
from engines.adaptation._adapter import AdapterMethod, adapters
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, hyper, register


@register
class SensitivityLora(AdapterMethod):
    """W + s B A with ranks in proportion to a mix of the trace, the largest entries and the spread of the diagonal Hessian of each matrix.

    Source: Sensitivity-LoRA: Low-Load Sensitivity-Based Fine-Tuning for Large Language Models.
    """

    card = Card(
        id="sensitivity-lora", name="Sensitivity-LoRA", family="adaptation",
        title="Sensitivity-LoRA: Low-Load Sensitivity-Based Fine-Tuning for Large Language Models", year=2025,
        summary="Gives more rank to matrices whose weights the loss feels most, by second-order figures taken once before training.",
        needs=("training data", "a backward pass over some tens of sequences before the first step (form fisher)"),
        cannot=("does not make the model smaller or faster", "the exact number of trained parameters is known only once the data have been seen",
                "ranks never change again", "no separate adapter file after pruning"),
        trains=True,
        differs="reconstructed from the abstract: second-order diagonal, a global figure (its trace) and local ones (its largest entries, "
                "its effective rank) and ranks dealt out once are the paper's; how they are computed and weighed is not told. Ours: the "
                "diagonal is the mean of squared gradients of single samples (fisher) or twice the squared inputs (inputs); trace "
                "and top entries are means over a matrix, so that large matrices do not take all, the effective rank is a share of its "
                "maximum; each figure sums to one over the matrices and is weighed; ranks by largest remainder, at least one, at most "
                "most times the average.")

    claims = (
        Claim("above-uniform", "Above LoRA with equal ranks.", ours={"method": "sensitivity-lora", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; rank 8 on average on both sides"),
        Claim("above-adalora", "Above ranks that are shared out during training (RoBERTa-base on GLUE: 85.94 average, AdaLoRA 85.65).",
              ours={"method": "sensitivity-lora", "rank": 8}, against={"method": "adalora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; rank 8 on average on both sides, which AdaLoRA comes down "
                      "to from 12"),
    )

    rank: int = hyper(8, "Average rank of the updates; auto takes the largest whose dearest distribution obeys the limit on trainable "
                         "parameters", low=1, high=1024, lever="trainable", log=True)
    most: float = hyper(3.0, "A matrix gets at most this multiple of the average rank; 1 leaves all ranks equal", low=1.0, high=16.0)
    form: str = hyper("fisher", "Diagonal of the Hessian from squared gradients of the loss (fisher) or from the squared inputs of each layer "
                                "(inputs, cheaper)", choices=("fisher", "inputs"))
    samples: int = hyper(64, "Sequences or examples that the sensitivity is measured on", low=1, high=4096)
    trace: float = hyper(1.0, "Weight of the mean of the diagonal", low=0.0, high=100.0)
    peak: float = hyper(0.5, "Weight of the mean of its largest hundredth", low=0.0, high=100.0)
    spread: float = hyper(0.5, "Weight of its effective rank", low=0.0, high=100.0)
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means twice the rank; the same for all matrices", low=0.0, high=4096.0)
    dropout: float = hyper(0.0, "Dropout before the update, in training", low=0.0, high=0.9)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    @property
    def exact_count(self) -> bool:
        """False: the forecast of trained parameters is the most that the data can lead to."""
        return self.most == 1.0

    # -- from shapes -------------------------------------------------------------------------------------
    def cap(self, matrix, size: int) -> int:
        return min(max(size, round(size * self.most)), matrix.out, matrix.inp)

    def check(self, profile) -> None:
        super().check(profile)
        if self.rank != AUTO and not self.trace + self.peak + self.spread:
            raise InputError("sensitivity-lora.trace", self.trace, "all three figures have no weight", "Give one of trace, peak and spread a weight")

    def trained(self, profile, size: int | None = None) -> int:
        size, found = self.size() if size is None else size, self.targeted(profile)
        caps = [self.cap(m, size) for m in found]
        return _calibration.most_parameters(found, size * len(found), caps, floor=1) + _peft.head_parameters(profile)

    def extra_bytes(self, profile, batch, found) -> int:
        if self.form == "inputs":
            return 0
        # Gradients and their squares of all chosen matrices; gone before the optimizer has its moments.
        return max(0, 8 * sum(m.size for m in found) - 16 * self.trained(profile))

    def start_flops(self, profile, batch) -> float:
        return cost.passes(profile, self.samples, batch.length, backward=2.0 if self.form == "fisher" else 0.0)

    # -- in a live model ---------------------------------------------------------------------------------
    def prepare(self, model, context, chosen) -> None:
        def decide():
            ranks = self.ranks(model, context, chosen)
            return {"ranks": torch.tensor([ranks[m.name] for m, _ in chosen])}
        context.state["ranks"] = dict(zip([m.name for m, _ in chosen], _calibration.once(context, "ranks", decide)["ranks"].tolist()))
        super().prepare(model, context, chosen)

    def ranks(self, model, context, chosen) -> dict[str, int]:
        from engines.allocation import sensitivity
        began = time.perf_counter()
        measure = sensitivity.fisher if self.form == "fisher" else sensitivity.inputs
        figures = {n: sensitivity.figures(h) for n, h in measure(model, context, chosen, self.samples)}
        score = sensitivity.mix(figures, (self.trace, self.peak, self.spread))
        caps = {m.name: self.cap(m, self.rank) for m, _ in chosen}
        found = sensitivity.deal(score, self.rank * len(chosen), caps)
        least, most = min(found, key=found.get), max(found, key=found.get)
        context.reporter.event("choice", f"Ranks by sensitivity: {found[least]} in {least} to {found[most]} in {most}, {sum(found.values())} in all",
                               by="sensitivity-lora", seconds=time.perf_counter() - began)
        return found

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.factors import Factors
        rank = context.state["ranks"][matrix.name]
        a = torch.empty(rank, matrix.inp)
        torch.nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
        return Factors(module, a, torch.zeros(matrix.out, rank), (self.alpha or 2.0 * self.rank) / self.rank, dropout=self.dropout, mask=mask)

    def finish(self, model, context):
        model = super().finish(model, context)
        file = _calibration.start_file(context, "ranks")
        if file is not None:
            file.unlink(missing_ok=True)
        return model

    def layers(self, model, context):
        return _peft.place_map(model, adapters(model), "rank", lambda layer: int(layer.a.shape[0]))

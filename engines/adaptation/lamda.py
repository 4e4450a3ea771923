"""LaMDA and LaMDA++: low-dimensional adaptation between singular vectors, with an output projection that freezes gradually."""

from __future__ import annotations

import math

from engines import cost
from engines.adaptation import _peft
from engines.adaptation._adapter import adapters
from engines.adaptation._frozen import FrozenInput
from engines.claim import LARGER, Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, hyper, register


@register
class LamDa(FrozenInput):
    """W_res + s up core down: down frozen, core trained, up at first too, then frozen column by column from the largest value on.

    Source: LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation.
    """

    card = Card(
        id="lamda", name="LaMDA", family="adaptation",
        title="LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", year=2024,
        summary="Trains a small square between singular vectors; the output vectors freeze one by one and the input ones from "
                "the start.",
        needs=("training data", "one singular value decomposition of each matrix before the first step"),
        cannot=("does not make the model smaller or faster", "its optimizer memory is largest at the start, before the "
                                        "projection has frozen",
                "learns no new input directions", "no separate adapter file after pruning"),
        trains=True,
        differs="reconstructed from the abstract, a figure and the released code: the spectral start, the frozen residual and "
                "LaMDA++ are in no code. Ours: down, up and core are the largest singular triplets; floor(rank x progress / "
                "freeze_share) columns are frozen (the released formula misses the factor of the rank, so that three at most "
                "freeze) and put back after each step, because a zero gradient does not hold a weight under AdamW; LaMDA++ "
                "gives, among matrices of one shape, the third with the flattest spectrum twice the rank and the two thirds with "
                "the steepest half of it. The released code's start is start = random. No dropout.")

    claims = (
        Claim("not-worse-than-lora", "Matches or beats other adapters with up to 17.7 times fewer parameter updates (GLUE, summaries, generation, "
              "reasoning).", ours={"method": "lamda", "rank": 16}, against={"method": "lora", "rank": 16}, expect="not worse",
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, the same rank on both sides; 1.7 times fewer parameters "
                      "at the start and 46 times fewer after three tenths of the steps"),
        Claim("less-memory", "Peak memory up to 1.32 times lower, since the frozen input projection keeps thin activations only.",
              ours={"method": "lamda", "rank": 16}, against={"method": "lora", "rank": 16}, measure="memory", batch=8, length=256,
              shape=LARGER, differs="20.5 M parameters with random weights on a CPU, twelve steps; lower at all is asked, not a factor"),
    )

    rank: int = hyper(8, "Rank, and side of the trained square (the paper's scripts use 64); the mean one with ranks = energy; "
                         "auto takes the largest that obeys the limit on trainable parameters, counted before anything has "
                         "frozen", low=1, high=1024,
                      lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means a quarter of the rank, as in the paper's "
                              "scripts", low=0.0, high=4096.0)
    freeze_share: float = hyper(0.3, "Share of the budget after which the output projection is frozen "
                                     "entirely", low=0.01, high=1.0)
    ranks: str = hyper("uniform", "The same rank everywhere, or by the energy of the singular values before training (LaMDA++)",
                       choices=("uniform", "energy"))
    start: str = hyper("svd", "Projections start from the singular vectors (svd) or drawn, with a zero output projection "
                              "(random)",
                       choices=("svd", "random"), advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    learning_rate = 3e-3

    # -- from shapes -------------------------------------------------------------------------------------
    def count(self, matrix, size: int) -> int:
        return size * (size + matrix.out)

    def frozen_numbers(self, matrix, size: int) -> int:
        return size * (matrix.out + matrix.inp)

    def allowed(self, found, size: int) -> bool:
        return self.ranks == "uniform" or size % 2 == 0

    def check(self, profile) -> None:
        super().check(profile)
        if self.rank != AUTO and self.ranks == "energy" and self.rank % 2:
            raise InputError("lamda.rank", self.rank, "with ranks = energy some matrices get half of "
                                                      "it", f"Choose {self.rank + 1}, or ranks = uniform")

    def trained(self, profile, size: int | None = None) -> int:
        size = self.size() if size is None else size
        total = _peft.head_parameters(profile)
        for members in _shapes(self.targeted(profile)):
            total += sum(self.count(members[0], r) for r in self.spread(members[0], len(members), size))
        return total

    def spread(self, matrix, number: int, size: int) -> list[int]:
        """Ranks of ``number`` matrices of one shape, from the flattest spectrum to the steepest; their mean is ``size``."""
        if self.ranks == "uniform" or 2 * size > min(matrix.out, matrix.inp):
            return [size] * number
        double = number // 3
        return [2 * size] * double + [size] * (number - 3 * double) + [size // 2] * (2 * double)

    def start_flops(self, profile, batch) -> float:
        return cost.decompositions(self.targeted(profile)) * ((self.start == "svd") + 0.5 * (self.ranks == "energy"))

    # -- in a live model ---------------------------------------------------------------------------------
    def prepare(self, model, context, chosen) -> None:
        from engines.layers.lamda import energy
        super().prepare(model, context, chosen)
        ranks = {m.name: self.rank for m, _ in chosen}
        if self.ranks == "energy":
            modules = {m.name: module for m, module in chosen}
            for members in _shapes([m for m, _ in chosen]):
                spread = self.spread(members[0], len(members), self.rank)
                if len(set(spread)) == 1:
                    continue
                values = {m.name: torch.linalg.svdvals(modules[m.name].weight.detach().float()) for m in members}
                score = {name: energy(found, self.rank) for name, found in values.items()}
                ranks.update(zip(sorted(score, key=score.get), spread))
        context.state["ranks"] = ranks

    def apply(self, model, context):
        from engines.shortage import give_back
        model = super().apply(model, context)
        give_back()  # every matrix was decomposed
        return model

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.lamda import LamDa as Layer
        rank = context.state["ranks"][matrix.name]
        return Layer(module, rank, (self.alpha or self.rank / 4) / self.rank, self.start, generator, mask=mask)

    def optimizer(self, groups, settings, context):
        from engines.optimizers.freezing import FreezingAdamW, FreezingSGD
        if settings.optimizer == "sgd":
            return FreezingSGD(groups, lr=settings.lr, momentum=0.9)
        betas = (0.9, 0.95) if context.task == "causal-lm" else (0.9, 0.999)
        return FreezingAdamW(groups, lr=settings.lr, betas=betas, fused=True)

    def columns(self, rank: int, progress: float) -> int:
        """Columns of an output projection of this rank that are frozen at ``progress`` of the stage's budget."""
        # The small addend makes whole shares whole in spite of rounding: 0.3 / 0.1 is a little less than 3.
        return min(rank, math.floor(rank * progress / self.freeze_share + 1e-9))

    def before_step(self, model, context) -> None:
        from engines.optimizers.freezing import freeze
        for _, layer in adapters(model):
            columns = self.columns(layer.rank, context.progress)
            freeze(layer.up, columns)
            layer.settled = columns >= layer.rank
        if context.progress >= self.freeze_share and not context.state.get("settled"):
            context.state["settled"] = True
            left = sum(layer.rank**2 for _, layer in adapters(model))
            context.reporter.log(f"the output projections are frozen; {left:,} numbers of the squares are trained on")

    def after_backward(self, model, context) -> None:
        # Before clipping: what is frozen has no part in the length of the gradient.
        for _, layer in adapters(model):
            if layer.up.grad is not None:
                layer.up.grad[:, :getattr(layer.up, "frozen_columns", 0)] = 0

    def layers(self, model, context):
        found = adapters(model)
        figures = super().layers(model, context)
        frozen = _peft.place_map(model, found, "frozen", lambda layer: self.columns(layer.rank, context.progress))
        return {**figures, **frozen}


def _shapes(found) -> list[list]:
    """Matrices grouped by their shape, in the model's order."""
    groups: dict[tuple, list] = {}
    for m in found:
        groups.setdefault((m.out, m.inp), []).append(m)
    return list(groups.values())

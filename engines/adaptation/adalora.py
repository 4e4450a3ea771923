"""AdaLoRA: a low-rank update in SVD form whose ranks move to the matrices that need them."""

from __future__ import annotations

import math

from engines.adaptation import _peft
from engines.adaptation.lora import adapter_footprint
from engines.claim import Claim
from engines.errors import InputError
from engines.method import AUTO, Card, Footprint, Method, hyper, register


@register
class AdaLora(Method):
    """W + alpha / (init_rank + 1e-5) P diag(lambda) Q; entries of lambda are zeroed until ``rank`` per matrix are left on average.

    Source: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Library: peft.
    """

    card = Card(
        id="adalora", name="AdaLoRA", family="adaptation",
        title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", year=2023,
        summary="Starts every matrix at a higher rank, then takes ranks away where they matter least.",
        needs=("training data", "enough steps for the ranks to settle (some hundred)",
               "a larger learning rate than LoRA in short runs: lambda starts at zero and moves about one rate in a step"),
        cannot=("does not make the model smaller or faster", "cannot train packed int8 or int4 weights",
                "trains the full initial rank to the end: dead components save no time", "no separate adapter file after pruning"),
        trains=True,
        differs="The shares tinit and tfinal follow the progress through the budget, so that the final ranks are reached also under a "
                "limit in minutes. The orthogonality term is the released code's mean of the norms, to which the weights of its runs, 0.1 "
                "and 0.3, belong; the paper's formula, a sum of squares, is the option squared: at the same weight it outweighs the loss, and "
                "P and Q hardly follow the data. Ties in the scores are broken by position; peft may zero more than planned. The paper's "
                "rates are those of its LoRA, up to 1e-3 over thousands of steps; the usual rate here is for some hundred.")

    claims = (
        Claim("above-uniform-ranks", "Clearly better than updates of one uniform rank, most where few parameters may be trained (GLUE, SQuAD, XSum).",
              ours={"method": "adalora", "rank": 2, "init_rank": 4, "delta_t": 2}, against={"method": "lora", "rank": 2},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps with an allocation every two, where the paper has "
                      "thousands of steps; equal ranks at the end, AdaLoRA begins with rank 4 as in the paper"),
    )

    rank: int = hyper(8, "Average rank per matrix at the end; auto takes the largest whose start obeys the limit on trainable "
                         "parameters", low=1, high=1024, lever="trainable", log=True)
    init_rank: int = hyper(0, "Rank of every matrix at the start; 0 means one and a half times the final one", low=0, high=1536)
    alpha: float = hyper(16.0, "Scale of the update; it is divided by the initial rank for ever", low=0.01, high=4096.0)
    dropout: float = hyper(0.0, "Dropout before the update, in training", low=0.0, high=0.9)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)
    tinit: float = hyper(0.15, "Share of the budget before ranks begin to fall", low=0.0, high=0.9)
    tfinal: float = hyper(0.5, "Share of the budget at the end in which the final ranks are only trained", low=0.01, high=0.95)
    delta_t: int = hyper(10, "Optimizer steps between two allocations", low=1, high=10000)
    beta1: float = hyper(0.85, "Smoothing of the sensitivity", low=0.01, high=0.999, advanced=True)
    beta2: float = hyper(0.85, "Smoothing of its uncertainty", low=0.01, high=0.999, advanced=True)
    orthogonality: float = hyper(0.1, "Weight of the term that keeps P and Q orthogonal", low=0.0, high=100.0, advanced=True)
    penalty: str = hyper("norm", "Orthogonality term: mean of the norms (released code, to which the weight belongs) or sum of their squares "
                                 "(the paper's formula, far steeper)", choices=("norm", "squared"), advanced=True)

    learning_rate = 3e-2

    def start(self, rank: int | None = None) -> int:
        """The initial rank that goes with a final one."""
        rank = self.rank if rank is None else rank
        return self.init_rank or math.ceil(1.5 * rank)

    def check(self, profile) -> None:
        found = _peft.targeted(profile, self.targets)
        _peft.check_rank("adalora", "rank", self.rank, found, self.targets)
        if self.rank != AUTO:
            if self.start() < self.rank:
                raise InputError("adalora.init_rank", self.init_rank, f"ranks only fall, and the final one is {self.rank}",
                                 f"Give at least {self.rank}, or 0")
            _peft.check_rank("adalora", "init_rank" if self.init_rank else "rank", self.start(), found)
        if self.tinit + self.tfinal >= 1.0:
            raise InputError("adalora.tfinal", self.tfinal, f"with tinit {self.tinit} nothing is left for the ranks to fall in",
                             "Choose shares that add up to less than 1")

    def _count(self, profile, found, start: int) -> int:
        return start * sum(m.out + m.inp + 1 for m in found) + _peft.head_parameters(profile)

    def fit(self, profile, budget):
        self.check(profile)
        found = _peft.targeted(profile, self.targets)
        if self.rank == AUTO:
            smallest = min(min(m.out, m.inp) for m in found)
            top = self.init_rank or max(1, int(smallest / 1.5))
            rank, why = _peft.largest(profile, budget, found, _peft.ranks_up_to(top), lambda r: self._count(profile, found, self.start(r)))
            chosen = self.replace(rank=rank)
            chosen.check(profile)
            return chosen, {"rank": f"{why} (counted at the initial rank {chosen.start()})"}
        return self, {}

    def footprint(self, profile, batch) -> Footprint:
        found = _peft.targeted(profile, self.targets)
        start = self.start(8 if self.rank == AUTO else self.rank)
        trainable = self._count(profile, found, start)
        # Two averages of every component, beside the optimizer's.
        return adapter_footprint(profile, batch, found, start, trainable, extra=8 * start * sum(m.out + m.inp + 1 for m in found))

    def apply(self, model, context):
        from peft import AdaLoraConfig

        from engines.models import matrices
        named = [m for m, _ in matrices(model)]
        found = _peft.choose(named, self.targets, tuple(dict.fromkeys(m.role for m in named)))
        _peft.prepare(model, context, [m.name for m in found])
        total = max(context.total_steps or 1000, 10)
        config = AdaLoraConfig(
            init_r=self.start(), target_r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, deltaT=self.delta_t,
            tinit=int(self.tinit * total), tfinal=int(self.tfinal * total), total_step=total, beta1=self.beta1, beta2=self.beta2,
            orth_reg_weight=self.orthogonality, target_modules=[m.name for m in found], bias="none",
            fan_in_fan_out=any(m.conv1d for m in found))
        _peft.inject(model, config, context)
        return model

    def loss(self, model, loss, context):
        if not self.orthogonality:
            return loss
        from engines.adaptation import _allocator
        from engines.lazy import torch
        with torch.autocast(loss.device.type, enabled=False):
            return loss + self.orthogonality * _allocator.orthogonality(model, self.penalty == "squared")

    def after_step(self, model, context) -> None:
        from engines.adaptation import _allocator
        if self.start() == self.rank:
            return
        state, count = context.state, len(_allocator.triplets(model))
        total = max(context.total_steps or 1, 1)
        # The step that the schedule knows: under a limit in minutes it follows the clock.
        step = round(context.progress * total)
        tinit, tfinal = round(self.tinit * total), max(1, round(self.tfinal * total))
        if state.get("settled"):
            _allocator.apply_pattern(model, state)
            return
        if step < total - tfinal:
            _allocator.observe(model, state, self.beta1, self.beta2)
        last = step >= total - tfinal
        if last and "mean" not in state:
            # A stage of so few steps that none came before the final share.
            _allocator.observe(model, state, self.beta1, self.beta2)
        if last or step > tinit and (context.step - 1) % self.delta_t == 0:
            budget = self.rank * count if last else _allocator.budget_at(step, total, tinit, tfinal, self.start() * count, self.rank * count)
            _allocator.allocate(model, state, budget)
            state["settled"] = last

    def finish(self, model, context):
        from engines.adaptation import _allocator
        if self.start() != self.rank and not context.state.get("settled"):
            # Stopped early: the promised rank holds all the same.
            _allocator.allocate(model, context.state, self.rank * len(_allocator.triplets(model)))
        config = next(iter(model.peft_config.values()))
        config.rank_pattern = None
        _peft.save_adapter(model, config, context)
        return _peft.merge(model)

    def layers(self, model, context):
        alive = context.state.get("alive", {})
        names = {id(layer): name for name, layer in _peft.adapted(model)}
        return _peft.rank_map(model, lambda layer: int(alive[names[id(layer)]].sum()) if names[id(layer)] in alive else self.start())

"""LoRA: a frozen model plus a trainable low-rank update of each chosen matrix."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _peft
from engines.errors import InputError
from engines.method import AUTO, Card, Footprint, Method, hyper, register


@register
class Lora(Method):
    """W + mask * s (B A), A and B trained; ``s`` is alpha / rank, or alpha / sqrt(rank) with ``rslora``.

    Source: LoRA: Low-Rank Adaptation of Large Language Models. Library: peft.
    """

    card = Card(
        id="lora", name="LoRA", family="adaptation", title="LoRA: Low-Rank Adaptation of Large Language Models", year=2021,
        summary="Freezes the model and trains a low-rank update of each chosen matrix, merged at the end.",
        needs=("training data",),
        cannot=("does not make the model smaller or faster", "cannot train packed int8 or int4 weights",
                "cannot learn an update of higher rank than asked", "no separate adapter file after pruning"),
        trains=True,
        differs="The forward pass is one fused function with the same result as peft's. After pruning the update is masked, so "
                "that merging is exact and zeros stay zero. With ranks: gradient, L-GreCo's table (low-rank error of the mean gradient of "
                "ten batches, ranks from half to twice the uniform one) is solved once for the least error at the uniform setting's "
                "total, where the paper takes the least size at its error and repeats.")

    rank: int = hyper(8, "Rank of every update; auto takes the largest that obeys the limit on trainable parameters",
                      low=1, high=1024, lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update; 0 means twice the rank", low=0.0, high=4096.0)
    dropout: float = hyper(0.0, "Dropout before the update, in training", low=0.0, high=0.9)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)
    ranks: str = hyper("uniform", "How ranks are shared out: the same for every matrix, or more where the first gradients have more "
                                  "directions (gradient, L-GreCo's table), with exactly as many trainable parameters",
                       choices=("uniform", "gradient"))
    rslora: bool = hyper(False, "Divide alpha by the square root of the rank (rsLoRA)", advanced=True)
    dora: bool = hyper(False, "Learn the length of each row apart from its direction (DoRA)", advanced=True)

    @property
    def resolved_alpha(self) -> float:
        return self.alpha or 2.0 * self.rank

    def check(self, profile) -> None:
        _peft.check_rank("lora", "rank", self.rank, _peft.targeted(profile, self.targets), self.targets)
        if self.dora and self.dropout:
            raise InputError("lora.dropout", self.dropout, "with dora the whole matrix is rescaled, so there is no separate path to drop from",
                             "Set dropout to 0 or dora to false")

    def _fixed(self, profile, found) -> int:
        return (sum(m.out for m in found) if self.dora else 0) + _peft.head_parameters(profile)

    def fit(self, profile, budget):
        self.check(profile)
        found = _peft.targeted(profile, self.targets)
        if self.rank == AUTO:
            per_rank, fixed = sum(m.out + m.inp for m in found), self._fixed(profile, found)
            sizes = _peft.ranks_up_to(min(min(m.out, m.inp) for m in found))
            rank, why = _peft.largest(profile, budget, found, sizes, lambda r: r * per_rank + fixed)
            return self.replace(rank=rank), {"rank": why}
        # A rank that was asked for is kept: the planner shows that it passes the limit, and what would not.
        return self, {}

    def footprint(self, profile, batch) -> Footprint:
        found = _peft.targeted(profile, self.targets)
        rank = 8 if self.rank == AUTO else self.rank
        trainable = rank * sum(m.out + m.inp for m in found) + self._fixed(profile, found)
        extra = 0
        if self.ranks == "gradient":
            # Full gradients of the chosen matrices, gone before the optimizer's state is there.
            extra = max(0, 4 * sum(m.size for m in found) + 16 * max(m.size for m in found) - 16 * trainable)
        return adapter_footprint(profile, batch, found, rank, trainable, extra)

    def apply(self, model, context):
        from peft import LoraConfig

        from engines.models import matrices
        named = [m for m, _ in matrices(model)]
        found = _peft.choose(named, self.targets, tuple(dict.fromkeys(m.role for m in named)))
        ranks = {}
        if self.ranks == "gradient":
            from engines.adaptation import _ranks
            ranks = _ranks.by_gradient(model, context, found, self.rank)
        _peft.prepare(model, context, [m.name for m in found])
        # Where alpha follows the rank it follows each matrix's own, so that the scale is the same everywhere.
        alphas = {} if self.alpha else {name: 2.0 * r for name, r in ranks.items()}
        config = LoraConfig(r=self.rank, lora_alpha=self.resolved_alpha, lora_dropout=self.dropout, use_rslora=self.rslora,
                            rank_pattern=ranks, alpha_pattern=alphas,
                            use_dora=self.dora, target_modules=[m.name for m in found], bias="none",
                            fan_in_fan_out=any(m.conv1d for m in found))
        _peft.inject(model, config, context)
        return model

    def finish(self, model, context):
        config = next(iter(model.peft_config.values()))
        _peft.save_adapter(model, config, context)
        return _peft.merge(model)

    def layers(self, model, context):
        return _peft.rank_map(model, lambda layer: layer.r[_peft.ADAPTER])


def adapter_footprint(profile, batch, found, rank: int, trainable: int, extra: int = 0) -> Footprint:
    """Cost of training low-rank updates of ``found``; weights as ``_peft.prepare`` holds them."""
    weights = cost.held_bytes(profile, batch.weights)
    if batch.compute == "bfloat16" and batch.weights == "float32":
        weights -= 2 * sum(m.size for m in found)
    # Backward: gradients of the inputs everywhere, and of thin factors only.
    parts = cost.with_training(profile, batch, trainable=trainable, frozen=True, backward=1.0, weights=weights, adapter=4 * trainable,
                               adapted=tuple(dict.fromkeys(m.role for m in found)), rank=rank, extra=extra)
    parts["flops_per_token"] += 6.0 * rank * sum(m.out + m.inp for m in found)
    return Footprint(**parts)

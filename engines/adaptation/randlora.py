"""RandLoRA: a full-rank update from fixed random bases of which only diagonal scales are trained."""

from __future__ import annotations

import math

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters, change_map, merge
from engines.claim import Claim
from engines.errors import InputError
from engines.method import Card, hyper, register


@register
class RandLora(AdapterMethod):
    """W + s sum_j B_j diag(lambda_j) A diag(gamma_j), bases random, fixed and shared by all layers; lambda and gamma are trained.

    Source: RandLoRA: Full-rank parameter-efficient fine-tuning of large models.
    """

    card = Card(
        id="randlora", name="RandLoRA", family="adaptation", title="RandLoRA: Full-rank parameter-efficient fine-tuning of large "
                                        "models",
        year=2025,
        summary="Adds up enough fixed random low-rank matrices for full rank and trains only the scales of their rows and "
                "columns.",
        needs=("training data",),
        cannot=("does not make the model smaller or faster", "a smaller rank trains more parameters, not fewer",
                "builds the changed matrix in every pass, twice where gradients are needed"),
        trains=True,
        differs="Own layers, equal to peft's RandLora in the update. peft's scale is alpha / rank with alpha 20 times the rank, "
                "about a hundred times the authors' alpha / (rank sqrt(bases)), which is the default here. Bases are drawn in "
                "float32, because peft draws them in bfloat16 or float16 by what the machine can do. The pairing of columns and "
                "rows is that of the authors' code, a fixed permutation of the sum in the paper. No dropout. The product goes "
                "through the changed matrix, not through the thin factors, whose inner side is as long as the matrix.")

    claims = (
        Claim("above-lora", "With equal trained parameters its full rank closes part of the gap that LoRA leaves to full fine-tuning (vision, "
              "vision and language, commonsense reasoning).", ours={"method": "randlora", "rank": 8}, against={"method": "lora", "rank": 12},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, against LoRA at about equal trained parameters"),
    )

    rank: int = hyper(32, "Width of one random basis; a smaller one means more bases and more trained scales; auto takes the "
                          "smallest that obeys the limit on trainable parameters", low=1, high=1024, lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update; 0 means twice the rank", low=0.0, high=65536.0)
    scale: str = hyper("authors", "What alpha is divided by: the rank and the square root of the number of bases (authors), or "
                                  "the rank (peft)",
                       choices=("authors", "peft"))
    basis: str = hyper("uniform", "Entries of the bases: uniform, or -1, 0 and 1 with two thirds zeros (sparse) or nearly all "
                                  "(very-sparse)",
                       choices=("uniform", "sparse", "very-sparse"), advanced=True)
    key: int = hyper(0, "Seed of the bases; the same key gives the same bases in every run", low=0, high=2**31 - 1, advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    learning_rate = 1e-2
    usual = 32

    def count(self, matrix, size: int) -> int:
        side = min(matrix.out, matrix.inp)
        return math.ceil(side / size) * (size + side)

    def size(self) -> int:
        return self.usual if self.rank == "auto" else self.rank

    def largest(self, profile, budget):
        # Fewer trained parameters need a larger rank, so that the limit is met from the other side.
        found = self.targeted(profile)
        able = range(1, min(self.top(found), 1024) + 1)
        limit = budget.trainable_count(profile.parameters)
        if limit is None:
            return min(self.usual, max(able)), "no limit on trainable parameters: the usual rank"
        fitting = [r for r in able if self.trained(profile, r) <= limit]
        if not fitting:
            least = min(able, key=lambda r: self.trained(profile, r))
            raise InputError("budget.trainable", budget.trainable,
                             f"rank {least} on {len(found)} matrices, which trains the least, already "
                             f"trains {self.trained(profile, least):,} parameters, the limit is {limit:,}",
                             "Raise the limit, or adapt fewer matrices with targets")
        best = max(fitting, key=lambda r: (self.trained(profile, r), -r))
        return best, (f"{self.trained(profile, best):,} trainable parameters obey the limit of {limit:,}"
                      + (f"; rank {best - 1} would need {self.trained(profile, best - 1):,}" if best > 1 else "; no rank trains "
                                        "more"))

    def extra_bytes(self, profile, batch, found) -> int:
        rank, (smaller, larger) = self.size(), _sides(found)
        bases = rank * smaller + larger * rank * math.ceil(smaller / rank)
        # One layer at a time holds its scaled basis, its update and its changed weight.
        return 4 * (bases + 3 * max(m.size for m in found))

    def inner_rank(self, size: int) -> int:
        return 0

    def footprint(self, profile, batch):
        import dataclasses
        made = super().footprint(profile, batch)
        found, tokens = self.targeted(profile), batch.tokens * batch.accumulation
        # Building the change: forward, once more in the backward pass, and the product that pulls its gradient back.
        build = 3 * sum(2.0 * m.size * self.size() * math.ceil(min(m.out, m.inp) / self.size()) for m in found) / max(1, tokens)
        return dataclasses.replace(made, flops_per_token=made.flops_per_token + build + 2.0 * sum(m.size for m in found))

    def multiplier(self, number: int) -> float:
        """What the sum of ``number`` bases is multiplied with."""
        alpha = self.alpha or 2.0 * self.rank
        return alpha / self.rank / (math.sqrt(number) if self.scale == "authors" else 1.0)

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.randlora import RandLora as Layer
        number = math.ceil(min(matrix.out, matrix.inp) / self.rank)
        return Layer(module, self.rank, self.multiplier(number), mask=mask)

    def apply(self, model, context):
        from engines.layers.randlora import bases
        model = super().apply(model, context)
        layers = [layer for _, layer in adapters(model)]
        a, b = bases(self.rank, *_sides(layers), self.basis, self.key)
        for layer in layers:
            layer.share(a.to(layer.weight.device), b.to(layer.weight.device))
        return model

    def finish(self, model, context):
        self._save(model, context)
        return merge(model)

    def _save(self, model, context) -> None:
        """Write what peft loads as a RandLora adapter: scales, and the bases once."""
        layers = adapters(model)
        if not _peft.keeps_adapter(context, any(layer.mask is not None for _, layer in layers)):
            return
        from peft import RandLoraConfig

        from engines.layers.randlora import bases
        a, b = bases(self.rank, *_sides([layer for _, layer in layers]), self.basis, self.key)
        state = {"base_model.randlora_A": a, "base_model.randlora_B": b}
        for name, layer in layers:
            # peft has one scale for all layers, the authors' follows the number of bases: what they differ by goes into lambda.
            state |= {f"{name}.randlora_lambda": layer.lam * (layer.scale / 2.0), f"{name}.randlora_gamma": layer.gamma.clone()}
        config = RandLoraConfig(r=self.rank, randlora_alpha=2 * self.rank, target_modules=sorted(n for n, _ in layers),
                                projection_prng_key=self.key, save_projection=True, sparse=self.basis == "sparse",
                                very_sparse=self.basis == "very-sparse", bias="none",
                                fan_in_fan_out=any(layer.conv1d for _, layer in layers))
        _peft.write_adapter(model, context, config, state)

    def layers(self, model, context):
        return change_map(model)


def _sides(found) -> tuple[int, int]:
    """The smaller and the larger side of the shared bases, as peft takes them: of the largest output and the largest input."""
    out, inp = max(m.out for m in found), max(m.inp for m in found)
    return min(out, inp), max(out, inp)

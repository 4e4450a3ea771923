"""LISA: full fine-tuning of a few randomly drawn blocks at a time, with embeddings and output layer always in training."""

from __future__ import annotations

import re

from engines import activations, cost
from engines.adaptation import _whole
from engines.claim import LARGER, Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, Footprint, Method, hyper, register
from engines.profile import BYTES, _role


@register
class Lisa(Method):
    """Everything outside the blocks is trained throughout; of the blocks, ``blocks`` drawn anew ``draws`` times in a stage.

    Source: LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning.
    """

    card = Card(
        id="lisa", name="LISA", family="adaptation",
        title="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", year=2024,
        summary="Trains all weights, but only a few random blocks at a time: gradients and moments exist for those alone.",
        needs=("training data", "a model with more blocks than are trained at a time"),
        cannot=("no separate adapter file: whole weights move", "does not make the model smaller or faster",
                "saves little where embeddings and output layer are most of the model", "hardly shortens a step: the backward pass "
                "still reaches the embeddings"),
        trains=True,
        differs="Blocks are drawn again after equal shares of the stage's budget, not after a number of steps. Moments of blocks that leave "
                "are freed and those of the others kept; the authors' published callback frees none, their experiments restarted all at each draw (state = all).")

    claims = (
        Claim("above-lora", "On MT-Bench it is 11 % to 37 % above LoRA at similar or lower memory (LLaMA-2-7B, Mistral-7B, TinyLlama, GPT2-small; "
              "LoRA of rank 128 to 256).", ours={"method": "lisa", "blocks": 2}, against={"method": "lora", "rank": 64},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, bits per byte in place of a judge; embeddings are a larger "
                      "share of this model than of the paper's"),
        Claim("not-below-full", "LISA is on par with full-parameter training or above it (LLaMA-2-70B on MT-Bench, GSM8K, PubMedQA).",
              ours={"method": "lisa", "blocks": 2}, against={"method": "full"}, expect="not worse",
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("memory-below-full", "Memory like LoRA's, far below full training (a model of 7 B parameters takes at least 60 GB in full training).",
              ours={"method": "lisa", "blocks": 2}, against={"method": "full"}, measure="memory", expect="at most", factor=0.8, batch=2,
              shape=LARGER, differs="20.5 M parameters with random weights, two of eight blocks; a peak of at most 0.8 of full training is asked; embeddings "
                                    "and output layer are a third of this model, activations are small"),
        Claim("memory-like-lora", "Its memory is similar to LoRA's or lower (LLaMA-2-7B: two blocks against LoRA of rank 128).",
              ours={"method": "lisa", "blocks": 2}, against={"method": "lora", "rank": 64}, measure="memory", expect="at most", factor=1.1, batch=2,
              shape=LARGER, differs="embeddings and output layer, which LISA trains and LoRA does not, are a third of these 20.5 M parameters with random "
                                    "weights, and two blocks are two of eight, not two of 32"),
        Claim("optimizer-below-full", "Moments exist for embeddings, output layer and the drawn blocks only.",
              ours={"method": "lisa", "blocks": 2}, against={"method": "full"}, measure="optimizer", expect="at most", factor=0.8,
              differs="a model of 5.3 M parameters, two of its five blocks at a time"),
    )

    blocks: int = hyper(2, "Blocks in training at a time (the paper: 2, and 4 for 70 B); 0 trains embeddings and output layer only; auto takes the "
                        "most that obey the limit on trainable parameters", low=0, high=1024, lever="trainable")
    draws: int = hyper(10, "How often blocks are drawn in the stage (the paper's script: every 20 steps)", low=1, high=10000, log=True)
    state: str = hyper("leaving", "Moments that are freed at a draw: those of blocks that leave, or all", choices=("leaving", "all"), advanced=True)

    whole = True

    # -- from shapes -------------------------------------------------------------------------------------
    def _sizes(self, profile) -> tuple[int, list[int]]:
        """Parameters outside the blocks, and of each block."""
        outside, inside = 0, {}
        for t in profile.tensors:
            number = block_of(t.name)
            if number is None:
                outside += t.size
            else:
                inside[number] = inside.get(number, 0) + t.size
        return outside, [inside[n] for n in sorted(inside, key=lambda n: (n[0], n[1]))]

    def _trained(self, profile, blocks: int) -> int:
        outside, inside = self._sizes(profile)
        return outside + sum(sorted(inside, reverse=True)[:blocks])

    def check(self, profile) -> None:
        _whole.refuse_packed(self, profile)
        number = len(self._sizes(profile)[1])
        if self.blocks != AUTO and self.blocks > number:
            raise InputError("lisa.blocks", self.blocks, f"the model has {number} blocks", f"Choose at most {number}")

    def fit(self, profile, budget):
        outside, inside = self._sizes(profile)
        limit, asked = budget.trainable_count(profile.parameters), self.blocks
        able = range(len(inside) + 1) if asked == AUTO else [min(asked, len(inside))]
        fitting = [n for n in able if limit is None or self._trained(profile, n) <= limit]
        if not fitting:
            raise InputError("budget.trainable", budget.trainable, f"embeddings, output layer and {min(able)} blocks are {self._trained(profile, min(able)):,} "
                             f"parameters in training at a time, the limit is {limit:,}", "use lora, whose rank follows the limit, or raise the limit")
        if asked != AUTO:
            return self, {}
        if limit is None:
            return self.replace(blocks=min(2, len(inside))), {"blocks": "no limit on trainable parameters: the paper's number"}
        best = max(fitting)
        return self.replace(blocks=best), {"blocks": f"{self._trained(profile, best):,} parameters in training at a time obey the limit of {limit:,}"}

    def footprint(self, profile, batch) -> Footprint:
        blocks = 2 if self.blocks == AUTO else self.blocks
        trained, share = self._trained(profile, blocks), min(1.0, blocks / max(1, profile.layers))
        parts = cost.with_training(profile, batch, trainable=trained, frozen=False, backward=1.0 + trained / max(1, profile.parameters),
                                   size=BYTES.get(batch.weights, 4))
        if not batch.checkpointing:
            # Frozen matrices keep no input for the gradient of their weights.
            still = activations.train_bytes(profile, batch, frozen=True, adapted=())
            parts["activations"] = round(share * parts["activations"] + (1 - share) * still)
        return Footprint(**parts)

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        drawn = self._draw(model, context, 0)
        context.state.update(period=0, drawn=drawn, counts=self._count({}, drawn))
        self._freeze(model, drawn)
        return model

    def parameter_groups(self, model, context):
        # All of them: an optimizer made of the first draw would never move the blocks that are drawn later.
        return [{"params": list(model.parameters())}]

    def optimizer(self, groups, settings, context):
        from engines.optimizers.releasing import ReleasingAdamW, ReleasingSGD
        if settings.optimizer == "sgd":
            return ReleasingSGD(groups, lr=settings.lr, momentum=0.9)
        betas = (0.9, 0.95) if context.task == "causal-lm" else (0.9, 0.999)
        return ReleasingAdamW(groups, lr=settings.lr, betas=betas, fused=True)

    def _draw(self, model, context, period: int) -> list:
        """Names of the blocks of one period: a function of seed, stage and period only."""
        names = blocks_of(model)
        order = torch.randperm(len(names), generator=context.generator(100 + period)).tolist()
        return sorted((names[i] for i in order[:self.blocks]), key=names.index)

    @staticmethod
    def _count(counts: dict, drawn: list) -> dict:
        return {**counts, **{name: counts.get(name, 0) + 1 for name in drawn}}

    @staticmethod
    def _freeze(model, drawn: list) -> None:
        chosen = set(drawn)
        for name, p in model.named_parameters():
            block = block_of(name)
            p.requires_grad_(block is None or ".".join(map(str, block)) in chosen)
            if not p.requires_grad:
                p.grad = None

    def before_step(self, model, context):
        state, period = context.state, min(self.draws - 1, int(context.progress * self.draws + 1e-9))
        if period > state["period"]:
            drawn = self._draw(model, context, period)
            state.update(period=period, drawn=drawn, counts=self._count(state["counts"], drawn))
            context.reporter.log(f"blocks in training: {', '.join(name.rsplit('.', 1)[-1] for name in drawn) or 'none'}")
            if self.state == "all":
                from engines.optimizers.releasing import renew
                for p in model.parameters():
                    renew(p)
        # In every step: a resumed stage comes from apply with the draw of the first period.
        self._freeze(model, state["drawn"])

    def finish(self, model, context):
        model.requires_grad_(True)
        return model

    def layers(self, model, context):
        from engines.models import matrices
        counts, drawn = context.state.get("counts", {}), set(context.state.get("drawn", ()))
        shown = {"periods": [], "active": []}
        for m, _ in matrices(model):
            name = ".".join(map(str, block_of(m.name)))
            shown["periods"].append([m.layer, _role(m.name), counts.get(name, 0)])
            shown["active"].append([m.layer, _role(m.name), int(name in drawn)])
        return shown


def block_of(name: str) -> tuple[str, int] | None:
    """(path of the list of blocks, number) of a parameter inside a block, else None."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    return (found.group(1), int(found.group(2))) if found else None


def blocks_of(model) -> list[str]:
    """Paths of the blocks in their order: ``model.layers.0``."""
    found = {block_of(name) for name, _ in model.named_parameters()} - {None}
    return [f"{path}.{number}" for path, number in sorted(found)]

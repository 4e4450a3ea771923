"""Fira: GaLore's memory for moments with updates of full rank."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._projected import ProjectedMethod
from engines.claim import LARGER, Claim
from engines.method import Card, hyper, register


@register
class FiraMethod(ProjectedMethod):
    """Adam inside a subspace of each gradient, and outside it the gradient itself, scaled by what Adam did inside and limited in its growth.

    Source: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
    """

    card = Card(
        id="fira", name="Fira", family="adaptation", title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", year=2024,
        summary="Trains all weights with moments in a low-rank subspace, and adds the rest of each gradient, scaled as Adam scales inside.",
        needs=("training data", "full gradients until the step: only the moments are small"),
        cannot=("no separate adapter file: whole weights move", "does not make the model smaller or faster",
                "saves nothing on embeddings and output layer, which keep ordinary moments"),
        trains=True,
        differs="As in the paper's algorithm the scale multiplies the whole update; the released optimizer leaves the rest unscaled and lets a part "
                "of the gradient inside the subspace leak into it. Subspaces are renewed after equal shares of the stage's budget, not every 200 "
                "steps. Full gradients wait for the step, so that clipping and accumulation work: the memory saved is that of moments.")

    claims = (
        Claim("above-galore", "It is above GaLore of equal rank (pre-training LLaMA 60 M on C4, rank 128: perplexity 31.06 against 34.88).",
              ours={"method": "fira", "rank": 16}, against={"method": "galore", "rank": 16},
              differs="fine-tuning of a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("above-lora", "It is above LoRA of equal rank (LLaMA 60 M: perplexity 31.06 against 34.99; LLaMA-7B on eight commonsense tasks, rank 32: "
              "76.9 against 74.7).", ours={"method": "fira", "rank": 16}, against={"method": "lora", "rank": 16},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; LoRA trains no embeddings"),
        Claim("on-par-with-full", "It is comparable to full-rank training or better (LLaMA 60 M: perplexity 31.06 against 34.06).",
              ours={"method": "fira", "rank": 16}, against={"method": "full"}, expect="not worse",
              differs="fine-tuning of a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("optimizer-below-full", "It needs the optimizer states of GaLore, far less than full-rank training.",
              ours={"method": "fira", "rank": 16}, against={"method": "full"}, measure="optimizer", expect="at most", factor=0.5,
              differs="embeddings, which keep ordinary moments, are a large share of this model"),
        Claim("memory-below-full", "It takes less memory than full-rank training.", ours={"method": "fira", "rank": 16}, against={"method": "full"},
              measure="memory", expect="at most", factor=0.9, batch=2, shape=LARGER,
              differs="20.5 M parameters with random weights; full gradients are held on both sides"),
    )

    rank: int = hyper(16, "Rank of the subspace; the paper takes a quarter of the width and less in pre-training, 32 in fine-tuning", low=1, high=4096,
                      log=True)
    scale: float = hyper(4.0, "Factor on the update of projected matrices: 4 as in GaLore's fine-tuning, where the rate is that of Adam; in the paper's "
                              "pre-training 0.25 below 1 B parameters and 0.0625 above, with a rate ten times as large", low=0.001, high=256.0, log=True)
    refreshes: int = hyper(10, "How often each subspace is computed in the stage (the paper: every 200 steps)", low=1, high=10000, log=True)
    gamma: float = hyper(1.01, "The norm of a matrix's rest grows by this factor at most from step to step", low=1.0, high=10.0, advanced=True)
    by: str = hyper("column", "Scaling of the rest: each index of the larger side by itself, or the whole matrix alike", choices=("column", "matrix"),
                    advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP.replace("adapted", "projected"))

    early = False

    def made(self, groups, context, **options):
        from engines.optimizers.fira import Fira
        return Fira(groups, gamma=self.gamma, by=self.by, **options)

    def shares(self, model) -> list:
        """The rest's share of the update's norm, by matrix."""
        rows = [(m, module.weight.__dict__.get("residual")) for m, module in self.chosen(model)]
        return [[m.layer, m.role, float(value)] for m, value in rows if value is not None]

    def finish(self, model, context):
        context.state["residual"] = self.shares(model)
        for p in model.parameters():
            p.__dict__.pop("residual", None)
        return super().finish(model, context)

    def layers(self, model, context):
        rows = self.shares(model) or context.state.get("residual")
        return {**super().layers(model, context), **({"residual": rows} if rows else {})}

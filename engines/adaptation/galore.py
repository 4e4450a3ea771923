"""GaLore: all weights trained, with Adam's moments in a low-rank subspace of each matrix's gradient."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._projected import ProjectedMethod
from engines.claim import LARGER, Claim
from engines.method import Card, hyper, register


@register
class GaLore(ProjectedMethod):
    """Adam on R = P'G with P the leading singular vectors of a recent gradient; the update goes back through P.

    Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection.
    """

    card = Card(
        id="galore", name="GaLore", family="adaptation", title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", year=2024,
        summary="Trains all weights, with gradients and moments of each matrix in a low-rank subspace that is renewed now and then.",
        needs=("training data", "a moment of work for each new subspace: eigenvectors of every matrix's gradient"),
        cannot=("no separate adapter file: whole weights move", "does not make the model smaller or faster",
                "saves nothing on embeddings and output layer, which keep ordinary moments"),
        trains=True,
        differs="Subspaces are renewed after equal shares of the stage's budget, not every 200 steps. Gradients are projected during the backward "
                "pass and kept projected until the step; the authors' per-layer variant takes the step there instead, which forbids clipping and "
                "accumulation. With accumulation a new subspace is that of the first micro-batch. Singular vectors come from the "
                "eigenvectors of the gradient's product with itself in float64. Moments are float32, not 8-bit (see q-galore).")

    claims = (
        Claim("on-par-with-full", "Pre-training LLaMA from 60 M to 1 B on C4, its perplexity is close to full-rank training's (60 M: 34.88 "
              "against 34.06).", ours={"method": "galore", "rank": 64}, against={"method": "full"}, expect="not worse",
              differs="fine-tuning of a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("above-lora", "It is above LoRA of equal rank (pre-training LLaMA 60 M: perplexity 34.88 against 34.99; RoBERTa-base on GLUE, rank 4: "
              "85.89 against 85.61).", ours={"method": "galore", "rank": 16}, against={"method": "lora", "rank": 16},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; LoRA trains no embeddings"),
        Claim("optimizer-below-full", "Up to 65.5 % less memory for optimizer states (pre-training LLaMA 1 B and 7 B on C4, rank a quarter of the width and more).",
              ours={"method": "galore", "rank": 64}, against={"method": "full"}, measure="optimizer", expect="at most", factor=0.65,
              differs="embeddings, which keep ordinary moments, are a larger share of this model"),
        Claim("memory-below-full", "It takes less memory than full-rank training (up to 63.3 % less with 8-bit moments, LLaMA 7 B against a bfloat16 baseline).",
              ours={"method": "galore", "rank": 16}, against={"method": "full"}, measure="memory", expect="at most", factor=0.8, batch=2,
              shape=LARGER, differs="float32 moments on both sides, 20.5 M parameters with random weights, of which embeddings are a third"),
    )

    rank: int = hyper(16, "Rank of the subspace; the paper takes a quarter to half of the width in pre-training, 4 or 8 in fine-tuning", low=1,
                      high=4096, log=True)
    scale: float = hyper(4.0, "Factor on the update of projected matrices: 4 in the paper's fine-tuning, where the rate is that of Adam; 0.25 in its "
                              "pre-training, with a rate ten times as large", low=0.001, high=256.0, log=True)
    refreshes: int = hyper(10, "How often each subspace is computed in the stage (the paper: every 200 steps)", low=1, high=10000, log=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP.replace("adapted", "projected"))

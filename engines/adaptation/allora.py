"""ALLoRA: LoRA without dropout and without a scale, whose gradient is larger where the update is still small."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters
from engines.claim import Claim
from engines.method import Card, hyper, register


@register
class AlLora(AdapterMethod):
    """W + B A; the gradient of row i of B A is multiplied by 1 / sqrt(|(B A)_i| + 1 / eta^2), that of the layer's input is not.

    Source: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws.
    """

    card = Card(
        id="allora", name="ALLoRA", family="adaptation", title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal "
                                        "Flaws", year=2024,
        summary="LoRA without dropout and scale; rows of the update that are still near zero get larger gradients.",
        needs=("training data",),
        cannot=("does not make the model smaller or faster", "does little under AdamW, which divides a steady factor out again",
                "no separate adapter file after pruning"),
        trains=True,
        differs="The length of a row is computed through the Gram matrix of A, without the product. The paper does not name its "
                "optimizer: under AdamW only the change of the factor over time acts, under SGD the effective rate is eta times "
                "the rate as the paper says. The paper's ablation by outputs is an option; the one that scales outputs is left "
                "out, since it cannot be merged.")

    claims = (
        Claim("above-lora", "Better accuracy than LoRA and its variants with short training, without dropout and scale (several language models up "
              "to Llama3-8B).", ours={"method": "allora", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, AdamW on both sides"),
        Claim("above-dora", "Better accuracy than recent variants such as DoRA (several language models up to Llama3-8B).",
              ours={"method": "allora", "rank": 8}, against={"method": "lora", "rank": 8, "dora": True},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, AdamW on both sides"),
    )

    rank: int = hyper(8, "Rank of every update; auto takes the largest that obeys the limit on trainable "
                         "parameters", low=1, high=1024,
                      lever="trainable", log=True)
    eta2: float = hyper(4.0, "Eta squared: a row at zero learns eta times as fast; the paper tries 1, 2 and "
                             "4", low=0.01, high=1000.0, log=True)
    by: str = hyper("rows", "The factor follows the length of each row of the update (rows) or the size of each output (outputs)",
                    choices=("rows", "outputs"), advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.allora import AlLora as Layer
        return Layer(module, self.rank, self.eta2, self.by, generator, mask=mask)

    def layers(self, model, context):
        figures = _peft.place_map(model, adapters(model), "factor", lambda layer: float(layer.factor().mean()))
        return figures if self.by == "rows" else super().layers(model, context)

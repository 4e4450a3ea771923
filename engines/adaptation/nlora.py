"""NLoRA, SLoRA and IntTune: a small trained matrix between the low-rank factors, which are cut out of the weight itself."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters
from engines.adaptation._frozen import FrozenInput
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import Card, hyper, register


@register
class NLora(FrozenInput):
    """W + s B N A, N a small square; SLoRA draws A and N and sets B to zero, NLoRA cuts all three out of W, IntTune trains N.

    Source: NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models.
    """

    card = Card(
        id="nlora", name="NLoRA (SLoRA, IntTune)", family="adaptation",
        title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", year=2025,
        summary="Puts a small trained square between LoRA's factors and starts all three from rows and columns of the frozen "
                "matrix.",
        needs=("training data",),
        cannot=("does not make the model smaller or faster", "changes the model before the first step, unless residual is on "
                                        "(forms nlora and inttune)",
                "depends on the order of the neurons, since it takes the first rows and columns", "no separate adapter file "
                                        "after pruning"),
        trains=True,
        differs="The defaults are the released code's: the middle matrix is the corner of W itself, not its pseudo-inverse as in "
                "the Nyström formula, and the product is not taken out of W, so the model is changed at the start; how much is "
                "told in the log. The formula is corner = pinv, a start at the model is residual = true; neither is what the "
                "published figures come from.")

    claims = (
        Claim("above-lora", "Started from rows and columns of the weights it is above LoRA of the same rank (LLaMA2-7B on GSM8k: 57.70 %, 36 % more "
              "than LoRA), at r x r more parameters a matrix.", ours={"method": "nlora", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; rank 8 of 256 as 128 of 4096 there"),
        Claim("slora-above-lora", "A trained square between drawn factors alone is above LoRA of the same rank (LLaMA2-7B on GSM8k: 56.48 %, 33.5 % "
              "more than LoRA).", ours={"method": "nlora", "form": "slora", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; rank 8 of 256 as 128 of 4096 there"),
        Claim("inttune-above-lora", "IntTune, which trains only the middle square, is 7.45 % above LoRA on generation with 1.25 % of its parameters.",
              ours={"method": "nlora", "form": "inttune", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; 1.1 % of LoRA's parameters"),
    )

    form: str = hyper("nlora", "nlora: all three factors start from W; slora: drawn, B zero; inttune: start of nlora, only the "
                               "middle matrix is trained", choices=("nlora", "slora", "inttune"))
    rank: int = hyper(8, "Rank of every update and side of the middle matrix (the paper uses 128 on matrices of 4096); auto "
                         "takes the largest that obeys the limit on trainable "
                         "parameters", low=1, high=1024, lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means the rank, so a scale of one", low=0.0, high=4096.0)
    corner: str = hyper("copy", "Middle matrix at the start: the corner of W (copy, released code) or its pseudo-inverse (pinv, "
                                "the formula)",
                        choices=("copy", "pinv"))
    residual: bool = hyper(False, "Take the product at the start out of W, so that training begins at the model (not in the "
                                  "paper's code)")
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    @property
    def identity(self) -> bool:
        """Whether training starts exactly at the model."""
        return self.residual or self.form == "slora"

    @property
    def learning_rate(self) -> float:
        """Of the middle matrix alone the steps may be larger."""
        return 3e-2 if self.form == "inttune" else 5e-3

    def check(self, profile) -> None:
        super().check(profile)
        if self.form == "slora" and (self.residual or self.corner != "copy"):
            field = "residual" if self.residual else "corner"
            raise InputError(f"nlora.{field}", getattr(self, field), "SLoRA's update is drawn and starts at zero, so nothing "
                                        "comes from W",
                             f"Set {field} to {'false' if self.residual else 'copy'}, or the form to nlora")

    def count(self, matrix, size: int) -> int:
        return size * size + (0 if self.form == "inttune" else size * (matrix.out + matrix.inp))

    def frozen_numbers(self, matrix, size: int) -> int:
        factors = size * (matrix.out + matrix.inp) if self.form == "inttune" else size * matrix.inp * self.residual
        return factors + size * matrix.out * self.residual

    def inner_rank(self, size: int) -> int:
        return 2 * size if self.residual else size

    def extra_bytes(self, profile, batch, found) -> int:
        return 4 * sum(self.frozen_numbers(m, self.size()) for m in found)

    def footprint(self, profile, batch):
        return super().footprint(profile, batch) if self.form == "inttune" else AdapterMethod.footprint(self, profile, batch)

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.nlora import Structured
        scale = (self.alpha or self.rank) / self.rank
        return Structured(module, self.rank, scale, self.form, self.corner, self.residual, generator, mask=mask)

    def apply(self, model, context):
        model = super().apply(model, context)
        if not self.identity:
            with torch.no_grad():
                shift, name = max((_moved(layer), name) for name, layer in adapters(model))
            context.reporter.log(f"the start changes the model: {name} by {shift:.1%} of its length, the others by less")
        return model

    def layers(self, model, context):
        with torch.no_grad():
            return _peft.place_map(model, adapters(model), "change", _moved)


def _moved(layer) -> float:
    weight = layer.weight.float()
    return float((layer.effective() - weight).norm() / weight.norm().clamp_min(1e-12))

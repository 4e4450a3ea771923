"""Selective LoRA: every low-rank block has a trained score, and only blocks whose score passes a threshold act."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters, merge, save_lora
from engines.claim import Claim
from engines.errors import InputError
from engines.method import Card, hyper, register


@register
class SelectiveLora(AdapterMethod):
    """W + 1[s >= threshold] (alpha / rank) B A; the mean of |s| is added to the loss, so that blocks without use switch off.

    Source: Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation.
    """

    card = Card(
        id="selective-lora", name="Selective LoRA", family="adaptation",
        title="Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation", year=2025,
        summary="LoRA whose blocks switch themselves on and off by trained scores; those that are off at the end are dropped.",
        needs=("training data", "enough steps for scores to cross the threshold (about a hundred)"),
        cannot=("does not make the model smaller or faster", "cannot train packed int8 or int4 weights",
                "does not take a number of active blocks: the penalty decides", "no separate adapter file after pruning"),
        trains=True,
        differs="reconstructed from the abstract and from TAPS, on which it is based: one score for each adapted matrix, hard threshold with "
                "the gradient passed straight through (also while a block is off), penalty lambda times the mean of |s| after a warm-up "
                "that is a share of the budget (two epochs in TAPS). Factors of a block that is off get no gradient at all, so that "
                "AdamW's moments do not move them. Rank, targets and scale are LoRA's usual ones (a figure of the paper shows rank 128).")

    claims = (
        Claim("few-blocks", "About 5 % of the blocks are enough for effective fine-tuning (CLIP, DINO-ViT).",
              ours={"method": "selective-lora", "score_lr": 0.015}, against={"method": "lora"}, expect="not worse", margin=0.02,
              differs="a language model of 5.3 M parameters, 60 steps, the same rank without scores on the other side; the penalty and not "
                      "a number of blocks is given: with scores at a rate of their own it leaves one to three of 35 (3 to 9 %) at every rate "
                      "of the factors that is tried first"),
        Claim("forgetting", "Keeps zero-shot and out-of-distribution knowledge better than full fine-tuning (CLIP, DINO-ViT).",
              ours={"method": "selective-lora", "score_lr": 0.015}, against={"method": "full"}, measure="forgetting", elsewhere="python-code",
              differs="a language model of 5.3 M parameters that knows the standard library's source and is trained on its reference prose; "
                      "what it loses on held-out source modules stands for what CLIP loses on other images; 60 steps"),
    )

    rank: int = hyper(8, "Rank of every block; auto takes the largest that obeys the limit on trainable parameters", low=1, high=1024,
                      lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means twice the rank", low=0.0, high=4096.0)
    penalty: float = hyper(1.0, "Lambda: weight of the mean score in the loss; more switches more blocks off", low=0.0, high=1000.0)
    warmup: float = hyper(0.2, "Share of the budget before the penalty begins: until then no block has learned anything that could keep "
                               "it on", low=0.0, high=0.9)
    threshold: float = hyper(0.1, "A block acts while its score is at least this", low=0.0, high=10.0, advanced=True)
    start: float = hyper(0.15, "Score of every block at the start", low=0.0, high=10.0, advanced=True)
    score_rate: float = hyper(1.0, "Learning rate of the scores, relative to that of the factors", low=0.0, high=100.0, advanced=True)
    score_lr: float = hyper(0.0, "Learning rate of the scores by itself (TAPS has one, 0.01), on the schedule of the factors; 0 means score_rate "
                                 "times theirs", low=0.0, high=10.0, advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    def count(self, matrix, size: int) -> int:
        return super().count(matrix, size) + 1

    def check(self, profile) -> None:
        super().check(profile)
        if self.start < self.threshold:
            raise InputError("selective-lora.start", self.start, f"below the threshold of {self.threshold} every block is off and its factors cannot learn",
                             f"Give at least {self.threshold}")

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.selective import Gated
        return Gated(module, self.rank, (self.alpha or 2.0 * self.rank) / self.rank, self.start, self.threshold, generator, mask=mask)

    def parameter_groups(self, model, context):
        scores = [layer.score for _, layer in adapters(model)]
        known = {id(p) for p in scores}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": rest}, {"params": scores, "lr": self.score_lr, "lr_scale": self.score_rate, "weight_decay": 0.0}]

    def loss(self, model, loss, context):
        if not self.penalty or context.progress < self.warmup:
            return loss
        scores = [layer.score.abs() for _, layer in adapters(model)]
        return loss + self.penalty * sum(scores) / len(scores)

    def finish(self, model, context):
        found = adapters(model)
        active = [(name, layer) for name, layer in found if layer.on]
        context.reporter.event("choice", f"{len(active)} of {len(found)} blocks are active at the end ({100 * len(active) / len(found):.0f} %); the others "
                               "leave their matrices as they were", active=len(active), blocks=len(found))
        save_lora(model, context, [(name, layer.a.detach(), layer.b.detach() * layer.scale) for name, layer in active])
        return merge(model)

    def layers(self, model, context):
        return {**super().layers(model, context), **_peft.place_map(model, adapters(model), "score", lambda layer: layer.score.item())}

"""KD-LoRA: a small student learns from labels and from a teacher's soft labels, and only its low-rank updates are trained."""

from __future__ import annotations

import dataclasses

from engines import activations, cost
from engines.adaptation import _peft
from engines.adaptation.lora import Lora
from engines.claim import Claim
from engines.distillation import _teacher
from engines.errors import InputError
from engines.heads import has_head
from engines.lazy import torch
from engines.method import AUTO, Card, Method, hyper, register
from engines.profile import working_dtype

QUERY_VALUE = ("q_proj", "query", "q_lin", "query_proj", "v_proj", "value", "v_lin", "value_proj", "c_attn")


@register
class KdLora(Method):
    """weight T^2 KL(teacher || student at temperature T) + (1 - weight) cross-entropy, by LoRA on the query and value matrices.

    Source: KD-LoRA: A Hybrid Approach to Efficient Fine-Tuning with LoRA and Knowledge Distillation.
    """

    card = Card(
        id="kd-lora", name="KD-LoRA", family="distillation",
        title="KD-LoRA: A Hybrid Approach to Efficient Fine-Tuning with LoRA and Knowledge Distillation", year=2024,
        summary="Trains low-rank updates of a small student on the labels and on the soft labels of a fine-tuned teacher.",
        needs=("training data", "a teacher that was fine-tuned for this task, on this machine", "memory for the teacher beside the student"),
        cannot=("does not make the student smaller or faster: it is chosen small before", "cannot compare next tokens of different tokenizers",
                "cannot be better taught than the teacher knows", "no separate adapter file after pruning"),
        trains=True,
        differs="Soft labels belong to their example and the head is trained; the released script gives one teacher row to a whole batch and "
                "freezes the new head. Without a named teacher the model teaches itself as the stage finds it. Language models are served too, "
                "by the same term for every next token, computed anew since rows are cut differently in each pass.")

    claims = (
        Claim("above-lora-alone", "What a student learns from a teacher beside the labels lifts it: 98 % of LoRA's quality on GLUE at 40 % fewer "
              "parameters.", ours={"method": "kd-lora", "teacher": "stdlib-lm", "targets": "all-linear"},
              against={"method": "lora", "rank": 8, "dropout": 0.1}, data="python-code",
              before=({"method": "structured", "heads": 0.25, "channels": 0.4},),
              differs="the student is the bundled model after structured pruning and its teacher the same model before, as language models on "
                      "Python source, 60 steps; the other side is the same student by LoRA without a teacher"),
        Claim("above-lora-digits", "The same on classification, the paper's setting.", ours={"method": "kd-lora", "teacher": "digits-vit",
              "targets": "all-linear"}, against={"method": "lora", "rank": 8, "dropout": 0.1}, model="digits-vit", data="digits", batch=16,
              before=({"method": "structured", "heads": 0.5, "channels": 0.75},),
              differs="images of digits, a student by structured pruning, 60 steps; 120 images decide, which shows large differences only"),
        Claim("smaller-and-faster", "30 % less GPU memory than LoRA, and 30 % less time of inference than LoRA and full fine-tuning (BERT, RoBERTa, DeBERTaV3).",
              not_comparable="both come from the smaller student, which is chosen before the training; a claim starts both sides from one model"),
    )

    teacher: str = hyper("", "Model that teaches: a bundled id, or the folder of a fine-tuned model or of a run's export; empty: the model as this "
                             "stage finds it")
    weight: float = hyper(0.5, "Share of the teacher's soft labels in the loss; the rest is the true labels'", low=0.0, high=1.0)
    temperature: float = hyper(2.0, "Both predictions are softened by this before they are compared", low=0.1, high=100.0)
    rank: int = hyper(8, "Rank of every update; auto takes the largest that obeys the limit on trainable parameters", low=1, high=1024,
                      lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update; 0 means twice the rank", low=0.0, high=4096.0)
    dropout: float = hyper(0.1, "Dropout before the update, in training", low=0.0, high=0.9)
    targets: str = hyper("query-value", _peft.TARGETS_HELP + "; query-value: the query and value matrices, as in the paper")

    # -- from shapes -------------------------------------------------------------------------------------
    def student(self, found) -> Lora:
        """The LoRA of the student; ``found`` are its matrices."""
        targets = self.targets
        if targets == "query-value":
            targets = ",".join(dict.fromkeys(m.role for m in found if m.role.rsplit(".", 1)[-1] in QUERY_VALUE)) or targets
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=targets)

    def check(self, profile) -> None:
        try:
            self.student(profile.matrices).check(profile)
        except InputError as e:
            raise InputError(e.field.replace("lora.", "kd-lora.") if e.field.startswith("lora.") else e.field, e.value, e.problem, e.remedy) from None
        if self.teacher:
            _teacher.suits(_teacher.shapes(self.teacher, "kd-lora.teacher"), profile, self.teacher, "kd-lora.teacher")
        elif profile.task != "causal-lm" and not has_head(profile.config):
            raise self._headless()

    def _headless(self) -> InputError:
        return InputError("kd-lora.teacher", self.teacher, "the model has no trained head, so that it cannot teach itself",
                          "Name a model that was fine-tuned for this task, for example the export of a finished run")

    def fit(self, profile, budget):
        self.check(profile)
        chosen, reasons = self.student(profile.matrices).fit(profile, budget)
        return (self.replace(rank=chosen.rank), reasons) if self.rank == AUTO else (self, {})

    def footprint(self, profile, batch):
        made = self.student(profile.matrices).footprint(profile, batch)
        if not self.weight:
            return made
        teacher = _teacher.shapes(self.teacher, "kd-lora.teacher") if self.teacher else profile
        held = cost.held_bytes(teacher, working_dtype(teacher) if self.teacher else batch.weights)
        # The teacher's pass is over before the student's gradients are made; logits of both are held for one chunk.
        extra = activations.forward_bytes(teacher, batch) + made.logits
        flops = teacher.flops_per_token + teacher.attention_flops_per_token(batch.length)
        return dataclasses.replace(made, weights=made.weights + held, extra=made.extra + extra, flops_per_token=made.flops_per_token + flops)

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.models import matrices
        if self.weight and not self.teacher and context.stage == 0 and context.task != "causal-lm" and _teacher.new_head(context.profile.source):
            raise self._headless()      # a profile cannot tell: it has the head that loading added
        seat = Seat(self, model, context) if self.weight else None
        model = self.student([m for m, _ in matrices(model)]).apply(model, context)
        if seat is not None:
            seat.listen(model)
        object.__setattr__(model, "_fettle_seat", seat)
        return model

    def loss(self, model, loss, context):
        if model._fettle_seat is None:
            return loss
        return (1.0 - self.weight) * loss + self.weight * model._fettle_seat.soft()

    def finish(self, model, context):
        if model._fettle_seat is not None:
            model._fettle_seat.hook.remove()
        object.__delattr__(model, "_fettle_seat")
        context.state.pop("teacher", None)
        return Lora().finish(model, context)

    def layers(self, model, context):
        return Lora().layers(model, context)


class Seat:
    """Keeps what the student was shown and said in a micro-batch, and asks the teacher about it."""

    def __init__(self, method: KdLora, model, context):
        self.method, self.context, self.seen = method, context, None
        self.teacher = _teacher.Teacher(method.teacher, model, context, "kd-lora.teacher")

    def listen(self, model) -> None:
        """Hear every pass in training, of the body where the loss makes the logits itself."""
        from engines.training.loss import plain_head
        self.chunked = self.context.task == "causal-lm" and plain_head(model) is not None and plain_head(self.teacher.model) is not None
        self.model = model
        direct = self.context.task == "causal-lm" and plain_head(model) is not None
        heard = getattr(model, model.base_model_prefix) if direct else model
        self.direct = direct

        def keep(module, args, kwargs, output):
            if module.training and torch.is_grad_enabled():
                self.seen = (kwargs, output)
        self.hook = heard.register_forward_hook(keep, with_kwargs=True)

    def soft(self):
        """The soft term of the micro-batch that has just been computed."""
        from engines.losses.soft import chunked_soft_loss, soft_loss
        (inputs, output), self.seen, t = self.seen, None, self.method.temperature
        if self.context.task != "causal-lm":
            return soft_loss(output.logits, self.teacher.labels(inputs), t)
        teacher, ids = self.teacher.model, inputs["input_ids"]
        if self.chunked:
            with torch.no_grad():
                other = getattr(teacher, teacher.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden, head = output.last_hidden_state.flatten(0, 1), self.model.get_output_embeddings().weight
            kind = hidden.device.type
            hidden = hidden.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype)
            return chunked_soft_loss(hidden, head, other, teacher.get_output_embeddings().weight, t)
        with torch.no_grad():
            other = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        mine = self.model.get_output_embeddings()(output.last_hidden_state) if self.direct else output.logits
        return soft_loss(mine.flatten(0, 1), other, t)

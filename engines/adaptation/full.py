"""Full fine-tuning: every parameter gets a gradient."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _whole
from engines.errors import InputError
from engines.method import Card, Footprint, Method, hyper, register
from engines.profile import BYTES

EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embeddings")


@register
class Full(Method):
    """Every weight gets a gradient; weights, gradients and moments have the type in which the model is held."""

    card = Card(
        id="full", name="Full fine-tuning", family="adaptation", title="Fine-tuning of all parameters",
        summary="Trains every parameter of the model, or a new model of the same shape from random weights.",
        needs=("training data", "memory for gradients and two moments of every parameter"),
        cannot=("cannot obey a limit on trainable parameters", "cannot train packed int8 or int4 weights",
                "does not make the model smaller or faster"),
        trains=True)

    from_scratch: bool = hyper(False, "Start from new random weights of the same shape instead of the trained ones")
    keep_mask: bool = hyper(True, "Zeros that an earlier pruning stage left stay zero")
    freeze_embeddings: bool = hyper(False, "Leave token and position embeddings as they are (a tied output layer too)")

    def _trainable(self, profile) -> int:
        if not self.freeze_embeddings:
            return profile.parameters
        return sum(t.size for t in profile.tensors if not is_embedding(t.name))

    def check(self, profile) -> None:
        _whole.refuse_packed(self, profile)
        if self._trainable(profile) == 0 and profile.tensors:
            raise InputError("full.freeze_embeddings", True, "nothing but embeddings is in this model", "Set it to false")

    def fit(self, profile, budget):
        _whole.refuse_limit(self, profile, budget, self._trainable(profile))
        return self, {}

    def footprint(self, profile, batch) -> Footprint:
        return Footprint(**cost.with_training(profile, batch, trainable=self._trainable(profile), frozen=False, backward=2.0,
                                              size=BYTES.get(batch.weights, 4)))

    def apply(self, model, context):
        from engines.lazy import torch
        if self.from_scratch:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.generator(2).initial_seed())
                renew(model)
            context.masks.clear()
        if not self.keep_mask:
            context.masks.clear()
        for name, p in model.named_parameters():
            p.requires_grad_(not (self.freeze_embeddings and is_embedding(name)))
        return model


def is_embedding(name: str) -> bool:
    """Token, position, type and patch embeddings; a tied output layer is the same tensor."""
    return any(part in EMBEDDINGS for part in name.split("."))


def renew(model) -> None:
    """Draw new random weights in place, as transformers initialises a model of this config."""
    fresh = type(model)(model.config)
    state = fresh.state_dict()
    own = model.state_dict()
    changed = [n for n, t in own.items() if n in state and state[n].shape != t.shape]
    if changed:
        raise InputError("full.from_scratch", True, f"the shapes of this pruned model (first {changed[0]}) are not those of its config",
                         "Start from the model before structured pruning")
    model.load_state_dict(state)

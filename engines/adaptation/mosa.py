"""MoSA: an adapter beside every MLP whose matrices are split among experts that train in turn and become one adapter."""

from __future__ import annotations

import dataclasses
import re
import types

from engines import cost
from engines.adaptation import _peft
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, Footprint, Method, hyper, register
from engines.profile import ADDED, Tensor

PLACES = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), dict(how="norm", mlp="mlp", norm="post_attention_layernorm")),
          "gpt2": dict(how="norm", mlp="mlp", norm="ln_2"), "vit": dict(how="norm", mlp="mlp", norm="layernorm_after"),
          **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), dict(how="residual", mlp="output")),
          "distilbert": dict(how="input", mlp="ffn")}
"""Architecture -> where an adapter reads a block's stream before its MLP, and where it is added."""


@register
class Mosa(Method):
    """out = MLP(norm(h)) + s Up(GELU(Down(norm'(h)))) + h; entries of Up and / or Down are shared out among experts drawn at random.

    Source: Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training.
    """

    card = Card(
        id="mosa", name="MoSA (Mixture of Sparse Adapters)", family="adaptation",
        title="Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training", year=2023,
        summary="Trains disjoint parts of a bottleneck adapter on random turns, so that they do not learn the same, and merges them into one.",
        needs=("training data", "time for two forward and backward passes a step while consistency is on"),
        cannot=("does not merge into the model's weights: its adapters are nonlinear and stay, about one percent more to compute",
                "exports in the native format only: plain transformers and peft have no such layer",
                "does not make the model smaller or faster", "serves only architectures whose blocks it knows"),
        trains=True,
        differs="The parallel adapter with its own norm, as the released code has it; not its sequential and LoRA forms. Entries of one expert are one "
                "parameter, so those that were not drawn rest, as meant by the paper; a split Down gets no weight decay. The second pass adds "
                "the symmetric KL only (its cross-entropy has weight 0 in all scripts). For language models the KL is over every next token. "
                "In several processes each draws its own experts.")

    claims = (
        Claim("above-adapter", "Above the same adapter trained whole on 27 visual tasks (no figure in the abstract).",
              ours={"method": "mosa", "bottleneck": 16}, against={"method": "mosa", "bottleneck": 16, "experts": 1, "consistency": 0.0},
              rates=(1.0, 3.0),
              differs="a language model of 5.3 M parameters on Python's reference prose (the bundled image task is solved already), equal steps, so "
                      "twice the passes, against the same adapter with one expert and no second pass"),
        Claim("as-small", "No more trained parameters than the plain adapter.", measure="trainable", expect="at most", factor=1.0, steps=24,
              ours={"method": "mosa", "bottleneck": 16}, against={"method": "mosa", "bottleneck": 16, "experts": 1, "consistency": 0.0},
              differs="a small language model; the counts follow from shapes alone"),
    )

    bottleneck: int = hyper(16, "Width inside each adapter (the paper uses 64, and 16 for little data); auto takes the largest that obeys the "
                                "limit on trainable parameters", low=1, high=1024, lever="trainable", log=True)
    experts: int = hyper(4, "Parts into which a matrix is split; 1 trains the plain adapter", low=1, high=64)
    whole: str = hyper("down", "Which matrix stays whole and is trained in every pass: down, up or none", choices=("down", "up", "none"))
    scale: float = hyper(0.1, "What the adapter's output is multiplied with", low=0.001, high=10.0, log=True)
    dropout: float = hyper(0.1, "Dropout inside the adapter, in training", low=0.0, high=0.9)
    consistency: float = hyper(1.0, "Weight of the KL between two passes with other experts; 0 saves the second pass", low=0.0, high=100.0)

    # A language model's adapters, scaled by a tenth, have far to go: 1.49 bits/byte after 60 steps instead of 1.55.
    learning_rate = {"causal-lm": 4.5e-2, "": 5e-3}

    # -- from shapes -------------------------------------------------------------------------------------
    def check(self, profile) -> None:
        if profile.architecture not in PLACES:
            raise InputError("mosa.bottleneck", self.bottleneck, f"where the MLP of a {profile.architecture} block begins is not known",
                             "Use one of " + ", ".join(PLACES) + ", or a method that wraps matrices such as lora")
        if not blocks_of(profile):
            raise InputError("mosa", profile.source, "the model has no blocks beside whose MLP an adapter could stand", "Choose a transformer with blocks")
        if any(ADDED in t.name for t in profile.tensors):
            raise InputError("model", profile.source, "it carries adapters of this method already", "Start from the model before, or train on with full")
        if self.bottleneck != AUTO and self.bottleneck > profile.hidden:
            raise InputError("mosa.bottleneck", self.bottleneck, f"the model is {profile.hidden} wide, so this is no bottleneck",
                             f"Choose at most {profile.hidden}")

    def trained(self, profile, size: int) -> int:
        return max(1, profile.layers) * self._one(profile, size) + _peft.head_parameters(profile)

    def _one(self, profile, size: int) -> int:
        return 2 * profile.hidden * size + size + 3 * profile.hidden

    def size(self) -> int:
        return 16 if self.bottleneck == AUTO else self.bottleneck

    def fit(self, profile, budget):
        self.check(profile)
        if self.bottleneck != AUTO:
            return self, {}
        size, why = _peft.largest(profile, budget, blocks_of(profile), _peft.ranks_up_to(profile.hidden), lambda n: self.trained(profile, n),
                                  field="bottleneck", usual=16)
        return self.replace(bottleneck=size), {"bottleneck": why}

    def result_profile(self, profile):
        """The profile with the tensors of the adapters, which stay."""
        d, b, out = profile.hidden, self.size(), list(profile.tensors)
        kind = cost.stored_dtype(profile)
        for block in blocks_of(profile):
            for name, shape in (("gain", (d,)), ("offset", (d,)), ("down", (b, d)), ("down_bias", (b,)), ("up", (d, b)), ("up_bias", (d,))):
                out.append(Tensor(f"{block}{ADDED}adapter.{name}", shape, kind))
        return dataclasses.replace(profile, tensors=tuple(out))

    def footprint(self, profile, batch) -> Footprint:
        d, b, passes = profile.hidden, self.size(), 2 if self.consistency else 1
        trainable, layers = self.trained(profile, b), max(1, profile.layers)
        weights = cost.held_bytes(profile, batch.weights)
        if batch.compute == "bfloat16" and batch.weights == "float32":
            weights -= 2 * profile.block_parameters
        parts = cost.with_training(profile, batch, trainable=trainable, frozen=True, backward=1.0, weights=weights, adapter=4 * trainable, adapted=())
        tokens = batch.rows * (profile.context if profile.task == "image-classification" else batch.length)
        each = tokens * (8 * d + (3 if self.dropout else 2) * b * (2 if batch.compute == "bfloat16" else 4))
        split = 0 if self.experts == 1 else (1 if self.whole != "none" else 2) * d * b
        parts["activations"] = passes * (parts["activations"] + (each if batch.checkpointing else layers * (each + 4 * split)))
        if passes > 1 and profile.task == "causal-lm":
            # Of the agreement: both log-probabilities, their difference and its half of a chunk at a time, and the gradients of two hidden states.
            parts["logits"] = max(parts["logits"], 18 * min(tokens, 256) * profile.vocab + 12 * tokens * d)
        else:
            parts["logits"] *= passes
        # The starts and owners of split matrices, and one mask at a time.
        parts["extra"] = layers * 5 * split + split
        parts["flops_per_token"] = passes * (parts["flops_per_token"] + layers * 12.0 * d * b)
        after = self.result_profile(profile)
        return Footprint(**{**parts, **cost.result_of(after)})

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.layers.parallel import ParallelAdapter
        self.check(context.profile)
        _peft.prepare(model, context, [m.name for m in context.profile.matrices])
        generator, held = context.generator(1), next(model.parameters())
        place = PLACES[context.profile.architecture]
        for path in blocks_of(context.profile):
            adapter = ParallelAdapter(context.profile.hidden, self.bottleneck, self.scale, dropout=self.dropout, **place)
            adapter.routes = 2 if self.consistency else 1
            adapter.reset(generator)
            for name in ("down", "up") if self.experts > 1 else ():
                if name != self.whole:
                    adapter.split(name, self.experts, generator)
            adapter.to(held.device).attach(model.get_submodule(path))
        _peft.free_head(model, context)
        if self.consistency:
            _double(model, context)
        return model

    def loss(self, model, loss, context):
        from engines.training import distributed
        if distributed.current() is not None:
            # Gradients are added up over the processes, which have drawn other experts: all must have the same ones.
            for p in model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        if not self.consistency:
            return loss
        from engines.losses.consistency import chunked_symmetric_kl, symmetric_kl
        from engines.training.loss import plain_head
        tape = model._fettle_tape
        (first, second), tape.halves = tape.halves, None
        if tape.name == "last_hidden_state":
            weight = plain_head(model).weight
            kind = loss.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
            a, b = (half.flatten(0, 1).to(dtype) for half in (first, second))
            term = chunked_symmetric_kl(a, b, weight.to(dtype))
        else:
            a, b = (half.flatten(0, -2) for half in (first, second))
            term = symmetric_kl(a, b)
        return loss + self.consistency * term

    def after_backward(self, model, context) -> None:
        from engines.models import added
        from engines.training import distributed
        if distributed.current() is None:
            return
        # Experts that no process has drawn rest, as with one process: an optimizer's momentum moves whatever has a gradient, also of zeros.
        for module in added.modules(model).values():
            for p in module.experts():
                if p.grad is not None and not p.grad.any():
                    p.grad = None

    def finish(self, model, context):
        from engines.models import added, matrices
        tape = model.__dict__.pop("_fettle_tape", None)
        if tape is not None:
            for hook in tape.hooks:
                hook.remove()
        if context.folder is not None:
            context.reporter.log("no separate adapter: peft has no layer of this kind; the saved model carries the adapters")
        for module in added.modules(model).values():
            module.settle()
        _peft.restore(model, [(m.name, module) for m, module in matrices(model)])
        kept = model._fettle_kept.dtypes
        for name, p in model.named_parameters():
            p.data = p.data.to(kept.get(name, next(iter(kept.values()))))
            p.requires_grad_(True)
        object.__delattr__(model, "_fettle_kept")
        return model

    def layers(self, model, context):
        """How large each adapter's product has become."""
        from engines.models import added
        rows = []
        with torch.no_grad():
            for path, module in added.modules(model).items():
                down, up = (getattr(module, n).merged() if hasattr(getattr(module, n), "merged") else getattr(module, n) for n in ("down", "up"))
                number = int(re.search(r"\.(\d+)\.", path).group(1))
                rows.append([number, "adapter", float(module.scale * torch.linalg.norm(up.float() @ down.float()))])
        return {"adapter": rows} if rows else {}


def blocks_of(profile) -> list[str]:
    """Paths of the blocks, in order."""
    found = {}
    for m in profile.matrices:
        found.setdefault(m.layer, re.match(r"(.*?\.\d+)\.", m.name).group(1))
    return [found[i] for i in sorted(found)]


def _double(model, context) -> None:
    """In training show every batch twice in one pass, the halves on routes of their own; the task's loss gets the first half alone.

    Two passes one after the other compute the same, with twice as many and half as large operations.
    """
    from engines.training.loss import plain_head, unwrap
    base = unwrap(model)
    hidden = context.task == "causal-lm" and plain_head(model) is not None
    target, name = (getattr(base, base.base_model_prefix), "last_hidden_state") if hidden else (base, "logits")
    tape = types.SimpleNamespace(name=name, halves=None)

    def twice(value):
        return torch.cat([value, value]) if torch.is_tensor(value) else value

    def before(module, given, named):
        if module.training and torch.is_grad_enabled():
            return tuple(map(twice, given)), {k: twice(v) for k, v in named.items()}

    def after(module, given, named, out):
        if module.training and torch.is_grad_enabled():
            tape.halves = getattr(out, name).chunk(2)
            setattr(out, name, tape.halves[0])
    tape.hooks = [target.register_forward_pre_hook(before, with_kwargs=True), target.register_forward_hook(after, with_kwargs=True)]
    object.__setattr__(model, "_fettle_tape", tape)

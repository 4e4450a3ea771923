"""The life of an adapter that peft does not have: targets, lever, footprint, insertion, merging, export as a LoRA.

A method derives from ``AdapterMethod``, declares its fields (``rank`` and ``targets`` among them, where it has them) and says
three things: how many parameters one matrix trains (``count``), which layer replaces it (``build``), and, where the layer is an
``engines.layers.adapter.Adapter`` with factors, nothing more: fitting, forecast, masks, merging and the peft file follow.
"""

from __future__ import annotations

import re

from engines.adaptation import _peft
from engines.adaptation.lora import adapter_footprint
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Method


class AdapterMethod(Method):
    """Base of methods that wrap chosen linear layers; not registered itself."""

    size_field = "rank"
    """The hyperparameter that decides the number of trained parameters: the lever of ``trainable``."""

    # -- from shapes -------------------------------------------------------------------------------------
    def count(self, matrix, size: int) -> int:
        """Trained parameters of one matrix when ``size_field`` is ``size``."""
        raise NotImplementedError

    def extra_bytes(self, profile, batch, found) -> int:
        """Work space beside weights, gradients and moments: frozen bases, statistics."""
        return 0

    def inner_rank(self, size: int) -> int:
        """Width of the activations that the adapter adds, for the forecast of memory."""
        return size

    def top(self, found) -> int:
        """The largest value of ``size_field`` that every matrix allows."""
        return min(min(m.out, m.inp) for m in found)

    def targeted(self, profile) -> list:
        return _peft.targeted(profile, getattr(self, "targets", "all-linear"))

    def trained(self, profile, size: int | None = None) -> int:
        """Trained parameters of the whole model, the classification head included."""
        size = self.size() if size is None else size
        return sum(self.count(m, size) for m in self.targeted(profile)) + _peft.head_parameters(profile)

    def size(self) -> int:
        value = getattr(self, self.size_field)
        return 8 if value == AUTO else value

    def check(self, profile) -> None:
        _peft.check_rank(self.card.id, self.size_field, getattr(self, self.size_field), self.targeted(profile),
                         getattr(self, "targets", "all-linear"))

    def fit(self, profile, budget):
        self.check(profile)
        if getattr(self, self.size_field) != AUTO:
            return self, {}
        value, why = self.largest(profile, budget)
        chosen = self.replace(**{self.size_field: value})
        chosen.check(profile)
        return chosen, {self.size_field: why}

    def allowed(self, found, size: int) -> bool:
        """Whether every matrix can be served at this size; for methods whose size must divide something."""
        return True

    usual = 8
    """Size where no limit says otherwise."""

    def largest(self, profile, budget) -> tuple[int, str]:
        """The largest size that obeys ``budget.trainable``, and the reason in words.

        Raises:
            InputError: not even the smallest fits.
        """
        found, field = self.targeted(profile), self.size_field
        able = [n for n in range(1, min(self.top(found), 1024) + 1) if self.allowed(found, n)]
        limit = budget.trainable_count(profile.parameters)
        if limit is None:
            return max(n for n in able if n <= max(self.usual, able[0])), f"no limit on trainable parameters: the usual {field}"
        fitting = [n for n in able if self.trained(profile, n) <= limit]
        if not fitting:
            raise InputError("budget.trainable", budget.trainable, f"{field} {able[0]} on {len(found)} matrices already trains "
                             f"{self.trained(profile, able[0]):,} parameters, the limit is {limit:,}", "Raise the limit, or adapt fewer matrices with targets")
        best = max(fitting)
        more = [n for n in able if n > best]
        why = f"{self.trained(profile, best):,} trainable parameters obey the limit of {limit:,}"
        return best, why + (f"; {field} {more[0]} would need {self.trained(profile, more[0]):,}" if more else "; no matrix allows more")

    def footprint(self, profile, batch):
        found = self.targeted(profile)
        return adapter_footprint(profile, batch, found, self.inner_rank(self.size()), self.trained(profile),
                                 extra=self.extra_bytes(profile, batch, found))

    # -- in a live model ---------------------------------------------------------------------------------
    def build(self, matrix, module, context, generator, mask):
        """The ``Adapter`` that takes the place of ``module``.

        Args:
            matrix: its ``engines.profile.Matrix``.
            generator: a torch.Generator of this stage, to be drawn from in the order of the matrices.
            mask: as ``Adapter`` takes it.
        """
        raise NotImplementedError

    def apply(self, model, context):
        from engines.models import matrices
        named = matrices(model)
        found = _peft.choose([m for m, _ in named], getattr(self, "targets", "all-linear"), tuple(dict.fromkeys(m.role for m, _ in named)))
        names = {m.name for m in found}
        self.prepare(model, context, [(m, module) for m, module in named if m.name in names])
        wrap(model, context, [(m, module) for m, module in named if m.name in names], self.build)
        return model

    def prepare(self, model, context, chosen) -> None:
        """Freeze the model; override to look at data or weights first (then call this)."""
        _peft.prepare(model, context, [m.name for m, _ in chosen])

    def finish(self, model, context):
        save_lora(model, context)
        return merge(model)

    def layers(self, model, context):
        return _peft.place_map(model, adapters(model), "rank", lambda layer: _rank(layer))


def _rank(layer) -> int | None:
    if not hasattr(layer, "factors"):
        return None
    a, _, _ = layer.factors()
    return int(a.shape[0])


def adapters(model) -> list:
    """(name of the layer, adapter) for every adapter of a live model."""
    from engines.layers.adapter import Adapter
    return [(n, m) for n, m in model.named_modules() if isinstance(m, Adapter)]


def wrap(model, context, chosen, build) -> None:
    """Put ``build(matrix, module, context, generator, mask)`` in the place of every chosen module; free the head."""
    generator = context.generator(1)
    for matrix, module in chosen:
        mask = context.masks.get(f"{matrix.name}.weight")
        if mask is not None:
            mask = (mask.t() if matrix.conv1d else mask).to(module.weight.device)
        layer = build(matrix, module, context, generator, mask).to(module.weight.device)
        parent, _, leaf = matrix.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    _peft.free_head(model, context)


def merge(model):
    """Store every changed weight in its plain layer and take the adapters out; masked entries stay exactly zero."""
    _peft.restore(model, adapters(model))
    with torch.no_grad():
        for name, layer in adapters(model):
            new, bias = layer.masked(), layer.changed_bias()
            layer.base.weight.data = (new.t() if layer.conv1d else new).contiguous()
            if bias is not None and bias is not layer.base.bias:
                layer.base.bias.data = bias.detach().clone()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)
    return _peft.release(model)


def save_lora(model, context, found: list | None = None) -> None:
    """Write the updates as a plain LoRA adapter that peft loads, where they have factors and the base is the run's own.

    Args:
        found: (name, a [rank, in], b [out, rank]) with the scale inside b; None reads them from the adapters.
    """
    if context.folder is None:
        return
    layers = adapters(model)
    if found is None:
        if not layers or not all(hasattr(layer, "factors") for _, layer in layers):
            context.reporter.log("no separate adapter: this update is not of the form that peft stores; the merged model is complete")
            return
        found = []
        for name, layer in layers:
            a, b, scale = layer.factors()
            found.append((name, a.detach(), b.detach() * scale))
    if context.stage > 0:
        context.reporter.log("no separate adapter: it belongs to what the stages before made of the model; the merged model is complete")
        return
    if any(layer.mask is not None for _, layer in layers):
        context.reporter.log("no separate adapter: a peft adapter would fill the pruned zeros again; the merged model keeps them")
        return
    from peft import LoraConfig
    from safetensors.torch import save_file
    folder = context.folder / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    found = [(n, a, b) for n, a, b in found if a.shape[0]]
    if not found:
        return
    ranks = {n: int(a.shape[0]) for n, a, _ in found}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {n: r for n, r in ranks.items() if r != usual}
    state = {}
    for name, a, b in found:
        state[f"base_model.model.{name}.lora_A.weight"] = a.float().cpu().contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = b.float().cpu().contiguous()
    heads = {}
    if context.task != "causal-lm":
        heads = {n: p for n, p in model.named_parameters() if n.split(".", 1)[0] in _peft.HEADS}
    state.update({f"base_model.model.{n}": p.detach().cpu().contiguous() for n, p in heads.items()})
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # alpha equals the rank everywhere, so that peft multiplies by one: the scale is inside the factor.
    config = LoraConfig(r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=dict(other), target_modules=sorted(ranks), bias="none",
                        fan_in_fan_out=any(layer.conv1d for _, layer in layers))
    config.modules_to_save = sorted({n.split(".", 1)[0] for n in heads}) or None
    config.base_model_name_or_path = getattr(context.profile, "source", None)
    config.inference_mode = True
    config.save_pretrained(folder)


def number_of(name: str) -> int:
    """Index of the block in a module path; 0 when there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else 0

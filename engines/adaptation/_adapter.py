"""The life of an adapter that peft does not have: targets, lever, footprint, insertion, merging, export as a LoRA.

A method derives from ``AdapterMethod``, declares its fields (``rank`` and ``targets`` among them, where it has them) and says
which layer replaces a matrix (``build``) and, where that is not two factors, how many parameters it trains (``count``). Where the layer
is an ``engines.layers.adapter.Adapter`` with factors it says nothing more: fitting, forecast, masks, merging and the peft file follow.
"""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation.lora import adapter_footprint
from engines.lazy import torch
from engines.method import AUTO, Method


class AdapterMethod(Method):
    """Base of methods that wrap chosen linear layers; not registered itself."""

    size_field = "rank"
    """The hyperparameter that decides the number of trained parameters: the lever of ``trainable``."""

    # -- from shapes -------------------------------------------------------------------------------------
    def count(self, matrix, size: int) -> int:
        """Trained parameters of one matrix when ``size_field`` is ``size``; here those of two factors [size, in] and [out, size]."""
        return size * (matrix.out + matrix.inp)

    def extra_bytes(self, profile, batch, found) -> int:
        """Work space beside weights, gradients and moments: frozen bases, statistics."""
        return 0

    def inner_rank(self, size: int) -> int:
        """Width of the activations that the adapter adds, for the forecast of memory."""
        return size

    def top(self, found) -> int:
        """The largest value of ``size_field`` that every matrix allows."""
        return min(min(m.out, m.inp) for m in found)

    def pick(self, found, roles) -> list:
        """Those of the matrices ``found`` that are adapted; ``roles`` are the model's."""
        return _peft.choose(found, getattr(self, "targets", "all-linear"), roles)

    def targeted(self, profile) -> list:
        return self.pick(profile.matrices, profile.roles)

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
        """The largest size that obeys ``budget.trainable``, and the reason in words; raises ``InputError`` when none does."""
        found = self.targeted(profile)
        able = [n for n in _peft.ranks_up_to(self.top(found)) if self.allowed(found, n)]
        return _peft.largest(profile, budget, found, able, lambda n: self.trained(profile, n), field=self.size_field, usual=self.usual)

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
        found = self.pick([m for m, _ in named], tuple(dict.fromkeys(m.role for m, _ in named)))
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
    layers = adapters(model)
    if not _peft.keeps_adapter(context, any(layer.mask is not None for _, layer in layers)):
        return
    if found is None:
        if not layers or not all(hasattr(layer, "factors") for _, layer in layers):
            context.reporter.log("no separate adapter: this update is not of the form that peft stores; the merged model is complete")
            return
        found = []
        for name, layer in layers:
            a, b, scale = layer.factors()
            found.append((name, a.detach(), b.detach() * scale))
    found = [(n, a, b) for n, a, b in found if a.shape[0]]
    if not found:
        return
    from peft import LoraConfig
    ranks = {n: int(a.shape[0]) for n, a, _ in found}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {n: r for n, r in ranks.items() if r != usual}
    state = {}
    for name, a, b in found:
        state |= {f"{name}.lora_A.weight": a.float(), f"{name}.lora_B.weight": b.float()}
    # A changed bias goes into the adapter's second factor, which peft gives to all layers or to none.
    shifts = {n: layer.changed_bias().detach().float() - layer.base.bias.detach().float() for n, layer in layers
              if layer.changed_bias() is not layer.base.bias}
    if shifts:
        state |= {f"{n}.lora_B.bias": shifts.get(n, torch.zeros(len(b))) for n, _, b in found}
    # alpha equals the rank everywhere, so that peft multiplies by one: the scale is inside the factor.
    config = LoraConfig(r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=dict(other), target_modules=sorted(ranks), bias="none",
                        lora_bias=bool(shifts), fan_in_fan_out=any(layer.conv1d for _, layer in layers))
    _peft.write_adapter(model, context, config, state)


def change_map(model, change=None) -> dict[str, list]:
    """Layer map of how far each matrix has moved, relative to its norm; ``change(layer)`` where a layer knows it more cheaply."""
    def moved(layer) -> float:
        weight = layer.weight.float()
        return float((layer.effective() - weight).norm() / weight.norm())
    with torch.no_grad():
        return _peft.place_map(model, adapters(model), "change", change or moved)

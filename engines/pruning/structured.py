"""Structured pruning: whole attention heads and MLP channels are removed, and the tensors become smaller."""

from __future__ import annotations

from engines import activations, cost
from engines.errors import InputError, StopRequested
from engines.lazy import F, torch
from engines.method import AUTO, Card, Footprint, Method, hyper, register
from engines.profile import Batch
from engines.pruning import _shrink


@register
class Structured(Method):
    """Removes the least important heads and channels of every block, the same number in each, so that the result is an
    ordinary smaller model.

    Sources: Are Sixteen Heads Really Better than One? (importance of heads by gradients); Importance Estimation for Neural
    Network Pruning (the same for channels); LLM-Pruner: On the Structural Pruning of Large Language Models (coupled groups).
    """

    card = Card(
        id="structured", name="Structured pruning", family="pruning",
        title="LLM-Pruner: On the Structural Pruning of Large Language Models", year=2023,
        summary="Removes whole attention heads and MLP channels: fewer bytes and faster everywhere, without special kernels.",
        needs=("calibration sequences from the training data (criteria activation and taylor)", "recovery training afterwards (lora or full)"),
        cannot=("loses more quality than single zeros at the same share", "GPT-2 and BERT with fewer heads load here only, not in plain transformers",
                "embeddings and the output layer keep their size", "cannot prune packed int8 or int4 weights"),
        shrinks=True,
        differs="The same count in every block, because one config.json has one count. Heads of llama-like models keep a number that "
                "divides the width; key-value groups are removed whole where the count allows. Taylor importance of a classifier "
                "uses its own predictions as labels. Nothing is retrained inside the stage.")

    heads: float = hyper(0.5, "Share of attention heads removed; auto follows the size limit", low=0.0, high=0.95, lever="size_mb")
    channels: float = hyper(0.5, "Share of MLP channels removed; auto follows the size limit", low=0.0, high=0.95, lever="size_mb")
    criterion: str = hyper("activation", "Importance: l2 norm of the weights, weights times the norm of what flows through them, or "
                                         "taylor (change of the loss to first order)", choices=("l2", "activation", "taylor"))
    samples: int = hyper(64, "Calibration sequences", low=1, high=4096)
    length: int = hyper(0, "Tokens of a calibration sequence; 0 takes the data's own length", low=0, high=32768, unit="tokens")
    multiple: int = hyper(8, "Channels are kept in multiples of this, which suits the kernels", low=1, high=256, advanced=True)

    # -- before the run ----------------------------------------------------------------------------------
    def check(self, profile) -> None:
        if not profile.matrices:
            raise InputError("model", profile.source, "it has no dense matrices inside blocks (perhaps they are packed already)",
                             "Start from a model that is not quantized")
        _shrink.anatomy(profile)

    def plan(self, profile):
        """(anatomy, key-value heads, query heads for each, channels) that are kept; ``auto`` counts as one half."""
        a = _shrink.anatomy(profile)
        heads = 0.5 if self.heads == AUTO else self.heads
        channels = 0.5 if self.channels == AUTO else self.channels
        return a, *_shrink.nearest_heads(profile, a, heads), _shrink.nearest_channels(a.mlp, channels, self.multiple)

    def result_profile(self, profile):
        """The profile of the model that this stage leaves."""
        return _shrink.smaller(profile, *self.plan(profile))

    def fit(self, profile, budget):
        self.check(profile)
        auto = [name for name in ("heads", "channels") if getattr(self, name) == AUTO]
        chosen, reasons = self, {}
        if auto and budget.size_mb is None:
            chosen = self.replace(**dict.fromkeys(auto, 0.5))
            reasons = dict.fromkeys(auto, "no limit on size: one half")
        elif auto:
            limit = budget.size_mb * 1e6
            low, high = -1, 95          # the size falls with the share, so the edge is bisected in hundredths
            while high - low > 1:
                middle = (low + high) // 2
                fits = self.replace(**dict.fromkeys(auto, middle / 100))._size(profile) <= limit
                low, high = (low, middle) if fits else (middle, high)
            chosen = self.replace(**dict.fromkeys(auto, high / 100))
            size = chosen._size(profile)
            if size > limit:
                raise InputError("budget.size_mb", budget.size_mb, f"with 95 % of {' and '.join(auto)} removed the model still takes "
                                 f"{size / 1e6:.2f} MB, most of it in embeddings", "Raise the limit, or quantize with int8 or int4 instead")
            reasons = dict.fromkeys(auto, f"{size / 1e6:.2f} MB obey the limit of {budget.size_mb:g} MB")
        a, kv, group, _ = chosen.plan(profile)
        asked = a.heads * (1 - chosen.heads)
        if abs(kv * group - asked) > 0.5:
            why = f"{kv * group} of {a.heads} heads are kept: the nearest number that the architecture allows"
            reasons["heads"] = f"{reasons['heads']}; {why}" if "heads" in reasons else why
        return chosen, reasons

    def _size(self, profile) -> int:
        return cost.stored_file(profile, _shrink.smaller_tensors(profile, *self.plan(profile)))

    def footprint(self, profile, batch) -> Footprint:
        length = self.length or min(profile.context, 2048, batch.length)
        after = self.result_profile(profile)
        data = self.criterion != "l2"
        found = cost.without_training(profile, batch, extra=8 * cost.largest_matrix(profile), sequences=self.samples if data else 0,
                                      length=length if data else 0, passes=3.0 if self.criterion == "taylor" else 2.0)
        parts = {**found.__dict__, **cost.result_of(after)}
        if self.criterion == "taylor":
            rows = Batch(rows=min(4, self.samples), length=length, weights=batch.weights)
            parts.update(activations=activations.train_bytes(profile, rows, frozen=True, dropout=False),
                         logits=activations.logits_bytes(profile, rows, chunk=0))
        return Footprint(**parts)

    # -- in the run --------------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.models import matrices
        a, kv, group, mlp = self.plan(context.profile)
        keep = {"layers": {}}
        if self.criterion == "activation":
            self._walk(model, context, a, kv, group, mlp, keep)
        else:
            found = matrices(model)
            gradients = taylor(model, context, self.samples, self.length) if self.criterion == "taylor" else None
            for layer in range(a.layers):
                block = _shrink.block_of([p for p in found if p[0].layer == layer])
                scores = weight_norms(block, a) if gradients is None else by_gradient(block, gradients, a)
                self._cut(model, context, block, scores, a, kv, group, mlp, layer, keep)
        for key, value in _shrink.config_changes(context.profile.architecture, context.profile.config, a, kv, group, mlp).items():
            setattr(model.config, key, value)
        context.state.update(keep)
        context.reporter.event("choice", f"{kv * group} of {a.heads} heads and {mlp} of {a.mlp} channels are kept in each of {a.layers} blocks")
        return model

    def _walk(self, model, context, a, kv, group, mlp, keep) -> None:
        from engines.pruning._blocks import BlockWalk, InputNorms
        walk = BlockWalk(model, context.calibration(self.samples, self.length or None), device=context.device, compute=context.compute)
        for layer, module, linears in walk:
            block = _shrink.block_of(linears)
            seen = {pair[1]: InputNorms(pair[0].inp, pair[1].weight.device) for pair in (block.out, block.down)}
            walk.run(module, seen)
            self._cut(model, context, block, by_activation(block, seen, a), a, kv, group, mlp, layer, keep)
            if layer + 1 < a.layers:
                walk.advance(module)
            if context.reporter.wants() in ("stop", "pause"):
                raise StopRequested(context.reporter.wants())

    def _cut(self, model, context, block, scores, a, kv, group, mlp, layer: int, keep: dict) -> None:
        heads, groups, channels = choose(scores, a, kv, group, mlp)
        _shrink.remove(model, block, context, a, heads, groups, channels)
        keep["layers"][str(layer)] = {
            "heads": heads.tolist() if heads is not None else list(range(a.heads)),
            "kv_heads": groups.tolist() if groups is not None else list(range(a.kv_heads)),
            "channels": channels.tolist() if channels is not None else list(range(a.mlp))}

    def layers(self, model, context):
        from engines.models import matrices
        before = {m.name: m.size for m in context.profile.matrices}
        return {"kept": [[m.layer, m.role, m.size / before.get(m.name, m.size)] for m, _ in matrices(model)]}


def choose(scores, a, kv: int, group: int, mlp: int):
    """Sorted indices of the best query heads, key-value heads and channels; None where nothing goes.

    Args:
        scores: (query heads [heads], key-value heads' own part [kv_heads], channels [mlp]).
    """
    query, own, channel = (s.detach().double().cpu() for s in scores)
    heads = groups = channels = None
    if (kv, group) != (a.kv_heads, a.group):
        table = query.view(a.kv_heads, a.group)
        best = torch.argsort(table, dim=1, descending=True, stable=True)[:, :group]
        # A key-value head is worth itself and the query heads that would stay with it.
        worth = own + table.gather(1, best).sum(dim=1)
        groups = torch.argsort(worth, descending=True, stable=True)[:kv].sort().values
        heads = (best[groups] + groups[:, None] * a.group).flatten().sort().values
    if mlp != a.mlp:
        channels = torch.argsort(channel, descending=True, stable=True)[:mlp].sort().values
    return heads, groups, channels


# -- importance ------------------------------------------------------------------------------------------------
def _heads(values, count: int):
    return values.reshape(count, -1).sum(dim=1)


def weight_norms(block, a):
    """Squared l2 norm of all weights that go with a head or a channel."""
    from engines.models import weight
    square = {id(p[1]): weight(p[1]).detach().float().square() for p in (block.query, block.key, block.value, block.out, block.down, *block.ups)}
    columns = square[id(block.out[1])].sum(dim=0)
    width = a.heads * a.head_dim
    if block.fused:
        rows = square[id(block.query[1])].sum(dim=1)
        query = _heads(rows[:width] + columns, a.heads)
        own = _heads(rows[width: 2 * width] + rows[2 * width:], a.kv_heads)
    else:
        query = _heads(square[id(block.query[1])].sum(dim=1) + columns, a.heads)
        own = _heads(square[id(block.key[1])].sum(dim=1) + square[id(block.value[1])].sum(dim=1), a.kv_heads)
    channels = square[id(block.down[1])].sum(dim=0) + sum(square[id(up[1])].sum(dim=1) for up in block.ups)
    return query, own, channels


def by_activation(block, seen, a):
    """Energy that a head or channel puts into the residual stream: ||x_j||^2 ||W_:j||^2 of the second matrix."""
    from engines.models import weight
    energy = [seen[p[1]].mean * weight(p[1]).detach().float().square().sum(dim=0) for p in (block.out, block.down)]
    return _heads(energy[0], a.heads), torch.zeros(a.kv_heads), energy[1]


def by_gradient(block, gradients, a):
    """First-order change of the loss when a head or channel is switched off."""
    per_head, per_channel = gradients[block.out[0].name], gradients[block.down[0].name]
    return per_head, torch.zeros(a.kv_heads), per_channel


def taylor(model, context, samples: int, length: int, rows: int = 4) -> dict:
    """Mean over sequences of |x . dL/dx| at the inputs of every second matrix: per head for attention, per channel for the MLP.

    No weight needs a gradient: the graph begins at the first of those inputs.
    """
    from engines.models import matrices
    from engines.pruning._blocks import stack
    a = _shrink.anatomy(context.profile)
    found: dict[str, object] = {}
    handles = []

    def watch(matrix, per_head: bool):
        def before(module, args):
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)

            def take(grad):
                moved = (x.detach().float() * grad.float()).flatten(1, -2).sum(dim=1)      # [sequences, features]
                moved = moved.view(moved.shape[0], a.heads, -1).sum(dim=2) if per_head else moved
                total = moved.abs().sum(dim=0)
                found[matrix.name] = found[matrix.name] + total if matrix.name in found else total
            x.register_hook(take)
            return (x, *args[1:])
        return before

    for matrix, module in matrices(model):
        attention, mlp = _shrink._is(matrix, _shrink.OUTPUT), _shrink._is(matrix, _shrink.DOWN)
        if attention or mlp:
            handles.append(module.register_forward_pre_hook(watch(matrix, attention)))
    training, needed = model.training, {n: p.requires_grad for n, p in model.named_parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        for batch in stack(context.calibration(samples, length or None), rows):
            batch = {k: v.to(context.device) for k, v in batch.items()}
            with torch.enable_grad():
                logits = model(**batch).logits.float()
                if context.task == "causal-lm":
                    labels = batch["input_ids"][:, 1:]
                    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
                else:
                    loss = F.cross_entropy(logits, logits.detach().argmax(dim=-1), reduction="sum")
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        for name, p in model.named_parameters():
            p.requires_grad_(needed[name])
    return found

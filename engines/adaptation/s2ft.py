"""S2FT: a few attention heads and MLP channels are brought together and trained as dense slices of their matrices."""

from __future__ import annotations

import json
import math

from engines import activations, cost
from engines.adaptation import _coupled, _peft
from engines.adaptation._adapter import adapters, save_lora
from engines.claim import LARGER, Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, Footprint, Method, hyper, register


@register
class S2ft(Method):
    """Columns of o and down (and, if asked, rows of v and up) that belong to chosen heads and channels get a trained difference.

    Source: S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity.
    """

    card = Card(
        id="s2ft", name="S2FT", family="adaptation",
        title="S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", year=2024,
        summary="Trains whole columns of a few attention heads and MLP channels; gradients and moments of nothing else are formed.",
        needs=("training data", "blocks of attention and an MLP (llama, gpt2, bert, vit and their kin)"),
        cannot=("does not make the model smaller or faster", "cannot train packed int8 or int4 weights",
                "chosen heads and channels stay the same for the whole training", "no separate adapter file after pruning"),
        trains=True,
        differs="The slices are float32 differences beside the frozen matrices, which are put back into their own order at the end. "
                "Where query heads share a key and a value, the unit is the whole group (the released code is right only without such "
                "sharing). Scores other than random are the paper's by name (formulas from its abstract and code are not enough): they are "
                "divided by their layer's mean and compared over all layers. The adapter file is a peft LoRA whose one factor picks the "
                "original indices.")

    claims = (
        Claim("memory-full", "Training memory up to 3 times smaller than full fine-tuning (LLaMA-7B and 13B).", ours={"method": "s2ft"},
              against={"method": "full"}, measure="memory", expect="at most", factor=1 / 1.5, shape=LARGER,
              differs="20.5 M parameters with random weights, float32; at most two thirds is asked, because activations and the copy of the weights count on both "
                      "sides", precision="fp32"),
        Claim("memory-lora", "Training memory about 10 % below LoRA.", ours={"method": "s2ft"}, against={"method": "lora", "rank": 2},
              measure="memory", expect="at most", precision="fp32", batch=8, length=256, shape=LARGER,
              differs="20.5 M parameters with random weights; LoRA of about equal trained parameters on every matrix; any saving counts"),
        Claim("optimizer-full", "Optimizer state only of the chosen part.", ours={"method": "s2ft"}, against={"method": "full"},
              measure="optimizer", expect="at most", factor=0.02, differs="the default ratios, 0.7 % of 5.3 M parameters"),
        Claim("seconds-full", "1.5 to 2.7 times faster than full fine-tuning.", ours={"method": "s2ft"}, against={"method": "full"},
              measure="seconds", expect="at most", factor=1 / 1.5, differs="5.3 M parameters on a CPU, batches of 16 rows", batch=16,
              length=256),
        Claim("seconds-lora", "About 10 % faster than LoRA.", ours={"method": "s2ft"}, against={"method": "lora", "rank": 1},
              measure="seconds", expect="at most", factor=1.0, differs="5.3 M parameters on a CPU; any saving counts", batch=16, length=256),
        Claim("above-lora", "Above LoRA at about equal trained parameters (4.6 % commonsense, 1.3 % arithmetic).",
              ours={"method": "s2ft", "d_ratio": 0.087}, against={"method": "lora", "rank": 4},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("other-domains", "Forgets less than full fine-tuning: 11.5 % above it on domains that were not trained on (instruction tuning).",
              ours={"method": "s2ft"}, against={"method": "full"}, measure="forgetting", elsewhere="python-code",
              differs="a model of 5.3 M parameters that comes from Python code and is trained on Python's reference prose, 60 steps; the other "
                      "domain is that code, the first one, and not a new one"),
    )

    d_ratio: float = hyper(0.02, "Share of all MLP channels whose down columns are trained; auto takes the largest that obeys the limit "
                                 "on trainable parameters", low=0.0, high=1.0, lever="trainable")
    o_ratio: float = hyper(0.052, "Share of all heads whose columns of the attention's output matrix are trained; groups that share "
                                  "a key and a value count as one", low=0.0, high=1.0)
    u_ratio: float = hyper(0.0, "Share of all MLP channels whose up rows are trained", low=0.0, high=1.0)
    v_ratio: float = hyper(0.0, "Share of all key-value heads whose value rows are trained", low=0.0, high=1.0)
    select: str = hyper("random", "Which heads and channels: drawn once, or by the size of their weights, of their outputs on training "
                                  "data, of both, or of the first gradients",
                        choices=("random", "weight", "activation", "product", "gradient"))
    subset: str = hyper("largest", "With scores: the units with the largest or the smallest ones", choices=("largest", "smallest"))

    learning_rate = 3e-3

    # -- from shapes -------------------------------------------------------------------------------------
    def counts(self, a) -> dict[str, int]:
        """Chosen units over all layers: channels of down and up, key-value groups of o, key-value heads of v."""
        d = 0.02 if self.d_ratio == AUTO else self.d_ratio
        totals = dict(d=(d, a.mlp), u=(self.u_ratio, a.mlp), o=(self.o_ratio, a.kv_heads), v=(self.v_ratio, a.kv_heads))
        # The small addend makes a ratio that came from a count give that count again.
        return {k: int(ratio * a.layers * each + 1e-9) for k, (ratio, each) in totals.items()}

    def units(self, profile, a) -> dict[str, int]:
        """Parameters that one unit of each kind trains."""
        return dict(d=profile.hidden, u=profile.hidden, o=a.group * a.head_dim * profile.hidden, v=a.head_dim * profile.hidden)

    def trained(self, profile, a) -> int:
        each = self.units(profile, a)
        return sum(n * each[k] for k, n in self.counts(a).items()) + _peft.head_parameters(profile)

    def check(self, profile) -> None:
        a = _coupled.anatomy(profile, "s2ft")
        if self.d_ratio != AUTO and not any(self.counts(a).values()):
            raise InputError("s2ft.d_ratio", self.d_ratio, f"of {a.layers * a.mlp:,} channels and {a.layers * a.kv_heads} heads the ratios choose none",
                             f"Choose at least {math.ceil(1e4 / (a.layers * a.mlp)) / 1e4:g}")

    def fit(self, profile, budget):
        self.check(profile)
        if self.d_ratio != AUTO:
            return self, {}
        a, limit = _coupled.anatomy(profile, "s2ft"), budget.trainable_count(profile.parameters)
        total, each = a.layers * a.mlp, profile.hidden
        if limit is None:
            n = max(1, self.counts(a)["d"])
            return self.replace(d_ratio=n / total), {"d_ratio": f"no limit on trainable parameters: the usual share, {n} channels"}
        fixed = self.replace(d_ratio=0.0).trained(profile, a)
        n = min(total, (limit - fixed) // each)
        if n < 1:
            raise InputError("budget.trainable", budget.trainable, f"one channel and what the other ratios choose train {fixed + each:,} parameters, "
                             f"the limit is {limit:,}", "Raise the limit, or lower s2ft.o_ratio")
        return self.replace(d_ratio=n / total), {"d_ratio": f"{n} channels, {fixed + n * each:,} trainable parameters obey the limit of {limit:,}"}

    def footprint(self, profile, batch) -> Footprint:
        a = _coupled.anatomy(profile, "s2ft")
        n, trainable = self.counts(a), self.trained(profile, a)
        weights = cost.held_bytes(profile, batch.weights)
        if batch.compute == "bfloat16" and batch.weights == "float32":
            weights -= 2 * profile.block_parameters
        # Rows need the whole input of their matrix; columns only their own part of it.
        here = profile.blocks[0][2]
        whole = tuple(m.role for m in here if n["u"] and m.role.rsplit(".", 1)[-1] in ("up_proj", "c_fc", "fc1", "lin1")
                      or n["u"] and m.role == "intermediate.dense" or n["v"] and m.role.rsplit(".", 1)[-1] in ("v_proj", "value", "v_lin", "c_attn"))
        parts = cost.with_training(profile, batch, trainable=trainable, frozen=True, backward=1.0, weights=weights, adapter=4 * trainable,
                                   adapted=whole)
        tokens = batch.rows * (profile.context if profile.task == "image-classification" else batch.length)
        columns = n["d"] + n["o"] * a.group * a.head_dim
        kept = (2 if batch.compute == "bfloat16" else 4) * tokens * columns
        if batch.checkpointing:
            parts["activations"] += kept // a.layers
        else:
            parts["activations"] += kept - self.before_first(profile, batch, a, n, tokens, whole)
        parts["flops_per_token"] += 6.0 * (trainable - _peft.head_parameters(profile))
        return Footprint(**parts)

    def before_first(self, profile, batch, a, n, tokens: int, whole) -> int:
        """Expected bytes that the first block does not keep, because nothing before its first trained slice has a gradient."""
        if n["v"]:
            return 0
        c = 2 if batch.compute == "bfloat16" else 4
        query, key, _ = activations.widths(profile)
        attention = tokens * (4 * profile.hidden + 2 * c * (query + key) + 4 * a.heads + 16)
        block = activations.block_bytes(profile, batch, 0, frozen=True, adapted=whole)
        # Chance that a draw over all layers leaves the first without a head.
        every, here = a.layers * a.kv_heads, a.kv_heads
        none = 0.0 if n["u"] else math.prod(max(0, every - here - i) / (every - i) for i in range(n["o"]))
        return int(attention + none * max(0, block - attention))

    # -- in a live model ---------------------------------------------------------------------------------
    def choose(self, model, context, a) -> dict:
        """Layer -> kind -> sorted indices (lists of int) of the chosen units; decided once and kept in the stage's folder."""
        file = context.folder / f"s2ft-{context.stage}.json" if context.folder is not None and self.select != "random" else None
        if file is not None and context.resuming and file.is_file():
            return {int(k): v for k, v in json.loads(file.read_text()).items()}
        n, generator, found = self.counts(a), context.generator(1), {i: {} for i in range(a.layers)}
        scores = None if self.select == "random" else _coupled.scores(model, context, a, self.select)
        for kind in ("d", "u", "o", "v"):
            each = a.mlp if kind in "du" else a.kv_heads
            if scores is None:
                taken = torch.randperm(a.layers * each, generator=generator)[:n[kind]]
            else:
                taken = torch.argsort(scores[1 if kind in "du" else 0].flatten(), descending=self.subset == "largest", stable=True)[:n[kind]]
            for i in range(a.layers):
                found[i][kind] = sorted((taken[taken // each == i] % each).tolist())
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
        return found

    def apply(self, model, context):
        from engines.layers.s2ft import Slice
        from engines.shortage import give_back
        a = _coupled.anatomy(context.profile, "s2ft")
        chosen = self.choose(model, context, a)
        blocks = _coupled.blocks(model)
        every = {p[0].name for b in blocks for p in (b.query, b.key, b.value, b.out, *b.ups, b.down)}
        _peft.prepare(model, context, sorted(every))
        context.state["order"] = {}
        width = a.group * a.head_dim
        for i, block in enumerate(blocks):
            part = {k: torch.tensor(v, dtype=torch.int64) for k, v in chosen[i].items()}
            orders = {}
            for name, first, second, total in (("heads", "v", "o", a.kv_heads), ("channels", "u", "d", a.mlp)):
                if len(part[first]) or len(part[second]):
                    orders[name] = _coupled.order_of(part[first], part[second], total)
            heads, channels = (orders.get(k, (None, 0)) for k in ("heads", "channels"))
            _coupled.reorder(block, a, heads[0], channels[0])
            context.state["order"][str(i)] = {k: v[0] for k, v in orders.items()}
            value = 2 * a.heads * a.head_dim if block.fused else 0
            up = next((p for p in block.ups if p[0].role == "up_proj"), block.ups[0])
            for kind, pair, start, count, columns in (("d", block.down, channels[1], 1, True), ("u", up, 0, 1, False),
                                                      ("o", block.out, heads[1] * width, width, True),
                                                      ("v", block.value, value, a.head_dim, False)):
                if len(part[kind]):
                    self.wrap(model, context, pair, start, count * len(part[kind]), columns, self.order(pair[0], block, a, heads[0], channels[0]))
        give_back()  # reordering copies every coupled matrix
        _peft.free_head(model, context)
        assert any(isinstance(m, Slice) for m in model.modules())
        return model

    def order(self, matrix, block, a, heads, channels):
        """(order of the outputs, of the inputs) of a matrix in the re-ordered block; None: as it was."""
        if matrix.name == block.down[0].name:
            return None, channels
        if matrix.name == block.out[0].name:
            return None, _coupled.features(heads, a.head_dim * a.group)
        if matrix.name == block.value[0].name:
            rows = _coupled.features(heads, a.head_dim)
            return (torch.cat([rows + i * a.heads * a.head_dim for i in range(3)]) if block.fused else rows), None
        return channels, None

    def wrap(self, model, context, pair, start: int, count: int, columns: bool, order) -> None:
        from engines.layers.s2ft import Slice
        matrix, module = pair
        mask = context.masks.get(f"{matrix.name}.weight")
        if mask is not None:
            mask = mask.t() if matrix.conv1d else mask
            for dim, index in enumerate(order):
                mask = mask if index is None else mask.index_select(dim, index.to(mask.device))
            mask = mask.to(module.weight.device)
        layer = Slice(module, start, count, columns=columns, mask=mask).to(module.weight.device)
        layer.index = order[1 if columns else 0][start:start + count].tolist()
        parent, _, leaf = matrix.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)

    def finish(self, model, context):
        with torch.no_grad():  # no decorator: it would import torch when the file is read
            return self._put_back(model, context)

    def _put_back(self, model, context):
        from engines.models import matrices
        a = _coupled.anatomy(context.profile, "s2ft")
        found = adapters(model)
        save_lora(model, context, [(name, *_as_lora(layer)) for name, layer in found])
        for name, layer in found:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)
        for i, block in enumerate(_coupled.blocks(model)):
            back = {k: torch.argsort(v) for k, v in context.state["order"][str(i)].items()}
            _coupled.reorder(block, a, back.get("heads"), back.get("channels"))
        _peft.restore(model, [(m.name, module) for m, module in matrices(model)])
        for _, layer in found:
            index = torch.tensor(layer.index, device=layer.weight.device)
            new = layer.weight.float().index_add(1 if layer.columns else 0, index, layer.delta)
            layer.base.weight.data = (new.t() if layer.conv1d else new).contiguous()
        return _peft.release(model)

    def layers(self, model, context):
        return _peft.place_map(model, adapters(model), "trained", lambda layer: layer.count / (layer.inp if layer.columns else layer.out))


def _as_lora(layer):
    """(a [count, in], b [out, count]) so that b a is the change in the original order."""
    index, n = torch.tensor(layer.index, device=layer.delta.device), layer.count
    picks = torch.zeros(n, layer.inp if layer.columns else layer.out, device=layer.delta.device)
    picks[torch.arange(n), index] = 1.0
    return (picks, layer.delta) if layer.columns else (layer.delta, picks.t())

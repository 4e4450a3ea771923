"""DSEE: a low-rank update with single entries beside it; on the way the frozen weights are pruned by what the update has become."""

from __future__ import annotations

import dataclasses

from engines import cost
from engines.adaptation import _coupled, _peft
from engines.adaptation._adapter import AdapterMethod, adapters, change_map, merge, save_lora
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, hyper, register
from engines.pruning import _shrink

QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "c_attn")


@register
class Dsee(AdapterMethod):
    """S1 * W + s (B A + S2) in query and value; S1 prunes by the update's own size, the other matrices by their weights' size.

    Source: DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models.
    """

    card = Card(
        id="dsee", name="DSEE", family="adaptation",
        title="DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models", year=2021,
        summary="Trains a low-rank update and a few single entries, and prunes the frozen weights halfway by what was learned.",
        needs=("training data", "steps before the pruning and after it", "one decomposition of each adapted matrix before the first step"),
        cannot=("query and value are dense again after the merge: only the other matrices keep zeros", "single zeros save no time; whole heads do",
                "cannot train packed int8 or int4 weights", "no separate adapter file unless nothing is pruned",
                "a llama-like model keeps only numbers of heads that divide its width: of four heads two go, not one"),
        trains=True, masks=True,
        differs="One stage: the paper's second tuning is the rest of the budget. The support comes from the same greedy decomposition, its "
                "rank at most 65 % of the smaller side as with BERT's sizes and the paper's 100 rounds, and has exactly the asked number of "
                "entries (the released code fills the matrix where fewer pass the threshold). Pruned heads are switched off during the "
                "training and cut out at its end, with equal counts in all blocks. GPT-2's joint matrix counts as query and value as a "
                "whole. The pooler is not pruned. No learned coefficients of heads: no published script uses them.")

    claims = (
        Claim("as-good-pruned", "With a fifth of the weights pruned the quality is comparable to LoRA without pruning (BERT, GPT-2).",
              ours={"method": "dsee"}, against={"method": "lora", "rank": 16, "targets": "q_proj,v_proj"}, expect="not worse", margin=0.01,
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("as-good-heads", "About 25 % fewer FLOPs by removed heads at comparable quality (BERT).", ours={"method": "dsee", "prune": "heads"},
              against={"method": "lora", "rank": 16, "targets": "q_proj,v_proj"}, expect="not worse", margin=0.02, model="digits-vit", data="digits",
              batch=16, differs="one of four heads in each block of a small image classifier, 60 steps (the bundled language model can hold two or four "
                                "heads only); 120 images decide, which shows large differences only"),
        Claim("support", "Entries at the places of the decomposition are above LoRA alone.", ours={"method": "dsee", "prune": "none"},
              against={"method": "lora", "rank": 16, "targets": "q_proj,v_proj"},
              differs="a model of 5.3 M parameters, 60 steps; 16 entries beside 8,192 parameters of the factors of a matrix"),
    )

    rank: int = hyper(16, "Rank of the update; auto takes the largest that obeys the limit on trainable parameters", low=1, high=1024,
                      lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means twice the rank", low=0.0, high=4096.0)
    entries: int = hyper(16, "Single entries beside the low-rank update of each matrix", low=0, high=1_000_000)
    support: str = hyper("decomposition", "Where they are: the sparse part of the weight, its largest weights, or drawn",
                         choices=("decomposition", "magnitude", "random"), advanced=True)
    prune: str = hyper("unstructured", "What is pruned on the way: single weights, whole attention heads, or nothing",
                       choices=("unstructured", "heads", "none"))
    prune_at: float = hyper(0.4, "Share of the budget after which it is pruned", low=0.05, high=0.95)
    share: float = hyper(0.2, "Share of zeros in the matrices that are not adapted", low=0.0, high=0.95)
    adapted_share: float = hyper(0.2, "Share of the frozen weights of the adapted matrices that go; the update stays", low=0.0, high=0.95)
    heads: float = hyper(0.25, "Share of the heads that go, to the nearest number that the architecture can hold (prune: heads)", low=0.0, high=0.95)
    by: str = hyper("update", "What decides in the adapted matrices: the update, its sum with the weight, or the weight",
                    choices=("update", "sum", "weight"), advanced=True)
    targets: str = hyper("query-value", "Which matrices are adapted: query-value, all-linear, attention, mlp, or roles separated by commas")

    # -- from shapes -------------------------------------------------------------------------------------
    def chosen(self, found, roles) -> list:
        if self.targets != "query-value":
            return _peft.choose(found, self.targets, roles)
        return [m for m in found if m.role.rsplit(".", 1)[-1] in QUERY_VALUE]

    def targeted(self, profile) -> list:
        return self.chosen(profile.matrices, profile.roles)

    def size(self) -> int:
        return 16 if self.rank == AUTO else self.rank

    usual = 16

    def count(self, matrix, size: int) -> int:
        return super().count(matrix, size) + self.entries

    def check(self, profile) -> None:
        super().check(profile)
        found = self.targeted(profile)
        least = min(found, key=lambda m: m.size)
        if self.entries > least.size:
            raise InputError("dsee.entries", self.entries, f"{least.name} has only {least.size:,} weights", f"Choose at most {least.size}")
        if self.prune == "heads":
            a = _coupled.anatomy(profile, "dsee")
            if any(_shrink._is(m, _shrink.OUTPUT) for m in found):
                raise InputError("dsee.targets", self.targets, "a head cannot be cut out of an attention output that is adapted itself",
                                 "Choose query-value, or prune unstructured")
            if (a.kv_heads, a.group) == self.kept(profile)[1:]:
                raise InputError("dsee.heads", self.heads, f"of {a.heads} heads none goes: the architecture allows no nearer number",
                                 "Choose a larger share, or prune unstructured")

    def kept(self, profile):
        """(anatomy, key-value heads, query heads for each) of the result."""
        a = _coupled.anatomy(profile, "dsee")
        return a, *_shrink.nearest_heads(profile, a, self.heads)

    def result_profile(self, profile):
        if self.prune != "heads":
            return profile
        a, kv, group = self.kept(profile)
        return _shrink.smaller(profile, a, kv, group, a.mlp)

    def zeros(self, profile) -> int:
        """Zeros of the result: those of matrices that are not adapted."""
        adapted = {m.name for m in self.targeted(profile)}
        return round(self.share * sum(m.size for m in profile.matrices if m.name not in adapted)) if self.prune == "unstructured" else 0

    def extra_bytes(self, profile, batch, found) -> int:
        # Masks of all matrices, and one update with its score; the chosen inputs of the single entries.
        tokens = batch.rows * (profile.context if profile.task == "image-classification" else batch.length)
        masks = profile.block_parameters if self.prune == "unstructured" else 0
        return masks + 12 * max(m.size for m in found) + 4 * tokens * self.entries * len(found)

    def footprint(self, profile, batch):
        found = super().footprint(profile, batch)
        after = cost.result_of(self.result_profile(profile))
        return dataclasses.replace(found, **after, sparsity=self.zeros(profile) / max(1, profile.block_parameters))

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.adaptation._adapter import wrap
        from engines.models import matrices
        named = matrices(model)
        names = {m.name for m in self.chosen([m for m, _ in named], tuple(dict.fromkeys(m.role for m, _ in named)))}
        chosen = [(m, module) for m, module in named if m.name in names]
        places = {}
        if not context.resuming:
            # On a resume the checkpoint brings them.
            generator = context.generator(2)
            for m, module in chosen:
                weight = (module.weight.t() if m.conv1d else module.weight).detach().float()
                places[m.name] = self.places(weight, generator)
        _peft.prepare(model, context, sorted(names))

        def build(matrix, module, context, generator, mask):
            from engines.layers.dsee import Dsee as Layer
            index = places.get(matrix.name, torch.zeros(self.entries, dtype=torch.int64))
            return Layer(module, self.rank, (self.alpha or 2.0 * self.rank) / self.rank, index, generator, mask=mask)
        wrap(model, context, chosen, build)
        context.state["pruned"] = False
        context.zeroed = False
        return model

    def places(self, weight, generator):
        from engines.layers.dsee import support
        return support(weight, self.entries, self.support, generator) if self.entries else torch.zeros(0, dtype=torch.int64)

    def before_step(self, model, context) -> None:
        if self.prune == "none":
            return
        if not context.state["pruned"] and context.progress >= self.prune_at:
            self.cut(model, context)
        if context.state["pruned"] and not context.zeroed:
            self.zero(model, context)      # a resumed stage: frozen weights are no part of a checkpoint

    def cut(self, model, context) -> None:
        """Decide what goes, once, and set it to zero."""
        with torch.no_grad():
            (self.cut_heads if self.prune == "heads" else self.cut_weights)(model, context)
        context.state["pruned"] = True
        self.zero(model, context)

    def cut_weights(self, model, context) -> None:
        from engines.models import matrices
        from engines.pruning import _masks
        layers, rest = dict(adapters(model)), dict((m.name, (m, module)) for m, module in matrices(model))
        rest = {n: pair for n, pair in rest.items() if not n.endswith(".base")}
        gone = _masks.smallest_of_all(lambda n: self.score(layers[n]), list(layers), round(self.adapted_share * sum(x.out * x.inp for x in layers.values())))
        context.state["gone"] = {n: pruned.cpu() for n, pruned in gone.items()}
        plain = lambda n: (rest[n][1].weight.t() if rest[n][0].conv1d else rest[n][1].weight).detach().float().abs()  # noqa: E731
        pruned = _masks.smallest_of_all(plain, list(rest), self.zeros(context.profile))
        for name, (m, module) in rest.items():
            _masks.put(context, m, module, pruned[name])
        for name, layer in layers.items():      # dense after the merge, apart from what an earlier stage pruned
            context.masks.setdefault(f"{name}.weight", torch.ones(layer.base.weight.shape, dtype=torch.bool, device=layer.weight.device))
        context.reporter.event("choice", f"Pruned: {sum(int(p.sum()) for p in pruned.values()):,} weights of {len(rest)} matrices by their size, "
                               f"{sum(int(p.sum()) for p in gone.values()):,} frozen weights of {len(layers)} adapted ones by {self.by}")

    def score(self, layer):
        if self.by == "weight":
            return layer.weight.detach().float().abs()
        return (layer.update() if self.by == "update" else layer.effective()).detach().abs()

    def cut_heads(self, model, context) -> None:
        from engines.pruning.structured import choose
        a, kv, group = self.kept(context.profile)
        context.state["heads"] = {}
        for i, block in enumerate(self.blocks(model)):
            rows = {}
            for kind, pair in (("query", block.query), ("value", block.value)):
                layer = pair[1]
                size = layer.update().abs().sum(dim=1).cpu() if hasattr(layer, "update") else torch.zeros(layer.weight.shape[0])
                if block.fused:
                    size = size.view(3, -1)[0 if kind == "query" else 2]
                rows[kind] = size.view(-1, a.head_dim).sum(dim=1)
            heads, groups, _ = choose((rows["query"], rows["value"], torch.zeros(a.mlp)), a, kv, group, a.mlp)
            context.state["heads"][str(i)] = {"heads": heads, "kv": groups}
        context.reporter.event("choice", f"Switched off: {a.heads - kv * group} of {a.heads} heads in each of {a.layers} blocks, those whose update is smallest"
                               + ("" if kv * group == round(a.heads * (1 - self.heads)) else f" ({self.heads:.0%} was asked; no nearer number can be held)"))

    def blocks(self, model) -> list:
        """``_shrink.Block`` of every block, adapters in the place of the matrices that they wrap."""
        from engines.models import matrices
        layers, rows = dict(adapters(model)), {}
        for m, module in matrices(model):
            name = m.name.removesuffix(".base")
            m = m if name == m.name else dataclasses.replace(m, name=name, role=_role(name))
            rows.setdefault(m.layer, []).append((m, layers.get(name, module)))
        return [_shrink.block_of(rows[layer]) for layer in sorted(rows)]

    def zero(self, model, context) -> None:
        """Set the frozen weights that have gone to zero, wherever they are held at present."""
        context.zeroed = True
        with torch.no_grad():
            if self.prune == "heads":
                a = _coupled.anatomy(context.profile, "dsee")
                for i, block in enumerate(self.blocks(model)):
                    matrix, module = block.out
                    gone = torch.ones(a.heads * a.head_dim, dtype=torch.bool, device=module.weight.device)
                    gone[_shrink.rows_of(context.state["heads"][str(i)]["heads"], a.head_dim)] = False
                    (module.weight if matrix.conv1d else module.weight.t())[gone] = 0.0
                return
            layers = dict(adapters(model))
            for name, pruned in context.state["gone"].items():
                layers[name].weight.data.masked_fill_(pruned.to(layers[name].weight.device), 0.0)
            weights = dict(model.named_parameters())
            for name, keep in context.masks.items():
                if name in weights:
                    weights[name].data.masked_fill_(~keep.to(weights[name].device), 0.0)

    def finish(self, model, context):
        if self.prune != "none" and not context.state["pruned"]:
            self.cut(model, context)       # stopped early, or a stage of very few steps
        if self.prune == "none":
            save_lora(model, context, [(name, *layer.pairs()) for name, layer in adapters(model)])
        elif context.folder is not None:
            context.reporter.log("no separate adapter: the weights beneath it were pruned; the merged model is complete")
        _peft.restore(model, adapters(model))
        if context.state["pruned"]:
            self.zero(model, context)      # the originals came back whole
        model = merge(model)
        if self.prune == "heads":
            self.remove(model, context)
        return model

    def remove(self, model, context) -> None:
        """Cut the heads that were switched off out of the tensors."""
        a, kv, group = self.kept(context.profile)
        for i, block in enumerate(_coupled.blocks(model)):
            kept = context.state["heads"][str(i)]
            _shrink.remove(model, block, context, a, kept["heads"], kept["kv"], None)
        for key, value in _shrink.config_changes(context.profile.architecture, context.profile.config, a, kv, group, a.mlp).items():
            setattr(model.config, key, value)

    def layers(self, model, context):
        if adapters(model):
            return change_map(model, lambda layer: float(layer.update().norm() / layer.weight.float().norm().clamp_min(1e-12)))
        if self.prune == "unstructured":
            from engines.pruning import _masks
            return _masks.sparsity_map(model)
        from engines.models import matrices
        before = {m.name: m.size for m in context.profile.matrices}
        return {"kept": [[m.layer, m.role, m.size / before[m.name]] for m, _ in matrices(model)]} if self.prune == "heads" else {}


def _role(name: str) -> str:
    from engines.profile import _role as role
    return role(name)

"""SparseLoRA: LoRA whose frozen matrices are multiplied only with the channels that matter for the batch at hand."""

from __future__ import annotations

import dataclasses
import types

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters, merge, save_lora, wrap
from engines.claim import Claim
from engines.errors import InputError
from engines.method import Card, hyper, register
from engines.profile import BYTES

# What the matrices of one block are called; the first of a group is the one that the model calls first.
SPLIT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
GATED = {**{k: f"self_attn.{v}" for k, v in SPLIT.items()}, "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
BLOCKS = {
    "llama": GATED, "mistral": GATED, "qwen2": GATED,
    "gpt2": {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "bert": {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense",
             "up": "intermediate.dense", "down": "output.dense"},
    "vit": {**{k: f"attention.{v}" for k, v in SPLIT.items()}, "up": "mlp.fc1", "down": "mlp.fc2"},
}
ATTENTION, MLP = ("q", "k", "v", "qkv", "o"), ("gate", "up", "down")


@register
class SparseLora(AdapterMethod):
    """W x over the kept channels + s B A x over all; a rank-8 copy of W says for each batch which channels are kept.

    Source: SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity.
    """

    card = Card(
        id="sparselora", name="SparseLoRA", family="adaptation", title="SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", year=2025,
        summary="LoRA that skips, batch by batch, the channels of the frozen matrices of deep blocks that matter least; dense when used.",
        needs=("training data", "wide layers: the gathering of channels pays from about a thousand features on",
               "one decomposition of each sparse matrix before the first step"),
        cannot=("does not make the finished model smaller or faster", "trains another function than the one that is used: what is skipped in "
                "training is there afterwards", "is slower than LoRA on small models", "no separate adapter file after pruning"),
        trains=True,
        differs="The backward pass is the exact gradient of the sparse map; in the released code no gradient passes the frozen branch of "
                "sparse tokens. Kept channels of shared key heads follow the layout of the heads, which the released code does not. The "
                "paper computes the tokens of the answer with every channel; rows of plain text have no answer, since every token is "
                "predicted, so that a share of each row at its end (tail) takes that place; with tail 0 steps are fastest and teach "
                "less. Layers are chosen by depth, as the paper's settings are, not by a scan. GPT-2, BERT and ViT are served by the "
                "same rules, which the paper has not tried.")

    claims = (
        Claim("not-worse-than-lora", "Keeps the accuracy of LoRA (commonsense, arithmetic, code, instructions) with up to 2.2 times less compute.",
              ours={"method": "sparselora", "rank": 8}, against={"method": "lora", "rank": 8, "targets": "attention"}, expect="not worse",
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, the paper's shares of channels (0.9 and 0.5) on the "
                      "same share of the depth; plain text instead of questions with answers"),
        Claim("faster-step", "Steps up to 1.6 times faster than those of LoRA (here with the shares of its arithmetic setting: 0.99 of the MLP channels, 0.75 of the "
              "attention channels).",
              ours={"method": "sparselora", "mlp": 0.99, "attention": 0.75, "mlp_from": 0.09, "attention_from": 0.44, "tail": 0.0},
              against={"method": "lora", "rank": 32, "targets": "attention"}, measure="seconds", steps=48, batch=2, length=256,
              shape={"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16,
                     "head_dim": 64},
              differs="6 blocks of width 1024 with random weights on a CPU instead of 32 of width 4096 on a GPU; no positions of an answer are "
                      "left dense; faster at all is asked, not a factor"),
    )

    rank: int = hyper(32, "Rank of every update; auto takes the largest that obeys the limit on trainable parameters", low=1, high=1024,
                      lever="trainable", log=True)
    alpha: float = hyper(0.0, "Scale of the update; 0 means twice the rank", low=0.0, high=4096.0)
    mlp: float = hyper(0.9, "Share of the inner channels of an MLP that is skipped in sparse blocks (the paper: 0.9, or 0.99 for arithmetic)",
                       low=0.0, high=0.999)
    attention: float = hyper(0.5, "Share of the channels of q, k, v and o that is skipped in sparse blocks (the paper: 0.5, or 0.75 for arithmetic)",
                             low=0.0, high=0.999)
    mlp_from: float = hyper(0.4, "Depth, as a share of the blocks, from which MLPs are sparse", low=0.0, high=1.0)
    attention_from: float = hyper(0.53, "Depth, as a share of the blocks, from which attention is sparse", low=0.0, high=1.0)
    until: float = hyper(0.93, "Depth from which blocks are dense again", low=0.0, high=1.0, advanced=True)
    start: float = hyper(0.05, "Share of the budget that is trained with every channel first", low=0.0, high=0.9)
    tail: float = hyper(0.5, "Share of each row, at its end, that is computed with every channel, as answers are; of language models only",
                        low=0.0, high=1.0)
    estimator: int = hyper(8, "Rank of the thin copies that choose the channels", low=1, high=256, advanced=True)
    targets: str = hyper("attention", _peft.TARGETS_HELP)

    usual = 32

    # -- from shapes -------------------------------------------------------------------------------------
    def size(self) -> int:
        return self.usual if self.rank == "auto" else self.rank

    def dense_share(self, task: str) -> float:
        """Share of each row that is computed with every channel: the label of a whole row belongs to no position of it."""
        return self.tail if task == "causal-lm" else 0.0

    def sparsity_of(self, part: str, layer: int, layers: int) -> float:
        """Share of channels that block ``layer`` skips in this part."""
        begin, share = (self.attention_from, self.attention) if part in ATTENTION else (self.mlp_from, self.mlp)
        return share if begin * layers <= layer < self.until * layers else 0.0

    def sparse(self, profile, found) -> list:
        """(matrix, part, skipped share) of every matrix that is sparse."""
        names = BLOCKS.get(profile.architecture, {})
        rows = []
        for m in found:
            # The longest name first: attention.output.dense ends like output.dense.
            part = next((p for p, name in sorted(names.items(), key=lambda i: -len(i[1])) if m.name.endswith("." + name)), None)
            share = self.sparsity_of(part, m.layer, profile.layers) if part else 0.0
            if share:
                rows.append((m, part, share))
        return rows

    def check(self, profile) -> None:
        super().check(profile)
        if profile.architecture not in BLOCKS:
            raise InputError("method", "sparselora", f"how the blocks of {profile.architecture} fit together is not known to it",
                             "Use lora, or a model of the kinds " + ", ".join(BLOCKS))
        rows = self.sparse(profile, profile.matrices)
        if not rows:
            raise InputError("sparselora.mlp_from", self.mlp_from, f"with these depths and shares none of {profile.layers} blocks is sparse",
                             "Lower mlp_from or attention_from, or use lora")
        for m, part, share in rows:
            width = {"gate": m.out, "up": m.out, "k": m.out, "qkv": m.out // 3}.get(part, 0)
            if width and int(width * (1 - share) + 1e-9) < 1:
                raise InputError(f"sparselora.{'attention' if part in ATTENTION else 'mlp'}", share, f"it leaves none of the {width} channels of {m.name}",
                                 f"Choose at most {1 - 1 / width:.3g}")

    def footprint(self, profile, batch):
        made, saved, held = super().footprint(profile, batch), 0.0, 0
        size = 2 if batch.compute == "bfloat16" else 4
        for m, _, share in self.sparse(profile, profile.matrices):
            saved += 4.0 * m.size * share * (1.0 - self.dense_share(profile.task)) * (1.0 - self.start) - 2.0 * self.estimator * m.inp
            held += int(size * m.size * (1.0 - share)) + 4 * self.estimator * (m.inp + m.out)
        wrapped = {m.name for m, _, _ in self.sparse(profile, profile.matrices)}
        # Sparse matrices are held in the type of the products too, whether they are adapted or not.
        weights = made.weights
        if batch.compute == "bfloat16" and batch.weights == "float32":
            weights -= (BYTES["float32"] - 2) * sum(m.size for m in profile.matrices if m.name in wrapped - {x.name for x in self.targeted(profile)})
        return dataclasses.replace(made, weights=weights, extra=made.extra + held, flops_per_token=max(0.0, made.flops_per_token - saved))

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.layers.sparselora import Shared, gated_forward
        from engines.models import matrices
        named = dict((m.name, (m, module)) for m, module in matrices(model))
        every = [m for m, _ in named.values()]
        adapted = {m.name for m in _peft.choose(every, self.targets, tuple(dict.fromkeys(m.role for m in every)))}
        blocks = self._blocks(context.profile, every)
        # A gated MLP without updates keeps its layers and gets a forward pass of its own.
        whole = [g for g in blocks if "gate" in g.parts and not adapted & {m.name for m in g.parts.values()}]
        wrapped = adapted | {m.name for g in blocks if g not in whole for m in g.parts.values()}
        used = [m.name for m in every if m.name in wrapped or any(m in g.parts.values() for g in whole)]
        _peft.prepare(model, context, used)
        shared = Shared(self.dense_share(context.task))
        choices = [(g, self._choice(g, named, shared, context, model)) for g in blocks]
        place = {m.name: part for g in blocks for part, m in g.parts.items()}

        def build(matrix, module, context, generator, mask):
            from engines.layers.sparselora import SparseLinear
            part = {"gate": "up"}.get(place.get(matrix.name), place.get(matrix.name, ""))
            rank = self.rank if matrix.name in adapted else 0
            return SparseLinear(module, rank, (self.alpha or 2.0 * self.rank) / self.rank, part, generator, mask=mask)
        wrap(model, context, [row for name, row in named.items() if name in wrapped], build)
        for group, choice in choices:
            if group in whole:
                mlp = model.get_submodule(group.parts["gate"].name.rpartition(".")[0])
                mlp.own_choice = choice.to(named[group.parts["gate"].name][1].weight.device)
                mlp.forward = types.MethodType(gated_forward, mlp)
                continue
            for i, m in enumerate(group.parts.values()):
                model.get_submodule(m.name).follow(choice.to(named[m.name][1].weight.device), leads=i == 0)
        body = getattr(model, model.base_model_prefix)
        hook = body.register_forward_pre_hook(lambda _, args, kwargs: _padding(shared, kwargs), with_kwargs=True)
        object.__setattr__(model, "_fettle_sparse", (shared, hook, [g.parts["gate"].name.rpartition(".")[0] for g in whole]))
        return model

    def _blocks(self, profile, every) -> list:
        """The groups of matrices that choose together: one of attention and one of the MLP for each sparse block."""
        groups: dict[tuple, types.SimpleNamespace] = {}
        for m, part, share in self.sparse(profile, every):
            group = groups.setdefault((m.layer, part in ATTENTION), types.SimpleNamespace(share=share, parts={}))
            group.parts[part] = m
        order = (*ATTENTION, *MLP)
        for group in groups.values():
            group.parts = {p: group.parts[p] for p in order if p in group.parts}
        return list(groups.values())

    def _choice(self, group, named, shared, context, model):
        from engines.layers.sparselora import AttentionChoice, MlpChoice
        from engines.models import weight
        found = {p: (weight(named[m.name][1]), named[m.name][1].bias) for p, m in group.parts.items() if p not in ("o", "down")}
        if "q" in found or "qkv" in found:
            if fused := "qkv" in found:
                w, bias = found["qkv"]
                found = dict(zip("qkv", zip(w.chunk(3), bias.chunk(3) if bias is not None else (None,) * 3)))
            return AttentionChoice(shared, found, group.share, self.estimator, context.profile.head_dim, fused)
        from transformers.activations import ACT2FN
        config = model.config
        act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        return MlpChoice(shared, found, group.share, self.estimator, ACT2FN[act] if isinstance(act, str) else act)

    def before_step(self, model, context) -> None:
        shared = model._fettle_sparse[0]
        if shared.active != (context.progress >= self.start):
            shared.active = context.progress >= self.start
            context.reporter.log(f"from here on {self.mlp:.0%} and {self.attention:.0%} of the channels of sparse blocks are skipped")

    def finish(self, model, context):
        save_lora(model, context)
        _, hook, mlps = model._fettle_sparse
        hook.remove()
        for name in mlps:
            mlp = model.get_submodule(name)
            del mlp.forward, mlp.own_choice
        object.__delattr__(model, "_fettle_sparse")
        # What an MLP without updates holds in the type of the products comes back as it was.
        _restore(model, mlps)
        return merge(model)

    def layers(self, model, context):
        if "_fettle_sparse" not in model.__dict__:
            return {}
        rank = _peft.place_map(model, adapters(model), "rank", lambda layer: layer.factors()[0].shape[0] or None)
        skipped = {m.name: share for m, _, share in self.sparse(context.profile, context.profile.matrices)}
        rows = [[m.layer, m.role, skipped.get(m.name, 0.0)] for m in context.profile.matrices]
        return {**rank, "skipped": rows}


def _padding(shared, kwargs) -> None:
    mask = kwargs.get("attention_mask")
    shared.keep = mask.bool() if mask is not None and mask.dim() == 2 else None


def _restore(model, mlps: list[str]) -> None:
    """Bring back the float32 originals of plain layers inside the modules ``mlps``."""
    plain = types.SimpleNamespace
    rows = []
    for name in mlps:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            layer = model.get_submodule(f"{name}.{leaf}")
            rows.append((f"{name}.{leaf}", plain(get_base_layer=lambda layer=layer: layer)))
    _peft.restore(model, [*rows, *adapters(model)])
    model._fettle_kept.file = None      # all of it has been read

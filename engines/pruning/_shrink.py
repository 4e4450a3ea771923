"""Where heads and MLP channels live in a block, what the model weighs without some of them, and their removal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engines.errors import InputError
from engines.lazy import torch
from engines.profile import Matrix, ModelProfile, Tensor, from_config

QUERY, KEY, VALUE = ("q_proj", "query", "q_lin"), ("k_proj", "key", "k_lin"), ("v_proj", "value", "v_lin")
OUTPUT = ("o_proj", "out_proj", "out_lin", "attention.output.dense", "attn.c_proj")
FUSED = ("c_attn",)
UP = ("gate_proj", "up_proj", "fc1", "lin1", "c_fc", "intermediate.dense")
DOWN = ("down_proj", "fc2", "lin2", "mlp.c_proj", "output.dense")

GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""config.json has head_dim, num_attention_heads and num_key_value_heads; the width must be a multiple of the heads."""
FREE_HEADS = (*GROUPED, "vit")
"""Fewer heads of the same width can be said in config.json, so plain transformers loads the result."""


def _is(m: Matrix, names: tuple[str, ...]) -> bool:
    return m.role in names or m.role != "output.dense" and m.role.rsplit(".", 1)[-1] in names


@dataclass(frozen=True)
class Anatomy:
    """Roles of one block's matrices and the counts that are the same in every block."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    layers: int

    @property
    def group(self) -> int:
        """Query heads that share a key and a value."""
        return self.heads // self.kv_heads


def anatomy(profile: ModelProfile) -> Anatomy:
    """Read the counts off the matrices.

    Raises:
        InputError: a block has other matrices than attention and an MLP, or blocks differ.
    """
    found = set()
    layers = sorted({m.layer for m in profile.matrices})
    for layer in layers:
        here = [m for m in profile.matrices if m.layer == layer]
        fused = [m for m in here if _is(m, FUSED)]
        query = fused or [m for m in here if _is(m, QUERY)]
        key = fused or [m for m in here if _is(m, KEY)]
        out, down = [m for m in here if _is(m, OUTPUT)], [m for m in here if _is(m, DOWN)]
        ups = [m for m in here if _is(m, UP)]
        known = sum(map(len, (fused, out, down, ups))) + (0 if fused else 3 * len(query))
        if not (len(query) == len(out) == len(down) == 1 and ups and len(key) == 1 and known == len(here)):
            raise InputError("method", "structured", f"the blocks of a {profile.architecture} model are not an attention and an MLP that it knows",
                             "Choose magnitude or wanda, or a llama, gpt2, bert or vit model")
        width = out[0].inp
        keys = width if fused else key[0].out
        found.add((width, keys, down[0].inp))
    if len(found) != 1 or not profile.head_dim:
        raise InputError("method", "structured", "the blocks of this model differ in width", "Choose magnitude or wanda")
    width, keys, mlp = found.pop()
    return Anatomy(width // profile.head_dim, keys // profile.head_dim, profile.head_dim, mlp, len(layers))


def head_choices(profile: ModelProfile, a: Anatomy) -> list[tuple[int, int]]:
    """(key-value heads, query heads for each) that the architecture can keep, the present ones included."""
    pairs = [(k, g) for k in range(1, a.kv_heads + 1) for g in range(1, a.group + 1)]
    if profile.architecture in GROUPED:
        pairs = [(k, g) for k, g in pairs if profile.hidden % (k * g) == 0 or (k, g) == (a.kv_heads, a.group)]
    return pairs


def nearest_heads(profile: ModelProfile, a: Anatomy, share: float) -> tuple[int, int]:
    """The choice nearest to removing ``share`` of the heads; fewer heads win a tie, then whole groups."""
    if share <= 0:
        return a.kv_heads, a.group
    target = a.heads * (1.0 - share)
    return min(head_choices(profile, a), key=lambda p: (abs(p[0] * p[1] - target), p[0] * p[1], a.group - p[1]))


def nearest_channels(mlp: int, share: float, multiple: int) -> int:
    """Channels kept: ``mlp`` (1 - share) rounded to a multiple that suits the kernels."""
    if share <= 0:
        return mlp
    step = multiple if mlp >= 2 * multiple else 1
    return min(mlp, max(step, round(mlp * (1.0 - share) / step) * step))


def smaller_tensors(profile: ModelProfile, a: Anatomy, kv: int, group: int, mlp: int) -> tuple[Tensor, ...]:
    """The tensors of the model that keeps these counts in every block."""
    width, keys = kv * group * a.head_dim, kv * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for m in profile.matrices:
        out, inp = m.out, m.inp
        if _is(m, FUSED):
            out = 3 * width
        elif _is(m, QUERY):
            out = width
        elif _is(m, KEY) or _is(m, VALUE):
            out = keys
        elif _is(m, OUTPUT):
            inp = width
        elif _is(m, UP):
            out = mlp
        elif _is(m, DOWN):
            inp = mlp
        shapes[f"{m.name}.weight"] = (inp, out) if m.conv1d else (out, inp)
        shapes[f"{m.name}.bias"] = (out,)
    return tuple(Tensor(t.name, shapes.get(t.name, t.shape), t.dtype) for t in profile.tensors)


def smaller(profile: ModelProfile, a: Anatomy, kv: int, group: int, mlp: int) -> ModelProfile:
    """The profile of that model."""
    tensors = smaller_tensors(profile, a, kv, group, mlp)
    config = {**profile.config, **config_changes(profile.architecture, profile.config, a, kv, group, mlp)}
    made = from_config(profile.source, config, tensors)
    return dataclasses.replace(made, task=profile.task, has_weights=profile.has_weights)


def config_changes(architecture: str, config: dict, a: Anatomy, kv: int, group: int, mlp: int) -> dict:
    """What of the new shapes config.json can say."""
    changes: dict = {}
    if mlp != a.mlp:
        changes[{"gpt2": "n_inner", "distilbert": "hidden_dim"}.get(architecture, "intermediate_size")] = mlp
    if (kv, group) != (a.kv_heads, a.group) and architecture in FREE_HEADS:
        changes.update(num_attention_heads=kv * group, head_dim=a.head_dim)
        if architecture in GROUPED:
            changes["num_key_value_heads"] = kv
    return changes


# -- in a live model -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Block:
    """The linear modules of one block: name -> (Matrix, module)."""

    query: tuple
    key: tuple
    value: tuple
    out: tuple
    ups: list
    down: tuple
    fused: bool


def block_of(linears) -> Block:
    """Sort the (Matrix, module) pairs of one block; a fused projection stands for query, key and value."""
    one = lambda names: next((p for p in linears if _is(p[0], names)), None)  # noqa: E731
    fused = one(FUSED)
    return Block(fused or one(QUERY), fused or one(KEY), fused or one(VALUE), one(OUTPUT), [p for p in linears if _is(p[0], UP)], one(DOWN),
                 fused is not None)


def rows_of(kept, head_dim: int):
    """Indices of the features that belong to the heads ``kept`` (sorted int64)."""
    return (kept[:, None] * head_dim + torch.arange(head_dim)).flatten()


def take(pair, context, *, out=None, inp=None) -> None:
    """Keep the features ``out`` and ``inp`` (int64 indices) of one linear module; its mask follows."""
    matrix, module = pair
    rows, columns = (1, 0) if matrix.conv1d else (0, 1)
    name = f"{matrix.name}.weight"
    mask = context.masks.get(name)
    with torch.no_grad():
        w = module.weight.data
        for index, dim in ((out, rows), (inp, columns)):
            if index is not None:
                w = w.index_select(dim, index.to(w.device))
                mask = mask.index_select(dim, index.to(mask.device)) if mask is not None else None
        if out is not None and module.bias is not None:
            module.bias = torch.nn.Parameter(module.bias.data.index_select(0, out.to(w.device)).clone(), requires_grad=module.bias.requires_grad)
        module.weight = torch.nn.Parameter(w.contiguous(), requires_grad=module.weight.requires_grad)
    if mask is not None:
        context.masks[name] = mask.contiguous()
    sizes = dict(out=("nf", "out_features"), inp=("nx", "in_features"))
    for index, names in ((out, sizes["out"]), (inp, sizes["inp"])):
        for attribute in names:
            if index is not None and hasattr(module, attribute):
                setattr(module, attribute, len(index))


def remove(model, block: Block, context, a: Anatomy, heads, kv, channels) -> None:
    """Cut one block down to the sorted indices ``heads`` (query), ``kv`` and ``channels``; None leaves a part alone."""
    if heads is not None:
        q = rows_of(heads, a.head_dim)
        if block.fused:
            take(block.query, context, out=torch.cat([q + i * a.heads * a.head_dim for i in range(3)]))
        else:
            take(block.query, context, out=q)
            take(block.key, context, out=rows_of(kv, a.head_dim))
            take(block.value, context, out=rows_of(kv, a.head_dim))
        take(block.out, context, inp=q)
        attention = model.get_submodule(block.query[0].name.rpartition(".")[0])
        numbers = dict(num_heads=len(heads), n_heads=len(heads), num_attention_heads=len(heads), num_key_value_heads=len(kv),
                       num_key_value_groups=len(heads) // len(kv), all_head_size=len(q), split_size=len(q))
        for attribute, value in numbers.items():
            if type(getattr(attention, attribute, None)) is int:
                setattr(attention, attribute, value)
    if channels is not None:
        for up in block.ups:
            take(up, context, out=channels)
        take(block.down, context, inp=channels)
        mlp = model.get_submodule(block.down[0].name.rpartition(".")[0])
        if type(getattr(mlp, "intermediate_size", None)) is int:
            mlp.intermediate_size = len(channels)

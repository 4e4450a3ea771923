"""What the packing methods have in common: which tensors they pack, the exact stored size, the swap of layers."""

from __future__ import annotations

import re

from engines import cost
from engines.errors import InputError
from engines.lazy import torch
from engines.profile import Matrix, ModelProfile, Tensor
from engines.shapes import file_bytes

TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
SHARE = 0.05
"""From this share of all parameters on the token table is packed too, unless told otherwise."""


# -- what is packed ------------------------------------------------------------------------------------------
def _names(skip: str) -> list[str]:
    return [s.strip() for s in skip.split(",") if s.strip()]


def skipped(m: Matrix, skip: str) -> bool:
    """True if one of the comma-separated names is the matrix's role, its path or a part of the path."""
    return any(s in (m.role, m.name) or s in m.name.split(".") for s in _names(skip))


def chosen(profile: ModelProfile, skip: str) -> list[Matrix]:
    """The matrices inside blocks that are packed."""
    if not skip:
        return list(profile.matrices)
    return [m for m in profile.matrices if not skipped(m, skip)]


def check(method, profile: ModelProfile) -> None:
    """Refuse a model without dense linear layers, and names in ``skip`` that match nothing.

    Raises:
        InputError: as said.
    """
    id = method.card.id
    if not profile.matrices:
        raise InputError("model", profile.source, "it has no dense linear layers inside blocks (perhaps they are packed already)",
                         "Start from a model that is not quantized")
    for name in _names(method.skip):
        if not any(skipped(m, name) for m in profile.matrices):
            raise InputError(f"{id}.skip", name, "no layer has this name", "Choose from " + ", ".join(profile.roles))
    if not chosen(profile, method.skip):
        raise InputError(f"{id}.skip", method.skip, "it leaves no layer to quantize", "Leave out fewer layers")


def tables(profile: ModelProfile) -> list[Tensor]:
    """The token embedding and, where it is a tensor of its own, the output head."""
    if profile.architecture.startswith("gemma3"):   # its embedding multiplies inside the module
        return []
    if "tables" not in profile.memo:
        table = [t for t in profile.tensors if len(t.shape) == 2 and TABLE.search(t.name)]
        head = [t for t in profile.tensors if len(t.shape) == 2 and HEAD.search(t.name) and not profile.tied]
        profile.memo["tables"] = table[:1] + head[:1] if table else []
    return profile.memo["tables"]


def packs_table(profile: ModelProfile, embedding: str) -> bool:
    """True if the token table (and head) become int8; ``auto`` follows their share of the parameters."""
    if embedding == "auto":
        return sum(t.size for t in tables(profile)) >= SHARE * profile.parameters
    return embedding == "int8"


# -- exact size ----------------------------------------------------------------------------------------------
def int8_tensors(path: str, rows: int, width: int) -> list[Tensor]:
    return [Tensor(f"{path}.qweight", (rows, width), "int8"), Tensor(f"{path}.scales", (rows,), "bfloat16")]


def int4_tensors(path: str, rows: int, width: int, bits: int, group: int, symmetric: bool) -> list[Tensor]:
    groups = width // group
    found = [Tensor(f"{path}.qweight", (rows, width * bits // 8), "uint8"), Tensor(f"{path}.scales", (rows, groups), "bfloat16")]
    if not symmetric:
        found.append(Tensor(f"{path}.zeros", (rows, 1 if groups == 1 else (groups + 7) // 8 * 4), "uint8"))
    return found


def stored(profile: ModelProfile, packed: dict[str, list[Tensor]], table: bool) -> list[Tensor]:
    """Every tensor of the saved result: ``packed`` (path -> its tensors) in place of those weights, the rest bf16."""
    packed = dict(packed)
    if table:
        for t in tables(profile):
            path = t.name.removesuffix(".weight")
            packed[path] = int8_tensors(path, *t.shape)
    out = []
    for t in profile.tensors:
        path = t.name.removesuffix(".weight")
        if t.name.endswith(".weight") and path in packed:
            out += packed[path]
        elif profile.tied and HEAD.search(t.name) and any(TABLE.search(o.name) for o in profile.tensors):
            continue   # some files hold the tied head a second time; what is saved does not
        else:
            out.append(Tensor(t.name, t.shape, "bfloat16" if t.dtype in ("float32", "float16", "float64") else t.dtype))
    return out


def footprint(profile: ModelProfile, batch, rows: list[Tensor], **more):
    """Footprint of a packing stage whose saved result holds ``rows``; ``more`` as for ``cost.without_training``."""
    size = file_bytes(rows)
    return cost.without_training(profile, batch, result=size, bits_per_weight=8 * size / max(1, profile.parameters), **more)


def largest(profile: ModelProfile) -> int:
    """Entries of the largest matrix or table."""
    return max([m.size for m in profile.matrices] + [t.size for t in tables(profile)] + [1])


# -- the live model ------------------------------------------------------------------------------------------
def live_tables(model) -> tuple[str | None, str | None, bool]:
    """(path of the token embedding, path of the head, True if they are one tensor); None where it is no plain layer."""
    nn = torch.nn
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(table) is not nn.Embedding:
        return None, None, False
    paths = {id(m): n for n, m in model.named_modules()}
    path = paths[id(table)]
    if not TABLE.search(f"{path}.weight"):
        return None, None, False
    if type(head) is not nn.Linear or not HEAD.search(f"{paths.get(id(head))}.weight"):
        return path, None, False
    return path, paths[id(head)], head.weight is table.weight


def round_rest(model) -> None:
    """Round what stays dense to bf16 values, whatever type it is held in: this is what the file will hold."""
    with torch.no_grad():
        for t in model.state_dict().values():
            if t.is_floating_point() and t.dtype != torch.bfloat16:
                t.copy_(t.to(torch.bfloat16))


def pack_tables(model, mode: str) -> list[str]:
    """Replace the token embedding and the head by int8 layers; returns what was replaced."""
    from engines.layers.int8 import Int8Embedding, Int8Linear, TiedInt8Head
    from engines.models.packed import put, untie

    table, head, tied = live_tables(model)
    if table is None:
        return []
    old = model.get_submodule(table)
    new = Int8Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx, old.weight.dtype, old.weight.device)
    new.fill(old.weight)
    done = [table]
    if head is not None:
        dense = model.get_submodule(head)
        if tied:
            packed = TiedInt8Head(new, dense.bias is not None, mode)
        else:
            packed = Int8Linear(dense.in_features, dense.out_features, dense.bias is not None, mode, device=dense.weight.device)
            packed.fill(dense.weight)
        if dense.bias is not None:
            packed.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        put(model, head, packed)
        done.append(head)
    put(model, table, new)
    untie(model)
    return done


def kept(m: Matrix, w, context):
    """The mask [out, in], False where a weight of ``w`` must stay zero, or None.

    A recorded mask wins; without one, a matrix of which a twentieth or more is exactly zero was pruned before it was loaded.
    """
    mask = context.masks.get(f"{m.name}.weight")
    if mask is not None:
        mask = mask.to(w.device)
        return mask.t() if m.conv1d else mask
    zeros = w == 0
    return ~zeros if float(zeros.float().mean()) >= 0.05 else None


def swap(model, name: str, old, new) -> None:
    """Put a filled packed layer in place of a dense one; the bias moves along."""
    from engines.models.packed import put
    if old.bias is not None:
        new.bias = torch.nn.Parameter(old.bias.detach().clone(), requires_grad=False)
    put(model, name, new)


def note(context, m: Matrix, bits: float, error: float) -> None:
    """Remember the figures of one layer for the layer map."""
    context.state.setdefault("bits", []).append([m.layer, m.role, bits])
    context.state.setdefault("error", []).append([m.layer, m.role, error])


def figures(context) -> dict[str, list]:
    """Layer map: bits per weight, and relative error in percent."""
    return {key: context.state[key] for key in ("bits", "error") if context.state.get(key)}


def relative(a, b) -> float:
    """||a - b|| / ||a|| of two tensors; 0 for an empty signal."""
    norm = float(a.float().norm())
    return float((a.float() - b.float()).norm()) / norm if norm else 0.0


def finish_packing(model, context, table: bool, mode: str) -> None:
    """The common end: tables, the rest rounded to bf16, nothing left to train."""
    tables_done = pack_tables(model, mode) if table else []
    round_rest(model)
    model.requires_grad_(False)
    errors = [row[2] for row in context.state.get("error", [])]
    worst = max(context.state.get("error", [[0, "", 0.0]]), key=lambda row: row[2])
    also = " and " + " and ".join(tables_done) + " as int8" if tables_done else ""
    context.reporter.event("choice", f"{len(errors)} layers packed{also}; mean relative error {sum(errors) / max(1, len(errors)):.4f}, "
                                     f"largest {worst[2]:.4f} in layer {worst[0]} {worst[1]}", layers=len(errors))

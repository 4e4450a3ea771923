"""Models with packed integer weights: what is written beside the tensors, and how the layers are made again.

``model.safetensors`` holds for a packed layer ``name.qweight`` (int8 rows, or bits packed into uint8), ``name.scales``
and, on asymmetric int4 grids, ``name.zeros``; ``fettle.json`` holds under ``packed`` what ``pack_description`` returns.
"""

from __future__ import annotations

from typing import Any

from engines.errors import InputError
from engines.lazy import torch
from engines.profile import Tensor
from engines.shapes import file_bytes

VERSION = 1
HEADER = "fettle_header"
"""Attribute of a model whose file is to have a JSON header of this many bytes."""
REST = "bfloat16"
"""Type on disk of everything that a packing method leaves dense; its values are already rounded to it in memory."""


def is_packed(module) -> bool:
    """True for a layer that keeps integers instead of a ``weight``."""
    return hasattr(module, "kind") and hasattr(module, "describe") and hasattr(module, "bits")


def packed_layers(model) -> dict[str, Any]:
    """Every packed layer of ``model`` by its path."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def pack_description(model) -> dict | None:
    """What ``rebuild`` needs, JSON-able: ``{"version": 1, "layers": {path: {"kind": "int8", "in": ..., ...}}}``; None if dense."""
    layers = packed_layers(model)
    if not layers:
        return None
    paths = {id(module): name for name, module in layers.items()}
    described = {}
    for name, module in layers.items():
        described[name] = module.describe()
        if module.kind == "int8-tied-head":
            described[name]["table"] = paths[id(module._table[0])]
    header = getattr(model, HEADER, None)
    return {"version": VERSION, "rest": REST, "layers": described, **({"header": header} if header else {})}


def file_metadata(model, tensors: dict) -> dict[str, str]:
    """Metadata of the safetensors file that holds ``tensors`` (name -> tensor).

    Where a mixture of layers promised a length of the header, a filler brings it there: which matrix has which type would
    otherwise decide the size of the file by some bytes.
    """
    plain, header = {"format": "pt"}, getattr(model, HEADER, None)
    if not header:
        return plain
    rows = [Tensor(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    filled = {**plain, "filler": ""}
    missing = header - (file_bytes(rows, filled) - 8 - sum(t.numel() * t.element_size() for t in tensors.values()))
    return {**plain, "filler": "." * missing} if missing >= 0 else plain


def rest_type(model) -> str | None:
    """The type in which the dense tensors of a packed model are to be stored; None for a model without packed layers."""
    return REST if packed_layers(model) else None


def keeps_type(name: str, model) -> bool:
    """True for a stored tensor whose type is part of the packed format (scales), whatever the rest is cast to."""
    path, _, key = name.rpartition(".")
    if key not in ("qweight", "scales", "zeros"):
        return False
    try:
        return is_packed(model.get_submodule(path))
    except AttributeError:
        return False


def put(model, path: str, module) -> None:
    """Replace the submodule at ``path``; the new one stands in the same mode (train or eval)."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    module.train(getattr(owner, name).training)
    setattr(owner, name, module)


def untie(model) -> None:
    """Make ``tie_weights`` leave a model alone whose table or head is packed: there is no parameter to tie any more."""
    if any(module.kind.startswith("int8-") for module in packed_layers(model).values()):
        for part in model.modules():
            if getattr(part, "_tied_weights_keys", None):
                part._tied_weights_keys = None
        model.all_tied_weights_keys = {}


def rebuild(model, description: dict):
    """Replace layers of a freshly built dense model by empty packed ones; then ``load_state_dict`` fills them.

    Args:
        description: as made by ``pack_description``.

    Raises:
        InputError: a newer format, or layers that this model does not have.
    """
    from engines.layers.int4 import Int4Linear
    from engines.layers.int8 import Int8Embedding, Int8Linear, TiedInt8Head

    if description.get("version", 0) > VERSION:
        raise InputError("model", f"packed format {description['version']}", f"this version reads formats up to {VERSION}",
                         "Update the workbench")
    layers = description["layers"]
    # A tied head refers to its table, so the tables come first.
    for path, facts in sorted(layers.items(), key=lambda kv: kv[1]["kind"] == "int8-tied-head"):
        try:
            old = model.get_submodule(path)
        except AttributeError:
            raise InputError("model", path, "fettle.json describes a layer that config.json does not build",
                             "The folder is damaged: export the run again") from None
        weight = getattr(old, "weight", None)
        device = weight.device if weight is not None else None
        kind = facts["kind"]
        if kind == "int8":
            new = Int8Linear(facts["in"], facts["out"], facts["bias"], facts["mode"], facts["conv1d"], device)
        elif kind == "int4":
            new = Int4Linear(facts["in"], facts["out"], facts["bias"], facts["group"], facts["bits"], facts["symmetric"],
                             facts["conv1d"], device)
        elif kind == "int8-embedding":
            new = Int8Embedding(facts["rows"], facts["width"], facts["padding_idx"], weight.dtype, device)
        elif kind == "int8-tied-head":
            new = TiedInt8Head(model.get_submodule(facts["table"]), facts["bias"], facts["mode"])
        else:
            raise InputError("model", kind, "an unknown kind of packed layer", "Update the workbench")
        if getattr(new, "bias", None) is not None and weight is not None:
            new.bias.data = new.bias.data.to(weight.dtype)
        put(model, path, new)
    untie(model)
    if description.get("header"):
        setattr(model, HEADER, description["header"])
    model.requires_grad_(False)
    return model


def dense_state(model, dtype=None) -> dict:
    """The state dict that the dense model of the same config reads: packed layers as dequantized ``weight``.

    Args:
        dtype: type of the dequantized weights; fp32 by default, which holds every integer times its scale exactly.

    Returns:
        name -> tensor on the CPU; a tied head appears under its own name too.
    """
    dtype = dtype or torch.float32
    packed = packed_layers(model)
    inner = {f"{name}.{key}" for name in packed for key in ("qweight", "scales", "zeros")}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name not in inner}
    for name, module in packed.items():
        weight = module.dequantize().to(dtype).cpu()
        state[f"{name}.weight"] = (weight.t() if getattr(module, "conv1d", False) else weight).contiguous()
    return state

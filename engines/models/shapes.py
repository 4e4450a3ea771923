"""Models whose tensors no longer have the shapes that their config.json implies (structured pruning).

What differs from a model freshly built from the config is recorded (tensor shapes, and whole numbers such
as ``num_heads`` or ``out_features`` on modules) and put back before the weights are loaded.
"""

from __future__ import annotations

import torch


def description(model) -> dict | None:
    """``{"tensors": {name: shape}, "numbers": {module: {attribute: value}}}``, or None when the config says it all."""
    try:
        with torch.device("meta"):
            plain = type(model)._from_config(model.config) if hasattr(type(model), "_from_config") else type(model)(model.config)
    except (ValueError, RuntimeError, TypeError):
        # The config itself cannot be built any more (a head count that does not divide the width, say).
        return None
    tensors, numbers = {}, {}
    reference = dict(plain.named_modules())
    for name, module in model.named_modules():
        other = reference.get(name)
        if other is None or type(other) is not type(module):
            continue
        for key, value in module.__dict__.items():
            if type(value) is int and type(other.__dict__.get(key)) is int and value != other.__dict__[key]:
                numbers.setdefault(name, {})[key] = value
        for key, p in module.named_parameters(recurse=False):
            mine = dict(other.named_parameters(recurse=False)).get(key)
            if mine is not None and tuple(mine.shape) != tuple(p.shape):
                tensors[f"{name}.{key}"] = list(p.shape)
    return dict(tensors=tensors, numbers=numbers) if tensors else None


def apply(model, described: dict) -> None:
    """Give a freshly built model the recorded shapes; the new tensors are uninitialised until weights are loaded."""
    modules = dict(model.named_modules())
    for name, values in described["numbers"].items():
        for key, value in values.items():
            setattr(modules[name], key, value)
    for path, shape in described["tensors"].items():
        owner, _, key = path.rpartition(".")
        old = getattr(modules[owner], key)
        setattr(modules[owner], key, torch.nn.Parameter(torch.empty(shape, dtype=old.dtype), requires_grad=old.requires_grad))

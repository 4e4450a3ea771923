"""Checkpoints for exact resume: safetensors and JSON, written aside and moved into place, the last two kept."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

KEEP = 2


def pack(value, prefix: str, tensors: dict):
    """JSON skeleton of nested dicts, lists, numbers, texts and tensors; tensors go into ``tensors`` under their path.

    Raises:
        TypeError: something that cannot be kept (a function, an object).
    """
    if isinstance(value, torch.Tensor):
        tensors[prefix] = value.detach().cpu().contiguous().clone()
        return {"tensor": prefix}
    if isinstance(value, dict):
        return {"dict": [[k, pack(v, f"{prefix}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(v, f"{prefix}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if isinstance(value, np.ndarray):
        return {"array": pack(torch.from_numpy(np.ascontiguousarray(value)), prefix, tensors)}
    if isinstance(value, np.generic):
        return {"plain": value.item()}
    raise TypeError(f"context.state{prefix.removeprefix('state')}: a {type(value).__name__} cannot be saved; "
                    "keep numbers, texts, lists, dicts and tensors")


def unpack(skeleton, tensors: dict):
    """The value that ``pack`` was given."""
    kind, inner = next(iter(skeleton.items()))
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in inner}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(unpack(v, tensors) for v in inner)
    if kind == "array":
        return unpack(inner, tensors).numpy()
    return inner


def save(folder: Path, *, model, optimizer, context, facts: dict) -> tuple[Path, int]:
    """Write one checkpoint named after ``facts["run_step"]``; return its folder and its bytes."""
    tensors: dict[str, torch.Tensor] = {}
    # What the optimizer holds may have been frozen on the way, and has moved until then.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad or id(p) in held:
            tensors[f"model/{name}"] = p.detach().cpu().contiguous().clone()
    for name, b in model.named_buffers():
        tensors[f"buffer/{name}"] = b.detach().cpu().contiguous().clone()
    for name, mask in context.masks.items():
        tensors[f"mask/{name}"] = mask.cpu().contiguous()
    state = optimizer.state_dict()
    skeleton = dict(
        facts=facts, state=pack(context.state, "state", tensors),
        optimizer=pack({str(k): v for k, v in state["state"].items()}, "optimizer", tensors),
        python=pack(_tuple_random(), "python", tensors), numpy=pack(list(np.random.get_state(legacy=True)), "numpy", tensors))
    tensors["rng/torch"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    target = folder / f"step-{facts['run_step']:09d}"
    fresh = folder / f".new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(tensors, fresh / "checkpoint.safetensors")
    (fresh / "checkpoint.json").write_text(json.dumps(skeleton))
    _sync(fresh / "checkpoint.safetensors")
    _sync(fresh / "checkpoint.json")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target, sum(p.stat().st_size for p in target.iterdir())


def _tuple_random():
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def _sync(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = [p for p in sorted(folder.glob("step-*")) if (p / "checkpoint.json").is_file() and (p / "checkpoint.safetensors").is_file()]
    return found[-1] if found else None


def facts(path: Path) -> dict:
    """What ``save`` was told: stage, step, run_step, used seconds and so on."""
    return json.loads((path / "checkpoint.json").read_text())["facts"]


def state_of(path: Path) -> dict:
    """The method's own memory (``context.state``) in a checkpoint, without touching anything."""
    skeleton = json.loads((path / "checkpoint.json").read_text())
    return unpack(skeleton["state"], load_file(path / "checkpoint.safetensors"))


def restore(path: Path, *, model, optimizer, context) -> dict:
    """Put everything back in place; return the facts.

    Raises:
        ValueError: the checkpoint does not belong to this model.
    """
    skeleton = json.loads((path / "checkpoint.json").read_text())
    tensors = load_file(path / "checkpoint.safetensors")
    restore_weights(model, context, skeleton, tensors)
    saved = unpack(skeleton["optimizer"], tensors)
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": {int(k): v for k, v in saved.items()}, "param_groups": current["param_groups"]})
    version, numbers, gauss = unpack(skeleton["python"], tensors)
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(unpack(skeleton["numpy"], tensors)))
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return skeleton["facts"]


def restore_weights(model, context, skeleton: dict, tensors: dict) -> None:
    """Only weights, masks and the method's state."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            owner = params if kind == "model" else buffers if kind == "buffer" else None
            if owner is not None:
                if rest not in owner or owner[rest].shape != value.shape:
                    raise ValueError(f"the checkpoint has {rest}, which the model has not in this shape")
                owner[rest].copy_(value)
            elif kind == "mask":
                context.masks[rest] = value.to(params[rest].device) if rest in params else value
    context.state.clear()
    context.state.update(unpack(skeleton["state"], tensors))

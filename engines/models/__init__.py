"""Models: loading by task, the linear layers inside blocks, saving so that every result loads again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import InputError
from engines.heads import has_head
from engines.lazy import torch
from engines.models import adapter
from engines.models.locate import bundled, locate
from engines.profile import Matrix, ModelProfile, Tensor, _matrices, from_config, read_model, task_of

__all__ = ["Loaded", "bundled", "load", "locate", "matrices", "profile_of", "save", "weight"]

LAYOUT = "fettle.json"


@dataclass
class Loaded:
    """A model in memory. ``tokenizer`` is a tokenizer, or an ``ImageProcessor`` for images."""

    model: Any
    tokenizer: Any
    profile: ModelProfile
    info: dict = field(default_factory=dict)
    """Content of ``fettle.json`` when the folder was written by us."""


def _auto_class(task: str):
    import transformers
    return {"causal-lm": transformers.AutoModelForCausalLM,
            "text-classification": transformers.AutoModelForSequenceClassification,
            "image-classification": transformers.AutoModelForImageClassification}[task]


def load(source: str | Path, task: str = "auto", *, labels: list[str] | None = None, dtype: str = "float32", device: str = "cpu",
         from_scratch: bool = False, seed: int = 0) -> Loaded:
    """Load a bundled model, a local folder or a hub id.

    Args:
        task: ``auto`` takes it from config.json.
        labels: names of the classes; a body without a head gets a new one of this size.
        dtype: type of the weights in memory; ``stored`` keeps that of the files.
        from_scratch: random weights of the same shapes.

    Raises:
        InputError: not there, pickle only, another task, or a head that does not fit the labels.
    """
    import transformers

    # A bar for a file that loads in milliseconds is noise in the run's log.
    transformers.utils.logging.disable_progress_bar()
    where = locate(str(source))
    local = isinstance(where, Path)
    if local and adapter.is_adapter(where):
        return _with_adapter(where, str(source), task, labels, dtype=dtype, device=device, from_scratch=from_scratch, seed=seed)
    if local:
        described = read_model(where, str(source))
        config_dict = described.config
    else:
        config_dict = _hub_config(where)
    found = task_of(config_dict)
    task = found if task == "auto" else task
    if task not in ("causal-lm", "text-classification", "image-classification"):
        raise InputError("task", task, "not a task", "Choose causal-lm, text-classification or image-classification")
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as e:
        raise InputError("model", str(source), f"config.json is not understood ({str(e).splitlines()[0][:120]})",
                         "Use a model type that transformers knows without remote code") from None
    if labels is not None and task != "causal-lm":
        _fit_head(config, config_dict, labels, str(source), task)
    config.use_cache = task == "causal-lm"
    layout = json.loads((where / LAYOUT).read_text()) if local and (where / LAYOUT).is_file() else {}
    kind = getattr(torch, dtype) if dtype != "stored" else None
    torch.manual_seed(seed)
    if from_scratch or (local and not described.has_weights):
        if not from_scratch:
            raise InputError("model", str(source), "the folder has a config.json but no *.safetensors",
                             "Add the weights, or set from_scratch: true in the full method to train from random weights")
        model = _auto_class(task).from_config(config, dtype=kind or torch.float32, attn_implementation="sdpa")
    elif layout.get("packed") or layout.get("shapes") or layout.get("added"):
        # What is neither packed nor cast comes in the type of its file; packed models are bfloat16 around their integers.
        model = _rebuild(where, config, layout, task, kind or (None if layout.get("packed") else getattr(torch, described.dtype, None)))
    else:
        try:
            model = _auto_class(task).from_pretrained(
                where, config=config, dtype=kind or "auto", use_safetensors=True, trust_remote_code=False,
                attn_implementation="sdpa", ignore_mismatched_sizes=False)
        except (OSError, ValueError, RuntimeError) as e:
            raise InputError("model", str(source), f"transformers cannot load it ({str(e).strip().splitlines()[0][:160]})",
                             "Check the id, the network and that the folder holds safetensors") from None
    model = model.to(device).eval()
    tokenizer = _tokenizer(where, task, config_dict)
    profile = profile_of(model, str(source), task)
    if task != "causal-lm" and getattr(tokenizer, "pad_token_id", 0) is not None and hasattr(config, "pad_token_id"):
        model.config.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return Loaded(model, tokenizer, profile, layout)


def _with_adapter(where: Path, source: str, task: str, labels: list[str] | None, **how) -> Loaded:
    """The base model of an adapter folder with the adapter merged in."""
    base = load(adapter.base_of(where), task, labels=labels or adapter.labels_of(where), **how)
    adapter.fits(where, base.profile)
    model = adapter.merged(base.model, where).eval()
    task = base.profile.task
    return Loaded(model, base.tokenizer, profile_of(model, source, task), {})


def _hub_config(name: str) -> dict:
    from transformers import PretrainedConfig
    try:
        return PretrainedConfig.get_config_dict(name, trust_remote_code=False)[0]
    except (OSError, ValueError) as e:
        raise InputError("model", name, f"the hub gave no such model ({type(e).__name__})",
                         "Check the id and the network, or give a local folder") from None


def _fit_head(config, stored: dict, labels: list[str], source: str, task: str) -> None:
    trained = has_head(stored)
    known = len(stored.get("id2label") or {}) or int(stored.get("num_labels") or 2)
    if trained and known != len(labels):
        raise InputError("data", f"{len(labels)} labels", f"the head of {source} was trained for {known}",
                         f"Choose data with {known} labels, or a model without a classification head")
    if not trained:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}


def _tokenizer(where, task: str, config: dict):
    if task == "image-classification":
        from engines.data.tokens import ImageProcessor
        path = where / "preprocessor_config.json" if isinstance(where, Path) else None
        if path is None:
            import huggingface_hub
            path = Path(huggingface_hub.hf_hub_download(where, "preprocessor_config.json"))
        return ImageProcessor.from_config(json.loads(path.read_text()) if path.is_file() else {}, config)
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError("model", str(where), f"it has no tokenizer that can be read ({str(e).splitlines()[0][:120]})",
                         "Put tokenizer.json beside config.json") from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    # Ours is the only code that cuts texts; the warning about over-long inputs would be false.
    tokenizer.model_max_length = int(1e9)
    return tokenizer


def _rebuild(where: Path, config, layout: dict, task: str, kind):
    """A shrunk, packed or extended model: build the module tree, give it the recorded shapes and layers, then fill it."""
    from safetensors.torch import load_file

    from engines.models import added, packed, shapes

    model = _auto_class(task).from_config(config, dtype=kind or torch.bfloat16, attn_implementation="sdpa")
    if layout.get("shapes"):
        shapes.apply(model, layout["shapes"])
    if layout.get("added"):
        model = added.rebuild(model, layout["added"])
    if layout.get("packed"):
        model = packed.rebuild(model, layout["packed"])
    state = load_file(where / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied and not name.endswith(("position_ids", "attn.bias", "masked_bias"))]
    if missing or unexpected:
        raise InputError("model", str(where), f"{len(missing)} tensors are missing and {len(unexpected)} are unknown",
                         "The folder is damaged: export the run again")
    model.tie_weights()
    return model


def matrices(model) -> list[tuple[Matrix, Any]]:
    """The linear layers inside blocks of a live model, in the order of the blocks: ``nn.Linear`` and Conv1D.

    Names are module paths of the task model, as in ``ModelProfile.matrices``; packed and adapted layers are not among them.
    """
    from transformers.pytorch_utils import Conv1D

    layers = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear or type(module) is Conv1D:
            layers[name] = module
    tensors = tuple(Tensor(f"{n}.weight", tuple(m.weight.shape), "") for n, m in layers.items())
    found = _matrices(tensors, "gpt2" if any(type(m) is Conv1D for m in layers.values()) else "")
    return [(Matrix(m.name, m.layer, m.role, m.out, m.inp, layers[m.name].bias is not None, m.conv1d), layers[m.name]) for m in found]


def weight(module):
    """The weight as [out, in]: the parameter itself of a Linear, a transposed view of a Conv1D (writes go through)."""
    return module.weight if isinstance(module, torch.nn.Linear) else module.weight.t()


def profile_of(model, source: str, task: str) -> ModelProfile:
    """The profile of a live model; tied tensors once, types as held in memory."""
    seen, tensors = set(), []
    for name, p in model.named_parameters():
        if id(p) not in seen:
            seen.add(id(p))
            tensors.append(Tensor(name, tuple(p.shape), str(p.dtype).removeprefix("torch.")))
    config = model.config.to_dict()
    config.setdefault("architectures", [type(model).__name__])
    config["architectures"] = [type(model).__name__]
    profile = from_config(source, config, tuple(tensors))
    return profile if profile.task == task else dataclasses.replace(profile, task=task)


def save(model, tokenizer, folder: str | Path, *, dtype: str = "stored", layout: dict | None = None) -> dict:
    """Write config.json, model.safetensors, tokenizer and, where plain transformers could not know it, ``fettle.json``.

    The files appear together: they are written beside the folder and moved into place.

    Args:
        dtype: type of the dense floating-point tensors on disk; ``stored`` keeps what is in memory.
        layout: extra facts to record (the pipeline, the sparsity).

    Returns:
        bytes (of all files), weight_bytes (model.safetensors), files (names), tensors (name -> [shape, type]).
    """
    from safetensors.torch import save_file

    from engines.models import added, packed, shapes

    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    dtype = packed.rest_type(model) or dtype   # a packed model's dense tensors hold bf16 values in whatever type
    kind = getattr(torch, dtype) if dtype != "stored" else None
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    out, seen = {}, {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and (name in tied or key in seen):
            if key in seen:
                continue
        seen[key] = name
        cast = kind is not None and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and not packed.keeps_type(name, model)
        out[name] = (tensor.to(kind) if cast else tensor).detach().cpu().contiguous()
    save_file(out, fresh / "model.safetensors", metadata=packed.file_metadata(model, out))
    # safetensors writes for the owner alone; an exported folder is meant to be read by others as well.
    (fresh / "model.safetensors").chmod(0o644)
    config = model.config
    config.architectures = [type(model).__name__]
    description, changed = packed.pack_description(model), shapes.description(model)
    if kind is not None:
        config.dtype = kind
    config.save_pretrained(fresh)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(fresh)
    _save_tokenizer(tokenizer, fresh, model)
    facts = {k: v for k, v in (("packed", description), ("shapes", changed), ("added", added.description(model)), *(layout or {}).items()) if v}
    if facts:
        (fresh / LAYOUT).write_text(json.dumps(facts, indent=1, default=str))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
    return dict(bytes=sum(sizes.values()), weight_bytes=sizes["model.safetensors"], files=sizes,
                tensors={k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in out.items()})


def _save_tokenizer(tokenizer, folder: Path, model) -> None:
    from engines.data.tokens import ImageProcessor
    if isinstance(tokenizer, ImageProcessor):
        facts = dict(tokenizer.config) or dict(
            image_processor_type="ViTImageProcessor", do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255,
            size=dict(height=tokenizer.height, width=tokenizer.width), image_mean=list(tokenizer.mean), image_std=list(tokenizer.std))
        (folder / "preprocessor_config.json").write_text(json.dumps(facts, indent=1))
    elif tokenizer is not None:
        length, tokenizer.model_max_length = tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", int(1e9))
        tokenizer.save_pretrained(folder)
        tokenizer.model_max_length = length

"""A folder that holds a peft adapter alone, used as a model: its base model with the adapter merged in. torch-free until it is loaded."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from engines.errors import InputError
from engines.profile import ModelProfile, read_header, read_model

CONFIG = "adapter_config.json"
LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")


def is_adapter(folder: str | Path) -> bool:
    """True for a folder with an adapter and no model of its own."""
    folder = Path(folder).expanduser()
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The model source that the adapter was trained on, as its config names it.

    Raises:
        InputError: the config cannot be read or names none, or the weights are pickle only.
    """
    folder = Path(folder).expanduser()
    config = _config(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise InputError("model", str(folder), "this adapter does not say which model it belongs to",
                         f"Write the model's id or folder as base_model_name_or_path into {CONFIG}")
    if Path(base).expanduser().is_dir() and Path(base).expanduser().resolve() == folder.resolve():
        raise InputError("model", str(folder), "this adapter names itself as its base model",
                         f"Write the model's id or folder as base_model_name_or_path into {CONFIG}")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = " but a pickle file, which can run code when loaded" if (folder / "adapter_model.bin").is_file() else ""
        raise InputError("model", str(folder), f"this adapter has no adapter_model.safetensors{pickled}",
                         "Save it again with save_pretrained(..., safe_serialization=True)")
    return base


def profile(folder: str | Path, base: ModelProfile, name: str | None = None) -> ModelProfile:
    """The profile of ``base`` under the adapter's name: merging changes no shape.

    Raises:
        InputError: the adapter was made for a model of other shapes.
    """
    fits(folder, base)
    return dataclasses.replace(base, source=name or str(folder))


def fits(folder: str | Path, base: ModelProfile) -> None:
    """Compare the shapes of a LoRA adapter with those of its base.

    Raises:
        InputError: a layer that the base has not, or has in another shape.
    """
    folder = Path(folder).expanduser()
    turned = bool(_config(folder).get("fan_in_fan_out"))
    shapes = {t.name: t.shape for t in base.tensors}
    for name, shape in _stored(folder).items():
        found = LORA.match(name)
        if not found or len(shape) != 2:
            continue
        layer, factor = found.groups()
        # The body alone is stored without the first part of its names.
        known = shapes.get(f"{layer}.weight") or shapes.get(f"{layer.split('.', 1)[-1]}.weight")
        if known is None and not shapes:
            return
        if known is None:
            raise _other(folder, base, f"it changes {layer}, which {base.source} does not have")
        out, inp = known[::-1] if turned else known
        side, own, there = ("inputs", shape[1], inp) if factor == "A" else ("outputs", shape[0], out)
        if own != there:
            raise _other(folder, base, f"{layer} has {own} {side} there and {there} in {base.source}")


def _other(folder: Path, base: ModelProfile, what: str) -> InputError:
    return InputError("model", str(folder), f"this adapter belongs to another base model: {what}",
                      f"Write the model that it was trained on as base_model_name_or_path into {CONFIG}, now {base.source}")


def labels_of(folder: str | Path) -> list[str] | None:
    """Names for the classes of the head that the adapter brings; None where it brings none."""
    for name, shape in _stored(Path(folder).expanduser()).items():
        if name.endswith((".classifier.weight", ".score.weight", ".classifier.out_proj.weight")) and len(shape) == 2:
            return [f"LABEL_{i}" for i in range(shape[0])]
    return None


def _stored(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(info["shape"]) for name, info in read_header(folder / "adapter_model.safetensors").items()}


def merged(model, folder: str | Path):
    """``model`` with the adapter added to its weights: a plain model of the same class.

    Raises:
        InputError: peft cannot put it into this model, or an adapter of this kind cannot be merged.
    """
    import warnings

    from peft import PeftModel
    folder = Path(folder).expanduser()
    kind = str(_config(folder).get("peft_type") or "this kind")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False, use_safetensors=True)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as e:
            said = str(e).strip().splitlines()[-1].strip()[:140]
            raise InputError("model", str(folder), f"peft cannot put this adapter into its base model ({said})",
                             f"Name the model that it was trained on as base_model_name_or_path in {CONFIG}") from None
        if not hasattr(wrapped.base_model, "merge_and_unload"):
            raise InputError("model", str(folder), f"an adapter of the kind {kind} cannot be merged into the weights",
                             "Use a LoRA adapter, or a merged model")
        plain = wrapped.merge_and_unload()
    for attribute in ("peft_config", "active_adapter"):
        if attribute in plain.__dict__:
            object.__delattr__(plain, attribute)
    return plain.requires_grad_(True)


def read(folder: str | Path, name: str | None = None) -> ModelProfile:
    """The profile of an adapter folder whose base is on this machine.

    Raises:
        InputError: as ``base_of`` and ``fits``; also when the base is not here.
    """
    from engines.models.locate import locate
    source = base_of(folder)
    try:
        where = locate(source)
    except InputError as e:
        raise InputError("model", str(folder), f"its base model {source!r} is not here ({e.problem})",
                         f"Correct base_model_name_or_path in {CONFIG}, or put the model there") from None
    if not isinstance(where, Path):
        import huggingface_hub
        try:
            where = Path(huggingface_hub.snapshot_download(where, local_files_only=True))
        except Exception:
            raise InputError("model", str(folder), f"its base model {source} is not on this machine yet",
                             f"Load {source} once, or fetch it with `hf download {source}`") from None
    return profile(folder, read(where, source) if is_adapter(where) else read_model(where, source), name)


def _config(folder: Path) -> dict:
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as e:
        raise InputError("model", str(folder), f"{CONFIG} cannot be read ({e})", "Save the adapter again") from None
    if not isinstance(found, dict):
        raise InputError("model", str(folder), f"{CONFIG} is not a mapping", "Save the adapter again")
    return found

"""A result outside the workbench: the folder as it is, a plain transformers folder, or a peft adapter, each with a model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from engines.errors import InputError

FORMATS = ("transformers", "native", "peft")
LAYOUT = "fettle.json"
_PIPELINE_TAGS = {"causal-lm": "text-generation", "text-classification": "text-classification", "image-classification": "image-classification"}
_AUTO = {"causal-lm": "AutoModelForCausalLM", "text-classification": "AutoModelForSequenceClassification",
         "image-classification": "AutoModelForImageClassification"}


def export(run: int | str | Path, folder: str | Path, format: str = "transformers", *, home=None) -> dict:
    """Write a run's result into a new or empty folder.

    Args:
        run: a run's id or name, or the folder of a saved model.
        folder: where to write.
        format: ``native`` (packed weights as they are, loads in the workbench), ``transformers`` (dense tensors, loads with
            plain transformers; integers are dequantized to fp32, which is exact), ``peft`` (the adapter alone).

    Returns:
        run, source, folder, format, files (name -> bytes), bytes, difference (largest absolute difference of a logit between
        the source and what was written, on a fixed input; 0.0 for plain copies).

    Raises:
        InputError: an unknown format, no result or no adapter there, a folder that is not empty, or a structure that plain
            transformers cannot hold.
    """
    if format not in FORMATS:
        raise InputError("format", format, "not an export format", "Choose " + ", ".join(FORMATS))
    source, facts = _find(run, format, home)
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("folder", str(folder), "it is there already and not empty", "Choose a new or an empty folder")
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
    except OSError as e:
        raise InputError("folder", str(folder), f"it cannot be written ({e.strerror or e})", "Choose a folder of your own") from None
    try:
        layout = _json(source / LAYOUT)
        difference = 0.0
        if layout.get("added") and format == "transformers":
            raise InputError("format", format, "the result carries adapters that cannot be merged, and plain transformers has no layer for them",
                             "Export with format native")
        if format == "peft":
            _copy(source, fresh)
        elif format == "native" or not (layout.get("packed") or layout.get("shapes")):
            _copy(source, fresh, without=() if format == "native" else (LAYOUT,))
        else:
            difference = _dense(source, fresh, layout)
        _licence(facts, fresh)
        (fresh / "README.md").write_text(card(source, format, facts, layout, difference), encoding="utf-8")
        if target.exists():
            target.rmdir()
        fresh.rename(target)
    except OSError as e:
        raise InputError("folder", str(folder), f"it cannot be written ({e.strerror or e})", "Free some space or choose another folder") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    files = {p.name: p.stat().st_size for p in sorted(target.iterdir()) if p.is_file()}
    return dict(run=facts.get("run"), source=str(source), folder=str(target), format=format, files=files, bytes=sum(files.values()),
                difference=difference)


# -- what there is to export ---------------------------------------------------------------------------------
def _find(run, format: str, home) -> tuple[Path, dict]:
    """(folder of the model or adapter, what is known of the run)."""
    given = Path(str(run)).expanduser()
    if isinstance(run, Path) or not str(run).lstrip("#").isdigit() and given.is_dir():
        folder, facts, parent = given, {}, given.parent
        if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
            folder, parent = folder / "model", folder
    else:
        from workbench.home import Home
        from workbench.runs import results
        home = home or Home.open()
        facts = results(run, home=home)
        parent = Path(facts["folder"]) if facts.get("folder") else home.folder(facts["run"])
        folder = parent / "model"
    if format == "peft":
        for place in (parent / "adapter", folder / "adapter", folder):
            if (place / "adapter_config.json").is_file():
                return place, facts
        if _json(folder / LAYOUT).get("added"):
            raise InputError("run", str(run), "its adapters are of a kind that peft does not have", "Export with format native")
        raise InputError("run", str(run), "it has left no peft adapter", "Export with format transformers, or run a LoRA stage without pruning before it")
    if not (folder / "config.json").is_file():
        state = f" (its state is {facts['status']})" if facts.get("status") else ""
        raise InputError("run", str(run), f"there is no saved model{state}", "Export a run that has finished")
    return folder, facts


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _copy(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in (*without, "README.md"):
            shutil.copyfile(path, target / path.name)


# -- dense ---------------------------------------------------------------------------------------------------
def _dense(source: Path, target: Path, layout: dict) -> float:
    """Write the dense model that computes the same; returns the largest difference of a logit.

    Raises:
        InputError: the pruned shapes cannot be filled up to those of the config with the same outputs.
    """
    import torch

    from engines import models
    from engines.models.packed import dense_state

    mine = models.load(source, dtype="float32").model
    plain = type(mine)._from_config(_config(source), dtype=torch.float32) if hasattr(type(mine), "_from_config") else type(mine)(_config(source))
    state, own = dense_state(mine), plain.state_dict()
    tied = set(getattr(plain, "all_tied_weights_keys", None) or ())
    filled = {name: _fill(name, state[name], t.shape) for name, t in own.items() if name in state}
    missing = [n for n in own if n not in filled and n not in tied]
    if missing:
        raise InputError("format", "transformers", f"the result lacks {missing[0]}", "Export with format native")
    plain.load_state_dict(filled, strict=False)
    plain.tie_weights()
    plain.eval()
    difference, size = _compare(mine, plain)
    # Integer kernels round activations, so a packed model is compared only for gross faults of its structure.
    if difference > (0.2 if layout.get("packed") else 1e-3) * max(size, 1e-3):
        raise InputError("format", "transformers", "the shapes of this pruned model cannot be put into plain transformers with equal outputs",
                         "Export with format native")
    plain.config.dtype = torch.float32
    plain.save_pretrained(target, safe_serialization=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (LAYOUT, "README.md") and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    return difference


def _config(source: Path):
    import transformers
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)


def _fill(name: str, tensor, shape):
    """Bring a pruned tensor to ``shape`` with zeros at the end; what was removed computes zero, so the outputs stay."""
    import torch
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if tensor.dim() != len(shape) or any(have > want for have, want in zip(tensor.shape, shape)):
        raise InputError("format", "transformers", f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(shape)}",
                         "Export with format native")
    if ".c_attn." in name:
        # Query, key and value lie side by side; each third is filled on its own.
        width = shape[-1] // 3
        thirds = [_fill("", part, (*shape[:-1], width)) for part in tensor.chunk(3, dim=-1)]
        return torch.cat(thirds, dim=-1)
    out = torch.zeros(shape, dtype=tensor.dtype)
    out[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return out


def _compare(a, b) -> tuple[float, float]:
    """(largest difference, largest size) of the logits of two models on a fixed input."""
    import torch
    config = a.config
    generator = torch.Generator().manual_seed(0)
    if getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size, config.image_size)
        inputs = {"pixel_values": torch.randn(2, config.num_channels, *size, generator=generator)}
    else:
        length = min(32, getattr(config, "max_position_embeddings", 32) or 32)
        # One row: padding plays no part, whatever the pad token is.
        ids = torch.randint(3 if config.vocab_size > 3 else 0, config.vocab_size, (1, length), generator=generator)
        inputs = {"input_ids": ids}
    with torch.inference_mode():
        x, y = a(**inputs).logits.float(), b(**inputs).logits.float()
    return float((x - y).abs().max()), float(x.abs().max())


# -- model card ----------------------------------------------------------------------------------------------
def _base_folder(base: str | None) -> Path | None:
    if not base:
        return None
    from engines.models.locate import bundled
    known = bundled()
    path = known.get(base) or Path(base).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
        found = try_to_load_from_cache(base, "README.md")
        return Path(found).parent if isinstance(found, str) else None
    except Exception:
        # No cache, or not even the form of an id: then nothing is known of the licence.
        return None


def licence(base: str | None) -> str | None:
    """The licence that the base model's README or card states, or None."""
    folder = _base_folder(base)
    if folder is None:
        return None
    for name in ("card.json", "fettle.json"):
        found = _json(folder / name)
        value = found.get("license") or found.get("licence") or (found.get("card") or {}).get("license")
        if value:
            return str(value)
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace").split("---")
    except OSError:
        return None
    match = re.search(r"^license:\s*(\S+)", head[1], re.M) if len(head) > 2 else None
    return match.group(1) if match else None


def _licence(facts: dict, target: Path) -> None:
    """The base model's licence text goes along."""
    folder = _base_folder(facts.get("model"))
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if folder is not None and (folder / name).is_file() and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)


def card(source: Path, format: str, facts: dict, layout: dict, difference: float = 0.0) -> str:
    """The README of an export: what it is, how it was made, what was measured, how to load it."""
    from engines.profile import task_of

    base = facts.get("model") or layout.get("base")
    config = _json(source / "config.json")
    adapter = _json(source / "adapter_config.json") if format == "peft" else {}
    task = task_of(config) if config else (facts.get("spec") or {}).get("task") or "causal-lm"
    base = base or adapter.get("base_model_name_or_path")
    known = licence(base)
    # A path means nothing on another machine.
    local = bool(base) and Path(base).expanduser().is_absolute()
    base = Path(base).name if local else base
    stages = facts.get("stages") or [dict(method=s.get("method"), hyperparameters={k: v for k, v in s.items() if k != "method"})
                                     for s in layout.get("pipeline") or []]
    title = facts.get("name") or source.parent.name
    head = ["---"]
    if known:
        head.append(f"license: {known}")
    if base and not local:
        head.append(f"base_model: {base}")
    head += [f"library_name: {'peft' if format == 'peft' else 'transformers'}", f"pipeline_tag: {_PIPELINE_TAGS[task]}",
             "tags: [" + ", ".join(["fettle", *dict.fromkeys(s["method"] for s in stages)]) + "]", "---", ""]
    lines = [f"# {title}", "", f"{base or 'A model'}, fitted to a budget with Fettle.", ""]
    lines += ["## How it was made", ""]
    lines += [f"{i + 1}. **{s['method']}** " + ", ".join(f"{k} {_short(v)}" for k, v in s["hyperparameters"].items() if v != "")
              for i, s in enumerate(stages)] or ["No stage: the base model."]
    if facts:
        spec = facts.get("spec") or {}
        data = spec.get("data")
        data = data.get("source") if isinstance(data, dict) else data
        budget = ", ".join(f"{k} {_short(v)}" for k, v in (facts.get("budget") or {}).items()) or "none"
        lines += ["", f"Data: {data}. Seed: {facts.get('seed', 0)}. Budget: {budget}."]
    lines += ["", "## Figures", "", *_figures(facts, layout, source), "", "## Loading", "", *_loading(format, task, base, layout, difference), ""]
    lines += ["## Licence", "", f"The base model is under {known}." if known else "The base model states no licence that could be read here: "
              "check it before you pass this on.", ""]
    return "\n".join(head + lines)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(facts: dict, layout: dict, source: Path) -> list[str]:
    rows = []
    evaluation, footprint = facts.get("evaluation") or {}, facts.get("footprint") or {}
    for name in ("before", "after"):
        e = evaluation.get(name)
        if e:
            rows.append((f"{e['metric']}, {name}", f"{e['value']:.4f} ({e['interval'][0]:.4f} to {e['interval'][1]:.4f}, n = {e['n']})"))
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    rows.append(("weights as saved by the run", f"{size / 1e6:.2f} MB"))
    for key, label, form in (("parameters", "parameters", "{:,}"), ("trainable", "trained parameters", "{:,}"),
                             ("bits_per_weight", "bits per parameter", "{:.2f}"), ("peak_bytes", "peak memory", "bytes")):
        value = footprint.get(key)
        if value:
            rows.append((label, f"{value / 1e9:.2f} GB" if form == "bytes" else form.format(value)))
    sparsity = footprint.get("sparsity") or layout.get("sparsity")
    if sparsity:
        rows.append(("zeros among the blocks' weights", f"{sparsity:.1%}"))
    if facts.get("seconds"):
        rows.append(("time of the run", f"{facts['seconds']:.0f} s"))
    return ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]


def _loading(format: str, task: str, base: str | None, layout: dict, difference: float) -> list[str]:
    if format == "peft":
        return ["```python", f"from transformers import {_AUTO[task]}", "from peft import PeftModel",
                f'base = {_AUTO[task]}.from_pretrained("{base or "the base model"}")', 'model = PeftModel.from_pretrained(base, "this folder")', "```",
                "", "The adapter belongs to the dense base model; what later stages of the run did is not in it."]
    if format == "native" and (layout.get("packed") or layout.get("shapes") or layout.get("added")):
        return ["The weights are in the layout that `fettle.json` describes (packed integers, removed channels or added adapters):", "", "```python",
                "from engines import models   # in Fettle's folder", 'model = models.load("this folder").model', "```"]
    text = ["```python", f"from transformers import {_AUTO[task]}", f'model = {_AUTO[task]}.from_pretrained("this folder")', "```"]
    if layout.get("packed"):
        text += ["", f"The integers were dequantized to fp32; the largest difference of a logit was {difference:.2g}. This folder is as large "
                 "as a dense model: the small file is the native export."]
    if layout.get("shapes"):
        text += ["", "Plain transformers knows one width for all layers: removed heads and channels are stored as zeros here."]
    return text

"""Low-rank adapters in peft's files, as factors that can be added: what a folder holds, and whether it fits a model; torch only to load."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from engines.errors import InputError
from engines.profile import read_header

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFile:
    """One adapter folder: ``shapes`` by matrix as (out, rank, in), ``heads`` by tensor, both from the header alone."""

    folder: Path
    base: str
    """The model that it was trained for, as its run named it."""
    shapes: dict
    heads: dict
    config: dict

    def scale(self, name: str) -> float:
        """What the product of the factors of ``name`` is multiplied with."""
        rank = self.shapes[name][1]
        alpha = self.config.get("lora_alpha", rank)
        for key, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", name):
                alpha = value
                break
        if self.config.get("peft_type") == "ADALORA":
            return alpha / (self.config.get("init_r", rank) + 1e-5)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def load(self) -> tuple[dict, dict, dict]:
        """({matrix: (a [rank, in], b [out, rank], scale inside)}, {matrix: change of the bias}, {tensor of the head: values}), float32."""
        from safetensors.torch import load_file
        state = {k.removeprefix(PREFIX): v.float() for k, v in load_file(self.folder / WEIGHTS).items()}
        factors, biases = {}, {}
        for name in self.shapes:
            def get(part, n=name):
                return state.get(f"{n}.{part}.weight", state.get(f"{n}.{part}"))
            a, b, middle, bias = get("lora_A"), get("lora_B"), get("lora_E"), state.get(f"{name}.lora_B.bias")
            factors[name] = (a if middle is None else a * middle, b * self.scale(name))
            if bias is not None:
                biases[name] = bias * self.scale(name)
        return factors, biases, {n: state[n] for n in self.heads}


def read(folder: str | Path) -> AdapterFile:
    """What is in ``folder``.

    Raises:
        InputError: no adapter there, or one whose change of the weights is no sum of products of two factors.
    """
    folder = Path(folder).expanduser()
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        raise InputError("adapters", str(folder), "there is no adapter that can be read", "Name the adapter folder of a run, such as runs/12/adapter") from None
    kind = config.get("peft_type", "LORA")
    if kind not in ("LORA", "ADALORA"):
        raise InputError("adapters", str(folder), f"a {kind} adapter is not a product of two factors, so it cannot be added to another",
                         "Choose runs of LoRA's kind")
    if config.get("use_dora"):
        raise InputError("adapters", str(folder), "DoRA rescales whole rows, so two of them do not add up", "Choose runs without dora")
    shapes, heads, halves = {}, {}, {}
    for name, info in read_header(folder / WEIGHTS).items():
        path, shape = name.removeprefix(PREFIX), tuple(info["shape"])
        found = re.match(r"(.*)\.lora_([AB])(\.weight)?$", path)
        if found:
            halves.setdefault(found[1], {})[found[2]] = shape
        elif ".lora_" not in path:
            heads[path] = shape
    for name, parts in halves.items():
        if set(parts) == {"A", "B"}:
            shapes[name] = (parts["B"][0], parts["A"][0], parts["A"][1])
    if not shapes:
        raise InputError("adapters", str(folder), "it holds no factors", "Choose runs of LoRA's kind")
    return AdapterFile(folder, str(config.get("base_model_name_or_path") or ""), shapes, heads, config)


def fit(adapters: list[AdapterFile], profile) -> None:
    """Refuse adapters of another model, of other shapes or with other heads.

    Raises:
        InputError: names the adapter and what differs.
    """
    places = {m.name: m for m in profile.matrices}
    for one in adapters:
        if one.base and one.base != profile.source:
            raise InputError("adapters", str(one.folder), f"it was trained for {one.base}, not for {profile.source}",
                             "Merge adapters of one base model")
        for name, (out, _, inp) in one.shapes.items():
            m = places.get(name)
            if m is None or (m.out, m.inp) != (out, inp):
                has = f"{m.out} by {m.inp}" if m else "not there"
                raise InputError("adapters", str(one.folder), f"its {name} is {out} by {inp}, in {profile.source} it is {has}",
                                 "Merge adapters of one base model")
        if one.heads != adapters[0].heads:
            mine, first = (next(iter(h.values()), ("none",))[0] for h in (one.heads, adapters[0].heads))
            raise InputError("adapters", str(one.folder), f"its head tells {mine} labels apart, that of {adapters[0].folder} {first}",
                             "Merge runs on the same labels")

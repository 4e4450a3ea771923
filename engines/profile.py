"""The shapes of a model, read from config.json and safetensors headers; torch is not needed.

Everything the planner says before a run comes from here.
"""

from __future__ import annotations

import functools
import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1}
HEADER_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
                 "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
ADDED = ".added_"
"""In the names of tensors of modules that config.json does not know (``engines.models.added``)."""
TASK_OF_CLASS = (("ForCausalLM", "causal-lm"), ("LMHeadModel", "causal-lm"),
                 ("ForSequenceClassification", "text-classification"), ("ForImageClassification", "image-classification"))


@dataclass(frozen=True)
class Tensor:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer inside a block. ``out`` and ``inp`` are features whatever the storage order."""

    name: str
    """Module path, without ``.weight``: ``model.layers.0.self_attn.q_proj``."""
    layer: int
    role: str
    """Last part of the path: q_proj, c_attn, query, up_proj; ambiguous ``dense`` gets its parent: ``attention.output.dense``."""
    out: int
    inp: int
    bias: bool
    conv1d: bool = False

    @property
    def size(self) -> int:
        return self.out * self.inp


@dataclass(frozen=True)
class Batch:
    """What one micro-batch looks like to the planner."""

    rows: int = 8
    length: int = 256
    checkpointing: bool = False
    compute: str = "float32"
    """Type of the matrix products: float32 or bfloat16 (autocast)."""
    accumulation: int = 1
    weights: str = "float32"
    """Type in which the weights are held while the run is on (see ``working_dtype``)."""
    chunk: int = 2048
    """Tokens whose logits the loss of a language model holds at a time."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class ModelProfile:
    """Shapes and types of a model; ``source`` is the folder or id that it was read from."""

    source: str
    architecture: str
    """config.model_type: llama, gpt2, bert, vit ..."""
    task: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int
    labels: int
    tied: bool
    dtype: str
    """Stored type of most parameters."""
    tensors: tuple[Tensor, ...] = field(repr=False, default=())
    matrices: tuple[Matrix, ...] = field(repr=False, default=())
    config: dict = field(repr=False, default_factory=dict)
    has_weights: bool = True

    @functools.cached_property
    def parameters(self) -> int:
        """Distinct parameters (a tied head is counted once)."""
        return sum(t.size for t in self.tensors)

    @functools.cached_property
    def stored_bytes(self) -> int:
        return sum(count * BYTES.get(dtype, 4) for dtype, count in self.counts.items())

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Parameters by stored type."""
        found: dict[str, int] = {}
        for t in self.tensors:
            found[t.dtype] = found.get(t.dtype, 0) + t.size
        return found

    @functools.cached_property
    def blocks(self) -> tuple[tuple[int, int, tuple], ...]:
        """(how many, number of the first, its matrices) of the blocks of equal shapes."""
        here: dict[int, list] = {i: [] for i in range(max(self.layers, 1))}
        for m in self.matrices:
            here.setdefault(m.layer, []).append(m)
        found: dict[tuple, list] = {}
        for i, rows in here.items():
            found.setdefault(tuple((m.role, m.out, m.inp) for m in rows), [0, i, tuple(rows)])[0] += 1
        return tuple((count, first, rows) for count, first, rows in found.values())

    @functools.cached_property
    def widest(self) -> int:
        """Features of the widest result of a matrix inside blocks."""
        return max((m.out for m in self.matrices), default=0)

    @functools.cached_property
    def memo(self) -> dict:
        """What others have worked out of these shapes, by a key of their own."""
        return {}

    @functools.cached_property
    def block_parameters(self) -> int:
        """Weights of the matrices inside blocks: what pruning and quantization act on."""
        return sum(m.size for m in self.matrices)

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.role for m in self.matrices))

    @property
    def flops_per_token(self) -> float:
        """Forward multiply-adds times two, per token, without attention scores; backward is twice as much."""
        head = self.vocab * self.hidden if self.task == "causal-lm" else 0
        return 2.0 * (self.block_parameters + head)

    def attention_flops_per_token(self, length: int) -> float:
        """Forward cost of scores and their product with the values, per token of a sequence of ``length``."""
        return 4.0 * self.layers * length * self.heads * self.head_dim * (0.5 if self.task == "causal-lm" else 1.0)


def _role(path: str) -> str:
    parts = path.split(".")
    if parts[-1] in ("dense", "c_proj", "query", "key", "value"):
        tail = [p for p in parts[-3:] if not p.isdigit()]
        return ".".join(tail[-3:]) if parts[-1] == "dense" else ".".join(tail[-2:])
    return parts[-1]


def _matrices(tensors: tuple[Tensor, ...], architecture: str) -> tuple[Matrix, ...]:
    biases = {t.name for t in tensors if t.name.endswith(".bias")}
    conv1d = architecture in ("gpt2", "openai-gpt")
    found = []
    for t in tensors:
        if len(t.shape) != 2 or not t.name.endswith(".weight"):
            continue
        path = t.name[: -len(".weight")]
        block = re.search(r"\.(\d+)\.", path)
        if block is None or re.search(r"embed|wte|wpe|norm|ln_|relative_attention", path):
            continue
        out, inp = (t.shape[1], t.shape[0]) if conv1d else t.shape
        found.append(Matrix(path, int(block.group(1)), _role(path), out, inp, f"{path}.bias" in biases, conv1d))
    return tuple(sorted(found, key=lambda m: m.layer))


def read_header(path: Path) -> dict:
    """The JSON header of one safetensors file.

    Raises:
        InputError: the file is cut off or is not safetensors.
    """
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > 200_000_000:
                raise ValueError("header too long")
            header = json.loads(f.read(length))
    except (OSError, ValueError, struct.error) as e:
        raise InputError("model", str(path), f"not a readable safetensors file ({e})",
                         "Save the model again with save_pretrained(..., safe_serialization=True)") from None
    header.pop("__metadata__", None)
    return header


def _tensors_of(folder: Path) -> tuple[Tensor, ...]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("adapter_"):
            continue
        for name, info in read_header(file).items():
            found[name] = Tensor(name, tuple(info["shape"]), HEADER_DTYPES.get(info["dtype"], info["dtype"].lower()))
    return tuple(found.values())


def task_of(config: dict) -> str:
    """The task that the class named in config.json performs; causal-lm when it names none that is known."""
    for name in config.get("architectures") or ():
        for ending, task in TASK_OF_CLASS:
            if name.endswith(ending):
                return task
    if config.get("model_type") in ("vit", "deit", "beit"):
        return "image-classification"
    if config.get("model_type") in ("bert", "roberta", "distilbert", "electra", "deberta-v2"):
        return "text-classification"
    return "causal-lm"


def from_config(source: str, config: dict, tensors: tuple[Tensor, ...]) -> ModelProfile:
    """A profile from a parsed config.json and the list of stored tensors (may be empty)."""
    get = lambda *names, default=0: next((config[n] for n in names if config.get(n) is not None), default)  # noqa: E731
    hidden, heads = int(get("hidden_size", "n_embd", "d_model", "dim")), int(get("num_attention_heads", "n_head", "n_heads", default=1))
    labels = config.get("id2label") or {}
    types: dict[str, int] = {}
    for t in tensors:
        types[t.dtype] = types.get(t.dtype, 0) + t.size
    architecture = config.get("model_type", "unknown")
    image = config.get("image_size")
    context = int(get("max_position_embeddings", "n_positions", "n_ctx", default=0))
    if image and config.get("patch_size"):
        context = (int(image) // int(config["patch_size"])) ** 2 + 1
    return ModelProfile(
        source=source, architecture=architecture, task=task_of(config),
        layers=int(get("num_hidden_layers", "n_layer", "n_layers")), hidden=hidden, heads=heads,
        kv_heads=int(get("num_key_value_heads", default=heads)),
        head_dim=int(get("head_dim", default=hidden // max(heads, 1))),
        mlp=int(get("intermediate_size", "n_inner", "hidden_dim", default=4 * hidden)),
        vocab=int(get("vocab_size", default=0)), context=context or 512,
        labels=len(labels) or int(get("num_labels", default=0)),
        tied=bool(config.get("tie_word_embeddings", architecture in ("gpt2", "bert"))),
        dtype=max(types, key=types.get) if types else str(get("dtype", "torch_dtype", default="float32")),
        tensors=tensors, matrices=_matrices(tensors, architecture), config=config, has_weights=bool(tensors))


def read_model(folder: str | Path, name: str | None = None) -> ModelProfile:
    """The profile of a local folder with config.json and safetensors; ``engines.models.folder`` reads adapters' folders too.

    Raises:
        InputError: no folder, no config.json, only pickle weights, or a weight file that cannot be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError("model", str(folder), "there is no such folder", "Give a folder with config.json and *.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise InputError("model", str(folder), "the folder has no config.json",
                         "Save the model with save_pretrained, or point at the folder that holds config.json") from None
    except ValueError as e:
        raise InputError("model", str(folder), f"config.json is not JSON ({e})", "Save the model again") from None
    tensors = _tensors_of(folder)
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")]
    if not tensors and pickles:
        raise InputError("model", str(folder), f"it has only pickle weights ({pickles[0].name}), which can run code when loaded",
                         "Convert it with save_pretrained(..., safe_serialization=True) in an environment that you trust")
    return from_config(name or str(folder), config, tensors)


def working_dtype(profile: ModelProfile) -> str:
    """The type in which the engines hold the weights: float32 (exact optimizer steps) up to 500 M parameters,
    the stored half type above, where twice the memory would decide whether a model fits at all."""
    half = profile.dtype in ("bfloat16", "float16")
    return "bfloat16" if half and profile.parameters > 500_000_000 else "float32"

"""The tensors of a model that has only a config.json, and of the same model under another head; no torch.

Names and shapes are those of the ``state_dict`` of the transformers class that serves the task, so that a
forecast counts exactly what will be loaded. A tied output embedding is one tensor and is listed once.
"""

from __future__ import annotations

import json
import math
import re

from engines.errors import InputError
from engines.profile import ADDED, BYTES, ModelProfile, Tensor, from_config, task_of

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
WRITTEN = ("int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "bool")
"""Types in the order in which a safetensors file holds them."""
_TASK_CLASS = {
    "causal-lm": "ForCausalLM",
    "text-classification": "ForSequenceClassification",
    "image-classification": "ForImageClassification",
}


class _List:
    """Collects tensors; ``linear`` adds weight and bias, ``norm`` a vector with or without bias."""

    def __init__(self):
        self.rows: list[tuple[str, tuple[int, ...]]] = []

    def add(self, name, *shape):
        self.rows.append((name, tuple(int(s) for s in shape)))

    def linear(self, name, out, inp, bias=True):
        self.add(f"{name}.weight", out, inp)
        if bias:
            self.add(f"{name}.bias", out)

    def norm(self, name, width, bias=True):
        self.add(f"{name}.weight", width)
        if bias:
            self.add(f"{name}.bias", width)


def _labels(config: dict) -> int:
    return len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)


def _llama(c: dict, t: _List, task: str, labels: int) -> None:
    hidden, mlp, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kind = c.get("model_type")
    kv = c.get("num_key_value_heads") or heads
    default_head = {"qwen3": 128, "gemma": 256}.get(kind, hidden // heads)
    width = c.get("head_dim") or default_head
    qkv_bias = bool(c.get("attention_bias", False)) or kind == "qwen2"
    out_bias = bool(c.get("attention_bias", False)) and kind != "qwen2"
    mlp_bias = bool(c.get("mlp_bias", False))
    t.add("model.embed_tokens.weight", c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        t.linear(f"{p}.self_attn.q_proj", heads * width, hidden, qkv_bias)
        t.linear(f"{p}.self_attn.k_proj", kv * width, hidden, qkv_bias)
        t.linear(f"{p}.self_attn.v_proj", kv * width, hidden, qkv_bias)
        t.linear(f"{p}.self_attn.o_proj", hidden, heads * width, out_bias)
        if kind == "qwen3":
            t.norm(f"{p}.self_attn.q_norm", width, False)
            t.norm(f"{p}.self_attn.k_norm", width, False)
        t.linear(f"{p}.mlp.gate_proj", mlp, hidden, mlp_bias)
        t.linear(f"{p}.mlp.up_proj", mlp, hidden, mlp_bias)
        t.linear(f"{p}.mlp.down_proj", hidden, mlp, mlp_bias)
        t.norm(f"{p}.input_layernorm", hidden, False)
        t.norm(f"{p}.post_attention_layernorm", hidden, False)
    t.norm("model.norm", hidden, False)
    if task == "text-classification":
        t.linear("score", labels, hidden, False)
    elif not c.get("tie_word_embeddings", kind == "gemma"):
        t.add("lm_head.weight", c["vocab_size"], hidden)


def _gpt2(c: dict, t: _List, task: str, labels: int) -> None:
    hidden = c.get("n_embd") or c["hidden_size"]
    inner = c.get("n_inner") or 4 * hidden
    t.add("transformer.wte.weight", c["vocab_size"], hidden)
    t.add("transformer.wpe.weight", c.get("n_positions") or c.get("max_position_embeddings") or 1024, hidden)
    for i in range(c.get("n_layer") or c["num_hidden_layers"]):
        p = f"transformer.h.{i}"
        t.norm(f"{p}.ln_1", hidden)
        for name, inp, out in (("attn.c_attn", hidden, 3 * hidden), ("attn.c_proj", hidden, hidden)):
            t.add(f"{p}.{name}.weight", inp, out)  # Conv1D stores [in, out]
            t.add(f"{p}.{name}.bias", out)
        t.norm(f"{p}.ln_2", hidden)
        for name, inp, out in (("mlp.c_fc", hidden, inner), ("mlp.c_proj", inner, hidden)):
            t.add(f"{p}.{name}.weight", inp, out)
            t.add(f"{p}.{name}.bias", out)
    t.norm("transformer.ln_f", hidden)
    if task == "text-classification":
        t.linear("score", labels, hidden, False)
    elif not c.get("tie_word_embeddings", True):
        t.add("lm_head.weight", c["vocab_size"], hidden)


def _bert(c: dict, t: _List, task: str, labels: int) -> None:
    kind = c.get("model_type", "bert")
    root = "roberta" if kind in ("roberta", "xlm-roberta", "camembert") else "bert"
    hidden, mlp = c["hidden_size"], c["intermediate_size"]
    t.add(f"{root}.embeddings.word_embeddings.weight", c["vocab_size"], hidden)
    t.add(f"{root}.embeddings.position_embeddings.weight", c.get("max_position_embeddings", 512), hidden)
    t.add(f"{root}.embeddings.token_type_embeddings.weight", c.get("type_vocab_size", 2), hidden)
    t.norm(f"{root}.embeddings.LayerNorm", hidden)
    for i in range(c["num_hidden_layers"]):
        p = f"{root}.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            t.linear(f"{p}.attention.self.{name}", hidden, hidden)
        t.linear(f"{p}.attention.output.dense", hidden, hidden)
        t.norm(f"{p}.attention.output.LayerNorm", hidden)
        t.linear(f"{p}.intermediate.dense", mlp, hidden)
        t.linear(f"{p}.output.dense", hidden, mlp)
        t.norm(f"{p}.output.LayerNorm", hidden)
    if root == "roberta":
        t.linear("classifier.dense", hidden, hidden)
        t.linear("classifier.out_proj", labels, hidden)
    else:
        t.linear("bert.pooler.dense", hidden, hidden)
        t.linear("classifier", labels, hidden)


def _distilbert(c: dict, t: _List, task: str, labels: int) -> None:
    hidden, mlp = c.get("dim") or c["hidden_size"], c.get("hidden_dim") or c["intermediate_size"]
    t.add("distilbert.embeddings.word_embeddings.weight", c["vocab_size"], hidden)
    t.add("distilbert.embeddings.position_embeddings.weight", c.get("max_position_embeddings", 512), hidden)
    t.norm("distilbert.embeddings.LayerNorm", hidden)
    for i in range(c.get("n_layers") or c["num_hidden_layers"]):
        p = f"distilbert.transformer.layer.{i}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            t.linear(f"{p}.attention.{name}", hidden, hidden)
        t.norm(f"{p}.sa_layer_norm", hidden)
        t.linear(f"{p}.ffn.lin1", mlp, hidden)
        t.linear(f"{p}.ffn.lin2", hidden, mlp)
        t.norm(f"{p}.output_layer_norm", hidden)
    t.linear("pre_classifier", hidden, hidden)
    t.linear("classifier", labels, hidden)


def _pair(value) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def _vit(c: dict, t: _List, task: str, labels: int) -> None:
    hidden, mlp, bias = c["hidden_size"], c["intermediate_size"], bool(c.get("qkv_bias", True))
    (height, width), (rows, columns) = _pair(c.get("image_size", 224)), _pair(c.get("patch_size", 16))
    t.add("vit.embeddings.cls_token", 1, 1, hidden)
    t.add("vit.embeddings.position_embeddings", 1, (height // rows) * (width // columns) + 1, hidden)
    t.add("vit.embeddings.patch_embeddings.projection.weight", hidden, c.get("num_channels", 3), rows, columns)
    t.add("vit.embeddings.patch_embeddings.projection.bias", hidden)
    for i in range(c["num_hidden_layers"]):
        p = f"vit.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj"):
            t.linear(f"{p}.attention.{name}", hidden, hidden, bias)
        t.linear(f"{p}.attention.o_proj", hidden, hidden)
        t.norm(f"{p}.layernorm_before", hidden)
        t.norm(f"{p}.layernorm_after", hidden)
        t.linear(f"{p}.mlp.fc1", mlp, hidden)
        t.linear(f"{p}.mlp.fc2", hidden, mlp)
    t.norm("vit.layernorm", hidden)
    t.linear("classifier", labels, hidden)


_BUILDERS = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
    "distilbert": _distilbert,
    "vit": _vit,
}
ARCHITECTURES = tuple(_BUILDERS)


def tensors(config: dict, task: str | None = None, labels: int | None = None, dtype: str | None = None) -> tuple[Tensor, ...]:
    """Names, shapes and types of every parameter of the model that ``config`` describes.

    Args:
        config: a parsed config.json.
        task: None takes the task of the class named in the config.
        labels: width of the classification head; None takes it from the config.
        dtype: of every tensor; None takes the config's.

    Raises:
        InputError: the architecture is none of ``ARCHITECTURES``, or the config lacks a size.
    """
    kind = config.get("model_type")
    if kind not in _BUILDERS:
        raise InputError(
            "model",
            kind,
            "its tensors cannot be listed from config.json alone for this architecture",
            "Add the model's *.safetensors to the folder, or use one of " + ", ".join(ARCHITECTURES),
        )
    rows = _List()
    try:
        _BUILDERS[kind](config, rows, task or task_of(config), labels or _labels(config))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise InputError(
            "model", kind, f"config.json lacks a usable size ({e})", "Save the model again with save_pretrained"
        ) from None
    dtype = str(dtype or config.get("dtype") or config.get("torch_dtype") or "float32").replace("torch.", "")
    return tuple(Tensor(name, shape, dtype) for name, shape in rows.rows)


_STORED = (  # how older files name what the present classes call otherwise
    (re.compile(r"^vit\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\."), r"vit.layers.\1.attention.\2_."),
    (re.compile(r"^vit\.encoder\.layer\.(\d+)\.attention\.output\.dense\."), r"vit.layers.\1.attention.o_proj."),
    (re.compile(r"^vit\.encoder\.layer\.(\d+)\.intermediate\.dense\."), r"vit.layers.\1.mlp.fc1."),
    (re.compile(r"^vit\.encoder\.layer\.(\d+)\.output\.dense\."), r"vit.layers.\1.mlp.fc2."),
    (re.compile(r"^vit\.encoder\.layer\."), "vit.layers."),
)
_ROOTS = {
    "llama": "model",
    "mistral": "model",
    "qwen2": "model",
    "qwen3": "model",
    "gemma": "model",
    "gpt2": "transformer",
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "vit": "vit",
}


def live_name(name: str, architecture: str, known: frozenset | set = frozenset()) -> str:
    """The state-dict name under which the task model holds the stored tensor ``name``."""
    root = _ROOTS.get(architecture)
    if root and name not in known and not name.startswith(root + ".") and f"{root}.{name}" in known:
        return f"{root}.{name}"
    if root and architecture == "vit" and name.startswith(("encoder.", "embeddings.", "layernorm.")):
        name = f"vit.{name}"
    if name.startswith("vit.encoder."):
        for pattern, to in _STORED:
            name, hits = pattern.subn(to, name)
            if hits:
                break
        name = name.replace(".query_.", ".q_proj.").replace(".key_.", ".k_proj.").replace(".value_.", ".v_proj.")
    return name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")


def for_task(profile: ModelProfile, task: str, labels: int | None = None) -> ModelProfile:
    """The profile of the model that the engines load from ``profile``'s source for ``task``.

    A head that the source lacks is added with ``labels`` rows, one that the task does not use is dropped, names
    become those of the live ``state_dict``; stored shapes win over those of config.json (a pruned model is smaller).

    Raises:
        InputError: this architecture has no model for the task.
    """
    family = {
        "vit": ("image-classification",),
        "bert": ("text-classification",),
        "distilbert": ("text-classification",),
        "roberta": ("text-classification",),
        "xlm-roberta": ("text-classification",),
        "camembert": ("text-classification",),
    }
    serves = family.get(profile.architecture, ("causal-lm", "text-classification"))
    if profile.architecture in _BUILDERS and task not in serves:
        raise InputError(
            "task",
            task,
            f"a {profile.architecture} model does not serve it",
            "Choose " + " or ".join(serves) + ", or another model",
        )
    config = dict(profile.config)
    if task != "causal-lm" and labels:
        config["id2label"] = {str(i): str(i) for i in range(labels)}
    config["architectures"] = ["X" + _TASK_CLASS[task]]
    if profile.architecture not in _BUILDERS:
        return from_config(profile.source, config, profile.tensors)
    wanted = tensors(config, task, labels, profile.dtype)
    known = {t.name for t in wanted}
    stored = {live_name(t.name, profile.architecture, known): t for t in profile.tensors}
    head = re.compile(r"^(score|classifier(\.out_proj)?)\.(weight|bias)$")
    out = []
    for t in wanted:
        have = stored.get(t.name)
        if have is not None and not head.match(t.name):
            t = Tensor(t.name, have.shape, have.dtype)
        out.append(t)
    out += [t for t in profile.tensors if ADDED in t.name]
    return from_config(profile.source, config, tuple(out))


def payload(rows) -> int:
    """Bytes of the tensors' values."""
    return sum(t.size * BYTES.get(t.dtype, 4) for t in rows)


def file_bytes(rows, metadata: dict | None = None) -> int:
    """Exact size of one safetensors file with these tensors: 8 bytes, the padded JSON header, the values.

    The writer sorts by type (its own order, widest first) and then by name, which decides the length of the offsets.
    """
    rows = sorted(rows, key=lambda t: (WRITTEN.index(t.dtype), t.name))
    header: dict = {"__metadata__": {"format": "pt"} if metadata is None else metadata} if metadata != {} else {}
    at = 0
    for t in rows:
        size = t.size * BYTES.get(t.dtype, 4)
        header[t.name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * math.ceil(length / 8) + at

"""Micro models on disk for the planner's tests, made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engines import shapes

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
VIT = dict(
    architectures=["ViTForImageClassification"],
    model_type="vit",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=8,
    patch_size=2,
    num_channels=1,
    id2label={str(i): str(i) for i in range(10)},
)
BERT = dict(
    architectures=["BertModel"],
    model_type="bert",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=300,
    max_position_embeddings=64,
    type_vocab_size=2,
)
BIG = dict(
    LLAMA,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)


def folder(path: Path, config: dict, weights: bool = True, tokenizer: bool = True) -> Path:
    """A model folder; float32 zeros as weights."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if weights:
        save_file(
            {t.name: np.zeros(t.shape, np.float32) for t in shapes.tensors(config, dtype="float32")},
            path / "model.safetensors",
            metadata={"format": "pt"},
        )
    if tokenizer:
        from tokenizers import Tokenizer, models, pre_tokenizers

        read = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
        read.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        read.save(str(path / "tokenizer.json"))
    return path


def texts(path: Path, rows: int = 40, labels: int = 0) -> Path:
    """A csv with a text column, and a label column when ``labels`` is given."""
    head = "text,label" if labels else "text"
    lines = [f"row {i} says something of no weight at all" + (f",class {i % labels}" if labels else "") for i in range(rows)]
    path.write_text("\n".join([head, *lines]) + "\n")
    return path

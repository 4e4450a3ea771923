"""Which parameters are a model's classification head: new on most models, and trained beside every adapter. Torch-free."""

from __future__ import annotations

HEADS = ("classifier", "score", "pre_classifier", "head", "qa_outputs")
"""First part of their names in transformers' models."""
TRAINED = ("ForSequenceClassification", "ForImageClassification")
"""Ends of the names of architectures that were saved with a classification head."""


def has_head(config: dict) -> bool:
    """Whether a model of this config.json came with a trained classification head; a new one is added to any other."""
    return any(str(name).endswith(TRAINED) for name in config.get("architectures") or ())


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the head, also inside peft's wrapper."""
    return name.removeprefix("base_model.model.").split(".", 1)[0] in HEADS

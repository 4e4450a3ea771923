"""Which parameters are a model's classification head: new on most models, and trained beside every adapter. Torch-free."""

from __future__ import annotations

HEADS = ("classifier", "score", "pre_classifier", "head", "qa_outputs")
"""First part of their names in transformers' models."""


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the head, also inside peft's wrapper."""
    return name.removeprefix("base_model.model.").split(".", 1)[0] in HEADS

"""Loss of one micro-batch for each task."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engines.losses.chunked import chunked_cross_entropy
from engines.models.packed import is_packed


def unwrap(model):
    """The transformers model inside a peft wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def plain_head(model, packed: bool = False):
    """The output embedding when loss and logits can be made from it outside the model: a bare Linear without bias or soft cap.

    ``packed``: an integer layer is served too, for who only calls it.
    """
    base = unwrap(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    config = base.config
    special = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_scaling", None) or getattr(config, "logit_scale", None)
    if special or head is None:
        return None
    if packed and is_packed(head):
        return head
    return head if type(head) is torch.nn.Linear and head.bias is None else None


def task_loss(model, batch: dict, task: str, *, chunk: int = 2048) -> torch.Tensor:
    """Mean loss in nats: per token for causal-lm (``labels`` are already shifted), per example for classification."""
    if task != "causal-lm":
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return F.cross_entropy(model(**inputs).logits.float(), batch["labels"])
    base = unwrap(model)
    head = plain_head(model)
    if head is None:
        logits = base(input_ids=batch["input_ids"], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
    body = getattr(base, base.base_model_prefix)
    hidden = body(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    flat = hidden.flatten(0, 1)
    if torch.is_autocast_enabled(flat.device.type):
        flat = flat.to(torch.get_autocast_dtype(flat.device.type))
    elif flat.dtype != head.weight.dtype:
        flat = flat.to(head.weight.dtype)
    return chunked_cross_entropy(flat, head.weight, batch["labels"].flatten(), chunk=chunk)

"""What methods that train whole weights refuse alike."""

from __future__ import annotations

from engines.errors import InputError


def refuse_packed(method, profile) -> None:
    """Raises ``InputError`` for a model whose weights are packed integers."""
    if any(t.dtype in ("int8", "uint8") for t in profile.tensors):
        raise InputError("method", method.card.id, "the weights are packed into integers, which have no gradient",
                         "Start from a model that is not quantized")


def refuse_limit(method, profile, budget, count: int) -> None:
    """Raises ``InputError`` where a limit on trainable parameters does not allow ``count`` of them."""
    limit = budget.trainable_count(profile.parameters)
    if limit is not None and count > limit:
        raise InputError("budget.trainable", budget.trainable, f"{method.card.name.lower()} trains {count:,} parameters, the limit is {limit:,}",
                         "use lora, whose rank follows the limit, or raise the limit")

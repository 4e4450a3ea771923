"""How sharp a language model's predictions are, and how much its greedy texts repeat themselves.

Sources: The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation, which measures both on held-out texts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from engines.lazy import torch

PROMPT, CONTINUED, TEXTS = 32, 96, 16
"""Tokens of a held-out text that are given, tokens that are decoded after them, and texts (the paper: 32, 96 and many more)."""


@dataclass(frozen=True)
class Decoding:
    """``entropy``: mean bits of the next token's distribution over held-out tokens; ``type_token_ratio``: different tokens of a
    greedy continuation among all of it, mean over texts; ``repetition``: one minus that."""

    entropy: float
    type_token_ratio: float
    texts: int
    tokens: int

    @property
    def repetition(self) -> float:
        return 1.0 - self.type_token_ratio

    def as_dict(self) -> dict:
        return {**asdict(self), "repetition": self.repetition}


def type_token_ratio(ids) -> float:
    """Share of different entries in a sequence of token ids."""
    ids = list(ids)
    return len(set(ids)) / max(1, len(ids))


def greedy(model, prompts, count: int):
    """The ``count`` tokens that follow each of ``prompts`` (int64 [texts, length]): int64 [texts, count]."""
    found, step, past = [], prompts, None
    for _ in range(count):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(step)
    return torch.cat(found, dim=1)


def measure(model, data, *, device: str = "cpu", texts: int = TEXTS, context: int = 0) -> Decoding | None:
    """Both figures over the first held-out texts of ``data`` (``engines.data.tokens.TaskData``) that are long enough; None without any.

    Args:
        context: positions that the model has; 0 reads its config.
    """
    context = context or int(getattr(model.config, "max_position_embeddings", 0) or getattr(model.config, "n_positions", 0) or 10**9)
    prompt = min(PROMPT, max(1, context // 4))
    count = min(CONTINUED, context - prompt)
    chosen = [ids for ids in data.items.ids if len(ids) > prompt][:texts] or [ids for ids in data.items.ids if len(ids) > 4][:texts]
    if not chosen:
        return None
    prompt = min(prompt, min(len(ids) for ids in chosen))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            total = tokens = 0.0
            for ids in chosen:
                row = torch.as_tensor(ids[:context], dtype=torch.long, device=device)[None]
                logs = model(input_ids=row).logits[0].float().log_softmax(-1)
                total += float(-(logs.exp() * logs).sum()) / math.log(2)
                tokens += len(logs)
            given = torch.stack([torch.as_tensor(ids[:prompt], dtype=torch.long, device=device) for ids in chosen])
            ratios = [type_token_ratio(row) for row in greedy(model, given, count).tolist()]
    finally:
        model.train(training)
    return Decoding(total / tokens, sum(ratios) / len(ratios), len(chosen), count)

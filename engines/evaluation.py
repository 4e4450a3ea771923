"""Quality with per-item scores, so that two runs can be compared item by item."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from engines.lazy import torch


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    ``scores``: float32 per item: nats of the item (causal-lm) or 1 for a right answer (classification).
    ``weights``: bytes per item (causal-lm) or None. ``low`` and ``high``: 95 % bootstrap interval over items.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    scores: object
    weights: object
    items_hash: str
    seconds: float
    extra: dict = field(default_factory=dict)

    @property
    def better(self) -> str:
        return "lower" if self.metric == "bits/byte" else "higher"


def interval(scores, weights, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval over items of sum(scores) / sum(weights) (weights 1 when None)."""
    import numpy as np

    n = len(scores)
    if n < 2:
        value = float(scores.sum() / (weights.sum() if weights is not None else n))
        return value, value
    # Multinomial counts instead of index draws: one matrix product for all resamples.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    below = counts @ weights if weights is not None else np.full(draws, float(n))
    values = (counts @ scores.astype(np.float64)) / below
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def evaluate(model, data, *, device: str = "cpu", precision: str = "fp32", tokens: int = 8192, loss_chunk: int = 2048,
             keep_going=None) -> Evaluation:
    """Score every item of ``data.items`` (``engines.data.tokens.TaskData``).

    Args:
        tokens: padded tokens of one batch.
        keep_going: called between batches; may raise to break off.
    """
    import numpy as np

    began = time.perf_counter()
    was_training = model.training
    model.eval()
    items, n = data.items, len(data.items)
    scores, losses = np.zeros(n, np.float32), np.zeros(n, np.float64)
    lengths = np.asarray([len(i) for i in items.ids]) if items.ids is not None else np.full(n, max(1, data.length or 1))
    order, at, counted = np.argsort(-lengths, kind="stable"), 0, 0
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.inference_mode(), autocast:
            while at < n:
                size = max(1, tokens // max(1, int(lengths[order[at]]))) if items.ids is not None else 256
                part = order[at: at + size]
                at += size
                if data.task == "causal-lm":
                    scores[part] = _nats(model, [items.ids[i] for i in part], device, loss_chunk)
                    counted += int(sum(len(items.ids[i]) - 1 for i in part))
                else:
                    scores[part], losses[part] = _right(model, items, part, data, device)
                    counted += len(part)
                if keep_going is not None:
                    keep_going()
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - began
    if data.task == "causal-lm":
        weights = items.weights
        bits = scores.astype(np.float64) / math.log(2)
        low, high = interval(bits, weights)
        total = float(scores.astype(np.float64).sum())
        loss = total / max(1, counted)
        return Evaluation("bits/byte", float(bits.sum() / weights.sum()), low, high, n, scores, weights, items.fingerprint, seconds,
                          dict(loss=loss, perplexity=math.exp(min(loss, 80)), tokens=counted, tokens_per_second=counted / seconds))
    low, high = interval(scores, None)
    return Evaluation("accuracy", float(scores.mean()), low, high, n, scores, None, items.fingerprint, seconds,
                      dict(loss=float(losses.mean()), samples_per_second=n / seconds))


def _nats(model, rows, device: str, chunk: int):
    """Negative log-likelihood in nats of each row's tokens after the first; float32 numpy array."""
    import numpy as np

    from engines.data.tokens import pad
    from engines.training.loss import plain_head, unwrap

    ids = pad(rows, 0)["input_ids"].to(device)
    base, head = unwrap(model), plain_head(model)
    if head is not None:
        hidden = getattr(base, base.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    else:
        logits = base(input_ids=ids, use_cache=False).logits[:, :-1]
    target = ids[:, 1:]
    flat, parts = target.flatten(), []
    source = (hidden if head is not None else logits).flatten(0, 1)
    for at in range(0, len(flat), chunk):
        part = source[at: at + chunk]
        if head is not None:
            part = head(part if torch.is_autocast_enabled(device.split(":")[0]) else part.to(head.weight.dtype))
        parts.append(torch.nn.functional.cross_entropy(part.float(), flat[at: at + chunk], reduction="none"))
    nats = torch.cat(parts).view_as(target)
    sizes = torch.tensor([len(r) for r in rows], device=nats.device)
    keep = torch.arange(1, ids.shape[1], device=nats.device)[None] < sizes[:, None]
    return (nats.double() * keep).sum(dim=1).float().cpu().numpy().astype(np.float32)


def _right(model, items, part, data, device: str):
    from engines.data.tokens import pad

    if items.images is not None:
        inputs = dict(pixel_values=items.images[torch.as_tensor(part.copy())])
    else:
        inputs = pad([items.ids[i] for i in part], data.pad)
    logits = model(**{k: v.to(device) for k, v in inputs.items()}).logits.float()
    labels = torch.as_tensor(items.labels[part].copy(), device=logits.device).long()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (logits.argmax(dim=-1) == labels).float().cpu().numpy(), losses.double().cpu().numpy()

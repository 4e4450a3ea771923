"""Quality with per-item scores, so that two runs can be compared item by item."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from engines.lazy import torch
from engines.shortage import WIDTH, give_back, short


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
    usual: float = 0.0
    """Seconds at the usual pace of its batches, without what the first ones cost to warm up."""

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


def evaluate(model, data, *, device: str = "cpu", precision: str = "fp32", tokens: int = WIDTH, loss_chunk: int = 2048,
             width=None, keep_going=None) -> Evaluation:
    """Score every item of ``data.items`` (``engines.data.tokens.TaskData``).

    Args:
        tokens: padded tokens of one batch.
        width: an ``engines.shortage.Width`` in place of ``tokens``; where memory runs out it is lowered once and the batch repeated.
        keep_going: called between batches; may raise to break off.

    Raises:
        RunFailed: memory ran out with the lowered width too.
    """
    import numpy as np

    from engines.training import distributed

    began, group = time.perf_counter(), distributed.current()
    was_training = model.training
    model.eval()
    items, n = data.items, len(data.items)
    scores, losses = np.zeros(n, np.float32), np.zeros(n, np.float64)
    lengths = item_lengths(data)
    order, at, counted = np.argsort(-lengths, kind="stable"), 0, 0
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")
    pace: list[tuple[float, float]] = []
    if group is not None:  # every process scores its share of the items; the sums below put all scores into their places
        order = order[group.rank:: group.size]
    try:
        with torch.inference_mode(), autocast:
            while at < len(order):
                part = order[at: at + batch_rows(data, int(lengths[order[at]]), width.tokens if width else tokens)]
                t0 = time.perf_counter()
                try:
                    if data.task == "causal-lm":
                        scores[part] = _nats(model, [items.ids[i] for i in part], device, loss_chunk)
                        counted += int(sum(len(items.ids[i]) - 1 for i in part))
                    else:
                        scores[part], losses[part] = _right(model, items, part, data, device)
                        counted += len(part)
                except (RuntimeError, MemoryError) as e:
                    why = short(e)
                    if not why or width is None:
                        raise
                    del e
                    if device != "cpu":
                        torch.cuda.empty_cache()
                    width.lower(why)
                    continue
                at += len(part)
                pace.append((time.perf_counter() - t0, len(part) * float(lengths[part[0]])))
                if width is not None:
                    width.watch()
                if keep_going is not None:
                    keep_going()
    finally:
        model.train(was_training)
        if device == "cpu":
            give_back()     # its blocks have other sizes than those of training, which would begin beside the holes
    if group is not None:
        group.total(scores), group.total(losses)
        counted = int(group.total(np.asarray([counted], np.int64))[0])
    seconds = time.perf_counter() - began
    usual = _usual(pace, seconds)
    if data.task == "causal-lm":
        weights = items.weights
        bits = scores.astype(np.float64) / math.log(2)
        low, high = interval(bits, weights)
        total = float(scores.astype(np.float64).sum())
        loss = total / max(1, counted)
        return Evaluation("bits/byte", float(bits.sum() / weights.sum()), low, high, n, scores, weights, items.fingerprint, seconds,
                          dict(loss=loss, perplexity=math.exp(min(loss, 80)), tokens=counted, tokens_per_second=counted / seconds), usual)
    low, high = interval(scores, None)
    return Evaluation("accuracy", float(scores.mean()), low, high, n, scores, None, items.fingerprint, seconds,
                      dict(loss=float(losses.mean()), samples_per_second=n / seconds), usual)


def item_lengths(data):
    """Positions of each evaluation item: int array [items]."""
    import numpy as np

    items = data.items
    return np.asarray([len(i) for i in items.ids]) if items.ids is not None else np.full(len(items), max(1, data.length or 1))


def batch_rows(data, length: int, tokens: int) -> int:
    """Items of one evaluation batch whose longest has ``length`` positions."""
    return max(1, tokens // max(1, length)) if data.items.ids is not None else max(1, 256 * tokens // WIDTH)


def _usual(pace: list[tuple[float, float]], seconds: float) -> float:
    """Seconds when every batch had gone at the median pace (with three batches and more; else as it was)."""
    if len(pace) < 3:
        return seconds
    rates = sorted(took / units for took, units in pace)
    return min(seconds, rates[len(rates) // 2] * sum(units for _, units in pace))


def sample_seconds(model, data, *, tokens: int = WIDTH // 4, device: str = "cpu", precision: str = "fp32", loss_chunk: int = 2048) -> float:
    """Seconds of scoring one batch of the longest items, after one that warms up; for comparing one model's pace with another's."""
    import numpy as np

    lengths = item_lengths(data)
    order = np.argsort(-lengths, kind="stable")
    part = order[: batch_rows(data, int(lengths[order[0]]), tokens)]
    was_training, took = model.training, 0.0
    model.eval()
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.inference_mode(), autocast:
            for _ in range(2):
                t0 = time.perf_counter()
                if data.task == "causal-lm":
                    _nats(model, [data.items.ids[i] for i in part], device, loss_chunk)
                else:
                    _right(model, data.items, part, data, device)
                took = time.perf_counter() - t0
    finally:
        model.train(was_training)
    return took


def _nats(model, rows, device: str, chunk: int):
    """Negative log-likelihood in nats of each row's tokens after the first; float32 numpy array."""
    import numpy as np

    from engines.data.tokens import pad
    from engines.training.loss import plain_head, unwrap

    ids = pad(rows, 0)["input_ids"].to(device)
    base, head = unwrap(model), plain_head(model, packed=True)
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
            kind = getattr(getattr(head, "weight", None), "dtype", part.dtype)  # integer layers take any type
            part = head(part if torch.is_autocast_enabled(device.split(":")[0]) else part.to(kind))
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

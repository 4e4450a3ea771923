"""How fast a result answers: decoding one sequence for a language model, single items for a classifier."""

from __future__ import annotations

import statistics
import time

from engines.lazy import torch


def measure(model, data, *, device: str = "cpu", seconds: float = 0.6, new_tokens: int = 32) -> dict:
    """Latency at batch 1 in the precision in which the model is held.

    Returns:
        causal-lm: ``decode_tokens_per_second``, ``prompt``; otherwise ``samples_per_second`` and ``milliseconds`` (median of one item).
    """
    model.eval()
    with torch.inference_mode():
        if data.task == "causal-lm":
            ids = torch.as_tensor(data.items.ids[0][: max(2, min(32, len(data.items.ids[0])))].astype("int64"))[None].to(device)
            room = max(4, min(new_tokens, getattr(model.config, "max_position_embeddings", 10**6) - ids.shape[1]))
            best, spent = 0.0, 0.0
            while spent < seconds:
                t0 = time.perf_counter()
                _decode(model, ids, room)
                took = time.perf_counter() - t0
                best, spent = max(best, room / took), spent + took
            return dict(decode_tokens_per_second=best, prompt=int(ids.shape[1]), new_tokens=room)
        times, spent, i = [], 0.0, 0
        while spent < seconds:
            if data.items.images is not None:
                inputs = dict(pixel_values=data.items.images[i % len(data.items)][None])
            else:
                inputs = dict(input_ids=torch.as_tensor(data.items.ids[i % len(data.items)].astype("int64"))[None])
            inputs = {k: v.to(device) for k, v in inputs.items()}
            t0 = time.perf_counter()
            model(**inputs).logits.float().cpu()
            times.append(time.perf_counter() - t0)
            spent, i = spent + times[-1], i + 1
        usual = statistics.median(times)
        return dict(samples_per_second=1 / usual, milliseconds=1000 * usual)


def _decode(model, ids, count: int) -> None:
    out = model(input_ids=ids, use_cache=True)
    past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    for _ in range(count - 1):
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

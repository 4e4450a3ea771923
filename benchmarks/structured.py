"""Structured pruning at 50 % of heads and channels: measured throughput, and size as forecast.

A Llama of 24 M parameters (random weights) before and after; tokens per second of a forward pass over 8 x 256 tokens and of
decoding one sequence, in turn. The forecast's bytes are compared with the bytes of the file.

Run: python -m benchmarks.structured [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.int8 import build, decode


class RandomTokens:
    """Calibration inputs for a model with random weights."""

    task, length = "causal-lm", 128

    def calibration(self, sequences, length=None, seed=0):
        import torch
        g = torch.Generator().manual_seed(seed)
        return [dict(input_ids=torch.randint(1, 8000, (1, length or self.length), generator=g)) for _ in range(sequences)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    import torch

    from engines import models, registry
    from engines.context import Context
    from engines.profile import Batch
    from engines.reporter import Recorder

    dense, small = build(), build()
    profile = models.profile_of(small, "benchmark", "causal-lm")
    method = registry.get("structured")(heads=0.5, channels=0.5)
    forecast = method.footprint(profile, Batch()).result
    context = Context("causal-lm", RandomTokens(), None, profile, Recorder())
    small = method.finish(method.apply(small, context), context).eval()
    with tempfile.TemporaryDirectory() as folder:
        sizes = [models.save(m, None, Path(folder) / str(i))["weight_bytes"] for i, m in enumerate((dense, small))]
    ids, prompt = torch.randint(1, 8000, (8, 256)), torch.randint(1, 8000, (1, 16))
    forward, decoding = {"dense": [], "structured": []}, {"dense": [], "structured": []}
    with torch.inference_mode():
        for turn in range(a.rounds + 1):
            for name, model in (("dense", dense), ("structured", small)):
                began = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                speed = ids.numel() / (time.perf_counter() - began)
                single = decode(model, prompt)
                if turn:
                    forward[name].append(speed)
                    decoding[name].append(single)
    rows = [dict(variant=name, forward_tokens_per_second=statistics.median(forward[name]), decode_tokens_per_second=statistics.median(decoding[name]),
                 parameters=sum(p.numel() for p in model.parameters()), stored_mb=size / 1e6)
            for (name, model), size in zip((("dense", dense), ("structured", small)), sizes)]
    ratio = dict(forward=rows[1]["forward_tokens_per_second"] / rows[0]["forward_tokens_per_second"],
                 decode=rows[1]["decode_tokens_per_second"] / rows[0]["decode_tokens_per_second"], forecast_bytes=forecast, stored_bytes=sizes[1])
    common.table("Structured pruning, half of the heads and channels", rows)
    print(f"  forward {ratio['forward']:.2f} x, decode {ratio['decode']:.2f} x, forecast {forecast:,} B, stored {sizes[1]:,} B")
    common.write("structured", dict(rows=rows, ratio=ratio))


if __name__ == "__main__":
    main()

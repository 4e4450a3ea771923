"""int8 on a model of 20 M+ parameters at batch 1 on the CPU: speed and stored size against fp32.

The model is a Llama of 24 M parameters with random weights (speed and size do not depend on their values). Both are decoded
greedily, one sequence, in turn; fp32 is measured as torch runs it by default and with oneDNN's path for fp32 products.

Run: python -m benchmarks.int8 [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common


def build():
    """A Llama of about 24 M parameters, float32, random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
                         num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config).eval()


def decode(model, ids, count: int = 48) -> float:
    """Tokens per second of greedy decoding."""
    import torch

    from engines.speed import _decode
    with torch.inference_mode():
        began = time.perf_counter()
        _decode(model, ids, count)
        return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["int8", "int4"])
    a = parser.parse_args()
    import torch

    from engines import models, registry
    from engines.context import Context
    from engines.reporter import Recorder

    dense = build()
    count = sum(p.numel() for p in dense.parameters())
    ids = torch.randint(1, 8000, (1, 16))
    with tempfile.TemporaryDirectory() as folder:
        stored = {"fp32": models.save(dense, None, Path(folder) / "fp32")["weight_bytes"]}
        variants, kept = {"fp32": dense}, {}
        for id in a.methods:
            model = build()
            method = registry.get(id)()
            context = Context("causal-lm", None, None, models.profile_of(model, "benchmark", "causal-lm"), Recorder())
            model = method.finish(method.apply(model, context), context)
            stored[id] = models.save(model, None, Path(folder) / id)["weight_bytes"]
            loaded = models_load(Path(folder) / id)
            variants[id], kept[id] = loaded, model
        speeds = {name: [] for name in [*variants, "fp32 oneDNN"]}
        for turn in range(a.rounds + 1):
            for name, model in variants.items():
                speed = decode(model, ids)
                if turn:
                    speeds[name].append(speed)
            before = torch.backends.mkldnn.matmul.fp32_precision
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            speed = decode(dense, ids)
            torch.backends.mkldnn.matmul.fp32_precision = before
            if turn:
                speeds["fp32 oneDNN"].append(speed)
    usual = {name: statistics.median(values) for name, values in speeds.items()}
    rows = [dict(variant=name, tokens_per_second=usual[name], against_fp32=usual[name] / usual["fp32"],
                 stored_mb=stored.get(name, stored["fp32"]) / 1e6, share_of_fp32=stored.get(name, stored["fp32"]) / stored["fp32"]) for name in usual]
    common.table(f"Decoding at batch 1, {count / 1e6:.1f} M parameters, {torch.get_num_threads()} threads", rows)
    common.write("int8", dict(parameters=count, rows=rows))


def models_load(folder: Path):
    """The packed folder as a user loads it (no tokenizer in this benchmark's folder)."""
    import json

    import transformers

    from engines import models
    config = transformers.AutoConfig.from_pretrained(folder)
    return models._rebuild(folder, config, json.loads((folder / models.LAYOUT).read_text()), "causal-lm", None).eval()


if __name__ == "__main__":
    main()

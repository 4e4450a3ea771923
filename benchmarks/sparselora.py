"""Seconds of a training step of SparseLoRA against LoRA, by the width of the model: from which layer size on skipping pays.

Models of Llama's shape with random weights (what a step costs does not depend on their values), the same updates on both sides
(attention, one rank), the paper's two settings: ``commonsense`` skips 0.9 of the MLP channels and 0.5 of the attention's in the deep
blocks, ``arithmetic`` 0.99 and 0.75 in nearly all blocks; each with every position sparse and with the second half of each row
dense, as the answer is in the paper. Steps of all sides are taken in turn in one process, and a figure is
the median of the ratios of neighbouring steps, so that a busy machine hurts both alike. ``products`` is the ratio of the
forecast's arithmetic: what remains if gathering and choosing cost nothing.

Run: python -m benchmarks.sparselora [--widths 256 512 1024 2048] [--tokens 512] [--rounds 7] [--precision fp32 bf16]
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks import common

SETTINGS = {
    "commonsense": dict(mlp=0.9, attention=0.5, mlp_from=0.4, attention_from=0.53, until=0.93, tail=0.0),
    "arithmetic": dict(mlp=0.99, attention=0.75, mlp_from=0.09, attention_from=0.44, until=0.96, tail=0.0),
}
SETTINGS |= {f"{name}, half dense": {**chosen, "tail": 0.5} for name, chosen in SETTINGS.items()}


def build(width: int, blocks: int):
    """A Llama with an MLP of 2.75 times its width, float32, random, a small vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = LlamaConfig(vocab_size=1024, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
                         num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=True,
                         bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config)


class Side:
    """One model with one method in it, and its steps."""

    def __init__(self, stage: dict, width: int, blocks: int, rows: int, length: int, precision: str):
        import torch

        from engines import models, registry
        from engines.context import Context
        from engines.profile import Batch
        from engines.reporter import Recorder
        compute = "bfloat16" if precision == "bf16" else "float32"
        model = build(width, blocks)
        profile = models.profile_of(model, "benchmark", "causal-lm")
        self.method = registry.build(stage)
        self.method.check(profile)
        self.forecast = self.method.footprint(profile, Batch(rows=rows, length=length, compute=compute))
        self.context = Context("causal-lm", None, None, profile, Recorder(), compute=compute)
        self.model = self.method.apply(model, self.context).train()
        # The dense share at the start is over: what is measured is a sparse step.
        self.context.progress = 0.5
        self.precision = precision
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, batch) -> float:
        """Seconds of one step: forward, backward, clip, update."""
        import torch

        from engines.training.loss import task_loss
        began = time.perf_counter()
        self.method.before_step(self.model, self.context)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss = task_loss(self.model, batch, "causal-lm")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began


def measure(width: int, blocks: int, rows: int, length: int, rounds: int, precision: str, rank: int) -> list[dict]:
    """One row for each setting: seconds of both sides and the median, least and largest ratio."""
    import torch
    stages = {"lora": dict(method="lora", rank=rank, targets="attention")}
    stages |= {name: dict(method="sparselora", rank=rank, targets="attention", **chosen) for name, chosen in SETTINGS.items()}
    sides = {name: Side(stage, width, blocks, rows, length, precision) for name, stage in stages.items()}
    g, times = torch.Generator().manual_seed(1), {name: [] for name in sides}
    for turn in range(rounds + 1):
        tokens = torch.randint(1, 1000, (rows, length + 1), generator=g)
        batch = dict(input_ids=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())
        for name, side in sides.items():
            seconds = side.step(batch)
            if turn:
                times[name].append(seconds)
    out = []
    for name in SETTINGS:
        ratios = sorted(b / a for a, b in zip(times["lora"], times[name]))
        out.append(dict(precision=precision, width=width, mlp=width * 11 // 4, blocks=blocks, setting=name, lora_seconds=statistics.median(times["lora"]),
                        ratio=statistics.median(ratios), least=ratios[0], largest=ratios[-1],
                        products=sides[name].forecast.flops_per_token / sides["lora"].forecast.flops_per_token))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each model; the widest gets half as many")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--dry", action="store_true", help="print only; keep the stored figures")
    a = parser.parse_args()
    import torch

    from engines.kernels import fast_float32
    rows = []
    with fast_float32():
        for precision in a.precision:
            for width in a.widths:
                blocks = a.blocks if width < 2048 else max(4, a.blocks // 2)
                rows += measure(width, blocks, a.rows, a.length, a.rounds, precision, a.rank)
    common.table(f"A step of SparseLoRA in steps of LoRA, {a.rows} x {a.length} tokens, {torch.get_num_threads()} threads", rows)
    said = []
    for precision in a.precision:
        for name in SETTINGS:
            found = [r for r in rows if (r["precision"], r["setting"]) == (precision, name)]
            slower = [r["width"] for r in found if r["largest"] >= 1.0]
            able = [r["width"] for r in found if r["width"] > max(slower, default=0)]
            said.append(f"{precision} {name}: " + (f"faster in every round from width {min(able)} on" if able else "at no width faster in every round"))
    print("\n  " + "\n  ".join(said))
    if not a.dry:
        common.write("sparselora", dict(tokens=a.rows * a.length, threads=torch.get_num_threads(), rank=a.rank, rows=rows, said=said))


if __name__ == "__main__":
    main()

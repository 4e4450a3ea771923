"""Does sharing levels out by measurement pay? stdlib-lm on python-docs, bits per byte, with the seconds of each search.

Sparsity: magnitude and Wanda at 50, 60 and 70 % with equal shares, erk, rd and evolution. Bits: int4 and int8 mixed at 5 bits,
chosen by lgreco, rd and evolution, against the mean of random mixtures of the same size, and uniform int4 and int8. Rank: LoRA
with equal and with gradient ranks, equal trainable parameters and steps.

Run: python -m benchmarks.allocation [--items 200] [--steps 40] [--seeds 2] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import random
import time

from benchmarks import common

SPARSITIES = (0.5, 0.6, 0.7)
DISTRIBUTIONS = ("uniform", "erk", "rd", "evolution")


class Bench:
    """The model, its data, and one stage after another on a fresh copy."""

    def __init__(self, items: int):
        from engines import data as datasets
        from engines import models
        from engines.data.tokens import TaskData
        self.loaded = models.load("stdlib-lm", "causal-lm")
        table = datasets.load("python-docs", task="causal-lm")
        self.data = TaskData(table, self.loaded.tokenizer, length=256, seed=0, items=items)

    def context(self, seed: int = 0):
        from engines.context import Context
        from engines.reporter import Recorder
        return Context(task="causal-lm", data=self.data, tokenizer=self.loaded.tokenizer, profile=self.loaded.profile, reporter=Recorder(), seed=seed)

    def stage(self, seed: int = 0, steps: int = 0, **settings) -> dict:
        """Bits per byte with its interval after one stage, seconds of it, and what it said about its choice."""
        from engines import registry
        from engines.evaluation import evaluate
        from engines.training.loop import Limit
        from engines.training.settings import TrainSettings
        from engines.training.stage import train
        model, context = copy.deepcopy(self.loaded.model), self.context(seed)
        method = registry.build(settings)
        method.check(self.loaded.profile)
        began = time.perf_counter()
        model = method.apply(model, context)
        seconds = time.perf_counter() - began
        if steps:
            train(model, method, context, TrainSettings(lr=1e-3, batch=16, length=256, evaluations=1, items=8, warmup=0.1), Limit(steps=steps))
        model = method.finish(model, context).eval()
        found = evaluate(model, self.data)
        choice = next((data for kind, _, data in context.reporter.events if kind == "choice" and "by" in data), {})
        return dict(value=found.value, low=found.low, high=found.high, seconds=seconds, choice=choice)


def pruning(bench: Bench, a) -> list[dict]:
    rows = []
    for method in ("magnitude", "wanda"):
        for sparsity in a.sparsities:
            for distribution in DISTRIBUTIONS:
                more = dict(samples=32) if method == "wanda" else {}
                if distribution in ("rd", "evolution"):
                    more.update(search_tokens=a.tokens, generations=a.generations)
                found = bench.stage(method=method, sparsity=sparsity, distribution=distribution, **more)
                rows.append(dict(method=method, sparsity=sparsity, ratios=distribution, bits_per_byte=found["value"], low=found["low"],
                                 high=found["high"], seconds=found["seconds"], kept=found["choice"].get("kept", "")))
                print(f"  {method} {sparsity:.0%} {distribution}: {found['value']:.4f} in {found['seconds']:.1f} s", flush=True)
    return rows


def random_mixtures(bench: Bench, count: int) -> dict:
    """Bits per byte of mixtures drawn by chance with the same total as 5 bits."""
    from engines import registry
    from engines.evaluation import evaluate
    from engines.models import matrices
    method = registry.build(dict(method="mixed", bits=5.0))
    plan = method.fit(bench.loaded.profile, bench.context().budget)[0]._plan(bench.loaded.profile)
    shapes: dict[tuple, list[int]] = {}
    found, values = matrices(bench.loaded.model), []
    for i, (m, _) in enumerate(found):
        shapes.setdefault((m.out, m.inp), []).append(i)
    for seed in range(count):
        rng, chosen = random.Random(seed), list(plan.start)
        for members in shapes.values():
            levels = [plan.start[i] for i in members]
            rng.shuffle(levels)
            for i, level in zip(members, levels):
                chosen[i] = level
        cls = type(method)
        fixed = [plan.levels[c] for c in chosen]

        class Drawn(cls):
            def _choose(self, *args, _fixed=fixed):
                return _fixed
        model, context = copy.deepcopy(bench.loaded.model), bench.context()
        values.append(evaluate(Drawn(bits=5.0).apply(model, context).eval(), bench.data).value)
    return dict(mean=sum(values) / len(values), least=min(values), most=max(values), bytes=plan.file)


def bits(bench: Bench, a) -> list[dict]:
    from engines import registry
    from engines.profile import Batch
    rows = []
    for settings in (dict(method="int4"), dict(method="int8"), *(dict(method="mixed", bits=5.0, by=by) for by in ("lgreco", "rd", "evolution"))):
        if settings.get("by") in ("rd", "evolution"):
            settings.update(search_tokens=a.tokens)
        if settings.get("by") == "evolution":
            settings.update(generations=max(2, a.generations * 2 // 3))
        made, _ = registry.build(settings).fit(bench.loaded.profile, bench.context().budget)
        size = made.footprint(bench.loaded.profile, Batch()).result
        found = bench.stage(**made.settings())
        rows.append(dict(weights=settings["method"] + (" " + settings["by"] if "by" in settings else ""), mb=size / 1e6,
                         bits_per_byte=found["value"], low=found["low"], high=found["high"], seconds=found["seconds"]))
        print(f"  {rows[-1]['weights']}: {found['value']:.4f}, {size / 1e6:.3f} MB", flush=True)
    drawn = random_mixtures(bench, a.drawn)
    rows.append(dict(weights=f"{a.drawn} random mixtures, mean", mb=drawn["bytes"] / 1e6, bits_per_byte=drawn["mean"], low=drawn["least"],
                     high=drawn["most"], seconds=0.0))
    return rows


def ranks(bench: Bench, a) -> list[dict]:
    rows = []
    for kind in ("uniform", "gradient"):
        for seed in range(a.seeds):
            found = bench.stage(seed=seed, steps=a.steps, method="lora", rank=4, ranks=kind)
            rows.append(dict(ranks=kind, seed=seed, bits_per_byte=found["value"], low=found["low"], high=found["high"], seconds=found["seconds"]))
            print(f"  lora {kind}, seed {seed}: {found['value']:.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=200, help="held-out windows that are scored")
    parser.add_argument("--tokens", type=int, default=512, help="calibration tokens of one measurement")
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a LoRA")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--drawn", type=int, default=6, help="random mixtures")
    parser.add_argument("--quick", action="store_true", help="one sparsity, few items: does it run at all")
    parser.add_argument("--only", choices=("pruning", "bits", "ranks"))
    a = parser.parse_args()
    a.sparsities = SPARSITIES
    if a.quick:
        a.sparsities, a.items, a.tokens, a.generations, a.steps, a.seeds, a.drawn = (0.6,), 24, 128, 3, 4, 1, 2
    from engines.kernels import fast_float32
    with fast_float32():
        bench, figures = Bench(a.items), {}
        from engines.evaluation import evaluate
        dense = evaluate(bench.loaded.model, bench.data)
        for name, measure in (("pruning", pruning), ("bits", bits), ("ranks", ranks)):
            if a.only in (None, name):
                began = time.perf_counter()
                figures[name] = measure(bench, a)
                figures[f"{name}_seconds"] = time.perf_counter() - began
    for name in ("pruning", "bits", "ranks"):
        if name in figures:
            common.table(f"{name} (dense: {dense.value:.4f} bits/byte, {dense.n} items)", figures[name])
    if not a.quick:
        common.write("allocation", dict(dense=dense.value, items=dense.n, tokens=a.tokens, generations=a.generations, **figures))


if __name__ == "__main__":
    main()

"""Does GradES end earlier at equal loss? stdlib-lm on python-docs, full fine-tuning and LoRA, plain and with GradES, by default 3 seeds.

The threshold is the default rule of its card (a tenth of each matrix's own mean change in the grace period); nothing is searched for
it. Both sides train on the same batches with the same learning rate: the one, among three, that is best for the plain side. A third
row is the control that the paper does not have: plain training for as many steps as GradES took, with its whole schedule.

Run: python -m benchmarks.grades [--steps 240] [--seeds 3] [--batch 8] [--length 128] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import numpy as np

from benchmarks import common

STAGES = {"full": {"method": "full"}, "lora": {"method": "lora"}}


def switched(stage: dict, **settings) -> dict:
    return {**stage, "training": {"switches": [{"method": "grades", **settings}]}}


def paired(a: list[dict], b: list[dict], draws: int = 4000) -> tuple[float, float, float]:
    """Mean difference a - b in bits per byte and its 95 % interval; seeds and items are drawn together, both sides alike."""
    x, y, w = np.stack([r["scores"] for r in a]), np.stack([r["scores"] for r in b]), a[0]["weights"]
    rng, (seeds, items), found = np.random.default_rng(0), x.shape, []
    for _ in range(draws):
        s, i = rng.integers(seeds, size=seeds), rng.integers(items, size=items)
        found.append((x[s][:, i] - y[s][:, i]).mean(axis=0).sum() / w[i].sum())
    return float((x - y).mean(axis=0).sum() / w.sum()), *(float(v) for v in np.quantile(found, (0.025, 0.975)))


def bits(row: dict) -> float:
    return float(row["scores"].sum() / row["weights"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: only shows that it runs")
    a = parser.parse_args()
    if a.quick:
        a.steps, a.seeds, a.batch, a.length = 12, 1, 2, 32
        STAGES.pop("full")

    import torch

    from engines.claim import Claim
    from workbench import telemetry
    from workbench.claiming import Bench
    torch.set_num_threads(telemetry.threads())
    bench = Bench(dataclasses.asdict(Claim("sooner", "", STAGES["lora"], STAGES["lora"], length=a.length, batch=a.batch, steps=a.steps)))
    out, rows = {}, []
    for name, stage in STAGES.items():
        usual = bench.usual_rate(stage)
        tried = {usual * f: bits(bench.train(stage, usual * f, 0)) for f in ((1.0,) if a.quick else (0.33, 1.0, 3.0))}
        rate = min(tried, key=tried.get)
        found: dict[str, list] = {"plain": [], "GradES": [], "as short": []}
        for seed in range(a.seeds):         # in turn, so that a busy machine hurts all alike
            found["plain"].append(bench.train(stage, rate, seed))
            found["GradES"].append(bench.train(switched(stage), rate, seed))
            found["as short"].append(bench.train(stage, rate, seed, found["GradES"][-1]["steps"]))
        for side, runs in found.items():
            middle, low, high = paired(runs, found["plain"]) if side != "plain" else (0.0, 0.0, 0.0)
            seconds, plain = [statistics.median(r["duration"] for r in x) for x in (runs, found["plain"])]
            rows.append({"stage": name, "side": side, "steps": statistics.median(r["steps"] for r in runs), "seconds": seconds,
                         "ms a step": 1e3 * statistics.median(r["seconds"] for r in runs), "times faster": plain / seconds,
                         "bits/byte": statistics.mean(map(bits, runs)), "difference": middle, "low": low, "high": high})
        out[name] = dict(rate=rate, tried=[[r, v] for r, v in tried.items()],
                         by_seed={side: [dict(steps=r["steps"], seconds=r["duration"], value=bits(r)) for r in runs] for side, runs in found.items()})
    common.table(f"GradES on stdlib-lm / python-docs, {a.steps} steps of {a.batch} rows of {a.length}, {a.seeds} seeds", rows)
    if not a.quick:
        common.write("grades", dict(steps=a.steps, batch=a.batch, length=a.length, seeds=a.seeds, rows=rows, stages=out))


if __name__ == "__main__":
    main()

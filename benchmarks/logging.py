"""Telemetry and logging at 10 Hz: their share of a run's time.

The same training loop on a small Llama, in turn with a reporter that drops everything and with the one that a worker uses
(SQLite writer thread, sampler at 10 Hz); the CPU seconds of the process are compared, which noise from outside hardly touches.

Run: python -m benchmarks.logging [--steps 300]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    from benchmarks.int8 import build
    from engines.reporter import Recorder
    from engines.training.loss import task_loss
    from storage import Store
    from workbench.reporting import StoreReporter
    from workbench.telemetry import Sampler

    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 8192, (2, 129))

    def work(reporter) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for step in range(1, a.steps + 1):
            loss = task_loss(model, dict(input_ids=tokens[:, :-1], labels=tokens[:, 1:].contiguous()), "causal-lm")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            reporter.points(step, {"loss": float(loss.detach()), "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 1.0, "tokens": step,
                                   "time/data": 0.0, "time/forward": 0.0, "time/backward": 0.0, "time/step": 0.0})
            reporter.progress(step / a.steps, 1.0)
            reporter.wants()
        return time.process_time() - cpu, time.perf_counter() - wall

    work(Recorder())
    shares, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "fettle.db")
        for turn in range(a.rounds):
            bare, bare_wall = work(Recorder())
            run = store.create_run({}, name=f"bench-{turn}")
            reporter = StoreReporter(store, run)
            sampler = Sampler(reporter.sample, pid=os.getpid(), period=0.1)
            sampler.start()
            full, full_wall = work(reporter)
            sampler.stop()
            reporter.close()
            shares.append(full / bare - 1)
            rows.append(dict(round=turn, cpu_without=bare, cpu_with=full, share=full / bare - 1, wall_without=bare_wall, wall_with=full_wall))
    common.table(f"{a.steps} steps with and without telemetry at 10 Hz", rows)
    print(f"  median share {100 * statistics.median(shares):.2f} %")
    common.write("logging", dict(rows=rows, share=statistics.median(shares)))


if __name__ == "__main__":
    main()

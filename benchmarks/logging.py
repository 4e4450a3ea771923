"""Telemetry and logging at 10 Hz: their share of a run's time.

The same training loop on a small Llama, in turn with a reporter that drops everything and with the one that a worker uses
(SQLite writer thread, sampler at 10 Hz). Two figures: the difference of the process's CPU seconds, which on a shared machine
varies by more than what is measured, and the direct account: CPU seconds of the writer's and the sampler's threads plus the time
spent inside the reporter's calls, as a share of the loop's CPU seconds.

Run: python -m benchmarks.logging [--steps 200]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
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

    def work(reporter) -> tuple[float, float, float]:
        cpu, wall, inside, own = time.process_time(), time.perf_counter(), 0.0, time.thread_time
        for step in range(1, a.steps + 1):
            loss = task_loss(model, dict(input_ids=tokens[:, :-1], labels=tokens[:, 1:].contiguous()), "causal-lm")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            before = own()
            reporter.points(step, {"loss": float(loss.detach()), "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 1.0, "tokens": step,
                                   "time/data": 0.0, "time/forward": 0.0, "time/backward": 0.0, "time/step": 0.0})
            reporter.progress(step / a.steps, 1.0)
            reporter.wants()
            inside += own() - before
        return time.process_time() - cpu, time.perf_counter() - wall, inside

    def others() -> dict[int, float]:
        """CPU seconds of each thread of this process but the one that trains (the CPU build's pool has one thread here)."""
        import psutil
        me = threading.get_native_id()
        return {t.id: t.user_time + t.system_time for t in psutil.Process().threads() if t.id != me}

    work(Recorder())
    shares, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "fettle.db")
        for turn in range(a.rounds):
            bare, bare_wall, _ = work(Recorder())
            resting = others()
            run = store.create_run({}, name=f"bench-{turn}")
            reporter = StoreReporter(store, run)
            sampler = Sampler(reporter.sample, pid=os.getpid(), period=0.1)
            sampler.start()
            full, full_wall, inside = work(reporter)
            threads = sum(used - resting.get(thread, 0.0) for thread, used in others().items())
            sampler.stop()
            reporter.close()
            shares.append((threads + inside) / full)
            rows.append(dict(round=turn, cpu_without=bare, cpu_with=full, difference=full / bare - 1, threads=threads, calls=inside,
                             share=shares[-1], wall_without=bare_wall, wall_with=full_wall))
    common.table(f"{a.steps} steps with and without telemetry at 10 Hz", rows)
    print(f"  median share, direct account: {100 * statistics.median(shares):.2f} %")
    common.write("logging", dict(rows=rows, share=statistics.median(shares)))


if __name__ == "__main__":
    main()

"""Sweeps: trials per minute on one and on two nodes of a Ray cluster on this machine, and what scheduling costs per trial.

The same short real trials (a LoRA on stdlib-lm, the seed varies) run through the local queue, on a cluster of one node that lends
one processor, and on one of two such nodes; every trial has one thread. The overhead is the time from the end of a run to the start
of the next on the same node, as the runs' own records say it; the imports before a node's first trial are told apart.

Run: python -m benchmarks.sweep [--trials 8] [--steps 16] [--skip-local]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time

from benchmarks import common

TARGET, MOST = 1.6, 3.0
"""Two nodes against one, and else seconds of overhead per trial."""


def spec(steps: int) -> dict:
    return dict(model="stdlib-lm", data="python-docs", pipeline=[{"method": "lora", "rank": 4}], budget={"steps": steps},
                training={"lr": 1e-3, "batch": 4, "length": 128, "evaluations": 1, "items": 16, "precision": "fp32"})


def measure(name: str, trials: int, steps: int, on: str | None) -> dict:
    """One sweep to its end; figures from the records of its runs."""
    from workbench.home import Home
    from workbench.sweeps import service, view
    home, began = Home.open(), time.time()
    row = service.start(spec(steps), dict(over={"seed": list(range(trials))}, sampler="grid", on=on), name=name, home=home)
    while home.store.sweep(row["id"])["status"] == "running":
        time.sleep(0.1)
    total = time.time() - began
    found = view.status(row["id"], home=home, weights=False)
    if found["counts"] != {"complete": trials}:
        why = [t["message"] for t in found["trials"] if t["message"]]
        raise SystemExit(f"{name}: {found['counts']} {found['message'] or ''} {why[:1]}")
    rows = sorted((home.store.light(t["run"]) | {"node": t["node"]} for t in found["trials"]), key=lambda r: r["started"])
    gaps = []
    for node in {r["node"] for r in rows}:
        own = [r for r in rows if r["node"] == node]
        gaps += [b["started"] - a["ended"] for a, b in zip(own, own[1:])]
    span = max(r["ended"] for r in rows) - rows[0]["started"]
    return dict(where=name, nodes=len({r["node"] for r in rows}), trials=trials,
                trial_s=statistics.median(r["ended"] - r["started"] for r in rows), per_minute=60 * trials / span, overhead_s=statistics.median(gaps), worst_overhead_s=max(gaps),
                before_first_s=rows[0]["started"] - began, total_s=total)


def cluster(nodes: int):
    from ray.cluster_utils import Cluster
    made = Cluster()
    for i in range(nodes):
        made.add_node(num_cpus=1, object_store_memory=80_000_000, **({} if i else {"include_dashboard": False}))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--skip-local", action="store_true", help="only the cluster")
    a = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["WORKBENCH_HOME"], os.environ["WORKBENCH_SCRATCH"] = f"{folder}/home", folder
        if not a.skip_local:
            rows.append(measure("this machine's queue", a.trials, a.steps, None))
        if importlib.util.find_spec("ray") is None:
            print("Ray is not installed: pip install -r requirements-ray.txt")
        else:
            for nodes in (1, 2):
                made = cluster(nodes)
                try:
                    rows.append(measure(f"Ray, {nodes} node{'s' * (nodes > 1)}", a.trials, a.steps, f"ray://{made.address}"))
                finally:
                    made.shutdown()
    common.table("Short trials through a sweep (one thread each)", rows)
    figures: dict = dict(rows=rows)
    by = {r["nodes"]: r for r in rows if r["where"].startswith("Ray")}
    if len(by) == 2:
        ratio, overhead = by[2]["per_minute"] / by[1]["per_minute"], by[2]["overhead_s"]
        figures |= dict(ratio=ratio, overhead_s=overhead, met=ratio >= TARGET or overhead <= MOST)
        print(f"\n  two nodes against one: {ratio:.2f} x (bar {TARGET} where the cores allow it), "
              f"overhead {overhead:.2f} s per trial (bar {MOST:g} s)")
    common.write("sweep", figures)


if __name__ == "__main__":
    main()

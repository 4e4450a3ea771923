"""Training memory of methods that promise less of it, by part, forecast against measurement, beside full fine-tuning and LoRA.

Each method trains a model of 20.5 M parameters (Llama-shaped, random weights, batch 2 x 128 unless told otherwise) as a run of the
workbench. Peak: the resident set of the training phase beyond the process and its libraries, forecast before the run and measured in
it; "factor" is that peak as a share of full fine-tuning's, once forecast and once measured. Weights, live gradients when the optimizer
steps, and optimizer state are counted in a second process; the rest is activations and work space.

Run: python -m benchmarks.adaptation_memory [--only full,lora,lisa] [--rows 2] [--length 128] [--rounds 2] [--steps 10]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common

METHODS = ("full", "lora", "lisa", "galore", "q-galore", "fira", "s2ft", "lamda", "sparselora", "kd-lora", "spiel", "bone", "adalora")
SETTINGS = {"kd-lora": {"teacher": "MODEL"}}
"""Settings beside the defaults; MODEL is the model itself."""
PARTS = ("weights", "gradients", "optimizer")


def parts(model: str, stage: dict, rows: int, length: int, steps: int, precision: str = "bf16") -> dict:
    """Counted bytes of one training and its seconds a step."""
    from engines.claim import Claim
    from engines.kernels import fast_float32
    from workbench.claiming import Bench
    usual = dataclasses.asdict(Claim("parts", "Any.", ours=stage, against=stage))
    claim = usual | dict(model=model, data="python-docs", length=length, batch=rows, steps=steps, precision=precision, before=(), rates=())
    with fast_float32():
        bench = Bench(claim)
        return bench.train(stage, bench.usual_rate(stage), 0, steps, score=False)


def child(*given) -> dict:
    code = "import json, sys\nfrom benchmarks import adaptation_memory as a\nprint(json.dumps(a.parts(*json.loads(sys.stdin.read()))))"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(given), capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def forecast(home, spec: dict) -> tuple[int, int]:
    """(bytes of the training phase, of which the process and its libraries), before any run has corrected them."""
    from workbench import planner
    said = next(p for p in planner.forecast(spec, home, remedies=False)["memory"]["phases"] if p["phase"].startswith("1 "))
    return said["total"], said["parts"]["context"]


def run(home, spec: dict) -> tuple[int, float]:
    """One run of the workbench: (measured bytes of the training phase, uncorrected forecast of the whole run over its measured peak)."""
    from workbench import runs
    row = runs.start(spec, home=home)
    while row["status"] in ("queued", "starting", "running"):
        time.sleep(0.1)
        row = home.store.light(row["id"])
    if row["status"] != "finished":
        raise RuntimeError(f"{row['status']}: {row['message']}")
    full = home.store.run(row["id"])
    peak = next(p for p in full["footprint"]["phases"] if p["phase"].startswith("1 "))["peak_bytes"]
    return peak, full["forecast"]["raw"]["peak_bytes"] / full["footprint"]["peak_bytes"]


def stages(model: str) -> dict[str, dict]:
    """The stage of each method."""
    from engines import registry
    return {m: {"method": m} | {k: model if v == "MODEL" else v for k, v in SETTINGS.get(m, {}).items()} for m in registry.methods()}


def main() -> None:
    from benchmarks.memory import LLAMA, make
    from engines import registry
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="method ids, separated by commas")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    a = parser.parse_args()
    chosen = a.only.split(",") if a.only else [m for m in METHODS if m in registry.methods()]
    counted, found = {}, {m: [] for m in chosen}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WORKBENCH_HOME"] = folder
        from workbench import dispatcher, machine
        from workbench.home import Home
        home = Home.open()
        machine.calibrate(home.store)
        model = str(make(Path(folder) / "llama-20m", LLAMA))
        specs = {m: dict(model=model, data="python-docs", pipeline=[stages(model)[m]], budget=dict(steps=a.steps),
                         training=dict(batch=a.rows, length=a.length, accumulation=1, precision="bf16", checkpointing=False, items=96, evaluations=1))
                 for m in chosen}
        # All before the first run: later forecasts would be corrected by it, and so would the bytes of the process.
        said = {m: forecast(home, spec) for m, spec in specs.items()}
        feeder = dispatcher.Dispatcher(home).start()
        try:
            for i in range(a.rounds):
                for m, spec in specs.items():
                    try:
                        found[m].append(run(home, spec))
                        print(f"  {m}: {found[m][-1][0] / 1e6:.0f} MB, process included", flush=True)
                        if not i:
                            counted[m] = child(model, spec["pipeline"][0], a.rows, a.length, a.steps)
                    except RuntimeError as e:
                        print(f"  {m}: {e}", flush=True)
        finally:
            feeder.stop()
    rows, full, mb = [], None, 1e6
    for m, runs in found.items():
        if not runs or m not in counted:
            continue
        base = said[m][1]
        peak, told = statistics.median(p for p, _ in runs) - base, said[m][0] - base
        full = full or (peak, told)
        row = {"method": m, "trained": counted[m]["trainable"]} | {f"{part} MB": counted[m][part] / mb for part in PARTS}
        rows.append(row | {"rest MB": (peak - sum(counted[m][p] for p in PARTS)) / mb, "peak MB": peak / mb, "forecast MB": told / mb,
                           "factor": peak / full[0], "factor forecast": told / full[1], "factor off": told / full[1] / (peak / full[0]) - 1,
                           "with process": (peak + base) / (full[0] + base), "forecast with process": (told + base) / (full[1] + base),
                           "whole run": statistics.median(whole for _, whole in runs), "ms/step": 1000 * counted[m]["seconds"]})
    common.table(f"Training memory of 20.5 M parameters, {a.rows} x {a.length}", rows)
    if not a.only:
        common.write("adaptation_memory", dict(rows=a.rows, length=a.length, found=rows))


if __name__ == "__main__":
    main()

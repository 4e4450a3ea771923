"""Forecast against measurement: trainable parameters, stored bytes and peak memory of real runs; latency of a forecast.

Each run is executed as the page does it (queue, worker, telemetry) in a home of its own.

Run: python -m benchmarks.forecast [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import common

CASES = (
    ("stdlib-lm", "python-docs", [{"method": "full"}]),
    ("stdlib-lm", "python-docs", [{"method": "lora", "rank": 8}]),
    ("stdlib-lm", "python-docs", [{"method": "adalora"}]),
    ("stdlib-lm", "python-docs", [{"method": "magnitude", "sparsity": 0.5}]),
    ("stdlib-lm", "python-docs", [{"method": "random", "sparsity": 0.5}]),
    ("stdlib-lm", "python-docs", [{"method": "wanda", "sparsity": 0.5}]),
    ("stdlib-lm", "python-docs", [{"method": "structured"}]),
    ("stdlib-lm", "python-docs", [{"method": "int8"}]),
    ("stdlib-lm", "python-docs", [{"method": "int4"}]),
    ("stdlib-lm", "python-docs", [{"method": "gptq"}]),
    ("stdlib-lm", "python-docs", [{"method": "wanda"}, {"method": "lora", "rank": 8}, {"method": "int8"}]),
    ("digits-vit", "digits", [{"method": "lora", "rank": 4}]),
    ("digits-vit", "digits", [{"method": "structured"}]),
)


def latency(rounds: int = 30) -> dict:
    """Milliseconds of a forecast in a process that has not imported torch, the first ones left out."""
    code = ("import json, sys, time\n"
            "from workbench import planner, spec\n"
            "s = spec.load('example')\n"
            "times = []\n"
            f"for i in range({rounds}):\n"
            "    t = time.perf_counter(); planner.forecast(s.setting('budget.minutes', 1 + i / 10)); times.append(1000 * (time.perf_counter() - t))\n"
            "assert 'torch' not in sys.modules\n"
            "print(json.dumps(times))\n")
    times = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    return dict(first=times[0], median=statistics.median(times[3:]), worst=max(times[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    a = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for model, data, pipeline in CASES:
            path = os.path.join(home, "spec.yaml")
            with open(path, "w") as f:
                json.dump(dict(model=model, data=data, pipeline=pipeline, budget=dict(steps=a.steps)), f)
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "workbench", "run", path, "--json"], capture_output=True, text=True,
                                  env={**os.environ, "WORKBENCH_HOME": home})
            if done.returncode:
                print(f"  {pipeline}: {done.stderr.strip().splitlines()[-1:]}")
                continue
            result = json.loads(done.stdout)
            forecast, footprint = result["forecast"], result["footprint"]
            peak = footprint.get("peak_bytes") or max(footprint.get("phases", {"": 0}).values())
            rows.append(dict(pipeline=" + ".join(s["method"] for s in pipeline), model=model, peak_forecast_mb=forecast["memory"]["peak_bytes"] / 1e6,
                             peak_measured_mb=peak / 1e6, memory_ratio=forecast["memory"]["peak_bytes"] / peak if peak else float("nan"),
                             trainable_exact=forecast["trainable"]["count"] == footprint.get("trainable"),
                             size_exact=forecast["size"]["bytes"] == footprint.get("weight_bytes", footprint.get("size_bytes")),
                             seconds_forecast=forecast["seconds"]["total"], seconds=result["seconds"], wall=time.perf_counter() - began))
            print(rows[-1], flush=True)
    times = latency()
    common.table("Forecast beside measurement", rows)
    worst = max(abs(r["memory_ratio"] - 1) for r in rows)
    print(f"  worst memory error {100 * worst:.0f} %; forecast {times['median']:.1f} ms (first {times['first']:.0f} ms, worst {times['worst']:.1f} ms)")
    common.write("forecast", dict(rows=rows, worst_memory_error=worst, latency_ms=times))


if __name__ == "__main__":
    main()

"""A run under minutes against its limit, and seconds forecast against seconds measured before and after a probe.

Each run goes through the queue in a home of its own, one after the other. Shown for limits: elapsed / limit (the bar is 5 %), the
learning rate at the end as a share of its peak (a completed schedule ends near its ``final``), and whether the result was evaluated.
Shown for steps: forecast / measured seconds before and after a probe (the bar is 15 % after one).

Run: python -m benchmarks.minutes [--minutes 0.5 1] [--steps 150] [--only lora int8] [--skip-limits] [--skip-steps]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from benchmarks import common

CASES = {
    "full": ("stdlib-lm", "python-docs", [{"method": "full"}]),
    "lora": ("stdlib-lm", "python-docs", [{"method": "lora", "rank": 8}]),
    "adalora": ("stdlib-lm", "python-docs", [{"method": "adalora"}]),
    "wanda+lora+int8": ("stdlib-lm", "python-docs", [{"method": "wanda"}, {"method": "lora", "rank": 8}, {"method": "int8"}]),
    "structured+full": ("stdlib-lm", "python-docs", [{"method": "structured"}, {"method": "full"}]),
    "magnitude-gradual": ("stdlib-lm", "python-docs", [{"method": "magnitude", "schedule": "gradual"}]),
    "lora+gptq": ("stdlib-lm", "python-docs", [{"method": "lora", "rank": 8}, {"method": "gptq"}]),
    "magnitude-gradual+lora": ("stdlib-lm", "python-docs", [{"method": "magnitude", "schedule": "gradual"}, {"method": "lora", "rank": 8}]),
    "vit-lora": ("digits-vit", "digits", [{"method": "lora", "rank": 4}]),
}


def workbench(home: str, *arguments: str) -> dict | None:
    """One command with ``--json``; None, and its complaint, when it fails."""
    done = subprocess.run([sys.executable, "-m", "workbench", *arguments, "--json"], capture_output=True, text=True,
                          env={**os.environ, "WORKBENCH_HOME": home})
    if done.returncode:
        print(f"  {' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", flush=True)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return None


def spec(home: str, case: str, **budget) -> str:
    """Path of a spec file for a case under a budget."""
    model, data, pipeline = CASES[case]
    path = os.path.join(home, f"{case}.yaml")
    with open(path, "w") as f:
        json.dump(dict(model=model, data=data, pipeline=pipeline, budget=budget), f)
    return path


def last_rate(home: str, run: int) -> float | None:
    """Learning rate of the last step as a share of its highest."""
    found = workbench(home, "points", str(run), "lr")
    values = (found or {}).get("value") or []
    return values[-1] / max(values) if values else None


def held(home: str, case: str, minutes: float) -> dict | None:
    """One run under a limit in minutes."""
    result = workbench(home, "run", spec(home, case, minutes=minutes))
    if not result or result.get("status") != "finished":
        return None
    stages = [s for s in result["stages"] if s.get("steps")] or result["stages"]
    return dict(case=case, minutes=minutes, seconds=result["seconds"], ratio=result["seconds"] / (60 * minutes),
                forecast=result["forecast"]["seconds"]["total"], steps=result["footprint"].get("steps"), stages=len(stages),
                final_lr=last_rate(home, result["run"]), evaluated=result["evaluation"]["after"] is not None,
                evaluations=len(result["evaluation"].get("all") or ()) or None)


def told(home: str, case: str, steps: int) -> dict | None:
    """Seconds forecast before and after a probe, beside those of a run in steps."""
    path = spec(home, case, steps=steps)
    before = workbench(home, "plan", path)
    probed = workbench(home, "probe", path)
    result = workbench(home, "run", path)
    if not (before and probed and result and result.get("status") == "finished"):
        return None
    measured, peak = result["seconds"], result["footprint"]["peak_bytes"]
    return dict(case=case, steps=steps, seconds=measured, before=before["seconds"]["total"] / measured,
                after=probed["seconds"]["total"] / measured, probe_seconds=probed.get("probed"), memory_before=before["memory"]["peak_bytes"] / peak,
                memory_after=probed["memory"]["peak_bytes"] / peak, missing="; ".join((probed.get("probe") or {}).get("missing") or []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--skip-limits", action="store_true")
    parser.add_argument("--skip-steps", action="store_true")
    a = parser.parse_args()
    limited, timed = [], []
    with tempfile.TemporaryDirectory() as home:
        workbench(home, "doctor", "--measure")
        for case in a.only or CASES:
            for minutes in () if a.skip_limits else a.minutes:
                if row := held(home, case, minutes):
                    limited.append(row)
                    print(row, flush=True)
            if not a.skip_steps and (row := told(home, case, a.steps)):
                timed.append(row)
                print(row, flush=True)
    common.table("Runs under minutes", limited)
    if limited:
        inside = sum(abs(r["ratio"] - 1) <= 0.05 for r in limited)
        print(f"  {inside} of {len(limited)} within 5 % of the limit; worst {max(abs(r['ratio'] - 1) for r in limited):.1%}")
    common.table("Seconds forecast / measured", timed)
    if timed:
        inside = sum(abs(r["after"] - 1) <= 0.15 for r in timed)
        print(f"  after a probe {inside} of {len(timed)} within 15 %; worst {max(abs(r['after'] - 1) for r in timed):.0%}")
    common.write("minutes", dict(limits=limited, probes=timed))


if __name__ == "__main__":
    main()

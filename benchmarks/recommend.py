"""The recommended pipeline against every single method under the same budget, on stdlib-lm and python-docs.

For each budget, the smallest first: the recommendation is computed while the database holds only runs of smaller budgets (a short
history of a few steps each, then the budgets before); then every method that fits runs alone with the planner's own settings, and so
does the recommended pipeline. Told are quality with interval, rank, and a paired test over the same held-out items.

Run: python -m benchmarks.recommend [--quick] [--home FOLDER] [--budget minutes=0.7 ...] [--methods lora,full,...]
A home that is kept is used again: runs that it has are not repeated, and those of the same or a larger budget are hidden from the
recommendation.
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
from pathlib import Path

from benchmarks import common

MODEL, DATA = "stdlib-lm", "python-docs"
BUDGETS = ("minutes=0.35", "minutes=0.7", "minutes=1.4", "minutes=1,size_mb=4")
HISTORY_STEPS = 30
LEVEL = 0.05


def budget(text: str) -> dict:
    """``minutes=1,size_mb=4`` as a mapping."""
    return {k.strip(): float(v) for k, v in (pair.split("=") for pair in text.split(","))}


def key(spec: dict) -> str:
    return json.dumps({k: spec.get(k) for k in ("model", "data", "pipeline", "budget", "seed")}, sort_keys=True)


class Bench:
    """One home with its runs."""

    def __init__(self, folder: str):
        os.environ["WORKBENCH_HOME"] = folder
        from workbench.home import Home
        self.folder, self.home = Path(folder), Home.open()
        self.runs: dict[str, int] = {}
        for row in self.home.store.runs(status="finished", limit=None):
            self.runs.setdefault(self.mark(row["spec"]), row["id"])

    def mark(self, spec: dict) -> str:
        from workbench.spec import RunSpec
        return key(RunSpec.from_dict(spec).to_dict())

    def run(self, spec: dict) -> int | None:
        """The finished run of ``spec``, made unless this home has it; None: it failed."""
        mark = self.mark(spec)
        if mark not in self.runs:
            path = self.folder / "spec.yaml"
            path.write_text(json.dumps(spec))
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "workbench", "run", str(path), "--json"], capture_output=True, text=True,
                                  env={**os.environ, "WORKBENCH_HOME": str(self.folder)})
            name = " + ".join(s["method"] for s in spec["pipeline"])
            if done.returncode:
                print(f"  {name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", flush=True)
                return None
            self.runs[mark] = int(json.loads(done.stdout)["run"])
            print(f"  {name:<40} {self.value(self.runs[mark]):.4f}  in {time.perf_counter() - began:.0f} s", flush=True)
        return self.runs[mark]

    def has(self, spec: dict) -> bool:
        return self.mark(spec) in self.runs

    def before(self, folder: str, allowed: list[dict]):
        """A home in ``folder`` with the runs of the budgets ``allowed`` only, for an honest recommendation."""
        from workbench.home import Home
        other = Path(folder) / "home"
        other.mkdir()
        self.home.store.backup(other / self.home.db.name)
        found = Home.open(other)
        for row in found.store.runs(limit=None, archived=None):
            if not any(row["spec"].get("budget") == b for b in allowed):
                found.store.delete_run(row["id"])
        return found

    def value(self, run: int) -> float:
        return self.home.store.light(run)["value"]


def singles(limits: dict, wanted) -> list[dict]:
    """Every method alone, levers on ``auto`` where the budget has their limit."""
    from engines import registry
    from engines.budget import Budget
    from workbench import pipelines
    found = []
    for id, cls in registry.methods().items():
        if not wanted or id in wanted:
            stage = next(v for v in pipelines.variants(cls, Budget(**limits)))
            levers = {k: v for k, v in stage.items() if k == "method" or v == "auto"}  # the method's own defaults otherwise
            found.append(dict(model=MODEL, data=DATA, pipeline=[levers], budget=limits, seed=0))
    return found


def fitting(specs: list[dict]) -> tuple[list[dict], list[str]]:
    """Those that the planner lets start, and the names of the others."""
    from engines.errors import InputError
    from workbench import planner
    good, bad = [], []
    for spec in specs:
        try:
            fits = planner.forecast(spec, remedies=False)["fits"]
        except InputError:
            fits = False
        (good if fits else bad).append(spec)
    return good, [s["pipeline"][0]["method"] for s in bad]


def compare(bench: Bench, limits: dict, wanted, allowed: list[dict]) -> dict | None:
    """One budget: recommend from the runs of the budgets ``allowed``, run everything, compare."""
    from workbench import paired, recommend, stats
    with tempfile.TemporaryDirectory() as folder:
        found = recommend.recommend(dict(model=MODEL, data=DATA, budget=limits, seed=0), bench.before(folder, allowed))
    name = ", ".join(f"{k} {v:g}" for k, v in limits.items())
    print(f"\n== {name}", flush=True)
    if not found["rows"]:
        print("  nothing fits: " + "; ".join(c["text"] for c in found["contradictions"]))
        return None
    first = found["rows"][0]
    print(f"  recommended: {first['text']}, expected {first['expected']['value'] or float('nan'):.3f} "
          f"({first['expected']['reason']}); {found['basis']}", flush=True)
    good, bad = fitting(singles(limits, wanted))
    if bad:
        print("  do not fit alone: " + ", ".join(bad))
    chosen = bench.run(first["spec"])
    done = [(s, r) for s in good if (r := bench.run(s)) is not None]
    if chosen is None or not done:
        return None
    rows = []
    for spec, run in done:
        row = bench.home.store.light(run)
        rows.append(dict(pipeline=spec["pipeline"][0]["method"], value=row["value"], low=row["value_low"], high=row["value_high"],
                         seconds=row["seconds"], size_mb=(row["size_bytes"] or 0) / 1e6, run=run))
    row = bench.home.store.light(chosen)
    ours = dict(pipeline="recommended: " + first["text"], value=row["value"], low=row["value_low"], high=row["value_high"], seconds=row["seconds"],
                size_mb=(row["size_bytes"] or 0) / 1e6, run=chosen)
    lower = stats.lower_is_better(row["metric"])
    rows.sort(key=lambda r: r["value"] if lower else -r["value"])
    best, median = rows[0], statistics.median(r["value"] for r in rows)
    better = (lambda a, b: a < b) if lower else (lambda a, b: a > b)
    test = paired.paired(best["run"], chosen, home=bench.home) if best["run"] != chosen else None
    noise = test is None or test["p"] >= LEVEL
    shown = sorted([ours, *(r for r in rows if r["run"] != chosen)], key=lambda r: r["value"] if lower else -r["value"])
    expected = first["expected"]
    verdict = dict(
        rank=1 + sum(better(r["value"], ours["value"]) for r in rows if r["run"] != chosen), of=len(shown), median=median, best=best["pipeline"],
        never_below_median=not better(median, ours["value"]), best_or_noise=noise or better(ours["value"], best["value"]),
        p=test["p"] if test else None, difference=test["difference"] if test else 0.0,
        inside_interval=None if expected["value"] is None else expected["low"] <= ours["value"] <= expected["high"])
    common.table(name, [{k: r[k] for k in ("pipeline", "value", "low", "high", "seconds", "size_mb")} for r in shown])
    print("  " + (test["text"] if test else "The recommended pipeline is the best single method."))
    return dict(budget=limits, recommended=first["text"], expected={k: expected[k] for k in ("value", "low", "high", "source", "near")},
                rows=shown, left_out=bad, **verdict)


def estimate(bench: Bench, budgets: list[dict], history: list[dict], wanted) -> float:
    """Seconds that are still to be run, from the forecasts."""
    from engines.errors import InputError
    from workbench import planner
    total = 0.0
    for spec in [*history, *(s for b in budgets for s in fitting(singles(b, wanted))[0])]:
        if not bench.has(spec):
            try:
                total += planner.forecast(spec, remedies=False)["seconds"]["total"] + 2.0
            except InputError:
                continue
    return total + sum(60 * b.get("minutes", 1) for b in budgets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", action="append", help="such as minutes=0.7 or minutes=1,size_mb=4; repeat, the smallest first")
    parser.add_argument("--methods", help="ids, separated by commas; all of them without it")
    parser.add_argument("--home", help="folder whose runs are used again; a temporary one without it")
    parser.add_argument("--history", type=int, default=HISTORY_STEPS, help="optimizer steps of the runs known beforehand")
    parser.add_argument("--quick", action="store_true", help="one budget, four methods")
    a = parser.parse_args()
    wanted = set(a.methods.split(",")) if a.methods else {"full", "lora", "wanda", "int8"} if a.quick else None
    budgets = [budget(b) for b in a.budget or (("minutes=0.7",) if a.quick else BUDGETS)]
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(a.home or temporary)
        from workbench import machine
        if machine.measured(bench.home.store) is None:
            subprocess.run([sys.executable, "-m", "workbench", "doctor", "--measure"], capture_output=True, env=os.environ)
        history, _ = fitting([{**s, "budget": {"steps": a.history}} for s in singles({}, wanted)])
        seconds = estimate(bench, budgets, history, wanted)
        print(f"About {seconds / 60:.0f} minutes: {len(history)} runs of {a.history} steps as history, then {len(budgets)} budgets.", flush=True)
        for spec in history:
            bench.run(spec)
        known = [{"steps": a.history}]
        results = [r for i, b in enumerate(budgets) if (r := compare(bench, b, wanted, known + budgets[:i]))]
    common.table("Recommended against single methods", [
        dict(budget=", ".join(f"{k} {v:g}" for k, v in r["budget"].items()), recommended=r["recommended"], rank=f"{r['rank']} of {r['of']}",
             best=r["best"], difference=r["difference"], p="same run" if r["p"] is None else f"{r['p']:.2g}",
             at_least_median=r["never_below_median"], best_or_noise=r["best_or_noise"], inside_interval=r["inside_interval"]) for r in results])
    if not results:
        sys.exit("no budget could be compared")
    never, often = all(r["never_below_median"] for r in results), sum(r["best_or_noise"] for r in results)
    print(f"  never worse than the median: {'yes' if never else 'no'}; best or within noise of the best in {often} of {len(results)} budgets")
    if not a.quick:
        common.write("recommend", dict(budgets=results, never_below_median=never, best_or_noise=often))


if __name__ == "__main__":
    main()

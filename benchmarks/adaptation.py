"""Leaderboard of adaptation methods: equal trained parameters, then equal seconds, three seeds, tiers, memory by part.

Every method gets the same small search over learning rates (factors of its own usual rate, judged on one half of the
held-out items) and is told on the other half. Two arenas: stdlib-lm on python-docs, and MiniLM on banking77 at 1 % trained
parameters. Methods without a lever for trained parameters train what they train; the table says how many.

"Equal seconds" gives each method as many steps as fit into the time that LoRA needs for ``--steps``; the step times are taken
first, round-robin, each in a process of its own, which also tells memory. Results are kept line by line, so that a run that was
broken off goes on where it was.

The product shows a copy of the results, assets/leaderboard.json, which is written with them; --publish writes it anew and runs nothing.

Run: python -m benchmarks.adaptation [--arena docs banking] [--only lora,bone] [--keep FOLDER] [--steps 60] [--phase steps weigh seconds]
     [--report] [--publish]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks import common

SEARCH, FURTHER = (0.33, 1.0, 3.0), {3.0: 9.0, 9.0: 27.0, 0.33: 0.11}
"""Factors on each method's usual rate; while the best one lies at an end, the search goes on there."""
ROUNDS = 2
HEAD = 0.05
"""Rate of the new classification head in the second arena, the same for all methods: at a method's own rate the head would decide the order."""
VARIANTS = {"nlora slora": {"method": "nlora", "form": "slora"}, "lora dora": {"method": "lora", "dora": True}, "bone miss": {"method": "bone", "form": "miss"},
            "lamda energy": {"method": "lamda", "ranks": "energy"}}
"""Second forms of a method that its paper names; they take part beside the defaults."""
PUBLISHED = common.RESULTS.parent.parent / "assets" / "leaderboard.json"
NAMES = {"docs": ("stdlib-lm on python-docs", "stdlib-lm", "python-docs"), "banking": ("MiniLM on banking77", "MiniLM-L6", "banking77")}
"""Arena -> its title, model and data as people read them: the second arena's are folders of the machine that ran it."""
OUT = {"hyperfitting": "over-fits on purpose", "kd-lora": "needs a larger teacher, which neither arena has"}


def arenas() -> dict[str, dict]:
    from benchmarks.encoder import encoder
    found = {"docs": dict(model="stdlib-lm", data="python-docs", length=128, batch=4, items=240, precision="bf16", before=(), steps=60)}
    source = common.shared_data("banking77_train.csv")
    try:
        model, _ = encoder(Path())
    except SystemExit as missing:
        print(missing)
        return found
    if source is None:
        print("banking77_train.csv is not at hand: the second arena is left out")
        return found
    return found | {"banking": dict(model=str(model), data=str(source), length=64, batch=16, items=800, precision="fp32", before=(), steps=100, head_lr=HEAD)}


def entrants(only: list[str] | None = None) -> dict[str, dict]:
    """Label -> stage of every registered adaptation method that trains, its lever left to the budget."""
    from engines import registry
    found = {}
    for id, cls in registry.methods().items():
        if cls.card.family != "adaptation" or not cls.card.trains or id in OUT:
            continue
        lever = next((row["name"] for row in cls.hyperparameters() if row["lever"] == "trainable"), None)
        auto = {lever: "auto"} if lever else {}
        found[id] = {"method": id} | auto
        found |= {label: stage | auto for label, stage in VARIANTS.items() if stage["method"] == id}
    return {label: stage for label, stage in found.items() if only is None or label in only}


def arena(where: dict, trainable: float):
    """A bench of the claims whose methods are fitted to a limit on trained parameters."""
    import dataclasses

    from engines.claim import Claim
    from engines.data.tokens import TaskData
    from workbench.claiming import Bench

    class Arena(Bench):
        def method(self, stage):
            from engines import registry
            from engines.budget import Budget
            from engines.errors import InputError
            try:
                method = registry.build(stage)
                method.check(self.profile)
                return method.fit(self.profile, Budget(trainable=trainable if "auto" in stage.values() else None))[0]
            except InputError:
                if "auto" not in stage.values():
                    raise
                # Its smallest form trains more than the limit: it takes part as it is, and the table says how much it trains.
                method = registry.build({k: v for k, v in stage.items() if v != "auto"})
                return method.fit(self.profile, Budget())[0]

    usual = dataclasses.asdict(Claim("arena", "Any.", ours={"method": "lora"}, against={"method": "lora"}))
    found = Arena(usual | where | {"rates": SEARCH})
    found.data = TaskData(found.data.table, found.tokenizer, length=where["length"], seed=0, items=where["items"])
    return found


def budget_of(name: str, where: dict) -> float:
    """LoRA of rank 8 on the language model, one per cent on the encoder."""
    if name != "docs":
        return 0.01
    from engines import models, registry
    from engines.models.folder import read_folder
    from engines.profile import Batch
    return registry.build({"method": "lora", "rank": 8}).footprint(read_folder(models.locate(where["model"])), Batch()).trainable


class Kept:
    """Lines of JSON; each key once."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            if "error" not in row:  # what failed is tried again
                self.rows[row["key"]] = row

    def take(self, key: str, work):
        if key not in self.rows:
            began = time.perf_counter()
            try:
                row = work()
            except Exception as e:  # one method that fails must not end the others; the table tells it
                row = {"error": f"{type(e).__name__}: {e}"[:300]}
            row = {"key": key, **row, "took": round(time.perf_counter() - began, 2)}
            if "error" in row:
                print(f"  {key}: {row['error']}", flush=True)
            with open(self.path, "a") as f:
                f.write(json.dumps(row, default=lambda v: v.tolist()) + "\n")
            self.rows[key] = row
        return self.rows[key]


def weigh(where: dict, stage: dict, trainable: float) -> dict:
    """Peak above the loaded model, its parts and the step time, in a process of its own."""
    code = ("import json, sys\nfrom benchmarks import adaptation\n"
            "print(json.dumps(adaptation.peak(*json.loads(sys.stdin.read()))))")
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps([where, stage, trainable]), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak(where: dict, stage: dict, trainable: float, steps: int = 62) -> dict:
    import threading

    import psutil
    import torch

    from engines.kernels import fast_float32
    with fast_float32():
        bench, me = arena(where, trainable), psutil.Process()
        start, top, done = me.memory_info().rss, [0], threading.Event()

        def watch():
            while not done.wait(0.002):
                top[0] = max(top[0], me.memory_info().rss)
        threading.Thread(target=watch, daemon=True).start()
        found = bench.train(stage, bench.usual_rate(stage), 0, steps, score=False)
        done.set()
    return dict(peak=top[0] - start, threads=torch.get_num_threads(), seconds=found["mean"],
                **{k: found[k] for k in ("gradients", "optimizer", "trainable")})  # the mean: some methods do more now and then


def compete(name: str, where: dict, stages: dict, kept: Kept, args) -> None:
    """All trainings of one arena: search and seeds; step time and memory; the seeds again at equal seconds."""
    trainable, bench = budget_of(name, where), None
    run = lambda s, r, seed, steps: {"rate": r, "steps": steps, **bench.train(s, r, seed, steps)}  # noqa: E731
    if {"steps", "seconds"} & set(args.phase):
        bench = arena(where, trainable)
    best = {}
    for label, stage in stages.items() if bench else ():
        began, usual = time.perf_counter(), {}

        def rate(factor, stage=stage, usual=usual):
            usual.setdefault("rate", bench.usual_rate(stage))
            return usual["rate"] * factor
        work = lambda f, s=stage, rate=rate: run(s, rate(f), 0, args.steps)  # noqa: E731
        found = {f: kept.take(f"{name}|{label}|search|{f}|{args.steps}", lambda f=f, w=work: w(f)) for f in SEARCH}
        while (f := factor_of(found)) in FURTHER and FURTHER[f] not in found:
            found[FURTHER[f]] = kept.take(f"{name}|{label}|search|{FURTHER[f]}|{args.steps}", lambda f=FURTHER[f], w=work: w(f))
        best[label] = chosen(found)
        if best[label] is None or "steps" not in args.phase:
            continue
        for seed in range(1, args.seeds):
            kept.take(f"{name}|{label}|steps|{seed}|{args.steps}|{best[label]['rate']:.3g}",
                      lambda s=stage, l=label, seed=seed: run(s, best[l]["rate"], seed, args.steps))
        print(f"  {name} {label}: {time.perf_counter() - began:.0f} s", flush=True)
    for i in range(ROUNDS if "weigh" in args.phase else 0):
        for label, stage in stages.items():
            kept.take(f"{name}|{label}|weigh|{i}", lambda s=stage: weigh(where, s, trainable))
    usual = step_time(kept, name, "lora")
    for label, stage in stages.items() if "seconds" in args.phase and usual else ():
        own = step_time(kept, name, label)
        if own is None or best[label] is None:
            continue
        steps = max(4, round(args.steps * usual / own))
        for seed in range(args.seeds):
            kept.take(f"{name}|{label}|seconds|{seed}|{steps}|{best[label]['rate']:.3g}",
                      lambda s=stage, l=label, seed=seed, n=steps: run(s, best[l]["rate"], seed, n))
        print(f"  {name} {label}: {steps} steps in LoRA's time", flush=True)


def step_time(kept: Kept, name: str, label: str) -> float | None:
    import statistics
    found = [kept.rows.get(f"{name}|{label}|weigh|{i}", {}).get("seconds") for i in range(ROUNDS)]
    return statistics.median([s for s in found if s]) if any(found) else None


def chosen(found: dict) -> dict | None:
    """The best rate on the even items; its training is also the first seed's."""
    import numpy as np

    from workbench.claim_search import tuned
    able = [r | {"scores": np.asarray(r["scores"], float), "weights": None if r["weights"] is None else np.asarray(r["weights"], float)}
            for r in found.values() if "error" not in r]
    able = [r for r in able if np.isfinite(r["scores"]).all()]
    return min(able, key=tuned) if able else None


def factor_of(found: dict) -> float | None:
    """The factor of the best rate so far."""
    best = chosen(found)
    return None if best is None else next(f for f, r in found.items() if r.get("rate") == best["rate"])


def searched(name: str, label: str, kept: Kept, steps: int) -> dict:
    """What the search has found so far: factor -> training."""
    factors = sorted({*SEARCH, *FURTHER.values()})
    return {f: kept.rows[k] for f in factors if (k := f"{name}|{label}|search|{f}|{steps}") in kept.rows}


def report(name: str, kept: Kept, stages: dict, args) -> list[dict]:
    """Rows of the leaderboard, best first at equal trained parameters; told on the odd items."""
    import numpy as np

    from workbench import stats
    rows, matrices, weights = [], {"steps": [], "seconds": []}, None
    for label in stages:
        first = chosen(searched(name, label, kept, args.steps))
        if first is None:
            continue
        usual, own = step_time(kept, name, "lora"), step_time(kept, name, label)
        in_time = max(4, round(args.steps * usual / own)) if usual and own else 0
        weighed = [r for i in range(ROUNDS) if "error" not in (r := kept.rows.get(f"{name}|{label}|weigh|{i}", {"error": ""}))]
        rate = f"{first['rate']:.3g}"
        sides = {"steps": [first] + [kept.rows.get(f"{name}|{label}|steps|{s}|{args.steps}|{rate}") for s in range(1, args.seeds)],
                 "seconds": [kept.rows.get(f"{name}|{label}|seconds|{s}|{in_time}|{rate}") for s in range(args.seeds)]}
        whole = {side: trained for side, trained in sides.items() if all(r is not None and "error" not in r for r in trained)}
        if "steps" not in whole:
            continue
        row = {"method": label, "trainable": first["trainable"], "rate": first["rate"], "metric": first["metric"], "seconds a step": own,
               "peak": min((r["peak"] for r in weighed), default=None), "gradients": first["gradients"], "optimizer": first["optimizer"]}
        weights = None if first["weights"] is None else np.asarray(first["weights"], float)[1::2]
        for side, trained in whole.items():
            scores = np.stack([np.asarray(r["scores"], float)[1::2] for r in trained])
            by_seed = [stats.value(s, weights) for s in scores]
            matrices[side].append((row, scores.mean(axis=0)))
            row |= {side: stats.value(scores.mean(axis=0), weights), f"{side} from": min(by_seed), f"{side} to": max(by_seed), f"{side} n": trained[0]["steps"]}
        rows.append(row)
    for side, found in matrices.items():
        if len(found) > 1:
            told = stats.tiers(np.stack([s for _, s in found]), weights, lower=rows[0]["metric"] == "bits/byte")
            for i, (row, _) in enumerate(found):
                row[f"{side} tier"] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[min(told["tier"][i], 25)]
    failed = [{"method": k.split("|")[1], "error": r["error"]} for k, r in kept.rows.items() if k.startswith(f"{name}|") and "error" in r]
    lower = bool(rows) and rows[0]["metric"] == "bits/byte"
    return sorted(rows, key=lambda r: r["steps"] if lower else -r["steps"]) + failed


def publish() -> None:
    """The product's copy of the results: each row with its stage, each arena with its setting, its date and its machine."""
    results = json.loads((common.RESULTS / "adaptation.json").read_text())
    before = json.loads(PUBLISHED.read_text())["arenas"] if PUBLISHED.exists() else {}
    stages, here, found = entrants(), arenas(), {}
    measured = lambda rows: [{k: v for k, v in row.items() if k != "stage"} for row in rows]  # noqa: E731
    for name, rows in results["arenas"].items():
        rows = [row | {"stage": stages[row["method"]]} if row["method"] in stages else row for row in rows]
        old = before.get(name, {})
        if name not in here and not old:
            print(f"{name} is not published: what it runs on is not at hand")
            continue
        # An arena that did not run again keeps its day and its machine.
        when = old if measured(old.get("rows", [])) == measured(rows) else results
        found[name] = dict(title=NAMES[name][0], setting=setting(name, here[name], rows, results["seeds"]) if name in here else old["setting"],
                           date=when["date"], machine=when["machine"], rows=rows)
    PUBLISHED.write_text(json.dumps(dict(name="leaderboard", date=results["date"], machine=results["machine"], seeds=results["seeds"],
                                         left_out=results["left_out"], arenas=found), indent=1) + "\n")
    print(f"  published in {PUBLISHED.relative_to(PUBLISHED.parent.parent)}")


def setting(name: str, where: dict, rows: list[dict], seeds: int) -> dict:
    """What all rows of an arena share."""
    steps = next((row["steps n"] for row in rows if "steps n" in row), where["steps"])
    return dict(model=NAMES[name][1], data=NAMES[name][2], steps=steps, batch=where["batch"], length=where["length"], precision=where["precision"],
                items=where["items"] // 2, seeds=seeds, head_lr=where.get("head_lr", 0.0), trainable=budget_of(name, where))


def tell(name: str, rows: list[dict]) -> None:
    """The table as Markdown; what was not measured is left empty."""
    whole = [r for r in rows if "error" not in r]
    if not whole:
        return
    k, unit = (1, "bits/byte") if whole[0]["metric"] == "bits/byte" else (100, "accuracy, %")
    pace = next((r["seconds a step"] for r in whole if r["method"] == "lora"), None)
    put = lambda form, value, scale=1.0: "" if value is None else format(value * scale, form)  # noqa: E731
    print(f"\n### {name}: {unit}\n\n| method | tier | equal steps | seeds | trained | rate | tier | equal seconds | steps in them | s/step (LoRA = 1) | peak, MB | gradients | "
          "optimizer |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in whole:
        cells = [r["method"], r.get("steps tier", ""), put(".4g", r["steps"], k), f"{k * r['steps from']:.4g} to {k * r['steps to']:.4g}", f"{r['trainable']:,}",
                 put(".2g", r["rate"]), r.get("seconds tier", ""), put(".4g", r.get("seconds"), k), put(".0f", r.get("seconds n")),
                 put(".2f", r["seconds a step"] and pace and r["seconds a step"] / pace), put(".0f", r["peak"], 1e-6), put(".2f", r["gradients"], 1e-6),
                 put(".2f", r["optimizer"], 1e-6)]
        print("| " + " | ".join(cells) + " |")
    for r in rows:
        if "error" in r:
            print(f"\n{r['method']}: {r['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arena", nargs="*", default=["docs", "banking"])
    parser.add_argument("--only", help="labels, separated by commas")
    parser.add_argument("--keep", type=Path, help="folder of results so far; the run goes on from them")
    parser.add_argument("--steps", type=int, help="instead of the arena's own 60 and 100")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--phase", nargs="*", default=["steps", "weigh", "seconds"], choices=["steps", "weigh", "seconds"],
                        help="weigh alone needs a quiet machine")
    parser.add_argument("--report", action="store_true", help="only tell what is kept")
    parser.add_argument("--publish", action="store_true", help="only write the product's copy of the results anew")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.publish:
        return publish()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="fettle-adaptation-"))
    folder.mkdir(parents=True, exist_ok=True)
    stages, found, asked = entrants(args.only.split(",") if args.only else None), {}, args.steps
    from engines.kernels import fast_float32
    for name, where in arenas().items():
        if name not in args.arena:
            continue
        kept, args.steps = Kept(folder / "adaptation.jsonl"), asked or where["steps"]
        if not args.report:
            with fast_float32():
                compete(name, where, stages, kept, args)
        found[name] = report(name, kept, stages, args)
        tell(name, found[name])
    if not args.only:
        # An arena that did not take part this time stays as it was.
        before = json.loads((common.RESULTS / "adaptation.json").read_text()) if (common.RESULTS / "adaptation.json").exists() else {"arenas": {}}
        common.write("adaptation", dict(seeds=args.seeds, left_out=OUT, arenas=before["arenas"] | found))
        publish()


if __name__ == "__main__":
    main()

"""Carries out the experiment of one claim in a process of its own: JSON on stdin, one JSON object on stdout.

Both sides are trained on the same batches from the same start for the same number of steps. The learning rate of each is chosen
among the same factors of its usual rate on one half of the held-out items; figures are told of the other half.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time

import numpy as np

from engines.claim import steps_taken
from workbench.claim_merging import merging
from workbench.claim_search import best, further, ratio
from workbench.claim_trainings import Trainings


class Bench:
    """The model, the data and the two sides of a claim."""

    def __init__(self, claim: dict, trainings: str | None = None):
        from engines import data as datasets
        from engines import models
        from engines.data.tokens import TaskData
        from engines.models.folder import read_folder
        from engines.profile import task_of
        self.claim, self.trainings = claim, Trainings(trainings)
        where = models.locate(claim["model"])
        task = task_of(read_folder(where).config)
        table = datasets.load(claim["data"], task=task)
        if table.task != task:
            task = table.task
        labels = table.labels if task != "causal-lm" else None
        loaded = models.load(claim["model"], task, labels=labels, dtype="float32")
        self.model, self.tokenizer, self.task, self.profile = loaded.model, loaded.tokenizer, task, loaded.profile
        if claim["shape"]:
            import torch
            torch.manual_seed(0)
            self.model = type(self.model)(type(self.model.config)(**{**self.model.config.to_dict(), **claim["shape"]})).eval()
            self.profile = models.profile_of(self.model, claim["model"], task)
        self.data = TaskData(table, loaded.tokenizer, length=claim["length"], seed=0, items=8 if claim["shape"] else 240)
        self.other = None
        if claim["elsewhere"]:
            self.other = TaskData(datasets.load(claim["elsewhere"], task=task), loaded.tokenizer, length=claim["length"], seed=0, items=240)
        self.masks: dict = {}
        for stage in claim["before"]:
            method, context = self.method(stage), self.context(0)
            context.masks = self.masks
            self.model = method.finish(method.apply(self.model, context), context)

    def method(self, stage: dict):
        from engines import registry
        from engines.budget import Budget
        method = registry.build({k: v for k, v in stage.items() if k != "training"})
        method.check(self.profile)
        return method.fit(self.profile, Budget())[0]

    def context(self, seed: int):
        from engines.context import Context
        from engines.reporter import Recorder
        found = Context(task=self.task, data=self.data, tokenizer=self.tokenizer, profile=self.profile, reporter=Recorder(), seed=seed,
                        compute="bfloat16" if self.claim["precision"] == "bf16" else "float32")
        found.masks = dict(self.masks)
        return found

    def scored(self, stage: dict, rate: float, seed: int) -> dict:
        """``train``, or a training of the same kind that an earlier claim has kept."""
        import torch

        from engines import models
        from workbench.claim_trainings import stamp
        used = ("model", "data", "steps", "batch", "length", "precision", "head_lr", "before", "elsewhere", "shape")
        files = [stamp(models.locate(self.claim["model"])), stamp(self.claim["data"]), stamp(self.claim["elsewhere"])]
        what = {k: self.claim[k] for k in used} | {"stage": self.method(stage).settings(), "training": stage.get("training", {}), "rate": rate, "seed": seed}
        what |= {"files": files, "python": sys.version, "torch": torch.__version__, "threads": torch.get_num_threads()}
        return self.trainings.take(what, lambda: self.train(stage, rate, seed))

    def train(self, stage: dict, rate: float, seed: int, steps: int | None = None, score: bool = True) -> dict:
        """One training and one evaluation: scores and weights per item, seconds a step, parts of memory.

        Without ``score`` nothing is evaluated and the bench's own model is used up: no second copy of it disturbs the memory.
        """
        import torch

        from engines.training.loop import Limit, Trainer
        from engines.training.settings import TrainSettings
        claim, method, context = self.claim, self.method(stage), self.context(seed)
        steps = steps or claim["steps"]
        settings = TrainSettings(lr=rate, head_lr=claim["head_lr"], batch=claim["batch"], length=self.data.length, precision=claim["precision"], evaluations=1,
                                 warmup=0.1, weight_decay=0.0, switches=_switches(stage))
        self.data.seed = seed
        for name in ("_order", "_pass"):
            self.data.__dict__.pop(name, None)
        context.total_steps = steps
        torch.manual_seed(seed * 1009)
        model = method.apply(copy.deepcopy(self.model) if score else self.__dict__.pop("model"), context)
        trainer = Trainer(model, method, context, settings, Limit(steps=steps))
        times, live, before = [], [0], time.perf_counter
        step, update = trainer._step, trainer.optimizer.step

        def timed():
            t = before()
            step()
            times.append(before() - t)

        def weighed(*given, **named):
            live.append(sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None))
            return update(*given, **named)
        trainer._step, trainer.optimizer.step = timed, weighed
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        _steps(trainer)
        # Gradients that are alive when the step is taken; an optimizer that took them during the backward pass tells its own.
        gradients = max(live) + getattr(trainer.optimizer, "gradient_bytes", 0)
        optimizer = sum(v.numel() * v.element_size() for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        parts = dict(seconds=statistics.median(times[2:] or times), mean=statistics.fmean(times[2:] or times), duration=sum(times), steps=len(times),
                     gradients=gradients, optimizer=optimizer, weights=weights,
                     trainable=max(trainable, sum(p.numel() for p in model.parameters() if p.requires_grad)))
        if not score:
            return parts
        self.last = model = method.finish(model, context).eval()
        found = self.score(model, self.data)
        if self.other is not None:
            found |= {f"other {k}": v for k, v in self.score(model, self.other).items()}
        return parts | found

    def score(self, model, data) -> dict:
        """Scores per item in the units of the metric, their weights, the metric's name."""
        from engines.evaluation import evaluate
        found = evaluate(model, data, precision=self.claim["precision"])
        unit = found.scores / np.log(2) if found.metric == "bits/byte" else found.scores
        return dict(scores=unit.astype(np.float64), weights=found.weights, metric=found.metric)

    def usual_rate(self, stage: dict) -> float:
        """What the planner would take for this stage on this model."""
        from workbench.levers import usual_rate
        return usual_rate([self.method(stage)], self.profile, self.task)[0]


def _switches(stage: dict) -> tuple:
    from engines import registry
    return tuple(registry.switch(s) for s in stage.get("training", {}).get("switches", ()))


def _steps(trainer) -> None:
    """The loop's steps alone: evaluations on the way and checkpoints are no part of the experiment."""
    while not trainer._over():
        trainer.context.progress = trainer.progress()
        trainer.context.total_steps = trainer.limit.steps
        trainer.model.train()
        trainer._step()
    trainer.context.progress = 1.0
    trainer.model.eval()


def quality(bench: Bench, seeds: int) -> dict:
    """Scores of both sides: [seeds, items] of the half that was not used to choose the rate; for forgetting of all items of the other data."""
    claim, out = bench.claim, {}
    for side in ("ours", "against"):
        usual, found = bench.usual_rate(claim[side]), {}
        for factor in claim["rates"]:
            found[usual * factor] = bench.scored(claim[side], usual * factor, 0)
        while (following := further(found, len(claim["rates"]))) is not None:
            found[following] = bench.scored(claim[side], following, 0)
        rate = best(found)
        rows = [found[rate]] + [bench.scored(claim[side], rate, s) for s in range(1, seeds)]
        half = lambda values: None if values is None else values[1::2]  # noqa: E731
        out[side] = dict(rate=rate, searched=sorted(found), trainable=rows[0]["trainable"])
        if not any(r["kept"] for r in rows):
            out[side]["seconds"] = statistics.median(r["seconds"] for r in rows)
        if bench.other is None:
            out[side] |= dict(scores=np.stack([half(r["scores"]) for r in rows]), weights=half(rows[0]["weights"]), metric=rows[0]["metric"])
        else:
            learned = statistics.fmean(ratio(half(r["scores"]), half(r["weights"])) for r in rows)
            out[side] |= dict(scores=np.stack([r["other scores"] for r in rows]), weights=rows[0]["other weights"],
                              metric=rows[0]["other metric"], learned=learned)
        out[side]["reused"] = bench.trainings.reused
    return out


def figures(bench: Bench, seeds: int) -> dict:
    """Seconds, optimizer bytes, trained parameters and figures of decoding of both sides, taken in turn so that a busy machine hurts both alike."""
    claim = bench.claim
    rows: dict = {"ours": [], "against": []}
    decoded, steps = claim["measure"] in ("repetition", "entropy"), steps_taken(claim["measure"], claim["steps"])
    for seed in range(seeds):
        for side in rows:
            row = bench.train(claim[side], bench.usual_rate(claim[side]), seed, steps)
            if decoded:
                from engines.decoding import measure
                row |= measure(bench.last, bench.data).as_dict()
            rows[side].append(row)
    keys = ("seconds", "duration", "optimizer", "gradients", "trainable", *((claim["measure"],) if decoded else ()))
    return {side: {key: [r[key] for r in found] for key in keys} for side, found in rows.items()}


def peak(claim: dict, side: str) -> dict:
    """Peak resident bytes of training one side above the loaded model, in this process and nothing else."""
    import threading

    import psutil
    bench, me = Bench(claim), psutil.Process()
    start, top, done = me.memory_info().rss, 0, threading.Event()

    def watch():
        nonlocal top
        while not done.wait(0.002):
            top = max(top, me.memory_info().rss)
    threading.Thread(target=watch, daemon=True).start()
    found = bench.train(claim[side], bench.usual_rate(claim[side]), 0, steps_taken("memory", claim["steps"]), score=False)
    done.set()
    return dict(peak=top - start, **{k: found[k] for k in ("gradients", "optimizer", "trainable", "seconds")})


def main() -> int:
    asked = json.loads(sys.stdin.read())
    import torch

    from engines.kernels import fast_float32
    torch.set_num_threads(asked["threads"])
    with fast_float32():
        if asked["what"] == "peak":
            out = peak(asked["claim"], asked["side"])
        else:
            bench = Bench(asked["claim"], asked.get("trainings"))
            act = {"merging": merging, "quality": quality, "forgetting": quality}.get(asked["what"], figures)
            out = act(bench, asked["seeds"])
    print(json.dumps(out, default=lambda a: a.tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

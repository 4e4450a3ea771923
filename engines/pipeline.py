"""A whole run: load, evaluate the base, the stages in order, save, evaluate what was saved.

The clock of a limit in minutes lives here: each training stage gets what is left after the stages, the
evaluations and the save that still have to come.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from engines import data as datasets
from engines import models
from engines.context import Context
from engines.errors import FettleError, InputError, RunFailed, StopRequested
from engines.evaluation import Evaluation, evaluate
from engines.kernels import fast_float32
from engines.lazy import torch
from engines.profile import read_folder, task_of, working_dtype

SPEED = 0.8
"""Seconds that the timing of the result takes (``engines.speed``)."""


@dataclass
class Outcome:
    """What a run came to. ``status``: finished or stopped (a pause leaves by ``StopRequested``)."""

    status: str
    folder: Path
    base: Evaluation
    result: Evaluation
    stages: list[dict] = field(default_factory=list)
    measured: dict = field(default_factory=dict)
    """trainable, parameters, weight_bytes, disk_bytes, sparsity, bits_per_weight, speed, seconds by clock."""


class Run:
    """State of a run while it goes through its stages; ``run_pipeline`` is the entry."""

    def __init__(self, spec, reporter, folder: Path, device: str, estimates: dict | None):
        self.spec, self.reporter, self.folder, self.device = spec, reporter, Path(folder), device
        self.estimates = estimates or {}
        self.began = time.perf_counter()
        self.clocks: dict[str, float] = {}
        self.base_step = self.base_tokens = 0
        self.masks: dict = {}
        self.trainable = 0
        self.sparsity: float | None = None
        self.stages: list[dict] = []
        self.eval_seconds = 1.0

    # -- clocks ------------------------------------------------------------------------------------------
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def phase(self, name: str) -> float:
        self.reporter.phase(name)
        return time.perf_counter()

    def clock(self, name: str, since: float) -> float:
        seconds = time.perf_counter() - since
        self.clocks[name] = self.clocks.get(name, 0.0) + seconds
        return seconds

    # -- parts -------------------------------------------------------------------------------------------
    def load(self, source: str | Path | None = None) -> None:
        """Data first (its labels decide the head), then the model; ``source`` overrides it on a resume."""
        spec, t0 = self.spec, self.phase("load")
        first = spec.pipeline[0] if spec.pipeline else None
        scratch = bool(getattr(first, "from_scratch", False)) and source is None
        where = models.locate(spec.model)
        config = read_folder(where).config if isinstance(where, Path) else models._hub_config(where)
        task = spec.task if spec.task != "auto" else task_of(config)
        d = spec.data
        table = datasets.load(d.source, task=task, text=d.text, label=d.label, split=d.split, limit=d.limit)
        self.clock("data", t0)
        t0 = time.perf_counter()
        labels = table.labels if task != "causal-lm" else None
        stored = read_folder(where) if isinstance(where, Path) else None
        self.stored_dtype = stored.dtype if stored else str(config.get("dtype") or config.get("torch_dtype") or "float32")
        dtype = working_dtype(stored) if stored else "float32"
        self.loaded = models.load(source or spec.model, task, labels=labels, dtype=dtype, device=self.device, from_scratch=scratch, seed=spec.seed)
        self.model, self.task = self.loaded.model, task
        self.clock("load", t0)
        t0 = time.perf_counter()
        from engines.data.tokens import TaskData
        self.data = TaskData(table, self.loaded.tokenizer, length=self.settings.length, seed=spec.seed, items=self.settings.items)
        self.clock("tokenize", t0)
        for warning in table.warnings:
            self.reporter.event("warning", warning)
        self.reporter.log(f"load     {spec.model}: {self.loaded.profile.parameters:,} parameters as {dtype}")
        self.reporter.log(f"data     {d.source}: {self.data.train_tokens:,} {'tokens' if task == 'causal-lm' else 'examples'} a pass, "
                          f"{len(self.data.items)} items held out")

    @property
    def settings(self):
        from engines.training.settings import TrainSettings
        t = self.spec.training
        known = TrainSettings.__dataclass_fields__
        values = {name: getattr(t, name) for name in known if getattr(t, name, None) is not None}
        for name, value in values.items():
            if value == "auto":
                raise InputError(f"training.{name}", "auto", "the planner has not resolved it", "Resolve the spec before it is run")
        return TrainSettings(**values)

    def score(self, name: str, stage: int) -> Evaluation:
        t0 = self.phase("evaluate")
        result = evaluate(self.model, self.data, device=self.device, precision=self.settings.precision, loss_chunk=self.settings.loss_chunk)
        self.eval_seconds = result.seconds
        result.extra["step"] = self.base_step
        self.reporter.evaluation(name, stage, result)
        self.reporter.points(self.base_step, {"loss_eval": result.extra["loss"], "metric": result.value})
        self.reporter.log(f"evaluate {name}: {result.value:.4f} [{result.low:.4f}, {result.high:.4f}] {result.metric}, n = {result.n}, {result.seconds:.2f} s")
        self.clock("evaluate", t0)
        return result

    def context(self, index: int) -> Context:
        return Context(task=self.task, data=self.data, tokenizer=self.loaded.tokenizer,
                       profile=models.profile_of(self.model, self.spec.model, self.task), reporter=self.reporter, budget=self.spec.budget,
                       device=self.device, compute="bfloat16" if self.settings.precision == "bf16" else "float32", seed=self.spec.seed,
                       stage=index, folder=self.folder, masks=self.masks)

    def limit(self, index: int):
        """What training stage ``index`` may use of what is left of the budget."""
        from engines.training.loop import Limit
        spec, pipeline = self.spec, self.spec.pipeline
        left = [i for i in range(index, len(pipeline)) if pipeline[i].card.trains]
        budget, steps, seconds = spec.budget, None, None
        per_step = self.settings.batch * (self.data.length if self.task == "causal-lm" else 1)
        total = budget.steps or (-(-budget.tokens // per_step) if budget.tokens else None)
        if total is not None:
            steps = max(1, (total - self.base_step) // len(left))
        after = sum(self.estimates.get(i, 2 * self.eval_seconds) + self.eval_seconds for i in range(index + 1, len(pipeline)) if i not in left)
        # The save, the load of what was saved, the last evaluation and the timing are part of the minutes.
        after += self.eval_seconds + self.estimates.get("save", 1.0) + SPEED
        others = 0.0
        if budget.minutes is not None:
            seconds = max(1.0, (budget.minutes * 60 - self.elapsed() - after) / len(left))
            others = seconds * (len(left) - 1)
        if steps is None and seconds is None:
            steps = max(20, -(-self.data.rows // self.settings.batch))
        return Limit(steps, seconds, after + others)

    def stage(self, index: int, resume: Path | None) -> str:
        """Run one stage; return ``finished`` or ``stopped``."""
        method = self.spec.pipeline[index]
        name = f"{index + 1} {method.card.id}"
        t0 = self.phase(name)
        context = self.context(index)
        context.resuming = resume is not None
        if resume is None:
            self.reporter.event("stage", f"Stage {index + 1}, {method.card.name}, began", stage=index, method=method.card.id)
        torch.manual_seed(self.spec.seed * 1009 + index)
        if method.card.packs:
            # Afterwards small weights that were rounded to zero could not be told from pruned ones.
            self.sparsity = _sparsity(self.model)
        self.model = method.apply(self.model, context)
        status, evaluation, steps = "finished", None, 0
        if method.card.trains:
            from engines.training.loop import train
            result = train(self.model, method, context, self.settings, self.limit(index), resume=resume, base_step=self.base_step,
                           base_tokens=self.base_tokens, first_evaluation=self.eval_seconds)
            status, evaluation, steps = result.status, result.evaluation, result.steps
            self.base_step, self.base_tokens = self.base_step + result.steps, self.base_tokens + result.tokens
            self.trainable = max(self.trainable, sum(p.numel() for p in self.model.parameters() if p.requires_grad))
        figures = method.layers(self.model, context)
        self.phase(name)
        self.model = method.finish(self.model, context)
        self.model.eval()
        figures = method.layers(self.model, context) or figures
        if figures:
            self.reporter.layers(self.base_step, figures)
        for p in self.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        seconds = self.clock(name, t0)
        if not method.card.trains:
            evaluation = self.score("stage", index)
        else:
            self.reporter.evaluation("stage", index, evaluation)
        row = dict(index=index, method=method.card.id, settings=method.settings(), seconds=seconds, steps=steps, metric=evaluation.metric,
                   value=evaluation.value, low=evaluation.low, high=evaluation.high)
        self.stages.append(row)
        self.reporter.event("stage", f"Stage {index + 1}, {method.card.name}, ended: {evaluation.value:.4g} {evaluation.metric}",
                            **{k: v for k, v in row.items() if k != "settings"}, stage=index)
        return status

    # -- resume ------------------------------------------------------------------------------------------
    def keep(self, index: int, base: Evaluation) -> None:
        """Write what is needed to begin stage ``index`` again: the model as it enters it, masks, clocks."""
        folder = self.folder / f"stage-{index}"
        if index > 0:
            models.save(self.model, self.loaded.tokenizer, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        if self.masks:
            from safetensors.torch import save_file
            save_file({k: v.cpu().contiguous() for k, v in self.masks.items()}, folder / "masks.safetensors")
        facts = dict(index=index, elapsed=self.elapsed(), base_step=self.base_step, base_tokens=self.base_tokens, stages=self.stages,
                     clocks=self.clocks, eval_seconds=self.eval_seconds, trainable=self.trainable, base=_plain(base))
        temporary = self.folder / "pipeline.json.new"
        temporary.write_text(json.dumps(facts))
        temporary.replace(self.folder / "pipeline.json")

    def reopen(self) -> tuple[int, Path | None, Evaluation]:
        """Load the model of the stage that was interrupted; (stage, checkpoint or None, base evaluation)."""
        from engines.training import checkpoint
        facts = json.loads((self.folder / "pipeline.json").read_text())
        index = facts["index"]
        self.load(self.folder / f"stage-{index}" if index > 0 else None)
        masks = self.folder / f"stage-{index}" / "masks.safetensors"
        if masks.is_file():
            from safetensors.torch import load_file
            self.masks.update(load_file(masks, device=self.device))
        self.base_step, self.base_tokens, self.stages = facts["base_step"], facts["base_tokens"], facts["stages"]
        self.clocks, self.eval_seconds, self.trainable = facts["clocks"], facts["eval_seconds"], facts["trainable"]
        found = checkpoint.latest(self.folder / "checkpoints")
        spent = facts["elapsed"]
        if found is not None:
            saved = checkpoint.facts(found)
            if saved["stage"] == index:
                spent += saved["used"]
            else:
                found = None
        self.began = time.perf_counter() - spent
        return index, found, _evaluation(facts["base"])


def _plain(e: Evaluation) -> dict:
    return dict(metric=e.metric, value=e.value, low=e.low, high=e.high, n=e.n, items_hash=e.items_hash, seconds=e.seconds, extra=e.extra)


def _evaluation(d: dict) -> Evaluation:
    return Evaluation(**d, scores=None, weights=None)


def can_resume(folder: Path) -> bool:
    """True when a run's folder holds enough to go on."""
    return (Path(folder) / "pipeline.json").is_file()


def run_pipeline(spec, *, reporter, folder: Path, device: str = "cpu", resume: bool = False, estimates: dict | None = None) -> Outcome:
    """Execute a resolved spec.

    Args:
        spec: has ``model, data, pipeline, budget, training, task, seed`` as ``workbench.spec.RunSpec``, nothing ``auto``.
        folder: the run's folder; the result goes to ``folder/model``.
        resume: go on from the last checkpoint (or from the beginning of the interrupted stage).
        estimates: forecast seconds of training-free stages by index, and of ``"save"``.

    Raises:
        InputError: the model, the data and the stages do not fit together.
        RunFailed: it cannot go on; cause and remedy.
        StopRequested: paused, after a checkpoint.
    """
    with fast_float32() as path:
        reporter.log(f"kernels  float32 products: {path}, {torch.get_num_threads()} threads")
        return _execute(spec, reporter, Path(folder), device, resume, estimates)


def _execute(spec, reporter, folder: Path, device: str, resume: bool, estimates: dict | None) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(spec, reporter, folder, device, estimates)
    start, found = 0, None
    if resume and can_resume(folder):
        start, found, base = run.reopen()
        at = f"step {run.base_step + _step_of(found):,}" if found else f"the beginning of stage {start + 1}"
        reporter.event("resume", f"Resumed from {at}", step=run.base_step + _step_of(found))
    else:
        # What an earlier attempt left must not be taken for this one's.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "pipeline.json").unlink(missing_ok=True)
        run.load()
        for method in spec.pipeline:
            method.check(run.loaded.profile)
        base = run.score("base", -1)
    status = "finished"
    for index in range(start, len(spec.pipeline)):
        if not (index == start and found):
            run.keep(index, base)
        status = run.stage(index, found if index == start else None)
        if status != "finished":
            break
        if index + 1 < len(spec.pipeline):
            want = reporter.wants()
            if want == "pause":
                run.keep(index + 1, base)
                raise StopRequested("pause")
            if want == "memory":
                raise RunFailed(f"stage {index + 1}, {spec.pipeline[index].card.name}, passed the memory limit",
                                "Raise budget.memory_gb, or choose fewer calibration sequences or a smaller model")
            if want is not None:
                status = "stopped"
                break
    return finish(run, base, status)


def _step_of(found: Path | None) -> int:
    from engines.training import checkpoint
    return checkpoint.facts(found)["step"] if found else 0


def finish(run: Run, base: Evaluation, status: str) -> Outcome:
    """Save the result, load it again as anyone would, and score that."""
    spec, reporter = run.spec, run.reporter
    t0 = run.phase("save")
    sparsity = _sparsity(run.model) if run.sparsity is None else run.sparsity
    layout = dict(pipeline=[m.settings() for m in spec.pipeline], base=spec.model, sparsity=sparsity)
    saved = models.save(run.model, run.loaded.tokenizer, run.folder / "model", dtype=run.stored_dtype, layout=layout)
    if run.masks:
        from safetensors.torch import save_file
        save_file({k: v.cpu().contiguous() for k, v in run.masks.items()}, run.folder / "masks.safetensors")
    reporter.event("save", f"Saved {saved['weight_bytes'] / 1e6:.2f} MB of weights", bytes=saved["bytes"], weight_bytes=saved["weight_bytes"])
    labels = run.data.labels if run.task != "causal-lm" else None
    packed = bool(json.loads((run.folder / "model" / models.LAYOUT).read_text()).get("packed")) if (run.folder / "model" / models.LAYOUT).is_file() else False
    dtype = "stored" if packed else str(next(run.model.parameters()).dtype).removeprefix("torch.")
    run.model = None
    try:
        run.model = models.load(run.folder / "model", run.task, labels=labels, dtype=dtype, device=run.device).model
    except FettleError as e:
        raise RunFailed(f"the saved result does not load again ({e})", "Report this as a defect; the checkpoint is kept") from e
    run.clock("save", t0)
    result = run.score("result", len(spec.pipeline))
    t0 = run.phase("speed")
    from engines.speed import measure
    speed = measure(run.model, run.data, device=run.device)
    run.clock("speed", t0)
    parameters = run.loaded.profile.parameters
    measured = dict(trainable=run.trainable, parameters=parameters, weight_bytes=saved["weight_bytes"], disk_bytes=saved["bytes"],
                    sparsity=sparsity, bits_per_weight=8 * saved["weight_bytes"] / max(1, parameters), speed=speed, clocks=run.clocks,
                    seconds=run.elapsed(), steps=run.base_step, tokens=run.base_tokens)
    return Outcome(status, run.folder, base, result, run.stages, measured)


def _sparsity(model) -> float:
    """Share of exact zeros among the weights of block matrices (dense ones)."""
    zeros = total = 0
    for _, module in models.matrices(model):
        zeros += int((module.weight == 0).sum())
        total += module.weight.numel()
    return zeros / total if total else 0.0

"""A whole run: load, evaluate the base, the stages in order, save, evaluate what was saved.

The clock of a limit in minutes lives here: each training stage gets what is left after the stages, the
evaluations and the save that still have to come (``engines.pace``). What these take is measured as early as it can be:
evaluations by those that were made, later stages by trying them on one block.
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
from engines.minutes import Minutes
from engines.models.folder import read_folder
from engines.pace import WRITTEN, Ahead
from engines.profile import task_of, working_dtype
from engines.shortage import Width, short
from engines.training import distributed


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


class Run(Minutes):
    """State of a run while it goes through its stages; ``run_pipeline`` is the entry."""

    def __init__(self, spec, reporter, folder: Path, device: str, estimates: dict | None):
        self.spec, self.reporter, self.folder, self.device = spec, reporter, Path(folder), device
        self.estimates = estimates or {}
        # What the process did before (claiming the run, libraries) is part of its minutes.
        clock = getattr(reporter, "clock", None)
        self.before = max(0.0, clock() - getattr(reporter, "base", 0.0)) if clock else 0.0
        self.began = time.perf_counter() - self.before
        self.clocks: dict[str, float] = {}
        self.base_step = self.base_tokens = 0
        self.masks: dict = {}
        self.trainable = 0
        self.sparsity: float | None = None
        self.stages: list[dict] = []
        self.width = Width(reporter)
        self.ahead = Ahead(stage={i: s for i, s in self.estimates.items() if isinstance(i, int)},
                           ratio=dict(self.estimates.get("ratio") or {}), save=self.estimates.get("save", 1.0))
        self.known = set(self.estimates.get("measured") or ())
        """Later stages whose seconds and ratio need not be tried: a probe or this run has measured them."""
        self.owed: int | None = None
        """The last stage, when its evaluation is that of the saved result."""

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
        if values.get("head_lr") == "auto":
            values["head_lr"] = 0.0  # runs that were recorded before there was this knob are resumed as they began
        for name, value in values.items():
            if value == "auto":
                raise InputError(f"training.{name}", "auto", "the planner has not resolved it", "Resolve the spec before it is run")
        return TrainSettings(**values)

    def score(self, name: str, stage: int) -> Evaluation:
        t0 = self.phase("evaluate")
        result = evaluate(self.model, self.data, device=self.device, precision=self.settings.precision,
                          loss_chunk=self.settings.loss_chunk, width=self.width)
        self.ahead.evaluation = result.usual or result.seconds
        result.extra["step"] = self.base_step
        self.reporter.evaluation(name, stage, result)
        self.reporter.points(self.base_step, {"loss_eval": result.extra["loss"], "metric": result.value})
        self.reporter.log(f"evaluate {name}: {result.value:.4f} [{result.low:.4f}, {result.high:.4f}] {result.metric}, n = {result.n}, {result.seconds:.2f} s")
        self.clock("evaluate", t0)
        return result

    def within(self, what: str, remedy: str) -> None:
        """After a phase in which nothing can be lowered.

        Raises:
            RunFailed: the memory limit was passed in it.
        """
        if distributed.wish(self.reporter) == "memory":
            raise RunFailed(f"{what} passed the memory limit", remedy)

    def context(self, index: int) -> Context:
        return Context(task=self.task, data=self.data, tokenizer=self.loaded.tokenizer,
                       profile=models.profile_of(self.model, self.spec.model, self.task), reporter=self.reporter, budget=self.spec.budget,
                       device=self.device, compute="bfloat16" if self.settings.precision == "bf16" else "float32", seed=self.spec.seed,
                       stage=index, folder=distributed.own(self.folder), masks=self.masks)

    def stage(self, index: int, resume: Path | None) -> str:
        """Run one stage; return ``finished`` or ``stopped``."""
        method = self.spec.pipeline[index]
        name = f"{index + 1} {method.card.id}"
        t0 = self.phase(name)
        context = self.context(index)
        context.resuming, context.checkpoint = resume is not None, resume
        if resume is None:
            self.reporter.event("stage", f"Stage {index + 1}, {method.card.name}, began", stage=index, method=method.card.id)
        torch.manual_seed(self.spec.seed * 1009 + index)
        if method.card.packs:
            # Afterwards small weights that were rounded to zero could not be told from pruned ones.
            self.sparsity = _sparsity(self.model)
        plain = None
        if method.card.trains and self.spec.budget.minutes is not None:
            self.look_ahead(index)
            plain = self.sample() if self.ahead.evaluation > 0.01 * 60 * self.spec.budget.minutes else None
        self.model = self.applied(index, method, context)
        distributed.align(self.model, self.masks)
        status, evaluation, steps = "finished", None, 0
        if method.card.trains:
            from engines.training.stage import train
            first = self.adapted(plain)
            # Counted before the training: some of it may be frozen on the way.
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.trainable = max(self.trainable, sum(p.numel() for p in trained))
            held = sum(p.numel() * p.element_size() for p in trained)
            result = train(self.model, method, context, self.settings, self.limit(index), resume=resume, base_step=self.base_step,
                           base_tokens=self.base_tokens, first_evaluation=first, first_checkpoint=0.02 + 3 * held / WRITTEN,
                           width=self.width)
            status, evaluation, steps = result.status, result.evaluation, result.steps
            self.base_step, self.base_tokens = self.base_step + result.steps, self.base_tokens + result.tokens
            self.trainable = max(self.trainable, sum(p.numel() for p in self.model.parameters() if p.requires_grad))
        figures = method.layers(self.model, context)
        self.phase(name)
        self.model = method.finish(self.model, context)
        distributed.align(self.model, self.masks)
        self.model.eval()
        figures = method.layers(self.model, context) or figures
        if figures:
            self.reporter.layers(self.base_step, figures)
        for p in self.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        seconds = self.clock(name, t0)
        if method.card.trains:
            self.reporter.evaluation("stage", index, evaluation)
        elif distributed.by_lead(lambda: self.scored_at_the_end(index)):
            self.owed = index
        else:
            evaluation = self.score("stage", index)
        row = dict(index=index, method=method.card.id, settings=method.settings(), seconds=seconds, steps=steps)
        self.stages.append(row)
        if evaluation is not None:
            row |= dict(metric=evaluation.metric, value=evaluation.value, low=evaluation.low, high=evaluation.high)
            self.reporter.event("stage", f"Stage {index + 1}, {method.card.name}, ended: {evaluation.value:.4g} {evaluation.metric}",
                                **{k: v for k, v in row.items() if k != "settings"}, stage=index)
        else:
            self.reporter.event("stage", f"Stage {index + 1}, {method.card.name}, ended; to keep the minutes it is scored once, after the save",
                                **{k: v for k, v in row.items() if k != "settings"}, stage=index)
        return status

    def applied(self, index: int, method, context):
        """The model as ``method.apply`` leaves it.

        Raises:
            RunFailed: memory ran out in it, which nothing can lower on the way: the weights are changed block by block.
        """
        try:
            return method.apply(self.model, context)
        except (RuntimeError, MemoryError) as e:
            why = short(e)
            if not why:
                raise
            fields = [n for n in ("samples", "sequences", "length") if hasattr(method, n)]
            remedy = f"Lower pipeline.{index}.{fields[0]}" if fields else "Lower training.length"
            raise RunFailed(f"stage {index + 1}, {method.card.name}, ran out of memory ({why})",
                            f"{remedy}, choose a smaller model, or raise budget.memory_gb") from None

    # -- resume ------------------------------------------------------------------------------------------
    def keep(self, index: int, base: Evaluation) -> None:
        """Write what is needed to begin stage ``index`` again: the model as it enters it, masks, clocks."""
        if not distributed.leads():
            return
        folder, t0 = self.folder / f"stage-{index}", time.perf_counter()
        if index > 0:
            models.save(self.model, self.loaded.tokenizer, folder)
            self.ahead.keep = time.perf_counter() - t0
        else:
            folder.mkdir(parents=True, exist_ok=True)
        if self.masks:
            from safetensors.torch import save_file
            save_file({k: v.cpu().contiguous() for k, v in self.masks.items()}, folder / "masks.safetensors")
        facts = dict(index=index, elapsed=self.elapsed(), base_step=self.base_step, base_tokens=self.base_tokens, stages=self.stages,
                     clocks=self.clocks, eval_seconds=self.ahead.evaluation, trainable=self.trainable, base=_plain(base),
                     ahead=dict(ratio=list(self.ahead.ratio.items()), stage=list(self.ahead.stage.items()), known=sorted(self.known)),
                     width=[self.width.tokens, self.width.lowered])
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
        self.clocks, self.ahead.evaluation, self.trainable = facts["clocks"], facts["eval_seconds"], facts["trainable"]
        if "ahead" in facts:
            self.ahead.ratio, self.ahead.stage = dict(facts["ahead"]["ratio"]), dict(facts["ahead"]["stage"])
            self.known |= set(facts["ahead"]["known"])
            self.width.tokens, self.width.lowered = facts["width"]
        found = checkpoint.latest(self.folder / "checkpoints")
        spent = facts["elapsed"]
        if found is not None:
            saved = checkpoint.facts(found)
            if saved["stage"] == index:
                spent += saved["used"]
            else:
                found = None
        self.began -= spent
        return index, found, _evaluation(facts["base"])


def _plain(e: Evaluation) -> dict:
    return dict(metric=e.metric, value=e.value, low=e.low, high=e.high, n=e.n, items_hash=e.items_hash, seconds=e.seconds, extra=e.extra,
                usual=e.usual)


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
    processes = getattr(spec.training, "processes", 1)
    with fast_float32() as path, distributed.joined(processes, device, Path(folder)) as group:
        if group is not None:
            resume, reporter = group.same(resume), reporter if group.rank == 0 else distributed.Silent()
            reporter.log(f"group    {group.size} processes over {group.state.backend}, a batch of {spec.training.batch} rows divided among them")
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
        if distributed.leads():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / "pipeline.json").unlink(missing_ok=True)
        run.load()
        run.within("loading the model and the data", "Raise budget.memory_gb, or choose a smaller model or fewer rows (data.limit)")
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
            want = distributed.wish(reporter)
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
    saved = distributed.by_lead(
        lambda: models.save(run.model, run.loaded.tokenizer, run.folder / "model", dtype=run.stored_dtype, layout=layout))
    if run.masks and distributed.leads():
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
    if run.owed is not None:
        reporter.evaluation("stage", run.owed, result)
        run.stages[-1] |= dict(metric=result.metric, value=result.value, low=result.low, high=result.high)
    t0 = run.phase("speed")
    from engines.speed import measure
    speed = measure(run.model, run.data, device=run.device, seconds=run.timing()) if distributed.leads() else {}
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

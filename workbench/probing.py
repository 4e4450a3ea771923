"""The child of a probe: a run in miniature that measures what decides its cost and then ends.

``python -m workbench.probing FOLDER`` reads ``request.json`` there and writes ``progress.json`` while it works and
``result.json`` at the end. Two training steps on the longest batch tell the memory, further ones on usual batches the seconds;
evaluations are timed on a batch and counted up; stages that fit into the time are done, others tried on one block.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from engines.errors import FettleError
from engines.reporter import Recorder
from workbench import preload, process

STEPS = 10
"""Training steps that are timed at the most; two are always made."""
WHOLE = 4.0
"""Seconds up to which an evaluation is made whole instead of counted up from one batch."""


class Enough(Exception):
    """The time is over; what was measured so far stands."""


class Watch(Recorder):
    """Keeps peak bytes and seconds of each phase, as a run's reporter does."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.current, self.peaks = device, None, {}
        self.base, self._began = 0.0, time.perf_counter()

    def phase(self, name: str) -> None:
        from workbench import telemetry
        if self.current is not None:
            peak = telemetry.peak_rss() or 0
            if self.device.startswith("cuda"):
                import torch
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.peaks[self.current] = max(self.peaks.get(self.current, 0), peak)
        telemetry.reset_peak()
        self.current = name


class Longest:
    """The data of a run whose every training batch is the widest that it can meet."""

    def __init__(self, data):
        self._data = data

    def __getattr__(self, name):
        return getattr(self._data, name)

    def batch(self, step: int, size: int, accumulation: int = 1) -> list[dict]:
        rows = -(-size // accumulation)
        return [self._data.longest(rows) for _ in range(accumulation)]


class Probe:
    """One probe; ``run`` is the only entry.

    Args:
        request: spec (resolved), device, seconds (that it may take), forecast (seconds of each stage).
        folder: for its files.
    """

    def __init__(self, request: dict, folder: Path):
        from engines.pipeline import Run
        from workbench.spec import RunSpec
        self.began, self.request, self.folder = time.perf_counter(), request, folder
        self.spec = RunSpec.from_dict(request["spec"])
        self.reporter = Watch(request["device"])
        self.work = folder / "work"
        self.run_ = Run(self.spec, self.reporter, self.work, request["device"], None)
        self.out: dict = dict(stages=[], peaks=self.reporter.peaks, missing=[], failed=None, device=request["device"])
        self.parts = 2 + 2 * len(self.spec.pipeline)
        self.done = 0

    # -- time --------------------------------------------------------------------------------------------
    def left(self) -> float:
        return self.request["seconds"] - (time.perf_counter() - self.began)

    def tell(self, text: str) -> None:
        """The words of the progress; also the place where the time is watched.

        Raises:
            Enough: it is over.
        """
        self.text = text
        write(self.folder / "partial.json", self.out)
        write(self.folder / "progress.json", dict(text=text, share=min(0.99, self.done / self.parts),
                                                  seconds=round(time.perf_counter() - self.began, 1)))
        self.done += 1
        if self.left() <= 0:
            raise Enough

    # -- the parts ---------------------------------------------------------------------------------------
    def run(self) -> dict:
        """Measure; the result as a JSON-able dict. Running out of memory or of time is a result, not an error."""
        from engines.shortage import short
        run, out = self.run_, self.out
        try:
            self.tell("loading the model and the data")
            t0 = time.perf_counter()
            run.load()
            for method in self.spec.pipeline:
                method.check(run.loaded.profile)
            out["load"] = time.perf_counter() - t0
            self.tell("evaluating a batch")
            self.reporter.phase("evaluate")
            self.plain = run.sample()
            out["evaluation"] = run.ahead.evaluation = self.evaluation()
            out["items"] = len(run.data.items)
            # The forecast of a stage is trusted as far as that of the evaluation was true.
            self.pace = max(1.0, out["evaluation"] / max(1e-3, self.request.get("evaluation") or out["evaluation"]))
            for index in range(len(self.spec.pipeline)):
                self.stage(index)
            self.save()
        except Enough:
            out["missing"].append(f"time was over while {self.text}")
        except (RuntimeError, MemoryError) as e:
            if not (why := short(e)):
                raise
            out["failed"] = dict(phase=self.reporter.current or "load", doing=self.text, text=why)
        self.reporter.phase("end")
        self.reporter.peaks.pop("end", None)
        out["seconds"] = time.perf_counter() - self.began
        shutil.rmtree(self.work, ignore_errors=True)
        return out

    def evaluation(self) -> float:
        """Seconds of a whole evaluation of the model as it stands: made, or counted up from one batch of the longest items."""
        from engines.evaluation import batch_rows, evaluate, item_lengths, sample_seconds
        from engines.shortage import WIDTH
        run = self.run_
        took = sample_seconds(run.model, run.data, tokens=WIDTH, device=run.device, **run.how)
        lengths = sorted((int(n) for n in item_lengths(run.data)), reverse=True)
        units, at, first = 0, 0, 0
        while at < len(lengths):
            rows = batch_rows(run.data, lengths[at], WIDTH)
            units += lengths[at] * len(lengths[at: at + rows])
            first = first or units
            at += rows
        total = took * units / max(1, first)
        if total > min(WHOLE, 0.15 * self.left()):
            return total
        found = evaluate(run.model, run.data, device=run.device, **run.how)
        return found.usual or found.seconds

    def stage(self, index: int) -> None:
        run, method = self.run_, self.spec.pipeline[index]
        name = f"{index + 1} {method.card.id}"
        row = dict(method=method.card.id, seconds=None, step_seconds=None, ratio=None)
        self.out["stages"].append(row)
        if index and run.loaded.profile.parameters < 5e8:
            from engines import models
            t0 = time.perf_counter()
            models.save(run.model, run.loaded.tokenizer, self.work / "keep")
            self.out["keep"] = time.perf_counter() - t0
        if method.card.trains:
            self.tell(f"training with {method.card.name}")
            self.reporter.phase(name)
            self.train(index, method, row)
        else:
            self.tell(f"trying {method.card.name}")
            self.reporter.phase(name)
            self.once(index, method, row)
        self.tell(f"evaluating after {method.card.name}")

    def once(self, index: int, method, row: dict) -> None:
        """A stage without training: done for real where there is time for it, else tried on one block."""
        import torch
        run = self.run_
        said = self.pace * ((self.request.get("forecast") or {}).get(str(index)) or 0.0)
        later = sum(1 for m in self.spec.pipeline[index + 1:] if m.card.trains)
        context = run.context(index)
        if said > self.left() - 8 - 10 * later:
            from engines.rehearsal import rehearse
            with torch.random.fork_rng(devices=[]):
                found = rehearse(run.model, method, context, **run.how)
            if found is None or method.card.shrinks:
                self.out["missing"].append(f"{method.card.name} takes longer than a probe may")
                raise Enough
            row |= dict(seconds=found.seconds, ratio=found.ratio, on="one block")
            return
        t0 = time.perf_counter()
        run.model = method.finish(method.apply(run.model, context), context)
        run.model.eval()
        row["seconds"] = time.perf_counter() - t0
        before, self.plain = self.plain, None
        self.reporter.phase("evaluate")
        self.plain = run.sample()
        row["ratio"] = self.plain / max(1e-6, before) if method.card.packs or method.card.shrinks else 1.0
        if method.card.packs or method.card.shrinks:
            # A whole batch, for its memory and, when it is quick, the whole evaluation for its time.
            seconds = self.evaluation() if self.left() > 6 * run.ahead.evaluation * row["ratio"] / 4 else 0.0
            if seconds:
                row["ratio"] = seconds / max(1e-6, run.ahead.evaluation)
        run.ahead.evaluation *= row["ratio"]

    def train(self, index: int, method, row: dict) -> None:
        """Two steps on the longest batch, then usual ones; the checkpoint; an evaluation batch with the adapter."""
        import dataclasses

        import torch

        from engines.training.loop import Limit, Trainer
        run = self.run_
        torch.manual_seed(self.spec.seed * 1009 + index)
        context = run.context(index)
        context.total_steps, context.progress = 1000, 0.5
        t0 = time.perf_counter()
        run.model = method.apply(run.model, context)
        row["start_seconds"] = time.perf_counter() - t0
        trainer = Trainer(run.model, method, context, dataclasses.replace(run.settings), Limit(steps=1000), first_evaluation=1.0)
        if run.settings.checkpointing:
            run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run.model.train()
        data, times = context.data, []
        try:
            context.data = Longest(data)
            first = 0.0
            for _ in range(2):
                t0 = time.perf_counter()
                self.step(trainer)
                first = first or time.perf_counter() - t0
            longest = time.perf_counter() - t0
            times = [longest] if self.spec.task != "text-classification" else []
            context.data = data
            room = min(15.0, 0.6 * self.left() / max(1, sum(m.card.trains for m in self.spec.pipeline[index:])))
            until = time.perf_counter() + room
            while len(times) < STEPS and (not times or time.perf_counter() + statistics.median(times) < until):
                t0 = time.perf_counter()
                self.step(trainer)
                times.append(time.perf_counter() - t0)
            trainer._flush()
            row |= dict(longest_seconds=longest, first_seconds=first, timed=len(times),
                        step_seconds=statistics.mean(sorted(times)[:-1] if len(times) > 4 else times)
                        if self.spec.task == "text-classification" else statistics.median(times))
            t0 = time.perf_counter()
            trainer.save(final=True)
            row["checkpoint_seconds"] = time.perf_counter() - t0
        finally:
            if run.settings.checkpointing:
                run.model.gradient_checkpointing_disable()
            run.model.eval()
            context.data = data
        if trainer.retried:
            row["lowered"] = trainer.accumulation
        context.optimizer = None
        del trainer.optimizer, trainer.parameters, trainer.groups
        self.reporter.phase("evaluate")
        row["adapted"] = run.sample() / max(1e-6, self.plain)
        self.reporter.phase(f"{index + 1} {method.card.id}")
        context.progress = 1.0
        run.model = method.finish(run.model, context)
        run.model.eval()
        for p in run.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        row["ratio"] = 1.0

    def step(self, trainer) -> None:
        """One optimizer step, waited for."""
        import torch

        from engines.errors import RunFailed
        try:
            before = trainer.context.step
            trainer._step()
            if trainer.context.step == before:      # memory ran out: one knob was lowered, and the step is made again
                trainer._step()
        except RunFailed as e:
            raise MemoryError(str(e)) from None if "memory" in e.cause else e
        if self.request["device"] != "cpu":
            torch.cuda.synchronize()

    def save(self) -> None:
        """Write the result and load it again, as a run does at its end."""
        from engines import models
        run = self.run_
        if run.loaded.profile.parameters > 2e9:
            self.out["missing"].append("saving so large a model")
            return
        self.tell("saving and loading")
        t0 = run.phase("save")
        folder = self.work / "model"
        models.save(run.model, run.loaded.tokenizer, folder, dtype=run.stored_dtype)
        kind = "stored" if any(m.card.packs for m in self.spec.pipeline) else str(next(run.model.parameters()).dtype).removeprefix("torch.")
        run.model = None
        labels = run.data.labels if run.task != "causal-lm" else None
        run.model = models.load(folder, run.task, labels=labels, dtype=kind, device=run.device).model
        self.out["save"] = time.perf_counter() - t0


def write(path: Path, found: dict) -> None:
    """Replace a JSON file at once, so that a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    os.replace(part, path)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 with a ``result.json``, whose ``error`` says in one sentence why there is none."""
    folder = Path((sys.argv[1:] if arguments is None else arguments)[0])
    request = json.loads((folder / "request.json").read_text())
    write(folder / "progress.json", dict(text="starting", share=0.0, seconds=0.0))
    process.die_first(600)
    preload.everything(packages=False)  # what a run's warm process has imported already must not count as its loading time
    import torch

    from engines.kernels import fast_float32
    torch.set_num_threads(int(request.get("threads") or torch.get_num_threads()))
    try:
        with fast_float32():
            found = Probe(request, folder).run()
    except FettleError as e:
        found = dict(error=str(e), field=getattr(e, "field", None))
    except Exception as e:
        from workbench import doctor
        said = doctor.diagnose(e)
        found = dict(error=f"{said['cause']} {said['remedy']}", trace=said["trace"])
    write(folder / "result.json", found)
    return 0


if __name__ == "__main__":
    from workbench import probing
    sys.exit(probing.main())

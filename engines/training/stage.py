"""One training stage, in this process or as one of several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engines.training import distributed
from engines.training.loop import Limit, Result, Trainer
from engines.training.parallel import ParallelTrainer
from engines.training.settings import TrainSettings


def train(model, method, context, settings: TrainSettings, limit: Limit, *, resume: Path | None = None, **more) -> Result:
    """Run one training stage; see ``engines.training.loop.Trainer`` for the arguments, errors and what comes back."""
    group = distributed.current()
    kind, own = (Trainer, {}) if group is None else (ParallelTrainer, dict(group=group))
    return kind(model, method, context, dataclasses.replace(settings), limit, **own, **more).run(resume)

"""What every process that computes for a run does first: which pipeline it executes, and that it dies before the server does."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

PIPELINE = "engines.pipeline:run_pipeline"


def pipeline():
    """The function that executes a spec; tests name their own through ``WORKBENCH_PIPELINE=module:function``."""
    module, _, function = (os.environ.get("WORKBENCH_PIPELINE") or PIPELINE).partition(":")
    return getattr(importlib.import_module(module), function)


def die_first(score: int = 500) -> None:
    """When memory runs out the kernel shall end this process, not the server that could tell of it."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError:
        pass

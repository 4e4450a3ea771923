"""A stand-in pipeline for tests of sweeps: the curve and the result depend on the settings alone."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np


def hill(spec, *, reporter, folder, device="cpu", resume=False, estimates=None):
    """20 steps; the loss is the distance of the learning rate from 1e-3 in decades, plus what a low rank costs."""
    lr, rank = float(spec.training.lr), spec.pipeline[0].rank
    if spec.seed == 13:
        raise RuntimeError("unlucky")
    poor = abs(math.log10(lr) + 3) + 1 / rank
    reporter.phase("1 lora")
    status, pause = "finished", 0.05 if spec.name and "slow" in spec.name else 0.005
    for step in range(1, 21):
        time.sleep(pause)
        reporter.points(step, {"loss": poor + 1 / step})
        reporter.progress(step / 20, (20 - step) * pause)
        if step % 5 == 0:
            reporter.points(step, {"loss_eval": poor + 1 / step, "metric": poor})
            if "patient" in spec.tags:
                time.sleep(1.5)
        if reporter.wants() == "stop":
            status = "stopped"
            break
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "weights.bin").write_bytes(bytes([rank]) * 5_000_000)  # more than one part on its way home
    scores = np.full(4, poor, dtype=np.float32)
    reporter.evaluation("result", 0, SimpleNamespace(metric="bits/byte", value=poor, low=poor - 0.1, high=poor + 0.1, n=4, scores=scores,
                                                     weights=scores, items_hash="x", seconds=0.0, extra={"loss": poor}))
    return SimpleNamespace(status=status, folder=folder, stages=[dict(index=0, steps=step)],
                           measured=dict(trainable=1000 * rank, parameters=100_000, weight_bytes=1000 * rank, sparsity=0.0,
                                         bits_per_weight=32.0))

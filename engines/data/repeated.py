"""A small part of the training data, shown again and again."""

from __future__ import annotations

import numpy as np
import torch


class Repeated:
    """Training data of which only what the first share of the budget sees is ever used. Everything but batches is that of ``data``.

    The first ``1 / passes`` of the stage's progress, or ``samples`` rows, makes the set; each later pass shows it in another order. A batch
    depends on the seed, its number and ``state["set_steps"]`` only, so that resume is exact.

    Args:
        data: ``engines.data.tokens.TaskData`` of a language model.
        context: the stage's ``Context``: its progress and its state.
    """

    def __init__(self, data, context, passes: int, samples: int):
        self._data, self._context, self._passes, self._samples, self._rows = data, context, passes, samples, None

    def __getattr__(self, name):
        return getattr(self._data, name)

    @property
    def set_steps(self) -> int | None:
        """Steps of one pass, once they are known."""
        return self._context.state.get("set_steps")

    def batch(self, step: int, size: int, accumulation: int = 1) -> list[dict]:
        """As ``TaskData.batch``."""
        if self.set_steps is None and step > 0 and (self._context.progress >= 1.0 / self._passes or (step + 1) * size > self._samples):
            self._context.state["set_steps"] = step
        if self.set_steps is None or step < self.set_steps:
            return self._data.batch(step, size, accumulation)
        if self._rows is None or self._rows[0] != size:
            parts = [self._data.batch(s, size)[0] for s in range(self.set_steps)]
            self._rows = (size, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})
        rows, (turn, at) = self._rows[1], divmod(step, self.set_steps)
        order = np.random.default_rng([self._data.seed, turn, 2]).permutation(self.set_steps * size)
        chosen = torch.from_numpy(order[at * size: (at + 1) * size])
        whole = {k: v[chosen] for k, v in rows.items()}
        return [{k: v[i::accumulation].contiguous() for k, v in whole.items()} for i in range(accumulation)] if accumulation > 1 else [whole]

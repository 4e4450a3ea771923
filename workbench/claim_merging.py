"""The experiment behind claims on merging: one adapter for each group of passages, then all of them added to one model."""

from __future__ import annotations

import copy
import statistics

import numpy as np

from workbench.claim_search import beyond, tuned

ROWS = 40
"""Passages of one group: few enough that an adapter comes to know them within some dozen steps."""


def groups(bench) -> list:
    """Data of each part: neighbouring training passages, both trained on and scored, because merging is to keep what was learned."""
    from engines.data.table import Table
    from engines.data.tokens import TaskData
    whole, count, out = bench.data.table.train, bench.claim["parts"], []
    for i in range(count):
        start = i * len(whole) // count
        own = whole.take(range(start, min(start + ROWS, len(whole))))
        out.append(TaskData(Table(f"{bench.claim['data']} part {i + 1}", bench.task, own, own, labels=bench.data.table.labels),
                            bench.tokenizer, length=bench.claim["length"], seed=0))
    return out


def scores(bench, model) -> np.ndarray:
    """The score of each item of the bench's present data, in the units of its metric."""
    from engines.evaluation import evaluate
    found = evaluate(model, bench.data, precision=bench.claim["precision"])
    return (found.scores / np.log(2) if found.metric == "bits/byte" else found.scores).astype(np.float64)


def added(base, models):
    """A copy of ``base`` with the sum of what each of ``models`` changed in it."""
    import torch
    total, states = copy.deepcopy(base), [dict(m.named_parameters()) for m in models]
    with torch.no_grad():
        for name, p in total.named_parameters():
            p += sum(s[name] - p for s in states)
    return total


def merging(bench, seeds: int) -> dict:
    """[seeds, items] of both sides: each item's score under the sum less its score under its own adapter.

    The learning rate of a side is the one whose adapters are best alone, on the even items; figures are told of the odd ones.
    """
    claim, out, parts = bench.claim, {}, groups(bench)

    def alone(side, rate, seed):
        rows = []
        for part in parts:
            bench.data = part
            rows.append(bench.train(claim[side], rate, seed) | {"model": bench.last})
        return rows

    def lost(rows):
        total, found = added(bench.model, [r["model"] for r in rows]), []
        for part, row in zip(parts, rows):
            bench.data = part
            found.append((scores(bench, total) - row["scores"])[1::2])
        return np.concatenate(found)

    for side in ("ours", "against"):
        usual, tried, best = bench.usual_rate(claim[side]), {}, None
        ahead = [usual * factor for factor in claim["rates"]]
        while ahead:
            rate = ahead.pop(0)
            rows = alone(side, rate, 0)
            figure = tried[rate] = sum(map(tuned, rows))
            if best is None or figure < best[1]:      # a figure that is not a number is never less
                best = (rate, figure, rows)
            if not ahead and (more := beyond(tried, best[0], len(claim["rates"]))) is not None:
                ahead.append(more)
        rate, _, rows = best
        table = [lost(rows)] + [lost(alone(side, rate, seed)) for seed in range(1, seeds)]
        weights = None if rows[0]["weights"] is None else np.concatenate([r["weights"][1::2] for r in rows])
        out[side] = dict(rate=rate, searched=sorted(tried), scores=np.stack(table), weights=weights, metric=rows[0]["metric"],
                         trainable=rows[0]["trainable"], seconds=statistics.median(r["seconds"] for r in rows))
    return out

"""How few items an evaluation needs to keep the ranking of runs, and how wide its interval then is.

Source: "Efficient Benchmarking (of Language Models)".
"""

from __future__ import annotations

from workbench import stats
from workbench.laws import history
from workbench.laws.base import Card, Column, Constant, Fitted, Option, Planner, percent, short
from workbench.laws.history import Scores

DRAWS = 400
TIERS = (20, 50, 200, 1000)
"""Sample sizes of the coarse-to-fine tournament; all items come last."""


def values(matrix, weights, metric, picks):
    """Metric of every model on each drawn set of items, float64 [draws, models]; ``picks`` int [draws, items drawn]."""
    import numpy as np

    above = matrix[:, picks].sum(-1).T
    below = picks.shape[1] if weights is None else weights[picks].sum(-1)[:, None]
    return above / (np.asarray(below, float) * stats.scale(metric))


def kendall(a, b):
    """Kendall's tau-b of each row of ``a`` [draws, models] against ``b`` [models]; ties count as neither order. float64 [draws]."""
    import numpy as np

    i, j = np.triu_indices(len(b), 1)
    x, y = np.sign(a[:, i] - a[:, j]), np.sign(b[i] - b[j])
    below = np.sqrt((x != 0).sum(1) * (y != 0).sum())
    return np.where(below > 0, (x * y).sum(1) / np.maximum(below, 1e-12), 0.0)


def reliability(scores: Scores, size: int, draws: int = DRAWS, seed: int = 0) -> dict:
    """How well ``size`` items drawn with replacement rank the models as all items do.

    Returns:
        dict: ``tau`` (mean of Kendall's tau), ``dior`` (lower end of its 95 % interval: decision impact on reliability), ``same_best``
        (share of the draws with the same best model), ``width`` (median width of a model's 95 % interval).
    """
    import numpy as np

    rng, n = np.random.default_rng(seed + size), scores.matrix.shape[1]
    part = max(1, min(draws, 4_000_000 // max(1, size * len(scores.names))))
    made = []
    for begin in range(0, draws, part):
        made.append(values(scores.matrix, scores.weights, scores.metric, rng.integers(0, n, (min(part, draws - begin), size))))
    drawn = np.concatenate(made)
    whole = values(scores.matrix, scores.weights, scores.metric, np.arange(n)[None])[0]
    tau = kendall(drawn, whole)
    best = np.argmin if stats.lower_is_better(scores.metric) else np.argmax
    ends = np.percentile(drawn, (2.5, 97.5), axis=0)
    return {
        "items": int(size),
        "tau": float(tau.mean()),
        "dior": float(np.percentile(tau, 2.5)),
        "high": float(np.percentile(tau, 97.5)),
        "same_best": float((best(drawn, axis=1) == best(whole)).mean()),
        "width": float(np.median(ends[1] - ends[0])),
    }


def sizes(n: int) -> list[int]:
    """Sample sizes worth trying, up to all n items."""
    return sorted({s for s in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if s < n} | {n})


def tournament(scores: Scores, tiers=TIERS, seed: int = 0, confidence: float = 1.96) -> dict:
    """Coarse to fine: all models on few items, then only those that may still be best on more.

    A model is left out at a tier when its paired difference to the leader there is above ``confidence`` standard errors.

    Returns:
        dict: ``best`` (name), ``evaluations`` (items times models that were scored), ``uniform`` (all items for all models), ``left``
        (models that reached each tier).
    """
    import numpy as np

    k, n = scores.matrix.shape
    order = np.random.default_rng(seed).permutation(n)
    alive, spent, left, seen = np.arange(k), 0, [], 0
    sign = 1.0 if stats.lower_is_better(scores.metric) else -1.0
    weights = np.ones(n) if scores.weights is None else scores.weights
    for size in [t for t in tiers if t < n] + [n]:
        spent += len(alive) * (size - seen)
        left.append({"items": int(size), "models": len(alive)})
        seen = size
        picked = order[:size]
        part, below = sign * scores.matrix[alive][:, picked], weights[picked]
        rate = part.sum(1) / below.sum()
        leader = int(np.argmin(rate))
        gap = part - part[leader]
        mean = gap.sum(1) / below.sum()
        error = np.sqrt(((gap - mean[:, None] * below) ** 2).sum(1) / max(1, size - 1) * size) / below.sum()
        keep = mean <= confidence * error
        keep[leader] = True
        best = scores.names[alive[leader]]
        alive = alive[keep]
        if len(alive) == 1:
            break
    return {"best": best, "evaluations": int(spent), "uniform": int(k * n), "left": left}


class EfficientBenchmarking(Planner):
    """Evaluation items."""

    card = Card(
        id="efficient-benchmarking",
        name="Evaluation size",
        title="Efficient Benchmarking (of Language Models)",
        question="How few items may an evaluation have before the ranking of runs suffers?",
        form="DIoR = lower end of the 95 % interval of Kendall's tau between the ranking on a resample and on all items",
        needs=("per-item scores of at least 2, better 5, runs on the same items, which every finished run here keeps",),
        claims=(
            "on HELM, 100 times fewer items changed little",
            "a handful of items gives the right ranking, but leaving out one low-ranked model may change the leader",
        ),
        differs=(
            "One data set has no scenarios or prompts to draw: only its items are resampled.",
            "The tournament leaves models out by a paired test against the leader; the paper assigns tiers by rank.",
        ),
        data="scores",
        columns=(
            Column("item", "number of the item"),
            Column("score", "score of a run on it"),
            Column("weight", "weight of the item", required=False),
        ),
        options=(
            Option("reliability", "DIoR that is wanted", 0.9, "", 0.0, 1.0),
            Option("difference", "difference between two runs that must be seen", None, "", 1e-9, 1e6),
        ),
    )

    def from_history(self, home, query, options):
        return history.scores(home, query)

    def from_table(self, table, options):
        import numpy as np

        from engines.errors import InputError

        groups = table.groups or table.labels
        names = list(dict.fromkeys(groups))
        items = np.unique(table["item"])
        matrix = np.full((len(names), len(items)), np.nan)
        at = {n: i for i, n in enumerate(names)}
        for g, item, score in zip(groups, np.searchsorted(items, table["item"]), table["score"]):
            matrix[at[g], item] = score
        if np.isnan(matrix).any():
            raise InputError(
                "points",
                f"{int(np.isnan(matrix).sum())} missing",
                "not every run has a score for every item",
                "Give one row for each run and item, with the column run",
            )
        weights = None
        if table.get("weight") is not None:
            weights = np.full(len(items), np.nan)
            weights[np.searchsorted(items, table["item"])] = table["weight"]
        return Scores(names, matrix, weights, "score", "points")

    def example(self):
        import numpy as np

        rng = np.random.default_rng(6)
        skill, hard = np.linspace(-0.9, 0.9, 8), rng.normal(0, 1.2, 1000)
        right = rng.random((8, 1000)) < 1 / (1 + np.exp(-(skill[:, None] - hard)))
        return Scores(
            [f"synthetic {i}" for i in range(1, 9)],
            right.astype(float),
            None,
            "accuracy",
            "example",
            ["The scores are synthetic: eight models of known skill on 1,000 items."],
        )

    def fit(self, data, options=None, source="points"):
        import numpy as np

        from engines.errors import InputError

        if len(data.names) < 2:
            raise InputError("points", len(data.names), "a ranking needs at least 2 runs", "Give the scores of more runs")
        n = data.matrix.shape[1]
        self.few(n, 8, "items")
        rows = [reliability(data, s) for s in sizes(n)]
        below = np.ones(n) if data.weights is None else data.weights
        rate = data.matrix.sum(1) / below.sum()
        i, j = np.triu_indices(len(data.names), 1)
        if len(i) > 300:
            pick = np.random.default_rng(0).choice(len(i), 300, replace=False)
            i, j = i[pick], j[pick]
        gaps = [(data.matrix[a] - data.matrix[b]) - (rate[a] - rate[b]) * below for a, b in zip(i, j)]
        spread = float(np.median([g.std(ddof=1) for g in gaps])) / (float(below.mean()) * stats.scale(data.metric))
        notes = list(data.notes)
        if len(data.names) < 5:
            notes.append(f"{len(data.names)} runs: a ranking of so few says little about how well items separate models.")
        if rows[-1]["dior"] < (options or {}).get("reliability", 0.9):
            notes.append("Even all items do not rank these runs that reliably: several of them are alike.")
        unit = "bits/byte" if data.metric == "bits/byte" else data.metric
        made = [
            Constant("paired spread", spread, help=f"standard deviation of an item's difference between two runs, {unit}"),
            Constant("DIoR at all items", rows[-1]["dior"], help="lower end of Kendall's tau"),
        ]
        return Fitted(
            self.card.id,
            source,
            made,
            n,
            [],
            notes,
            {"items": (float(rows[0]["items"]), float(n))},
            None,
            {"rows": rows, "spread": spread, "metric": data.metric, "models": len(data.names), "tournament": tournament(data)},
        )

    def answer(self, fitted, options, data=None):
        rows, metric = fitted.extra["rows"], fitted.extra["metric"]
        wanted = options["reliability"]
        chosen = next((r for r in rows if r["dior"] >= wanted), None)
        found = chosen or rows[-1]
        half = found["width"] / 2
        size = f"{100 * half:.1f} points" if metric == "accuracy" else f"{short(half)} {metric}"
        said = (
            f"{found['items']:,} items keep the ranking of these {fitted.extra['models']} runs"
            if chosen
            else f"No number up to {rows[-1]['items']:,} items ranks these {fitted.extra['models']} runs with a DIoR of {wanted:g}; all of them reach "
            f"{found['dior']:.2f}"
        )
        text = (
            f"{said}"
            + (f" (tau {found['tau']:.2f}, at least {found['dior']:.2f})" if chosen else "")
            + f", with an interval of ± {size} for each run."
        )
        if chosen:
            text += f" Set training.items to {found['items']}."
        figures = {
            "items": found["items"],
            "reached": chosen is not None,
            "tau": found["tau"],
            "dior": found["dior"],
            "half_width": half,
            "same_best": found["same_best"],
            "rows": rows,
            "tournament": fitted.extra["tournament"],
        }
        if options["difference"]:
            gap = options["difference"]
            figures["items_for_difference"] = need = int((1.96 * fitted.extra["spread"] / gap) ** 2) + 1
            text += f" To see a difference of {short(gap)} between two runs, take {need:,} items."
        cup = fitted.extra["tournament"]
        text += (
            f" To find only the best run, a coarse-to-fine tournament scores {percent(cup['evaluations'] / cup['uniform'])} of the items and names "
            f"{cup['best']}."
        )
        xs = [r["items"] for r in rows]
        notes = (
            [f"The best run is the same in {percent(found['same_best'])} of the resamples at that size."]
            if found["same_best"] < 0.95
            else []
        )
        return {
            "text": text,
            "figures": figures,
            "warnings": notes,
            "plot": {
                "x": {"title": "Items", "unit": "", "log": True},
                "y": {"title": "Kendall's tau", "unit": ""},
                "series": [
                    dict(
                        name="95 % of the resamples",
                        kind="band",
                        x=xs,
                        low=[r["dior"] for r in rows],
                        high=[r["high"] for r in rows],
                    ),
                    dict(name="mean", kind="line", x=xs, y=[r["tau"] for r in rows]),
                    dict(
                        name="chosen",
                        kind="mark",
                        x=[found["items"]],
                        y=[found["tau"]],
                        low=[found["dior"]],
                        high=[found["high"]],
                    ),
                ],
            },
        }

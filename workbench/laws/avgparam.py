"""Loss of training while pruning: Chinchilla's law with the mean number of parameters over training.

Source: "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws".
"""

from __future__ import annotations

from workbench.laws import history
from workbench.laws.base import Card, Column, Fitted, Option, Planner, beyond, interval, percent, short, span
from workbench.laws.chinchilla import NAMES, constants, ends, fit_law, loss, optimum, shared_doubts
from workbench.laws.points import Points, positive

SHAPES = ("cubic", "linear", "at once")
WINDOW = (0.25, 0.75)
"""Shares of training compute between which the paper's best schedules prune."""
GRID = 4001


def sparsity_at(share, final: float, begin: float, end: float, shape: str = "cubic"):
    """Sparsity after each share of the training tokens, like ``share``."""
    import numpy as np

    u = np.clip((np.asarray(share, float) - begin) / max(end - begin, 1e-12), 0.0, 1.0)
    u = np.where(np.asarray(share) < begin, 0.0, u)
    if shape == "at once":
        return np.where(u > 0, final, 0.0)
    return final * (1 - (1 - u) ** 3) if shape == "cubic" else final * u


def average(parameters: float, final: float, begin: float, end: float, shape: str = "cubic", prunable: float = 1.0) -> float:
    """Mean number of parameters that are left over training.

    Args:
        final: sparsity at the end, 0 to 1.
        begin, end: shares of the training tokens.
        prunable: share of the parameters that pruning may take.
    """
    import numpy as np

    t = np.linspace(0, 1, GRID)
    return float(parameters * (1 - prunable * np.trapezoid(sparsity_at(t, final, begin, end, shape), t)))


def tokens_of_compute(share: float, final: float, begin: float, end: float, shape: str = "cubic") -> float:
    """Share of the tokens at which a share of the compute is spent, where a token costs what is left of the model."""
    import numpy as np

    t = np.linspace(0, 1, GRID)
    left = 1 - sparsity_at(t, final, begin, end, shape)
    spent = np.concatenate([[0.0], np.cumsum((left[1:] + left[:-1]) / 2)])
    return float(np.interp(share, spent / spent[-1], t))


def window_of_compute(begin: float, end: float, final: float, shape: str = "cubic") -> tuple[float, float]:
    """The window in shares of tokens whose compute shares are ``begin`` and ``end``; found by iteration, since pruning makes tokens cheaper."""
    at = begin, end
    for _ in range(40):
        at = tokens_of_compute(begin, final, *at, shape), tokens_of_compute(end, final, *at, shape)
    return at


class AverageParameters(Planner):
    """Pruning schedules in pre-training."""

    card = Card(
        id="avgparamscalinglaw",
        name="Average parameters",
        title="The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
        question="When should pruning begin and end in training, and what will the sparse model's loss be?",
        form="L = E + A / Nbar^alpha + B / D^beta,  Nbar = mean of N(t),  C = 6 Nbar D",
        needs=("losses of runs that differ in mean size and tokens, at least 6; dense ones are runs with a sparsity of 0",),
        claims=(
            "pruning between 25 % and 75 % of the training compute is near optimal, of 80 schedules",
            "at equal compute the sparse model is as good as the dense one, and smaller",
        ),
        differs=(
            "The law sees a schedule only through its mean size: at equal mean it cannot prefer one window. That 25 % to 75 % is best "
            "is the paper's experiment, and is said as such.",
            "The shape of the schedule is cubic unless chosen; which one the paper used was not checked.",
        ),
        data="points",
        columns=(
            Column("parameters", "parameters before pruning"),
            Column("tokens", "training tokens"),
            Column("loss", "final loss"),
            Column("average_parameters", "mean parameters over training, in place of the next three", required=False),
            Column("sparsity", "sparsity at the end, 0 to 1", required=False),
            Column("begin", "share of the tokens at which pruning begins", required=False),
            Column("end", "share at which it ends", required=False),
        ),
        options=(
            Option("parameters", "size before pruning", None, "parameters", 1.0, 1e15),
            Option("tokens", "training tokens", None, "tokens", 1.0, 1e17),
            Option("sparsity", "sparsity at the end", 0.5, "", 0.0, 0.99),
            Option("begin", "share of the training compute at which pruning begins", WINDOW[0], "", 0.0, 1.0),
            Option("end", "share at which it ends", WINDOW[1], "", 0.0, 1.0),
            Option("shape", "how sparsity rises", "cubic", choices=SHAPES),
        ),
    )

    def from_history(self, home, query, options):
        points = history.points(home, query)
        # A run's model is pruned before it trains here; during training its size is what is left.
        points.columns["average_parameters"] = points["parameters"] * (1 - points["sparsity"])
        return points

    def example(self):
        import numpy as np

        rng, law = np.random.default_rng(7), {"E": 1.7, "A": 60.0, "B": 900.0, "alpha": 0.33, "beta": 0.37}
        rows = [
            (n, d, s, *w)
            for n in (2e6, 6e6, 2e7)
            for d in (3e7, 1e8, 4e8)
            for s, w in ((0.0, (0.25, 0.75)), (0.5, (0.25, 0.75)), (0.8, (0.0, 0.5)))
        ]
        n, d, s, b, e = (np.array(c) for c in zip(*rows))
        mean = np.array([average(*r[:1], *r[2:]) for r in rows])
        return Points(
            {
                "parameters": n,
                "tokens": d,
                "loss": loss(law, mean, d) * np.exp(rng.normal(0, 0.004, len(n))),
                "sparsity": s,
                "begin": b,
                "end": e,
            },
            [f"made {i}" for i in range(1, len(n) + 1)],
            "example",
            ["The points are synthetic: made from a known law with 0.4 % noise."],
        )

    def published(self):
        from workbench.laws.chinchilla import Chinchilla

        fitted = Chinchilla().published()
        fitted.law = self.card.id
        fitted.warnings = ["The constants are Chinchilla's of dense models, which this law reduces to; no interval is given."]
        return fitted

    def mean_of(self, points) -> object:
        """Mean parameters of each row, float64 [n]."""
        import numpy as np

        n = points["parameters"]

        def fill(name, value):
            given = points.get(name)
            return np.full(len(n), value) if given is None else np.where(np.isfinite(given), given, value)

        s, b, e = fill("sparsity", 0.0), fill("begin", WINDOW[0]), fill("end", WINDOW[1])
        made = np.array([average(*row) for row in zip(n, np.clip(s, 0, 1), b, e)])
        return (
            np.where(np.isfinite(points["average_parameters"]), points["average_parameters"], made)
            if points.get("average_parameters") is not None
            else made
        )

    def fit(self, data, options=None, source="points"):
        from workbench.laws import fit as fits

        points = positive(data, "parameters", "tokens", "loss")
        self.few(len(points), 6)
        mean = self.mean_of(points)
        values, draws, residuals, cond = fit_law(mean, points["tokens"], points["loss"])
        made = constants(values, draws)
        return Fitted(
            self.card.id,
            source,
            made,
            len(points),
            residuals.tolist(),
            shared_doubts(Points({"parameters": mean, "tokens": points["tokens"]}, notes=points.notes))
            + fits.doubts(made, len(points), 5, cond),
            {"average_parameters": ends(mean), "tokens": ends(points["tokens"]), "compute": ends(6 * mean * points["tokens"])},
            draws,
            {"mean": mean.tolist()},
        )

    def answer(self, fitted, options, data=None):
        import numpy as np

        from engines.errors import InputError

        if options["end"] < options["begin"]:
            raise InputError("end", options["end"], f"before the begin, {options['begin']:g}", "Let pruning end after it begins")
        c, many = {k: fitted[k] for k in NAMES}, fitted.columns()
        size_end = fitted.region.get("average_parameters", fitted.region.get("parameters", (1e6, 1e8)))[1]
        n, d = options["parameters"] or size_end, options["tokens"]
        d = d or optimum(c, 6 * n * 20 * n)[1]
        s, shape = options["sparsity"], options["shape"]

        def plan(begin, end):
            at = window_of_compute(begin, end, s, shape)
            mean = average(n, s, *at, shape)
            value = loss(c, mean, d)
            low, high = interval(loss(many, mean, d))
            return {
                "begin": begin,
                "end": end,
                "average_parameters": mean,
                "compute": 6 * mean * d,
                "loss": float(value),
                "low": low,
                "high": high,
            }

        here, dense = plan(options["begin"], options["end"]), loss(c, n, d)
        windows = [plan(b, e) for b, e in ((0.0, 0.25), (0.0, 0.5), (0.25, 0.5), WINDOW, (0.5, 0.75), (0.5, 1.0), (0.75, 1.0))]
        equal = loss(c, here["average_parameters"], d)
        text = (
            f"Pruned to {percent(s)} sparsity between {percent(options['begin'])} and {percent(options['end'])} of the compute, {short(n)} parameters "
            f"have {short(here['average_parameters'])} on average; with {short(d)} tokens the loss should be {here['loss']:.3f}"
            f"{span(here['low'], here['high'])}, {here['loss'] - dense:+.3f} against the dense model at {percent(here['compute'] / (6 * n * d))} of "
            f"its compute. A dense model of that mean size is predicted the same, {equal:.3f}, but ends at "
            f"{short(here['average_parameters'])} parameters in place of {short(n * (1 - s))}."
        )
        if (options["begin"], options["end"]) != WINDOW:
            text += " The paper's experiments found 25 % to 75 % near optimal."
        ts = np.linspace(0, 1, 101)
        series = []
        for row, kind in ((plan(*WINDOW), "thin"), (here, "line")):
            at = window_of_compute(row["begin"], row["end"], s, shape)
            series.append(
                dict(
                    name=f"{percent(row['begin'])} to {percent(row['end'])}: mean {short(row['average_parameters'])}",
                    kind=kind,
                    x=(100 * ts).tolist(),
                    y=(n * (1 - sparsity_at(ts, s, *at, shape))).tolist(),
                )
            )
        series = series[1:] if (options["begin"], options["end"]) == WINDOW else series
        return {
            "text": text,
            "figures": here | {"dense_loss": float(dense), "windows": windows, "final_parameters": n * (1 - s)},
            "warnings": beyond(fitted, average_parameters=here["average_parameters"], tokens=d),
            "plot": {
                "x": {"title": "Share of the training tokens", "unit": "%"},
                "y": {"title": "Parameters left", "unit": ""},
                "series": series,
            },
        }

"""Loss as a function of parameters and tokens, and the best split of a compute budget.

Sources: "Chinchilla Scaling: A replication attempt" (the fit and its constants); "Training Compute-Optimal Large Language
Models" (the law, C = 6 N D).
"""

from __future__ import annotations

from workbench.laws import history
from workbench.laws.base import Card, Column, Constant, Fitted, Option, Planner, beyond, duration, interval, short, span
from workbench.laws.points import Points, positive

PUBLISHED = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
NAMES = ("E", "A", "B", "alpha", "beta")
HELP = {
    "E": "loss that no size and no amount of data removes",
    "A": "weight of the size term",
    "B": "weight of the data term",
    "alpha": "how fast size helps",
    "beta": "how fast data helps",
}
LOW, HIGH = (-8.0, -12.0, -12.0, 0.02, 0.02), (4.0, 6.0, 6.0, 2.0, 2.0)
"""Bounds of ln E, ln of both terms at the centre of the points, alpha and beta."""


def loss(c, n, d):
    """``E + A / n^alpha + B / d^beta`` with the constants in mapping ``c`` (floats or arrays)."""
    return c["E"] + c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]


def optimum(c, flops):
    """Parameters and tokens of least loss at ``6 N D = flops``."""
    total = c["alpha"] + c["beta"]
    g = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** (1 / total)
    n = g * (flops / 6) ** (c["beta"] / total)
    return n, flops / (6 * n)


def fit_law(n, d, measured, *, draws: int = 200, seed: int = 0):
    """Constants and bootstrap draws of the five constants.

    Args:
        n, d, measured: float64 arrays of parameters, tokens and losses.

    Returns:
        ``(values [5], draws [k, 5], residuals [points], condition)`` in the order E, A, B, alpha, beta.
    """
    import itertools

    import numpy as np

    from workbench.laws import fit

    x, z, y = np.log(n), np.log(d), np.log(measured)
    cx, cz = x.mean(), z.mean()  # centred: the intercepts are terms at a typical point, not at one parameter and one token

    def model(theta):
        e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
        return fit.logsumexp(e + 0 * x, a - alpha * (x - cx), b - beta * (z - cz))

    floor, middle = float(y.min()), float(np.median(y))
    grid = np.array(
        [
            (floor + e, middle + a, middle + b, alpha, beta)
            for e, a, b, alpha, beta in itertools.product(
                np.log([0.1, 0.4, 0.7, 0.9]),
                (-6.0, -4.0, -2.5, -1.0, -0.3),
                (-6.0, -4.0, -2.5, -1.0, -0.3),
                (0.1, 0.3, 0.5, 0.8, 1.2),
                (0.1, 0.3, 0.5, 0.8, 1.2),
            )
        ]
    )
    theta = fit.solve(model, y, grid, LOW, HIGH)
    made = fit.bootstrap(model, y, theta, LOW, HIGH, draws=draws, seed=seed)

    def plain(t):
        t = np.atleast_2d(t)
        return np.column_stack(
            [np.exp(t[:, 0]), np.exp(t[:, 1] + t[:, 3] * cx), np.exp(t[:, 2] + t[:, 4] * cz), t[:, 3], t[:, 4]]
        )

    return plain(theta)[0], plain(made), np.exp(model(theta[None])[0].real - y) - 1, fit.condition(model, theta)


def constants(values, draws, names=NAMES, help=HELP) -> list[Constant]:
    """Constants with their intervals."""
    made = []
    for i, name in enumerate(names):
        low, high = interval(draws[:, i]) if draws is not None else (None, None)
        made.append(Constant(name, float(values[i]), low, high, help.get(name, "")))
    return made


def shared_doubts(points: Points) -> list[str]:
    """What may be wrong with the points themselves."""
    from workbench.laws.fit import power_of_ten

    found = list(points.notes)
    for name, word in (("parameters", "size"), ("tokens", "number of tokens")):
        if points.get(name) is not None and power_of_ten(points[name]) < 4:
            found.append(
                f"All points have nearly the same {word} ({short(points[name].min())} to {short(points[name].max())} {name}): "
                f"what the law says of other values is a guess."
            )
    return found


class Chinchilla(Planner):
    """Parametric law of parameters and tokens."""

    card = Card(
        id="chinchilla-replication",
        name="Chinchilla",
        title="Chinchilla Scaling: A replication attempt",
        question="For so much compute, how large a model and how many tokens give the lowest loss?",
        form="L(N, D) = E + A / N^alpha + B / D^beta,  6 N D = C",
        needs=(
            "losses of runs that differ in size and in tokens, at least 6, better 15",
            "training from scratch; each schedule completed",
        ),
        claims=(
            "about 20 tokens per parameter are compute-optimal",
            "the original paper's intervals would have needed more than 600,000 runs",
        ),
        differs=(
            "A grid of 2,500 candidates is evaluated at once and its best 24 start L-BFGS; the paper starts it from all of its grid.",
            "The paper's constants come from data digitised out of a figure; they hold for its text and tokenizer, not for yours.",
        ),
        data="points",
        columns=(
            Column("parameters", "parameters of the model"),
            Column("tokens", "training tokens"),
            Column("loss", "final loss, nats per token"),
            Column("seconds", "training time", required=False),
        ),
        options=(
            Option("compute", "compute budget", None, "FLOP", 1.0, 1e30),
            Option("minutes", "compute budget as time, at the speed of the runs", None, "min", 1e-3, 1e7),
            Option("parameters", "predict the loss of this size", None, "parameters", 1.0, 1e15),
            Option("tokens", "with so many tokens", None, "tokens", 1.0, 1e17),
        ),
    )

    def from_history(self, home, query, options):
        return history.points(home, query)

    def example(self):
        import numpy as np

        rng = np.random.default_rng(3)
        n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 2e7, 5), np.geomspace(1e7, 6e8, 5)))
        made = loss({"E": 1.7, "A": 60.0, "B": 900.0, "alpha": 0.33, "beta": 0.37}, n, d) * np.exp(rng.normal(0, 0.004, len(n)))
        return Points(
            {"parameters": n, "tokens": d, "loss": made, "seconds": 6 * n * d / 4e12},
            [f"made {i}" for i in range(1, len(n) + 1)],
            "example",
            ["The points are synthetic: made from a known law with 0.4 % noise."],
        )

    def published(self):
        return Fitted(
            self.card.id,
            "published",
            [Constant(k, PUBLISHED[k], help=HELP[k]) for k in NAMES],
            warnings=[
                "The constants are the paper's, for its text and tokenizer: use them for the split of compute, hardly for the loss itself. "
                "No interval is given: none of the single constants' errors carries over to a prediction."
            ],
            region={"parameters": (4.4e7, 1.6e10), "tokens": (3e8, 1.5e12)},
        )

    def fit(self, data, options=None, source="points"):
        from workbench.laws import fit as fits

        points = positive(data, "parameters", "tokens", "loss")
        self.few(len(points), 6)
        values, draws, residuals, cond = fit_law(points["parameters"], points["tokens"], points["loss"])
        made = constants(values, draws)
        c = 6 * points["parameters"] * points["tokens"]
        region = {"parameters": ends(points["parameters"]), "tokens": ends(points["tokens"]), "compute": ends(c)}
        return Fitted(
            self.card.id,
            source,
            made,
            len(points),
            residuals.tolist(),
            shared_doubts(points) + fits.doubts(made, len(points), 5, cond),
            region,
            draws,
            {"rate": rate(points)},
        )

    def answer(self, fitted, options, data=None):
        import numpy as np

        c, many = {k: fitted[k] for k in NAMES}, fitted.columns()
        flops, speed = options.get("compute"), fitted.extra.get("rate")
        notes = []
        if flops is None and options.get("minutes"):
            if not speed:
                notes.append(
                    "Minutes need points with seconds: the speed of the runs turns them into FLOP. The answer is for the default budget."
                )
            else:
                flops = 60 * options["minutes"] * speed
        if flops is None:
            flops = fitted.region["compute"][1] if "compute" in fitted.region else 6 * 1e9 * 2e10
        n, d = optimum(c, flops)
        ns, ds = optimum(many, flops)
        best = loss(c, n, d)
        lows = interval(loss(many, ns, ds))
        nspan, dspan = interval(ns), interval(ds)
        text = (
            f"For {short(flops)} FLOP the lowest loss is expected at {short(n)} parameters{span(*nspan, 3)} and {short(d)} tokens"
            f"{span(*dspan, 3)}: {best:.3f} nats per token{span(*lows)}, at {d / n:.1f} tokens per parameter."
        )
        figures = {
            "compute": flops,
            "parameters": n,
            "tokens": d,
            "loss": best,
            "loss_low": lows[0],
            "loss_high": lows[1],
            "parameters_low": nspan[0],
            "parameters_high": nspan[1],
            "tokens_per_parameter": d / n,
        }
        if speed:
            figures["minutes"] = flops / speed / 60
            text += f" That takes about {duration(flops / speed)} at the speed of these runs."
        notes += beyond(fitted, compute=flops, parameters=n, tokens=d)
        given = options.get("parameters"), options.get("tokens")
        if given[0] or given[1]:
            gn, gd = given[0] or flops / (6 * given[1]), given[1] or flops / (6 * given[0])
            at, ends_ = loss(c, gn, gd), interval(loss(many, gn, gd))
            figures |= {
                "given_loss": at,
                "given_low": ends_[0],
                "given_high": ends_[1],
                "given_parameters": gn,
                "given_tokens": gd,
            }
            text += f" {short(gn)} parameters with {short(gd)} tokens: {at:.3f}{span(*ends_)}."
            notes += beyond(fitted, parameters=gn, tokens=gd)
        low, high = fitted.region.get("compute", (flops / 1e3, flops))
        xs = np.geomspace(min(low, flops) / 2, max(high, flops) * 2, 60)
        on, od = optimum({k: np.asarray(v)[:, None] for k, v in many.items()}, xs[None])
        band = np.percentile(loss({k: np.asarray(v)[:, None] for k, v in many.items()}, on, od), (2.5, 97.5), axis=0)
        series = (
            []
            if fitted.draws is None
            else [dict(name="95 % interval", kind="band", x=xs.tolist(), low=band[0].tolist(), high=band[1].tolist())]
        )
        series.append(dict(name="best split", kind="line", x=xs.tolist(), y=[float(loss(c, *optimum(c, x))) for x in xs]))
        if data is not None:
            series.append(
                dict(
                    name="runs",
                    kind="points",
                    x=(6 * data["parameters"] * data["tokens"]).tolist(),
                    y=data["loss"].tolist(),
                    labels=data.labels,
                )
            )
        series.append(dict(name="this budget", kind="mark", x=[flops], y=[float(best)], low=[lows[0]], high=[lows[1]]))
        return {
            "text": text,
            "figures": figures,
            "warnings": notes,
            "plot": {
                "x": {"title": "Compute", "unit": "FLOP", "log": True},
                "y": {"title": "Loss", "unit": "nats per token"},
                "series": series,
            },
        }


def ends(values) -> tuple[float, float]:
    """Smallest and largest."""
    return float(values.min()), float(values.max())


def rate(points) -> float | None:
    """Median of 6 N D per second of the runs; None without times."""
    import numpy as np

    seconds = points.get("seconds")
    if seconds is None:
        return None
    good = np.isfinite(seconds) & (seconds > 0)
    return float(np.median(6 * points["parameters"][good] * points["tokens"][good] / seconds[good])) if good.any() else None

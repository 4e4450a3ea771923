"""Loss of small models trained long, and what a loss means for the error downstream.

Source: "Language models scale reliably with over-training and on downstream tasks".
"""

from __future__ import annotations

from workbench.laws import history
from workbench.laws.base import Card, Column, Fitted, Option, Planner, beyond, interval, percent, short, span
from workbench.laws.chinchilla import constants, ends, shared_doubts
from workbench.laws.points import Points, positive

NAMES = ("E", "a", "b", "eta")
HELP = {
    "E": "loss that nothing removes",
    "a": "cost of many tokens for each parameter",
    "b": "cost of few tokens for each parameter",
    "eta": "how fast compute helps, the same at every ratio",
    "eps": "error of a model that knows nothing",
    "k": "error that a loss of 0 would save",
    "gamma": "how fast the error follows the loss",
}
LOW, HIGH = (-8.0, -12.0, -12.0, 0.01), (4.0, 8.0, 8.0, 1.0)


def loss(c, flops, ratio):
    """``E + (a M^eta + b M^-eta) C^-eta`` of compute and tokens per parameter."""
    return c["E"] + (c["a"] * ratio ** c["eta"] + c["b"] * ratio ** -c["eta"]) * flops ** -c["eta"]


def best_ratio(c):
    """Tokens per parameter of least loss at any compute: where both terms are equal."""
    return (c["b"] / c["a"]) ** (1 / (2 * c["eta"]))


def error_of(c, loss):
    """``eps - k exp(-gamma L)``: share of wrong answers at a loss."""
    import numpy as np

    return c["eps"] - c["k"] * np.exp(-c["gamma"] * loss)


def fit_error(losses, errors, draws: int = 200):
    """Constants eps, k, gamma and their bootstrap draws.

    Returns:
        ``(values [3], draws [d, 3])``.
    """
    import numpy as np

    from workbench.laws import fit

    losses, y = np.asarray(losses, float), np.log(np.asarray(errors, float))
    middle = losses.mean()
    low, high = (np.log(errors.max()) - 1e-9, -12.0, 0.05), (np.log(1.5 * errors.max() + 0.2), 3.0, 8.0)

    def model(t):
        value = np.exp(t[..., 0, None]) - np.exp(t[..., 1, None] - t[..., 2, None] * (losses - middle))
        return np.log(np.where(value.real > 1e-6, value, 1e-6))

    grid = np.array(
        [
            (top + 0.02 * i, k, g)
            for top in (low[0],)
            for i in range(8)
            for k in (-4.0, -2.5, -1.5, -0.7)
            for g in (0.2, 0.5, 1.0, 2.0, 3.0)
        ]
    )
    theta = fit.solve(model, y, grid, low, high, starts=12)
    many = fit.bootstrap(model, y, theta, low, high, draws=draws)

    def plain(t):
        t = np.atleast_2d(t)
        return np.column_stack([np.exp(t[:, 0]), np.exp(t[:, 1] + t[:, 2] * middle), t[:, 2]])

    return plain(theta)[0], plain(many)


class OverTraining(Planner):
    """Compute and tokens per parameter."""

    card = Card(
        id="over-training-scaling-laws",
        name="Over-training",
        title="Language models scale reliably with over-training and on downstream tasks",
        question="What does a smaller model, trained longer than is compute-optimal, cost in loss, and what error will that loss mean?",
        form="L(C, M) = E + (a M^eta + b M^-eta) C^-eta,  M = D / N,  C = 6 N D;  Err(L) = eps - k exp(-gamma L)",
        needs=(
            "losses of at least 5 runs of different compute, one of them with many more tokens per parameter than the others",
            "for the error: a column error of the same runs, at least 4",
        ),
        claims=(
            "loss of a 1.4B model over-trained 32 times was predicted from runs of 300 times less compute",
            "mean downstream error was predicted from runs of 20 times less compute",
        ),
        differs=(
            "The exponent is the same for size and for tokens, as in the paper's equation; with unequal ones use Chinchilla.",
            "The paper's constants could not be checked against its text and are not offered.",
        ),
        data="points",
        columns=(
            Column("parameters", "parameters of the model"),
            Column("tokens", "training tokens"),
            Column("loss", "final loss"),
            Column("error", "share of wrong answers downstream", required=False),
        ),
        options=(
            Option("compute", "compute budget", None, "FLOP", 1.0, 1e30),
            Option("ratio", "tokens for each parameter", None, "", 0.01, 1e7),
            Option("parameters", "size of the model", None, "parameters", 1.0, 1e15),
            Option("tokens", "training tokens", None, "tokens", 1.0, 1e17),
        ),
    )

    def from_history(self, home, query, options):
        return history.points(home, query)

    def example(self):
        import numpy as np

        rng = np.random.default_rng(5)
        flops, ratio = (a.ravel() for a in np.meshgrid(np.geomspace(1e14, 3e16, 5), (5.0, 20.0, 80.0, 320.0)))
        made = loss({"E": 1.8, "a": 110.0, "b": 270.0, "eta": 0.15}, flops, ratio) * np.exp(rng.normal(0, 0.003, len(flops)))
        wrong = error_of({"eps": 0.86, "k": 2.4, "gamma": 0.75}, made) + rng.normal(0, 0.003, len(made))
        n = np.sqrt(flops / (6 * ratio))
        return Points(
            {"parameters": n, "tokens": n * ratio, "loss": made, "error": wrong},
            [f"made {i}" for i in range(1, len(n) + 1)],
            "example",
            ["The points are synthetic: made from a known law with 0.3 % noise."],
        )

    def fit(self, data, options=None, source="points"):
        import numpy as np

        from workbench.laws import fit as fits

        points = positive(data, "parameters", "tokens", "loss")
        self.few(len(points), 5)
        c, m, y = 6 * points["parameters"] * points["tokens"], points["tokens"] / points["parameters"], np.log(points["loss"])
        x, z = np.log(c), np.log(m)
        cx, cz = x.mean(), z.mean()

        def model(t):
            e, a, b, eta = (t[..., i, None] for i in range(4))
            return fits.logsumexp(e + 0 * x, a + eta * (z - cz) - eta * (x - cx), b - eta * (z - cz) - eta * (x - cx))

        floor, middle = float(y.min()), float(np.median(y))
        grid = np.array(
            [
                (floor + e, middle + a, middle + b, eta)
                for e in np.log([0.1, 0.4, 0.6, 0.8, 0.93])
                for a in (-6, -4, -2.5, -1.3, -0.6)
                for b in (-6, -4, -2.5, -1.3, -0.6)
                for eta in (0.05, 0.1, 0.15, 0.2, 0.3, 0.45)
            ]
        )
        theta = fits.solve(model, y, grid, LOW, HIGH)
        many = fits.bootstrap(model, y, theta, LOW, HIGH)

        def plain(t):
            t = np.atleast_2d(t)
            eta = t[:, 3]
            return np.column_stack(
                [np.exp(t[:, 0]), np.exp(t[:, 1] - eta * cz + eta * cx), np.exp(t[:, 2] + eta * cz + eta * cx), eta]
            )

        made = constants(plain(theta)[0], plain(many), NAMES, HELP)
        fitted = Fitted(
            self.card.id,
            source,
            made,
            len(points),
            (np.exp(model(theta[None])[0].real - y) - 1).tolist(),
            shared_doubts(points) + fits.doubts(made, len(points), 4, fits.condition(model, theta)),
            {"compute": ends(c), "ratio": ends(m), "parameters": ends(points["parameters"]), "tokens": ends(points["tokens"])},
            plain(many),
        )
        if fits.power_of_ten(m) < 4:
            fitted.warnings.append(
                "No run is much more over-trained than the others: what many tokens for each parameter cost is a guess."
            )
        wrong = points.get("error")
        good = np.isfinite(wrong) & (wrong > 0) if wrong is not None else np.zeros(len(points), bool)
        if good.sum() >= 4:
            values, draws = fit_error(points["loss"][good], wrong[good])
            fitted.extra["error"] = {
                "constants": constants(values, draws, ("eps", "k", "gamma"), HELP),
                "draws": draws,
                "n": int(good.sum()),
            }
        return fitted

    def answer(self, fitted, options, data=None):
        import numpy as np

        c, many = {k: fitted[k] for k in NAMES}, {k: v for k, v in fitted.columns().items() if k in NAMES}
        n, d = options["parameters"], options["tokens"]
        flops, ratio = options["compute"] or (6 * n * d if n and d else None), options["ratio"] or (d / n if n and d else None)
        flops = flops or fitted.region["compute"][1]
        if ratio is None:
            ratio = flops / (6 * n * n) if n else 6 * d * d / flops if d else 10 * best_ratio(c)
        n = float(np.sqrt(flops / (6 * ratio)))
        best = best_ratio(c)
        here, ideal = loss(c, flops, ratio), loss(c, flops, best)
        draws = loss(many, flops, ratio)
        low, high = interval(draws)
        small = float(np.sqrt(best / ratio))
        text = (
            f"With {short(flops)} FLOP and {short(ratio)} tokens for each parameter ({short(n)} parameters, {short(n * ratio)} tokens) the loss should be "
            f"{here:.3f}{span(low, high)}. The best ratio, {short(best)}, gives {ideal:.3f}: the model is {short(small, 2)} times that size and costs "
            f"{here - ideal:.3f} nats per token."
        )
        figures = {
            "loss": float(here),
            "low": low,
            "high": high,
            "compute": flops,
            "ratio": float(ratio),
            "best_ratio": float(best),
            "best_loss": float(ideal),
            "parameters": n,
            "tokens": n * ratio,
        }
        wrong = fitted.extra.get("error")
        if wrong:
            at = {k.name: k.value for k in wrong["constants"]}
            both = min(len(draws), len(wrong["draws"]))
            spread = error_of({k: wrong["draws"][:both, i] for i, k in enumerate(("eps", "k", "gamma"))}, draws[:both])
            lo, hi = interval(spread)
            figures |= {"error": float(error_of(at, here)), "error_low": lo, "error_high": hi}
            text += f" That loss means {percent(float(error_of(at, here)))} wrong answers" + (
                f" ({percent(lo)} to {percent(hi)})." if lo is not None else "."
            )
        xs = np.geomspace(min(fitted.region["ratio"][0], ratio, best) / 2, max(fitted.region["ratio"][1], ratio, best) * 2, 60)
        grid = loss({k: np.asarray(v)[:, None] for k, v in many.items()}, flops, xs[None])
        band = np.percentile(grid, (2.5, 97.5), axis=0)
        series = [
            dict(name="95 % interval", kind="band", x=xs.tolist(), low=band[0].tolist(), high=band[1].tolist()),
            dict(name=f"{short(flops)} FLOP", kind="line", x=xs.tolist(), y=loss(c, flops, xs).tolist()),
        ]
        if data is not None:
            series.append(
                dict(
                    name="runs, each of its own compute",
                    kind="points",
                    x=(data["tokens"] / data["parameters"]).tolist(),
                    y=data["loss"].tolist(),
                    labels=data.labels,
                )
            )
        series.append(dict(name="this ratio", kind="mark", x=[float(ratio)], y=[float(here)], low=[low], high=[high]))
        return {
            "text": text,
            "figures": figures,
            "warnings": beyond(fitted, compute=flops, ratio=ratio),
            "plot": {
                "x": {"title": "Tokens for each parameter", "unit": "", "log": True},
                "y": {"title": "Loss", "unit": "nats per token"},
                "series": series,
            },
        }

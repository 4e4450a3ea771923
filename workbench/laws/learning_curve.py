"""Where a curve will end, seen from its beginning, and whether more training is worth it.

Source: "Modeling of learning curves with applications to pos tagging".
"""

from __future__ import annotations

from workbench.laws import history
from workbench.laws.base import Card, Column, Constant, Fitted, Option, Planner, once, percent, short
from workbench.laws.history import Curve
from workbench.laws.schedule import warm

LEAST = 4
"""Observations of the first trend."""
LEVELS = 24
"""A dense curve is averaged into so many observations."""
HOLD = 3
"""Successive trends that must agree."""


def trend(x, y, weights=None):
    """Least-squares power law ``y = c - a x^-b`` with a of either sign (a curve that falls has a below 0).

    Args:
        x: float64 [n], above 0, rising. y: float64 [n].

    Returns:
        ``(a, b, c, residual standard deviation)``; c is the horizontal asymptote.
    """
    import numpy as np

    x, y = np.asarray(x, float), np.asarray(y, float)
    w = np.ones_like(y) if weights is None else np.sqrt(np.asarray(weights, float))
    scale = x[-1]

    def linear(b):
        columns = np.column_stack([np.ones_like(x), -((x / scale) ** -b)])
        found, *_ = np.linalg.lstsq(columns * w[:, None], y * w, rcond=None)
        return found, float((((columns @ found - y) * w) ** 2).sum())

    grid = np.geomspace(0.05, 4.0, 25)
    values = [linear(b)[1] for b in grid]
    i = int(np.argmin(values))
    low, high = grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)]
    for _ in range(30):  # golden section inside the best cell
        m1, m2 = low + 0.382 * (high - low), low + 0.618 * (high - low)
        if linear(m1)[1] < linear(m2)[1]:
            high = m2
        else:
            low = m1
    b = (low + high) / 2
    found, error = linear(b)
    return float(found[1] * scale**b), float(b), float(found[0]), (error / max(1, len(x) - 3)) ** 0.5


def at(t, x):
    """Value of a trend at ``x``."""
    import numpy as np

    return t[2] - t[0] * np.asarray(x, float) ** -t[1]


def levels(x, y):
    """The trend of each beginning of the curve, from LEAST observations on: list of ``(observations, trend)``."""
    return [(i, trend(x[:i], y[:i])) for i in range(LEAST, len(x) + 1)]


def prediction_level(trends, ends) -> int | None:
    """Index of the first trend from which on the predictions of the end go one way only, or move by less than their own noise.

    Args:
        ends: what each trend predicts at the end, float [levels].
    """
    import numpy as np

    ends = np.asarray(ends, float)
    noise = np.array([t[3] for _, t in trends])
    for i in range(len(ends) - HOLD + 1):
        moves = np.diff(ends[i:])
        if len(moves) and (np.all(moves <= noise[i + 1 :]) or np.all(moves >= -noise[i + 1 :])):
            return i
    return None


def stop_level(trends, ends, tau: float) -> int | None:
    """Index of the first trend, at or after the prediction level, whose prediction of the end agrees with the HOLD - 1 before it to
    within ``tau``; None while there is none."""
    first = prediction_level(trends, ends)
    if first is None:
        return None
    for i in range(first + HOLD - 1, len(ends)):
        last = ends[i - HOLD + 1 : i + 1]
        if max(last) - min(last) <= tau:
            return i
    return None


def condense(curve: Curve, most: int = LEVELS):
    """``(x, y)`` of at most ``most`` observations: means over ranges of a dense curve, its warm-up left out."""
    import numpy as np

    x, y = np.asarray(curve.step, float), np.asarray(curve.value, float)
    if len(x) > 3 * LEAST:
        begin = (warm(curve.lr) + 1) if curve.lr is not None and len(curve.lr) else 0
        kept = x > min(begin, 0.2 * x[-1])
        x, y = x[kept], y[kept]
    good = np.isfinite(y) & (x > 0)
    x, y = x[good], y[good]
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def falling(curve: Curve) -> float | None:
    """Learning rate now over its highest; None where none is logged."""
    if curve.lr is None or not len(curve.lr) or not max(curve.lr):
        return None
    return float(curve.lr[min(len(curve.lr), int(curve.step[-1])) - 1] / max(curve.lr))


class LearningCurve(Planner):
    """The end of a curve from its beginning."""

    card = Card(
        id="learning-curve-prediction-level",
        name="Learning curve",
        title="Modeling of learning curves with applications to pos tagging",
        question="Where will this run end, and is more training worth it?",
        form="y(x) = c - a x^-b, fitted to every beginning of the curve; believed once its predictions have settled",
        needs=("one curve: losses or accuracies at rising steps or data sizes, at least 6 observations",),
        claims=("once past a prediction level, the fits converge and a threshold bounds what is still to come",),
        differs=(
            "The paper looks at the asymptotes of the fits; here the fits are compared where the run will end.",
            "Its conditions on the level were read in outline only; here it is where the predictions stop changing direction by more than noise.",
            "A falling learning rate lowers the loss beyond any power law: while it falls, the answer says so and is not final.",
        ),
        data="curves",
        columns=(
            Column("step", "steps or data size, rising"),
            Column("loss", "value at it, loss or accuracy"),
            Column("lr", "learning rate at it", required=False),
        ),
        options=(
            Option(
                "tau",
                "gain below which more training is not worth it; 0.5 % of the present value unless given",
                None,
                "",
                1e-9,
                1e6,
            ),
            Option("steps", "where the curve is to end; twice the present unless given", None, "steps", 2, 1e12),
            Option("series", "which curve of the run", "loss", choices=("loss", "loss_eval", "metric")),
        ),
    )

    def from_history(self, home, query, options):
        from engines.errors import InputError

        states = ("running", "paused", "starting", *history.ENDED)
        rows = history.select(home, query, states)
        for row in rows[:20]:
            try:
                return [history.curve(home, row["id"], options.get("series") or "loss")]
            except InputError:
                if len(rows) == 1:
                    raise
        raise InputError("runs", query or "all", "no run here has a curve of three points or more", "Train once, or give a curve")

    def from_table(self, table, options):
        import numpy as np

        order = np.argsort(table["step"])
        lr = table.get("lr")
        lr = None if lr is None else np.interp(np.arange(1, int(table["step"].max()) + 1), table["step"][order], lr[order])
        return [Curve("given curve", table["step"][order], table["loss"][order], lr, unit="", notes=list(table.notes))]

    def example(self):
        import numpy as np

        x = np.arange(20.0, 601.0, 20.0)
        return [
            Curve(
                "synthetic",
                x,
                2.0 + 6.0 * x**-0.5 + np.random.default_rng(4).normal(0, 0.004, len(x)),
                None,
                notes=["The curve is synthetic: 2.0 + 6 / sqrt(step) with noise."],
            )
        ]

    def fit(self, data, options=None, source="points"):
        import numpy as np

        curve, options = data[0], options or {}
        x, y = condense(curve)
        self.few(len(x), 6, "observations")
        end = float(options.get("steps") or curve.planned or 2 * x[-1])
        trends = levels(x, y)
        ends = [float(at(t, end)) for _, t in trends]
        tau = options.get("tau") or 0.005 * abs(float(y[-1]))
        stop, first = stop_level(trends, ends, tau), prediction_level(trends, ends)
        a, b, c, noise = trends[-1][1]
        rng, many = np.random.default_rng(0), []
        fitted_line = at(trends[-1][1], x)
        left = y - fitted_line
        for _ in range(60):
            again = trend(x, fitted_line + rng.choice(left, len(left)) * (len(x) / max(1, len(x) - 3)) ** 0.5)
            many.append(again[:3])
        many = np.array(many)
        names, help = (
            ("a", "b", "c"),
            ("size of what is still to gain", "how fast it shrinks", "value that more training approaches"),
        )
        made = [
            Constant(k, float(v), *np.percentile(many[:, i], (2.5, 97.5)).tolist(), help[i])
            for i, (k, v) in enumerate(zip(names, (a, b, c)))
        ]
        notes = list(curve.notes)
        rate = falling(curve)
        # At a constant rate, and once it has come to its end, the power law is all there is.
        going = rate is not None and rate < 0.97 and rate > 0.05
        if going:
            notes.append(
                f"The learning rate is at {percent(rate)} of its peak and falling: the loss usually drops further until it has fallen, which no "
                "power law of the curve can know. The annealing planner can."
            )
        if rate is not None and rate >= 0.97 and curve.planned:
            notes.append("The learning rate has not begun to fall: what its fall will give comes on top.")
        if first is None:
            notes.append("The predictions have not settled in one direction yet: the prediction level is not reached.")
        return Fitted(
            self.card.id,
            source,
            made,
            len(x),
            (fitted_line / y - 1).tolist(),
            notes,
            {"steps": (float(x[0]), float(x[-1]))},
            many,
            {
                "x": x,
                "y": y,
                "ends": ends,
                "levels": [i for i, _ in trends],
                "end": end,
                "tau": tau,
                "stop": stop,
                "first": first,
                "noise": noise,
                "going": going,
                "unit": curve.unit,
                "name": curve.name,
                "rate": rate,
            },
        )

    def answer(self, fitted, options, data=None):
        import numpy as np

        e = fitted.extra
        x, y, end, tau = e["x"], e["y"], e["end"], e["tau"]
        t = (fitted["a"], fitted["b"], fitted["c"])
        now, then = float(at(t, x[-1])), float(at(t, end))
        spread = fitted.draws[:, 2] - fitted.draws[:, 0] * end ** -fitted.draws[:, 1]
        low, high = (float(v) for v in np.percentile(spread, (2.5, 97.5)))
        gain = abs(then - now)
        most = max(abs(low - now), abs(high - now))
        # What could once be said must still hold: the latest predictions agree too.
        settled = e["stop"] is not None and max(e["ends"][-HOLD:]) - min(e["ends"][-HOLD:]) <= tau
        if e["going"]:
            verdict, why = "wait", "the learning rate is still falling"
        elif not settled:
            verdict, why = "wait", "the predictions have not settled"
        elif most <= tau:
            verdict, why = "stop", f"at most {short(most)} is still to come, below {short(tau)}"
        elif gain > tau:
            verdict, why = "go on", f"{short(gain)} is still to come, above {short(tau)}"
        else:
            verdict, why = "go on", f"{short(gain)} is expected, but {short(most)} is possible"
        words = {"stop": "More training is not worth it", "go on": "More training is worth it", "wait": "Too early to say"}
        text = (
            f"{words[verdict]}: {why}. {e['name']} is at {short(now, 4)} {e['unit']} after {x[-1]:,.0f} steps and should reach {short(then, 4)} "
            f"({short(low, 4)} to {short(high, 4)}) at {end:,.0f}."
        ).replace("  ", " ")
        if settled and verdict != "wait":
            n = e["levels"][e["stop"]]
            text += f" That could be said to within {short(tau)} after {x[n - 1]:,.0f} steps."
        grid = np.geomspace(x[0], end, 80)
        many = fitted.draws[:, 2:3] - fitted.draws[:, :1] * grid[None] ** -fitted.draws[:, 1:2]
        band = np.percentile(many, (2.5, 97.5), axis=0)
        series = [
            dict(name="95 % interval", kind="band", x=grid.tolist(), low=band[0].tolist(), high=band[1].tolist()),
            dict(name="power law", kind="line", x=grid.tolist(), y=at(t, grid).tolist()),
            dict(name=f"{e['name']}, logged", kind="points", x=x.tolist(), y=y.tolist(), small=True),
            dict(
                name="predicted end, from each beginning",
                kind="thin",
                x=[float(x[i - 1]) for i in e["levels"]][2:],
                y=e["ends"][2:],
            ),
            dict(name="end", kind="mark", x=[end], y=[then], low=[low], high=[high]),
        ]
        notes = []
        if end > 4 * x[-1]:
            notes.append(f"Extrapolation: the end is {short(end / x[-1], 2)} times as far as the curve goes.")
        return {
            "text": text,
            "warnings": notes,
            "figures": {
                "verdict": verdict,
                "now": now,
                "end": then,
                "low": low,
                "high": high,
                "gain": gain,
                "tau": tau,
                "steps": float(x[-1]),
                "end_steps": end,
                "settled": settled,
                "prediction_level": None if e["first"] is None else e["levels"][e["first"]],
                "stop_step": None if not settled else float(x[e["levels"][e["stop"]] - 1]),
            },
            "plot": {
                "x": {"title": "Step", "unit": ""},
                "y": {"title": "Loss" if e["unit"].startswith("nats") else "Value", "unit": e["unit"]},
                "series": series,
            },
        }


def worth(run, *, tau: float | None = None, series: str = "loss", steps: int | None = None, home=None) -> dict:
    """Whether going on is worth it, for a run that may still be on; cheap enough to ask every few seconds.

    Returns:
        ``{"verdict": "go on" | "stop" | "wait", "text", "now", "end", "low", "high", "gain", "tau", "warnings"}``; ``wait`` also while there
        are too few points.

    Raises:
        InputError, StorageError: there is no such run.
    """
    from engines.errors import InputError
    from workbench.runs import _home

    home = _home(home)
    home.store.run_id(run)
    law = LearningCurve()
    options = law.check({"tau": tau, "series": series, "steps": steps})
    try:
        curve = history.curve(home, run, series)
        fitted = law.fit([curve], options, "runs")
    except InputError as e:
        return {
            "verdict": "wait",
            "text": f"Too early to say: {e.problem}.",
            "now": None,
            "end": None,
            "low": None,
            "high": None,
            "gain": None,
            "tau": tau,
            "warnings": [],
        }
    found = law.answer(fitted, options)
    keys = ("verdict", "now", "end", "low", "high", "gain", "tau")
    return {
        **{k: found["figures"][k] for k in keys},
        "text": found["text"],
        "warnings": once(fitted.warnings + found["warnings"]),
    }

"""The loss at every step of any learning-rate schedule, from one or two logged curves.

Source: "Scaling Law with Learning Rate Annealing".
"""

from __future__ import annotations

from engines.errors import InputError
from workbench.laws import history
from workbench.laws.base import Card, Column, Constant, Fitted, Option, Planner, interval, percent, short, span
from workbench.laws.history import Curve
from workbench.laws.schedule import KINDS, Schedule, areas, warm

NAMES = ("L0", "A", "alpha", "C")
DECAYS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Values of lambda that are tried; the paper uses 0.99 to 0.999 for runs of tens of thousands of steps."""
DEFAULT_DECAY = 0.99
MEMORY = 0.03
"""Least memory of lambda, 1 / (1 - lambda), as a share of the longest curve: below it every fall of the rate would act at once."""
SLACK = 0.08
"""Values of lambda whose error is that close to the best fit alike."""
BINS = 120
SKIP = 0.1
"""Share of a curve, at its beginning and besides the warm-up, that is left out of the fit."""


def binned(curve: Curve, decay: float, bins: int = BINS):
    """``(S1, S2, loss, step)`` averaged over ranges of steps after the warm-up; float64 [<= bins] each."""
    import numpy as np

    s1, s2 = areas(curve.lr, decay)
    at = np.clip(curve.step.astype(int) - 1, 0, len(s1) - 1)
    begin = max(warm(curve.lr) + 1, int(SKIP * len(curve.lr)))
    kept = at >= begin
    if kept.sum() < 10:
        raise InputError("runs", curve.name, f"only {int(kept.sum())} points lie behind the warm-up", "Choose a longer run")
    at, loss, step = at[kept], curve.value[kept], curve.step[kept]
    parts = np.array_split(np.arange(len(at)), min(bins, max(8, len(at) // 4)))
    mean = lambda a: np.array([a[p].mean() for p in parts])  # noqa: E731
    return mean(s1[at]), mean(s2[at]), mean(loss), mean(step)


def predict(c, lr, decay: float):
    """Loss after each step of a learning rate, float64 [steps]; constants as floats."""
    s1, s2 = areas(lr, decay)
    return c["L0"] + c["A"] * s1 ** -c["alpha"] - c["C"] * s2


class Annealing(Planner):
    """Loss under a schedule."""

    card = Card(
        id="lr-annealing-scaling-law",
        name="Learning-rate annealing",
        title="Scaling Law with Learning Rate Annealing",
        question="What would another learning-rate schedule, or another number of steps, have given?",
        form="L(s) = L0 + A S1^-alpha - C S2,  S1 = sum of lr,  S2 = sum of m,  m = lambda m + (fall of lr)",
        needs=(
            "one or two logged loss curves of the same model, data and batch, better one with a constant and one with a falling learning rate",
            "the learning rate of each step, which every run here logs",
        ),
        claims=(
            "one or two curves predict the loss at any step of any schedule",
            "less than 1 % of the compute of a Chinchilla fit",
        ),
        differs=(
            "lambda is 0.99, the paper's least, unless another value fits clearly better; where several fit alike the intervals cover them.",
            "The warm-up is left out of S2, and with it the first steps of each curve are left out of the fit.",
            "The equation and the fitting recipe were checked against an independent implementation, not against the paper.",
        ),
        data="curves",
        columns=(
            Column("step", "optimizer step, from 1"),
            Column("loss", "training loss at it"),
            Column("lr", "learning rate at it"),
        ),
        options=(
            Option("schedule", "planned schedule", "cosine", choices=(*KINDS, "best")),
            Option("steps", "planned optimizer steps", None, "steps", 10, 10_000_000, whole=True),
            Option("peak", "highest learning rate; that of the curves unless given", None, "", 1e-9, 10.0),
            Option("warmup", "share of the steps", 0.03, "", 0.0, 0.9),
            Option("final", "learning rate at the end as a share of the peak", 0.0, "", 0.0, 1.0),
            Option("decay", "share of the steps in which WSD falls", 0.2, "", 0.01, 1.0),
            Option("lambda", "forgetting of the annealing momentum; chosen by the fit unless given", None, "", 0.0, 0.99999),
        ),
    )

    def from_history(self, home, query, options):
        return history.curves(home, query, most=2)

    def from_table(self, table, options):
        import numpy as np

        groups = table.groups or ["curve"] * len(table)
        made = []
        for name in dict.fromkeys(groups):
            part = table.keep([g == name for g in groups])
            order = np.argsort(part["step"])
            step, loss, lr = (part[k][order] for k in ("step", "loss", "lr"))
            made.append(Curve(name, step, loss, np.interp(np.arange(1, int(step[-1]) + 1), step, lr)))
        return made

    def example(self):
        import numpy as np

        rng, made = np.random.default_rng(1), []
        for kind in ("constant", "cosine"):
            lr = Schedule(kind, 600, 2e-3).rates()
            loss = predict({"L0": 2.1, "A": 0.9, "alpha": 0.45, "C": 2.5}, lr, 0.99) * np.exp(rng.normal(0, 0.01, len(lr)))
            made.append(
                Curve(
                    f"synthetic {kind}",
                    np.arange(1.0, 601),
                    loss,
                    lr,
                    notes=["The curves are synthetic: made from known constants."],
                )
            )
        return made

    def fit(self, data, options=None, source="points"):
        import numpy as np

        from workbench.laws import fit as fits

        curves = [c for c in data if c.lr is not None]
        if not curves:
            raise InputError("points", len(data), "no curve has learning rates", "Give the column lr beside step and loss")
        given = (options or {}).get("lambda")
        peak = max(float(c.lr.max()) for c in curves)
        longest = max(len(c.lr) for c in curves)
        tried = (
            (given,)
            if given is not None
            else [d for d in DECAYS if MEMORY * longest <= 1 / (1 - d) <= longest] or (DEFAULT_DECAY,)
        )
        scored, flat = {}, True
        for decay in tried:
            s1, s2, loss, _ = (np.concatenate(a) for a in zip(*(binned(c, decay) for c in curves)))
            start, error, level = self._start(s1 / peak, s2 / peak, loss)
            scored[decay], flat = (start, error), flat and level
        best = min(scored, key=lambda d: scored[d][1])
        fitting = [d for d in scored if scored[d][1] <= (1 + SLACK) * scored[best][1]]
        if flat:
            fitting = [DEFAULT_DECAY] if given is None else [given]
        decay = min(fitting, key=lambda d: abs(np.log((1 - d) / (1 - DEFAULT_DECAY))))
        # A smooth schedule hardly tells lambda: each value that fits has its part of the bootstrap, so that intervals know of it.
        parts = {
            d: self._solve(curves, d, peak, scored.get(d, scored[best])[0], flat, max(40, 200 // len(fitting))) for d in fitting
        }
        values, _, y, residuals = parts[decay]
        own, many = parts[decay][1], np.concatenate([parts[d][1] for d in fitting])
        lambdas = np.concatenate([np.full(len(parts[d][1]), d) for d in fitting])
        help = (
            "loss that no amount of training removes",
            "weight of the area under the learning rate",
            "how fast that area helps",
            "what annealing gives back",
        )
        made = [Constant(n, float(v), *interval(own[:, i]), help[i]) for i, (n, v) in enumerate(zip(NAMES, values))]
        notes = [n for c in curves for n in c.notes]
        if flat:
            made[3] = Constant("C", 0.0, help=help[3])
            notes.append(
                "No curve has a falling learning rate: what annealing gives cannot be known, and every schedule that falls is predicted too "
                "high. Add one curve with a cosine schedule."
            )
        elif len(curves) == 1:
            notes.append(
                "One curve: falling learning rate and passing steps are hard to tell apart. A second curve with another schedule helps most."
            )
        if len(fitting) > 1:
            notes.append(
                "lambda is not determined: "
                + ", ".join(f"{d:g}" for d in fitting)
                + f" fit alike. {decay:g} is used, and the intervals cover "
                "the others; a curve with a sharp fall, such as WSD, would tell."
            )
        fitted = Fitted(
            self.card.id,
            source,
            made,
            len(y),
            residuals.tolist(),
            notes,
            {"steps": (1.0, float(max(len(c.lr) for c in curves))), "peak": (min(float(c.lr.max()) for c in curves), peak)},
            many,
            {
                "lambda": decay,
                "lambdas": lambdas,
                "peak": peak,
                "unit": curves[0].unit,
                "warmup": warm(curves[0].lr) / len(curves[0].lr),
                "flat": flat,
            },
        )
        fitted.warnings += fits.doubts(made, len(y), 4, 0.0) + self._apart(curves, decay, values)
        return fitted

    @staticmethod
    def _apart(curves, decay, values) -> list[str]:
        """A warning when one law does not serve all curves."""
        import numpy as np

        off = {}
        for c in curves:
            s1, s2, loss, _ = binned(c, decay)
            said = values[0] + values[1] * s1 ** -values[2] - values[3] * s2
            off[c.name] = float(np.median(said / loss) - 1)
        if len(off) < 2 or max(off.values()) - min(off.values()) < 0.02:
            return []
        words = ", ".join(f"{percent(v)} for {k}" for k, v in off.items())
        return [
            f"One law does not serve these curves: the fit is off by {words}. They must be of one model, data and batch."
        ]

    @staticmethod
    def _solve(curves, decay, peak, start, flat, draws):
        """Constants at one lambda: ``(values [4], bootstrap [draws, 4], log losses, relative errors)``."""
        import numpy as np

        from workbench.laws import fit as fits

        s1, s2, loss, _ = (np.concatenate(a) for a in zip(*(binned(c, decay) for c in curves)))
        x, z, y = np.log(s1 / peak), s2 / peak, np.log(loss)
        cx = x.mean()

        def model(t):
            value = np.exp(t[..., 0, None]) + np.exp(t[..., 1, None] - t[..., 2, None] * (x - cx)) - t[..., 3, None] * z
            return np.log(np.where(value.real > 1e-6, value, 1e-6))

        low, high = (
            (-14.0, -14.0, 0.02, 0.0),
            (np.log(loss.max()), np.log(10 * loss.max()), 3.0, 0.0 if flat else float(loss.max() / max(z.max(), 1e-12))),
        )
        first = np.array([np.log(max(start[0], 1e-5)), np.log(max(start[1], 1e-6)) - start[2] * cx, start[2], start[3]])
        grid = np.array([first + (dl, da, dp, 0.0) for dl in (0.0, -0.05, -0.2) for da in (0.0, 0.3) for dp in (0.0, 0.1, -0.1)])
        theta = fits.solve(model, y, grid, low, high, starts=3, iterations=150)
        # Neighbours on a curve err alike: whole stretches are resampled.
        many = fits.bootstrap(model, y, theta, low, high, block=max(2, len(y) // 16), draws=draws)

        def plain(t):
            t = np.atleast_2d(t)
            return np.column_stack([np.exp(t[:, 0]), np.exp(t[:, 1] + t[:, 2] * cx) * peak ** t[:, 2], t[:, 2], t[:, 3] / peak])

        return plain(theta)[0], plain(many), y, np.exp(model(theta[None])[0].real - y) - 1

    @staticmethod
    def _start(s1, s2, loss):
        """Best linear fit over alpha: ``((L0, A, alpha, C), relative error, C not determined)``."""
        import numpy as np
        from scipy.optimize import nnls

        best, flat = None, bool(np.ptp(s2) < 1e-6 * np.ptp(s1))
        for alpha in np.linspace(0.05, 1.5, 30):
            columns = np.column_stack([np.ones_like(s1), s1**-alpha, *([] if flat else [-s2])]) / loss[:, None]
            found, error = nnls(columns, np.ones_like(loss))
            if best is None or error < best[1]:
                best = (found[0], found[1], alpha, 0.0 if flat else found[2]), float(error)
        return best[0], best[1], flat

    # -- answers -------------------------------------------------------------------------------------------------------
    def forecast(self, fitted: Fitted, plan: Schedule, most: int = 120):
        """What a schedule will give.

        Returns:
            ``(loss at each step [steps], losses of at most ``most`` bootstrap draws [draws, k], the k indices of their steps)``.
        """
        import numpy as np

        lr = plan.rates()
        line = predict({k: fitted[k] for k in NAMES}, lr, fitted.extra["lambda"])
        at = np.unique(np.linspace(0, len(lr) - 1, 160).astype(int))
        step = max(1, -(-len(fitted.draws) // most))
        draws, lambdas = fitted.draws[::step], fitted.extra["lambdas"][::step]
        many = np.empty((len(draws), len(at)))
        for decay in np.unique(lambdas):
            rows = lambdas == decay
            s1, s2 = areas(lr, decay)
            l0, a, alpha, c = (draws[rows, i, None] for i in range(4))
            many[rows] = l0 + a * s1[at] ** -alpha - c * s2[at]
        return line, many, at

    def recommend(self, fitted: Fitted, steps: int, peak: float, warmup: float = 0.03, final: float = 0.0) -> list[dict]:
        """Schedules of one length ranked by their predicted final loss, each with the share of bootstrap draws in which it is the best."""
        import numpy as np

        plans = [Schedule(k, steps, peak, warmup, final) for k in ("cosine", "linear", "constant")]
        plans += [Schedule("wsd", steps, peak, warmup, final, d) for d in (0.1, 0.2, 0.3, 0.5)]
        rows, ends = [], []
        for plan in plans:
            line, many, _ = self.forecast(fitted, plan)
            low, high = interval(many[:, -1])
            ends.append(many[:, -1])
            rows.append(
                {
                    "schedule": plan.kind,
                    "decay": plan.decay if plan.kind == "wsd" else None,
                    "words": plan.words,
                    "loss": float(line[-1]),
                    "low": low,
                    "high": high,
                }
            )
        wins = np.bincount(np.argmin(np.array(ends), axis=0), minlength=len(rows)) / len(ends[0])
        for row, share in zip(rows, wins):
            row["best_share"] = float(share)
        return sorted(rows, key=lambda r: r["loss"])

    def answer(self, fitted, options, data=None):
        import numpy as np

        steps = options["steps"] or int(fitted.region["steps"][1])
        peak = options["peak"] or fitted.extra["peak"]
        ranked = self.recommend(fitted, steps, peak, options["warmup"], options["final"])
        kind = options["schedule"]
        best = ranked[0]
        plan = Schedule(
            best["schedule"] if kind == "best" else kind,
            steps,
            peak,
            options["warmup"],
            options["final"],
            (best["decay"] or 0.2) if kind == "best" else options["decay"],
        )
        line, many, at = self.forecast(fitted, plan)
        low, high = interval(many[:, -1])
        unit = fitted.extra.get("unit", "nats")
        text = (
            f"{plan.words[0].upper() + plan.words[1:]} over {steps:,} steps with a peak of {peak:.3g} should end at {line[-1]:.3f} {unit}"
            f"{span(low, high)}."
        )
        if best["loss"] < line[-1] - 1e-9:
            text += (
                f" Of seven schedules of that length {best['words']} comes out lowest: {best['loss']:.3f}, best in "
                f"{percent(best['best_share'])} of the refits."
            )
        else:
            text += f" None of seven schedules of that length comes out lower; this one is best in {percent(best['best_share'])} of the refits."
        notes = []
        if steps > 1.5 * fitted.region["steps"][1]:
            notes.append(
                f"Extrapolation: {steps:,} steps are {short(steps / fitted.region['steps'][1], 2)} times the longest curve."
            )
        if not fitted.region["peak"][0] / 1.5 <= peak <= fitted.region["peak"][1] * 1.5:
            notes.append(
                f"Extrapolation: the peak of {peak:.3g} lies outside of the curves' ({fitted.region['peak'][0]:.3g} to "
                f"{fitted.region['peak'][1]:.3g}); the law does not know when training becomes unstable."
            )
        band = np.percentile(many, (2.5, 97.5), axis=0)
        begin = int(np.searchsorted(at, max(warm(plan.rates()) + 1, SKIP * steps)))
        series = []
        if fitted.draws is not None:
            series.append(
                dict(
                    name="95 % interval",
                    kind="band",
                    x=(at[begin:] + 1).tolist(),
                    low=band[0][begin:].tolist(),
                    high=band[1][begin:].tolist(),
                )
            )
        series.append(dict(name=f"planned: {plan.words}", kind="line", x=(at[begin:] + 1).tolist(), y=line[at[begin:]].tolist()))
        for curve in data or ():
            s1, s2, loss, step = binned(curve, fitted.extra["lambda"])
            own = fitted["L0"] + fitted["A"] * s1 ** -fitted["alpha"] - fitted["C"] * s2
            series.append(dict(name=f"{curve.name}, logged", kind="points", x=step.tolist(), y=loss.tolist(), small=True))
            series.append(dict(name=f"{curve.name}, fitted", kind="thin", x=step.tolist(), y=own.tolist()))
        series.append(dict(name="end of the plan", kind="mark", x=[steps], y=[float(line[-1])], low=[low], high=[high]))
        return {
            "text": text,
            "warnings": notes,
            "figures": {
                "loss": float(line[-1]),
                "low": low,
                "high": high,
                "steps": steps,
                "peak": peak,
                "schedule": plan.kind,
                "lambda": fitted.extra["lambda"],
                "error": fitted.error,
                "ranked": ranked,
            },
            "plot": {"x": {"title": "Step", "unit": ""}, "y": {"title": "Training loss", "unit": unit}, "series": series},
        }

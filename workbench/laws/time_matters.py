"""Seconds of a training step from the elements that it reads and writes, and loss as a function of shape and seconds.

Source: "Time Matters: Scaling Laws for Any Budget". The paper's terms could not be read; the counts below were written anew for a
decoder as this workbench trains it, in the paper's spirit: what is moved in memory predicts time better than what is multiplied.
"""

from __future__ import annotations

from workbench.laws import history
from workbench.laws.base import Card, Column, Constant, Fitted, Option, Planner, duration, interval, percent, short
from workbench.laws.points import Points, positive

NEED = ("step_seconds", "layers", "hidden", "mlp", "heads", "batch", "length")
OPTIMIZER_PASSES = 12.0
"""Reads and writes of each trained weight in a step besides the forward and backward products: gradient written and read, its norm
and clipping, AdamW's four reads and three writes, and the gradient set to zero."""
GRID_WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768)
GRID_LAYERS = (1, 2, 3, 4, 6, 8, 12, 16)


def weights_of(layers, hidden, mlp, vocab, kv=1.0):
    """Parameters of a decoder with tied embeddings and a gated MLP; ``kv`` is key and value heads over query heads."""
    return layers * (2 * hidden * hidden * (1 + kv) + 3 * hidden * mlp) + vocab * hidden


def copies(p):
    """Elements read and written in one training step.

    Args:
        p: mapping with layers, hidden, mlp, heads, batch (rows of a step), length, vocab; optional parameters, trainable, kv_heads.
            Floats or float64 arrays of one shape.

    Returns:
        ``{"weights", "activations", "scores"}``, elements: the weights with gradients and optimizer; each token's activations in blocks
        and logits; attention scores, which grow with the square of the length.
    """
    import numpy as np

    layers, d, f, heads, vocab = (np.asarray(p[k], float) for k in ("layers", "hidden", "mlp", "heads", "vocab"))
    tokens = np.asarray(p["batch"], float) * p["length"]
    kv = fill(p.get("kv_heads"), heads) / heads
    n = fill(p.get("parameters"), weights_of(layers, d, f, vocab, kv))
    trained = fill(p.get("trainable"), n)
    # forward: inputs and outputs of the seven products, two norms, rotations, two additions, the gated activation
    block = (4 * d + 2 * d * (1 + kv)) + (3 * d + 3 * f) + 4 * d + 2 * d * (1 + kv) + 6 * d + 4 * f
    return {
        "weights": 2 * n + OPTIMIZER_PASSES * trained,
        "activations": tokens * (3 * layers * block + 8 * vocab + 6 * d),
        "scores": 6 * layers * np.asarray(p["batch"], float) * heads * np.asarray(p["length"], float) ** 2,
    }


def fill(value, other):
    """``value`` where it is a positive number, else ``other``."""
    import numpy as np

    if value is None:
        return other
    value = np.asarray(value, float)
    return np.where(np.isfinite(value) & (value > 0), value, other)


def flops(p):
    """Floating-point operations of one training step, 6 N tokens and the attention products."""
    import numpy as np

    n = fill(p.get("parameters"), weights_of(p["layers"], p["hidden"], p["mlp"], p["vocab"]))
    tokens = np.asarray(p["batch"], float) * p["length"]
    return 6.0 * n * tokens + 6.0 * p["layers"] * tokens * p["length"] * p["hidden"]


def regress(columns, seconds):
    """Coefficients of at least 0 that minimise relative squared errors of ``columns @ coefficients``, float64 [k]."""
    import numpy as np
    from scipy.optimize import nnls

    scale = columns.max(axis=0)
    return nnls(columns / scale / seconds[:, None], np.ones_like(seconds))[0] / scale


def designs(p) -> dict:
    """Columns of each regression: the sum of all copies, weights and activations apart, copies beside FLOPs, and FLOPs alone for
    comparison; each with a constant."""
    import numpy as np

    c, work = copies(p), flops(p)
    moved = c["activations"] + c["scores"]
    all_of = c["weights"] + moved
    one, weights = np.ones_like(all_of), c["weights"] + 0 * moved
    return {
        "copies": np.column_stack([one, all_of]),
        "weights and activations": np.column_stack([one, weights, moved]),
        "copies and FLOPs": np.column_stack([one, all_of, work]),
        "FLOPs": np.column_stack([one, work]),
    }


def left_out(columns, seconds):
    """Relative error of each point when it is predicted by the others, float64 [n]."""
    import numpy as np

    errors = []
    for i in range(len(seconds)):
        rest = np.arange(len(seconds)) != i
        errors.append(columns[i] @ regress(columns[rest], seconds[rest]) / seconds[i] - 1)
    return np.array(errors)


class TimeMatters(Planner):
    """Step time by memory copies."""

    card = Card(
        id="time-matters",
        name="Time matters",
        title="Time Matters: Scaling Laws for Any Budget",
        question="How long will a step of this shape take here, and which shape has the lowest loss after so many seconds?",
        form="step = c0 + c1 (elements read and written) [+ c2 FLOPs];  L(N, D = tokens per step x seconds / step)",
        needs=("step times of at least 5 runs of different shape or batch on this machine",),
        claims=(
            "memory copies predict time where FLOPs do not, over 1,535 decoders",
            "wider and shallower models win when time is the budget",
        ),
        differs=(
            "The counts are ours, reconstructed from the abstract: the paper's terms could not be read.",
            "Weights and activations may have a coefficient each, or FLOPs one beside the copies (a CPU multiplies slowly enough for that); "
            "the errors on runs that are left out decide.",
            "Loss from shape and seconds goes through Chinchilla's law, with the paper's constants unless the points determine others.",
        ),
        data="points",
        columns=tuple(
            Column(n, h)
            for n, h in (
                ("step_seconds", "seconds of one step"),
                ("layers", "blocks"),
                ("hidden", "width"),
                ("mlp", "width of the MLP"),
                ("heads", "attention heads"),
                ("batch", "rows of a step"),
                ("length", "tokens of a row"),
            )
        )
        + tuple(
            Column(n, h, False)
            for n, h in (
                ("vocab", "vocabulary"),
                ("parameters", "parameters"),
                ("trainable", "trained parameters"),
                ("kv_heads", "key and value heads"),
                ("tokens", "training tokens"),
                ("loss", "final loss"),
            )
        ),
        options=(
            Option("seconds", "time to train", 600.0, "s", 0.01, 1e9),
            Option("layers", "blocks", 4, "", 1, 1000, whole=True),
            Option("hidden", "width", 256, "", 8, 100_000, whole=True),
            Option("mlp", "width of the MLP; 8/3 of the width unless given", None, "", 8, 400_000, whole=True),
            Option("batch", "rows of a step", 8, "", 1, 100_000, whole=True),
            Option("length", "tokens of a row", 128, "", 1, 1_000_000, whole=True),
            Option("vocab", "vocabulary", 2048, "", 2, 1_000_000, whole=True),
        ),
    )

    def from_history(self, home, query, options):
        return history.points(home, query, need=("step_seconds", "layers", "hidden", "mlp", "heads", "batch", "length"))

    def example(self):
        import numpy as np

        rng = np.random.default_rng(2)
        rows = [
            (layers, d, b, s)
            for layers, d in ((2, 64), (4, 128), (8, 128), (2, 256), (6, 256), (4, 384))
            for b, s in ((4, 128), (16, 64))
        ]
        layers, d, b, s = (np.array(c, float) for c in zip(*rows))
        p = {
            "layers": layers,
            "hidden": d,
            "mlp": np.round(8 * d / 3),
            "heads": d / 32,
            "batch": b,
            "length": s,
            "vocab": np.full(len(d), 2048.0),
        }
        c = copies(p)
        seconds = (0.004 + 6e-10 * c["weights"] + 9e-10 * (c["activations"] + c["scores"])) * np.exp(rng.normal(0, 0.03, len(d)))
        return Points(
            {"step_seconds": seconds, **p},
            [f"made {int(a)} x {int(w)}" for a, w in zip(layers, d)],
            "example",
            ["The points are synthetic: made from known coefficients with 3 % noise."],
        )

    def fit(self, data, options=None, source="points"):
        import numpy as np

        points = positive(data, *NEED)
        self.few(len(points), 5)
        p = {**points.columns}
        p["vocab"] = fill(p.get("vocab"), np.full(len(points), 0.0))
        seconds = points["step_seconds"]
        tried = designs(p)
        spare = {name: np.median(np.abs(left_out(x, seconds))) for name, x in tried.items()}
        # A second coefficient must earn its place: with few points the simple count extrapolates better.
        name = "copies"
        for other in ("weights and activations", "copies and FLOPs"):
            if len(points) >= 6 and spare[other] < 0.9 * spare[name]:
                name = other
        x = tried[name]
        values = regress(x, seconds)
        rng, draws = np.random.default_rng(0), []
        for _ in range(200):
            pick = rng.integers(0, len(seconds), len(seconds))
            if len(set(pick)) > x.shape[1]:
                draws.append(regress(x[pick], seconds[pick]))
        draws = np.array(draws)
        per = "seconds for each "
        help = {
            "copies": ("element moved",),
            "weights and activations": ("element of weights", "element of activations"),
            "copies and FLOPs": ("element moved", "floating-point operation"),
        }[name]
        help = ("seconds that every step takes", *(per + h for h in help))
        labels = tuple(f"c{i}" for i in range(len(help)))
        made = [Constant(k, float(v), *interval(draws[:, i]), help[i]) for i, (k, v) in enumerate(zip(labels, values))]
        notes = list(points.notes)
        if len(points) < 8:
            notes.append(f"{len(points)} points: the error on runs that are left out is itself uncertain below about 8.")
        if min(spare["copies"], spare["weights and activations"]) > spare["FLOPs"]:
            notes.append(
                f"On this machine FLOPs alone predict better than copies alone, {percent(spare['FLOPs'])} against {percent(spare['copies'])} on runs "
                "left out, contrary to the paper's claim."
            )
        c = copies(p)
        extra = {"design": name, "left_out": {k: float(v) for k, v in spare.items()}}
        if points.get("loss") is not None and points.get("tokens") is not None:
            extra["law"] = self._law(points)
        return Fitted(
            self.card.id,
            source,
            made,
            len(points),
            (x @ values / seconds - 1).tolist(),
            notes,
            {"copies": (float(sum(c.values()).min()), float(sum(c.values()).max()))},
            draws,
            extra,
        )

    @staticmethod
    def _law(points) -> dict | None:
        """Chinchilla's constants of the same runs, where they can be had."""
        import numpy as np

        from workbench.laws.chinchilla import NAMES, fit_law
        from workbench.laws.fit import power_of_ten

        if points.get("parameters") is None:
            return None
        good = np.all([np.isfinite(points[k]) & (points[k] > 0) for k in ("parameters", "tokens", "loss")], axis=0)
        if good.sum() < 8 or power_of_ten(points["parameters"][good]) < 4 or power_of_ten(points["tokens"][good]) < 4:
            return None
        return dict(zip(NAMES, map(float, fit_law(*(points[k][good] for k in ("parameters", "tokens", "loss")), draws=1)[0])))

    def step(self, fitted: Fitted, p: dict):
        """Seconds of a step of each shape: the value and the bootstrap's, float64 [n] and [draws, n]."""
        import numpy as np

        x = designs({k: np.atleast_1d(np.asarray(v, float)) for k, v in p.items()})[fitted.extra["design"]]
        return x @ np.array([c.value for c in fitted.constants]), fitted.draws @ x.T

    def answer(self, fitted, options, data=None):
        import numpy as np

        from workbench.laws.chinchilla import PUBLISHED, loss

        law, own = (fitted.extra.get("law") or PUBLISHED), bool(fitted.extra.get("law"))
        d = options["hidden"]
        shape = {
            "layers": options["layers"],
            "hidden": d,
            "mlp": options["mlp"] or round(8 * d / 3),
            "heads": max(1, d // 32),
            "batch": options["batch"],
            "length": options["length"],
            "vocab": options["vocab"],
        }
        value, many = self.step(fitted, shape)
        low, high = interval(many[:, 0])
        tokens = options["batch"] * options["length"]
        total = options["seconds"] * tokens / value[0]
        n = float(weights_of(shape["layers"], d, shape["mlp"], shape["vocab"]))
        here = float(loss(law, n, total))
        grid = [(a, w) for a in GRID_LAYERS for w in GRID_WIDTHS]
        shapes = {
            "layers": [g[0] for g in grid],
            "hidden": [g[1] for g in grid],
            "mlp": [round(8 * g[1] / 3) for g in grid],
            "heads": [max(1, g[1] // 32) for g in grid],
            **{k: [options[k]] * len(grid) for k in ("batch", "length", "vocab")},
        }
        times, _ = self.step(fitted, shapes)
        sizes = np.array([weights_of(a, w, m, options["vocab"]) for (a, w), m in zip(grid, shapes["mlp"])])
        losses = loss(law, sizes, options["seconds"] * tokens / times)
        order = np.argsort(losses)
        rows = [
            {
                "layers": grid[i][0],
                "hidden": grid[i][1],
                "parameters": float(sizes[i]),
                "step_seconds": float(times[i]),
                "tokens": float(options["seconds"] * tokens / times[i]),
                "loss": float(losses[i]),
            }
            for i in order[:6]
        ]
        best, errors = rows[0], fitted.extra["left_out"]
        text = (
            f"A step of {shape['layers']} blocks of width {d} with {options['batch']} rows of {options['length']} tokens takes {1e3 * value[0]:.1f} ms"
            + (f" ({1e3 * low:.1f} to {1e3 * high:.1f})" if low is not None else "")
            + f"; in {duration(options['seconds'])} it sees {short(total)} tokens"
            + (f" and reaches a loss of about {here:.2f}" if own else "")
            + f". Of {len(grid)} shapes, {best['layers']} {'block' if best['layers'] == 1 else 'blocks'} of width {best['hidden']} "
            + (f"is predicted best: {best['loss']:.2f}." if own else "is predicted to have the lowest loss by then.")
        )
        notes = (
            [] if own else ["The losses use Chinchilla's published constants: their order says something, their values do not."]
        )
        c = float(sum(v for v in copies(shape).values()))
        ends = fitted.region["copies"]
        if not ends[0] / 1.5 <= c <= ends[1] * 1.5:
            notes.append(
                f"Extrapolation: this shape moves {short(c)} elements a step, the points {short(ends[0])} to {short(ends[1])}."
            )
        best_copies = float(
            sum(
                copies(
                    {
                        **shape,
                        "layers": best["layers"],
                        "hidden": best["hidden"],
                        "mlp": round(8 * best["hidden"] / 3),
                        "heads": max(1, best["hidden"] // 32),
                    }
                ).values()
            )
        )
        if not ends[0] / 1.5 <= best_copies <= ends[1] * 1.5:
            notes.append("Extrapolation: the best shape lies outside of the range of the points.")
        notes.append(
            f"Error on runs left out: {percent(errors[fitted.extra['design']])} by {fitted.extra['design']}, {percent(errors['FLOPs'])} by FLOPs alone (medians)."
        )
        series = []
        if data is not None:
            kept = positive(data, *NEED)
            measured = kept["step_seconds"] * 1e3
            fitted_ms = measured * (1 + np.array(fitted.residuals)) if len(fitted.residuals) == len(measured) else measured
            reach = [float(min(measured.min(), fitted_ms.min())), float(max(measured.max(), fitted_ms.max()))]
            series = [
                dict(name="equal", kind="thin", x=reach, y=reach),
                dict(name="runs", kind="points", x=measured.tolist(), y=fitted_ms.tolist(), labels=kept.labels),
            ]
        series.append(
            dict(
                name="this shape",
                kind="mark",
                x=[1e3 * float(value[0])],
                y=[1e3 * float(value[0])],
                low=[None if low is None else 1e3 * low],
                high=[None if high is None else 1e3 * high],
            )
        )
        return {
            "text": text,
            "warnings": notes,
            "figures": {
                "step_seconds": float(value[0]),
                "low": low,
                "high": high,
                "tokens": float(total),
                "loss": here,
                "parameters": n,
                "best": rows,
                "left_out": errors,
                "design": fitted.extra["design"],
            },
            "plot": {
                "x": {"title": "Measured", "unit": "ms a step", "log": True},
                "y": {"title": "Fitted", "unit": "ms a step", "log": True},
                "series": series,
            },
        }

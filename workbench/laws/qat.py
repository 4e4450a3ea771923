"""How to split training between full precision and quantization-aware training, and how many bits to choose.

Source: "Compute-Optimal Quantization-Aware Training".
"""

from __future__ import annotations

from workbench.laws import history
from workbench.laws.base import Card, Column, Constant, Fitted, Option, Planner, beyond, interval, percent, short, span
from workbench.laws.chinchilla import ends
from workbench.laws.points import Points, positive

SHARE = 6.7297
"""The paper's constant of the optimal share: f = exp(-a / ln S)."""
NAMES = ("E", "A", "B", "alpha", "beta", "theta", "kappa", "phi", "chi", "psi", "omega", "lambda", "mu", "nu", "xi", "rho")
LOGS = (0, 1, 2, 5, 7, 11)
"""Constants that are fitted as logarithms."""
HELP = {
    "E": "loss that nothing removes",
    "theta": "loss that the bit width costs for ever",
    "phi": "cost of too few QAT tokens",
    "lambda": "cost of too little of either phase",
}
MAIN = ("E", "A", "B", "alpha", "beta")
LOW = (-4.0, -6.0, -6.0, 0.05, 0.05, -9.0, 0.05, -9.0, 0.0, 0.0, 0.05, -9.0, 0.0, 0.0, 0.02, 0.02)
HIGH = (3.0, 4.0, 4.0, 1.5, 1.5, 4.0, 3.0, 6.0, 3.0, 1.0, 2.0, 6.0, 3.0, 1.0, 2.0, 2.0)
BITS = (1, 2, 3, 4, 6, 8)


def density(tokens, parameters, bits):
    """Tokens for each byte of quantized parameters, S."""
    return tokens / (parameters * bits / 8)


def best_share(s, a: float = SHARE):
    """Optimal share of the tokens for QAT at a total of S tokens per parameter byte: ``exp(-a / ln S)``; 0 where S <= 1."""
    import numpy as np

    s = np.asarray(s, float)
    return np.where(s > 1, np.exp(-a / np.log(np.where(s > 1, s, 2.0))), 0.0)


def penalty(c, n, fp, qat, bits):
    """What quantization costs in loss.

    ``theta 2^(-kappa b) + phi 2^(-chi b) / (N^psi Sqat^omega) + lambda 2^(-mu b) / (N^nu Sfp^xi Sqat^rho)``
    """
    sq, sf = density(qat, n, bits), density(fp, n, bits)
    return (
        c["theta"] * 2.0 ** (-c["kappa"] * bits)
        + c["phi"] * 2.0 ** (-c["chi"] * bits) / (n ** c["psi"] * sq ** c["omega"])
        + c["lambda"] * 2.0 ** (-c["mu"] * bits) / (n ** c["nu"] * sf ** c["xi"] * sq ** c["rho"])
    )


def loss(c, n, fp, qat, bits):
    """Loss of N parameters after ``fp`` tokens in full precision and ``qat`` tokens of QAT at ``bits``."""
    return c["E"] + c["A"] * n ** -c["alpha"] + c["B"] * (fp + qat) ** -c["beta"] + penalty(c, n, fp, qat, bits)


def split(c, n, total, bits):
    """Share of QAT with the least loss, on a grid of 199 shares; ``(share, loss)``."""
    import numpy as np

    shares = np.linspace(0.005, 0.995, 199)
    values = loss(c, n, (1 - shares) * total, shares * total, bits)
    i = int(np.argmin(values))
    return float(shares[i]), float(values[i])


class ComputeOptimalQat(Planner):
    """Full precision, then QAT."""

    card = Card(
        id="compute-optimal-qat",
        name="Compute-optimal QAT",
        title="Compute-Optimal Quantization-Aware Training",
        question="Which share of training should be quantization-aware, and how many bits fit a memory limit best?",
        form="f = exp(-a / ln S),  S = D / (N bits / 8);  L = E + A / N^alpha + B / D^beta + penalty(N, Dfp, Dqat, bits)",
        needs=(
            "for the share alone: nothing, its one constant is published",
            "for the loss: at least 24 runs over sizes, tokens, bits and shares",
        ),
        claims=(
            "the optimal share grows with compute, contrary to a fixed 10 %",
            "its formula was off by 0.09 on average over 757 runs of 86M to 2.2B",
            "fusing cool-down and QAT saves compute",
        ),
        differs=(
            "The equations come from a published summary of the paper, not from its text; the full-precision part is taken to be Chinchilla's with "
            "the sum of both phases' tokens.",
            "The 16 constants of the loss are not published where we could read them: without points only the share is answered.",
        ),
        data="points",
        columns=(
            Column("parameters", "parameters of the model"),
            Column("fp_tokens", "tokens in full precision"),
            Column("qat_tokens", "tokens of QAT"),
            Column("bits", "bits of a weight"),
            Column("loss", "final loss of the quantized model"),
        ),
        options=(
            Option("parameters", "parameters of the model", 5.3e6, "parameters", 1.0, 1e15),
            Option("tokens", "tokens of both phases", 1e9, "tokens", 10.0, 1e17),
            Option("bits", "bits of a weight", 4, "bits", 1, 16),
            Option("memory", "limit of the weights; bits and size are then chosen for it", None, "MB", 1e-6, 1e9),
        ),
    )

    def from_history(self, home, query, options):
        from engines.errors import InputError

        table = history.points(home, query)
        raise InputError(
            "runs",
            query or "all",
            f"none of {len(table)} finished runs trained with quantization in the loop",
            "Use the published constant, or give points of your own",
        )

    def example(self):
        import numpy as np

        rng = np.random.default_rng(11)
        law = EXAMPLE
        rows = [
            (n, d, f, b) for n in (1e6, 4e6, 1.6e7) for d in (3e7, 3e8, 3e9) for f in (0.05, 0.2, 0.5, 0.8) for b in (2.0, 4.0)
        ]
        n, d, f, b = (np.array(c) for c in zip(*rows))
        made = loss(law, n, (1 - f) * d, f * d, b) * np.exp(rng.normal(0, 0.001, len(n)))
        return Points(
            {"parameters": n, "fp_tokens": (1 - f) * d, "qat_tokens": f * d, "bits": b, "loss": made},
            [f"made {i}" for i in range(1, len(n) + 1)],
            "example",
            ["The points are synthetic: made from a known law with 0.1 % noise."],
        )

    def published(self):
        return Fitted(
            self.card.id,
            "published",
            [Constant("a", SHARE, help="the share falls with it")],
            warnings=["Only the share is published in a form we could read; its mean error over the paper's runs is 0.09."],
            region={"parameters": (8.6e7, 2.2e9), "tokens": (2.3e9, 1.4e12), "bits": (1.0, 6.0)},
        )

    def fit(self, data, options=None, source="points"):
        import numpy as np

        from workbench.laws import fit as fits

        points = positive(data, "parameters", "fp_tokens", "qat_tokens", "bits", "loss")
        self.few(len(points), 24)
        n, fp, qat, bits, y = (
            points["parameters"],
            points["fp_tokens"],
            points["qat_tokens"],
            points["bits"],
            np.log(points["loss"]),
        )
        ln, ld, lf, lq = np.log(n), np.log(fp + qat), np.log(density(fp, n, bits)), np.log(density(qat, n, bits))
        cn, cd, cf, cq, cb = ln.mean(), ld.mean(), lf.mean(), lq.mean(), bits.mean()
        two = np.log(2.0)

        def model(t):
            e, a, b, alpha, beta, th, ka, ph, ch, ps, om, la, mu, nu, xi, rh = (t[..., i, None] for i in range(16))
            return fits.logsumexp(
                e + 0 * ln,
                a - alpha * (ln - cn),
                b - beta * (ld - cd),
                th - two * ka * (bits - cb),
                ph - two * ch * (bits - cb) - ps * (ln - cn) - om * (lq - cq),
                la - two * mu * (bits - cb) - nu * (ln - cn) - xi * (lf - cf) - rh * (lq - cq),
            )

        rng, middle = np.random.default_rng(0), float(np.median(y))
        grid = rng.uniform(0, 1, (4000, 16)) * (np.array(HIGH) - LOW) + LOW
        grid[:, 0] = y.min() + np.log(rng.uniform(0.3, 0.98, 4000))
        for i in (1, 2, 5, 7, 11):
            grid[:, i] = middle + rng.uniform(-6, -0.5, 4000)
        for i, top in ((3, 0.7), (4, 0.7), (6, 1.5), (8, 1.5), (9, 0.4), (10, 1.0), (12, 1.5), (13, 0.4), (14, 1.0), (15, 1.0)):
            grid[:, i] = LOW[i] + rng.uniform(0.05, 1, 4000) * (top - LOW[i])
        theta = fits.solve(model, y, grid, LOW, HIGH, starts=4, iterations=150)
        many = fits.bootstrap(model, y, theta, LOW, HIGH, draws=60, least=18, iterations=25)

        def plain(t):
            t = np.array(np.atleast_2d(t))
            out = t.copy()
            out[:, 1] = t[:, 1] + t[:, 3] * cn
            out[:, 2] = t[:, 2] + t[:, 4] * cd
            out[:, 5] = t[:, 5] + two * t[:, 6] * cb
            out[:, 7] = t[:, 7] + two * t[:, 8] * cb + t[:, 9] * cn + t[:, 10] * cq
            out[:, 11] = t[:, 11] + two * t[:, 12] * cb + t[:, 13] * cn + t[:, 14] * cf + t[:, 15] * cq
            for i in (0, 1, 2, 5, 7, 11):
                out[:, i] = np.exp(out[:, i])
            return out

        values, draws = plain(theta)[0], plain(many)
        made = [Constant(k, float(values[i]), *interval(draws[:, i]), HELP.get(k, "")) for i, k in enumerate(NAMES)]
        notes = list(points.notes) + ["16 constants: read the predictions and their intervals, not the single constants."]
        if len(points) < 48:
            notes.append(
                f"{len(points)} points for 16 constants: the intervals are too narrow to be believed below about 48 points."
            )
        if len(set(bits)) < 2:
            notes.append("All points have one bit width: what others cost is a guess.")
        return Fitted(
            self.card.id,
            source,
            made,
            len(points),
            (np.exp(model(theta[None])[0].real - y) - 1).tolist(),
            notes,
            {"parameters": ends(n), "tokens": ends(fp + qat), "bits": ends(bits)},
            draws,
        )

    def answer(self, fitted, options, data=None):
        import numpy as np

        n, d, bits, memory = options["parameters"], options["tokens"], options["bits"], options["memory"]
        full = len(fitted.constants) > 1
        c, many = {k.name: k.value for k in fitted.constants}, fitted.columns()
        rows, notes = [], []
        if memory is not None:
            n_of = {b: memory * 1e6 * 8 / b for b in BITS}
            for b, size in n_of.items():
                share, value = split(c, size, d, b) if full else (float(best_share(density(d, size, b), c["a"])), None)
                rows.append({"bits": b, "parameters": size, "share": share, "loss": value})
            if full:
                chosen = min(rows, key=lambda r: r["loss"])
                n, bits = chosen["parameters"], chosen["bits"]
            else:
                n = n_of[min(BITS, key=lambda b: abs(b - bits))]
                notes.append(
                    "Which bit width is best under a memory limit needs the loss, and so points; the shares for each are listed."
                )
        s = density(d, n, bits)
        formula = float(best_share(s, c.get("a", SHARE)))
        if full:
            share, value = split(c, n, d, bits)
            count = min(40, len(next(iter(many.values()))))
            pairs = [split({k: v[i] for k, v in many.items()}, n, d, bits) for i in range(count)]
            low, high = interval([p[0] for p in pairs])
            llow, lhigh = interval([p[1] for p in pairs])
        else:
            share, value, low, high, llow, lhigh = formula, None, max(0.0, formula - 0.091), min(1.0, formula + 0.091), None, None
        text = (
            f"Of {short(d)} tokens at {short(n)} parameters and {bits:g} bits (S = {short(s)} tokens per parameter byte) give {percent(share)} to QAT"
            + (f" ({percent(low)} to {percent(high)})" if low is not None else "")
            + (f"; the loss should then be {value:.3f}{span(llow, lhigh)}." if value is not None else ".")
        )
        if s <= 1:
            text += (
                " With so few tokens for each byte the law gives QAT nothing: train in full precision and quantize afterwards."
            )
        if memory is not None and full:
            text += f" Under {short(memory)} MB, {bits:g} bits with {short(n)} parameters come out best of {', '.join(str(b) for b in BITS)} bits."
        text += (
            f" Fuse the cool-down: keep the learning rate constant for the first {short((1 - share) * d)} tokens, start QAT at that rate, and let it fall "
            f"within the {short(share * d)} tokens of QAT."
        )
        notes += beyond(fitted, parameters=n, tokens=d, bits=bits)
        shares = np.linspace(0.01, 0.99, 99)
        if full:
            curve = loss(c, n, (1 - shares) * d, shares * d, bits)
            lines = np.array(
                [loss({k: v[i] for k, v in many.items()}, n, (1 - shares) * d, shares * d, bits) for i in range(count)]
            )
            band = np.percentile(lines, (2.5, 97.5), axis=0)
            plot = {
                "x": {"title": "Share of QAT", "unit": "%"},
                "y": {"title": "Loss", "unit": "nats per token"},
                "series": [
                    dict(
                        name="95 % interval", kind="band", x=(100 * shares).tolist(), low=band[0].tolist(), high=band[1].tolist()
                    ),
                    dict(name=f"{short(n)} parameters, {bits:g} bits", kind="line", x=(100 * shares).tolist(), y=curve.tolist()),
                    dict(name="best share", kind="mark", x=[100 * share], y=[value], low=[llow], high=[lhigh]),
                ],
            }
        else:
            xs = np.geomspace(2, max(1e5, 10 * s), 80)
            mean = 100 * best_share(xs, c["a"])
            plot = {
                "x": {"title": "Tokens per parameter byte, S", "unit": "", "log": True},
                "y": {"title": "Share of QAT", "unit": "%"},
                "series": [
                    dict(
                        name="mean error of the paper, 9 points",
                        kind="band",
                        x=xs.tolist(),
                        low=np.clip(mean - 9.1, 0, 100).tolist(),
                        high=np.clip(mean + 9.1, 0, 100).tolist(),
                    ),
                    dict(name="exp(-a / ln S)", kind="line", x=xs.tolist(), y=mean.tolist()),
                    dict(name="this plan", kind="mark", x=[float(s)], y=[100 * formula], low=[100 * low], high=[100 * high]),
                ],
            }
        return {
            "text": text,
            "warnings": notes,
            "plot": plot,
            "figures": {
                "share": share,
                "low": low,
                "high": high,
                "loss": value,
                "S": float(s),
                "formula_share": formula,
                "parameters": n,
                "bits": bits,
                "fp_tokens": (1 - share) * d,
                "qat_tokens": share * d,
                "scan": rows,
            },
        }


EXAMPLE = {
    "E": 1.7,
    "A": 60.0,
    "B": 900.0,
    "alpha": 0.33,
    "beta": 0.37,
    "theta": 0.5,
    "kappa": 1.0,
    "phi": 4.0,
    "chi": 0.6,
    "psi": 0.1,
    "omega": 0.4,
    "lambda": 6.0,
    "mu": 0.5,
    "nu": 0.1,
    "xi": 0.35,
    "rho": 0.15,
}
"""Constants of the synthetic points; nobody's measurement."""

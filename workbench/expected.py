"""Expected quality of a run that has not been made, from this database's own runs and, where they say nothing, from priors.

The gain over the model as it came is a Gaussian process whose mean is the prior of ``workbench.priors`` and whose covariance says how
alike two runs are: in model, data, methods, sparsity, bits, trained share, learning rate and training units, the numbers on logarithmic
scales. So a near run counts much and a far one little, the interval widens where runs are few or far, and what a method costs one
model informs what it costs another. Leaving out one setting at a time tells how wide the intervals must be, and how often they held.
Source of the leave-one-out formulas: Gaussian Processes for Machine Learning, section 5.4.2. Torch-free; numpy once there are runs.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field

from workbench import priors
from workbench.points import METRIC, Point, of_run, score, value_of

LEVEL = 0.9
NORMAL = 1.645
"""Half the width of a 90 % interval in standard deviations."""
LEAST_SETTINGS, MANY_SETTINGS = 8, 20
"""With fewer settings than the first the width of the intervals is not calibrated; only from the second on may they become narrower."""
UNCALIBRATED = 1.3
NEAR, PARTLY = 0.7, 0.25
"""Correlations from which a run of the same methods counts as like the planned one, and any run as partly like it."""
NEWEST = 250
SEED = {"causal-lm": 0.006, "text-classification": 0.05, "image-classification": 0.05}
"""Standard deviation of a gain over seeds."""
UNEXPLAINED = (1.0, 4.0, 16.0, 64.0)
"""Factors on it that are tried: how much of the results no likeness explains."""
_RUNS: dict[tuple, list[Point]] = {}
_FITTED: dict[tuple, Fitted] = {}


# -- history -----------------------------------------------------------------------------------------------------------
def stamp(store) -> tuple:
    """Changes when a run finishes or goes: the only time at which what is known changes."""
    last = store.runs(status="finished", limit=1, order="-ended")
    return (str(getattr(store, "path", id(store))), store.count_runs(status="finished"),
            (last[0]["id"], last[0]["ended"]) if last else None)


def history(store) -> list[Point]:
    """A point for each finished run and each evaluation between its stages, the newest first; kept in memory run by run."""
    if store is None:
        return []
    where, points = str(getattr(store, "path", id(store))), []
    for light in store.runs(status="finished", limit=NEWEST, order="-id"):
        key = (where, light["id"], light["ended"])
        if key not in _RUNS:
            if len(_RUNS) > 4 * NEWEST:
                _RUNS.clear()
            seen = next((s["last_value"] for s in store.series(light["id"]) if s["name"] == "tokens"), None)
            _RUNS[key] = of_run({**light, "forecast": store.forecast(light["id"])}, store.evaluations(light["id"]), seen)
        points += _RUNS[key]
    return points


def base_of(point: Point, known: list[Point], labels: int = 0) -> tuple[float | None, str]:
    """The quality of the model as it comes, on this data, and how it is known."""
    same = [p for p in known if p.model == point.model and p.data == point.data and p.whole and METRIC[p.task] == METRIC[point.task]]
    if same:
        values = sorted(p.base for p in same)
        return values[len(values) // 2], "the model as it came was evaluated on this data"
    card = _card(point.model)
    if card.get("data") == point.data:
        for figure in (card.get("figures") or {}).values():
            unit = figure.get("unit", "") if isinstance(figure, dict) else ""
            if unit == METRIC[point.task]:
                return float(figure["value"]), "the model's card has its figure on this data"
            if unit == "%" and METRIC[point.task] == "accuracy":
                return float(figure["value"]) / 100, "the model's card has its figure on this data"
    if labels > 1:
        return 1.0 / labels, "a new head starts at chance"
    return None, f"no run has evaluated {point.model} on {point.data}"


@functools.lru_cache(maxsize=64)
def _card(model: str) -> dict:
    from engines.errors import InputError
    from workbench import sources
    try:
        folder = sources.resolve(model).folder
        return json.loads((folder / "card.json").read_text()) if folder else {}
    except (InputError, OSError, ValueError):
        return {}


# -- likeness ----------------------------------------------------------------------------------------------------------
class Features:
    """Points as arrays [n], and the covariance of two such sets."""

    def __init__(self, points: list[Point], claims: dict, familiar):
        import numpy as np
        self.np, self.points = np, points
        array = np.array
        self.model = array([p.model for p in points], dtype=object)
        self.architecture = array([p.architecture for p in points], dtype=object)
        self.size = array([math.log10(max(p.parameters, 1)) for p in points], float)
        self.data = array([p.data for p in points], dtype=object)
        self.units = array([math.log2(1 + p.units) for p in points], float)
        self.share = array([math.log10(max(p.share, 1e-6)) for p in points], float)
        self.lr = array([math.log2(max(p.lr, 1e-9)) for p in points], float)
        self.trainers = array(["+".join(s.method for s in p.stages if s.trains) for p in points], dtype=object)
        self.priors = [priors.prior(p.stages, task=p.task, familiar=familiar(p), claims=claims) for p in points]
        self.mean = array([f.gain for f in self.priors], float)
        spreads = [priors.spread(f, p.task) for f, p in zip(self.priors, points)]
        self.trained = array([t for t, _ in spreads], float)
        self.kinds = {}
        for kind in ("sparsity", "removed", "bits"):
            last = [p.last(kind) for p in points]
            parts = array([_part(s, claims) for p, (s, _) in zip(points, last)], float)
            self.kinds[kind] = {
                "share": parts, "method": array([s.method if s else "" for s, _ in last], dtype=object),
                "level": array([_level(kind, s) for s, _ in last], float),
                "after": array([math.log2(1 + u / 1000) for _, u in last], float)}
        whole = sum(k["share"] for k in self.kinds.values()) + 1e-12
        for k in self.kinds.values():  # the spread of the loss is divided among what causes it
            k["spread"] = array([s for _, s in spreads], float) * np.sqrt(k["share"] / whole)

    def covariance(self, other: Features):
        """[n, m] covariance of the gains of two sets of points."""
        np = self.np
        same = lambda a, b: (a[:, None] == b[None, :])  # noqa: E731
        near = lambda a, b, width: np.exp(-0.5 * ((a[:, None] - b[None, :]) / width) ** 2)  # noqa: E731
        model = np.where(same(self.model, other.model), 1.0,
                         (0.35 + 0.25 * same(self.architecture, other.architecture)) * near(self.size, other.size, 1.0))
        data = same(self.data, other.data)
        units, close = near(self.units, other.units, 6.0), near(self.units, other.units, 1.5)
        alike = np.where(same(self.trainers, other.trainers), 1.0, 0.35)
        knobs = near(self.share, other.share, 0.7) * near(self.lr, other.lr, 1.5)
        # How much there is to learn is common to all methods; how well one learns is carried over many octaves of units, since spreads
        # grow with the prior; the rest is local.
        wide = near(self.share, other.share, 1.4) * near(self.lr, other.lr, 3.0)
        learns = model * np.where(data, 1.0, 0.15) * (
            0.4 * units + 0.3 * units * alike * wide + 0.1 * close + 0.2 * close * alike * knobs)
        out = np.outer(self.trained, other.trained) * learns
        # Losses: some of the doubt is about the scale of all published figures, some about a kind, the rest about a method.
        place = (0.4 + 0.6 * model) * np.where(data, 1.0, 0.8)
        lost = lambda f: np.sqrt(sum(k["spread"] ** 2 for k in f.kinds.values()))  # noqa: E731
        out += 0.4 * np.outer(lost(self), lost(other)) * place
        for name, width in (("sparsity", 1.0), ("removed", 0.8), ("bits", 0.7)):
            a, b = self.kinds[name], other.kinds[name]
            method = np.where(same(a["method"], b["method"]), 1.0, 0.3)
            level = near(a["level"], b["level"], width) * near(a["after"], b["after"], 2.5)
            wide = near(a["level"], b["level"], 2.5 * width) * near(a["after"], b["after"], 5.0)
            out += np.outer(a["spread"], b["spread"]) * place * (0.2 * wide * (0.4 + 0.6 * method) + 0.4 * method * level)
        return out


def _level(kind: str, stage) -> float:
    if stage is None:
        return 0.0
    if kind == "bits":
        return math.log2(stage.bits)
    share = min(0.99, max(0.01, getattr(stage, kind)))
    return math.log(share / (1 - share))


def _part(stage, claims: dict) -> float:
    return 0.0 if stage is None else priors.damage(stage, claims)[0]


# -- the fit -----------------------------------------------------------------------------------------------------------
@dataclass
class Fitted:
    """The process conditioned on the runs of one metric."""

    points: list[Point]
    features: Features
    inverse: object
    weights: object
    factor: float
    noise: float
    """Standard deviation of a gain over seeds and all else that is not modelled."""
    calibration: dict = field(default_factory=dict)


def fit(points: list[Point], claims: dict, familiar) -> Fitted:
    """Condition on ``points``. Leaving out one setting at a time chooses how much of the results no likeness explains, and calibrates
    the width of the intervals.
    """
    import numpy as np
    features = Features(points, claims, familiar)
    covariance, gains = features.covariance(features), np.array([p.gain for p in points]) - features.mean
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(points):
        groups.setdefault(p.group, []).append(i)
    best = None
    for rough in UNEXPLAINED if len(groups) >= LEAST_SETTINGS else UNEXPLAINED[:1]:
        noise = np.array([p.noise**2 + (rough * SEED[p.task]) ** 2 for p in points])
        inverse = np.linalg.inv(covariance + np.diag(noise))
        weights = inverse @ gains
        left = _left_out(points, groups, inverse, weights)
        # Student's t: one result that is far off must not make all others look rough.
        density = sum(-2.5 * math.log1p((off / sd) ** 2 / 4) - math.log(sd) for off, sd in left)
        if best is None or density > best[0]:
            best = (density, rough, inverse, weights, left)
    _, rough, inverse, weights, left = best
    factor, calibration = _calibrate(left)
    return Fitted(points, features, inverse, weights, factor, rough * SEED[points[0].task], calibration)


def _left_out(points, groups, inverse, weights) -> list[tuple[float, float]]:
    """(distance, standard deviation) of the result of each setting from what all the others predict."""
    import numpy as np
    out = []
    for rows in groups.values():
        block = np.linalg.inv(inverse[np.ix_(rows, rows)])
        residual = block @ weights[rows]
        k = next((k for k, i in enumerate(rows) if points[i].whole), None)
        if k is not None:
            out.append((abs(float(residual[k])), math.sqrt(max(float(block[k, k]), 1e-12))))
    return out


def _calibrate(left: list[tuple[float, float]]) -> tuple[float, dict]:
    """The factor on standard deviations with which 90 % of the results left out lie inside, and how many do when the factor is chosen
    without them."""
    z, n = [off / sd for off, sd in left], len(left)
    error = sorted(off for off, _ in left)[n // 2] if left else None
    if n < LEAST_SETTINGS:
        return UNCALIBRATED, {"settings": n, "coverage": None, "error": error, "factor": UNCALIBRATED,
                              "text": f"intervals are not calibrated: {n} of the {LEAST_SETTINGS} settings needed are in the database"}

    def quantile(values) -> float:
        rank = min(len(values) - 1, math.ceil(LEVEL * (len(values) + 1)) - 1)
        return min(4.0, max(0.6 if n >= MANY_SETTINGS else 1.0, sorted(values)[rank] / NORMAL))

    held = sum(z[i] <= NORMAL * quantile(z[:i] + z[i + 1:]) for i in range(n))
    factor = quantile(z)
    return factor, {"settings": n, "coverage": held / n, "error": error, "factor": factor,
                    "text": f"leaving out one of {n} settings at a time, {held} of {n} results lay inside their 90 % interval"}


def fitted(store, task: str) -> tuple[Fitted | None, list[Point], dict]:
    """The process for the metric of ``task``, all points of that metric, and the claims that serve as priors."""
    if store is None:
        return None, [], {}
    key = (*stamp(store), METRIC[task])
    if key not in _FITTED:
        claims = priors.claims_of(store)
        known = [p for p in history(store) if METRIC[p.task] == METRIC[task]][: 2 * NEWEST]
        if len(_FITTED) > 8:
            _FITTED.clear()
        _FITTED[key] = (fit(known, claims, familiar) if known else None, known, claims)
    return _FITTED[key]


def familiar(point: Point) -> bool:
    """The model was made on this data: its card says so."""
    return bool(point.data) and _card(point.model).get("data") == point.data


# -- answers -----------------------------------------------------------------------------------------------------------
def estimate(points: list[Point], store, *, labels: int = 0, joint: bool = False) -> tuple[list[dict], object]:
    """Expected quality of planned runs of one task.

    Args:
        labels: classes of a head that is new and so starts at chance; 0: the model brings its own.
        joint: also tell how the errors go together, for which numpy is needed even without runs.

    Returns:
        a dict for each point, and with ``joint`` the covariance [n, n] of their gains, else None.
        Of a dict: ``metric``, ``value``, ``low``, ``high`` (90 %, None where the base is unknown), ``base``, ``gain``, ``gain_low``,
        ``gain_high`` (log-ratio to the base, or difference of log-odds), ``near`` (number of runs like it), ``source``
        (history, transfer, prior), ``reason``, ``priors`` (published figures it rests on), ``calibration``.
    """
    if not points:
        return [], None
    model, known, claims = fitted(store, points[0].task)
    metric = METRIC[points[0].task]
    if model is None:
        found = [priors.prior(p.stages, task=p.task, familiar=familiar(p), claims=claims) for p in points]
        means = [f.gain for f in found]
        variances = [sum(s * s for s in priors.spread(f, p.task)) for f, p in zip(found, points)]
        sd, near = [UNCALIBRATED * math.sqrt(v) for v in variances], [(0, 0)] * len(points)
        if joint:
            alone = Features(points, claims, familiar)
            together = alone.covariance(alone) * UNCALIBRATED**2
        calibration = {"settings": 0, "coverage": None, "factor": UNCALIBRATED, "error": None, "text": "no run to calibrate on"}
    else:
        import numpy as np
        features = Features(points, claims, familiar)
        found = features.priors
        cross, own_covariance = features.covariance(model.features), features.covariance(features)
        means = list(features.mean + cross @ model.weights)
        scale = np.sqrt(np.maximum(np.diag(own_covariance), 1e-12))
        own = np.sqrt(np.maximum(np.diag(model.features.covariance(model.features)), 1e-12))
        likeness = cross / np.outer(scale, own)
        together = (own_covariance - cross @ model.inverse @ cross.T) * model.factor**2
        sd = np.sqrt(np.maximum(np.diag(together), 0) + (model.factor * model.noise) ** 2)
        runs, methods = np.array([p.run for p in model.points]), np.array([_methods(p) for p in model.points])
        near = [(len(set(runs[(row > NEAR) & (methods == _methods(p))])), len(set(runs[row > PARTLY]))) for p, row in zip(points, likeness)]
        calibration = model.calibration
    base, how = base_of(points[0], known, labels)
    out = []
    for p, prior, mean, width, (close, far) in zip(points, found, means, sd, near):
        out.append(_answer(p, prior, float(mean), float(width), close, far, base, how, metric, calibration))
    return out, together if joint else None


def _methods(point: Point) -> str:
    return "+".join(s.method for s in point.stages)


def _answer(point, prior, mean, width, close, far, base, how, metric, calibration) -> dict:
    low, high = mean - NORMAL * width, mean + NORMAL * width
    count = lambda n: f"{n} run{'' if n == 1 else 's'}"  # noqa: E731
    if close:
        source, reason = "history", f"from {count(close)} like this"
    elif far:
        source, reason = "transfer", f"from {count(far)} only partly like this, and priors"
    else:
        source, reason = "prior", "from priors only: no run here is like this"
    out = {"metric": metric, "value": None, "low": None, "high": None, "level": LEVEL, "base": base, "gain": mean, "gain_low": low,
           "gain_high": high, "near": close, "source": source, "reason": reason,
           "priors": list(prior.sources) if source != "history" else [], "calibration": calibration}
    if base is not None:
        at = score(base, metric)
        ends = sorted(value_of(at + g, metric) for g in (low, high))
        out |= {"value": value_of(at + mean, metric), "low": ends[0], "high": ends[1]}
    else:
        out["reason"] = f"{how}; {reason}"
    return out


def judge(scene, store):
    """A function ``(resolved spec, cost) -> estimate`` for one scene."""
    from workbench.points import of_cost

    def of(spec, found) -> dict:
        return estimate([of_cost(spec, found, scene)], store, labels=scene.fresh_labels)[0][0]
    return of

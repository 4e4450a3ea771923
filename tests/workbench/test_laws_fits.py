"""The fitter and the laws of points: known constants come back, intervals cover, identities hold."""

import math

import numpy as np
import pytest

from engines.errors import InputError
from workbench import laws
from workbench.laws import avgparam, chinchilla, fit, over_training, qat
from workbench.laws.points import Points

LAW = {"E": 1.7, "A": 60.0, "B": 900.0, "alpha": 0.33, "beta": 0.37}


def grid(noise=0.0, seed=0, law=LAW):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 2e7, 5), np.geomspace(1e7, 6e8, 5)))
    made = chinchilla.loss(law, n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))
    return Points({"parameters": n, "tokens": d, "loss": made})


def test_gradients_by_the_complex_step_are_exact():
    f = lambda t: fit.logsumexp(t[..., 0, None] + np.zeros(3), t[..., 1, None] * np.array([1.0, 2.0, 3.0]))  # noqa: E731
    t = np.array([[0.3, -0.7]])
    _, slope = fit.jacobian(f, t)
    for j in range(2):
        h = np.zeros(2)
        h[j] = 1e-6
        assert slope[0, :, j] == pytest.approx(((f(t + h) - f(t - h)) / 2e-6)[0], rel=1e-6)


def test_chinchilla_recovers_its_constants_without_noise():
    found = laws.get("chinchilla").fit(grid())
    for name, value in LAW.items():
        assert found[name] == pytest.approx(value, rel=0.01), name
    assert max(map(abs, found.residuals)) < 1e-4


def test_an_outlier_hardly_moves_the_fit():
    points = grid(0.002)
    clean = laws.get("chinchilla").fit(points)
    points.columns["loss"] = points["loss"].copy()
    points.columns["loss"][12] *= 1.5
    spoiled = laws.get("chinchilla").fit(points)
    n, d = 5e6, 1e8
    value = lambda f: chinchilla.loss({k: f[k] for k in LAW}, n, d)  # noqa: E731
    assert value(spoiled) == pytest.approx(value(clean), rel=0.01)


def test_bootstrap_intervals_cover_the_truth():
    """Of ten data sets the 95 % interval of the loss at the centre must cover the truth in at least seven."""
    covered = 0
    for seed in range(10):
        found = laws.get("chinchilla").fit(grid(0.01, seed))
        many = chinchilla.loss(found.columns(), 6e6, 1e8)
        low, high = np.percentile(many, (2.5, 97.5))
        covered += low <= chinchilla.loss(LAW, 6e6, 1e8) <= high
        assert high - low < 0.15
    assert covered >= 7


@pytest.mark.parametrize("flops", (1e15, 1e18, 3e21))
def test_the_best_split_spends_the_compute_and_is_the_best(flops):
    n, d = chinchilla.optimum(chinchilla.PUBLISHED, flops)
    assert 6 * n * d == pytest.approx(flops, rel=1e-12)
    best = chinchilla.loss(chinchilla.PUBLISHED, n, d)
    for scale in (0.8, 1.25):
        assert chinchilla.loss(chinchilla.PUBLISHED, n * scale, d / scale) > best


def test_published_constants_give_about_twenty_tokens_per_parameter():
    found = laws.predict("chinchilla", "published", options={"compute": 5.76e23})
    assert 10 < found["figures"]["tokens_per_parameter"] < 40
    assert found["fitted"]["constants"][0]["low"] is None and "No interval" in found["warnings"][0]


def test_extrapolation_and_poor_points_are_said():
    points = grid(0.002)
    law = laws.get("chinchilla")
    found = law.fit(points)
    said = law.answer(found, law.check({"compute": 1e21}), points)["warnings"]
    assert any("Extrapolation" in w for w in said)
    same = Points({k: v[:8] if k != "parameters" else np.full(8, 5e6) for k, v in points.columns.items()})
    assert any("nearly the same size" in w for w in law.fit(same).warnings)
    with pytest.raises(InputError, match="needs at least 6 points.*published"):
        law.fit(points.keep([True] * 4 + [False] * 21))


# -- average parameters ------------------------------------------------------------------------------------------------
def test_average_parameters_reduce_to_chinchilla_without_pruning():
    points = grid(0.002)
    a, b = laws.get("avgparam").fit(points), laws.get("chinchilla").fit(points)
    assert [c.value for c in a.constants] == [c.value for c in b.constants]


def test_mean_size_of_a_schedule_is_its_integral():
    assert avgparam.average(100.0, 0.5, 0.0, 1.0, "linear") == pytest.approx(75.0, rel=1e-6)
    # cubic from 0 to 1: the integral of 1 - (1 - u)^3 is 3/4
    assert avgparam.average(100.0, 0.8, 0.0, 1.0, "cubic") == pytest.approx(40.0, rel=1e-6)
    assert avgparam.average(100.0, 0.5, 0.5, 0.5, "at once") == pytest.approx(75.0, rel=1e-3)
    assert avgparam.average(100.0, 0.5, 0.25, 0.75) == pytest.approx(100 * (1 - 0.5 * (0.5 * 0.75 + 0.25)), rel=1e-4)


def test_schedules_of_equal_mean_size_have_equal_loss():
    early, late = avgparam.average(1e7, 0.4, 0.0, 0.5), avgparam.average(1e7, 0.4, 0.5, 1.0)
    assert early < late
    share = 0.4 * (1e7 - early) / (1e7 - late)  # makes the late one as small on average... only when it prunes more
    again = avgparam.average(1e7, share, 0.5, 1.0)
    assert again == pytest.approx(early, rel=1e-6)
    assert chinchilla.loss(LAW, again, 1e8) == pytest.approx(chinchilla.loss(LAW, early, 1e8), rel=1e-9)


def test_windows_of_compute_turn_into_windows_of_tokens():
    begin, end = avgparam.window_of_compute(0.25, 0.75, 0.8)
    assert avgparam.tokens_of_compute(0.25, 0.8, begin, end) == pytest.approx(begin, abs=1e-6)
    assert begin < 0.25 and 0.25 < end < 0.75  # dense tokens at the beginning cost more than their share
    assert avgparam.window_of_compute(0.25, 0.75, 0.0) == pytest.approx((0.25, 0.75), abs=1e-6)


def test_average_parameters_are_recovered_from_sparse_runs():
    law = laws.get("avgparam")
    found = law.fit(law.example())
    assert found["alpha"] == pytest.approx(0.33, abs=0.1) and found.error < 0.005


# -- over-training -----------------------------------------------------------------------------------------------------
def test_over_training_recovers_its_constants_and_the_error_law():
    rng = np.random.default_rng(0)
    c, m = (a.ravel() for a in np.meshgrid(np.geomspace(1e14, 1e17, 5), (5.0, 20.0, 80.0, 320.0)))
    true, err = {"E": 1.8, "a": 110.0, "b": 270.0, "eta": 0.15}, {"eps": 0.86, "k": 2.4, "gamma": 0.75}
    loss = over_training.loss(true, c, m) * np.exp(rng.normal(0, 0.0005, len(c)))
    n = np.sqrt(c / (6 * m))
    found = laws.get("over-training").fit(Points({"parameters": n, "tokens": n * m, "loss": loss, "error": over_training.error_of(err, loss)}))
    for name in true:
        assert found[name] == pytest.approx(true[name], rel=0.1), name
    got = {k.name: k.value for k in found.extra["error"]["constants"]}
    for loss_at in (loss.min(), np.median(loss), loss.max()):
        assert over_training.error_of(got, loss_at) == pytest.approx(over_training.error_of(err, loss_at), abs=0.003)


def test_over_trained_curves_are_parallel():
    law, c = {"E": 1.8, "a": 110.0, "b": 270.0, "eta": 0.15}, np.geomspace(1e14, 1e18, 9)
    slopes = [np.polyfit(np.log(c), np.log(over_training.loss(law, c, m) - law["E"]), 1)[0] for m in (20.0, 200.0, 2000.0)]
    assert slopes == pytest.approx([-0.15] * 3, abs=1e-9)
    best = over_training.best_ratio(law)
    assert all(over_training.loss(law, 1e16, best) < over_training.loss(law, 1e16, best * f) for f in (0.8, 1.25))


# -- quantization-aware training ---------------------------------------------------------------------------------------
def test_the_published_share_of_qat():
    assert qat.density(1e9, 1e8, 4) == pytest.approx(20.0)
    assert float(qat.best_share(math.e**10)) == pytest.approx(math.exp(-0.67297), rel=1e-9)
    shares = qat.best_share(np.geomspace(2, 1e6, 30))
    assert np.all(np.diff(shares) > 0) and shares[0] < 0.01 and shares[-1] < 1
    assert float(qat.best_share(0.5)) == 0.0
    lower, higher = (float(qat.best_share(qat.density(1e9, 5e6, b))) for b in (2, 8))
    assert lower > higher  # fewer bits need a larger share


def test_qat_recovers_the_split():
    law = laws.get("qat")
    points = law.example()
    found = law.fit(points)
    c = {k: found[k] for k in qat.NAMES}
    for n, d, b in ((4e6, 3e8, 4), (1e6, 3e9, 2), (8e6, 1e8, 4)):
        share, value = qat.split(c, n, d, b)
        wanted, least = qat.split(qat.EXAMPLE, n, d, b)
        assert value == pytest.approx(least, rel=0.005)
        # what the found split really costs is what counts: the minimum is flat
        assert qat.loss(qat.EXAMPLE, n, (1 - share) * d, share * d, b) == pytest.approx(least, rel=0.002)


def test_a_memory_limit_chooses_bits_and_size():
    found = laws.predict("qat", "example", options={"memory": "4", "tokens": "300M"})["figures"]
    assert found["parameters"] * found["bits"] / 8 == pytest.approx(4e6)
    chosen = min(found["scan"], key=lambda r: r["loss"])
    assert chosen["bits"] == found["bits"] and len({r["bits"] for r in found["scan"]}) == 6

"""The laws of curves: annealing areas, prediction of unseen schedules, and when to stop."""

import numpy as np
import pytest

from engines.errors import InputError
from workbench import laws
from workbench.laws import annealing, learning_curve
from workbench.laws.history import Curve, last_stage
from workbench.laws.schedule import Schedule, areas

TRUE = {"L0": 2.1, "A": 0.9, "alpha": 0.45, "C": 1.5}


def curve(kind, steps=800, noise=0.01, seed=0, peak=2e-3, decay=0.99):
    lr = Schedule(kind, steps, peak).rates()
    loss = annealing.predict(TRUE, lr, decay) * np.exp(np.random.default_rng(seed).normal(0, noise, steps))
    return Curve(kind, np.arange(1.0, steps + 1), loss, lr)


def test_a_constant_rate_anneals_nothing():
    lr = Schedule("constant", 500, 1e-3, warmup=0.1).rates()
    s1, s2 = areas(lr, 0.99)
    assert np.all(s2 == 0)
    assert s1[-1] == pytest.approx(lr.sum())


def test_the_annealing_area_is_the_double_sum_of_its_definition():
    lr = Schedule("cosine", 60, 1e-3, warmup=0.1).rates()
    _, s2 = areas(lr, 0.9)
    top = int(np.argmax(lr))
    slow = sum((lr[k - 1] - lr[k]) * 0.9 ** (i - k) for i in range(top + 1, 60) for k in range(top + 1, i + 1))
    assert s2[-1] == pytest.approx(slow, rel=1e-10)


def test_schedules_end_where_they_should():
    for kind in ("cosine", "linear", "wsd"):
        lr = Schedule(kind, 1000, 1e-3, warmup=0.05).rates()
        assert lr.max() == pytest.approx(1e-3, rel=1e-3) and lr[-1] < 1e-5
    wsd = Schedule("wsd", 1000, 1e-3, warmup=0.05, decay=0.2).rates()
    assert np.all(wsd[60:800] == 1e-3) and wsd[900] == pytest.approx(5e-4)
    with pytest.raises(InputError, match="schedule"):
        Schedule("sawtooth")


@pytest.mark.parametrize("unseen", ("wsd", "linear"))
def test_two_curves_predict_a_third_schedule(unseen):
    """The oracle: fitted on constant and cosine, another schedule within 1 % at its end."""
    law = laws.get("annealing")
    found = law.fit([curve("constant"), curve("cosine", seed=1)])
    line, many, _ = law.forecast(found, Schedule(unseen, 800, 2e-3))
    truth = annealing.predict(TRUE, Schedule(unseen, 800, 2e-3).rates(), 0.99)
    assert line[-1] == pytest.approx(truth[-1], rel=0.01)
    assert np.mean(np.abs(line[80:] / truth[80:] - 1)) < 0.01
    low, high = np.percentile(many[:, -1], (2.5, 97.5))
    assert low * 0.995 <= truth[-1] <= high * 1.005


def test_a_constant_curve_alone_says_that_annealing_is_unknown():
    law = laws.get("annealing")
    found = law.fit([curve("constant")])
    assert found["C"] == 0.0 and any("cannot be known" in w for w in found.warnings)


def test_recommendations_are_ranked_and_a_longer_run_is_an_extrapolation():
    law = laws.get("annealing")
    data = [curve("constant"), curve("cosine", seed=1)]
    found = law.fit(data)
    rows = law.recommend(found, 800, 2e-3)
    assert [r["loss"] for r in rows] == sorted(r["loss"] for r in rows) and len(rows) == 7
    assert sum(r["best_share"] for r in rows) == pytest.approx(1.0)
    assert rows[-1]["schedule"] == "constant"  # annealing pays with these constants
    said = law.answer(found, law.check({"steps": 4000}), data)
    assert any("Extrapolation" in w for w in said["warnings"])


def test_the_last_training_stage_is_found():
    one = Schedule("cosine", 200, 1e-3).rates()
    assert last_stage(one) == 0
    assert abs(last_stage(np.concatenate([one, Schedule("cosine", 300, 2e-3).rates()])) - 200) <= 2


# -- when to stop ------------------------------------------------------------------------------------------------------
def power(noise=0.0, n=30, seed=0):
    x = np.linspace(20, 600, n)
    return x, 2.0 + 6.0 * x**-0.5 + np.random.default_rng(seed).normal(0, noise, n)


def test_a_trend_finds_its_power_law():
    a, b, c, noise = learning_curve.trend(*power())
    assert (a, b, c) == pytest.approx((-6.0, 0.5, 2.0), rel=1e-3) and noise < 1e-6
    x = np.linspace(10, 300, 20)
    assert learning_curve.trend(x, 90 - 40 * x**-0.8)[:3] == pytest.approx((40.0, 0.8, 90.0), rel=1e-3)


def test_at_the_stop_level_the_end_is_within_tau_and_a_larger_tau_stops_earlier():
    hits, steps = 0, {0.01: [], 0.2: []}
    for seed in range(8):
        x, y = power(0.003, 60, seed)
        truth = 2.0 + 6.0 * 1200**-0.5
        trends = learning_curve.levels(x, y)
        ends = [float(learning_curve.at(t, 1200.0)) for _, t in trends]
        for tau in steps:
            stop = learning_curve.stop_level(trends, ends, tau)
            assert stop is not None
            steps[tau].append(stop)
            if tau == 0.01:
                hits += abs(ends[stop] - truth) <= tau
    assert hits >= 7
    assert all(a >= b for a, b in zip(steps[0.01], steps[0.2])) and sum(steps[0.01]) > sum(steps[0.2])


@pytest.mark.parametrize("tau, verdict", ((1.0, "stop"), (1e-4, "go on")))
def test_worth_of_a_curve_at_constant_rate(tau, verdict):
    x, y = power(0.002)
    law = laws.get("worth")
    found = law.fit([Curve("c", x, y)], {"tau": tau, "steps": 800})
    said = law.answer(found, law.check({"tau": tau, "steps": 800}))
    if verdict == "go on":
        assert said["figures"]["verdict"] in ("go on", "wait")  # at so fine a tau the predictions never settle
    else:
        assert said["figures"]["verdict"] == "stop" and "not worth it" in said["text"]
    assert said["figures"]["end"] == pytest.approx(2.0 + 6.0 * 800**-0.5, rel=0.01)


def test_a_falling_rate_is_never_the_end():
    x = np.arange(1.0, 401)
    lr = Schedule("cosine", 600, 1e-3).rates()[:400]
    found = laws.get("worth").fit([Curve("c", x, 2 + 6 * x**-0.5, lr, planned=600)], {"tau": 10.0})
    assert found.extra["going"] and any("falling" in w for w in found.warnings)
    assert laws.get("worth").answer(found, {})["figures"]["verdict"] == "wait"


def test_curves_that_do_not_belong_together_are_said():
    other = curve("cosine", seed=1)
    other.value = other.value * 1.1
    law = laws.get("annealing")
    assert any("one model" in w for w in law.fit([curve("constant"), other]).warnings)
    assert not any("one model" in w for w in law.fit([curve("constant"), curve("cosine", seed=1)]).warnings)

"""Time, reference systems, evaluation size, tables, history, command line."""

import json

import numpy as np
import pytest

from engines.errors import InputError
from workbench import cli, laws
from workbench.commands.predict import OPTIONS
from workbench.home import Home
from workbench.laws import evaluation_size, history, reference_time, time_matters
from workbench.laws.history import Scores
from workbench.laws.points import Points, table

SHAPES = [(a, w, b, s) for a, w in ((1, 64), (2, 64), (6, 64), (2, 128), (5, 128), (1, 256), (3, 256), (2, 384)) for b, s in ((4, 128), (16, 64))]


# -- time matters ------------------------------------------------------------------------------------------------------
def shapes():
    layers, width, rows, length = (np.array(c, float) for c in zip(*SHAPES))
    return {"layers": layers, "hidden": width, "mlp": np.round(8 * width / 3), "heads": np.maximum(1, width // 32), "batch": rows, "length": length,
            "vocab": np.full(len(layers), 2048.0)}


def test_copies_grow_as_counted():
    p = {k: v[:1] for k, v in shapes().items()}
    one, more = time_matters.copies(p), time_matters.copies({**p, "batch": 2 * p["batch"]})
    assert more["weights"] == one["weights"] and more["activations"] == pytest.approx(2 * one["activations"])
    longer = time_matters.copies({**p, "length": 2 * p["length"]})
    assert longer["scores"] == pytest.approx(4 * one["scores"])
    n = time_matters.weights_of(p["layers"], p["hidden"], p["mlp"], p["vocab"])
    assert one["weights"] == pytest.approx(n * (2 + time_matters.OPTIMIZER_PASSES))


def test_where_time_is_memory_copies_predict_what_flops_do_not():
    p, rng = shapes(), np.random.default_rng(0)
    c = time_matters.copies(p)
    seconds = (0.003 + 8e-10 * sum(c.values())) * np.exp(rng.normal(0, 0.02, len(SHAPES)))
    found = laws.get("time-matters").fit(Points({"step_seconds": seconds, **p}, [str(s) for s in SHAPES]))
    errors = found.extra["left_out"]
    assert errors[found.extra["design"]] < 0.04 < errors["FLOPs"]
    assert found["c1"] == pytest.approx(8e-10, rel=0.1)


def test_where_products_cost_too_their_coefficient_is_found():
    p, rng = shapes(), np.random.default_rng(1)
    seconds = (4e-10 * sum(time_matters.copies(p).values()) + 1e-11 * time_matters.flops(p)) * np.exp(rng.normal(0, 0.01, len(SHAPES)))
    found = laws.get("time-matters").fit(Points({"step_seconds": seconds, **p}, [str(s) for s in SHAPES]))
    assert found.extra["design"] == "copies and FLOPs" and found["c2"] == pytest.approx(1e-11, rel=0.1)


def test_shapes_are_ranked_by_loss_after_the_same_seconds():
    found = laws.predict("time-matters", "example", options={"seconds": 60})
    best = [r["loss"] for r in found["figures"]["best"]]
    assert best == sorted(best)
    again = laws.predict("time-matters", "example", options={"seconds": 6000})
    assert again["figures"]["best"][0]["parameters"] >= found["figures"]["best"][0]["parameters"]
    assert again["figures"]["tokens"] == pytest.approx(100 * found["figures"]["tokens"])


# -- reference time ----------------------------------------------------------------------------------------------------
def train(step_seconds, rates, budget=60.0):
    """Steps and learning rates of a loop on a clock that only training moves."""
    now = [0.0]
    clock = reference_time.ReferenceClock(budget, rates, lambda: now[0])
    seen = []
    while clock.progress < 1:
        seen.append(clock.rate(schedule="linear", warmup=0.05))
        now[0] += step_seconds
    return len(seen), seen, clock


@pytest.mark.parametrize("slower", (1.0, 3.0, 7.5))
def test_a_throttled_machine_makes_the_same_steps_in_reference_time(slower):
    step = 0.037
    here = reference_time.ReferenceTime(0.2 * slower, 0.25)
    steps, seen, clock = train(step * slower, here)
    wanted, same, _ = train(step, reference_time.ReferenceTime(0.2, 0.25))
    assert abs(steps - wanted) <= 1
    assert seen == pytest.approx(same[: len(seen)], abs=1e-2)
    assert clock.rate(schedule="linear", warmup=0.05) == 0.0 and clock.rate(schedule="cosine") == pytest.approx(0.0, abs=1e-12)


def test_minutes_convert_both_ways():
    there = laws.predict("reference-time", "example", options={"minutes": 5, "unit": "reference"})["figures"]
    assert there["minutes_here"] == pytest.approx(10.0) and there["budget"]["minutes"] == pytest.approx(10.0)
    here = laws.predict("reference-time", "example", options={"minutes": 10, "unit": "here"})["figures"]
    assert here["minutes_reference"] == pytest.approx(5.0)


def test_the_calibration_gives_the_seconds_of_this_machine(tmp_path):
    from workbench import machine
    home = Home.open(tmp_path)
    with pytest.raises(InputError, match="doctor --measure"):
        laws.predict("reference-time", home=home)
    home.store.set_setting(machine.SETTING, {"fingerprint": machine.fingerprint(), "reference": {"float32": 0.125}})
    assert laws.predict("reference-time", home=home, options={"minutes": 4})["figures"]["minutes_here"] == pytest.approx(2.0)


# -- evaluation size ---------------------------------------------------------------------------------------------------
def answers(models=8, items=1500, seed=0):
    rng = np.random.default_rng(seed)
    skill, hard = np.linspace(-1.2, 1.2, models), rng.normal(0, 1, items)
    return Scores([f"m{i}" for i in range(models)], (rng.random((models, items)) < 1 / (1 + np.exp(hard - skill[:, None]))).astype(float))


def test_kendall_is_that_of_scipy():
    from scipy.stats import kendalltau
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (6, 9)).astype(float), rng.normal(size=9)
    assert evaluation_size.kendall(a, b) == pytest.approx([kendalltau(row, b).statistic for row in a])


def test_tau_rises_with_items_and_saturates():
    rows = [evaluation_size.reliability(answers(), s, draws=200) for s in (8, 32, 128, 512, 1500)]
    taus = [r["tau"] for r in rows]
    assert taus == sorted(taus) and taus[0] < 0.8 and taus[-1] > 0.95
    assert taus[-1] - taus[-2] < 0.05 < taus[1] - taus[0]
    assert all(r["dior"] <= r["tau"] + 0.02 for r in rows) and rows[-1]["width"] < rows[0]["width"] / 8


def test_the_tournament_finds_the_best_with_fewer_evaluations():
    right, saved = 0, []
    for seed in range(6):
        found = evaluation_size.tournament(answers(seed=seed), seed=seed)
        right += found["best"] == "m7"
        saved.append(found["evaluations"] / found["uniform"])
        assert [t["models"] for t in found["left"]] == sorted((t["models"] for t in found["left"]), reverse=True)
    assert right >= 5 and max(saved) < 0.7


def test_lower_is_better_for_bits_per_byte():
    base = answers()
    flipped = Scores(base.names, 2 - base.matrix, np.ones(base.matrix.shape[1]), "bits/byte")
    assert evaluation_size.tournament(flipped)["best"] == evaluation_size.tournament(base)["best"]


def test_items_for_a_difference():
    law = laws.get("items")
    found = law.fit(answers())
    figures = law.answer(found, law.check({"difference": "2%", "reliability": 0.8}))["figures"]
    assert figures["items_for_difference"] == pytest.approx((1.96 * found["paired spread"] / 0.02) ** 2, rel=0.01)
    assert figures["reached"] and figures["dior"] >= 0.8


# -- tables ------------------------------------------------------------------------------------------------------------
CARD = laws.get("chinchilla").card


@pytest.mark.parametrize("text, words", (
    ("parameters,loss\n1e6,3\n", "the column tokens"), ("parameters,tokens,loss\n1e6,many,3\n", "row 1, tokens"), ("", "empty"),
    ("parameters,tokens,loss\n", "no row"), ("parameters,tokens,loss\n1e6,-4,3\n", "below zero"), ('[{"parameters": 1}', "not valid JSON"),
    ("[1, 2]", "list of objects"), ('{"parameters": [1, 2], "tokens": [1], "loss": [3, 4]}', "one length"),
    ("parameters,tokens,loss\n1e6,,3\n", "not a number")))
def test_bad_tables_are_refused_in_one_sentence(text, words):
    with pytest.raises(InputError, match=words):
        table(text, CARD)


def test_tables_are_read_with_units_aliases_and_other_separators():
    got = table("name;N;D;loss\na;5.3M;1e8;3.1\nb;200k;2G;2.9\n", CARD)
    assert got["parameters"].tolist() == [5.3e6, 2e5] and got["tokens"].tolist() == [1e8, 2e9] and got.labels == ["a", "b"]
    assert table('{"parameters": [1e6], "tokens": [1e7], "loss": [3]}', CARD)["loss"].tolist() == [3.0]


def test_every_law_shows_an_example_quickly_and_as_json():
    for name, law in laws.planners().items():
        found = laws.predict(name, "example")
        json.dumps(found, allow_nan=False)
        assert found["text"].endswith(".") and found["plot"]["series"] and law.card.needs and law.card.claims and law.card.differs, name
        assert any("synthetic" in w or "made up" in w for w in found["warnings"]), name


def test_options_are_checked():
    for given, words in (({"compute": "lots"}, "not a number"), ({"compute": -1}, "not from"), ({"colour": 3}, "no such option")):
        with pytest.raises(InputError, match=words):
            laws.predict("chinchilla", "published", options=given)
    with pytest.raises(InputError, match="no published constants"):
        laws.predict("annealing", "published")


# -- history -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def home(tmp_path):
    """Ten finished runs with losses of a known law, curves and per-item scores."""
    from workbench.laws.chinchilla import loss
    from workbench.laws.schedule import Schedule
    home, rng = Home.open(tmp_path), np.random.default_rng(0)
    store = home.store
    law = {"E": 1.7, "A": 60.0, "B": 900.0, "alpha": 0.33, "beta": 0.37}
    for i in range(10):
        n, steps = 1e6 * 1.6**i, 200 + 20 * i
        d = float(2e7 * (1 + 3 * (i % 3)))
        value = float(loss(law, n, d))
        run = store.create_run({"model": "somewhere", "data": "python-docs", "pipeline": [{"method": "full"}]}, name=f"run-{i}", status="finished")
        lr = Schedule("cosine" if i % 2 else "constant", steps, 1e-3).rates()
        rows = [("loss", s + 1, value + 3 * (s + 1) ** -0.5, 0.1 * s) for s in range(steps)] + [("lr", s + 1, float(lr[s]), 0.1 * s) for s in range(steps)]
        for part, took in (("data", 0.001), ("forward", 0.01), ("backward", 0.02), ("step", 0.003)):
            rows += [(f"time/{part}", s + 1, took, 0.1 * s) for s in range(5)]
        store.append(run, rows)
        scores = (value + rng.normal(0, 0.2, 80)).astype(np.float32)
        store.put_evaluation(run, "result", 1, steps, 30.0, "bits/byte", value, value - 0.1, value + 0.1, 80, scores, np.full(80, 1.44, np.float32), "h",
                             {"loss": value})
        store.put_footprint(run, {"tokens": d, "steps": steps, "parameters": n, "trainable": n, "sparsity": 0.0, "bits_per_weight": 16.0})
        store.event(run, "stage", "ended", steps=steps, seconds=20.0)
        store.update_run(run, metric="bits/byte", value=value, parameters=int(n), seconds=30.0)
    return home


def test_runs_become_points_curves_and_scores(home):
    points = history.points(home)
    assert len(points) == 10 and points.source == "runs"
    assert points["flops"] == pytest.approx(6 * points["parameters"] * points["tokens"])
    assert points["step_seconds"] == pytest.approx(0.034) and points["seconds"].tolist() == [20.0] * 10
    assert any("adapted" in n for n in points.notes)
    assert len(history.points(home, "1, 3 5")) == 3 and len(history.points(home, "method:full")) == 10
    curves = history.curves(home, "", most=2)
    assert len(curves) == 2 and all(len(c.lr) >= len(c.step) for c in curves)
    assert sorted(c.lr[-1] > 5e-4 for c in curves) == [False, True]  # one falls, one does not
    other = home.store.create_run({"model": "another", "data": "python-docs", "pipeline": []}, name="other", status="finished")
    home.store.append(other, [(k, s, 2.0, 0.1 * s) for k in ("loss", "lr") for s in range(1, 40)])
    home.store.update_run(other, metric="bits/byte", value=2.0)
    alone = history.curves(home, "")
    assert [c.name for c in alone] == ["other"] and "another model" in alone[0].notes[0]
    scores = history.scores(home)
    assert scores.matrix.shape == (10, 80) and scores.metric == "bits/byte"


def test_laws_are_fitted_to_this_database(home):
    found = laws.predict("chinchilla", home=home)
    assert found["fitted"]["n"] == 10 and found["fitted"]["error"] < 0.002
    assert laws.predict("annealing", home=home, options={"schedule": "linear"})["figures"]["loss"] > 1.7
    assert laws.predict("items", home=home)["figures"]["items"] <= 80
    with pytest.raises(InputError, match="quantization in the loop"):
        laws.predict("qat", home=home)


def test_worth_of_a_run_that_is_on(home):
    store = home.store
    run = store.create_run({"model": "m", "data": "d", "pipeline": []}, name="going", status="running")
    assert learning_worth(home, run)["verdict"] == "wait"
    store.append(run, [("loss", s, 2 + 3 * s**-0.5, 0.1 * s) for s in range(1, 201)] + [("lr", s, 1e-3, 0.1 * s) for s in range(1, 201)])
    store.update_run(run, progress=0.5)
    found = learning_worth(home, run, tau=0.01)
    assert found["verdict"] == "go on" and found["end"] == pytest.approx(2 + 3 * 400**-0.5, abs=0.02)
    assert learning_worth(home, run, tau=1.0)["verdict"] == "stop"


def learning_worth(home, run, **options):
    from workbench.laws.learning_curve import worth
    return worth(run, home=home, **options)


def test_an_empty_database_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="Train a few models first"):
        laws.predict("chinchilla", home=Home.open(tmp_path))


# -- command line ------------------------------------------------------------------------------------------------------
def test_the_command_has_every_option_of_every_law():
    wanted = {o.name for law in laws.planners().values() for o in law.card.options}
    assert {name for name, _ in OPTIONS} == wanted


def test_predict_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    assert cli.main(["predict", "--json"]) == 0 and len(json.loads(capsys.readouterr().out)) == 9
    file = tmp_path / "points.csv"
    file.write_text("parameters,tokens,loss\n" + "\n".join(f"{n},{d},{1.7 + 60 * n**-.33 + 900 * d**-.37}" for n in (1e6, 4e6, 2e7)
                                                            for d in (1e7, 1e8, 6e8)))
    assert cli.main(["predict", "chinchilla", "--points", str(file), "--compute", "1e16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["parameters"] * found["figures"]["tokens"] * 6 == pytest.approx(1e16)
    assert cli.main(["predict", "annealing", "--example"]) == 0 and "Cosine over 600 steps" in capsys.readouterr().out
    assert cli.main(["predict", "chinchilla", "--card"]) == 0 and "tokens" in capsys.readouterr().out
    for bad in (["nothing"], ["chinchilla", "--published", "--compute", "x"], ["chinchilla", "--points", str(tmp_path / "no.csv")], ["chinchilla"]):
        assert cli.main(["predict", *bad]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1

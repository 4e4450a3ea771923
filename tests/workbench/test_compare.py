"""Comparison of runs: query language, curves on one axis, paired statistics against oracles, Pareto front."""

import math
from itertools import pairwise

import numpy as np
import pytest

from engines.errors import InputError
from storage import NotFound, Store
from workbench import compare, query, stats


class Home:
    def __init__(self, folder):
        self.store = Store(folder / "fettle.db")


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def spec(seed=0, minutes=2, data="python-docs", pipeline=(("lora", 8),), **more):
    return {"model": "stdlib-lm", "data": data, "pipeline": [{"method": m, "rank": r} for m, r in pipeline],
            "budget": {"minutes": minutes}, "seed": seed, **more}


def evaluated(home, name, scores, weights=None, metric=None, items="items-1", evaluation="stage", **fields):
    """A finished run with one evaluation of these scores."""
    metric = metric or ("bits/byte" if weights is not None else "accuracy")
    run = home.store.create_run(fields.pop("spec", spec()), name=name, status="finished")
    value = stats.value(scores, weights, stats.scale(metric))
    home.store.put_evaluation(run, evaluation, 0, 10, 1.0, metric, value, value - 0.01, value + 0.01, len(scores), np.asarray(scores, np.float32),
                              None if weights is None else np.asarray(weights, np.float32), items, {"loss": 1.0})
    home.store.update_run(run, metric=metric, value=value, value_low=value - 0.01, value_high=value + 0.01, **fields)
    return run


# -- the table -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, names", [
    ("data:python-docs minutes:2 method:lora status:finished", "a"), ("data:digits", "c"), ("minutes:>=2", "ab"), ("minutes:1..2", "ac"),
    ("method:lora,wanda", "abc"), ("-method:wanda", "a"), ("pipeline.rank:16", "bc"), ("rank:<16", "a"), ("tag:\"first try\"", "b"), ("is:starred", "c"),
    ("size:<10", "a"), ("-size:<10", "b"), ("status:finished,failed", "ac"), ("-status:queued", "ac"), ("#2", "b"), ("#2 #3", "bc"), ("docs", "ab"),
    ("warm docs", "b"), ("age:<1h", "abc"), ("age:>1h", ""), ("name:a*", "a"), ("is:archived", "d"), ("seed:7", "c"), ("", "abc"),
    ("model:stdlib-lm", "abc"), ("is:final", "ac"), ('"unfinished quote', "")])
def test_the_query_language(home, text, names):
    store = home.store
    store.update_run(store.create_run(spec(), name="a", status="finished"), size_bytes=9_000_000)
    store.update_run(store.create_run(spec(minutes=5, pipeline=(("wanda", 16), ("lora", 16))), name="b", note="warm", tags=["first try"]),
                     size_bytes=12_000_000)
    c = store.create_run(spec(minutes=1, seed=7, data={"source": "digits", "limit": 100}, pipeline=(("wanda", 16),)), name="c", status="failed")
    store.update_run(c, starred=True)
    store.archive_run(store.create_run(spec(data="other"), name="d"))
    found = compare.table(text, "id", home=home)
    assert "".join(r["name"] for r in found["rows"]) == names and found["total"] == len(names)


@pytest.mark.parametrize("text", ["minutes:<x", "status:done", "is:nice", "size:big", "age:3", "-minutes:1..3", "rank:>many"])
def test_a_query_that_cannot_be_is_refused(home, text):
    with pytest.raises(InputError):
        compare.table(text, home=home)


def test_sort_and_pages(home):
    for i in range(7):
        home.store.update_run(home.store.create_run(spec(seed=i), name=f"r{i}"), value=[3, 1, None, 5, 2, 0, 4][i])
    first, last = compare.table("", "quality", 0, 3, home=home), compare.table("", "quality", 2, 3, home=home)
    assert [r["name"] for r in first["rows"]] == ["r5", "r1", "r4"] and first["pages"] == 3 and first["total"] == 7
    assert [r["name"] for r in last["rows"]] == ["r2"], "no figure comes last"
    assert [r["name"] for r in compare.table("", "-value", 0, 2, home=home)["rows"]] == ["r3", "r6"]
    assert query.order("age") == "-created" and query.order("-age") == "created"
    for sort in ("nonsense", "spec", "value;drop"):
        with pytest.raises(InputError, match="no column"):
            compare.table("", sort, home=home)


def test_rows_say_what_was_run(home):
    home.store.create_run(spec(data={"source": "digits"}, pipeline=(("wanda", 1), ("lora", 2))), name="r")
    (row,) = compare.table(home=home)["rows"]
    assert (row["data"], row["model"], row["methods"], row["pipeline"]) == ("digits", "stdlib-lm", ["wanda", "lora"], "wanda → lora")


def test_seed_groups(home):
    ids = [evaluated(home, f"s{seed}", [v, v, v, v], spec=spec(seed=seed, name=f"s{seed}", tags=["x"])) for seed, v in ((0, 0.0), (1, 1.0), (2, 0.5))]
    other = evaluated(home, "other", [1.0, 1.0], spec=spec(minutes=3))
    one, two = compare.groups([*ids, other], home=home)
    assert one["ids"] == ids and one["seeds"] == [0, 1, 2] and one["mean"] == pytest.approx(0.5) and (one["min"], one["max"]) == (0.0, 1.0)
    assert one["low"] == pytest.approx(0.5 - 4.303 * 0.5 / math.sqrt(3)) and two["low"] is None and two["n"] == 1
    grouped = compare.table("", "id", grouped=True, home=home)
    assert grouped["total"] == 2 and grouped["rows"][0]["group"]["n"] == 3


# -- overlay -------------------------------------------------------------------------------------------------
def curves(home, seed=0, steps=50, offset=0.0, energy=True):
    run = home.store.create_run(spec(seed=seed), name=f"c{seed}")
    home.store.append(run, [(name, s, value, s * 0.5) for s in range(1, steps + 1) for name, value in
                            (("loss", 2.0 + offset - s / 100), ("tokens", s * 1000.0))])
    home.store.append(run, [("metric", s, 1.0 + offset, s * 0.5) for s in (0, steps)])
    if energy:
        home.store.append(run, [("energy/joules", t * 500, t * 10.0, t * 0.5) for t in range(0, steps + 1, 5)], clock=True)
    return run


def test_the_four_axes(home):
    run = curves(home)
    at = {x: compare.compare([run], x, home=home)["series"] for x in ("step", "tokens", "seconds", "joules")}
    assert at["step"]["loss"][0]["x"] == list(range(1, 51))
    assert at["tokens"]["loss"][0]["x"] == [s * 1000.0 for s in range(1, 51)] and at["tokens"]["metric"][0]["x"] == [0.0, 50_000.0]
    assert at["seconds"]["loss"][0]["x"] == [s * 0.5 for s in range(1, 51)]
    assert at["joules"]["loss"][0]["x"] == pytest.approx([s * 10.0 for s in range(1, 51)])
    assert all(at[x]["loss"][0]["value"] == at["step"]["loss"][0]["value"] for x in at)


def test_a_missing_counter_is_said_and_not_shown_as_zero(home):
    with_counter, without = curves(home, 0), curves(home, 1, energy=False)
    found = compare.compare([with_counter, without], "joules", home=home)
    assert [c["id"] for c in found["series"]["loss"]] == [with_counter]
    assert found["missing"] == [{"id": without, "reason": "no energy counter here"}]


def test_smoothing_comes_before_thinning_and_keeps_gaps(home):
    run = home.store.create_run(spec(), name="r")
    rng = np.random.default_rng(0)
    values = rng.random(3000)
    home.store.append(run, [("loss", i, float("nan") if i == 5 else v, 0.0) for i, v in enumerate(values)])
    (curve,) = compare.compare([run], smoothing=0.9, buckets=100, names=("loss",), home=home)["series"]["loss"]
    mean, norm, soft = 0.0, 0.0, {}
    for i, v in enumerate(values):
        if i != 5:
            mean, norm = 0.9 * mean + 0.1 * v, 0.9 * norm + 0.1
            soft[i] = mean / norm
    assert 100 < len(curve["x"]) <= 203
    kept = dict(zip(curve["x"], curve["smooth"]))
    assert kept.pop(5) is None
    assert kept == pytest.approx({s: soft[s] for s in kept})
    assert "smooth" not in compare.compare([run], home=home)["series"]["loss"][0]


def test_bands_of_seeds(home):
    ids = [curves(home, 0), curves(home, 1, offset=0.2, steps=30), curves(home, 2, offset=0.1)]
    found = compare.compare(ids, home=home)
    (band,) = found["bands"]["loss"]
    assert band["n"] == 3 and band["x"][0] == 1 and band["x"][-1] == 30, "only where all seeds are"
    at = band["x"].index(10)
    assert band["low"][at] == pytest.approx(1.9) and band["high"][at] == pytest.approx(2.1) and band["mean"][at] == pytest.approx(2.0)
    assert [r["group"] for r in found["runs"]] == [0, 0, 0] and "energy/joules" in found["available"]


def test_compare_refuses(home):
    run = curves(home)
    for bad in (dict(x="epoch"), dict(smoothing=1.0), dict(smoothing="much")):
        with pytest.raises(InputError):
            compare.compare([run], **bad, home=home)
    with pytest.raises(InputError, match="no run is chosen"):
        compare.compare([], home=home)
    with pytest.raises(NotFound):
        compare.compare([99], home=home)


# -- settings ------------------------------------------------------------------------------------------------
def test_diff_shows_what_differs_with_defaults_and_choices(home):
    store = home.store
    one = store.create_run({**spec(), "name": "one", "training": {"lr": 0.001}}, name="one")
    two = store.create_run({**spec(minutes=3, pipeline=(("lora", 8), ("int8", 1))), "name": "two"}, name="two")
    store.put_stage(two, 0, "lora", {"method": "lora", "rank": 8, "targets": "all"})
    found = compare.diff([one, two], home=home)
    rows = {r["field"]: r["values"] for r in found["rows"]}
    assert rows["budget.minutes"] == [2, 3] and rows["pipeline.1.method"] == [None, "int8"]
    assert "pipeline.0.rank" not in rows and "name" not in rows and found["differ"] == len(found["rows"]) < found["total"]
    assert len(compare.diff([one, two], everything=True, home=home)["rows"]) == found["total"]
    label = next(r["label"] for r in found["rows"] if r["field"] == "pipeline.1.method")
    assert label == "stage 2 method"


def test_diff_shows_what_auto_became(home):
    store, ids = home.store, []
    for name, rank, became in (("one", "auto", 12), ("two", 12, 12), ("three", "auto", 4)):
        ids.append(store.create_run({"model": "m", "data": "d", "pipeline": [{"method": "made-up", "rank": rank}], "budget": {}}, name=name))
        store.put_stage(ids[-1], 0, "made-up", {"rank": became})
    assert compare.diff(ids[:2], home=home)["rows"] == []
    (row,) = compare.diff(ids, home=home)["rows"]
    assert row["values"] == [12, 12, 4] and row["auto"] == [True, False, True]


# -- paired statistics ---------------------------------------------------------------------------------------
def test_mcnemar_against_the_binomial_sum():
    for k, n in ((0, 0), (0, 1), (0, 6), (3, 12), (10, 40), (200, 500), (1000, 2000)):
        exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
        assert stats.binomial(k, n) == pytest.approx(exact, rel=1e-9)
    a, b = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 0, 1])
    assert stats.mcnemar(a, b) == (1.0, 2, 1)


def test_holm_against_the_definition():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_student_against_scipy():
    from scipy import stats as reference
    assert pytest.approx([reference.t.ppf(0.975, d) for d in range(1, 31)], abs=6e-4) == stats.STUDENT


def test_the_weighted_ratio_is_used_for_bits_per_byte(home):
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 2000, 300).astype(np.float32)
    nats = (weights * rng.normal(1.2, 0.1, 300)).astype(np.float32)
    better = (nats * 0.97).astype(np.float32)
    one, two = evaluated(home, "one", nats, weights), evaluated(home, "two", better, weights)
    found = compare.paired(one, two, home=home)
    assert found["difference"] == pytest.approx((better.sum(dtype=np.float64) - nats.sum(dtype=np.float64)) / (math.log(2) * weights.sum(dtype=np.float64)))
    assert found["low"] < found["difference"] < found["high"] < 0 and found["p"] < 0.001 and found["better"] == two and found["n"] == 300
    assert found["values"][0] == pytest.approx(home.store.run(one)["value"])
    assert "two is better than one" in found["text"] and "bits/byte" in found["text"]
    back = compare.paired(two, one, home=home)
    assert back["better"] == two and back["difference"] == -found["difference"]


def test_noise_is_called_noise_and_says_what_would_decide(home):
    rng = np.random.default_rng(2)
    weights = np.full(400, 100.0)
    base = rng.normal(80, 10, 400)
    one, two = evaluated(home, "one", base, weights), evaluated(home, "two", base + rng.normal(0.05, 3, 400), weights)
    found = compare.paired(one, two, home=home)
    assert found["better"] is None and found["p"] > 0.05 and found["low"] < 0 < found["high"]
    assert "cannot be told apart" in found["text"] and found["needed"] > 400 and "would decide it" in found["text"]
    same = compare.paired(one, evaluated(home, "three", base, weights), home=home)
    assert same["p"] == 1.0 and same["difference"] == 0 and same["needed"] is None


def test_the_interval_agrees_with_the_normal_one_and_covers():
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(60):
        a = rng.normal(0, 1, 200)
        b = a + rng.normal(0.1, 0.5, 200)
        found = stats.difference(a, b, np.ones(200), draws=1000, seed=trial)
        d = b - a
        half = 1.96 * d.std(ddof=1) / math.sqrt(200)
        assert found["low"] == pytest.approx(d.mean() - half, abs=0.02) and found["high"] == pytest.approx(d.mean() + half, abs=0.02)
        inside += found["low"] <= 0.1 <= found["high"]
    assert inside >= 52, "95 % of intervals hold the truth"


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(4)
    ps = []
    for trial in range(150):
        a = rng.normal(0, 1, 100)
        ps.append(stats.difference(a, a + rng.normal(0, 1, 100), np.ones(100), draws=1000, seed=trial)["p"])
    assert 0.01 < np.mean(np.array(ps) < 0.1) < 0.2 and 0.4 < np.mean(ps) < 0.6


def test_accuracy_uses_mcnemar(home):
    right = np.ones(500)
    wrong = right.copy()
    wrong[:30] = 0
    one, two = evaluated(home, "one", right), evaluated(home, "two", wrong)
    found = compare.paired(one, two, home=home)
    assert found["test"].startswith("McNemar") and found["p"] == pytest.approx(2 / 2**30) and found["better"] == one
    assert "100.0 % against 94.0 %" in found["text"] and (found["only_a"], found["only_b"]) == (30, 0)


def test_pairs_that_cannot_be_compared_are_refused(home):
    one = evaluated(home, "one", [1.0, 0.0])
    other_items, other_metric = evaluated(home, "two", [1.0, 0.0], items="items-2"), evaluated(home, "three", [1.0, 2.0], [1.0, 1.0])
    empty = home.store.create_run(spec(), name="empty")
    for b, match in ((other_items, "different items"), (other_metric, "bits/byte"), (empty, "no evaluation"), (one, "at least 2")):
        with pytest.raises(InputError, match=match):
            compare.paired(one, b, home=home)


def test_the_finished_model_speaks_for_the_run(home):
    one, two = evaluated(home, "one", [1.0, 1.0]), evaluated(home, "two", [0.0, 1.0])
    home.store.put_evaluation(two, "during", 0, 99, 2.0, "accuracy", 0.0, 0, 0, 1, [0.0], None, "fewer items")
    assert compare.paired(one, two, home=home)["n"] == 2


def test_tiers(home):
    rng = np.random.default_rng(5)
    weights = np.full(500, 50.0)
    base = rng.normal(60, 8, 500)
    levels = {"good": 0.0, "good-too": 0.01, "worse": 2.0, "worse-too": 2.02, "bad": 6.0}
    ids = {name: evaluated(home, name, base + shift + rng.normal(0, 1, 500), weights) for name, shift in levels.items()}
    odd = evaluated(home, "odd", [1.0, 0.0])
    found = compare.tiers([*ids.values(), odd], home=home)
    assert {r["name"]: r["tier"] for r in found["rows"]} == {"good": "A", "good-too": "A", "worse": "B", "worse-too": "B", "bad": "C"}
    assert [r["value"] for r in found["rows"]] == sorted(r["value"] for r in found["rows"])
    assert found["left_out"] == [{"id": odd, "reason": "measured in accuracy"}] and found["n"] == 500
    with pytest.raises(InputError, match="same items"):
        compare.tiers([odd, ids["bad"]], home=home)


def test_tiers_of_accuracy_have_the_best_first(home):
    right = np.ones(300)
    for name, wrong in (("low", 60), ("high", 2), ("near", 4)):
        scores = right.copy()
        scores[:wrong] = 0
        evaluated(home, name, scores)
    found = compare.tiers(["low", "high", "near"], home=home)
    assert [(r["name"], r["tier"]) for r in found["rows"]] == [("high", "A"), ("near", "A"), ("low", "B")]


# -- Pareto --------------------------------------------------------------------------------------------------
def test_the_front_against_brute_force():
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 8, 60).tolist(), rng.integers(0, 8, 60).tolist()
    flags = stats.front(x, y, lower_x=True, lower_y=False)
    for i, flag in enumerate(flags):
        beaten = any(x[j] <= x[i] and y[j] >= y[i] and (x[j] < x[i] or y[j] > y[i]) for j in range(60))
        assert flag == (not beaten)
    assert stats.front([1, None], [1, 5]) == [True, False]


def test_pareto_of_size_and_quality(home):
    weights, rng = np.full(10, 1.0), np.random.default_rng(7)

    def nats(q, noise=0.0):
        spread = rng.normal(0, noise, 10)
        return (q + spread - spread.mean()) * math.log(2)

    made = {name: evaluated(home, name, nats(q, 0.1 if name == "near" else 0.0), weights, size_bytes=size, spec=spec(minutes=3, budget={"size_mb": 9}))
            for name, q, size in (("small", 2.0, 4e6), ("middle", 1.5, 8e6), ("beaten", 1.9, 9e6), ("near", 1.505, 8e6), ("large", 1.2, 16e6))}
    none = evaluated(home, "no size", np.full(10, 1.0), weights)
    other = evaluated(home, "digits", [1.0, 0.0], size_bytes=1e6)
    found = compare.pareto([*made.values(), none, other], home=home)
    points = {p["name"]: p for p in found["points"]}
    assert [next(n for n, i in made.items() if i == j) for j in found["front"]] == ["small", "middle", "large"]
    assert points["near"]["near"] and not points["beaten"]["near"] and points["beaten"]["beaten_by"] == [made["middle"], made["near"]]
    assert points["small"]["x"] == 4.0 and points["small"]["y_low"] == pytest.approx(1.99) and points["small"]["x_low"] is None
    assert {o["id"]: o["reason"] for o in found["left_out"]} == {none: "no figure for size", other: "measured in accuracy, the others in bits/byte"}
    assert found["limits"] == [{"axis": "x", "value": 9, "ids": list(made.values())}] and found["y"]["lower"] is True and found["y"]["unit"] == "bits/byte"
    xs = [points[n]["x"] for n in ("small", "middle", "large")]
    assert all(a < b for a, b in pairwise(xs))


def test_pareto_calls_near_only_what_a_paired_test_cannot_tell(home):
    """Intervals of two runs overlap because items differ in difficulty; the pairs still tell them apart."""
    rng = np.random.default_rng(8)
    weights, hard = np.full(200, 10.0), rng.normal(20, 5, 200)
    best = evaluated(home, "best", hard, weights, size_bytes=5e6)
    worse = evaluated(home, "worse", hard + rng.normal(0.05, 0.01, 200), weights, size_bytes=6e6)
    same = evaluated(home, "same", hard + rng.normal(0, 1, 200) + 0.01, weights, size_bytes=6e6)
    points = {p["id"]: p for p in compare.pareto([best, worse, same], home=home)["points"]}
    assert points[worse]["y_low"] < points[best]["y_high"] and not points[worse]["near"] and points[best]["front"]
    assert points[same]["near"] != points[same]["front"]


def test_a_run_without_training_lies_at_no_tokens(home):
    run = home.store.create_run(spec(pipeline=()), name="r")
    home.store.append(run, [("metric", 0, 1.5, 2.0)])
    found = compare.compare([run], "tokens", home=home)
    assert found["series"]["metric"][0]["x"] == [0.0] and found["missing"] == []


def test_pareto_turns_round_for_accuracy_and_refuses_unknown_axes(home):
    good, bad = evaluated(home, "good", [1.0, 1.0], seconds=5.0), evaluated(home, "bad", [1.0, 0.0], seconds=9.0)
    found = compare.pareto([good, bad], "seconds", "quality", home=home)
    assert found["front"] == [good] and found["y"]["lower"] is False
    assert compare.pareto([good, bad], "joules", "quality", home=home)["points"] == []
    for axes in (("colour", "quality"), ("size", "size")):
        with pytest.raises(InputError):
            compare.pareto([good], *axes, home=home)


def test_answers_are_json(home):
    import json
    ids = [curves(home, 0), curves(home, 1)]
    home.store.append(ids[0], [("loss", 60, float("inf"), 30.0), ("loss", 61, float("nan"), 30.0)])
    for found in (compare.compare(ids, smoothing=0.5, home=home), compare.diff(ids, home=home), compare.pareto(ids, home=home),
                  compare.table(home=home), compare.groups(ids, home=home)):
        json.dumps(found, allow_nan=False)


def test_torch_is_not_imported():
    import subprocess
    import sys
    code = "import workbench.compare, workbench.report, storage, sys; raise SystemExit('torch' in sys.modules or 'gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

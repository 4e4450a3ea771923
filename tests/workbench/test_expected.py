"""Expected quality: from priors, from like runs, across models; and how often its intervals hold."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workbench import planned
from tests.workbench.recommending import BASE, finish, spec, usual, varied
from workbench import expected, planner, priors
from workbench.points import of_cost, score, value_of
from workbench.priors import Stage
from workbench.spec import RunSpec


def ask(home, given):
    built = RunSpec.from_dict(given)
    scene = planner.scene_of(built, home)
    resolved, cost = planner.Chooser(built, scene).run()
    return expected.judge(scene, home.store)(resolved, cost), usual(of_cost(resolved, cost, scene))


def test_nothing_known_is_said(home, llama, text):
    row = planner.forecast(spec(llama, text, "lora", steps=50, quality=1.2), home)["limits"]["quality"]
    assert row["value"] is None and row["state"] == "none" and row["limit"] == 1.2
    assert row["reason"].startswith("nothing known yet: no run has evaluated") and row["source"] == "prior"
    assert row["gain"] > 0 and row["gain_low"] < row["gain"] < row["gain_high"]


def test_one_run_makes_the_base_known(home, llama, text):
    finish(home, spec(llama, text, "int8"), usual)
    found, _ = ask(home, spec(llama, text, "lora", steps=50))
    assert found["base"] == BASE and found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(BASE * 2.718281828 ** -found["gain"])


def test_like_runs_say_more_than_priors(home, llama, text):
    finish(home, spec(llama, text, "int8"), usual)
    before, truth = ask(home, spec(llama, text, "lora", steps=120))
    for steps in (40, 80, 160, 320):
        finish(home, spec(llama, text, "lora", steps=steps), usual)
    after, _ = ask(home, spec(llama, text, "lora", steps=120))
    assert before["source"] != "history" and after["source"] == "history" and after["near"] >= 2
    assert abs(after["gain"] - truth) < 0.5 * abs(before["gain"] - truth)
    assert after["gain_high"] - after["gain_low"] < 0.7 * (before["gain_high"] - before["gain_low"])
    assert after["gain_low"] <= truth <= after["gain_high"]
    assert "runs like this" in after["reason"]


def test_the_interval_widens_with_distance(home, llama, text):
    for s in (0.45, 0.5, 0.55):
        finish(home, spec(llama, text, {"method": "wanda", "sparsity": s}), usual)
    near, far = (ask(home, spec(llama, text, {"method": "wanda", "sparsity": s}))[0] for s in (0.5, 0.85))
    width = lambda e: e["gain_high"] - e["gain_low"]  # noqa: E731
    assert near["source"] == "history" and far["source"] != "history"
    assert width(far) > 3 * width(near)


def test_what_a_method_costs_is_carried_to_another_model(home, llama, text, tmp_path):
    other = str(planned.folder(tmp_path / "other", dict(planned.LLAMA, hidden_size=96, intermediate_size=224)))
    finish(home, spec(other, text, "int8"), usual, base=3.0)
    alone, truth = ask(home, spec(other, text, {"method": "wanda", "sparsity": 0.5}))
    for s in (0.4, 0.5, 0.6):
        finish(home, spec(llama, text, {"method": "wanda", "sparsity": s}), usual)
    carried, _ = ask(home, spec(other, text, {"method": "wanda", "sparsity": 0.5}))
    assert abs(carried["gain"] - truth) < 0.6 * abs(alone["gain"] - truth)
    assert carried["base"] == 3.0, "the base is the other model's own"


def test_intervals_are_calibrated_on_the_database(home, llama, text):
    for i, given in enumerate(varied(llama, text)):
        finish(home, given, usual, seed=i)
    model, _, _ = expected.fitted(home.store, "causal-lm")
    assert model.calibration["settings"] >= 24
    assert 0.75 <= model.calibration["coverage"] <= 1.0
    assert model.calibration["error"] < 0.05
    held = 0
    fresh = [spec(llama, text, {"method": "wanda", "sparsity": 0.6}), spec(llama, text, "lora", steps=100), spec(llama, text, "full", steps=150),
             spec(llama, text, {"method": "magnitude", "sparsity": 0.4}, "lora", steps=100), spec(llama, text, "adalora", steps=200),
             spec(llama, text, "full", "int4", steps=100), spec(llama, text, {"method": "random", "sparsity": 0.4})]
    for given in fresh:
        found, truth = ask(home, given)
        held += found["gain_low"] <= truth <= found["gain_high"]
    assert held >= len(fresh) - 1


def test_a_wrong_world_widens_the_intervals(home, llama, text):
    """Results that no likeness explains: the noise grows until the intervals hold again."""
    for i, given in enumerate(varied(llama, text)):
        finish(home, given, lambda p, i=i: usual(p) + (0.25 if i % 2 else -0.25), seed=i)
    model, _, _ = expected.fitted(home.store, "causal-lm")
    assert model.noise > 0.05 and model.calibration["coverage"] >= 0.7


def test_seeds_are_one_setting(home, llama, text):
    for seed in range(9):
        finish(home, spec(llama, text, "lora", steps=60), usual, seed=seed)
    model, known, _ = expected.fitted(home.store, "causal-lm")
    assert len(known) == 9 and model.calibration["settings"] == 1 and model.calibration["coverage"] is None
    assert "not calibrated" in model.calibration["text"]


def test_an_evaluation_between_stages_is_a_point_of_its_own(home, llama, text):
    run = finish(home, spec(llama, text, {"method": "wanda", "sparsity": 0.5}, "lora", steps=60), usual)
    home.store.put_evaluation(run, "stage", 0, 0, 1.0, "bits/byte", 1.7, 1.68, 1.72, 200, b"", None, "h")
    found = sorted(expected.history(home.store), key=lambda p: p.whole)
    assert [[s.method for s in p.stages] for p in found] == [["wanda"], ["wanda", "lora"]]
    assert found[0].gain == pytest.approx(score(1.7, "bits/byte") - score(BASE, "bits/byte"))


def test_accuracy_has_its_own_scale(home, tmp_path):
    bert = str(planned.folder(tmp_path / "bert", planned.BERT))
    data = str(planned.texts(tmp_path / "labels.csv", rows=200, labels=4))
    given = dict(spec(bert, data, "lora", steps=30), task="text-classification")
    alone, _ = ask(home, given)
    assert alone["metric"] == "accuracy" and alone["base"] == 0.25 and 0.25 < alone["value"] < 1.0, "a new head starts at chance"
    finish(home, given, lambda p: 2.0, base=0.25, metric="accuracy")
    row = planner.forecast(dict(given, budget={"steps": 40, "quality": 95}), home)["limits"]["quality"]
    assert row["limit"] == 0.95 and row["state"] == "over" and row["value"] == pytest.approx(value_of(2.0 + score(0.25, "accuracy"), "accuracy"), abs=0.1)


def test_measured_claims_take_the_place_of_published_figures(home):
    stage = Stage("wanda", "pruning", sparsity=0.5, calibrated=True)
    published, source = priors.damage(stage)
    assert "Simple and Effective" in source
    home.store.put_claim("wanda", "half", verdict="not reproduced", base=1.0, paper=3.0, ours=1.02, settings={"sparsity": 0.5})
    claimed, source = priors.damage(stage, priors.claims_of(home.store))
    assert claimed < 0.3 * published and source == "claim half of wanda"
    assert priors.damage(Stage("wanda", "pruning", sparsity=0.7, calibrated=True), priors.claims_of(home.store))[0] > claimed


@pytest.mark.parametrize("better, worse", [
    (Stage("wanda", sparsity=0.3, calibrated=True), Stage("wanda", sparsity=0.6, calibrated=True)),
    (Stage("gptq", bits=4, calibrated=True), Stage("gptq", bits=2, calibrated=True)),
    (Stage("unheard-of", sparsity=0.5, calibrated=True), Stage("unheard-of", sparsity=0.5)),
    (Stage("structured", removed=0.2), Stage("structured", removed=0.5)),
    (Stage("lora", trains=True, units=1e6, share=0.01), Stage("lora", trains=True, units=1e4, share=0.01))])
def test_priors_know_what_is_milder(better, worse):
    gain = lambda *s: priors.prior(s, task="causal-lm").gain  # noqa: E731
    assert gain(better) > gain(worse)
    recover = Stage("full", trains=True, units=1e6, share=1.0)
    assert gain(worse, recover) > gain(worse)


def test_no_torch_and_quick(home, llama, text):
    for given in varied(llama, text)[:12]:
        finish(home, given, usual)
    code = ("import sys, time\n"
            "from workbench import planner\n"
            f"given = {spec(llama, text, 'lora', steps=50)!r}\n"
            "planner.forecast(given)\n"
            "times = []\n"
            "for i in range(5):\n"
            "    t = time.perf_counter(); found = planner.forecast(given); times.append(time.perf_counter() - t)\n"
            "assert found['limits']['quality']['near'] >= 1, found['limits']['quality']\n"
            "assert not {'torch', 'scipy', 'transformers'} & set(sys.modules)\n"
            "print(min(times))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1

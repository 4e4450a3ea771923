"""Recommend: what is listed fits, the order follows the runs, and limits that nothing keeps are one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.budget import Budget
from engines.errors import InputError
from tests.workbench import planned
from tests.workbench.recommending import finish, spec, usual, varied
from workbench import pipelines, planner, recommend
from workbench.commands.recommend import flags
from workbench.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]


def ask(home, model, data, families=(), **budget):
    return recommend.recommend(dict(model=model, data=data, budget=budget), home, families=families, count=300)


def place(found, *methods) -> int:
    return next(r["rank"] for r in found["rows"] if tuple(r["methods"]) == methods)


def test_without_a_run_the_order_is_sane_and_says_on_what_it_rests(home, llama, text):
    found = ask(home, llama, text, minutes=2)
    json.dumps(found, allow_nan=False)
    assert {r["expected"]["source"] for r in found["rows"]} == {"prior"} and found["base"] is None
    assert "published figures" in found["basis"] and "not known yet" in found["basis"]
    training = [r for r in found["rows"] if r["methods"] in (["full"], ["lora"])]
    assert training and max(r["rank"] for r in training) < place(found, "int8")
    assert place(found, "int8") < place(found, "wanda")
    assert [r["rank"] for r in found["rows"]] == list(range(1, len(found["rows"]) + 1))
    tiers = [r["tier"] for r in found["rows"]]
    assert tiers == sorted(tiers) and tiers[0] == "A" and tiers[-1] > "A"
    assert any(r["expected"]["priors"] for r in found["rows"] if "wanda" in r["methods"])


def test_every_method_is_considered_alone(home, llama, text):
    from engines import registry
    search = recommend.Search(RunSpec.from_dict(spec(llama, text, minutes=2)), home)
    search.all()
    alone = {c.spec.pipeline[0].card.id for c in search.found if len(c.spec.pipeline) == 1} | {r["method"] for r in search.refused}
    assert alone == set(registry.methods())
    assert any(len(c.spec.pipeline) == 3 for c in search.found)


def test_what_is_listed_fits_and_can_be_run(home, llama, text):
    finish(home, spec(llama, text, "int8"), usual)
    found = ask(home, llama, text, minutes=2, memory_gb=2, size_mb=0.25, trainable=0.2)
    assert found["rows"] and found["nearest"]
    for row in found["rows"]:
        forecast = planner.forecast(row["spec"], home)
        assert forecast["fits"] and forecast["size"]["bytes"] <= 0.25e6 and row["size_bytes"] == forecast["size"]["bytes"]
        assert forecast["trainable"]["share"] <= 0.2
        assert row["seconds"] == pytest.approx(forecast["seconds"]["total"], abs=0.5)
        assert row["expected"]["value"] == pytest.approx(forecast["limits"]["quality"]["value"])


def test_what_does_not_fit_comes_with_a_change_that_does(home, llama, text):
    found = ask(home, llama, text, minutes=2, size_mb=0.3)
    changed = [r for r in found["nearest"] if r["change"]]
    assert changed and all(r["over"] for r in found["nearest"])
    for row in changed:
        other = RunSpec.from_dict(row["spec"])
        assert not planner.forecast(other, home)["fits"]
        ((path, value),) = row["change"]["patch"].items()
        assert planner.forecast(other.setting(path, value), home)["fits"]


def test_the_order_follows_the_runs(home, llama, text):
    def upside_down(point):  # here adapters learn and whole weights do not
        return 0.0 if any(s.method == "full" for s in point.stages) else usual(point)
    for i, given in enumerate(g for n in (40, 100, 300) for g in (spec(llama, text, "lora", steps=n), spec(llama, text, "full", steps=n))):
        finish(home, given, upside_down, seed=i)
    found = ask(home, llama, text, steps=150)
    assert place(found, "lora") < place(found, "full")
    best = next(r for r in found["rows"] if r["methods"] == ["lora"])
    assert best["expected"]["source"] == "history" and best["tier"] == "A"
    assert next(r for r in found["rows"] if r["methods"] == ["full"])["tier"] > "A"


def test_the_first_row_is_near_the_best_in_truth(home, llama, text):
    for i, given in enumerate(varied(llama, text)):
        finish(home, given, usual, seed=i)
    search = recommend.Search(RunSpec.from_dict(spec(llama, text, steps=150)), home)
    search.all()
    truth = {c.place: usual(c.point) for c in search.found if not c.over}
    first = search.ranked([c for c in search.found if not c.over])[0]
    assert usual(first.point) > max(truth.values()) - 0.03
    assert search.calibration["coverage"] >= 0.75


def test_a_quality_floor_drops_what_is_expected_to_miss_it(home, llama, text):
    finish(home, spec(llama, text, "int8"), usual)
    free = ask(home, llama, text, steps=150)
    floor = sorted(r["expected"]["value"] for r in free["rows"])[len(free["rows"]) // 3]
    found = ask(home, llama, text, steps=150, quality=round(floor, 3))
    assert 0 < found["fitting"] < free["fitting"]
    assert all(r["expected"]["value"] <= floor + 1e-3 for r in found["rows"])
    assert any("quality" in r["over"] for r in found["nearest"])


@pytest.mark.parametrize("budget, field, words", [
    (dict(size_mb=0.01), "budget.size_mb", "smallest result"),
    (dict(minutes=0.001), "budget.minutes", "quickest pipeline"),
    (dict(memory_gb=0.05), "budget.memory_gb", "leanest")])
def test_a_limit_that_nothing_keeps_is_one_sentence(home, llama, text, budget, field, words):
    found = ask(home, llama, text, **budget)
    assert not found["rows"] and [c["field"] for c in found["contradictions"]] == [field]
    row = found["contradictions"][0]
    assert words in row["problem"] and row["least"] > row["limit"] and row["text"].count(". ") == 1
    with pytest.raises(InputError) as refused:
        recommend.refuse(found)
    assert refused.value.field == field
    key = field.split(".")[1]
    if key != "memory_gb":  # the least that is named is really enough
        assert ask(home, llama, text, **{key: row["least"] * 1.05})["rows"]


def test_limits_that_are_none_are_said(home, llama, text):
    notes = ask(home, llama, text, steps=20, trainable=3, joules=50)["notes"]
    assert any("Nothing can be trained" in n for n in notes) and any("nergy" in n for n in notes)
    assert any("is no limit" in n for n in ask(home, llama, text, steps=20, trainable=10**9)["notes"])


@pytest.mark.parametrize("budget", [dict(minutes=0), dict(size_mb=-1), dict(quality=0), dict(quality=101), dict(trainable=1.5), dict(joules=float("nan"))])
def test_limits_that_mean_nothing_are_refused(budget):
    with pytest.raises(InputError) as refused:
        Budget(**budget)
    assert refused.value.field == f"budget.{next(iter(budget))}" and refused.value.remedy


def test_families(home, llama, text):
    found = ask(home, llama, text, families=("quantization",), steps=20)
    assert found["rows"] and all("quantization" in r["families"] for r in found["rows"])
    with pytest.raises(InputError, match="family"):
        ask(home, llama, text, families=("quantisation",), steps=20)


def test_variants_follow_the_budget():
    from engines import registry
    lora, gptq = registry.get("lora"), registry.get("gptq")
    assert pipelines.variants(lora, Budget(trainable=0.01)) == [{"method": "lora", "rank": "auto"}]
    assert [v["rank"] for v in pipelines.variants(lora, Budget())] == list(pipelines.GRID["rank"])
    assert pipelines.variants(gptq, Budget(size_mb=1))[0]["bits"] == "auto"


def test_the_command_line(home, llama, text, tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "workbench", *words], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "WORKBENCH_HOME": str(tmp_path / "home")})
    saved = tmp_path / "sweep.yaml"
    done = run("recommend", "--model", llama, "--data", text, "--steps", "20", "--count", "3", "--json", "--save", str(saved))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 3
    import yaml
    assert yaml.safe_load(saved.read_text())["sweep"]["specs"] == [r["spec"] for r in found["rows"]] and "&" not in saved.read_text()
    done = run("recommend", "--model", llama, "--data", text, "--size-mb", "0.01")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "budget.size_mb" in done.stderr
    import shlex
    words = shlex.split(flags(found["rows"][0]["spec"]))
    planned_again = json.loads(run("plan", *words, "--json").stdout)
    assert [s["method"] for s in planned_again["stages"]] == found["rows"][0]["methods"]


def test_image_models_have_pipelines_too(home, tmp_path):
    vit = str(planned.folder(tmp_path / "vit", planned.VIT, tokenizer=False))
    found = ask(home, vit, "digits", steps=20)
    assert found["metric"] == "accuracy" and place(found, "full") and not any("traceback" in r["reason"].lower() for r in found["refused"])


def test_a_floor_that_only_priors_expect_to_be_missed_still_has_its_change(home, tmp_path):
    bert = str(planned.folder(tmp_path / "bert", planned.BERT))
    data = str(planned.texts(tmp_path / "labels.csv", rows=200, labels=4))
    found = ask(home, bert, data, steps=30, quality=60)
    assert found["base"] == 0.25 and {r["expected"]["source"] for r in found["rows"]} <= {"prior"}
    missed = [r for r in found["nearest"] if r["over"] == ["quality"]]
    assert missed and all(r["change"] for r in missed)
    for row in missed:
        ((path, value),) = row["change"]["patch"].items()
        floor = planner.forecast(RunSpec.from_dict(row["spec"]).setting(path, value), home)["limits"]["quality"]
        assert floor["spare"] >= 0

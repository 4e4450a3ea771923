"""Calibration: what finished runs say of forecasts, what they may not say, and how far the planner follows them."""

import json
import math
import random
import time

import pytest

from tests.workbench import planned
from workbench import calibration, calibration_report, machine, planner
from workbench.shrinkage import fit, median, quantile, weighted_median
from workbench.spec import RunSpec


@pytest.fixture
def models(tmp_path):
    wide = dict(planned.LLAMA, hidden_size=256, intermediate_size=640, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    return [str(planned.folder(tmp_path / name, config)) for name, config in (("small", planned.LLAMA), ("wide", wide))]


def spec(model, data, *stages, **training):
    return dict(model=model, data=data, pipeline=[s if isinstance(s, dict) else {"method": s} for s in stages], budget={"steps": 10},
                training=dict(dict(batch=64, length=128, precision="fp32"), **training), task="causal-lm")


def finish(home, given, memory=1.0, offset=0, seconds=1.0, joules=None, events=(), status="finished", footprint=True):
    """A run whose measurement is its raw forecast with the estimated parts times ``memory``, and the seconds times ``seconds``."""
    forecast = planner.forecast(given, home)
    forecast["resolved"] = planner.resolve(given, home).to_dict()
    raw = forecast["raw"]
    run = home.store.create_run(RunSpec.from_dict(given).to_dict(), name=f"run-{random.random()}", forecast=forecast)
    phases = [dict(phase=p["phase"], peak_bytes=int(p["exact"] + offset + memory * (p["total"] - p["exact"])), seconds=seconds * p["seconds"])
              for p in raw["phases"]]
    found = dict(phases=phases, peak_bytes=max(p["peak_bytes"] for p in phases), trainable=forecast["trainable"]["count"],
                 size_bytes=forecast["size"]["bytes"], joules=joules)
    for kind, more in (("start", {}), *events):
        home.store.event(run, kind, "told", **more)
    if footprint:
        home.store.put_footprint(run, found)
    home.store.update_run(run, status=status, ended=time.time(), peak_bytes=found["peak_bytes"], seconds=sum(p["seconds"] for p in phases))
    return run


def peak(given, home):
    return planner.forecast(given, home)["memory"]["peak_bytes"]


def test_medians():
    assert median([3, 1, 2]) == 2 and median([4, 1, 2, 3]) == 2.5
    assert weighted_median([(1, 1), (2, 1), (3, 1)]) == 2 and weighted_median([(1, 10), (2, 1), (3, 1)]) == 1
    assert weighted_median([(1, 1), (3, 1)]) == 2
    assert quantile([0, 1, 2, 3, 4], 0.9) == pytest.approx(3.6)


def test_one_run_moves_little_and_many_decide():
    def rows(count):
        return [(i, ("", "a"), math.log(2), 1.0) for i in range(count)]
    one, many = fit(rows(1), (8, 4)).factor(("", "a")), fit(rows(50), (8, 4)).factor(("", "a"))
    assert 1.05 < one < 1.3 and 1.85 < many <= 2.0
    assert fit(rows(50), (8, 4)).factor(("", "never seen")) < many, "what is alike moves further than what is not"


def test_a_group_of_its_own_is_told_from_the_rest():
    rows = [(i, ("", "x" if i % 2 else "y"), math.log(1.5 if i % 2 else 1.0), 1.0) for i in range(60)]
    found = fit(rows, (8, 2))
    assert found.factor(("", "x")) == pytest.approx(1.5, rel=0.04) and found.factor(("", "y")) == pytest.approx(1.0, rel=0.04)


def test_what_says_little_weighs_little():
    rows = [(i, ("",), math.log(1.2), 1.0) for i in range(20)] + [(100 + i, ("",), math.log(3), 0.01) for i in range(30)]
    assert fit(rows, (1,)).factor(("",)) == pytest.approx(1.2, rel=0.02)


def test_without_runs_nothing_is_corrected(home, models, text):
    found = planner.forecast(spec(models[0], text, "full"), home)
    assert found["calibration"]["factor"] == 1.0 and found["calibration"]["runs"] == 0
    assert found["memory"]["peak_bytes"] == found["raw"]["peak_bytes"]
    assert "not corrected" in found["calibration"]["text"]


def test_the_planner_follows_its_runs(home, models, text):
    given = spec(models[0], text, "full")
    before = planner.forecast(given, home)
    phase = next(p for p in before["raw"]["phases"] if p["phase"] == "1 full")
    measured = phase["exact"] + 1.5 * (phase["total"] - phase["exact"])
    seen = [before["memory"]["peak_bytes"]]
    for _ in range(12):
        finish(home, given, memory=1.5)
        seen.append(peak(given, home))
    assert seen == sorted(seen), "each run moves it further the same way"
    assert seen[1] - seen[0] < 0.75 * (measured - seen[0]), "one run does not decide"
    assert seen[-1] == pytest.approx(measured, rel=0.05)
    after = planner.forecast(given, home)
    assert after["raw"]["phases"] == before["raw"]["phases"], "the raw figures stay as they were"
    assert after["calibration"]["runs"] == 12 and after["calibration"]["alike"] == 12
    assert after["calibration"]["factor"] == pytest.approx(seen[-1] / seen[0], rel=0.01)
    assert "from 12 runs on this machine, 12 of this model by these methods" in after["calibration"]["text"]
    for old, new in zip(before["memory"]["phases"], after["memory"]["phases"]):
        assert all(old["parts"][p] == new["parts"][p] for p in ("weights", "gradients", "optimizer"))
        assert new["total"] == sum(new["parts"].values())
    assert after["trainable"] == before["trainable"] and after["size"] == before["size"], "what is counted is not corrected"
    json.dumps(after, allow_nan=False)


def test_other_models_and_methods_move_less(home, models, text):
    pipelines = (("full",), ("lora",))
    before = {(m, p): peak(spec(m, text, *p), home) for m in models for p in pipelines}
    for _ in range(4):
        finish(home, spec(models[1], text, "full"), memory=1.6)
    moved = {at: peak(spec(at[0], text, *at[1]), home) / before[at] for at in before}
    assert moved[models[1], ("full",)] > moved[models[0], ("full",)] > 1.0
    assert moved[models[1], ("full",)] > moved[models[1], ("lora",)] > 1.0


def test_seconds_follow_too_and_the_limit_in_minutes_holds(home, models, text):
    given = spec(models[1], text, "full")
    plain = planner.forecast(given, home)
    for _ in range(10):
        finish(home, given, seconds=3.0)
    slower = planner.forecast(given, home)
    assert slower["seconds"]["total"] == pytest.approx(3 * plain["seconds"]["total"], rel=0.15)
    assert "corrected by 10 earlier runs" in slower["seconds"]["how"]
    timed = planner.forecast(dict(given, budget={"minutes": 6}), home)
    assert timed["seconds"]["total"] <= 361 and timed["steps"] > 10


def test_the_process_has_an_offset_of_its_own(home, models, text):
    given = spec(models[0], text, "lora")
    before = planner.forecast(given, home)
    for _ in range(10):
        finish(home, given, offset=60_000_000)
    after = planner.forecast(given, home)
    was, now = ({p["phase"]: p["parts"]["context"] for p in f["memory"]["phases"]} for f in (before, after))
    assert now["load"] - was["load"] == pytest.approx(50e6, abs=5e6)
    assert calibration.correction(home.store, home).memory.factor(calibration.keys(models[0], ("lora",), "lora")) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize(
    "change,why",
    [
        (dict(status="failed"), None),
        (dict(status="stopped"), None),
        (dict(events=(("resume", {}),)), "resumed"),
        (dict(events=(("start", {}),)), "resumed"),
        (dict(events=(("memory", {"knob": "accumulation"}),)), "a knob was lowered"),
        (dict(footprint=False), "no measurement"),
    ],
)
def test_who_may_not_say_anything(home, models, text, change, why):
    finish(home, spec(models[0], text, "full"), memory=2.0, **change)
    rows, left = calibration.observations(home.store, home)
    assert not rows and (why is None and not left or any(why in reason for reason in left)), left
    found = planner.forecast(spec(models[0], text, "full"), home)
    assert found["calibration"]["factor"] == 1.0 and found["calibration"]["left_out"] == sum(left.values())


def test_history_is_computed_again_when_a_formula_changes(home, models, text, monkeypatch):
    given = spec(models[0], text, "full")
    run = finish(home, given, memory=1.4)
    kept = home.store.run(run)["forecast"]
    kept["raw"]["formula"] = "of old"
    kept["raw"]["phases"] = [dict(p, total=10 * p["total"]) for p in kept["raw"]["phases"]]
    home.store.put_forecast(run, kept)
    rows, left = calibration.observations(home.store, home)
    assert not left and rows[0]["formula"] == calibration.formula()
    kind, total, exact, measured, *_ = next(p for p in rows[0]["phases"] if p[0] == "full")
    assert (measured - exact) / (total - exact) == pytest.approx(1.4, rel=0.01), "against the formulas as they are now"


def test_a_run_whose_model_is_gone(home, tmp_path, models, text):
    import shutil

    given = spec(models[0], text, "full")
    run = finish(home, given, memory=1.4)
    shutil.rmtree(models[0])
    assert len(calibration.observations(home.store, home)[0]) == 1, "its figures are of these formulas and were kept with it"
    kept = home.store.run(run)["forecast"]
    kept["raw"]["formula"] = "of old"
    home.store.put_forecast(run, kept)
    home.store.set_setting(calibration.SETTING, None)
    calibration._ROWS.clear()
    assert calibration.observations(home.store, home) == ([], {"its model is gone": 1})


def test_data_that_is_gone_is_not_needed(home, tmp_path, models):
    data = planned.texts(tmp_path / "brief.csv", rows=300)
    finish(home, spec(models[0], str(data), "lora"), memory=1.2)
    data.unlink()
    rows, left = calibration.observations(home.store, home)
    assert len(rows) == 1 and not left


def test_runs_of_another_machine_are_shown_and_not_followed(home, models, text):
    given = spec(models[0], text, "full")
    run = finish(home, given, memory=2.0)
    kept = home.store.run(run)["forecast"]
    kept["raw"]["machine"] = "cuda|Some GPU|16|2.0|5.0"
    home.store.put_forecast(run, kept)
    assert len(calibration.observations(home.store, home)[0]) == 1
    assert calibration.correction(home.store, home).runs == 0
    found = calibration_report.report(home.store, home)
    assert [row["key"] for row in found["by"]["machine"]] == ["Some GPU, 16 cores"]
    assert machine.hardware("cuda|Some GPU|16|2.0|5.0") == "cuda|Some GPU|16"


def test_a_forecast_is_not_slower_for_many_runs(home, models, text):
    for i in range(40):
        finish(home, spec(models[i % 2], text, ("full", "lora")[i % 3 % 2]), memory=1.1)
    given = spec(models[0], text, "full")
    planner.forecast(given, home)
    took = []
    for lr in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4):
        given["training"]["lr"] = lr
        began = time.thread_time()
        planner.forecast(given, home)
        took.append(time.thread_time() - began)
    assert min(took) < 0.020, took


def test_the_rows_are_kept_for_the_next_process(home, models, text, monkeypatch):
    for _ in range(3):
        finish(home, spec(models[0], text, "lora"), memory=1.2)
    first, _ = calibration.observations(home.store, home)
    calibration._ROWS.clear()
    monkeypatch.setattr(calibration, "_again", lambda *_: pytest.fail("computed again"))
    assert calibration.observations(home.store, home)[0] == first


def test_the_report_before_and_after(home, models, text):
    for i in range(20):
        finish(home, spec(models[i % 2], text, ("full", "lora")[i // 2 % 2]), memory=1.7, seconds=2.0)
    finish(home, spec(models[0], text, "full"), status="failed")
    found = calibration_report.report(home.store, home)
    assert found["runs"] == 20 and len(found["points"]) == 20
    whole = found["overall"]
    assert whole["memory"]["before"]["ratio"] < 0.95 and whole["memory"]["after"]["ratio"] == pytest.approx(1.0, abs=0.06)
    assert whole["memory"]["after"]["error"] < whole["memory"]["before"]["error"]
    assert whole["seconds"]["before"]["ratio"] == pytest.approx(0.5, abs=0.05) and whole["seconds"]["after"]["ratio"] > 0.8
    assert whole["trainable_exact"] == [20, 20] and whole["size_exact"] == [20, 20]
    assert {row["key"]: row["n"] for row in found["by"]["model"]} == {"small": 10, "wide": 10}
    assert {row["key"] for row in found["by"]["method"]} == {"full", "lora"}
    json.dumps(found, allow_nan=False)


def test_a_run_is_corrected_by_the_others_alone(home, models, text):
    for _ in range(5):
        finish(home, spec(models[0], text, "full"), memory=1.0)
    strange = finish(home, spec(models[1], text, "lora"), memory=2.5)
    point = next(p for p in calibration_report.report(home.store, home)["points"] if p["run"] == strange)
    assert point["memory"]["corrected"] == pytest.approx(point["memory"]["forecast"], rel=0.02), "nothing of its own measurement comes back"


def test_energy_from_metered_runs(home, models, text):
    given = spec(models[0], text, "full")
    none = planner.forecast(given, home)
    assert none["joules"]["total"] is None and none["joules"]["how"], "never zero"
    for _ in range(4):
        run = finish(home, given)
        found = home.store.footprint(run)
        home.store.put_footprint(run, found | {"joules": 50.0 * home.store.run(run)["seconds"]})
    calibration._ROWS.clear(), calibration._FITTED.clear(), home.store.set_setting(calibration.SETTING, None)
    known = planner.forecast(given, home)
    assert known["joules"]["total"] == pytest.approx(50 * known["seconds"]["total"], rel=0.02)
    assert "50.0 W" in known["joules"]["how"] and known["limits"]["joules"]["value"] == known["joules"]["total"]
    short = planner.forecast(dict(given, budget={"steps": 10, "joules": 1.0}), home)
    assert short["limits"]["joules"]["state"] == "over"


def test_the_command(home, models, text, capsys):
    from workbench import cli

    assert cli.main(["calibration"]) == 0
    assert "No finished run" in capsys.readouterr().out
    finish(home, spec(models[0], text, "full"), memory=1.3)
    assert cli.main(["calibration", "--by", "model"]) == 0
    out = capsys.readouterr().out
    assert "small" in out and "all" in out and "exact in 1 of 1" in out
    assert cli.main(["calibration", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 1 and found["grouped"] == "method" and found["by"][0]["key"] == "full"

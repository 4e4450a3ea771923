"""Runs read at the same expenditure: what is read, how old it is, what is not reached, and who is ahead."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engines.errors import InputError
from storage import Store
from workbench import cli, equal
from workbench.home import Home

N = 400


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    return Home.open()


def run(home, name, *, values=(2.0, 1.5, 1.2, 1.0), seconds=100.0, status="finished", metric="bits/byte", items="same", noise=0.2, seed=0,
        pipeline=("lora",), training=None, end=None, size=None, trainable=None, tokens=True, joules=False, data="python-docs"):
    """``values``: the base's, then of evaluations at equal distances to the end; the last is that of the stage and of the result."""
    store: Store = home.store
    spec = {"model": "stdlib-lm", "data": data, "pipeline": [{"method": m} for m in pipeline], "budget": {}, "seed": seed,
            **({"training": training} if training else {})}
    run_id = store.create_run(spec, name=name, status=status)
    draw, steps = np.random.default_rng(7), 100
    weights = np.full(N, 1 / np.log(2), np.float32)
    base = draw.normal(0, noise, N)
    own = np.random.default_rng(list(name.encode())).normal(0, noise / 4, N)
    base += own - own.mean() - base.mean()

    def score(label, stage, step, t, value):
        scores = (base + value).astype(np.float32)
        if metric == "accuracy":
            scores = (np.arange(N) < round(value * N)).astype(np.float32)
        store.put_evaluation(run_id, label, stage, step, t, metric, value, value - 0.02, value + 0.02, N, scores,
                             None if metric == "accuracy" else weights, items, {"loss": 2 * value})

    score("base", -1, 0, 2.0, values[0])
    each, last = seconds / (len(values) - 1), len(values) - 1
    for k, value in enumerate(values[1:], 1):
        score("during", len(pipeline) - 1, steps * k // last, each * k, value)
    if status == "finished":
        score("stage", len(pipeline) - 1, steps, seconds, values[-1])
        score("result", len(pipeline), steps, end or seconds + 1, values[-1])
    at = [(s, s / steps * seconds) for s in range(1, steps + 1)]
    rows = [("loss", s, values[0] - s / steps, t) for s, t in at] + [("lr", s, 1e-3 * (1 - s / steps), t) for s, t in at]
    rows += [("tokens", s, s * 1000.0, t) for s, t in at] if tokens else []
    store.append(run_id, rows)
    if joules:
        store.append(run_id, [("energy/joules", round(t * 1000), 10 * t, t) for _, t in at], clock=True)
    for i, m in enumerate(pipeline):
        store.put_stage(run_id, i, m, {}, status="finished" if status == "finished" or i < len(pipeline) - 1 else status)
    store.update_run(run_id, metric=metric, value=values[-1], value_low=values[-1] - 0.02, value_high=values[-1] + 0.02, n=N,
                     seconds=(end or seconds + 1) if status == "finished" else seconds, size_bytes=size, trainable=trainable, parameters=1_000_000)
    return run_id


def row(found, name):
    return next(r for r in found["rows"] if r["name"] == name)


def test_the_last_evaluation_at_or_before_is_read_and_its_age_told(home):
    a = run(home, "a", seconds=90.0)
    for at, value, age in ((29.9, 2.0, 27.9), (30.0, 1.5, 0.0), (59.0, 1.5, 29.0), (60.5, 1.2, 0.5)):
        got = row(equal.equal([a], "seconds", at, home=home), "a")
        assert got["state"] == "read" and got["value"] == value and got["age"] == pytest.approx(age), at
    assert row(equal.equal([a], "seconds", 1.0, home=home), "a")["state"] == "none", "nothing had been evaluated by then"
    assert row(equal.equal([a], "step", 66, home=home), "a")["value"] == 1.2
    tokens = row(equal.equal([a], "tokens", 33_500, home=home), "a")
    assert tokens["value"] == 1.5 and tokens["spent"] == pytest.approx(33_000) and tokens["age"] == pytest.approx(500)
    assert row(equal.equal([a], "minutes", 1.0, home=home), "a")["value"] == 1.2 and equal.checked("minutes", 1) == ("seconds", 60.0)


def test_what_was_not_spent_is_never_made_up(home):
    a, b = run(home, "long", seconds=200.0), run(home, "short", seconds=50.0)
    c = run(home, "going", seconds=40.0, status="running", values=(2.0, 1.5, 1.4))
    found = equal.equal([a, b, c], "seconds", 100.0, home=home)
    assert row(found, "short")["state"] == row(found, "going")["state"] == "not reached"
    assert row(found, "short")["value"] is None and row(found, "short")["tier"] is None
    assert row(found, "short")["final"]["value"] == 1.0 and row(found, "short")["final"]["spent"] == 51.0
    assert "ended at 51 s" in row(found, "short")["note"] and "is at 40 s" in row(found, "going")["note"]
    assert [r["name"] for r in found["rows"]][0] == "long", "what is read comes first"


def test_a_run_held_to_its_minutes_is_read_at_them_and_a_stopped_one_is_not(home):
    a, b = run(home, "held", seconds=57.0, end=58.5), run(home, "stopped", seconds=58.5, status="stopped")
    found = equal.equal([a, b], "seconds", 60.0, home=home)
    assert row(found, "held")["state"] == "read" and "ended at 58.5 s" in row(found, "held")["note"] and row(found, "held")["mark"] is None
    assert row(found, "stopped")["state"] == "not reached"
    assert row(equal.equal([a], "seconds", 62.0, home=home), "held")["state"] == "not reached", "six per cent is too far"


def test_a_reading_in_mid_schedule_is_marked(home):
    whole, half = run(home, "whole", seconds=50.0), run(home, "half", seconds=99.0)
    flat = run(home, "flat", seconds=99.0, training={"schedule": "constant"})
    two = run(home, "two", seconds=40.0, pipeline=("lora", "int8"))
    home.store.put_evaluation(two, "stage", 0, 100, 20.0, "bits/byte", 1.1, 1.0, 1.2, N, np.ones(N, np.float32), np.ones(N, np.float32), "x", {})
    found = equal.equal([whole, half, flat], "seconds", 51.0, home=home)
    assert row(found, "whole")["mark"] is None and row(found, "flat")["mark"] is None
    assert row(found, "half")["mark"] == "mid-schedule" and row(found, "half")["rate"] == pytest.approx(67 / 99, abs=0.02)
    assert "mid-schedule, learning rate at 6" in row(found, "half")["note"] and "1 of 3 was read in mid-schedule" in found["text"]
    assert row(equal.equal([half], "seconds", 100.0, home=home), "half")["mark"] is None
    assert row(equal.equal([half], "seconds", 10.0, home=home), "half")["mark"] == "untrained"
    # the first stage's schedule is complete, the second has not been applied
    assert row(equal.equal([two], "seconds", 39.0, home=home), "two")["mark"] == "mid-pipeline"
    assert row(equal.equal([two], "seconds", 41.0, home=home), "two")["mark"] is None
    stopped = run(home, "broken-off", seconds=80.0, status="stopped")
    assert row(equal.equal([stopped], "seconds", 80.0, home=home), "broken-off")["mark"] == "mid-schedule"


def test_tiers_come_from_the_scores_at_that_point_not_from_the_end(home):
    # at 50 s b is ahead, at the end a is
    a = run(home, "a", seconds=99.0, values=(2.0, 1.8, 1.7, 0.8))
    b = run(home, "b", seconds=99.0, values=(2.0, 1.3, 1.25, 1.2))
    c = run(home, "c", seconds=99.0, values=(2.0, 1.8, 1.7, 0.9), items="others")
    early, late = (equal.equal([a, b, c], "seconds", at, home=home) for at in (50.0, 100.0))
    assert (row(early, "b")["tier"], row(early, "a")["tier"], row(early, "c")["tier"]) == ("A", "B", None)
    assert (row(late, "a")["tier"], row(late, "b")["tier"]) == ("A", "B")
    behind = row(early, "a")["behind"]
    assert behind["difference"] == pytest.approx(0.5, abs=1e-6) and behind["low"] < 0.5 < behind["high"] and behind["p"] < 0.05
    assert row(early, "b")["behind"] is None and early["ranked"] == 2 and early["n"] == N
    twins = equal.equal([a, run(home, "a2", seconds=99.0, values=(2.0, 1.8, 1.7, 0.8))], "seconds", 50.0, home=home)
    assert [r["tier"] for r in twins["rows"]] == ["A", "A"] and "cannot be told apart" in twins["text"]


def test_accuracy_is_better_when_higher(home):
    a = run(home, "a", metric="accuracy", values=(0.1, 0.5, 0.6, 0.9))
    b = run(home, "b", metric="accuracy", values=(0.1, 0.7, 0.8, 0.85))
    found = equal.equal([a, b], "step", 66, home=home)
    assert [r["name"] for r in found["rows"]] == ["b", "a"] and row(found, "b")["tier"] == "A" and row(found, "a")["tier"] == "B"


def test_training_loss_is_a_mean_of_recent_steps_without_tiers(home):
    a = run(home, "a", seconds=100.0)
    found = equal.equal([a], "step", 50, y="loss", home=home)
    got = row(found, "a")
    assert got["value"] == pytest.approx(np.mean([2 - s / 100 for s in range(31, 51)])) and got["n"] == 20 and got["age"] == 0
    assert got["low"] is None and got["tier"] is None and got["mark"] == "mid-schedule"
    assert row(equal.equal([a], "step", 50, y="loss_eval", home=home), "a")["value"] == 3.0


def test_joules_and_what_was_not_metered(home):
    a, b = run(home, "metered", joules=True), run(home, "plain")
    found = equal.equal([a, b], "joules", 700.0, home=home)
    assert row(found, "metered")["value"] == 1.2 and row(found, "metered")["spent"] == pytest.approx(666.7, rel=0.02)
    assert row(found, "plain")["state"] == "none" and "no energy counter" in row(found, "plain")["note"]


def test_equal_size_reads_the_best_of_each_pipeline_at_or_below(home):
    for name, size, end, pipeline in (("l1", 5e6, 1.4, ("lora",)), ("l2", 8e6, 1.2, ("lora",)), ("l3", 20e6, 0.9, ("lora",)),
                                      ("q", 4e6, 1.5, ("lora", "int8")), ("f", 30e6, 0.8, ("full",))):
        run(home, name, size=int(size), trainable=int(size / 100), values=(2.0, end), pipeline=pipeline)
    ids = ["l1", "l2", "l3", "q", "f"]
    found = equal.equal(ids, "size", 10, home=home)
    assert row(found, "l2")["value"] == 1.2 and row(found, "l2")["candidates"] == 2 and "best of 2" in row(found, "l2")["note"]
    assert row(found, "q")["state"] == "read" and row(found, "q")["tier"] == "B" and row(found, "l2")["tier"] == "A"
    assert row(found, "f")["state"] == "over" and row(found, "f")["value"] is None and "30 MB" in row(found, "f")["note"]
    assert {r["name"] for r in equal.equal(ids, "trainable", 0.06, home=home)["rows"] if r["state"] == "read"} == {"l1", "q"}, \
        "a value of at most 1 is a share"
    assert equal.equal(ids, "size", home=home)["value"] == 30.0, "by default every pipeline has a run"


def test_the_default_is_what_all_reach(home):
    a, b = run(home, "a", seconds=200.0), run(home, "b", seconds=70.2, end=71.234)
    found = equal.equal([a, b], "seconds", home=home)
    assert found["value"] == 71.2 and {r["state"] for r in found["rows"]} == {"read"}
    marks = found["range"]["marks"]
    assert marks == sorted(marks) and 71.2 in marks and 100.0 in marks and len(marks) <= 10 and found["range"]["high"] == 201.0


@pytest.mark.parametrize("at, words", [
    ("second=60", "Did you mean seconds"), ("loss=3", "Known:"), ("seconds=-5", "above zero"), ("seconds=0", "above zero"), ("seconds=soon", "above zero"),
    ("seconds=nan", "above zero"), ("seconds=inf", "above zero"), ("60", "seconds=60")])
def test_bad_expenditures_are_one_sentence(home, capsys, at, words):
    run(home, "a")
    assert cli.main(["compare", "a", "--at", at]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_runs_of_other_metrics_and_quantities_are_refused(home, capsys):
    a, b = run(home, "a"), run(home, "b", metric="accuracy", values=(0.1, 0.5))
    with pytest.raises(InputError, match="bits/byte.*accuracy.*same task"):
        equal.equal([a, b], "seconds", 50, home=home)
    with pytest.raises(InputError, match="Leave y out"):
        equal.equal([a], "size", 50, y="loss", home=home)
    assert cli.main(["compare", "a", "--at", "seconds=50", "--y", "wisdom"]) == 2


def test_the_command_reads_several_expenditures(home, capsys):
    run(home, "a"), run(home, "b", values=(2.0, 1.7, 1.6, 1.5))
    assert cli.main(["compare", "a", "b", "--at", "seconds=70", "--at", "tokens=5e4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [e["axis"] for e in found["equal"]] == ["seconds", "tokens"] and [r["value"] for r in found["equal"][0]["rows"]] == [1.2, 1.6]
    assert len(found["runs"]) == 2
    assert cli.main(["compare", "a", "b", "--at", "seconds=70"]) == 0
    text = capsys.readouterr().out
    assert "1.2000 [1.1800, 1.2200]" in text and "read in mid-schedule" in text and "p < 0.001" in text

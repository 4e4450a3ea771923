"""What a sweep is: every field is tried on the spec itself before anything runs."""

from __future__ import annotations

import pytest

from engines.errors import InputError
from storage import NotFound, Store
from workbench.commands.sweep import over
from workbench.spec import RunSpec
from workbench.sweeps import search
from workbench.sweeps.plan import SweepPlan

BASE = dict(model="stdlib-lm", data="python-docs", pipeline=[{"method": "lora", "rank": 8}], budget={"minutes": 1})


def plan(**section) -> SweepPlan:
    return SweepPlan.read(BASE, section)


def test_a_plan_reads_back_as_itself():
    made = plan(over={"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "pipeline.0.rank": [2, 4], "budget.minutes": [1, 2]},
                objectives=["quality", "size"], sampler="nsga2", pruner="median", trials=9, minutes=3, seed=4)
    again = SweepPlan.read(BASE, made.section())
    assert again == made and again.objectives[1].direction == "minimize" and again.objectives[0].direction is None
    assert again.directed("maximize").objectives[0].direction == "maximize"


@pytest.mark.parametrize("path, values, said", [
    ("training.lrr", [1, 2], "lr"), ("pipeline.0.rnk", [2, 4], "rank"), ("pipeline.3.rank", [2, 4], "1 stages"),
    ("nothing", [1, 2], "no field"), ("nothing.at.all", [1, 2], "no field"), ("model.x", [1, 2], "no such field"),
    ("pipeline.0.rank", [2, -4], "outside"), ("pipeline.0.method", ["lora", "lorra"], "lora"),
    ("training.lr", {"low": 1e-2, "high": 1e-4}, "low is not below"), ("training.lr", {"low": 0, "high": 1, "log": True}, "above zero"),
    ("training.lr", {"low": 1e-4, "top": 1}, "Use low"), ("training.lr", "x", "neither"), ("pipeline.0.rank", [2, 2], "twice"),
    ("training.batch", {"low": 1, "high": 8, "step": 0.5}, "whole"), ("pipeline.0.bits", [4, 8], "lora has no field"),
    ("budget.minutes", [0, 1], "above zero"), ("seed", {"low": 0, "high": 2**40}, "2147483647"),
])
def test_a_field_that_does_not_exist_or_refuses_a_value_is_named_with_the_remedy(path, values, said):
    with pytest.raises(InputError) as e:
        plan(over={path: values})
    assert said in str(e.value) and "\n" not in str(e.value) and e.value.remedy


@pytest.mark.parametrize("section, said", [
    (dict(), "not both"), (dict(over={"seed": [1, 2]}, sampler="magic"), "tpe"), (dict(over={"seed": [1, 2]}, objectives=["speed"]), "no such objective"),
    (dict(over={"seed": [1, 2]}, trials=0), "1 to 1000"), (dict(over={"seed": [1, 2]}, minutes=-1), "above zero"),
    (dict(over={"training.lr": {"low": 1e-4, "high": 1e-2}}, sampler="grid"), "single values"), (dict(ovre={}), "over"),
    (dict(over={"seed": [1, 2]}, specs=[BASE]), "not both"), (dict(over={"seed": [1, 2]}, objectives=["size", "size"]), "twice"),
])
def test_parts_that_contradict_are_refused(section, said):
    with pytest.raises(InputError, match=said):
        plan(**section)


def test_a_pruner_needs_a_curve():
    with pytest.raises(InputError, match="training.evaluations"):
        SweepPlan.read({**BASE, "training": {"evaluations": 1}}, dict(over={"seed": [1, 2]}, pruner="median"))


def test_another_method_keeps_only_the_fields_that_it_has():
    made = plan(over={"pipeline.0.method": ["lora", "adalora", "gptq"], "pipeline.0.rank": [2, 4], "pipeline.0.bits": [4, 8]},
                sampler="grid")
    points = made.points()
    # rank belongs to lora, bits to gptq: no combination comes twice
    assert {p["pipeline.0.method"] for p in points} == {"lora", "adalora", "gptq"}
    assert all("pipeline.0.bits" not in p or p["pipeline.0.method"] == "gptq" for p in points)
    assert len(points) == len({str(sorted(p.items())) for p in points})
    assert all(made.spec(p).pipeline[0].card.id == p["pipeline.0.method"] for p in points)


def test_whole_pipelines_are_choices_and_a_stage_may_be_left_out():
    made = plan(over={"pipeline": [["lora"], [{"method": "wanda", "sparsity": 0.5}, "lora"]], "pipeline.1.rank": [2, 4]}, sampler="grid")
    shapes = [[m.card.id for m in made.spec(p).pipeline] for p in made.points()]
    assert shapes == [["lora"], ["wanda", "lora"], ["wanda", "lora"]]
    two = SweepPlan.read({**BASE, "pipeline": ["wanda", "lora"]}, dict(over={"pipeline.0": ["none", {"method": "wanda", "sparsity": 0.3}]}))
    assert [len(two.spec(p).pipeline) for p in ({"pipeline.0": "none"}, {"pipeline.0": {"method": "wanda", "sparsity": 0.3}})] == [1, 2]


def test_a_list_of_specs_is_tried_in_order():
    made = plan(specs=[BASE, {**BASE, "pipeline": ["gptq"]}])
    assert made.trials == 2 and made.spec({"spec": 1}).pipeline[0].card.id == "gptq"
    assert search.ask(made, [dict(number=0, params={"spec": 0}, state="complete", values=[1.0])]) == {"spec": 1}


@pytest.mark.parametrize("text, path, values", [
    ("training.lr=1e-4..1e-2:log", "training.lr", {"low": 1e-4, "high": 1e-2, "log": True}),
    ("pipeline.0.rank=2,4,8", "pipeline.0.rank", [2, 4, 8]),
    ("pipeline.0.sparsity=0.3..0.7:step=0.1", "pipeline.0.sparsity", {"low": 0.3, "high": 0.7, "step": 0.1}),
    ("pipeline.0.method=lora,adalora", "pipeline.0.method", ["lora", "adalora"]),
    ("training.batch=4..64", "training.batch", {"low": 4, "high": 64}),
])
def test_flags(text, path, values):
    assert over(text) == (path, values)


@pytest.mark.parametrize("text", ["training.lr", "training.lr=", "training.lr=1..x", "training.lr=1..2:lgo"])
def test_flags_that_cannot_be_read(text):
    with pytest.raises(InputError, match="--over"):
        over(text)


# -- the Optuna side -----------------------------------------------------------------------------------------------------
def rows(made, count, value, state=lambda n: "complete"):
    out = []
    while len(out) < count and (params := search.ask(made, out)) is not None:
        out.append(dict(number=len(out), params=params, state=state(len(out)), values=value(params)))
    return out


def distance(params):
    import math
    return [abs(math.log10(params["training.lr"]) + 3)]


def test_tpe_comes_nearer_than_random_draws():
    section = dict(over={"training.lr": {"low": 1e-6, "high": 1.0, "log": True}}, objectives={"quality": "minimize"}, trials=40)
    late = {}
    for sampler in ("tpe", "random"):
        found = rows(plan(**section, sampler=sampler), 40, distance)
        late[sampler] = sum(r["values"][0] for r in found[-15:]) / 15
    assert late["tpe"] < 0.75 * late["random"]


def test_the_next_trial_depends_on_the_table_alone():
    made = plan(over={"training.lr": {"low": 1e-6, "high": 1.0, "log": True}, "pipeline.0.rank": [2, 4]},
                objectives={"quality": "minimize"}, trials=20)
    found = rows(made, 12, distance)
    assert search.ask(made, found) == search.ask(SweepPlan.read(BASE, made.section()), found)
    assert search.ask(made, found[:-1]) == found[-1]["params"]


def test_infeasible_settings_are_avoided_and_a_small_space_ends():
    made = plan(over={"pipeline.0.rank": {"low": 1, "high": 64}}, objectives={"quality": "minimize"}, trials=40)
    found = rows(made, 40, lambda p: None if p["pipeline.0.rank"] > 32 else [1.0],
                 state=lambda n: "complete")
    for r in found:
        r["state"] = "complete" if r["values"] else "infeasible"
    ranks = [r["params"]["pipeline.0.rank"] for r in found]
    assert len(set(ranks)) == len(ranks) == 40
    small = plan(over={"pipeline.0.rank": [2, 4, 8]}, trials=20, objectives={"quality": "minimize"})
    assert small.trials == 3 and {r["params"]["pipeline.0.rank"] for r in rows(small, 20, lambda p: [1.0])} == {2, 4, 8}


def test_nsga2_goes_on_after_a_restart():
    """Every draw rebuilds the study; without the generations it would stay with random draws."""
    made = plan(over={"training.lr": {"low": 1e-6, "high": 1.0, "log": True}, "pipeline.0.rank": {"low": 1, "high": 256}},
                objectives={"quality": "minimize", "size": "minimize"}, sampler="nsga2", trials=80)
    found = rows(made, 80, lambda p: [distance(p)[0] + p["pipeline.0.rank"] / 256, p["pipeline.0.rank"]])
    early, late = ([sum(r["values"][i] for r in part) / len(part) for i in (0, 1)] for part in (found[:16], found[32:]))
    assert late[0] < 0.85 * early[0] and late[1] < 0.85 * early[1]
    front = search.front(made, found)
    assert front
    for n in front:
        assert not any(all(y <= x for x, y in zip(found[n]["values"], r["values"])) and r["values"] != found[n]["values"] for r in found)


def test_importance_finds_the_parameter_that_matters():
    made = plan(over={"training.lr": {"low": 1e-6, "high": 1.0, "log": True}, "pipeline.0.dropout": {"low": 0.0, "high": 0.3}},
                objectives={"quality": "minimize"}, sampler="random", trials=30)
    shares = search.importance(made, rows(made, 30, distance))[0]
    assert shares["training.lr"] > 0.8 and abs(sum(shares.values()) - 1) < 1e-3
    assert search.importance(made, []) == []


@pytest.mark.parametrize("pruner", ["median", "hyperband", "halving"])
def test_a_pruner_stops_the_hopeless_and_not_the_best(pruner):
    made = plan(over={"seed": {"low": 0, "high": 50}}, pruner=pruner, trials=30)
    curves, stopped = search.Curves(made, 1), {}
    for n in range(24):
        poor = n >= 6 and n % 3 == 0
        level = 3.0 if poor else 1.0 - 0.01 * n
        for k in range(1, 5):
            reason = curves.report(n, [(j / 4, level + 1 / j) for j in range(1, k + 1)])
            if reason:
                stopped[n] = reason
                break
        curves.close(n, n in stopped)
    poor = {n for n in range(6, 24) if n % 3 == 0}
    assert len(poor & set(stopped)) >= len(poor) // 2 and not set(stopped) - poor, stopped
    assert all("of its budget" in text and "place" in text for text in stopped.values())


def test_a_replayed_pruner_judges_as_the_first():
    made = plan(over={"seed": {"low": 0, "high": 50}}, pruner="halving", trials=30)
    whole = [[(j / 4, level + 1 / j) for j in range(1, 5)] for level in (1.0, 2.0, 1.5)]

    def fed():
        curves = search.Curves(made, 1)
        for n, curve in enumerate(whole):
            curves.report(n, curve)
            curves.close(n, False)
        return curves
    for level in (0.5, 1.2, 2.5):
        curve = [(0.25, level + 1.0)]
        assert (fed().report(3, curve) is None) == (fed().report(3, curve) is None)
    assert fed().report(3, [(0.25, 9.0)]) and not fed().report(3, [(0.25, 0.1)])


# -- rows ------------------------------------------------------------------------------------------------------------------
def test_sweeps_and_trials_in_the_database(tmp_path):
    store = Store(tmp_path / "x.db")
    first = store.create_sweep({"model": "m"}, {"trials": 3}, name="anvil")
    store.put_trial(first, 0, params={"seed": 1}, state="running", run_id=7)
    store.put_trial(first, 0, state="complete", values=[1.5, float("nan")])
    store.put_trial(first, 1, params={"seed": 2})
    found = store.trials(first)
    assert [t["state"] for t in found] == ["complete", "running"] and found[0]["values"] == [1.5, None] and found[0]["run_id"] == 7
    assert store.trial_of(7)["number"] == 0 and store.trial_of(8) is None
    assert store.sweep("anvil")["id"] == store.sweep(f"sweep-{first}")["id"] == first
    assert store.sweeps()[0]["counts"] == {"complete": 1, "running": 1} and store.sweeps(status="finished") == []
    store.update_sweep(first, status="finished")
    for wrong in (lambda: store.update_sweep(first, status="odd"), lambda: store.put_trial(first, 0, state="odd"),
                  lambda: store.update_sweep(first, color=1), lambda: store.put_trial(first, 0, color=1)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(NotFound, match="List the sweeps"):
        store.sweep(99)
    store.delete_sweep(first)
    assert store.trials(first) == []


def test_a_base_spec_is_not_changed_by_a_trial():
    base = RunSpec.from_dict(BASE)
    made = SweepPlan.read(base, dict(over={"pipeline.0.rank": [2, 4], "data.limit": [10, 20]}))
    spec = made.spec({"pipeline.0.rank": 2, "data.limit": 10})
    assert (spec.pipeline[0].rank, spec.data.limit, base.pipeline[0].rank, base.data.limit) == (2, 10, 8, None)

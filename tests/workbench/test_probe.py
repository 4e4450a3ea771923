"""The probe: its child on a micro model, how its figures replace the forecast's, and what it refuses."""

import json
import time

import pytest

from engines.errors import InputError
from tests.workbench import planned
from workbench import planner, probe, probe_job, probing
from workbench.home import Home
from workbench.spec import RunSpec


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WORKBENCH_DEVICE", "cpu")
    monkeypatch.setenv("WORKBENCH_WARM_IDLE", "3")
    return Home.open()


@pytest.fixture
def spec(tmp_path):
    def make(pipeline=("lora",), **more):
        if not (tmp_path / "model").exists():
            planned.folder(tmp_path / "model", planned.LLAMA)
            planned.texts(tmp_path / "rows.csv")
        stages = [{"method": m} if isinstance(m, str) else m for m in pipeline]
        return RunSpec.from_dict({"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.csv"), "pipeline": stages,
                                  "budget": {"steps": 40}, "training": {"batch": 4, "length": 32, "accumulation": 1, "items": 8,
                                                                        "checkpointing": False, "precision": "fp32"}, **more})
    return make


def kept(home, spec, **figures):
    """A stored probe of ``spec`` with the figures given."""
    resolved = planner.resolve(spec, home)
    row = dict(stages=[dict(method=m.card.id, seconds=None if m.card.trains else 3.0, step_seconds=0.5 if m.card.trains else None,
                            ratio=4.0 if m.card.packs else 1.0, adapted=1.5, checkpoint_seconds=0.25) for m in spec.pipeline],
               peaks={"load": 500_000_000, "evaluate": 700_000_000, "1 lora": 900_000_000}, evaluation=2.0, load=1.5, save=0.75, keep=0.25,
               missing=[], failed=None, seconds=20.0)
    home.store.put_probe(probe.key(resolved, planner.scene_of(spec, home)), row | figures)


def test_the_child_measures_a_run_in_miniature(home, spec, tmp_path):
    given = spec(["wanda", "lora", "int8"])
    resolved = planner.resolve(given, home)
    (tmp_path / "p").mkdir()
    request = dict(spec=resolved.to_dict(), device="cpu", seconds=60.0, forecast={"0": 0.1, "2": 0.1}, evaluation=0.1)
    found = probing.Probe(request, tmp_path / "p").run()
    assert found["failed"] is None and found["missing"] == []
    assert [s["method"] for s in found["stages"]] == ["wanda", "lora", "int8"]
    assert found["stages"][1]["step_seconds"] > 0 and found["stages"][1]["timed"] >= 2 and found["stages"][1]["checkpoint_seconds"] > 0
    assert found["stages"][0]["seconds"] > 0 and found["stages"][2]["ratio"] > 0 and found["evaluation"] > 0 and found["save"] > 0
    assert {"load", "evaluate", "1 wanda", "2 lora", "3 int8", "save"} <= found["peaks"].keys() and min(found["peaks"].values()) > 1e7
    assert not (tmp_path / "p" / "work").exists(), "its files are gone"
    json.dumps(found)


def test_a_shortage_in_the_child_is_an_answer(home, spec, tmp_path, monkeypatch):
    import torch

    from engines.training.loop import Trainer
    monkeypatch.setattr(Trainer, "_gradients", lambda self, batches: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    request = dict(spec=planner.resolve(spec(), home).to_dict(), device="cpu", seconds=60.0)
    found = probing.Probe(request, tmp_path).run()
    assert found["failed"]["phase"] == "1 lora" and "memory" in found["failed"]["text"]
    kept(home, spec(), failed=found["failed"])
    document = planner.forecast(spec(), home)
    assert "in the training step" in document["probe"]["text"] and document["probe"]["change"]["patch"] == {"training.accumulation": 2}
    assert "accumulation 2" in document["probe"]["text"] and document["seconds"]["how"] != document["probe"]["text"]


def test_a_child_without_time_says_what_it_did_not_measure(home, spec, tmp_path):
    request = dict(spec=planner.resolve(spec(), home).to_dict(), device="cpu", seconds=1e-9)
    found = probing.Probe(request, tmp_path).run()
    assert found["missing"] == ["time was over while loading the model and the data"] and found["failed"] is None


def test_measured_figures_replace_the_forecast_and_their_source_is_said(home, spec):
    given = spec()
    before = planner.forecast(given, home)
    assert before["probe"] is None
    kept(home, given)
    after = planner.forecast(given, home)
    # 40 steps of half a second, one checkpoint; base and result at 2 s, four evaluations with the adapter at 3 s.
    phases = {p["phase"]: p["seconds"] for p in after["seconds"]["phases"]}
    assert phases["load"] == 1.5 and phases["save"] == 0.75 and phases["evaluate"] == pytest.approx(2 * 2.0 + 4 * 3.0)
    assert phases["1 lora"] == pytest.approx(40 * 0.5 + 0.25, abs=0.2) and after["steps"] == 40
    assert after["seconds"]["how"] == "measured by a probe just now" == after["probe"]["text"]
    assert after["memory"]["peak_bytes"] == 900_000_000 and after["memory"]["peak_phase"] == "1 lora"
    assert {p["phase"]: p["total"] for p in after["memory"]["phases"]}["evaluate"] == 700_000_000
    assert all(v >= 0 for p in after["memory"]["phases"] for v in p["parts"].values())
    assert after["trainable"] == before["trainable"] and after["size"] == before["size"]


def test_a_probe_covers_other_steps_seeds_and_rates_but_no_other_batch(home, spec):
    kept(home, spec())
    for change in (("budget.steps", 90), ("seed", 7), ("training.lr", 0.01), ("training.evaluations", 2)):
        assert planner.forecast(spec().setting(*change), home)["probe"], change
    for change in (("training.batch", 8), ("training.length", 16), ("training.items", 4), ("pipeline.0.rank", 2)):
        assert planner.forecast(spec().setting(*change), home)["probe"] is None, change


def test_steps_under_minutes_follow_the_measured_step(home, spec):
    timed = RunSpec.from_dict({**spec().to_dict(), "budget": {"minutes": 2}})
    kept(home, timed)
    slow = planner.forecast(timed, home)
    kept(home, timed, stages=[dict(method="lora", step_seconds=0.05, ratio=1.0, adapted=1.5, checkpoint_seconds=0.25)])
    fast = planner.forecast(timed, home)
    assert 8 * slow["steps"] < fast["steps"] < 12 * slow["steps"]
    for found in (slow, fast):
        assert found["seconds"]["total"] == pytest.approx(120, rel=0.03)


def test_packed_evaluations_cost_what_the_probe_measured(home, spec):
    packed = RunSpec.from_dict({**spec(["lora", "int8"]).to_dict(), "budget": {"minutes": 3}})
    kept(home, packed)
    many = planner.forecast(packed, home)
    assert many["seconds"]["total"] == pytest.approx(180, rel=0.03)
    evaluations = next(p["seconds"] for p in many["seconds"]["phases"] if p["phase"] == "evaluate")
    assert evaluations == pytest.approx(2 + 2 * 8 + 4 * 3, abs=0.5), "base, the packed stage and the result at four times, four with the adapter"
    short = planner.forecast(packed.setting("budget.minutes", 0.2), home)
    assert short["verdict"] == "over" and short["limits"]["minutes"]["state"] == "over"


def test_a_probe_waits_for_no_run_and_makes_room_for_one(home, spec):
    run = home.store.create_run(spec().to_dict(), name="busy-one", status="running")
    with pytest.raises(InputError, match="busy-one"):
        probe_job.begin(spec(), home)
    home.store.update_run(run, status="finished")
    job = probe_job.begin(spec(), home)
    with pytest.raises(InputError, match="another probe"):
        probe_job.Job(spec(), home).start()
    home.store.update_run(run, status="running")
    assert job.ended.wait(20) and "made room" in job.error and not probe_job.alive(job.pid)
    home.store.update_run(run, status="finished")
    assert home.store.lease(probe_job.LEASE, "somebody", 1), "the lease was given back"


def test_cancel_ends_the_process(home, spec):
    job = probe_job.begin(spec(), home)
    until = time.monotonic() + 20
    while job.pid is None and time.monotonic() < until:
        time.sleep(0.02)
    state = probe_job.cancel(home)
    assert not state["running"] and state["problem"] == "Cancelled." and not probe_job.alive(job.pid)
    assert not [p for p in home.path.iterdir() if p.name.startswith("probe-")]


def test_what_was_measured_before_the_time_was_over_is_kept(home, spec, tmp_path):
    job = probe_job.Job(spec(), home)
    (tmp_path / "partial.json").write_text(json.dumps(dict(stages=[], peaks={"load": 5}, evaluation=1.25, missing=[], failed=None)))
    job.text = "training with LoRA"
    job._partial(tmp_path)
    assert home.store.probe(job.key)["evaluation"] == 1.25 and job.result["missing"] == ["time was over while training with LoRA"]
    job = probe_job.Job(spec(), home)
    (tmp_path / "partial.json").unlink()
    job._partial(tmp_path)
    assert "did not get beyond" in job.error


def test_a_killed_child_means_that_memory_ran_out(home, spec, tmp_path):
    job = probe_job.Job(spec(), home)
    (tmp_path / "progress.json").write_text(json.dumps(dict(text="training with LoRA", share=0.5)))
    job._finish(tmp_path, -9)
    assert job.result["failed"]["phase"] == "1 lora" and "Smallest change" in job.result["text"]


def test_the_age_is_said_in_words():
    assert [probe.age(0, t) for t in (5, 61, 120, 7300, 90000 * 2)] == ["just now", "1 minute ago", "2 minutes ago", "2 hours ago", "2 days ago"]


def test_the_planner_and_the_run_drop_the_same_evaluations(home, spec, monkeypatch):
    """Under minutes the forecast counts evaluations as the training loop will make them, and judges by the smallest schedule."""
    from engines import pace
    from workbench.forecast import Costing
    monkeypatch.setattr(Costing, "evaluation_seconds", lambda self, profile: 1.0)
    timed = RunSpec.from_dict({**spec().to_dict(), "budget": {"minutes": 1}, "training": {**spec().to_dict()["training"], "evaluations": 40}})
    found = planner.forecast(timed, home)
    phases = {p["phase"]: p["seconds"] for p in found["seconds"]["phases"]}
    rest = 60 - (phases["load"] + phases["save"] + phases["speed"]) - 2 - pace.TAIL
    assert phases["evaluate"] == pytest.approx(2 + pace.evaluations(40, rest, 1.0)) and phases["evaluate"] < 20
    assert found["seconds"]["total"] == pytest.approx(60, rel=0.02) and found["fits"]
    tight = planner.forecast(timed.setting("budget.minutes", 0.03), home)
    assert tight["verdict"] == "over" and "needs at least" in tight["text"]
    least = tight["limits"]["minutes"]
    assert least["state"] == "over" and planner.forecast(timed.setting("budget.minutes", 0.2), home)["fits"], least

"""The forecast: exact counts, limits and levers, the smallest change that fits, speed without torch."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.errors import InputError
from engines.models.folder import read_folder
from tests.workbench import planned
from workbench import machine, planner, sources
from workbench.remedies import clock
from workbench.scene import PARTS
from workbench.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]


def spec(model, data, *stages, training=None, **budget):
    return dict(
        model=model,
        data=data,
        pipeline=[s if isinstance(s, dict) else {"method": s} for s in stages],
        budget=budget,
        training=training or {},
        task="causal-lm",
    )


def test_the_document_has_every_part_and_is_json(home, llama, text):
    found = planner.forecast(
        spec(
            llama, text, {"method": "wanda", "sparsity": 0.5}, {"method": "lora", "rank": "auto"}, "int8", minutes=2, memory_gb=2
        )
    )
    json.dumps(found, allow_nan=False)
    assert found["fits"] and found["verdict"] == "fits" and found["text"].startswith("Fits")
    names = [p["phase"] for p in found["memory"]["phases"]]
    assert names[:4] == ["load", "1 wanda", "2 lora", "3 int8"] and {"evaluate", "save"} <= set(names)
    for phase in found["memory"]["phases"]:
        assert set(phase["parts"]) == set(PARTS)
        assert phase["total"] == sum(phase["parts"].values())
    assert found["memory"]["peak_bytes"] == max(p["total"] for p in found["memory"]["phases"])
    assert found["seconds"]["total"] == pytest.approx(sum(p["seconds"] for p in found["seconds"]["phases"]), abs=0.1)
    assert [s["method"] for s in found["stages"]] == ["wanda", "lora", "int8"]
    assert found["stages"][1]["settings"]["rank"] != "auto" and found["stages"][1]["reasons"]["rank"]
    assert found["limits"]["joules"]["value"] is None and found["limits"]["joules"]["reason"]
    assert found["size"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found["size"]["bytes"] < found["size"]["before_bytes"] / 2
    assert {c["what"] for c in found["chosen"]} >= {"length", "batch", "lr", "precision"}
    assert all(c["why"] for c in found["chosen"])


def test_trainable_parameters_and_size_are_counted(home, llama, text):
    profile = read_folder(llama)
    full = planner.forecast(spec(llama, text, "full", steps=10))
    assert full["trainable"] == {"count": profile.parameters, "share": 1.0}
    assert full["size"]["bytes"] == full["size"]["before_bytes"] == (Path(llama) / "model.safetensors").stat().st_size
    lora = planner.forecast(spec(llama, text, {"method": "lora", "rank": 4}, steps=10))
    assert lora["trainable"]["count"] == 4 * sum(m.out + m.inp for m in profile.matrices)
    assert lora["steps"] == 10 and lora["tokens"] == 10 * lora["training"]["batch"] * lora["training"]["length"]


def test_a_stage_sees_the_model_that_the_one_before_leaves(home, llama, text):
    alone = planner.forecast(spec(llama, text, "full", steps=10))
    after = planner.forecast(spec(llama, text, {"method": "structured", "heads": 0.5, "channels": 0.5}, "full", "int8", steps=10))
    assert after["trainable"]["count"] < alone["trainable"]["count"]
    assert after["stages"][1]["before_bytes"] == after["stages"][0]["after_bytes"] < after["stages"][0]["before_bytes"]
    assert after["stages"][2]["after_bytes"] < after["stages"][1]["after_bytes"]


def test_levers_obey_the_limits(home, llama, text):
    count = 5000
    found = planner.forecast(spec(llama, text, {"method": "lora", "rank": "auto"}, steps=10, trainable=count))
    assert 0 < found["trainable"]["count"] <= count and found["limits"]["trainable"]["state"] == "ok"
    per_rank = found["trainable"]["count"] / found["stages"][0]["settings"]["rank"]
    assert found["trainable"]["count"] + per_rank > count, "the largest rank that fits, not a smaller one"
    before = found["size"]["bytes"] / 1e6
    cut = planner.forecast(spec(llama, text, {"method": "structured", "heads": "auto", "channels": "auto"}, size_mb=before * 0.7))
    assert cut["size"]["bytes"] <= before * 0.7e6 and cut["limits"]["size_mb"]["state"] == "ok"


def test_memory_makes_micro_batches_smaller_and_says_why(home, llama, text):
    # The batch is fixed, so the step is the same mathematics: only the micro-batch may shrink.
    fixed = dict(batch=256, length=128, precision="fp32")
    wide = planner.forecast(spec(llama, text, "full", steps=10, training=fixed))
    room = wide["memory"]["peak_bytes"] / 1e9 * 0.9
    tight = planner.forecast(spec(llama, text, "full", steps=10, memory_gb=room, training=fixed))
    assert wide["memory"]["peak_phase"] == "1 full" and wide["training"]["accumulation"] == 1
    assert tight["fits"] and tight["training"]["accumulation"] > 1 and tight["training"]["batch"] == 256
    assert tight["memory"]["peak_bytes"] <= room * 1e9 and tight["steps"] == wide["steps"]
    assert any(c["what"] == "accumulation" and "GB" in c["why"] for c in tight["chosen"])


def test_what_does_not_fit_comes_with_the_smallest_change(home, llama, text):
    fixed = dict(batch=256, length=128, accumulation=1, checkpointing=False, precision="fp32")
    wide = planner.forecast(spec(llama, text, "full", steps=10, training=fixed))
    limit = round(wide["memory"]["peak_bytes"] / 1e9 * 0.93, 3)
    given = spec(llama, text, "full", steps=10, memory_gb=limit, training=fixed)
    over = planner.forecast(given)
    assert not over["fits"] and over["verdict"] == "over" and over["limits"]["memory_gb"]["state"] == "over"
    assert over["text"].startswith("Does not fit") and "GB over" in over["text"]
    first = over["changes"][0]
    assert first["patch"] == {"training.accumulation": 2}, "the mildest change comes first"
    ((path, value),) = first["patch"].items()
    mended = planner.forecast(RunSpec.from_dict(given).setting(path, value))
    assert mended["fits"] and mended["memory"]["peak_bytes"] / 1e9 == pytest.approx(first["memory_gb"])
    with pytest.raises(InputError) as refused:
        planner.demand(given)
    assert refused.value.field == "budget.memory_gb" and "accumulation 2" in refused.value.remedy


def test_a_budget_that_nothing_can_meet(home, llama, text):
    over = planner.forecast(spec(llama, text, "lora", minutes=1, memory_gb=0.05))
    assert over["verdict"] == "over" and over["changes"][-1]["patch"].keys() == {"budget.memory_gb"}
    with pytest.raises(InputError):
        planner.forecast(spec(llama, text, "full", steps=10, trainable=100))
    blink = planner.forecast(spec(llama, text, "full", minutes=0.001))
    assert blink["limits"]["minutes"]["state"] == "over" and "at least" in blink["text"]


def test_minutes_are_filled_and_never_passed(home, llama, text):
    short = planner.forecast(spec(llama, text, "lora", minutes=1))
    long = planner.forecast(spec(llama, text, "lora", minutes=3))
    assert short["seconds"]["total"] <= 60 * 1.02 and long["seconds"]["total"] <= 180 * 1.02
    assert long["steps"] > short["steps"] > 0
    two = planner.forecast(spec(llama, text, "lora", "full", minutes=3))
    assert two["seconds"]["total"] <= 180 * 1.02 and all(s["steps"] > 0 for s in two["stages"])


def test_resolve_leaves_nothing_auto(home, llama, text):
    made = planner.resolve(spec(llama, text, {"method": "adalora", "rank": "auto"}, {"method": "gptq"}, minutes=1))
    assert made.task == "causal-lm"
    assert "auto" not in [v for v in dataclasses.asdict(made.training).values() if isinstance(v, str)]
    assert not any(v == "auto" for m in made.pipeline for v in m.settings().values())
    assert RunSpec.from_dict(made.to_dict()) == made
    free = planner.resolve(spec(llama, text, "lora"))
    assert free.budget.steps, "without any limit the number of steps is chosen, and shown"


def test_no_limit_is_no_verdict(home, llama, text):
    found = planner.forecast(spec(llama, text, "lora", steps=5))
    assert {k: v["state"] for k, v in found["limits"].items() if k != "joules"} == dict.fromkeys(
        ("minutes", "memory_gb", "trainable", "size_mb", "quality"), "none"
    )


def test_tight_is_less_than_a_twentieth_to_spare(home, llama, text):
    fixed = dict(batch=8, length=64, accumulation=1, checkpointing=False)
    peak = planner.forecast(spec(llama, text, "full", steps=10, training=fixed))["memory"]["peak_bytes"] / 1e9
    assert planner.forecast(spec(llama, text, "full", steps=10, training=fixed, memory_gb=peak * 1.02))["verdict"] == "tight"
    assert planner.forecast(spec(llama, text, "full", steps=10, training=fixed, memory_gb=peak * 1.2))["verdict"] == "fits"


def test_speed_of_earlier_runs_replaces_the_guess(home, llama, text):
    given = spec(llama, text, "lora", steps=100)
    guess = planner.forecast(given)
    run = home.store.create_run(RunSpec.from_dict(given).to_dict(), name="earlier")
    home.store.update_run(run, status="finished", tokens_per_second=1234.5)
    planner._HISTORY.clear()
    known = planner.forecast(given)
    assert known["stages"][0]["units_per_second"] == pytest.approx(1234.5, abs=0.1)
    assert "earlier run" in known["seconds"]["how"] and known["seconds"]["total"] != guess["seconds"]["total"]
    other = planner.forecast(spec(llama, text, "full", steps=100))
    assert "earlier run" not in other["seconds"]["how"]


def test_measured_rates_replace_the_defaults(home, llama, text):
    slow = planner.forecast(spec(llama, text, "full", steps=100))
    home.store.set_setting(
        machine.SETTING,
        dict(fingerprint=machine.fingerprint(), context_bytes=123_000_000, flops={"float32": 1e15, "bfloat16": 1e15}),
    )
    fast = planner.forecast(spec(llama, text, "full", steps=100))
    assert fast["memory"]["phases"][1]["parts"]["context"] == 123_000_000
    assert fast["memory"]["phases"][0]["parts"]["context"] < 123_000_000, "code that has not run yet is not resident"
    assert fast["seconds"]["total"] < slow["seconds"]["total"] and "measured" in fast["seconds"]["how"]
    home.store.set_setting(machine.SETTING, dict(fingerprint="another machine", context_bytes=1, flops={}))
    assert (
        planner.forecast(spec(llama, text, "full", steps=100))["memory"]["phases"][1]["parts"]["context"] == machine.CONTEXT_BYTES
    )


def test_classification_gets_its_head_and_refuses_another_one(home, tmp_path):
    bert = str(planned.folder(tmp_path / "bert", planned.BERT))
    seven = str(planned.texts(tmp_path / "seven.csv", rows=140, labels=7))
    found = planner.forecast(dict(model=bert, data=seven, pipeline=["full"], budget={"steps": 10}))
    assert found["task"] == "text-classification" and found["units"] == "examples"
    assert found["trainable"]["count"] == read_folder(bert).parameters - 2 * 33 + 7 * 33
    vit = str(planned.folder(tmp_path / "vit", dict(planned.VIT, id2label={"0": "a", "1": "b", "2": "c"}), tokenizer=False))
    with pytest.raises(InputError, match="trained for 3"):
        planner.forecast(dict(model=vit, data="digits", pipeline=["full"], budget={"steps": 10}))


def test_a_new_head_gets_a_rate_of_its_own(home, tmp_path, llama, text):
    bert, seven = str(planned.folder(tmp_path / "bert", planned.BERT)), str(planned.texts(tmp_path / "seven.csv", rows=140, labels=7))
    asked = dict(model=bert, data=seven, pipeline=["lora"], budget={"steps": 10})
    found = planner.forecast(asked)
    width, rate = read_folder(bert).hidden, found["training"]["head_lr"]
    assert rate == min(0.1, float(f"{20 / width:.1g}")) > found["training"]["lr"]
    assert "new head for 7 labels" in next(c["why"] for c in found["chosen"] if c["what"] == "head_lr")
    assert planner.resolve(asked).training.head_lr == rate
    assert planner.resolve(asked | {"training": {"head_lr": 0}}).training.head_lr == 0, "what a person sets stays"
    normed = planner.forecast(asked | {"model": llama})["training"]  # the head of a decoder reads normed features
    assert normed["head_lr"] == max(float(f"{1.25 / read_folder(llama).hidden:.1g}"), normed["lr"]) < rate
    # No new head, no head at all, or nothing that was trained before: one rate for all.
    trained = str(planned.folder(tmp_path / "trained", planned.BERT | {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate("abcdefg"))}))
    others = (asked | {"model": trained}, asked | {"model": llama, "data": text}, asked | {"pipeline": [{"method": "full", "from_scratch": True}]},
              asked | {"pipeline": ["magnitude"]})
    for other in others:
        made = planner.forecast(other)
        assert made["training"]["head_lr"] == 0 and not any(c["what"] == "head_lr" for c in made["chosen"]), other


def test_a_config_without_weights_is_for_training_from_scratch(home, tmp_path, text):
    bare = str(planned.folder(tmp_path / "bare", planned.LLAMA, weights=False))
    with pytest.raises(InputError, match="no \\*.safetensors"):
        planner.forecast(spec(bare, text, "lora", steps=10))
    made = planner.forecast(spec(bare, text, {"method": "full", "from_scratch": True}, steps=10))
    assert made["trainable"]["count"] == made["parameters"] == sources.profile(bare).parameters > 0


def test_reasons_name_the_stage(home, llama, text):
    with pytest.raises(InputError) as refused:
        planner.forecast(spec(llama, text, {"method": "lora", "rank": 1000}, steps=10))
    assert refused.value.field == "pipeline[0].rank"
    with pytest.raises(InputError, match="at most 128 tokens"):
        planner.forecast(spec(llama, text, "lora", steps=10, training=dict(length=4096)))


def test_forecasts_are_quick(home, llama, text):
    given = spec(
        llama, text, {"method": "wanda", "sparsity": 0.5}, {"method": "lora", "rank": "auto"}, "int8", minutes=2, memory_gb=2
    )
    planner.forecast(given)
    took = []
    for minutes in (1.0, 1.5, 2.5, 3.0, 3.5):
        given["budget"]["minutes"] = minutes
        began = time.thread_time()  # the machine may be busy with other work
        planner.forecast(given)
        took.append(time.thread_time() - began)
    assert min(took) < 0.020, took


def test_no_torch_is_imported_for_a_forecast(tmp_path, llama, text):
    code = (
        "import sys; from workbench import planner; import json;"
        f"f = planner.forecast(dict(model={llama!r}, data={text!r}, task='causal-lm',"
        " pipeline=[dict(method='wanda'), dict(method='lora', rank='auto'), 'int8'],"
        " budget=dict(minutes=2, memory_gb=2)));"
        "print(json.dumps([m for m in ('torch', 'transformers', 'peft', 'gradio', 'datasets') if m in sys.modules]), f['fits'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "WORKBENCH_HOME": str(tmp_path / "h")},
    )
    assert done.stdout.strip() == "[] True", done.stdout + done.stderr


def test_an_empty_pipeline_is_an_evaluation(home, llama, text):
    found = planner.forecast(spec(llama, text))
    assert found["steps"] == 0 and found["trainable"]["count"] == 0 and found["fits"] and found["stages"] == []
    assert found["size"]["bytes"] == found["size"]["before_bytes"]


def test_clock_and_candidates():
    assert [clock(s) for s in (3, 117, 3723)] == ["0:03", "1:57", "1:02:03"]


def test_the_reference_step_scales_the_clock(home, llama, text):
    """A machine on which the reference step takes twice as long takes twice as long for other steps."""
    seconds = []
    for factor in (1.0, 2.0):
        known = dict(
            fingerprint=machine.fingerprint(),
            context_bytes=400_000_000,
            flops={"float32": 1e11, "bfloat16": 2e11},
            bandwidth=1e10,
            reference={"float32": 0.2 * factor, "bfloat16": 0.1 * factor},
        )
        home.store.set_setting(machine.SETTING, known)
        found = planner.forecast(spec(llama, text, "full", steps=100, training=dict(precision="bf16")))
        seconds.append(found["stages"][0]["seconds"])
        chosen = planner.forecast(
            spec(
                str(planned.folder(Path(llama).parent / f"wide-{factor}", dict(planned.LLAMA, hidden_size=128, head_dim=32))),
                text,
                "full",
                steps=10,
            )
        )
        assert chosen["training"]["precision"] == "bf16" and any("2.0 times" in c["why"] for c in chosen["chosen"])
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.02)


def test_a_measurement_is_made_once_and_kept(home, monkeypatch):
    calls = []

    def child(command, **more):
        calls.append(command)
        return subprocess.CompletedProcess(
            command, 0, json.dumps(dict(flops={"float32": 1.0, "bfloat16": 2.0}, context_bytes=3)) + "\n", ""
        )

    monkeypatch.setattr(machine.subprocess, "run", child)
    assert machine.calibrate(home.store)["context_bytes"] == 3
    assert machine.calibrate(home.store)["context_bytes"] == 3 and len(calls) == 1
    machine.calibrate(home.store, force=True)
    assert len(calls) == 2 and machine.describe(home.store)["measured"]["flops"]["bfloat16"] == 2.0
    monkeypatch.setattr(
        machine.subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, 1, "", "No module named torch\n")
    )
    with pytest.raises(RuntimeError, match="No module named torch"):
        machine.calibrate(home.store, force=True)

"""Specs: what is written reads back as the same object; what cannot work is refused in one sentence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InputError
from workbench.spec import RunSpec, load

BASE = dict(model="m", data="d", pipeline=[dict(method="wanda", sparsity=0.5), dict(method="lora", rank="auto"), dict(method="int8")],
            budget=dict(minutes=2), seed=0)


@settings(max_examples=60, deadline=None)
@given(minutes=st.floats(0.01, 1e4), sparsity=st.floats(0.0, 0.95), rank=st.one_of(st.just("auto"), st.integers(1, 64)), seed=st.integers(0, 2**31 - 1),
       lr=st.floats(1e-7, 1.0), note=st.text(max_size=40), name=st.one_of(st.none(), st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=12)))
def test_yaml_reads_back_as_the_same_spec(minutes, sparsity, rank, seed, lr, note, name):
    spec = RunSpec.from_dict(dict(BASE, pipeline=[dict(method="wanda", sparsity=sparsity), dict(method="lora", rank=rank)], budget=dict(minutes=minutes),
                                  seed=seed, training=dict(lr=lr), note=note, name=name))
    assert RunSpec.from_yaml(spec.to_yaml()) == spec
    assert RunSpec.from_dict(spec.to_dict()) == spec


def test_numbers_and_patterns_are_read_as_people_mean_them():
    spec = RunSpec.from_yaml("model: m\ndata: d\npipeline: [{method: wanda, pattern: 2:4}]\ntraining: {lr: 1e-3, warmup: .1}\nbudget: {minutes: 1.5, steps: 10}")
    assert spec.pipeline[0].pattern == "2:4" and spec.training.lr == 0.001 and spec.training.warmup == 0.1
    assert spec.budget.minutes == 1.5 and spec.budget.steps == 10


@pytest.mark.parametrize("change, word", [
    (dict(pipline=[]), "pipeline"), (dict(budget=dict(minutes=0)), "above zero"), (dict(budget=dict(minutes=-1)), "above zero"),
    (dict(budget=dict(minute=1)), "minutes"), (dict(budget=dict(steps=1, tokens=5)), "Keep one"), (dict(model=None), "missing"), (dict(seed=-1), "whole number"),
    (dict(seed=True), "whole number"), (dict(task="translation"), "causal-lm"), (dict(pipeline=[dict(method="lorra")]), "lora"),
    (dict(pipeline=[dict(method="lora", ranc=8)]), "rank"), (dict(pipeline=[dict(method="lora", rank=0)]), "1 to"),
    (dict(pipeline=[dict(method="lora", rank="big")]), "whole number"), (dict(pipeline=[dict(method="wanda", sparsity=1.5)]), "0.0 to"),
    (dict(pipeline=[dict(method="int8"), dict(method="lora")]), "end of the pipeline"), (dict(pipeline=[dict(method="int8"), dict(method="int4")]), "already packed"),
    (dict(training=dict(lr=0)), "number from"), (dict(training=dict(schedule="zigzag")), "cosine"), (dict(data=dict(source="d", split=2)), "between 0 and 1"),
    (dict(pipeline="lora"), "list")])
def test_refusals_name_the_field_and_the_remedy(change, word):
    with pytest.raises(InputError) as caught:
        RunSpec.from_dict({**BASE, **change})
    text = str(caught.value)
    assert word in text and "\n" not in text and "Traceback" not in text and caught.value.remedy


@pytest.mark.parametrize("text", ["model: [unclosed", "- just\n- a list", "model: m\n  data: d", "", "42"])
def test_malformed_yaml_is_one_sentence(text):
    with pytest.raises(InputError) as caught:
        RunSpec.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_setting_changes_one_field_by_its_path():
    spec = RunSpec.from_dict(BASE)
    assert spec.setting("pipeline.1.rank", 4).pipeline[1].rank == 4
    assert spec.setting("budget.memory_gb", 2).budget.memory_gb == 2
    assert spec.setting("data.limit", 10).data.limit == 10
    for path in ("budget.minuts", "pipeline.9.rank", "pipeline.1.ranc", "pipeline.1", "nothing.at.all"):
        with pytest.raises(InputError):
            spec.setting(path, 1)


def test_unknown_preset_names_those_that_exist():
    with pytest.raises(InputError, match="example"):
        load("exampl")

"""What the New run and Library pages ask of the workbench, without a browser."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from components import library, new_run
from engines import registry
from workbench import catalog, cli, cli_shared
from workbench.home import Home
from workbench.spec import RunSpec, Training

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = RunSpec.from_yaml((ROOT / "assets/presets/example.yaml").read_text()).to_dict()
PRESETS = [{"id": "example", "spec": EXAMPLE}]


@pytest.fixture
def ask(tmp_path):
    home = Home.open(tmp_path)
    return {f.__name__: f for f in new_run.server_functions(home)}


@pytest.mark.parametrize("changes", [
    {}, {"budget.minutes": 3.5}, {"budget.memory_gb": None, "seed": 7}, {"pipeline.0.pattern": "2:4"},
    {"pipeline": [{"method": "lora", "rank": 4, "targets": "q_proj,v_proj"}, {"method": "int8"}], "name": "it's mine"},
    {"pipeline": [{"method": "magnitude", "sparsity": 0.5}], "training.batch": 8, "training.lr": 3e-5}, {"budget": {"steps": 40}},
    {"training.switches": [{"method": "grades", "tau": 0.2}, "spectral-alignment"]},
    {"data": {"source": "some file.csv", "text": "body", "limit": 10}, "model": "./a b", "tags": ["x", "y z"]},
], ids=str)
def test_the_command_means_the_same_spec(changes):
    spec = RunSpec.from_dict(EXAMPLE)
    for path, value in changes.items():
        spec = spec.setting(path, value)
    words = shlex.split(new_run.command(spec.to_dict(), PRESETS, catalog.methods()))
    assert words[:3] == ["python", "-m", "workbench"]
    assert cli_shared.spec_of(cli.build().parse_args(words[3:])).to_dict() == spec.to_dict()


def test_the_command_is_short_when_little_differs():
    spec = RunSpec.from_dict(EXAMPLE).setting("budget.minutes", 3)
    assert new_run.command(spec.to_dict(), PRESETS, catalog.methods()) == "python -m workbench run example --minutes 3"


def test_every_knob_of_the_training_loop_is_on_the_page_with_its_range():
    fields = {f["name"]: f for f in new_run.training_fields()}
    assert set(fields) == {f.name for f in dataclasses.fields(Training)} - {"switches"}, "switches have fields of their own"
    for name, f in fields.items():
        assert f["default"] == getattr(Training(), name) and f["help"]
        for bound in ("low", "high"):
            if f[bound] is not None:
                Training(**{name: f[bound]})         # the page must not allow what the spec refuses
                beyond = f[bound] * 2 + 1 if bound == "high" else f[bound] - 1
                with pytest.raises(Exception, match=name):
                    Training(**{name: beyond})
        for choice in f["choices"] or ():
            Training(**{name: choice})


def test_the_first_answer_is_json_with_the_example_chosen(ask):
    found = json.loads(json.dumps(ask["boot"]({})))
    assert found["preset"] == "example" and found["spec"]["model"] == "stdlib-lm"
    assert [s["method"] for s in found["spec"]["pipeline"]] == ["wanda", "lora", "int8"]
    assert found["name"] and {m["id"] for m in found["methods"]} >= {"lora", "int8"}
    assert {m["id"] for m in found["switches"]} == set(registry.switches())


def test_a_preset_is_saved_without_the_runs_name_and_read_again(ask):
    spec = {**EXAMPLE, "name": "one-run", "seed": 3, "budget": {"minutes": 1, "memory_gb": None}}
    got = ask["save_preset"]({"name": " My preset! ", "spec": spec})
    assert got["id"] == "my-preset" and got["presets"][-1]["id"] == "my-preset" and got["presets"][-1]["own"]
    again = ask["preset"]({"name": "my-preset"})["spec"]
    assert again["seed"] == 3 and again["budget"] == {"minutes": 1} and "name" not in again


@pytest.mark.parametrize("name", ["", "  ", "example", "../.."])
def test_a_preset_that_cannot_be_saved_is_refused_in_one_sentence(ask, name):
    text = ask["save_preset"]({"name": name, "spec": EXAMPLE})["error"]["text"]
    assert text.endswith(".") and "name" in text


def test_a_model_that_cannot_be_read_does_not_hide_the_data(ask):
    got = ask["preview"]({"source": "python-docs", "model": "/no/such/folder"})
    assert got["counts"]["train"] > 0 and got["rows"]


def test_the_copied_yaml_is_the_spec(ask):
    spec = {**EXAMPLE, "name": "a"}
    assert RunSpec.from_yaml(ask["as_text"]({"spec": spec})["yaml"]).to_dict() == spec


@pytest.fixture
def model(tmp_path, monkeypatch):
    """stdlib-lm as shapes without meaning, so that these tests need no bundled weights."""
    from tests.browser.test_new_run import llama
    llama(tmp_path / "models" / "stdlib-lm")
    monkeypatch.setattr(sys.modules["engines.models.locate"], "BUNDLED", tmp_path / "models")


def test_start_records_the_run_and_clone_brings_its_settings_back(ask, model):
    got = ask["start"]({"spec": {**EXAMPLE, "name": "first", "seed": 5}, "queue": True})
    assert got["name"] == "first" and got["place"] == "place 1" and got["next_name"] != "first"
    again = ask["clone"]({"run": "first"})
    assert again["run"] == got["run"] and again["spec"]["seed"] == 5 and again["spec"]["pipeline"] == EXAMPLE["pipeline"]


def test_a_run_over_its_budget_starts_only_when_insisted(ask, model):
    spec = {**EXAMPLE, "budget": {"memory_gb": 0.1}}
    with pytest.raises(Exception, match="budget"):
        ask["start"]({"spec": spec})
    assert ask["start"]({"spec": spec, "force": True})["run"]


def test_what_each_method_costs_alone_is_on_its_card(ask, model):
    found = ask["costs"]({k: EXAMPLE[k] for k in ("model", "data", "budget")})
    assert found["lora"]["trainable"] > 0 and found["int8"]["after_bytes"] < found["int8"]["before_bytes"]
    assert set(found) == {m["id"] for m in catalog.methods()}


def test_the_library_lists_every_shelf(tmp_path):
    ask = {f.__name__: f for f in library.server_functions(Home.open(tmp_path))}
    found = json.loads(json.dumps(ask["shelves"]({})))
    assert {d["id"] for d in found["data"]} == {"python-code", "python-docs", "stdlib-modules", "digits"}
    assert all(m["title"] and m["summary"] and m["family"] for m in found["methods"])


def test_the_page_and_its_forecast_never_import_torch(tmp_path):
    code = """
import sys
from components import new_run
from workbench.home import Home
ask = {f.__name__: f for f in new_run.server_functions(Home.open())}
first = ask["boot"]({})
try:
    ask["plan"]({"spec": first["spec"]})
    ask["costs"]({k: first["spec"].get(k) for k in ("model", "data", "budget")})
except Exception as error:
    assert hasattr(error, "problem"), error
assert not {"torch", "transformers", "peft"} & set(sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**__import__("os").environ, "WORKBENCH_HOME": str(tmp_path)},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

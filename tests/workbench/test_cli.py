"""The command line: one object on stdout, one sentence on stderr, exit codes 0, 1 and 2."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import InputError
from tests.workbench import planned
from workbench import cli, cli_commands, cli_run, cli_shared
from workbench.checkup import checks
from workbench.home import Home
from workbench.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FETTLE_DEBUG", raising=False)
    return tmp_path / "home"


@pytest.fixture
def llama(tmp_path):
    return str(planned.folder(tmp_path / "llama", planned.LLAMA))


@pytest.fixture
def text(tmp_path):
    return str(planned.texts(tmp_path / "text.csv", rows=200))


@pytest.fixture
def call(capsys):
    """Run one command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(call):
    """A command that is refused: exit code 2, nothing on stdout, one sentence on stderr, which is returned."""

    def run(*arguments):
        code, out, err = call(*arguments)
        assert code == 2, (code, out, err)
        assert out == "" and "Traceback" not in err
        assert err.count("\n") == 1 and err.rstrip().endswith((".", "?"))
        return err.strip()

    return run


def write(path: Path, given: dict | str) -> str:
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return str(path)


# -- what there is -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [["methods"], ["models"], ["runs"], ["methods", "lora"], ["doctor"]])
def test_json_is_one_document(call, command):
    code, out, err = call(*command, "--json")
    assert code == 0 and err == ""
    found = json.loads(out)
    assert isinstance(found, list if command in (["methods"], ["models"], ["runs"]) else dict)
    code, plain, _ = call(*command)
    assert code == 0 and plain.strip() and not plain.startswith(("[", "{"))


def test_a_model_folder_and_a_data_file(call, llama, text):
    code, out, _ = call("models", llama, "--json")
    assert code == 0 and json.loads(out)["layers"] == 3
    code, out, _ = call("data", text, "--json", "--rows", 2)
    assert code == 0 and len(json.loads(out)["rows"]) == 2


def test_plan_from_flags(call, llama, text):
    code, out, _ = call(
        "plan",
        "--model",
        llama,
        "--data",
        text,
        "--task",
        "causal-lm",
        "--method",
        "wanda:sparsity=0.6",
        "--method",
        "lora:rank=auto",
        "--method",
        "int8",
        "--minutes",
        "2",
        "--memory-gb",
        "2",
        "--seed",
        "3",
        "--set",
        "training.batch=4",
        "--json",
    )
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["training"]["batch"] == 4
    assert found["spec"]["pipeline"][0]["sparsity"] == 0.6 and found["spec"]["seed"] == 3
    assert found["spec"]["budget"] == {"minutes": 2, "memory_gb": 2}
    code, out, _ = call("plan", "--model", llama, "--data", text, "--task", "causal-lm", "--method", "lora", "--minutes", "2")
    assert code == 0 and "Fits" in out and "1 lora" in out and "lr = " in out


def test_flags_win_over_the_file(tmp_path, llama, text):
    path = write(tmp_path / "s.yaml", dict(model="other", data=text, pipeline=["full"], budget={"steps": 5, "memory_gb": 9}))
    args = cli.build().parse_args(
        [
            "plan",
            path,
            "--model",
            llama,
            "--tokens",
            "1000",
            "--memory-gb",
            "none",
            "--method",
            "lora:rank=2",
            "--name",
            "mine",
            "--set",
            "pipeline.0.rank=3",
            "--set",
            "training.lr=1e-3",
        ]
    )
    made = cli_shared.spec_of(args)
    assert made.model == llama and made.budget.limits() == {"tokens": 1000} and made.name == "mine"
    assert made.pipeline[0].rank == 3 and made.training.lr == 1e-3
    assert cli_shared.stage("lora:rank=8,targets=all-linear,dora=true") == {
        "method": "lora",
        "rank": 8,
        "targets": "all-linear",
        "dora": True,
    }


def test_a_plan_that_does_not_fit_is_an_answer(call, refused, llama, text):
    flags = ("--model", llama, "--data", text, "--task", "causal-lm", "--method", "full", "--steps", "5", "--memory-gb", "0.01")
    code, out, _ = call("plan", *flags, "--json")
    found = json.loads(out)
    assert code == 0 and not found["fits"] and found["changes"]
    said = refused("run", *flags)
    assert "budget.memory_gb" in said and "allow" in said and Home.open().store.count_runs() == 0


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_unknown_names(refused, llama, text):
    assert "there is no such model" in refused("plan", "--model", "stdlib-ml", "--data", text, "--method", "lora")
    assert "there is no such data" in refused("plan", "--model", llama, "--data", "python-dogs", "--method", "lora")
    assert "Did you mean lora" in refused("plan", "--model", llama, "--data", text, "--method", "lroa")
    assert "no such file or preset" in refused("plan", "exampel")
    assert "Did you mean lora" in refused("methods", "lora2")
    assert "invalid choice" in refused("plann")
    assert refused("plan").startswith("spec = None")


def test_folders_that_are_no_models(refused, tmp_path, text):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("plan", "--model", tmp_path / "empty", "--data", text, "--method", "lora")
    pickled = planned.folder(tmp_path / "pickled", planned.LLAMA, weights=False)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "only pickle weights" in refused("plan", "--model", pickled, "--data", text, "--method", "lora")
    bare = planned.folder(tmp_path / "bare", planned.LLAMA, tokenizer=False)
    assert "no tokenizer" in refused("plan", "--model", bare, "--data", text, "--task", "causal-lm", "--method", "lora")


@pytest.mark.parametrize(
    "yaml,words",
    [
        ("model: [a\ndata: b", "not YAML at line"),
        ("- 1", "not a mapping"),
        ("model: a", "missing"),
        ("model: a\ndata: b\nmodle: c", "Did you mean model"),
        ("model: a\ndata: b\nbudget: {minute: 2}", "Did you mean minutes"),
        ("model: a\ndata: b\nbudget: {minutes: -1}", "above zero"),
        ("model: a\ndata: b\nbudget: {minutes: two}", "not a number"),
        ("model: a\ndata: b\nbudget: {steps: 2.5}", "not a whole number"),
        ("model: a\ndata: b\npipeline: [{method: lora, rank: 0}]", "outside"),
        ("model: a\ndata: b\npipeline: [{method: lora, rank: big}]", "not a whole number"),
        ("model: a\ndata: b\npipeline: [{method: lora, runk: 8}]", "Did you mean rank"),
        ("model: a\ndata: b\npipeline: [int8, lora]", "Move int8 to the end"),
        ("model: a\ndata: b\npipeline: [int8, int4]", "Keep one"),
        ("model: a\ndata: b\ntraining: {batch: 0}", "not a whole number"),
        ("model: a\ndata: b\nseed: -1", "whole number"),
        ("model: a\ndata: b\ntask: poetry", "not a task"),
        ("model: a\ndata: b\nbudget: {steps: 5, tokens: 5}", "two names for one limit"),
    ],
)
def test_specs_that_are_refused(refused, tmp_path, yaml, words):
    assert words in refused("run", write(tmp_path / "s.yaml", yaml))


def test_data_that_cannot_be_used(refused, tmp_path, llama):
    path = tmp_path / "t.csv"
    path.write_text("alpha,beta\n" + "a,b\n" * 20)
    flags = ("--model", llama, "--method", "lora")
    assert "alpha, beta" in refused("plan", *flags, "--data", path)
    assert "alpha, beta" in refused("data", path, "--text", "gamma")
    path.write_text("text\n")
    assert "empty" in refused("plan", *flags, "--data", path)
    vit = planned.folder(tmp_path / "vit", dict(planned.VIT, id2label={"0": "a", "1": "b"}), tokenizer=False)
    assert "trained for 2" in refused("plan", "--model", vit, "--data", "digits", "--method", "full")
    assert "images" in refused("plan", *flags, "--data", "digits")


def test_shapes_that_a_method_refuses(refused, tmp_path, text):
    odd = planned.folder(tmp_path / "odd", dict(planned.LLAMA, hidden_size=72, head_dim=18, intermediate_size=100))
    said = refused("plan", "--model", odd, "--data", text, "--task", "causal-lm", "--method", "int4")
    assert "pipeline[0]" in said or "int4" in said
    assert "at most 4" in refused(
        "plan",
        "--model",
        planned.folder(tmp_path / "m", planned.LLAMA),
        "--data",
        text,
        "--task",
        "causal-lm",
        "--method",
        "lora",
        "--set",
        "training.batch=4",
        "--set",
        "training.accumulation=8",
    )


def test_flags_that_are_refused(refused, llama, text):
    flags = ("--model", llama, "--data", text)
    assert "field=value" in refused("plan", *flags, "--method", "lora:8")
    assert "key=value" in refused("plan", *flags, "--set", "seed")
    assert "Did you mean training" in refused("plan", *flags, "--set", "trainig=1")
    assert "not a number" in refused("plan", *flags, "--minutes", "soon")
    assert "not a state" in refused("runs", "--status", "done")
    assert "expected" in refused("runs", "--limit")
    assert "invalid int" in refused("runs", "--limit", "many")
    assert "HTML" in refused("report", "1", "page.pdf")


def test_runs_that_are_not_there_or_over(refused, llama, text):
    assert "no run" in refused("show", "99")
    store = Home.open().store
    spec = RunSpec.from_dict(dict(model=llama, data=text, pipeline=["lora"], budget={"steps": 3})).to_dict()
    run = store.create_run(spec, name="done-already", status="queued")
    store.update_run(run, status="finished")
    assert "has finished" in refused("resume", "done-already")
    assert "ended already" in refused("stop", run)
    assert "no such series" in refused("points", run, "loss")


def test_a_home_that_cannot_be_written(refused, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("WORKBENCH_HOME", str(file / "below"))
    assert "WORKBENCH_HOME" in refused("runs")


def test_a_database_of_a_newer_version(refused, home):
    Home.open().store.close()
    with sqlite3.connect(home / "fettle.db") as db:
        db.execute("PRAGMA user_version = 9999")
    from workbench import home as homes

    homes._STORES.clear()
    assert "newer" in refused("runs")


def test_a_defect_is_one_sentence_too(call, monkeypatch):
    monkeypatch.setattr(cli_commands, "methods", lambda args: 1 / 0)
    code, out, err = call("methods")
    assert code == 1 and out == "" and err.startswith("Unexpected ZeroDivisionError") and err.count("\n") == 1
    monkeypatch.setenv("FETTLE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["methods"])


def test_json_has_no_nan(capsys):
    cli_shared.emit({"a": float("nan"), "b": [1.0, float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.0, None]}


# -- runs --------------------------------------------------------------------------------------------------------------
def finished(llama, text, name, value):
    import numpy as np

    store = Home.open().store
    spec = RunSpec.from_dict(
        dict(model=llama, data=text, pipeline=[{"method": "lora", "rank": 4}], budget={"steps": 3})
    ).to_dict()
    run = store.create_run(
        spec, name=name, forecast={"memory": {"peak_bytes": 2e9}, "size": {"bytes": 100}, "trainable": {"count": 7}}
    )
    store.put_stage(run, 0, "lora", {"rank": 4}, status="finished", seconds=2.0)
    store.append(run, [("loss", step, 3.0 / step, float(step)) for step in (1, 2, 3)])
    scores = np.linspace(1, 2, 50).astype(np.float32) * value
    for stage, factor in ((-1, 2.0), (0, 1.0)):
        store.put_evaluation(
            run,
            "result" if stage == 0 else "base",
            stage,
            3,
            2.0,
            "bits/byte",
            value * factor,
            value - 0.1,
            value + 0.1,
            50,
            (scores * factor).tobytes(),
            np.full(50, 2.0, np.float32).tobytes(),
            "same",
            {},
        )
    store.update_run(run, status="finished", seconds=3.5, peak_bytes=1_900_000_000, metric="bits/byte", value=value)
    return run


def test_show_points_and_compare(call, llama, text):
    a, b = finished(llama, text, "first-run", 1.5), finished(llama, text, "second-run", 1.2)
    code, out, _ = call("show", "first-run", "--json")
    found = json.loads(out)
    assert code == 0 and {"run", "name", "status", "seconds", "stages", "evaluation", "forecast", "footprint", "error"} <= set(
        found
    )
    assert found["run"] == a and found["stages"][0]["hyperparameters"] == {"rank": 4}
    assert found["evaluation"]["after"]["value"] == 1.5 and len(found["evaluation"]["after"]["interval"]) == 2
    code, out, _ = call("points", a, "loss", "--json")
    assert json.loads(out)["step"] == [1, 2, 3]
    assert json.loads(call("points", a, "--json")[1])[0]["name"] == "loss"
    code, out, _ = call("compare", a, b, "--json")
    found = json.loads(out)
    assert code == 0 and [r["run"] for r in found["runs"]] == [a, b] and len(found["paired"]) == 1 and found["paired"][0]["text"]
    code, out, _ = call("compare", a, b)
    assert "first-run" in out and "lora" in out
    assert [r["name"] for r in json.loads(call("runs", "--json", "--status", "finished")[1])] == ["second-run", "first-run"]
    assert "peak memory" in call("show", a)[1]


def test_progress_line(llama, text):
    run = finished(llama, text, "going", 1.0)
    store = Home.open().store
    store.update_run(run, status="running", progress=0.5, left_seconds=61, tokens_per_second=1234.0, phase="1 lora")
    line = cli_run.progress_line(store.light(run), store)
    assert (
        "##########.........." in line
        and " 50%" in line
        and "1 lora" in line
        and "loss 1.000" in line
        and "1,234/s" in line
        and "1:01 left" in line
    )


def test_doctor_names_the_remedy(monkeypatch, tmp_path):
    rows = {r["name"]: r for r in checks()}
    assert rows["torch"]["ok"] and rows["home"]["ok"] and rows["device"]["ok"]
    assert all(r["ok"] or r["remedy"] for r in rows.values())
    monkeypatch.setenv("WORKBENCH_HOME", "/proc/nowhere")
    bad = {r["name"]: r for r in checks()}["home"]
    assert not bad["ok"] and bad["needed"] and "WORKBENCH_HOME" in bad["remedy"]


# -- processes ---------------------------------------------------------------------------------------------------------
def process(*arguments, home, **more):
    return subprocess.run(
        [sys.executable, "-m", "workbench", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "WORKBENCH_HOME": str(home), **more},
    )


def test_a_command_is_quick_and_needs_no_torch(home):
    code = "import sys; from workbench.cli import main; main(['methods']); sys.exit(bool({'torch', 'gradio'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "WORKBENCH_HOME": str(home)},
    )
    assert done.returncode == 0 and "lora" in done.stdout, done.stderr
    done = process("plan", "nothing.yaml", home=home)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_from_the_command_line(home, llama, text):
    """The whole way: queue, dispatcher, worker, pipeline, result; the figures promised as exact are exact."""
    done = process(
        "run",
        "--model",
        llama,
        "--data",
        text,
        "--task",
        "causal-lm",
        "--method",
        "lora:rank=2",
        "--method",
        "int8",
        "--steps",
        "3",
        "--set",
        "training.batch=4",
        "--set",
        "training.length=32",
        "--set",
        "training.precision=fp32",
        "--set",
        "training.evaluations=1",
        "--json",
        home=home,
        OMP_NUM_THREADS="1",
        WORKBENCH_COLD="1",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "finished" and found["error"] is None and [s["method"] for s in found["stages"]] == ["lora", "int8"]
    assert found["forecast"]["trainable"]["count"] == found["footprint"]["trainable"]
    assert found["forecast"]["size"]["bytes"] == found["footprint"]["size_bytes"]
    assert (
        found["footprint"]["peak_bytes_by_phase"] and found["evaluation"]["before"]["n"] == found["evaluation"]["after"]["n"] > 0
    )


def test_demand_is_said_by_input_errors_only():
    with pytest.raises(InputError):
        cli_shared.stage("lora:rank")

"""The leaderboard: whose quality nobody has for less, rows of methods that are gone, and the command line."""

import json
import subprocess
import sys

import pytest

from benchmarks import adaptation
from engines.errors import InputError
from workbench import cli, leaderboard


def row(method, steps, step=0.1, peak=10e6, trainable=1000, seconds=None, **more):
    found = {"method": method, "trainable": trainable, "rate": 0.01, "metric": "bits/byte", "seconds a step": step, "peak": peak, "gradients": 1.0,
             "optimizer": 2.0, "steps": steps, "steps from": steps - 0.01, "steps to": steps + 0.01, "steps n": 60, "steps tier": "A", **more}
    if seconds:
        found |= {"seconds": seconds, "seconds from": seconds, "seconds to": seconds, "seconds n": 50, "seconds tier": "B"}
    return found


@pytest.fixture
def file(tmp_path):
    rows = [row("full", 1.2, step=0.3, trainable=9000), row("lora", 1.3, seconds=1.35), row("lora dora", 1.4, step=0.2, stage={
        "method": "lora", "dora": True, "rank": "auto"}, seconds=1.3), row("bone", 1.5, step=None, peak=5e6), row("gone", 1.0, step=0.001),
        {"method": "eva", "error": "ValueError: it broke"}, {"method": "gone form", "error": "no"}]
    setting = {"model": "m", "data": "d", "steps": 60, "batch": 4, "length": 128, "precision": "bf16", "items": 120, "seeds": 3, "trainable": 2000}
    path = tmp_path / "leaderboard.json"
    path.write_text(json.dumps({"date": "2026-01-02", "machine": {"processor": "P", "cores": 2, "torch": "2"}, "seeds": 3, "arenas": {
        "docs": {"title": "m on d", "setting": setting, "rows": rows},
        "words": {"title": "w", "setting": setting | {"trainable": 0.01}, "rows": [
            row("lora", 0.5, metric="accuracy"), row("bone", 0.7, metric="accuracy")]}}}))
    return path


def test_the_front_has_what_nothing_beats_in_quality_and_cost(file):
    docs, words = leaderboard.arenas(file)
    front = lambda arena, side, cost: {r["id"] for r in arena["rows"] if r["front"][side][cost]}  # noqa: E731
    assert front(docs, "steps", "pace") == {"full", "lora"}  # bone has no step time and is on no front of it
    assert front(docs, "steps", "peak") == {"full", "bone"}
    assert front(docs, "steps", "trainable") == {"full", "lora"}
    assert front(docs, "seconds", "trainable") == {"lora dora"} and front(docs, "seconds", "pace") == {"lora", "lora dora"}
    assert front(words, "steps", "pace") == {"bone"} and not words["lower"]
    assert [r["id"] for r in words["rows"]] == ["bone", "lora"]


def test_rows_have_names_figures_and_the_stage_to_use(file):
    docs = leaderboard.arena("docs", file)
    assert [(r["id"], r["steps"]["rank"]) for r in docs["rows"]] == [("full", 1), ("lora", 2), ("lora dora", 3), ("bone", 4)]
    dora = docs["rows"][2]
    assert (dora["name"], dora["form"], dora["family"], dora["use"]) == ("LoRA", "dora", "adaptation", "lora:dora=true")
    assert dora["pace"] == 2 and dora["seconds"]["rank"] == 1 and docs["rows"][0]["seconds"] is None and docs["rows"][3]["pace"] is None
    assert [r["id"] for r in leaderboard.ordered(docs["rows"], "seconds")][:2] == ["lora dora", "lora"]
    assert "2,000 parameters" in docs["setting"] and "1% of the parameters" in leaderboard.arena("words", file)["setting"]
    assert docs["machine"] == "P, 2 cores, torch 2" and docs["date"] == "2026-01-02"


def test_methods_that_are_gone_are_dropped_and_failures_told(file):
    docs = leaderboard.arena("docs", file)
    assert "gone" not in {r["method"] for r in docs["rows"]}
    assert docs["failed"] == [{"name": "EVA", "reason": "ValueError: it broke"}]


def test_without_the_file_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "FILE", tmp_path / "none.json")
    assert leaderboard.arenas() == []
    with pytest.raises(InputError, match="without a leaderboard"):
        leaderboard.arena("docs")
    assert cli.main(["leaderboard"]) == 0 and "without a leaderboard" in capsys.readouterr().out


def test_command_prints_a_table_or_json(file, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "FILE", file)
    assert cli.main(["leaderboard", "docs"]) == 0
    text = capsys.readouterr().out
    assert text.index("Full fine-tuning") < text.index("LoRA dora") < text.index("Bone") and "1.390 to 1.410" in text
    assert "cannot be told apart" in text and "makers of Fettle on 2026-01-02" in text and "--arena docs" in text
    assert cli.main(["leaderboard", "docs", "--at", "seconds", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["id"] == "docs" and found["at"] == "seconds" and found["rows"][0]["id"] == "lora dora"
    assert cli.main(["leaderboard", "--json"]) == 0
    assert [a["id"] for a in json.loads(capsys.readouterr().out)] == ["docs", "words"]


@pytest.mark.parametrize("arguments", [("dosc",), ("docs", "--at", "parameters")])
def test_bad_input_is_one_sentence(file, monkeypatch, capsys, arguments):
    monkeypatch.setattr(leaderboard, "FILE", file)
    assert cli.main(["leaderboard", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and ("Did you mean docs?" in err or "--at" in err)


def test_the_copy_that_comes_with_fettle_can_be_used():
    from workbench.cli_shared import stage
    found = leaderboard.arenas()
    assert {"docs"} <= {a["id"] for a in found}
    from engines import registry
    for arena in found:
        assert arena["setting"] and arena["date"] and arena["machine"] and any(r["id"] == "lora" for r in arena["rows"])
        for r in arena["rows"]:
            registry.build(stage(r["use"]))
            assert r["steps"]["low"] <= r["steps"]["high"]


def test_publishing_copies_the_results_and_keeps_the_day_of_what_did_not_run_again(tmp_path, monkeypatch, file):
    rows = json.loads(file.read_text())["arenas"]["docs"]["rows"][:2]
    results = {"date": "2026-02-03", "machine": {"processor": "Q"}, "seeds": 3, "left_out": {}, "arenas": {"docs": rows, "elsewhere": rows}}
    (tmp_path / "adaptation.json").write_text(json.dumps(results))
    monkeypatch.setattr(adaptation.common, "RESULTS", tmp_path)
    monkeypatch.setattr(adaptation, "PUBLISHED", tmp_path / "assets" / "leaderboard.json")
    monkeypatch.setattr(adaptation, "arenas", lambda: {"docs": dict(model="stdlib-lm", precision="bf16", batch=4, length=128, items=240, steps=60)})
    adaptation.PUBLISHED.parent.mkdir()
    adaptation.publish()
    first = json.loads(adaptation.PUBLISHED.read_text())
    assert set(first["arenas"]) == {"docs"} and first["arenas"]["docs"]["rows"][1]["stage"]["method"] == "lora"
    assert first["arenas"]["docs"]["setting"]["items"] == 120
    (tmp_path / "adaptation.json").write_text(json.dumps(results | {"date": "2026-03-04"}))
    adaptation.publish()
    assert json.loads(adaptation.PUBLISHED.read_text())["arenas"]["docs"]["date"] == "2026-02-03"


def test_it_needs_no_torch():
    code = "import sys; from workbench import leaderboard; leaderboard.arenas(); sys.exit('torch' in sys.modules or 'gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

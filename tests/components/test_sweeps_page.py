"""What the Sweeps page asks the server for: proposals, forecast, command, and the endpoints."""

from __future__ import annotations

import pytest

from components import sweeps
from engines.errors import InputError
from workbench.home import Home
from workbench.spec import RunSpec
from workbench.sweeps import service
from workbench.sweeps.plan import SweepPlan

TEXT = ("model: stdlib-lm\ndata: python-docs\npipeline: [{method: wanda, sparsity: 0.5}, {method: lora, rank: auto}]\n"
        "budget: {minutes: 1}\n")


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    started = []
    monkeypatch.setattr(service, "conduct", lambda home, sweep: started.append(sweep))
    found = {fn.__name__: fn for fn in sweeps.functions(Home.open())}
    return found | {"started": started}


def test_every_proposal_is_accepted(page):
    fields = page["fields"]({"yaml": TEXT})["fields"]
    paths = [f["path"] for f in fields]
    assert {"pipeline.0.sparsity", "pipeline.1.rank", "pipeline.1.method", "training.lr", "seed", "budget.minutes"} <= set(paths)
    for field in fields:
        spec, section = sweeps.asked({"yaml": TEXT, "over": [field]})
        SweepPlan.read(spec, section)


def test_forecast_start_status_and_list(page):
    given = {"yaml": TEXT, "over": [{"path": "pipeline.1.rank", "values": "2, 4, 8"}, {"path": "", "values": ""}], "objectives": ["quality", "size"],
             "sampler": "tpe", "pruner": "none", "trials": 12, "minutes": None, "on": None}
    found = page["forecast"](given)
    assert found["trials"] == 3 and found["one"][1] <= 60 * 1.02 and "3 trials" in found["text"]
    assert found["command"] == ("python -m workbench sweep spec.yaml --over pipeline.1.rank=2,4,8 --objective quality --objective size "
                                "--sampler tpe --pruner none --trials 12")
    made = page["start"](given)
    assert page["started"] == [made["sweep"]]
    shown = page["status"]({"sweep": made["sweep"]})
    assert shown["status"] == "running" and shown["objectives"][0]["direction"] == "minimize" and shown["trials"] == []
    assert page["status"]({"sweep": made["sweep"], "seen": shown["mark"]}) == {"same": shown["mark"]}
    assert RunSpec.from_yaml(TEXT).model == shown["spec"]["model"]
    assert [s["name"] for s in page["listing"]({})["sweeps"]] == [made["name"]]
    with pytest.raises(InputError, match="it is running"):
        page["delete"]({"sweep": made["sweep"]})


def test_a_list_of_specs(page):
    specs = [dict(RunSpec.from_yaml(TEXT).to_dict(), pipeline=[{"method": "lora", "rank": r}]) for r in (2, 4)]
    assert page["base"]({"specs": specs})["specs"] == ["LoRA", "LoRA"]
    assert page["forecast"]({"specs": specs, "objectives": ["quality"]})["trials"] == 2


@pytest.mark.parametrize("change, said", [
    ({"over": [{"path": "training.lrr", "values": "1, 2"}]}, "Did you mean lr"), ({"over": []}, "fields to vary"),
    ({"yaml": "model: ["}, "not YAML"), ({"trials": "many"}, "whole number"), ({"on": "nowhere:x"}, "not an address"),
    ({"over": [{"path": "training.lr", "values": "1..x"}]}, "not a range"), ({"objectives": ["joules", "speed"]}, "no such objective")])
def test_what_cannot_be_is_one_sentence(page, change, said):
    given = {"yaml": TEXT, "over": [{"path": "seed", "values": "0, 1"}], "objectives": ["quality"]} | change
    with pytest.raises(InputError, match=said):
        page["forecast"](given)
    assert not page["started"]

"""What the section Recommend asks of the server."""

from __future__ import annotations

import json

import pytest

from components import planning_recommend
from tests.workbench import planned
from tests.workbench.recommending import finish, spec, usual


@pytest.fixture
def asked(tmp_path, monkeypatch):
    from workbench.home import Home
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    home = Home.open()
    return home, {fn.__name__: fn for fn in planning_recommend.server_functions(home)}


def test_the_form_knows_every_limit_that_a_recommendation_obeys(asked):
    from engines.budget import LIMITS
    boot = asked[1]["boot"]({})
    json.dumps(boot, allow_nan=False)
    assert {row["key"] for row in boot["limits"]} == set(LIMITS) - {"steps", "tokens"}
    assert set(boot["methods"].values()) == set(boot["families"]) and boot["start"]["model"] in {m["id"] for m in boot["models"]}


def test_empty_fields_are_no_limits_and_a_row_has_its_command(asked, tmp_path):
    home, ask = asked
    llama, text = str(planned.folder(tmp_path / "llama", planned.LLAMA)), str(planned.texts(tmp_path / "text.csv"))
    finish(home, spec(llama, text, "int8"), usual)
    found = ask["recommend"]({"spec": {"model": llama, "data": text, "budget": {"minutes": 1, "size_mb": None}}})
    json.dumps(found, allow_nan=False)
    assert found["budget"] == {"minutes": 1} and found["rows"] and found["base"] is not None
    command = ask["command"]({"spec": found["rows"][0]["spec"]})
    assert command["run"].startswith("python -m workbench run --model") and "--minutes 1" in command["run"]
    assert "--method" not in command["recommend"]


def test_a_refusal_names_its_field(asked):
    with pytest.raises(Exception, match="above zero") as refused:
        asked[1]["recommend"]({"spec": {"model": "stdlib-lm", "data": "python-docs", "budget": {"minutes": 0}}})
    assert refused.value.field == "budget.minutes" and refused.value.remedy

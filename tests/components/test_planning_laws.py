"""What the Predict section asks of the workbench, without a browser."""

import json

import pytest

from components import planning_laws
from workbench.home import Home


@pytest.fixture
def ask(tmp_path):
    home = Home.open(tmp_path)
    return {f.__name__: f for f in planning_laws.server_functions(home)} | {"home": home}


def test_cards_are_in_plain_words_and_need_no_fit(ask):
    found = ask["cards"]({})
    json.dumps(found)
    assert len(found["laws"]) == 9 and all(c["question"].endswith("?") for c in found["laws"])
    assert [c["id"] for c in found["laws"] if c["published"]] == ["chinchilla-replication", "avgparamscalinglaw", "compute-optimal-qat"]


def test_predict_answers_with_a_plot_and_no_nan(ask):
    found = ask["predict"]({"law": "no-train-no-gain", "source": "example", "options": {"minutes": "2", "unit": ""}})
    json.dumps(found, allow_nan=False)
    assert found["figures"]["minutes_here"] == pytest.approx(4.0)
    assert planning_laws._finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}


def test_too_few_runs_come_as_a_user_error_of_the_field_runs(ask):
    with pytest.raises(Exception) as caught:
        ask["predict"]({"law": "chinchilla-replication", "source": "runs"})
    assert caught.value.field == "runs" and "published constants" in str(caught.value)


def test_worth_of_a_fresh_run_is_to_wait(ask):
    run = ask["home"].store.create_run({"model": "m", "data": "d", "pipeline": []}, name="fresh", status="running")
    assert ask["worth"]({"run": run})["verdict"] == "wait"

"""Merging from the Compare page, without a browser."""

import pytest

from components import compare
from engines.errors import InputError
from workbench import merging
from workbench.home import Home

SPEC = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "lora", "rank": 8}], "budget": {"steps": 2}, "seed": 0}


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path)


@pytest.fixture
def merge(home, monkeypatch):
    found = {}
    monkeypatch.setattr(compare, "component", lambda name, server_functions, **_: found.update({f.__name__: f for f in server_functions}))
    compare.build(home)
    return found["merge"]


def test_the_chosen_runs_are_merged_in_their_order_with_one_weight(merge, home, monkeypatch):
    ids = [home.store.create_run(SPEC, name=n, status="finished") for n in ("a", "b")]
    asked = []
    monkeypatch.setattr(merging, "start", lambda ids, weights, home: asked.append((ids, weights)) or {"id": 9, "name": "both", "more": 1})
    assert merge({"ids": [ids[1], ids[0], ids[1], 77], "weight": 0.6}) == {"id": 9, "name": "both"}
    assert asked == [([ids[1], ids[0]], 0.6)]


def test_runs_that_left_no_adapter_are_refused_with_the_reason(merge, home):
    ids = [home.store.create_run(SPEC | {"pipeline": [{"method": m}]}, name=m, status="finished") for m in ("lora", "full")]
    with pytest.raises(InputError, match="left no separate adapter that could be added. Choose runs of LoRA's kind"):
        merge({"ids": ids, "weight": 1})
    assert home.store.count_runs() == 2

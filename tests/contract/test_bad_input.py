"""What a person may ask wrongly of any adaptation method: one sentence with the remedy, before anything is loaded; never a traceback."""

from __future__ import annotations

import pytest

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError
from engines.method import AUTO
from engines.profile import Batch, from_config
from tests.contract import micro

ADAPTATION = [id for id, cls in registry.methods().items() if cls.card.family == "adaptation"]
BATCH = Batch(rows=4, length=micro.LENGTH)
TRAINED = [id for id in ADAPTATION if registry.get(id).card.trains]
"""Those that need nothing beside the model; a merge of adapters needs the adapters."""
HUGE = 100_000
WHOLE = ("full", "hyperfitting")
"""Methods that train the model as a whole, blocks or none."""


def fields(id: str) -> dict:
    return {row["name"]: row for row in registry.get(id).hyperparameters()}


def profile(architecture: str = "llama", **changes):
    model = micro.model(architecture, **changes)
    return models.profile_of(model, "micro", micro.TASKS[architecture])


def asked(method: dict, found, budget: Budget | None = None) -> None:
    """What the planner does with a stage before it is run."""
    built = registry.build(method)
    built.check(found)
    chosen, _ = built.fit(found, budget or Budget())
    chosen.check(found)
    chosen.footprint(found, BATCH)


def refused(method: dict, found, budget: Budget | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        asked(method, found, budget)
    sentence_of(caught.value)
    return caught.value


def sentence_of(error: InputError) -> None:
    text = str(error)
    assert error.field and error.problem and error.remedy, text
    assert "\n" not in text and len(text) < 600, text
    assert not error.problem.rstrip().endswith("."), "the problem is a clause"
    assert error.remedy[0].isupper() or error.remedy[0] in "`0123456789" or error.remedy.split()[0].islower(), text
    assert "Traceback" not in text and "object at 0x" not in text


@pytest.mark.parametrize("id", ADAPTATION)
def test_a_target_that_matches_nothing(id):
    known = fields(id)
    for name in ("targets", "attention", "modules"):
        if name in known and known[name]["choices"] is None and isinstance(known[name]["default"], str):
            for wrong in ("no_such_proj", "q_proj,no_such_proj", "", " , "):
                error = refused({"method": id, name: wrong}, profile())
                assert name in error.field, error
            return
    if "targets" in known:
        refused({"method": id, "targets": "no_such_proj"}, profile())


@pytest.mark.parametrize("id", ADAPTATION)
def test_a_size_beyond_the_matrices(id):
    """Ranks, block sizes and counts larger than any matrix of the model are refused, or are by nature no such size."""
    for name, row in fields(id).items():
        if row["lever"] != "trainable" and name not in ("rank", "init_rank", "rank_max"):
            continue
        if row["type"] not in ("int", "auto") or row["choices"]:
            continue
        top = row["high"] if row["high"] is not None else HUGE
        if not isinstance(top, int) or top <= 64:
            continue
        try:
            error = refused({"method": id, name: top}, profile())
        except pytest.fail.Exception:
            raise AssertionError(f"{id}.{name} = {top} is not refused on matrices of 64 x 64") from None
        assert error.field.split(".")[0] in (id, "targets", "budget"), error


@pytest.mark.parametrize("id", ADAPTATION)
def test_a_budget_that_nothing_can_obey(id):
    known = fields(id)
    for name, row in known.items():
        if row["lever"] == "trainable":
            error = refused({"method": id, name: AUTO}, profile(), Budget(trainable=2))
            assert error.field.startswith(("budget.trainable", id)), error


@pytest.mark.parametrize("id", TRAINED)
def test_an_architecture_that_it_cannot_serve(id):
    """What the card refuses is refused by the method too; what it does not refuse either works or says why in one sentence."""
    card = registry.get(id).card
    for architecture in micro.ARCHITECTURES:
        found = profile(architecture)
        if architecture in card.refuses:
            error = refused({"method": id}, found)
            assert error.remedy
        elif micro.TASKS[architecture] in card.tasks:
            asked({"method": id}, found)


@pytest.mark.parametrize("id", ADAPTATION)
def test_shapes_that_do_not_divide(id):
    """Odd widths: 60 wide, 5 heads of 12, an MLP of 90: served, or one sentence that names what does not divide and what would."""
    found = profile("llama", hidden_size=60, num_attention_heads=5, num_key_value_heads=5, intermediate_size=90)
    try:
        asked({"method": id}, found)
    except InputError as error:
        sentence_of(error)
    for name, row in fields(id).items():
        if row["type"] == "int" and not row["choices"] and ("head" in name or "block" in name or "group" in name or "expert" in name):
            top = row["high"] if row["high"] is not None else 7
            for value in {7, row["low"] or 1, top}:
                if (row["low"] is None or value >= row["low"]) and (row["high"] is None or value <= row["high"]):
                    try:
                        asked({"method": id, name: value}, found)
                    except InputError as error:
                        sentence_of(error)


@pytest.mark.parametrize("id", ADAPTATION)
def test_values_of_the_wrong_kind(id):
    for name, row in fields(id).items():
        for wrong in (None, [], {}, "x" if not isinstance(row["default"], str) or row["choices"] else 3, float("nan"), True if not isinstance(
                row["default"], bool) else "yes"):
            if isinstance(wrong, float) and not isinstance(row["default"], (int, float)):
                continue
            with pytest.raises(InputError) as caught:
                registry.build({"method": id, name: wrong})
            assert caught.value.field == f"{id}.{name}"
            sentence_of(caught.value)


@pytest.mark.parametrize("id", TRAINED)
def test_a_model_without_blocks(id):
    """Nothing to adapt inside it: refused, not an empty training."""
    found = profile()
    empty = from_config("empty", found.config, tuple(t for t in found.tensors if ".layers." not in t.name))
    assert not empty.matrices
    if "targets" not in fields(id) and id in WHOLE:
        pytest.skip("trains whatever there is")
    refused({"method": id}, empty)

"""What every registered method must say about itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engines import registry
from engines.errors import InputError
from engines.method import AUTO
from tests.contract import micro

METHODS = list(registry.methods())


@pytest.mark.parametrize("id", METHODS)
def test_card_is_complete(id):
    card = registry.get(id).card
    assert card.id == id and card.name and card.title and 20 < len(card.summary) < 200 and card.summary.endswith(".")
    assert card.needs and card.cannot, "say what it needs and what it cannot do"
    for text in (*card.needs, *card.cannot):
        assert len(text) > 5 and not text.endswith("."), text
    assert set(card.tasks) <= {"causal-lm", "text-classification", "image-classification"} and card.tasks
    assert not (card.packs and card.trains), "packed integers cannot be trained in the same stage"


@pytest.mark.parametrize("id", METHODS)
def test_refusals_give_their_reason(id):
    card = registry.get(id).card
    for architecture, why in card.refuses.items():
        assert architecture and len(why.split()) > 3, (architecture, why)
    served = [a for a in micro.ARCHITECTURES if a not in card.refuses and micro.TASKS[a] in card.tasks]
    assert served, "a method must serve at least one architecture of the matrix"


@pytest.mark.parametrize("id", METHODS)
def test_hyperparameters_are_documented_and_guarded(id):
    cls = registry.get(id)
    for row in cls.hyperparameters():
        field, default = row["name"], row["default"]
        assert len(row["help"]) > 8, field
        assert row["lever"] in (None, "trainable", "size_mb", "memory_gb", "minutes", "joules"), field
        if default == AUTO:
            assert row["lever"], f"{field} is auto, so it must follow a limit"
        if row["choices"]:
            assert default == AUTO or default in row["choices"], field
            with pytest.raises(InputError):
                cls(**{field: "no such choice"})
        for bound, beyond in ((row["low"], -1), (row["high"], 1)):
            if bound is not None:
                assert default == AUTO or row["low"] is None or default >= row["low"]
                assert default == AUTO or row["high"] is None or default <= row["high"]
                with pytest.raises(InputError):
                    cls(**{field: bound + beyond})
        if not row["lever"] and not row["choices"] and not isinstance(default, str):
            with pytest.raises(InputError):
                cls(**{field: AUTO})
    built = registry.build(cls().settings())
    assert built == cls(), "settings() must read back"
    with pytest.raises(InputError, match="no field of this name"):
        registry.build({"method": id, "no_such_field": 1})


def test_methods_are_listed_without_torch():
    code = ("import sys; from engines import registry\n"
            "for cls in registry.methods().values(): cls.hyperparameters()\n"
            "bad = [m for m in ('torch', 'transformers', 'peft', 'gradio') if m in sys.modules]; assert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

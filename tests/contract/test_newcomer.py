"""A new method is one new file: in a copy of this program to which nothing else was added, it is in the CLI, on the page and in the contract."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = '''
"""Newcomer: scales every output of a frozen matrix."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod
from engines.method import Card, hyper, register


@register
class Newcomer(AdapterMethod):
    """One trained gain for each output."""

    card = Card(id="newcomer", name="Newcomer", family="adaptation", title="A method that was added this minute", year=2026,
                summary="Freezes every matrix and trains one gain for each of its outputs.", needs=("training data",),
                cannot=("does not make the model smaller",), trains=True)

    rank: int = hyper(1, "Unused, as every adapter of this base has one", low=1, high=1)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)
    learning_rate = 5e-2

    def count(self, matrix, size):
        return matrix.out

    def build(self, matrix, module, context, generator, mask):
        import torch

        from engines.layers.adapter import Adapter

        class Gain(Adapter):
            def __init__(self):
                super().__init__(module, mask=mask)
                self.gain = torch.nn.Parameter(torch.ones(self.out, 1))

            def effective(self):
                return self.weight.float() * self.gain
        return Gain()
'''
PAGE = """
import json, sys
from components import library, new_run
from workbench import names
from workbench.home import Home
home = Home.open()
ask = {f.__name__: f for f in (*library.server_functions(home), *new_run.server_functions(home))}
spec = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "newcomer"}], "budget": {"steps": 10}, "seed": 0}
print(json.dumps({
    "library": [m for m in ask["shelves"]({})["methods"] if m["id"] == "newcomer"],
    "boot": [m for m in ask["boot"]({})["methods"] if m["id"] == "newcomer"],
    "plan": ask["plan"]({"spec": spec})["stages"][0]["trainable"],
    "text": ask["as_text"]({"spec": spec})}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The program's own folders with one file more; assets by link."""
    there = tmp_path_factory.mktemp("program")
    for name in ("engines", "workbench", "storage", "components", "tests"):
        shutil.copytree(ROOT / name, there / name)
    for name in ("assets", "app.py", "docs", "pyproject.toml"):
        (there / name).symlink_to(ROOT / name)
    (there / "engines" / "adaptation" / "newcomer.py").write_text(FILE)
    environment = {**os.environ, "WORKBENCH_HOME": str(there / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(there)}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=there, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout
    return run


def test_it_is_on_the_command_line(copy):
    row = next(m for m in json.loads(copy("-m", "workbench", "methods", "--json")) if m["id"] == "newcomer")
    assert row["name"] == "Newcomer" and row["family"] == "adaptation"
    assert "one gain for each" in copy("-m", "workbench", "methods", "newcomer")
    assert "newcomer" in copy("-m", "workbench", "plan", "--model", "stdlib-lm", "--data", "python-docs", "--method", "newcomer", "--steps", "10")


def test_it_is_on_the_page(copy):
    found = json.loads(copy("-c", PAGE).splitlines()[-1])
    assert found["library"] == found["boot"] and found["library"][0]["title"] == "A method that was added this minute"
    assert [h["name"] for h in found["library"][0]["hyperparameters"]] == ["rank", "targets"]
    assert found["plan"] > 0 and "--method newcomer" in found["text"]["command"]


def test_it_has_its_rows_in_the_contract(copy):
    said = copy("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract/test_matrix.py", "tests/contract/test_cards.py",
                "tests/contract/test_bad_input.py", "-k", "newcomer", "-rA")
    passed = [line for line in said.splitlines() if line.startswith("PASSED")]
    for architecture in ("llama", "gpt2", "bert", "vit"):
        rows = [line for line in passed if f"[newcomer-{architecture}]" in line]
        assert len(rows) >= 10, said[-3000:]
    assert any("test_cards" in line for line in passed) and any("test_bad_input" in line for line in passed)

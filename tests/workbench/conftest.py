"""A home of its own for each test, without what the planner remembers between calls; a model and a data set made of shapes."""

import pytest

from tests.workbench import planned
from workbench import calibration, calibration_report, expected, planner
from workbench.home import Home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    for kept in (planner._HISTORY, expected._RUNS, expected._FITTED, calibration._ROWS, calibration._FITTED, calibration_report._MADE):
        kept.clear()
    return Home.open()


@pytest.fixture
def llama(tmp_path):
    return str(planned.folder(tmp_path / "llama", planned.LLAMA))


@pytest.fixture
def text(tmp_path):
    return str(planned.texts(tmp_path / "text.csv", rows=400))

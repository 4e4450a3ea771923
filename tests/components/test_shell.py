"""What the pages stand on: formats, theme, component helper, endpoints, and how the app refuses to start."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from components import formats, layout, shell, theme
from engines.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NB = formats.NB


@pytest.mark.parametrize("value, text", [(1.0674, "1.07"), (315_392, "315,392"), (0.0, "0"), (0.00002, "2e-5"), (12.0, "12.0"), (99.96, "100.0"),
                                         (1234.5, "1,235"), (None, "no figure"), (float("nan"), "no figure"), (1.5e9, "1.5e9")])
def test_figures_have_three_digits(value, text):
    assert formats.figure(value) == text


def test_units_follow_a_no_break_space():
    assert formats.size(8_570_000) == f"8.57{NB}MB" and formats.size(999) == f"999{NB}B" and formats.size(1_000_000) == f"1.00{NB}MB"
    assert formats.gigabytes(1.067e9) == f"1.07{NB}GB"
    assert formats.count(482_000) == f"482{NB}k" and formats.count(12) == "12"
    assert formats.percent(0.0481) == f"4.81{NB}%"
    assert formats.interval(1.369, 1.355, 1.383, "bits/byte") == f"1.369 ± 0.014{NB}bits/byte"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (97, "1:37"), (3599.6, "1:00:00"), (None, "no figure")])
def test_clock(seconds, text):
    assert formats.clock(seconds) == text


def test_javascript_and_python_write_the_same_figures():
    """The same number must not look different on a page and in a report."""
    import shutil
    if not shutil.which("node"):
        pytest.skip("node is not here")
    values = [1.0674, 12.0, 0.0, 0.00002, 1234.5, 8_570_000.0, 482_000.0, 999.0, 0.0481]
    script = ("globalThis.window=globalThis;globalThis.document={addEventListener(){}};globalThis.addEventListener=()=>{};"
              "globalThis.document.body=null;" + (ROOT / "assets/js/fettle.js").read_text()
              + f";const v={json.dumps(values)};console.log(JSON.stringify(v.map(x=>[fettle.fig(x),fettle.size(x),fettle.count(x),fettle.clock(x)])))")
    found = json.loads(subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout)
    assert found == [[formats.figure(v), formats.size(v), formats.count(v), formats.clock(v)] for v in values]


def test_theme_takes_its_colours_from_the_stylesheet():
    made = theme.theme()
    light, dark = theme.tokens()["accent"]
    assert made.button_primary_background_fill == light and made.button_primary_background_fill_dark == dark
    assert made.input_border_color_dark == theme.tokens()["control"][1]


SHORTHAND = {"font": ("font-", "line-height"), "border": ("border-top-", "border-left-", "border-right-", "border-bottom-", "border-width", "border-color",
             "border-style"), "background": ("background-",), "inset": ("left", "right", "top", "bottom"), "margin": ("margin-",),
             "padding": ("padding-",), "border-color": ("border-top-color", "border-left-color", "border-right-color", "border-bottom-color")}


def test_stylesheets_survive_the_browser_copy():
    """Gradio copies rules through CSSOM: a shorthand with var() followed by one of its longhands would be lost whole."""
    for path in theme.stylesheets():
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        assert not re.search(r"@(container|supports|layer)\b", text), f"{path.name}: Gradio drops this at-rule"
        for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", text):
            names = [(d.split(":", 1)[0].strip(), d) for d in body.split(";") if ":" in d]
            for i, (name, declaration) in enumerate(names):
                if name in SHORTHAND and "var(" in declaration:
                    later = [n for n, _ in names[i + 1:] if n.startswith(SHORTHAND[name])]
                    assert not later, f"{path.name} {selector.strip()}: {name} is lost because of {later}"


def test_no_address_outside_in_assets():
    for path in [*(ROOT / "assets/js").glob("*.js"), *(ROOT / "assets/css").glob("*.css"), *(ROOT / "assets/html").glob("*.html")]:
        for found in re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s'\"`]*", path.read_text()):
            assert found.startswith(("http://www.w3.org/", "//www.w3.org/")), f"{path.name}: {found}"


def test_component_refuses_a_template_that_gradio_would_evaluate():
    with pytest.raises(ValueError, match="evaluate"):
        layout.component("shell", js="", template="<div>${value}</div>")


def test_server_functions_answer_errors_as_sentences():
    def refuses(given):
        raise InputError("budget.minutes", 0, "not above zero", "Give for example 2")

    def breaks(given):
        return 1 / 0

    found = layout._guard(refuses)({})
    assert found["error"]["field"] == "budget.minutes" and "Give for example 2" in found["error"]["text"]
    assert "ZeroDivisionError" in layout._guard(breaks)({})["error"]["text"]
    assert layout._guard(lambda given: {"a": given})(1) == {"a": 1}


def test_machine_says_what_there_is_and_why_not():
    found = shell.machine()
    assert found["total"] > 0 and 0 <= found["load"] <= 1 and found["cores"] >= 1
    assert found["gpu"] or found["reason"]


def run_app(**environment):
    return subprocess.run([sys.executable, "app.py"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=180)


def refused(result) -> str:
    lines = [line for line in result.stderr.strip().splitlines() if line]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return lines[-1]


def test_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        said = refused(run_app(PORT=str(port), WORKBENCH_HOME=str(tmp_path)))
    assert f"Port {port}" in said and f"PORT={port + 1}" in said


def test_wrong_port_home_and_newer_database_are_refused(tmp_path):
    assert "PORT = abc" in refused(run_app(PORT="abc", WORKBENCH_HOME=str(tmp_path)))
    from tests.browser.conftest import free_port
    port = str(free_port())
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "WORKBENCH_HOME" in refused(run_app(PORT=port, WORKBENCH_HOME=str(blocked / "home")))
    import sqlite3
    home = tmp_path / "newer"
    home.mkdir()
    from storage import Store
    Store(home / "fettle.db")
    with sqlite3.connect(home / "fettle.db") as db:
        db.execute("PRAGMA user_version = 9999")
    assert "newer" in refused(run_app(PORT=port, WORKBENCH_HOME=str(home)))


def test_app_starts_without_torch():
    """The page must be up in seconds: nothing heavy is imported to build it."""
    code = "import sys, app; heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180).stderr.strip() == ""

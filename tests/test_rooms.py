"""The rooms keep to themselves: imports go one way, files stay small, the page needs no torch."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"components": {"components", "workbench", "storage"}, "workbench": {"workbench", "engines", "storage"},
           "engines": {"engines"}, "storage": {"storage"}}
HEAVY = {"components": {"torch", "transformers", "peft", "engines"}, "storage": {"torch", "gradio", "transformers", "peft"},
         "engines": {"gradio", "sqlite3", "sqlite_utils"}, "workbench": {"gradio"}}
LATE = {"transformers", "peft", "torchao", "datasets"}
ROOMS = set(ALLOWED) | {"app", "benchmarks"}


def files(room):
    return sorted((ROOT / room).rglob("*.py"))


@functools.cache
def tree_of(file):
    return ast.parse(file.read_text())


def imported(tree, top_only=False):
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    wrong = []
    for file in files(room):
        for name in imported(tree_of(file)):
            if name in ROOMS and name not in ALLOWED[room] or name in HEAVY[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_no_file_imports_itself_through_others():
    """Also not inside functions: two files that need one another are one file, or three."""
    at = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for room in ALLOWED for f in files(room)}

    def needs(name, file):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import):
                yield from (a.name for a in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:  # a module of the package, or a name in the module
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in at else node.module
    graph = {name: {n for n in needs(name, file) if n in at and n != name} for name, file in at.items()}
    assert sum(map(len, graph.values())) > 500, "the imports were not found"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        pytest.fail("a circle: " + " -> ".join(reversed(e.args[1])))


@pytest.mark.parametrize("room", [*ALLOWED, "benchmarks"])
def test_files_are_small(room):
    long = {str(f.relative_to(ROOT)): n for f in files(room) if (n := len(f.read_text().splitlines())) > 420}
    assert not long


def test_method_files_import_the_large_libraries_late():
    wrong = [f"{f.relative_to(ROOT)} imports {name} at the top" for f in files("engines") for name in imported(tree_of(f), top_only=True)
             if name in LATE]
    assert not wrong


def test_nothing_executes_pickles_or_remote_code():
    wrong = []
    for room in [*ALLOWED, "benchmarks"]:
        for file in files(room):
            text = file.read_text()
            for bad in ("torch.load(", "import pickle", "trust_remote_code=True", "weights_only=False"):
                if bad in text:
                    wrong.append(f"{file.relative_to(ROOT)}: {bad}")
    assert not wrong


def test_page_and_planner_need_no_torch():
    code = ("import sys\n"
            "import workbench.planner, workbench.catalog, workbench.runs, engines.registry\n"
            "assert len(engines.registry.methods()) >= 10\n"
            "heavy = [m for m in ('torch', 'transformers', 'peft', 'gradio') if m in sys.modules]\n"
            "assert not heavy, heavy\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

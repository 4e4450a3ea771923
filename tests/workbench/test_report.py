"""The report: one file that needs nothing else, says what is recorded, and cannot be broken by what people type."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from engines.errors import InputError
from storage import NotFound, StorageError, Store
from workbench import report, svg

VOID = {"meta", "line", "path", "circle", "br"}


class Home:
    def __init__(self, folder):
        self.store = Store(folder / "fettle.db")


class Checked(HTMLParser):
    """Fails on tags that are not closed in order, collects text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def made(home, name="amber-finch", shift=0.0, **fields):
    store = home.store
    spec = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "lora", "rank": 8}], "budget": {"minutes": 2, "memory_gb": 1.5},
            "seed": 0}
    run = store.create_run(spec, name=name, status="finished", forecast={
        "text": "0.4 GB of memory to spare.", "memory": {"peak_bytes": 1_000_000_000, "phases": [{"phase": "load", "seconds": 1.0, "total": 9e8}]},
        "seconds": {"total": 100.0, "phases": [{"phase": "load", "seconds": 1.0}]}, "size": {"bytes": 8_000_000}, "trainable": {"count": 315_392}})
    store.append(run, [(n, s, v, s * 0.5) for s in range(1, 101) for n, v in
                       (("loss", 3 - s / 50 + shift), ("lr", 1e-3 * (1 - s / 100)), ("tokens_per_second", math.nan if s == 50 else 3000.0))])
    store.append(run, [("loss_eval", 50, 2.5, 25.0), ("metric", 50, 1.5, 25.0)])
    store.append(run, [("mem/rss", i * 100, 8e8 + i, i / 10) for i in range(50)], clock=True)
    weights = np.full(100, 20.0, np.float32)
    nats = np.random.default_rng(0).normal(20 + shift, 1, 100).astype(np.float32)
    for kind, stage, step in (("base", -1, 0), ("result", 1, 100)):
        store.put_evaluation(run, kind, stage, step, 1.0, "bits/byte", 1.5, 1.4, 1.6, 100, nats, weights, "items", {"loss": 2.5, "seconds": 1.0})
    store.put_stage(run, 0, "lora", {"method": "lora", "rank": 8}, status="finished", seconds=75.0, reasons={"rank": "follows trainable"})
    store.event(run, "checkpoint", "Checkpoint at step 60", step=60)
    store.put_footprint(run, {"peak_bytes": 1_100_000_000, "phases": [{"phase": "load", "seconds": 1.5, "peak_bytes": 950_000_000}], "sparsity": 0.5})
    store.update_run(run, metric="bits/byte", base_value=1.9, value=1.5, value_low=1.4, value_high=1.6, n=100, size_bytes=8_000_000 + int(shift * 1e6),
                     peak_bytes=1_100_000_000, trainable=315_392, seconds=118.0, started=store.run(run)["created"], **fields)
    return run


def test_one_run_says_what_is_recorded(home, tmp_path):
    run = made(home)
    found = report.report([run], tmp_path / "deep" / "page.html", home=home)
    text = (tmp_path / "deep" / "page.html").read_text()
    assert found["runs"] == [run] and found["bytes"] == len(text.encode()) and not list(tmp_path.glob("deep/*.partial"))
    words = " ".join(Checked(text).words).replace("\u00a0", " ")
    for said in ("amber-finch", "315,392", "1.10", "1.00", "1:58", "follows trainable", "Checkpoint at step 60", "1.500", "[1.400, 1.600]", "8.00",
                 "0.4 GB of memory to spare.", "memory_gb: 1.5", "50.0"):
        assert said in words, said
    assert text.count("<svg") >= 5 and "NaN" not in text and "Infinity" not in text


def test_nothing_is_fetched(home):
    page = Checked(report.page([made(home)], home=home))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "action") or (a[2] and "://" in a[2])]
    style = re.search(r"<style>(.*?)</style>", report.page([1], home=home), re.S).group(1)
    assert "@import" not in style and "url(" not in style and "--ft-run-10" in style


def test_what_people_type_cannot_break_the_page(home):
    evil = "<script>alert('x')</script>\" onload='y'"
    run = made(home, name=evil, note=evil, tags=[evil], error={"cause": evil, "remedy": evil})
    home.store.event(run, evil, evil)
    home.store.put_stage(run, 1, evil, {evil: evil}, reasons={evil: evil})
    other = made(home, name=evil, shift=0.5)
    for ids in ([run], [run, other]):
        text = report.page(ids, home=home)
        page = Checked(text)
        assert "script" not in page.tags and "<script" not in text and not [a for a in page.attributes if a[1].startswith("on")]
        assert any(evil in w for w in page.words)


def test_several_runs_are_compared(home):
    ids = [made(home, "one"), made(home, "two", 1.0), made(home, "three", 2.0)]
    text = report.page(ids, home=home)
    words = " ".join(Checked(text).words)
    assert "one is better than two" in words and "Holm-corrected" in words and "Settings that differ" in words and "Size against quality" in text
    assert "aria-label=\"Training loss of 3 runs by step\"" in text


def test_a_run_without_anything_still_has_a_page(home):
    run = home.store.create_run({"model": "m", "data": "d", "pipeline": [], "budget": {}}, name="empty")
    failed = home.store.create_run({"model": "m", "data": {"source": "d"}}, name="failed", status="failed")
    home.store.update_run(failed, error={"cause": "Out of memory.", "remedy": "Lower the batch."})
    for ids in ([run], [run, failed]):
        text = report.page(ids, home=home)
        words = " ".join(Checked(text).words)
        assert "no figure" in words and "<h3>Curves" not in text and "<h3>Settings" in text
    assert "Lower the batch." in words


def test_refusals(home, tmp_path):
    run = made(home)
    (tmp_path / "file").write_text("")
    for call, error in ((lambda: report.page([], home=home), InputError), (lambda: report.page([99], home=home), NotFound),
                        (lambda: report.report([run], tmp_path / "file" / "x.html", home=home), InputError),
                        (lambda: report.data([run], tmp_path / "x", "xlsx", home=home), StorageError)):
        with pytest.raises(error) as e:
            call()
        assert "\n" not in str(e.value)


def test_data_is_exported(home, tmp_path):
    run = made(home)
    for format in ("json", "csv", "parquet"):
        assert {p.suffix for p in report.data([run], tmp_path / format, format, home=home)} == {"." + format}
    points = json.loads((tmp_path / "json" / "points.json").read_text())
    assert len([p for p in points if p["series"] == "loss"]) == 100


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (1.4, 1.6), (0, 123456), (1e-6, 9e-6), (5, 5), (0.999, 1.001), (-1e9, 1e9)])
def test_ticks_are_round_few_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 1 <= len(found) <= 7 and all(low - 1e-9 * abs(low) - 1e-12 <= t <= high + 1e-9 * abs(high) + 1e-12 for t in found)
    if low < high:
        assert len(found) >= 2 and len({svg.label(t, found[1] - found[0]) for t in found}) == len(found)


def test_gaps_stay_gaps_and_points_stay_inside():
    chart = svg.lines([{"x": [0, 1, 2, 3], "y": [1.0, None, 3.0, 2.0], "label": "a", "slot": 0}], name="x")
    (path,) = re.findall(r' d="([^"]+)"', chart)
    assert path.count("M") == 2 and path.count("L") == 1
    for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path):
        assert svg.LEFT <= float(x) <= svg.WIDTH - svg.RIGHT and svg.TOP <= float(y) <= svg.HEIGHT - svg.BOTTOM
    assert svg.lines([{"x": [1], "y": [None]}], name="x") == "" == svg.lines([], name="x")
    assert "<circle" in svg.lines([{"x": [1], "y": [2.0], "points": True, "low": [1.0], "high": [3.0]}], name="x", limits=[(5.0, "limit")])

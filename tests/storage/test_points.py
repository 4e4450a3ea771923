"""Points: exact round trip, cursor, rewind, spikes after downsampling."""

import math
import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import NotFound, Store, points, queries


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "fettle.db")


@pytest.fixture
def run(store):
    return store.create_run({}, name="r")


def test_values_come_back_bit_for_bit(store, run):
    values = [random.uniform(-1e9, 1e9) * 10 ** random.randint(-300, 290) for _ in range(500)] + [0.1 + 0.2, 5e-324, 1.7976931348623157e308, 0.0]
    store.append(run, [("x", i, v, i / 7) for i, v in enumerate(values)])
    assert store.points(run, "x") == {"step": list(range(504)), "value": values, "t": [i / 7 for i in range(504)]}


def test_numbers_that_are_not_finite_read_as_none(store, run):
    store.append(run, [("x", 0, 1.0, 0.0), ("x", 1, math.nan, 0.1), ("x", 2, math.inf, 0.2), ("x", 3, -math.inf, 0.3)])
    assert store.points(run, "x")["value"] == [1.0, None, None, None]
    assert store.series(run)[0]["last_value"] is None and store.series(run)[0]["count"] == 4


def test_numpy_scalars_are_taken(store, run):
    store.append(run, [("x", np.int64(3), np.float32(0.5), np.float64(1.5))])
    assert store.points(run, "x") == {"step": [3], "value": [0.5], "t": [1.5]}


def test_series_keep_count_through_replacement_and_disorder(store, run):
    store.append(run, [("a", 5, 1.0, 0.0), ("a", 6, 2.0, 0.0), ("b", 1, 1.0, 0.0)])
    store.append(run, [("a", 3, 3.0, 0.0), ("a", 6, 4.0, 0.5), ("a", 6, 5.0, 0.6)])
    a, b = store.series(run)
    assert (a["count"], a["last_step"], a["last_value"], a["last_t"]) == (3, 6, 5.0, 0.6) and b["count"] == 1
    assert store.points(run, "a", since=4)["value"] == [1.0, 5.0]
    assert store.points(run, "none") == {"step": [], "value": [], "t": []}
    store.set_unit(run, "a", "nats")
    store.set_unit(run, "c", "s")
    assert [(s["name"], s["unit"], s["count"]) for s in store.series(run)] == [("a", "nats", 3), ("b", None, 1), ("c", "s", 0)]


def test_unknown_runs_are_refused(store):
    for call in (lambda: store.append(9, [("a", 1, 1.0, 0.0)]), lambda: store.since(9, 0), lambda: store.rewind(9, 0)):
        with pytest.raises(NotFound):
            call()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), max_size=6), max_size=12), st.integers(0, 3), st.integers(1, 4))
def test_a_reader_with_any_cursor_ends_with_the_same_curves(store, batches, skip, keep):
    run, number = store.create_run({}, name="r"), iter(range(10_000))
    old, points.KEEP_TOUCHES = points.KEEP_TOUCHES, keep
    try:
        mirror, cursor = {}, 0
        for i, batch in enumerate(batches):
            store.append(run, [(name, step, float(next(number)), 0.0) for name, step in batch])
            if i % (skip + 1) == 0:
                cursor = _follow(store, run, cursor, mirror)
        cursor = _follow(store, run, cursor, mirror)
    finally:
        points.KEEP_TOUCHES = old
    whole = {name: dict(zip(p["step"], p["value"])) for name, p in store.all_points(run).items()}
    assert mirror == whole
    assert store.since(run, cursor)["series"] == {}


def _follow(store, run, cursor, mirror):
    new = store.since(run, cursor)
    for name, part in new["series"].items():
        mirror.setdefault(name, {}).update(zip(part["step"], part["value"]))
    return new["cursor"]


def test_since_sends_only_what_is_new(store, run):
    store.append(run, [("a", i, 1.0, 0.0) for i in range(100)])
    cursor = store.since(run, 0)["cursor"]
    store.append(run, [("a", 100, 1.0, 0.0), ("b", 7, 2.0, 0.0)])
    new = store.since(run, cursor)
    assert new["series"]["a"]["step"] == [100] and new["series"]["b"]["value"] == [2.0] and new["epoch"] == 0


def test_rewind_forgets_what_came_later_and_tells_readers(store, run):
    store.append(run, [("loss", i, float(i), i * 0.5) for i in range(11)])
    store.append(run, [("mem/rss", i * 100, 1.0, i * 0.1) for i in range(60)], clock=True)
    store.event(run, "checkpoint", "kept", step=6)
    store.event(run, "warning", "dropped", step=7)
    store.event(run, "person", "no step")
    store.put_layers(run, 9, {"rank": []})
    store.put_evaluation(run, "stage", 0, 6, 0.0, "accuracy", 1, 1, 1, 1, [1.0])
    store.put_evaluation(run, "stage", 0, 8, 0.0, "accuracy", 1, 1, 1, 1, [1.0])
    seen = store.since(run, 0)
    assert store.rewind(run, 6) == 1
    assert store.points(run, "loss")["step"] == list(range(7))
    rss = store.points(run, "mem/rss")["t"]
    assert max(rss) <= 3.0 and len(rss) == 31, "series by the clock are cut at the time of the last kept step"
    assert [e["text"] for e in store.events(run)] == ["kept", "no step"] and store.layers(run) is None
    assert [e["step"] for e in store.evaluations(run)] == [6]
    assert [(s["name"], s["count"], s["last_step"]) for s in store.series(run)] == [("loss", 7, 6), ("mem/rss", 31, 3000)]
    again = store.since(run, seen["cursor"], epoch=seen["epoch"])
    assert again["epoch"] == 1 and again["series"]["loss"]["step"] == list(range(7))
    store.append(run, [("loss", 7, 70.0, 3.5)])
    assert store.since(run, again["cursor"], epoch=1)["series"] == {"loss": {"step": [7], "value": [70.0], "t": [3.5]}}


@pytest.mark.parametrize("stride", [1, 3, 1000])
def test_spikes_gaps_and_ends_survive_downsampling(store, run, stride):
    rng = random.Random(stride)
    steps = sorted({i * stride + rng.randrange(stride) for i in range(5000)})
    values = [rng.random() for _ in steps]
    up, down, gap, infinite = 1234, 2718, 3000, 4001
    values[up], values[down], values[gap], values[infinite] = 50.0, -50.0, math.nan, math.inf
    store.append(run, [("x", s, v, s / 10) for s, v in zip(steps, values)])
    small = store.points(run, "x", buckets=100)
    found = dict(zip(small["step"], small["value"]))
    assert len(found) <= 2 * 100 + 3 and small["step"] == sorted(small["step"])
    assert found[steps[up]] == 50.0 and found[steps[down]] == -50.0
    assert found[steps[gap]] is None and found[steps[infinite]] is None
    assert steps[0] in found and steps[-1] in found
    assert all(v is None or values[steps.index(s)] == v for s, v in found.items())
    width = -(-(steps[-1] - steps[0] + 1) // 100)
    for k in range(100):
        inside = [v for s, v in zip(steps, values) if k <= (s - steps[0]) // width < k + 1 and math.isfinite(v)]
        kept = [v for s, v in found.items() if (s - steps[0]) // width == k and v is not None]
        assert not inside or (min(inside) in kept and (max(inside) in kept or infinite))


def test_few_points_are_not_reduced(store, run):
    store.append(run, [("x", i, float(i), 0.0) for i in range(20)])
    assert store.points(run, "x", buckets=10) == store.points(run, "x")
    assert len(store.points(run, "x", buckets=3, since=10)["step"]) < 9


def test_since_can_reduce_the_first_answer(store, run):
    store.append(run, [("x", i, float(i % 7), 0.0) for i in range(1000)])
    first = store.since(run, 0, buckets=10)
    assert len(first["series"]["x"]["step"]) <= 22
    store.append(run, [("x", i, 1.0, 0.0) for i in range(1000, 1100)])
    assert store.since(run, first["cursor"], buckets=10)["series"]["x"]["step"] == list(range(1000, 1100))


def test_reading_and_writing_are_quick(store, run):
    rows = [(f"s{k}", i, i * 0.5, i * 0.1) for i in range(5000) for k in range(20)]
    t = time.process_time()
    store.append(run, rows)
    written = time.process_time() - t
    t = time.process_time()
    store.all_points(run)
    whole = time.process_time() - t
    t = time.process_time()
    store.all_points(run, buckets=500)
    reduced = time.process_time() - t
    # Far from the figures of an idle machine (400,000 points/s; 0.04 s; 0.04 s), near enough to notice a lost index.
    assert len(rows) / written > 60_000 and whole < 0.5 and reduced < 0.5


def test_reads_use_the_primary_key(store, run):
    store.append(run, [("x", i, 1.0, 0.0) for i in range(10)])
    plan = store.connection.execute("EXPLAIN QUERY PLAN " + queries._ROWS + " WHERE series_id = 1 AND step >= 5 ORDER BY step").fetchall()
    assert len(plan) == 1 and "USING PRIMARY KEY" in plan[0][3]

"""Runs as a person handles them, without processes: queue, names, wishes, live reading, results."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from engines.errors import InputError
from storage import NotFound
from workbench import names, reaper, runs
from workbench.dispatcher import Dispatcher
from workbench.home import Home
from workbench.spec import RunSpec


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    return Home.open()


def _spec(**more) -> RunSpec:
    return RunSpec.from_dict(dict(model="m", data="d", pipeline=["lora"], budget={"steps": 10}) | more)


def _queue(home, **more) -> dict:
    spec = _spec(**more)
    return runs.record(spec, spec, {"text": "fits"}, queue=True, home=home)


def _state(home, run_id, status, **fields):
    assert home.store.transition(run_id, ("queued", "running"), status, **fields)


def test_home_is_made_and_one_that_cannot_be_written_is_refused_with_the_remedy(home, tmp_path, monkeypatch):
    assert home.path == tmp_path / "home" and home.runs_dir.is_dir() and home.store is Home.open().store
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(InputError, match="Set WORKBENCH_HOME") as refused:
            Home.open(bad)
        assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_names_are_readable_and_unique():
    taken = set()
    for _ in range(2000):
        found = names.name(taken)
        adjective, noun, number = found.split("-")
        assert found not in taken and adjective in names.ADJECTIVES and noun in names.NOUNS and number.isdigit()
        taken.add(found)
    assert len(set(names.ADJECTIVES)) == len(names.ADJECTIVES) and len(set(names.NOUNS)) == len(names.NOUNS)
    everything = {f"{a}-{n}-{i}" for a in names.ADJECTIVES for n in names.NOUNS for i in range(10, 100)}
    assert len(names.name(everything).split("-")[2]) == 3


def test_settings_are_frozen_when_the_run_is_queued(home):
    spec = dict(model="m", data="d", pipeline=[{"method": "lora"}], budget={"steps": 10})
    parsed = RunSpec.from_dict(spec)
    run_id = runs.record(parsed, parsed.setting("pipeline.0.rank", 3), {"text": "t"}, home=home)["id"]
    spec["pipeline"][0]["rank"] = 99
    row = home.store.run(run_id)
    assert row["status"] == "queued" and row["forecast"]["resolved"]["pipeline"][0]["rank"] == 3 and row["forecast"]["text"] == "t"
    assert RunSpec.from_dict(runs.clone(run_id, home=home)) == parsed
    assert row["folder"] == str(home.folder(run_id)) and row["log_path"] == str(home.log(run_id))


def test_start_goes_before_the_queue_and_resume_before_both(home):
    waiting, second = _queue(home), _queue(home)
    first = runs.record(_spec(), _spec(), {}, queue=False, home=home)
    paused = _queue(home)
    runs.pause(paused["id"], home=home)
    runs.resume(paused["id"], home=home)
    order = [home.store.claim_next("x")["id"] for _ in range(4)]
    assert order == [paused["id"], first["id"], waiting["id"], second["id"]]


def test_two_runs_never_share_a_name(home):
    assert [_queue(home, name="same")["name"] for _ in range(3)] == ["same", "same-2", "same-3"]
    other = _queue(home)
    assert runs.rename(other["id"], "same", home=home)["name"] == "same-4"
    assert runs.rename("same-4", "same-4", home=home)["name"] == "same-4"
    for bad in ("  ", "12"):
        with pytest.raises(InputError):
            runs.rename(other["id"], bad, home=home)


def test_what_cannot_be_done_is_refused_in_one_sentence(home):
    done, gone, queued = _queue(home, name="done"), _queue(home), _queue(home)
    _state(home, done["id"], "finished")
    _state(home, gone["id"], "lost")
    cases = [(runs.resume, done), (runs.stop, done), (runs.pause, done), (runs.kill, gone), (runs.stop, gone), (runs.resume, queued),
             (runs.archive, queued), (runs.delete, queued)]
    for act, row in cases:
        with pytest.raises(InputError) as refused:
            act(row["id"], home=home)
        assert row["name"] in str(refused.value) and "\n" not in str(refused.value) and refused.value.remedy
    assert "Clone" in _refused(runs.resume, "done", home).remedy
    with pytest.raises(NotFound):
        runs.stop("no-such-run", home=home)


def _refused(act, run, home) -> InputError:
    with pytest.raises(InputError) as refused:
        act(run, home=home)
    return refused.value


def test_stop_of_a_queued_run_takes_it_out_and_of_a_running_one_is_a_wish(home):
    queued, running = _queue(home), _queue(home)
    _state(home, running["id"], "running")
    assert runs.stop(queued["id"], home=home)["status"] == "stopped"
    row = runs.stop(running["id"], home=home)
    assert row["status"] == "running" and row["wish"] == "stop"


def test_notes_of_a_person(home):
    row = _queue(home)
    assert runs.tag(row["id"], ["b", " a ", "b", ""], home=home)["tags"] == ["a", "b"]
    assert runs.note(row["id"], "seen", home=home)["note"] == "seen"
    assert runs.star(row["id"], home=home)["starred"] is True
    runs.stop(row["id"], home=home)
    assert runs.archive(row["id"], home=home)["archived"] and home.store.runs() == []
    assert home.folder(row["id"]).is_dir()
    runs.delete(row["id"], home=home)
    assert not (home.runs_dir / str(row["id"])).exists() and home.store.count_runs(archived=None) == 0


def test_live_sends_each_point_event_and_line_once_and_starts_anew_after_a_rewind(home):
    run_id, store = _queue(home)["id"], home.store
    _state(home, run_id, "running")
    store.append(run_id, [("loss", s, 1.0 / s, s * 0.1) for s in range(1, 6)])
    store.event(run_id, "stage", "one", step=1)
    store.event(run_id, "stage", "two", step=5)
    store.put_layers(run_id, 1, {"rank": [[0, "q_proj", 4]]})
    home.log(run_id).write_text("first\nsecond\nthi")
    a = runs.live(run_id, home=home)
    assert a["reset"] and a["series"]["loss"]["step"] == [1, 2, 3, 4, 5] and a["log"] == "first\nsecond\n" and len(a["events"]) == 2
    assert a["layers"]["figures"] == {"rank": [[0, "q_proj", 4]]} and a["run"]["status"] == "running"
    known = dict(cursor=a["cursor"], epoch=a["epoch"], event_cursor=a["event_cursor"], log_offset=a["log_offset"],
                 layer_cursor=a["layer_cursor"], home=home)
    b = runs.live(run_id, **known)
    assert not b["reset"] and b["series"] == {} and b["events"] == [] and b["log"] == "" and b["layers"] is None
    store.append(run_id, [("loss", 6, 0.5, 0.6)])
    with open(home.log(run_id), "a") as f:
        f.write("rd\n")
    c = runs.live(run_id, **known)
    assert c["series"]["loss"]["step"] == [6] and c["log"] == "third\n"
    store.rewind(run_id, 3)
    d = runs.live(run_id, **known)
    assert d["reset"] and d["series"]["loss"]["step"] == [1, 2, 3] and [e["text"] for e in d["events"]] == ["one"]
    json.dumps(d)


def test_live_is_cheap(home):
    run_id = _queue(home)["id"]
    for name in ("loss", "lr", "grad_norm"):
        home.store.append(run_id, [(name, s, 1.0, s * 0.01) for s in range(5000)])
    first = runs.live(run_id, home=home)
    assert len(first["series"]["loss"]["step"]) <= 5000
    took = []
    for _ in range(20):
        began = time.perf_counter()
        runs.live(run_id, first["cursor"], first["epoch"], home=home)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.01  # the least: other processes only add


def test_log_tail_is_bounded_and_survives_a_new_file(home):
    run_id = _queue(home)["id"]
    home.log(run_id).write_text("".join(f"line {i}\n" for i in range(10_000)))
    text, offset = runs.tail(home, run_id)
    assert len(text) <= runs.TAIL_BYTES and text.startswith("line ") and text.endswith("line 9999\n")
    assert runs.tail(home, run_id, offset) == ("", offset)
    home.log(run_id).write_text("new\n")
    assert runs.tail(home, run_id, offset) == ("new\n", 4)


def test_results_have_the_promised_keys_for_a_run_that_never_began(home):
    found = runs.results(_queue(home)["id"], home=home)
    json.dumps(found)
    assert found["status"] == "queued" and found["evaluation"] == {"before": None, "after": None, "all": []} and found["error"] is None
    for key in ("run", "name", "seconds", "stages", "forecast", "footprint"):
        assert key in found
    for key in ("peak_bytes_by_phase", "trainable", "size_bytes", "sparsity", "bits_per_weight"):
        assert key in found["footprint"]


def test_results_put_the_first_and_the_saved_model_side_by_side(home):
    run_id = _queue(home)["id"]
    put = home.store.put_evaluation
    scores = [1.0, 2.0]
    put(run_id, "base", -1, 0, 0.1, "bits/byte", 3.0, 2.9, 3.1, 2, scores, scores, "h", {"loss": 5.0})
    put(run_id, "during", 0, 5, 0.5, "bits/byte", 2.0, 1.9, 2.1, 2, scores, scores, "h", {})
    put(run_id, "result", 1, 10, 0.9, "bits/byte", 1.5, 1.4, 1.6, 2, scores, scores, "h", {})
    found = runs.results(run_id, home=home)["evaluation"]
    assert found["before"] == {"metric": "bits/byte", "value": 3.0, "interval": [2.9, 3.1], "n": 2, "loss": 5.0}
    assert found["after"]["value"] == 1.5 and len(found["all"]) == 3


def test_bad_input_is_refused_before_anything_is_recorded(home, tmp_path):
    for spec, field in ((dict(model="no-such-model", data="python-docs", pipeline=["lora"]), "model"),
                        (dict(model="m", data="d", pipeline=["no-such-method"]), "method"),
                        (dict(model="m", data="d", pipeline=["lora"], budget={"minutes": -1}), "budget.minutes")):
        with pytest.raises(InputError) as refused:
            runs.start(spec, home=home)
        assert refused.value.field == field
    assert home.store.count_runs(archived=None) == 0


def test_exactly_one_of_two_servers_leads(home):
    a, b = Dispatcher(home, keep_warm=False).start(), Dispatcher(home, keep_warm=False).start()
    try:
        time.sleep(0.5)
        assert a.leader + b.leader == 1
    finally:
        a.stop()
        b.stop()
    assert home.store.lease("dispatcher", "next", 1.0)  # given back, not left to expire


def test_a_run_on_another_machine_is_judged_by_its_heartbeat(home):
    run_id = _queue(home)["id"]
    _state(home, run_id, "running", pid=os.getpid(), pid_started=1.0, host="elsewhere", heartbeat=time.time())
    assert reaper.sweep(home) == []
    home.store.update_run(run_id, heartbeat=time.time() - 2 * reaper.FAR)
    assert reaper.sweep(home) == [run_id]
    row = home.store.light(run_id)
    assert row["status"] == "lost" and "elsewhere" in row["message"] and "begins again" in row["message"]


def test_a_guest_in_another_process_leaves_it_alone(home, monkeypatch):
    """Where runs have no process of their own, the server's process must survive what happens to the run."""
    import signal

    from workbench import worker
    monkeypatch.setenv("WORKBENCH_PIPELINE", "tests.faults.pipelines:curve")
    before = signal.getsignal(signal.SIGTERM)
    run_id = _queue(home, budget={"steps": 400})["id"]
    threading.Timer(0.6, lambda: home.store.wish(run_id, "kill")).start()
    assert worker.execute(run_id, home=home, guest=True) == 0
    row = home.store.light(run_id)
    assert row["status"] == "stopped" and row["pid"] is None and signal.getsignal(signal.SIGTERM) == before
    found = runs.results(run_id, home=home)
    assert found["footprint"]["trainable"] == 10 and found["stages"][0]["status"] == "stopped"

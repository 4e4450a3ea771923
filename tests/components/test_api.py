"""The named endpoints, called as a gradio_client does."""

from __future__ import annotations

import pytest

from tests.browser import seeding
from tests.browser.conftest import Server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from workbench.home import Home
    server = Server(tmp_path_factory.mktemp("home"))
    home = Home.open(server.home)
    done = [seeding.Story(home, name).begin().until(20).finish("stopped", seconds=20.0) for name in ("quiet-lathe-07", "grey-ingot-08")]
    waiting = seeding.Story(home, "bright-tongs-13")
    server.start()
    yield server, home, [s.id for s in done], waiting.id
    server.stop()


@pytest.fixture(scope="module")
def client(served):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(served[0].url, verbose=False)


def test_every_endpoint_has_its_name(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/plan", "/recommend", "/start_run", "/run_status", "/stop_run", "/list_runs", "/compare_runs"} <= set(named)


def test_list_status_compare_and_stop(client, served):
    _, home, done, waiting = served
    rows = client.predict("", 10, api_name="/list_runs")
    assert [r["name"] for r in rows] == ["bright-tongs-13", "grey-ingot-08", "quiet-lathe-07"]
    assert [r["id"] for r in client.predict("stopped", 10, api_name="/list_runs")] == done[::-1]
    found = client.predict(done[0], api_name="/run_status")
    assert found["status"] == "stopped" and found["evaluation"]["before"]["value"] == 1.262
    assert client.predict(done, api_name="/compare_runs")
    assert client.predict(waiting, api_name="/stop_run")["status"] == "stopped" and home.store.light(waiting)["status"] == "stopped"


def test_bad_input_is_one_sentence(client):
    with pytest.raises(Exception, match="there is no such method") as error:
        client.predict({"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "lorra"}]}, api_name="/plan")
    assert "Traceback" not in str(error.value)
    with pytest.raises(Exception, match="There is no run 999"):
        client.predict(999, api_name="/run_status")

"""Searching the hub and keeping uploads, with a stand-in for the hub's answer."""

import json

import httpx2
import pytest

from engines.errors import InputError
from workbench import hub, uploads
from workbench.home import Home


@pytest.fixture
def answering(monkeypatch):
    """The hub's client, answering from a function of the request."""
    hub._SEEN.clear()
    asked = []

    def install(answer):
        def respond(request):
            asked.append(request)
            return answer(request)
        client = httpx2.Client(transport=httpx2.MockTransport(respond))
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: client)
        return asked
    return install


def test_search_lists_what_the_hub_has_and_asks_once(answering):
    rows = [{"id": "someone/small-lm", "pipeline_tag": "text-generation", "downloads": 12, "gated": False},
            {"id": "someone/closed", "downloads": 3, "gated": "manual"}, {"no": "id"}]
    asked = answering(lambda request: httpx2.Response(200, json=rows, request=request))
    found = hub.search("model", " small  lm ")
    assert found == [dict(id="someone/small-lm", task="text-generation", downloads=12, gated=False),
                     dict(id="someone/closed", task="", downloads=3, gated=True)]
    assert asked[0].url.path == "/api/models" and asked[0].url.params["search"] == "small lm" and asked[0].url.params["filter"] == "safetensors"
    assert hub.search("model", "small lm") == found and len(asked) == 1
    hub.search("data", "small lm")
    assert asked[1].url.path == "/api/datasets" and "filter" not in asked[1].url.params


def test_a_hub_that_cannot_be_reached_is_one_sentence(answering):
    def refuse(request):
        raise httpx2.ConnectError("no route", request=request)
    answering(refuse)
    with pytest.raises(InputError, match="the hub cannot be searched .ConnectError.. Give the exact id"):
        hub.search("model", "anything")
    answering(lambda request: httpx2.Response(500, request=request))
    with pytest.raises(InputError, match="cannot be searched"):
        hub.search("data", "anything")
    assert hub.search("model", "a") == []


def test_an_upload_is_kept_once_and_only_uploads_are(tmp_path):
    home, inbox = Home.open(tmp_path / "home"), tmp_path / "inbox"
    inbox.mkdir()
    sent = inbox / "x.csv"
    sent.write_text("text,label\na,1\n")
    kept = uploads.keep(home, str(sent), "my data (1).csv", inbox)
    assert kept.endswith("my-data-1-.csv") and open(kept).read() == sent.read_text() and str(home.path) in kept
    assert uploads.keep(home, str(sent), "my data (1).csv", inbox) == kept
    outside = tmp_path / "secret.csv"
    outside.write_text("s")
    for path in (str(outside), str(inbox / ".." / "secret.csv")):
        with pytest.raises(InputError, match="no file of this name was uploaded"):
            uploads.keep(home, path, "secret.csv", inbox)
    (inbox / "m.pkl").write_text("x")
    with pytest.raises(InputError, match="files of this kind are not read"):
        uploads.keep(home, str(inbox / "m.pkl"), "m.pkl", inbox)
    (inbox / "e.txt").write_text("")
    with pytest.raises(InputError, match="the file is empty"):
        uploads.keep(home, str(inbox / "e.txt"), "e.txt", inbox)
    assert json.loads(json.dumps(kept))

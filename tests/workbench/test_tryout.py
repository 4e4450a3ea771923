"""Try: requests, the process's own generation loop, votes."""

import json
import types

import pytest

from engines.errors import InputError
from workbench import tryout, tryout_host, votes

WORDS = ["<end>", "a", "b", "c", "d", "e", "f", "g", " ", "\n"]


class Tokenizer:
    """One token per character."""

    def __call__(self, text, **_):
        return {"input_ids": [WORDS.index(c) for c in text]}

    def decode(self, ids, **_):
        return "".join(WORDS[i] for i in ids if i)


class FakeStore:
    def __init__(self):
        self.kept = []

    def count_runs(self, **_):
        return 0

    def runs(self, **_):
        return []

    def put_vote(self, prompt, variants, winner, seed, texts, extra):
        self.kept.insert(0, {"prompt": prompt, "variants": variants, "winner": winner, "seed": seed, "texts": texts, "extra": extra})
        return len(self.kept)

    def votes(self, limit=50):
        return self.kept[:limit]


@pytest.fixture
def home(tmp_path):
    return types.SimpleNamespace(path=tmp_path, runs_dir=tmp_path / "runs", store=FakeStore())


def llama(seed=0, context=32):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=context, eos_token_id=0, bos_token_id=None, tie_word_embeddings=True)
    return types.SimpleNamespace(model=LlamaForCausalLM(config).eval(), tokenizer=Tokenizer())


def run(loaded, prompt="ab", **changes):
    settings = {"seed": 3, "temperature": 0.9, "top_p": 1.0, "new_tokens": 12} | changes
    events = list(tryout_host.tokens(loaded, prompt, **settings))
    return [e for e in events if e[0] == "token"], events[-1][1]


def test_surprise_is_the_models_own_and_the_cache_changes_nothing():
    import torch
    loaded = llama()
    made, figures = run(loaded, new_tokens=10)
    ids = [0, 1, 2] + [t[1] for t in made]                                   # the start token, the prompt, what came
    log_p = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0], -1)
    expected = [-float(log_p[i + 2, token]) for i, token in enumerate(ids[3:])]
    assert [t[3] for t in made] == pytest.approx(expected, abs=1e-4)
    assert figures["prompt_nats"] == pytest.approx(-(log_p[0, 1] + log_p[1, 2]).item() / 2, abs=1e-5)
    # two layers, keys and values, one head of 8, fp32, every position but the last drawn one
    assert figures["kv_bytes"] == 2 * 2 * 8 * 4 * (len(ids) - 1 if figures["stop"] == "length" else len(ids))


def test_a_seed_is_a_text_and_another_seed_another():
    loaded = llama()
    first, again, other = (run(loaded, seed=s)[0] for s in (1, 1, 2))
    assert [t[1] for t in first] == [t[1] for t in again] != [t[1] for t in other]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    import torch
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    drawn = {tryout_host.choose(logits, 1.0, 0.7, generator)[0] for _ in range(200)}
    assert drawn == {0, 1}
    token, nats = tryout_host.choose(logits, 0, 1.0, generator)
    assert token == 0 and nats == pytest.approx(0.6931, abs=1e-3)
    share = sum(tryout_host.choose(logits, 1.0, 1.0, generator)[0] == 0 for _ in range(2000)) / 2000
    assert share == pytest.approx(0.5, abs=0.05)


def test_stops_where_the_context_ends_and_refuses_a_prompt_that_fills_it():
    loaded = llama(context=8)
    loaded.model.config.eos_token_id = None
    made, figures = run(loaded, "abc", new_tokens=20)
    assert len(made) == 4 and figures["stop"] == "context full"
    with pytest.raises(ValueError, match="8 tokens and the context of this model 8"):
        run(loaded, "abcdefg")


def test_text_pieces_wait_for_whole_characters():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")
    decoder = tryout_host.Decoder(Bytes(), list(b"x"))
    assert [decoder.push(b) for b in "é!".encode()] == ["", "é", "!"]


def post(home, refs=("model:one", "model:two"), **changes):
    return tryout.generate(home, list(refs), changes.pop("prompt", "ab"), **changes)


@pytest.fixture
def quiet(monkeypatch):
    """No process is started; models resolve without a catalog."""
    monkeypatch.setattr(tryout, "ensure_host", lambda home: None)
    def resolve(home, ref):
        return {"ref": str(ref), "kind": "model", "name": str(ref).split(":")[-1], "text": "base", "task": "causal-lm", "slot": None,
                "source": str(ref), "model": str(ref), "size_bytes": 1}
    for module in (tryout, votes):
        monkeypatch.setattr(module, "resolve", resolve)


def test_a_request_streams_events_that_a_cursor_reads_once(home, quiet):
    models = {"model:one": llama(0), "model:two": llama(1)}
    host = tryout_host.Host(home, load=lambda source, task: models[source])
    request = post(home, new_tokens=6, temperature=0)
    assert tryout.since(home, request["id"])["state"] == "waiting"
    [path] = host.waiting()
    host.serve_one(path)
    news = tryout.since(home, request["id"])
    assert news["state"] == "done" and host.waiting() == []
    assert tryout.since(home, request["id"], news["cursor"])["events"] == []
    rows = tryout.collect(home, request["id"])
    alone, figures = run(models["model:two"], temperature=0, new_tokens=6)
    assert rows[1]["tokens"] == [t[1] for t in alone] and rows[1]["stop"] == figures["stop"]
    tied = {p.data_ptr(): p.numel() for p in models["model:one"].model.parameters()}
    assert rows[0]["weight_bytes"] == 4 * (sum(tied.values()) + 2 * 4)      # and the rotary frequencies, kept twice


def test_a_variant_that_cannot_be_loaded_does_not_stop_the_others(home, quiet):
    good = llama()

    def load(source, task):
        if source == "model:two":
            raise ValueError("no weights here. Choose another.")
        return good
    host = tryout_host.Host(home, load)
    request = post(home, new_tokens=3)
    host.serve_one(host.waiting()[0])
    rows = tryout.collect(home, request["id"])
    assert rows[1]["error"] == "no weights here. Choose another." and len(rows[0]["tokens"]) >= 1


def test_a_second_prompt_loads_nothing(home, quiet):
    loads = []

    def load(source, task):
        loads.append(source)
        return llama()
    host = tryout_host.Host(home, load)
    for _ in range(2):
        post(home, new_tokens=2)
        host.serve_one(host.waiting()[0])
    assert loads == ["model:one", "model:two"]


def test_cancel_ends_the_request(home, quiet):
    host = tryout_host.Host(home, load=lambda source, task: llama())
    request = post(home, refs=["model:one"], new_tokens=20)
    tryout.cancel(home, request["id"])
    host.serve_one(host.waiting()[0])
    assert tryout.collect(home, request["id"])[0]["stop"] == "you"


@pytest.mark.parametrize("changes, field", [({"prompt": " "}, "prompt"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
                                            ({"new_tokens": 1.5}, "new_tokens"), ({"seed": -1}, "seed"), ({"refs": ["a"] * 5}, "variants"),
                                            ({"refs": []}, "variants")])
def test_bad_input_is_refused_before_anything_starts(home, quiet, changes, field):
    with pytest.raises(InputError) as refused:
        post(home, **changes)
    assert refused.value.field == field
    assert not list((tryout.folder(home) / "requests").iterdir())


def test_a_request_id_cannot_leave_the_folder(home):
    with pytest.raises(InputError):
        tryout.since(home, "../../etc/passwd")


def test_a_process_that_died_is_reported(home, quiet):
    import os
    request = post(home)
    base = tryout.folder(home)
    (base / "requests" / f"{request['id']}.json").unlink()
    result = base / "results" / f"{request['id']}.jsonl"
    result.write_text(json.dumps({"v": 0, "s": "loading"}) + "\n")
    os.utime(result, (1, 1))
    cursor = tryout.since(home, request["id"])["cursor"]
    news = tryout.since(home, request["id"], cursor)
    assert news["state"] == "done" and "ended without saying why" in news["events"][0]["error"]


def test_votes_keep_text_and_settings_and_only_blind_ones_count(home, quiet):
    for winner, blind in ((0, True), (0, True), (None, True), (1, False)):
        votes.vote(home, prompt="ab", refs=["model:one", "model:two"], winner=winner, seed=0, texts=["x", "y"], blind=blind,
                    settings={"temperature": 0.7})
    kept = votes.votes(home)
    assert kept["total"] == 4 and kept["rows"][0]["texts"] == ["x", "y"] and kept["rows"][0]["extra"]["settings"] == {"temperature": 0.7}
    first, second = kept["preference"]
    assert (first["name"], first["wins"], first["n"]) == ("one", 2, 3) and (second["wins"], second["n"]) == (0, 3)
    assert first["low"] < 2 / 3 < first["high"] and second["low"] == pytest.approx(0) and 0.4 < second["high"] < 0.7


def test_wilson_against_the_published_formula():
    # 81 of 263, the worked example of Newcombe, "Two-sided confidence intervals for the single proportion": 0.2553 to 0.3662
    share, low, high = votes.wilson(81, 263)
    assert share == pytest.approx(0.3080, abs=1e-4) and low == pytest.approx(0.2553, abs=1e-4) and high == pytest.approx(0.3662, abs=1e-4)


def test_classification_of_an_evaluation_item_and_of_an_uploaded_image(home, quiet, monkeypatch):
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from engines.data.tokens import ImageProcessor, prepare_images
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
                       num_channels=1, num_labels=10, id2label={i: str(i) for i in range(10)})
    loaded = types.SimpleNamespace(model=ViTForImageClassification(config).eval(), tokenizer=ImageProcessor(8, 8, 1))
    monkeypatch.setattr(tryout, "resolve", lambda home, ref: {"ref": ref, "name": ref, "task": "image-classification", "source": ref})
    host = tryout_host.Host(home, load=lambda source, task: loaded)
    shown = tryout.item("digits", 5)
    raw = tryout.raw_item("digits", None, 5)
    with torch.inference_mode():
        expected = loaded.model(pixel_values=prepare_images([raw["image"]], loaded.tokenizer)).logits[0].softmax(-1)
    answers = []
    for given in ({"data": "digits", "item": 5}, {"image": tryout.keep_upload(home, shown["image"])}):
        request = tryout.classify(home, ["model:x"], **given)
        host.serve_one(host.waiting()[0])
        answers += tryout.collect(home, request["id"])
    assert answers[0]["truth"] == raw["label"] and answers[1]["truth"] is None
    for answer in answers:
        assert {name: p for name, p in answer["p"]} == pytest.approx(
            {str(i): float(expected[i]) for i in expected.argsort(descending=True)[:8].tolist()}, abs=1e-4)


@pytest.mark.parametrize("address", ["data:text/html;base64,PGI+", "data:image/png;base64,***", "data:image/png;base64,AAAA"])
def test_what_is_no_image_is_refused_and_not_kept(home, address):
    with pytest.raises(InputError):
        tryout.keep_upload(home, address)
    assert not list((tryout.folder(home) / "uploads").iterdir())

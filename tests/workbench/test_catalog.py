"""Catalog, sources and the tensor lists: what is shown before anything is loaded."""

import json
import logging
from types import SimpleNamespace

import pytest

from engines import registry, shapes
from engines.errors import InputError
from engines.profile import Tensor
from tests.workbench import planned
from workbench import catalog, sources
from workbench.spec import RunSpec


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    sources._REFUSED.clear()
    return tmp_path / "home"


# -- the catalog -------------------------------------------------------------------------------------------------------
def test_every_method_has_its_card_and_fields():
    rows = catalog.methods()
    json.dumps(rows)
    assert {r["id"] for r in rows} >= {
        "full",
        "lora",
        "adalora",
        "random",
        "magnitude",
        "wanda",
        "structured",
        "int8",
        "int4",
        "gptq",
    }
    for row in rows:
        assert row["name"] and row["title"] and row["summary"] and row["family"]
        assert row == catalog.method(row["id"])
        assert all(h["help"] and "default" in h for h in row["hyperparameters"])
    with pytest.raises(InputError, match="Did you mean lora"):
        catalog.method("lorra")


def test_bundled_data_have_counts_and_cards():
    rows = {r["id"]: r for r in catalog.data()}
    json.dumps(list(rows.values()))
    assert set(rows) == {"python-code", "python-docs", "stdlib-modules", "digits"}
    assert all(r["train"] > r["evaluation"] > 0 and r["title"] for r in rows.values())
    assert catalog.data_card("digits")["labels"] == 10
    with pytest.raises(InputError):
        catalog.data_card("mnist")


def test_bundled_models_are_listed_with_their_profile():
    rows = catalog.models()
    json.dumps(rows)
    for row in rows:
        assert "error" not in row and row["parameters"] > 0
        found = catalog.model(row["id"])
        assert (
            found["kind"] == "bundled"
            and found["bytes_by_dtype"]["int4"] < found["bytes_by_dtype"]["int8"] < found["bytes_by_dtype"]["fp32"]
        )


def test_every_preset_can_be_read():
    rows = catalog.presets()
    assert rows and rows[0]["id"] == "example" and len({r["title"] for r in rows}) == len(rows)
    for row in rows:
        assert RunSpec.from_yaml(row["yaml"]).to_dict() == row["spec"]
    example = RunSpec.from_dict(rows[0]["spec"])
    assert example.model == "stdlib-lm" and example.data.source == "python-docs"
    assert [m.card.id for m in example.pipeline] == ["wanda", "lora", "int8"] and example.budget.limits() == {
        "minutes": 2,
        "memory_gb": 2,
    }


def test_a_folder_shows_its_profile(tmp_path):
    made = planned.folder(tmp_path / "m", planned.LLAMA)
    found = catalog.model(str(made))
    count = found["parameters"]
    assert found["kind"] == "folder" and found["layers"] == 3 and found["context"] == 128 and found["kv_heads"] == 2
    assert found["bytes_by_dtype"]["fp32"] == 4 * count == found["size_bytes"] - shapes_header(made)
    assert 0.25 < found["bytes_by_dtype"]["int8"] / found["bytes_by_dtype"]["fp32"] < 0.6


def shapes_header(folder) -> int:
    import struct

    with open(folder / "model.safetensors", "rb") as f:
        return 8 + struct.unpack("<Q", f.read(8))[0]


def test_a_profile_follows_its_files(tmp_path):
    import shutil

    made = planned.folder(tmp_path / "m", planned.LLAMA)
    before = sources.profile(str(made))
    assert sources.profile(str(made)) is before, "read once"
    shutil.rmtree(made)
    planned.folder(made, dict(planned.LLAMA, num_hidden_layers=2))
    assert sources.profile(str(made)).layers == 2


# -- data --------------------------------------------------------------------------------------------------------------
def test_preview_of_a_csv(tmp_path):
    made = planned.texts(tmp_path / "t.csv", rows=60, labels=3)
    found = catalog.preview(str(made), rows=2)
    json.dumps(found)
    assert found["task"] == "text-classification" and found["columns"] == ["text", "label"] and len(found["labels"]) == 3
    assert len(found["rows"]) == 2 and found["counts"]["train"] + found["counts"]["evaluation"] == 60
    assert sum(found["lengths"]["counts"]) == found["counts"]["train"] and found["lengths"]["unit"] == "characters"
    model = str(planned.folder(tmp_path / "m", planned.LLAMA))
    tokens = catalog.preview(str(made), model=model)["lengths"]
    assert tokens["unit"] == "tokens" and tokens["longest"] == found["lengths"]["longest"], (
        "one byte is one token of this tokenizer"
    )


def test_bad_data_is_refused_with_the_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("alpha,beta\n" + "a,b\n" * 20)
    with pytest.raises(InputError, match="alpha, beta"):
        catalog.preview(str(path), text="text")
    with pytest.raises(InputError, match="alpha, beta"):
        catalog.preview(str(path))
    path.write_text("text\n")
    with pytest.raises(InputError, match="empty"):
        catalog.preview(str(path))
    with pytest.raises(InputError, match="there is no such data"):
        catalog.preview("nothing-of-this-name")


def test_a_histogram_counts_everything():
    found = catalog.histogram([1, 5, 5, 90, 2000], "tokens")
    assert sum(found["counts"]) == 5 and found["longest"] == 2000 and len(found["edges"]) == len(found["counts"]) + 1


# -- model sources -----------------------------------------------------------------------------------------------------
def test_sources_that_cannot_be_used(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no config.json"):
        sources.profile(str(empty))
    pickled = planned.folder(tmp_path / "pickled", planned.LLAMA, weights=False)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="only pickle weights"):
        sources.profile(str(pickled))
    with pytest.raises(InputError, match="there is no such model"):
        sources.profile("no-such-model")
    with pytest.raises(InputError, match="no such folder"):
        sources.profile(str(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="a file, not a folder"):
        sources.profile(str(file))


def hub(monkeypatch, config=None, tensors=None, error=None):
    """A hub that answers with ``config`` and ``tensors``, or with an error; counts its calls."""
    calls = []

    def asked(kind, answer):
        def ask(repo):
            calls.append((kind, repo))
            if error is not None:
                raise error
            return answer

        return ask

    monkeypatch.setattr(sources, "_hub_config", asked("config", config))
    monkeypatch.setattr(sources, "_hub_tensors", asked("tensors", tensors))
    monkeypatch.setattr(sources, "_hub_downloaded", lambda repo: None)
    return calls


def test_a_hub_id_needs_its_header_only_and_only_once(monkeypatch):
    config = dict(planned.BIG)
    rows = [(t.name, list(t.shape), "BF16") for t in shapes.tensors(config)]
    calls = hub(monkeypatch, config, rows)
    found = catalog.model("someone/big")
    assert found["kind"] == "hub" and found["parameters"] == 70_553_706_496 and found["dtype"] == "bfloat16"
    sources._PROFILES.clear()
    assert sources.profile("someone/big").parameters == found["parameters"]
    assert [kind for kind, _ in calls] == ["config", "tensors"], "the second time it comes from the home"


def test_a_hub_that_does_not_answer(monkeypatch):
    calls = hub(monkeypatch, error=ConnectionError("no route"))
    for _ in range(3):
        with pytest.raises(InputError, match="the hub cannot be reached") as refused:
            sources.profile("someone/gone")
    assert "local folder" in refused.value.remedy
    assert len(calls) == 1, "a dead hub is not asked at each move of a slider"


@pytest.mark.parametrize(
    "name,words",
    [
        ("RepositoryNotFoundError", "no such model"),
        ("GatedRepoError", "accepted its terms"),
        ("NotASafetensorsRepoError", "no safetensors weights"),
        ("EntryNotFoundError", "no config.json"),
    ],
)
def test_what_the_hub_says_is_told(monkeypatch, name, words):
    hub(monkeypatch, error=type(name, (Exception,), {})("..."))
    with pytest.raises(InputError, match=words):
        sources.profile(f"someone/{name.lower()}")


def test_the_hub_is_asked_through_its_own_client(monkeypatch):
    """The two functions that the other tests replace: one request for the config, headers for the tensors."""
    import huggingface_hub
    import huggingface_hub.utils as utils

    seen = {}

    class Session:
        def get(self, url, headers=None, timeout=None, **more):
            seen.update(url=url, timeout=timeout)
            return SimpleNamespace(
                json=lambda: {"model_type": "llama"}, raise_for_status=lambda: None, headers={}, status_code=200, request=None
            )

    monkeypatch.setattr(utils, "get_session", lambda: Session())
    monkeypatch.setattr(utils, "hf_raise_for_status", lambda answer: None)
    assert sources._hub_config("a/b") == {"model_type": "llama"}
    assert seen["url"].endswith("a/b/resolve/main/config.json") and seen["timeout"] <= 10
    files = {"model.safetensors": SimpleNamespace(tensors={"w": SimpleNamespace(shape=[2, 3], dtype="F32")})}
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, repo, **more: SimpleNamespace(files_metadata=files)
    )
    assert sources._hub_tensors("a/b") == [("w", [2, 3], "F32")]


# -- tensor lists ------------------------------------------------------------------------------------------------------
def _configs():
    from transformers import (
        BertConfig,
        DistilBertConfig,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
        RobertaConfig,
        ViTConfig,
    )

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    words = dict(small, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config):
        for tied in (True, False):
            yield kind(**words, num_key_value_heads=2, tie_word_embeddings=tied), "causal-lm"
        yield kind(**words, num_key_value_heads=2, num_labels=7), "text-classification"
    yield LlamaConfig(**words, attention_bias=True, mlp_bias=True), "causal-lm"
    tiny = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    yield GPT2Config(**tiny), "causal-lm"
    yield GPT2Config(**tiny, num_labels=3), "text-classification"
    for kind in (BertConfig, RobertaConfig):
        yield kind(**words, num_labels=5), "text-classification"
    yield DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100, num_labels=5), "text-classification"
    yield ViTConfig(**small, image_size=8, patch_size=2, num_channels=1, num_labels=10), "image-classification"


def test_tensor_lists_are_those_of_transformers():
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    classes = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
    }
    for config, task in _configs():
        with torch.device("meta"):
            model = classes[task].from_config(config)
        live = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert {t.name: t.shape for t in shapes.tensors(config.to_dict(), task)} == live, (config.model_type, task)


def test_an_unknown_architecture_needs_its_weights():
    with pytest.raises(InputError, match="cannot be listed"):
        shapes.tensors({"model_type": "mamba"})
    with pytest.raises(InputError, match="lacks a usable size"):
        shapes.tensors({"model_type": "llama"})


def test_file_size_is_exact(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    arrays = {
        "b.weight": np.zeros((5, 3), np.float32),
        "a": np.zeros(7, np.int8),
        "größe": np.zeros((2, 2), np.int32),
        "q": np.zeros(9, np.uint8),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert (
        shapes.file_bytes([Tensor(k, v.shape, str(v.dtype)) for k, v in arrays.items()])
        == (tmp_path / "x.safetensors").stat().st_size
    )


def test_old_names_become_those_of_the_live_model(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    made = planned.folder(tmp_path / "bert", planned.BERT, weights=False)
    rows = shapes.tensors(dict(planned.BERT), "text-classification", 2, "float32")
    body = {t.name.removeprefix("bert."): np.zeros(t.shape, np.float32) for t in rows if t.name.startswith("bert.")}
    save_file({**body, "embeddings.position_ids": np.zeros((1, 64), np.int64)}, made / "model.safetensors")
    stored = sources.profile(str(made))
    assert stored.parameters == sum(a.size for a in body.values()), "a buffer is no parameter"
    found = shapes.for_task(stored, "text-classification", 7)
    assert {t.name for t in found.tensors} == {t.name for t in rows} and found.labels == 7
    assert found.parameters == stored.parameters + 7 * 33
    assert (
        shapes.live_name("vit.encoder.layer.3.attention.attention.query.weight", "vit") == "vit.layers.3.attention.q_proj.weight"
    )
    with pytest.raises(InputError, match="does not serve"):
        shapes.for_task(stored, "causal-lm")


def test_registry_and_catalog_agree():
    assert [m["id"] for m in catalog.methods()] == list(registry.methods())

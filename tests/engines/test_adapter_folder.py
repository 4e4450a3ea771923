"""A folder with a peft adapter alone, used as a model; an adapter of another base is refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError
from engines.models import adapter
from engines.training.loop import Limit
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro
from workbench import sources


def made(tmp_path, architecture: str, method: str = "lora"):
    """(folder of the base, folder of the adapter, logits of the merged result)."""
    base = tmp_path / "base"
    model = micro.model(architecture)
    models.save(model, micro.tokenizer(architecture), base)
    profile = models.profile_of(model, str(base), micro.TASKS[architecture])
    stage, _ = registry.build({"method": method}).fit(profile, Budget())
    context = micro.context(model, architecture, folder=tmp_path / "run")
    context.profile = profile
    torch.manual_seed(0)
    model = stage.apply(model, context)
    train(model, stage, context, TrainSettings(lr=5e-2, batch=8, length=micro.LENGTH, evaluations=1, items=6), Limit(steps=4))
    model = stage.finish(model, context).eval()
    return base, tmp_path / "run" / "adapter", micro.logits(model, architecture)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_adapter_folder_is_its_base_with_the_adapter_merged(architecture, tmp_path):
    base, folder, expected = made(tmp_path, architecture)
    assert adapter.is_adapter(folder) and not adapter.is_adapter(base)
    shapes = sources.profile(str(folder))
    assert shapes.source == str(folder) and shapes.parameters == sources.profile(str(base)).parameters
    assert sources.resolve(str(folder)).kind == "adapter"
    sources.check_tokenizer(shapes)
    loaded = models.load(str(folder))
    found = micro.logits(loaded.model, architecture)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((micro.logits(models.load(str(base)).model, architecture) - expected).norm() / expected.norm()) > 1e-3
    assert not any("lora" in n for n, _ in loaded.model.named_parameters()) and not hasattr(loaded.model, "peft_config")
    assert all(p.requires_grad for p in loaded.model.parameters())
    # It may be adapted again; its own adapter would not fit the base alone, so none is written.
    again, _ = registry.build({"method": "lora"}).fit(loaded.profile, Budget())
    context = micro.context(loaded.model, architecture, folder=tmp_path / "second")
    context.profile = loaded.profile
    again.finish(again.apply(loaded.model, context), context)
    assert not (tmp_path / "second" / "adapter").exists() and any("began with another adapter" in line for line in context.reporter.lines)


def said(folder) -> str:
    """The refusal by shapes and the one by loading are the same sentence."""
    with pytest.raises(InputError) as by_shape:
        sources.profile(str(folder))
    with pytest.raises(InputError) as loading:
        models.load(str(folder))
    assert by_shape.value.field == loading.value.field == "model" and by_shape.value.remedy and loading.value.remedy
    assert "\n" not in str(by_shape.value)
    return f"{by_shape.value} {loading.value}"


def change(folder, **values) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


def test_adapter_of_another_base_is_refused_with_the_layer_and_both_sizes(tmp_path):
    _, folder, _ = made(tmp_path, "llama")
    wider = tmp_path / "wider"
    models.save(micro.model("llama", hidden_size=96), micro.tokenizer("llama"), wider)
    change(folder, base_model_name_or_path=str(wider))
    text = said(folder)
    assert text.count("belongs to another base model") == 2
    assert re.search(r"layers\.\d.* has 64 (in|out)puts there and 96 in ", text) and "base_model_name_or_path" in text
    other = tmp_path / "other"
    models.save(micro.model("gpt2"), micro.tokenizer("gpt2"), other)
    change(folder, base_model_name_or_path=str(other))
    assert "it changes model.layers.0" in said(folder)


def test_what_else_can_be_wrong_with_an_adapter_folder(tmp_path):
    _, folder, _ = made(tmp_path, "llama")
    change(folder, base_model_name_or_path=None)
    assert "does not say which model it belongs to" in said(folder)
    change(folder, base_model_name_or_path=str(folder))
    assert "names itself" in said(folder)
    change(folder, base_model_name_or_path=str(tmp_path / "gone"))
    assert "is not here" in said(folder)
    change(folder, base_model_name_or_path=str(tmp_path / "base"))
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    assert "pickle" in said(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read" in said(folder)

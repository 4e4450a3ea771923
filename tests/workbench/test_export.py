"""Exports load outside the workbench, in a process that knows only transformers and peft, with equal outputs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from engines import models
from engines.errors import InputError
from tests.contract import micro
from tests.contract.trial import stage
from workbench.export import card, export, licence

OUTSIDE = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
auto = {"llama": transformers.AutoModelForCausalLM, "gpt2": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForSequenceClassification, "vit": transformers.AutoModelForImageClassification}
out = {}
for key, folder, architecture, base, inputs in json.loads(sys.stdin.read()):
    model = auto[architecture].from_pretrained(base or folder)
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder)
    batch = {k: torch.tensor(v) for k, v in inputs.items()}
    with torch.inference_mode():
        out[key] = model.float().eval()(**batch).logits.flatten().tolist()
assert "engines" not in sys.modules
print(json.dumps(out))
"""


def outside(jobs: list, tmp_path) -> dict:
    """Logits as a process without this repository on its path computes them."""
    jobs = [(key, str(folder), a, str(base) if base else None, {k: v.tolist() for k, v in micro.inputs(a).items()}) for key, folder, a, base in jobs]
    done = subprocess.run([sys.executable, "-c", OUTSIDE], input=json.dumps(jobs), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {k: torch.tensor(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def saved(case, architecture, folder, base="the-base"):
    t = stage(case, architecture, steps=6, folder=folder)
    layout = {"pipeline": [t.method.settings()], "base": base}
    models.save(t.model, micro.tokenizer(architecture), folder / "model", dtype="float32", layout=layout)
    return t


def test_every_format_in_a_plain_process(tmp_path):
    cases = {"dense": (("full", ()), "llama", 0.0), "conv1d": (("int4", ()), "gpt2", 0.02), "int8": (("int8", ()), "llama", 0.02),
             "gptq": (("gptq", (("bits", 3), ("samples", 4))), "bert", 0.02), "images": (("int8", ()), "vit", 0.02),
             "shrunk": (("structured", (("samples", 4),)), "llama", 1e-5), "shrunk-gpt2": (("structured", (("samples", 4),)), "gpt2", 1e-5),
             "shrunk-bert": (("structured", (("samples", 4),)), "bert", 1e-5), "shrunk-vit": (("structured", (("samples", 4),)), "vit", 1e-5)}
    jobs, wanted = [], {}
    for key, (case, architecture, _) in cases.items():
        t = saved(case, architecture, tmp_path / key)
        found = export(tmp_path / key / "model", tmp_path / "out" / key, "transformers")
        assert found["format"] == "transformers" and found["bytes"] > 0 and "fettle.json" not in found["files"]
        jobs.append((key, found["folder"], architecture, None))
        wanted[key] = t.logits.flatten()
    t = saved(("lora", ()), "llama", tmp_path / "lora")
    micro.model("llama").save_pretrained(tmp_path / "base")
    found = export(tmp_path / "lora" / "model", tmp_path / "out" / "adapter", "peft")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(found["files"])
    jobs.append(("adapter", found["folder"], "llama", tmp_path / "base"))
    wanted["adapter"] = t.logits.flatten()
    got = outside(jobs, tmp_path)
    for key, want in wanted.items():
        bound = cases[key][2] if key in cases else 1e-5
        error = float((got[key] - want).norm() / want.norm())
        assert error <= bound + 1e-7, (key, error)


def test_native_export_is_the_packed_folder(tmp_path):
    t = saved(("int8", ()), "llama", tmp_path)
    found = export(tmp_path / "model", tmp_path / "out", "native")
    original = tmp_path / "model" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == original.read_bytes()
    loaded = models.load(tmp_path / "out")
    assert torch.equal(micro.logits(loaded.model, "llama"), t.logits) and loaded.info["packed"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: the-base" in text and "**int8**" in text and "check it before you pass this on" in text
    assert found["files"]["model.safetensors"] == original.stat().st_size


def test_the_licence_of_the_base_goes_along(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    (base / "LICENSE").write_text("Apache License")
    assert licence(str(base)) == "apache-2.0" and licence("owner/unknown") is None and licence(None) is None
    text = card(tmp_path, "native", {"model": str(base), "name": "brave-otter", "evaluation": {"before": {
        "metric": "bits/byte", "value": 1.25, "interval": [1.2, 1.3], "n": 9}}, "footprint": {"parameters": 1000}}, {})
    assert "license: apache-2.0" in text and "# brave-otter" in text and "1.2500 (1.2000 to 1.3000, n = 9)" in text


def test_refusals_leave_nothing_behind(tmp_path):
    saved(("int8", ()), "llama", tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("keep me")
    for format, folder, message in (("onnx", "a", "not an export format"), ("native", "full", "not empty"), ("peft", "b", "no peft adapter")):
        with pytest.raises(InputError, match=message):
            export(tmp_path / "model", tmp_path / folder, format)
    with pytest.raises(InputError, match="no saved model"):
        export(tmp_path / "full", tmp_path / "c", "native")
    assert (full / "x").read_text() == "keep me" and not list(tmp_path.glob("*.new")) and not (tmp_path / "b").exists()


def test_export_of_a_recorded_run(tmp_path):
    from workbench.home import Home
    home = Home.open(tmp_path / "home")
    run = home.store.create_run({"model": "the-base", "data": "micro", "pipeline": [{"method": "int8"}], "budget": {"minutes": 1}, "seed": 3},
                                name="calm-fox", status="finished")
    saved(("int8", ()), "llama", home.folder(run))
    found = export(run, tmp_path / "out", "native", home=home)
    assert found["run"] == run
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# calm-fox" in text and "Seed: 3" in text and "minutes 1" in text

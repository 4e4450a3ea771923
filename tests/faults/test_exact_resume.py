"""A micro Llama through the real pipeline: SIGKILL at a random moment and a pause end in the bit-identical curve and model."""

from __future__ import annotations

import hashlib
import os
import random
import signal

import pytest

from workbench import reaper, runs
from workbench.spec import RunSpec

TEXT = "The smith takes the iron from the fire and beats it on the anvil until it is flat; then it is quenched.\n"


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """Folders of a two-layer Llama with its own tokenizer, and a text file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engines.models.tokenizer import train_tokenizer
    root = tmp_path_factory.mktemp("micro")
    rng = random.Random(0)
    words = TEXT.split()
    text = "\n\n".join(" ".join(rng.choice(words) for _ in range(120)) for _ in range(60))
    (root / "text.txt").write_text(text)
    vocabulary = train_tokenizer([text], 300, root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    return root


@pytest.fixture
def start(home, micro, monkeypatch):
    monkeypatch.delenv("WORKBENCH_PIPELINE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def begin(steps: int, pipeline: list):
        spec = RunSpec.from_dict(dict(
            model=str(micro / "model"), data=str(micro / "text.txt"), pipeline=pipeline, budget={"steps": steps},
            training={"batch": 8, "length": 32, "items": 16, "checkpoint_seconds": 1.0, "precision": "fp32", "lr": 1e-3}))
        return runs.start(spec, home=home)["id"]
    return begin


def _digest(home, run_id) -> dict[str, str]:
    folder = home.model(run_id)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
def test_kill_and_pause_resume_to_the_bit_identical_curve_and_model(home, server, start, wait, curve):
    pipeline = [{"method": "lora", "rank": 4, "dropout": 0.1}]
    steps = 420
    straight = start(steps, pipeline)
    wait(straight, "finished", 90)

    run_id = start(steps, pipeline)
    row = wait(run_id, lambda r: reaper.checkpoint(home.folder(run_id)) is not None and r["phase"] == "1 lora", 60)
    reached = max(curve(run_id), default=0)
    moment = reached + random.randrange(5, 60)
    row = wait(run_id, lambda r: max(curve(run_id), default=0) >= moment or r["status"] == "finished", 60)
    assert row["status"] == "running", "the machine is too fast for this test: raise steps"
    os.killpg(row["pid"], signal.SIGKILL)
    wait(run_id, "lost", 5)
    runs.resume(run_id, home=home)
    wait(run_id, lambda r: max(curve(run_id), default=0) > moment, 60)
    runs.pause(run_id, home=home)
    if wait(run_id, ("paused", "finished"), 60)["status"] == "paused":
        runs.resume(run_id, home=home)
    wait(run_id, "finished", 90)

    for series in ("loss", "lr", "grad_norm", "metric", "tokens"):
        assert curve(run_id, series) == curve(straight, series), series
    assert sorted(curve(run_id)) == list(range(1, steps + 1))
    assert _digest(home, run_id) == _digest(home, straight) != {}
    ours, theirs = (runs.results(r, home=home)["evaluation"]["after"] for r in (run_id, straight))
    assert (ours["value"], ours["interval"]) == (theirs["value"], theirs["interval"])

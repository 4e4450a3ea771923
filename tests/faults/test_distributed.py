"""Two CPU processes (gloo) on one run: the same losses, scores and model as one, exact resume, and an end that says its cause."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo between processes is tested on POSIX systems")
CHILD = '''
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.faults.test_distributed import go
for case in json.loads(Path(sys.argv[1]).read_text()):
    go(**case)
'''
TRAINING = {"batch": 6, "length": 32, "accumulation": 1, "checkpointing": False, "items": 25, "precision": "fp32", "lr": 3e-3, "evaluations": 2,
            "loss_chunk": 64, "warmup": 0.0}


def go(spec: dict, folder: str, resume: bool = False, pause: int | None = None, die: bool = False, lack: bool = False) -> None:
    """One run in this process; rank 0 leaves what it reported in ``out.json``."""
    from engines.errors import FettleError, StopRequested
    from engines.pipeline import run_pipeline
    from engines.reporter import Recorder
    from engines.training import distributed, loop
    from workbench.spec import RunSpec

    class Asked(Recorder):
        def wants(self):
            reached = self.series.get("tokens")
            return "pause" if pause and distributed.rank() == 0 and reached and reached[-1][0] >= pause else None

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends who is left; a worker takes that for a wish to stop
    reporter, end, step, gradients = Asked(), "finished", loop.Trainer._step, loop.Trainer._gradients
    if lack and distributed.rank() == 1:
        def scarce(self, batches):
            if self.context.step == 2 and self.accumulation == 1:
                raise MemoryError("no room for these rows")
            return gradients(self, batches)
        loop.Trainer._gradients = scarce
    if die and distributed.rank() == 1:
        def broken(self):
            if self.context.step == 3:
                raise ValueError("this processor is on fire")
            step(self)
        loop.Trainer._step = broken
    try:
        run_pipeline(RunSpec.from_dict(spec), reporter=reporter, folder=Path(folder), resume=resume)
    except StopRequested as e:
        end = e.kind
    except FettleError as e:
        end = str(e)
    loop.Trainer._step, loop.Trainer._gradients = step, gradients
    if distributed.rank() == 0:
        (Path(folder) / "out.json").write_text(json.dumps(dict(
            end=end, series={k: v for k, v in reporter.series.items() if not k.startswith("time")}, events=[e[:2] for e in reporter.events],
            evaluations=[(n, s, r.metric, r.value, r.low, r.high, r.n, r.scores.tolist()) for n, s, r in reporter.evaluations])))


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """Folders of a micro Llama and a micro BERT with their tokenizer, and their data."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    from engines.models.tokenizer import train_tokenizer
    root = tmp_path_factory.mktemp("crew")
    rng = random.Random(0)
    words = "the smith takes iron from a fire and beats it on the anvil until flat then quenched".split()
    texts = [" ".join(rng.choice(words) for _ in range(rng.randrange(5, 60))) for _ in range(120)]
    (root / "text.txt").write_text("\n\n".join(texts))
    (root / "labels.csv").write_text("text,label\n" + "\n".join(f"{t},{'iron' if 'iron' in t else 'none'}" for t in texts))
    for name in ("llama", "bert"):
        vocabulary = train_tokenizer(["\n\n".join(texts)], 300, root / name)
        torch.manual_seed(0)
        if name == "llama":
            LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(root / name)
        else:
            BertForSequenceClassification(BertConfig(
                vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=2,
                max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).save_pretrained(root / name)
    (root / "child.py").write_text(CHILD)
    return root


def case(root: Path, name: str, pipeline: list, processes: int, model: str = "llama", steps: int = 8, training=(), budget=None, **more) -> dict:
    folder = root / f"{name}-{processes}"
    folder.mkdir(exist_ok=True)
    spec = {"model": str(root / model), "data": str(root / ("text.txt" if model == "llama" else "labels.csv")), "pipeline": pipeline,
            "budget": budget or {"steps": steps}, "training": TRAINING | {"processes": processes} | dict(training)}
    return dict(spec=spec, folder=str(folder), **more)


def crew(root: Path, cases: list[dict], fails: bool = False) -> str:
    """Two processes go through the cases in turn; what they wrote to stderr."""
    (root / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORKBENCH_CREW": "2", "CUDA_VISIBLE_DEVICES": "",
                                "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(root / "child.py"),
                           str(root / "cases.json")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stderr


def out(given: dict) -> dict:
    folder = Path(given["folder"])
    return json.loads((folder / "out.json").read_text()) | {"folder": folder}


def tensors(out):
    from safetensors.numpy import load_file
    return load_file(out["folder"] / "model" / "model.safetensors")


def same(one, two):
    for name in ("loss", "grad_norm", "lr", "loss_eval", "tokens"):
        a, b = one["series"][name], two["series"][name]
        assert [s for s, _ in a] == [s for s, _ in b], name
        np.testing.assert_allclose([v for _, v in a], [v for _, v in b], rtol=1e-5, err_msg=name)
    assert [e[:3] + [e[6]] for e in one["evaluations"]] == [e[:3] + [e[6]] for e in two["evaluations"]]
    for a, b in zip(one["evaluations"], two["evaluations"]):
        np.testing.assert_allclose(a[7], b[7], rtol=2e-5, atol=1e-6, err_msg=f"{a[0]}: each item's score in its place")


PIPELINES = {
    "full": dict(pipeline=[{"method": "full"}], training={"batch": 7, "accumulation": 2}),   # shares of unlike sizes
    "lora": dict(pipeline=[{"method": "magnitude", "sparsity": 0.5}, {"method": "lora", "rank": 4, "dropout": 0.0}]),
    "adalora": dict(pipeline=[{"method": "adalora", "dropout": 0.0}], steps=12),
    "classifier": dict(pipeline=[{"method": "lora", "rank": 4, "dropout": 0.0}], model="bert", training={"batch": 8}, steps=16),  # more than a pass
}


@pytest.fixture(scope="module")
def both(micro):
    """Each pipeline in two processes (all of them in one start of torchrun, which costs seconds)."""
    cases = {name: case(micro, name, processes=2, **given) for name, given in PIPELINES.items()}
    dropout = dict(pipeline=[{"method": "lora", "rank": 4, "dropout": 0.3}], steps=9, processes=2)
    cases |= {"straight": case(micro, "straight", **dropout), "first": case(micro, "halved", **dropout, pause=4),
              "second": case(micro, "halved", **dropout, resume=True)}
    cases["lack"] = case(micro, "lack", PIPELINES["full"]["pipeline"], 2, lack=True, training={"batch": 8})
    cases["minutes"] = case(micro, "minutes", ["magnitude", {"method": "lora", "rank": 4}, "int8"], 2, budget={"minutes": 0.08})
    # The last of them ends in the middle, and both processes with it.
    cases["die"] = case(micro, "die", PIPELINES["full"]["pipeline"], 2, die=True)
    assert "this processor is on fire" in crew(micro, list(cases.values()), fails=True)
    return cases


@pytest.mark.parametrize("name", PIPELINES)
def test_two_processes_compute_what_one_does(micro, both, name):
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = case(micro, name, processes=1, **PIPELINES[name])
    try:
        go(**alone)
    finally:
        torch.set_num_threads(threads)
    one, two = out(alone), out(both[name])
    same(one, two)
    for (key, a), b in zip(tensors(one).items(), tensors(two).values()):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=key)
    if name == "lora":
        assert all(((a == 0) == (b == 0)).all() for a, b in zip(tensors(one).values(), tensors(two).values()))


def test_a_paused_run_goes_on_exactly(both):
    straight, second = out(both["straight"]), out(both["second"])
    assert straight["end"] == second["end"] == "finished"
    assert second["series"]["loss"] == straight["series"]["loss"][-len(second["series"]["loss"]):] and len(second["series"]["loss"]) < 9
    assert all((a == b).all() for a, b in zip(tensors(straight).values(), tensors(second).values()))
    assert any("Resumed from step" in text for _, text in second["events"])


def test_one_process_short_of_memory_lowers_the_micro_batch_of_all(micro, both):
    alone = case(micro, "enough", PIPELINES["full"]["pipeline"], 1, training={"batch": 8})
    go(**alone)
    one, two = out(alone), out(both["lack"])
    same(one, two)
    told = [text for kind, text in two["events"] if kind == "memory"]
    assert len(told) == 1 and "micro-batch lowered from 4 to 2" in told[0]


def test_a_limit_in_minutes_is_one_clock_for_both(both):
    found = out(both["minutes"])
    rates = [v for _, v in found["series"]["lr"]]
    assert found["end"] == "finished" and len(rates) > 5 and rates[-1] < 0.05 * max(rates), "the schedule is complete"
    assert [(n, s) for n, s, *_ in found["evaluations"]][-1] in (("result", 3), ("stage", 2))


def test_the_end_of_one_process_is_said_with_its_cause(both):
    assert "process 2 of 2 ended: ValueError: this processor is on fire" in out(both["die"])["end"]


def test_more_processes_than_rows_or_than_were_started_are_refused(micro):
    from workbench.spec import RunSpec
    with pytest.raises(InputError, match="Raise training.batch to 8 or more"):
        RunSpec.from_dict(case(micro, "few", ["full"], 8)["spec"])
    given = case(micro, "alone", ["full"], 2)
    go(**given)
    assert "1 process was started for this run" in out(given)["end"]

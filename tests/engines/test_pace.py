"""What a run under minutes sets aside, the trial of a later stage on one block, and memory that runs out in an evaluation."""

import time
from types import SimpleNamespace

import pytest
import torch

from engines import registry
from engines.context import Context
from engines.errors import RunFailed
from engines.evaluation import evaluate
from engines.models import profile_of
from engines.pace import SPEED, TAIL, Ahead, evaluations, once, shares
from engines.rehearsal import one_block, rehearse
from engines.reporter import Recorder
from engines.shortage import Width, short
from tests.engines.test_training import lm, micro_trainer


def stage(trains=False, **more):
    return SimpleNamespace(card=SimpleNamespace(trains=trains), **more)


def test_what_comes_after_counts_each_stage_at_the_pace_that_it_leaves():
    ahead = Ahead(evaluation=2.0, ratio={2: 4.0}, stage={2: 3.0}, save=0.5, keep=0.1)
    pipeline = (stage(), stage(True), stage())
    # With ten minutes the packed model is scored after its stage and again as saved, with one minute once.
    assert ahead.after(pipeline, 1, 10) == pytest.approx(2 * TAIL + 0.1 + 3 + 8 + 0.5 + 8 + SPEED)
    assert ahead.after(pipeline, 1, 1) == pytest.approx(2 * TAIL + 0.1 + 3 + 0.5 + 8 + SPEED)
    assert once(8, 1) and not once(8, 10) and not once(8, None)


def test_evaluations_before_the_end_take_a_fifth_of_a_stage_at_the_most():
    assert evaluations(4, 60, 1.0) == 4 and evaluations(4, 20, 2.0) == 3 and evaluations(4, 5, 3.0) == 1 and evaluations(4, None, 9.0) == 4


def test_minutes_are_shared_by_weight():
    assert shares((stage(True), stage(), stage(True, time_share=3.0))) == {0: 0.25, 2: 0.75}
    assert shares((stage(),)) == {}


def test_dear_evaluations_are_dropped_before_the_end_and_said(tmp_path):
    from engines.training.loop import Limit
    trainer, context = micro_trainer(limit=Limit(seconds=1.0), evaluations=4)
    assert trainer.evaluations == 4
    trainer, context = micro_trainer(limit=Limit(seconds=1.0), evaluations=4)
    trainer.evaluations = evaluations(4, 1.0, 0.5)
    result = trainer.run()
    assert len(context.reporter.evaluations) == 1 and result.evaluation is not None
    assert [d["evaluations"] for k, _, d in context.reporter.events if k == "choice"] == [1]


def micro_llama(layers=3):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
                                        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)).eval()


def test_a_later_stage_is_tried_on_one_block_and_leaves_the_model_as_it_was():
    model = micro_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, block, count = one_block(model)
    assert count == 3 and len(small.model.layers) == 1 and len(model.model.layers) == 3 and block is small.model.layers[0]
    context = Context("causal-lm", lm(), None, profile_of(model, "m", "causal-lm"), Recorder())
    for name in ("int8", "gptq", "wanda"):
        found = rehearse(model, registry.get(name)(), context)
        assert found.seconds > 0 and found.ratio > 0, name
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not context.masks and not context.reporter.events


def test_the_trial_says_how_much_slower_evaluations_become(monkeypatch):
    from engines.layers.int8 import Int8Linear
    real = Int8Linear.forward

    def slow(self, x):
        time.sleep(0.01)
        return real(self, x)

    model, context = micro_llama(4), None
    context = Context("causal-lm", lm(), None, profile_of(model, "m", "causal-lm"), Recorder())
    usual = rehearse(model, registry.get("int8")(), context).ratio
    monkeypatch.setattr(Int8Linear, "forward", slow)
    assert rehearse(model, registry.get("int8")(), context).ratio > 3 * max(1.0, usual)


def test_memory_that_runs_out_is_told_from_other_errors():
    assert short(torch.OutOfMemoryError("no room")) == "no room" and short(MemoryError()) == "out of memory"
    real = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes.")
    assert "you tried to allocate 16 bytes" in short(real)
    assert not short(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not short(ValueError("out of memory"))


def test_an_evaluation_halves_its_batch_once_and_scores_every_item(monkeypatch):
    from engines import evaluation
    model, data, reporter = micro_llama(), lm(), Recorder()
    expected = evaluate(model, data)
    real, seen = evaluation._nats, []

    def scarce(model, rows, device, chunk):
        seen.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, rows, device, chunk)

    monkeypatch.setattr(evaluation, "_nats", scarce)
    width = Width(reporter, tokens=64)
    found = evaluate(model, data, width=width)
    assert found.value == pytest.approx(expected.value, rel=1e-5) and width.tokens == 32 and max(seen[1:]) == 2
    assert [(d["knob"], d["before"], d["after"]) for k, _, d in reporter.events if k == "memory"] == [("evaluation_tokens", 64, 32)]
    with pytest.raises(RunFailed, match="budget.memory_gb"):
        evaluate(model, data, width=Width(reporter, tokens=128))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, data, tokens=128)


def test_a_memory_limit_passed_in_an_evaluation_lowers_the_evaluation():
    reporter = Recorder()
    reporter.want = "memory"
    with pytest.raises(RunFailed, match="evaluation"):
        evaluate(micro_llama(), lm(), width=Width(reporter, tokens=32))
    assert [d["knob"] for k, _, d in reporter.events if k == "memory"] == ["evaluation_tokens"]


def test_the_processor_s_allocator_failing_lowers_the_micro_batch(monkeypatch):
    trainer, context = micro_trainer()
    real = trainer._gradients

    def scarce(batches):
        if len(batches) < 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return real(batches)

    monkeypatch.setattr(trainer, "_gradients", scarce)
    assert trainer.run().steps == 6 and trainer.accumulation == 2
    trainer, _ = micro_trainer()
    monkeypatch.setattr(trainer, "_gradients", lambda batches: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        trainer.run()

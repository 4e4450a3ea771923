"""The loop's parts: loss, schedule, batches, evaluation, checkpoints, and the pipeline under its limits."""

import math

import numpy as np
import pytest
import torch

from engines.data.table import Rows, Table
from engines.data.tokens import TaskData
from engines.errors import RunFailed
from engines.evaluation import interval
from engines.losses.chunked import chunked_cross_entropy
from engines.schedules.rate import rate
from engines.training import checkpoint


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=g).requires_grad_(), torch.randn(33, 16, generator=g).requires_grad_()
    labels = torch.randint(0, 33, (50,), generator=g)
    (chunked_cross_entropy(hidden, weight, labels, chunk=chunk) * 2).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (torch.nn.functional.cross_entropy(hidden @ weight.t(), labels) * 2).backward()
    torch.testing.assert_close(got[0], hidden.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], weight.grad, atol=1e-6, rtol=1e-5)


def test_schedules_complete_and_never_rise_after_the_warm_up():
    for schedule in ("cosine", "linear", "constant"):
        values = [rate(i / 1000, schedule=schedule, warmup=0.1, final=0.05) for i in range(1001)]
        assert max(values) <= 1.0 and abs(values[100] - 1.0) < 1e-9 and all(a >= b - 1e-12 for a, b in zip(values[100:], values[101:]))
        assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.05)


class Words:
    """A tokenizer of single characters; enough of the interface for ``TaskData``."""

    bos_token_id, pad_token_id, eos_token_id = 1, 0, 1

    def __call__(self, text, add_special_tokens=False):
        return dict(input_ids=[2 + (ord(c) % 60) for c in text])

    def num_special_tokens_to_add(self, pair=False):
        return 0


def lm(train=("abcdefghij" * 20, "klmnop" * 30), held=("hello world" * 9, "x"), **options):
    return TaskData(Table("t", "causal-lm", Rows(list(train)), Rows(list(held))), Words(), **{**dict(length=16), **options})


def test_packed_batches_cover_every_token_once_in_a_pass_and_depend_on_the_step_alone():
    data = lm()
    first = [data.batch(s, 4)[0] for s in range(6)]
    again = lm()
    assert all(torch.equal(first[s]["input_ids"], again.batch(s, 4)[0]["input_ids"]) for s in reversed(range(6)))
    batch = first[0]
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1]), "labels are the next tokens"
    rows = torch.cat([data.batch(s, 1)[0]["input_ids"] for s in range(data.rows)])
    assert len({tuple(r.tolist()) for r in rows}) > 1 and rows.numel() == data.rows * 16
    halves = data.batch(0, 4, accumulation=2)
    assert sorted(map(tuple, torch.cat([h["input_ids"] for h in halves]).tolist())) == sorted(map(tuple, batch["input_ids"].tolist()))


def test_evaluation_items_hold_every_byte():
    data = lm()
    assert data.items.weights.sum() == pytest.approx(sum(len(t.encode()) for t in ("hello world" * 9, "x")))
    assert all(i[0] == 1 and 2 <= len(i) <= 16 for i in data.items.ids)


def test_text_batches_are_of_like_lengths_and_see_each_example_once():
    texts = ["a" * (1 + (i * 37) % 50) for i in range(200)]
    data = TaskData(Table("t", "text-classification", Rows(texts, None, [i % 2 for i in range(200)]), Rows(texts[:5], None, [0, 1, 0, 1, 0]),
                          labels=["x", "y"]), Words(), length=64)
    seen, padded, real = [], 0, 0
    for step in range(25):
        batch = data.batch(step, 8)[0]
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        padded, real = padded + ids.numel(), real + int(mask.sum())
        seen += [int(m.sum()) for m in mask]
    assert sorted(seen) == sorted(map(len, texts)) and padded / real < 1.15


def test_interval_covers_the_mean_and_narrows_with_items():
    rng = np.random.default_rng(0)
    small, large = rng.normal(1, 1, 50).astype(np.float32), rng.normal(1, 1, 2000).astype(np.float32)
    a, b = interval(small, None), interval(large, None)
    assert a[0] < small.mean() < a[1] and b[1] - b[0] < (a[1] - a[0]) / 3
    ratio = interval(np.asarray([1.0, 3.0], np.float32), np.asarray([2.0, 6.0]))
    assert ratio == (0.5, 0.5)


def test_state_of_a_method_survives_a_checkpoint():
    tensors = {}
    state = {"a": torch.arange(3), "b": [1, 2.5, None, "x", True], "c": {"d": (torch.ones(2, dtype=torch.bool), 4)}, "e": np.arange(4)}
    back = checkpoint.unpack(checkpoint.pack(state, "state", tensors), tensors)
    assert torch.equal(back["a"], state["a"]) and back["b"] == state["b"] and back["c"]["d"][1] == 4 and (back["e"] == state["e"]).all()
    with pytest.raises(TypeError, match="cannot be saved"):
        checkpoint.pack({"f": lambda: 0}, "state", {})


def micro_trainer(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    from engines import registry
    from engines.context import Context
    from engines.reporter import Recorder
    from engines.training.loop import Limit, Trainer
    from engines.training.settings import TrainSettings
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=32))
    context = Context("causal-lm", lm(), None, None, Recorder())
    method = registry.get("full")()
    model = method.apply(model, context)
    limit = options.pop("limit", Limit(steps=6))
    return Trainer(model, method, context, TrainSettings(**{**dict(lr=1e-2, batch=4, length=16, evaluations=1), **options}), limit), context


def test_a_limit_in_seconds_ends_with_a_completed_schedule():
    from engines.training.loop import Limit
    trainer, context = micro_trainer(limit=Limit(seconds=1.5))
    result = trainer.run()
    assert result.seconds < 2.2 and context.reporter.series["lr"][-1][1] < 0.1 * 1e-2 and result.evaluation.n == len(context.data.items)


def test_accumulation_gives_the_same_step():
    one, _ = micro_trainer()
    two, _ = micro_trainer(accumulation=2)
    one.run()
    two.run()
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_loss_that_is_no_number_fails_with_the_remedy():
    trainer, _ = micro_trainer(lr=1e-2)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(RunFailed, match="learning rate"):
        trainer.run()


def test_one_out_of_memory_lowers_one_knob_and_a_second_one_fails(monkeypatch):
    trainer, context = micro_trainer()
    real, calls = trainer._gradients, []

    def scarce(batches):
        calls.append(len(batches))
        if len(batches) < 2:
            raise torch.OutOfMemoryError("no room")
        return real(batches)

    monkeypatch.setattr(trainer, "_gradients", scarce)
    result = trainer.run()
    assert result.steps == 6 and calls[0] == 1 and set(calls[1:]) == {2}
    assert [d["knob"] for k, _, d in context.reporter.events if k == "memory"] == ["accumulation"]
    trainer, _ = micro_trainer()
    monkeypatch.setattr(trainer, "_gradients", lambda batches: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(RunFailed, match="memory"):
        trainer.run()


def test_a_head_has_a_rate_of_its_own_where_it_is_given_one():
    """Same schedule, other peak; without it the groups are what they were."""
    from engines import registry
    from engines.training.loop import Limit, Trainer
    from engines.training.settings import TrainSettings
    from tests.contract import micro
    model, method = micro.model("bert"), registry.build({"method": "lora", "rank": 2})
    context = micro.context(model, "bert")
    model = method.apply(model, context)
    made = lambda **more: Trainer(model, method, context, TrainSettings(lr=1e-3, batch=8, length=16, **more), Limit(steps=2))  # noqa: E731
    heads = {id(p) for name, p in model.named_parameters() if name.rsplit("classifier", 1)[0] in ("", "base_model.model.") and p.requires_grad}
    plain, own = made(), made(head_lr=0.05)
    assert heads and {g["lr_scale"] for g in plain.groups} == {1.0}
    for group in own.groups:
        inside = {id(p) in heads for p in group["params"]}
        assert inside in ({True}, {False}) and group["lr_scale"] == (pytest.approx(50.0) if inside == {True} else 1.0)
    assert {id(p) for g in own.groups for p in g["params"]} == {id(p) for g in plain.groups for p in g["params"]}
    assert {id(p) for g in own.groups if g["lr_scale"] != 1.0 for p in g["params"]} == heads

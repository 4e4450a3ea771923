"""MoSA: disjoint experts, their mean, routes that leave the others alone, the second pass, and a result that loads again."""

import math

import pytest
import torch
from torch import nn

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.parallel import ParallelAdapter, Split
from engines.losses.consistency import chunked_symmetric_kl, symmetric_kl
from engines.models import added, profile_of
from engines.profile import Batch
from engines.training.loop import Limit
from engines.training.stage import train
from tests.contract import micro
from tests.contract.trial import settings


def method(**changes):
    return registry.build({"method": "mosa", **changes})


def started(architecture="llama", steps=4, **changes):
    """(model with adapters, method, context)."""
    model = micro.model(architecture)
    context = micro.context(model, architecture)
    context.total_steps = steps
    chosen, _ = method(**changes).fit(context.profile, Budget())
    return chosen.apply(model, context), chosen, context


def test_worked_example_of_merging():
    split = Split(torch.zeros(2, 2), 2, torch.Generator().manual_seed(0))
    split.owner = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)
    split.parts[0].data, split.parts[1].data = torch.tensor([[2.0, 4]]), torch.tensor([[6.0, 8]])
    assert torch.equal(split.expert(0), torch.tensor([[2.0, 0], [0, 4]])) and torch.equal(split.expert(1), torch.tensor([[0.0, 6], [8, 0]]))
    assert torch.equal(split.merged(), torch.tensor([[1.0, 3], [4, 2]]))
    x = torch.ones(2)
    assert torch.equal((split.expert(0) @ x + split.expert(1) @ x) / 2, split.merged() @ x)
    split.eval()
    assert torch.equal(split(), split.merged())


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_masks_are_disjoint_and_cover_the_matrix(experts):
    start = torch.randn(7, 5)
    split = Split(start, experts, torch.Generator().manual_seed(1))
    masks = torch.stack([split.mask(i) for i in range(experts)])
    assert (masks.sum(0) == 1).all() and all(abs(int(m.sum()) - 35 / experts) <= 1 for m in masks)
    assert sum(p.numel() for p in split.parameters()) == 35
    assert torch.equal(split.merged(), start) and torch.equal(split.expert(0), start)


@pytest.mark.parametrize("start", [torch.zeros(6, 4), torch.randn(6, 4)])
def test_a_step_moves_the_drawn_expert_on_its_own_entries_alone(start):
    split = Split(start, 3, torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(split.parameters(), lr=0.1, weight_decay=0.0)
    for drawn in (0, 1, 1, 2):      # others must rest in spite of their momentum
        before = [split.expert(i).detach().clone() for i in range(3)]
        split.expert(drawn).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for i in range(3):
            moved = split.expert(i) != before[i]
            assert torch.equal(moved, split.mask(i)) if i == drawn else not moved.any()


def test_adapter_is_the_formula_and_starts_at_zero():
    torch.manual_seed(0)
    adapter = ParallelAdapter(8, 3, 0.1, how="input", mlp="mlp")
    adapter.reset(torch.Generator().manual_seed(0))
    h = torch.randn(5, 8)
    assert (adapter(h) == 0).all()
    for p in adapter.parameters():
        nn.init.normal_(p)
    inner = torch.nn.functional.gelu(torch.layer_norm(h, (8,), adapter.gain, adapter.offset) @ adapter.down.t() + adapter.down_bias)
    torch.testing.assert_close(adapter(h), 0.1 * (inner @ adapter.up.t() + adapter.up_bias))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit"])
def test_it_reads_the_stream_before_the_mlp_and_adds_behind_it(architecture):
    """Block by block against the sum written out: what comes in through the norm's input goes out beside the MLP."""
    model, _, _ = started(architecture, experts=1, consistency=0.0, dropout=0.0)
    found = added.modules(model)
    path, adapter = list(found.items())[-1]
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.5)
    block, seen = model.get_submodule(path.rpartition(".")[0]), {}
    mlp = getattr(block, adapter.mlp)
    if architecture == "bert":
        mlp.register_forward_hook(lambda m, given, out: seen.update(product=given[0], given=given[1], out=out))
        block.attention.register_forward_hook(lambda m, given, out: seen.update(h=out[0]))
        micro.logits(model, architecture)
        with torch.inference_mode():
            wanted = mlp.LayerNorm(mlp.dense(seen["product"]) + seen["h"] + adapter(seen["h"]))
    else:
        norm = getattr(block, adapter.norm)
        norm.register_forward_hook(lambda m, given, out: seen.update(h=given[0], normed=out))
        block.register_forward_hook(lambda m, given, out: seen.update(out=out[0] if isinstance(out, tuple) else out))
        micro.logits(model, architecture)
        plain, hooks = seen["normed"], mlp._forward_hooks.copy()
        mlp._forward_hooks.clear()
        with torch.inference_mode():
            wanted = seen["h"] + mlp(plain) + adapter(seen["h"])
        mlp._forward_hooks.update(hooks)
    torch.testing.assert_close(seen["out"], wanted, atol=1e-5, rtol=1e-5)


def test_symmetric_kl_and_its_gradients():
    torch.manual_seed(0)
    a, b = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    p, q = a.softmax(-1), b.softmax(-1)
    kl = lambda x, y: (x * (x.log() - y.log())).sum(-1).mean()  # noqa: E731
    found = symmetric_kl(a, b)
    assert float(found.detach()) == pytest.approx(float(0.5 * (kl(q, p) + kl(p, q)).detach()), rel=1e-5)
    ours = torch.autograd.grad(found, (a, b))
    wanted = torch.autograd.grad(0.5 * (kl(q.detach(), p) + kl(p.detach(), q)), (a, b))
    torch.testing.assert_close(ours, wanted)
    x, y, weight = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True), torch.randn(5, 3)
    chunked, whole = chunked_symmetric_kl(x, y, weight, chunk=3), symmetric_kl(x @ weight.t(), y @ weight.t())
    torch.testing.assert_close(torch.autograd.grad(chunked, (x, y)), torch.autograd.grad(whole, (x, y)), atol=1e-6, rtol=1e-4)


def test_the_agreement_costs_two_products_with_the_head_and_one_of_its_gradient(monkeypatch):
    """And nothing in the backward pass, which has all of the gradient already."""
    x, y, weight, calls = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True), torch.randn(5, 3), []
    for place, name in ((torch.nn.functional, "linear"), (torch, "mm")):
        monkeypatch.setattr(place, name, lambda *a, real=getattr(place, name), **k: (calls.append(tuple(a[0].shape)), real(*a, **k))[1])
    loss = chunked_symmetric_kl(x, y, weight, chunk=4)
    made = len(calls)
    (3 * loss).backward()
    assert made == len(calls) == 6 and max(rows for rows, _ in calls) == 4
    assert torch.equal(x.grad, -y.grad) and weight.grad is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_matrices_are_held_in_half_and_come_back_as_they_were(architecture, tmp_path):
    before = {n: p.clone() for n, p in micro.model(architecture).named_parameters()}
    model = micro.model(architecture)
    context = micro.context(model, architecture, folder=tmp_path)
    context.compute, context.total_steps = "bfloat16", 2
    chosen = method(bottleneck=4)
    full = chosen.footprint(context.profile, Batch(4, 16)).weights
    model = chosen.apply(model, context)
    half = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert half == {f"{m.name}.weight" for m in context.profile.matrices}
    assert full - chosen.footprint(context.profile, Batch(4, 16, compute="bfloat16")).weights == 2 * context.profile.block_parameters
    train(model, chosen, context, settings(chosen, precision="bf16"), Limit(steps=2))
    after = dict(chosen.finish(model, context).named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("classifier")) and not list(tmp_path.glob("frozen-*"))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_second_pass_draws_other_experts_and_adds_their_disagreement(architecture):
    from engines.training.loss import task_loss
    model, chosen, context = started(architecture, dropout=0.0)
    for module in added.modules(model).values():
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)
    batch = context.data.batch(0, 4)[0]
    model.train()
    torch.manual_seed(0)
    loss = task_loss(model, batch, context.task)
    assert float(chosen.loss(model, loss, context).detach() - loss.detach()) > 1e-4
    for module in added.modules(model).values():
        module.settle()      # one adapter: both passes agree
    loss = task_loss(model, batch, context.task)
    assert float(chosen.loss(model, loss, context).detach() - loss.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "vit"])
@pytest.mark.parametrize("whole", ["down", "none"])
def test_one_pass_over_both_routes_is_two_passes(architecture, whole, monkeypatch):
    """Loss and gradients against the two passes written out, the first with expert 0 and the second with expert 1 everywhere."""
    from engines.training.loss import task_loss
    model, chosen, context = started(architecture, whole=whole, experts=2, dropout=0.0, consistency=0.7)
    for module in added.modules(model).values():
        for i, p in enumerate(module.parameters()):
            nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(i))
    batch, trained = context.data.batch(0, 4)[0], [p for p in model.parameters() if p.requires_grad]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    drawn = iter(range(10**6))
    monkeypatch.setattr(Split, "forward", lambda self: self.expert(next(drawn) % 2))
    model.train()
    loss = chosen.loss(model, task_loss(model, batch, context.task), context)
    found = torch.autograd.grad(loss, trained)
    for module in added.modules(model).values():
        module.routes = 1
    for hook in model._fettle_tape.hooks:
        hook.remove()
    logits = []
    for route in (0, 1):
        monkeypatch.setattr(Split, "forward", lambda self, route=route: self.expert(route))
        logits.append(model(**inputs).logits.flatten(0, -2))
    wanted = torch.nn.functional.cross_entropy(logits[0], batch["labels"].flatten()) + 0.7 * symmetric_kl(*logits)
    assert next(drawn) >= 2 and float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, trained), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_processes_have_the_same_gradients_and_experts_that_none_has_drawn_rest(consistency, monkeypatch):
    from engines.training import distributed
    from engines.training.loss import task_loss
    model, chosen, context = started(experts=8, consistency=consistency)
    model.train()
    monkeypatch.setattr(distributed, "current", lambda: object())
    loss = chosen.loss(model, task_loss(model, context.data.batch(0, 4)[0], context.task), context)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "or the sums over the processes would not fit together"
    loss.backward()
    chosen.after_backward(model, context)
    for module in added.modules(model).values():
        assert 1 <= sum(p.grad is not None for p in module.experts()) <= (2 if consistency else 1)
        assert module.down.grad is not None and module.gain.grad is not None


def test_checkpointed_blocks_draw_the_same_experts_again():
    losses, grads = [], []
    for checkpointing in (False, True):
        model, chosen, context = started(dropout=0.0)
        for module in added.modules(model).values():
            for i, p in enumerate(module.parameters()):
                nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(i))
        torch.manual_seed(0)
        result = train(model, chosen, context, settings(chosen, checkpointing=checkpointing), Limit(steps=3))
        assert result.steps == 3
        losses.append([v for _, v in context.reporter.series["loss"]])
        grads.append([v for _, v in context.reporter.series["grad_norm"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and grads[0] == pytest.approx(grads[1], rel=1e-4)


def test_half_precision_trains():
    model, chosen, context = started()
    context.compute = "bfloat16"
    train(model, chosen, context, settings(chosen, precision="bf16"), Limit(steps=2))
    assert all(math.isfinite(v) for _, v in context.reporter.series["loss"])


def test_a_later_stage_keeps_the_adapters_and_the_forecast_counts_them(tmp_path):
    model, chosen, context = started("gpt2")
    train(model, chosen, context, settings(chosen), Limit(steps=4))
    model = chosen.finish(model, context)
    profile = profile_of(model, "micro", "causal-lm")
    forecast = chosen.result_profile(context.profile)
    assert sorted((t.name, t.shape) for t in forecast.tensors) == sorted((t.name, t.shape) for t in profile.tensors)
    assert [m.name for m in profile.matrices] == [m.name for m in context.profile.matrices]
    packer = registry.build({"method": "int8"})
    later = micro.context(model, "gpt2")
    model = packer.finish(packer.apply(model, later), later)
    saved = models.save(model, micro.tokenizer("gpt2"), tmp_path / "m")
    assert saved["weight_bytes"] == packer.footprint(forecast, Batch()).result
    torch.testing.assert_close(micro.logits(models.load(tmp_path / "m").model, "gpt2"), micro.logits(model, "gpt2"), atol=2e-2, rtol=2e-2)


def test_saved_in_half_it_loads_in_the_type_of_its_file(tmp_path):
    model, chosen, context = started("bert")
    model = chosen.finish(model, context)
    models.save(model, micro.tokenizer("bert"), tmp_path / "m", dtype="bfloat16")
    kinds = {p.dtype for p in models.load(tmp_path / "m", dtype="stored").model.parameters()}
    assert kinds == {torch.bfloat16}


def test_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    import dataclasses
    with pytest.raises(InputError, match="where the MLP of a mamba block begins is not known"):
        method().check(dataclasses.replace(profile, architecture="mamba"))
    with pytest.raises(InputError, match="the model is 64 wide"):
        method(bottleneck=65).check(profile)
    with pytest.raises(InputError, match="carries adapters of this method already"):
        method().check(method().result_profile(profile))


def test_export_says_what_is_possible(tmp_path):
    from workbench.export import export
    model, chosen, context = started("bert")
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    model = chosen.finish(model, context)
    models.save(model, micro.tokenizer("bert"), tmp_path / "run" / "model")
    with pytest.raises(InputError, match="cannot be merged, and plain transformers has no layer .* Export with format native"):
        export(tmp_path / "run", tmp_path / "a")
    with pytest.raises(InputError, match="peft does not have. Export with format native"):
        export(tmp_path / "run", tmp_path / "b", "peft")
    export(tmp_path / "run", tmp_path / "c", "native")
    assert "added adapters" in (tmp_path / "c" / "README.md").read_text()
    assert torch.equal(micro.logits(models.load(tmp_path / "c").model, "bert"), micro.logits(model, "bert"))

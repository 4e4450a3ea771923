"""Full fine-tuning, LoRA and AdaLoRA on micro models of four architectures."""

import copy
import dataclasses
import math

import pytest
import torch

from engines import registry
from engines.adaptation import _allocator, _peft
from engines.adaptation._allocator import budget_at
from engines.budget import Budget
from engines.errors import InputError
from engines.models import matrices, profile_of
from engines.profile import Batch, Tensor
from tests.engines._micro import ARCHITECTURES, TASKS, context_of, half_masks, inputs, logits, loss_of, micro, train


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def profile(model, architecture):
    return profile_of(model, "micro", TASKS[architecture])


# -- lora --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("options", ({}, {"dora": True}, {"rslora": True, "targets": "attention"}))
def test_lora_starts_as_identity_trains_and_merges_exactly(architecture, masked, options):
    model = micro(architecture)
    masks = half_masks(model) if masked else {}
    method = registry.get("lora")(rank=4, **options)
    before, p = logits(model, inputs(architecture)), profile(model, architecture)
    method.check(p)
    context = context_of(model, architecture, masks=masks)
    model = method.apply(model, context)
    torch.testing.assert_close(logits(model, inputs(architecture)), before, rtol=1e-4, atol=1e-5)
    assert trainable(model) == method.footprint(p, Batch()).trainable
    losses = train(method, model, context, architecture, steps=8)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert {row[2] for row in method.layers(model, context)["rank"]} == {4}
    unmerged = logits(model, inputs(architecture))
    assert not torch.allclose(unmerged, before, atol=1e-2)
    model = method.finish(model, context)
    torch.testing.assert_close(logits(model, inputs(architecture)), unmerged, rtol=1e-4, atol=1e-4)
    assert method.layers(model, context) == {} and not any("lora" in n for n, _ in model.named_parameters())
    assert [m for m, _ in matrices(model)] == list(p.matrices)
    for name, mask in masks.items():
        w = dict(model.named_parameters())[name]
        assert torch.all(w[~mask] == 0) and torch.count_nonzero(w) > 0.95 * int(mask.sum())


def test_fused_forward_equals_peft_own_forward_and_gradients():
    for dropout in (0.0, 0.3):
        model = micro("gpt2")
        method = registry.get("lora")(rank=3, dropout=dropout)
        model = method.apply(model, context_of(model, "gpt2"))
        with torch.no_grad():
            for _, layer in _peft.adapted(model):
                layer.lora_B["default"].weight.normal_()
        other = copy.deepcopy(model)
        for _, layer in _peft.adapted(other):
            del layer.forward
        found = []
        for m in (model, other):
            m.train()
            torch.manual_seed(7)
            loss = loss_of(m, "gpt2")
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in m.parameters() if p.requires_grad)])
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-5)


def test_masked_gradients_equal_those_of_plain_autograd():
    from engines.layers.lowrank import low_rank_linear
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 7), (6, 7), (6,)))
    a, c = torch.randn(2, 7, generator=g, dtype=torch.float64), torch.randn(6, 2, generator=g, dtype=torch.float64)
    mask = torch.rand(6, 7, generator=g) > 0.4
    for m in (None, mask):
        leaves = [t.clone().float().requires_grad_() for t in (x, a, c)]
        y = low_rank_linear(leaves[0], (w * mask).float(), b.float(), leaves[1], leaves[2], 0.7, mask=m)
        plain = [t.clone().float().requires_grad_() for t in (x, a, c)]
        delta = 0.7 * (plain[2] @ plain[1])
        z = torch.nn.functional.linear(plain[0], (w * mask).float() + (delta if m is None else delta * m), b.float())
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        z.square().sum().backward()
        for ours, theirs in zip(leaves, plain):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", (False, True))
def test_checkpointing_gives_the_same_gradients(masked):
    found = []
    for checkpointing in (False, True):
        model = micro("llama")
        context = context_of(model, "llama", masks=half_masks(model) if masked else {})
        model = registry.get("lora")(rank=3).apply(model, context)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model.train(), "llama").backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 42
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("id", ("lora", "adalora"))
def test_bfloat16_products_leave_the_float32_base_exact(id, tmp_path):
    model = micro("llama")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = registry.get(id)(rank=2)
    context = context_of(model, "llama", compute="bfloat16", folder=tmp_path)
    model = method.apply(model, context)
    held = {layer.get_base_layer().weight.dtype for _, layer in _peft.adapted(model)}
    assert held == {torch.bfloat16} and (tmp_path / "frozen-0.safetensors").is_file()
    assert trainable(model) == method.footprint(context.profile, Batch(compute="bfloat16")).trainable
    losses = train(method, model, context, "llama", steps=4)
    assert all(map(math.isfinite, losses))
    updates = {n: scale * (b @ a).detach() for n, layer in _peft.adapted(model) for a, b, scale in [_peft.factors(layer)]}
    if id == "lora":
        model = method.finish(model, context)
        for n, delta in updates.items():
            torch.testing.assert_close(model.get_submodule(n).weight, base[f"{n}.weight"] + delta, rtol=1e-5, atol=1e-6)
    else:
        model = method.finish(model, context)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and not (tmp_path / "frozen-0.safetensors").exists()


@pytest.mark.parametrize("id", ("lora", "adalora", "full"))
def test_a_bfloat16_model_trains_and_keeps_its_type(id):
    model = micro("llama").to(torch.bfloat16)
    method = registry.get(id)(**({} if id == "full" else {"rank": 4}))
    context = context_of(model, "llama")
    model = method.apply(model, context)
    assert trainable(model) == method.footprint(context.profile, Batch(weights="bfloat16")).trainable
    losses = train(method, model, context, "llama", steps=10)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    unmerged = logits(model, inputs("llama"))
    model = method.finish(model, context)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    torch.testing.assert_close(logits(model, inputs("llama")), unmerged, rtol=0.1, atol=0.3)


def test_rank_follows_the_limit_and_says_why():
    for architecture in ARCHITECTURES:
        model = micro(architecture)
        p = profile(model, architecture)
        for id in ("lora", "adalora"):
            cls = registry.get(id)
            for limit in (0.3, 8000, 12000):
                budget = Budget(trainable=limit)
                method, why = cls(rank="auto").fit(p, budget)
                count = method.footprint(p, Batch()).trainable
                assert count <= budget.trainable_count(p.parameters) and why["rank"]
                more = method.replace(rank=method.rank + 1).footprint(p, Batch()).trainable
                assert more > budget.trainable_count(p.parameters)
                live = copy.deepcopy(model)
                assert trainable(method.apply(live, context_of(live, architecture))) == count
            with pytest.raises(InputError, match="budget.trainable"):
                cls(rank="auto").fit(p, Budget(trainable=10))
            assert cls(rank=8).fit(p, Budget(trainable=500)) == (cls(rank=8), {})      # as asked; the planner shows the limit passed


def test_bad_settings_are_refused():
    p = profile(micro("llama"), "llama")
    lora, adalora = registry.get("lora"), registry.get("adalora")
    with pytest.raises(InputError, match="rank"):
        lora(rank=64).check(p)
    with pytest.raises(InputError, match="c_attn"):
        lora(targets="c_attn").check(p)
    with pytest.raises(InputError, match="init_rank"):
        adalora(rank=8, init_rank=4).check(p)
    with pytest.raises(InputError, match="tfinal"):
        adalora(tinit=0.6, tfinal=0.6).check(p)
    packed = dataclasses.replace(p, matrices=(), tensors=(Tensor("model.layers.0.self_attn.q_proj.qweight", (4, 4), "int8"),))
    for cls in (lora, adalora, registry.get("full")):
        with pytest.raises(InputError, match="packed into integers"):
            cls().check(packed)
    with pytest.raises(InputError, match="use lora"):
        registry.get("full")().fit(p, Budget(trainable=0.01))
    assert {m.role for m in _peft.targeted(p, "q_proj, v_proj")} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("id", ("lora", "adalora"))
@pytest.mark.parametrize("architecture", ("llama", "bert", "gpt2"))
def test_saved_adapter_loads_in_plain_peft(id, architecture, tmp_path):
    from peft import PeftModel
    model = micro(architecture)
    base = copy.deepcopy(model)
    method = registry.get(id)(rank=2)
    context = context_of(model, architecture, folder=tmp_path)
    model = method.apply(model, context)
    train(method, model, context, architecture)
    model = method.finish(model, context)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, inputs(architecture)), logits(model, inputs(architecture)), rtol=1e-4, atol=1e-4)


def test_masked_model_gets_no_adapter_file(tmp_path):
    model = micro("llama")
    context = context_of(model, "llama", masks=half_masks(model), folder=tmp_path)
    method = registry.get("lora")(rank=2)
    model = method.finish(method.apply(model, context), context)
    assert not (tmp_path / "adapter").exists()


# -- adalora -----------------------------------------------------------------------------------------------------
def test_budget_schedule_matches_the_known_values():
    at = [budget_at(s, 110, 10, 20, 8, 4) for s in (10, 11, 20, 30, 50, 90, 91, 109)]
    assert at == [8, 7, 6, 5, 4, 4, 4, 4]


def test_averages_and_score_match_the_known_values():
    model = micro("llama")
    method = registry.get("adalora")(rank=1, init_rank=2)
    model = method.apply(model, context_of(model, "llama"))
    state = {}
    for sensitivity in (0.2, 0.1):
        for _, parts in _allocator.triplets(model):
            for p in parts.values():
                p.data.fill_(1.0)
                p.grad = torch.full_like(p, sensitivity)
        _allocator.observe(model, state, 0.85, 0.85)
    for key in state["mean"]:
        torch.testing.assert_close(state["mean"][key].flatten()[0], torch.tensor(0.0405))
        torch.testing.assert_close(state["spread"][key].flatten()[0], torch.tensor(0.0306))
    assert torch.allclose(_allocator.scores(model, state)[0], torch.tensor(3 * 0.0012393), rtol=1e-4)


def test_orthogonality_is_not_squared_unless_asked(monkeypatch):
    part = dict(lora_A=torch.tensor([[1.0, 0.0], [0.0, 2.0]]), lora_B=torch.eye(2), lora_E=torch.ones(2, 1))
    monkeypatch.setattr(_allocator, "triplets", lambda model: [("x", part)])
    assert float(_allocator.orthogonality(None, False)) == pytest.approx(1.5)      # mean of 3 and 0
    assert float(_allocator.orthogonality(None, True)) == pytest.approx(9.0)


def test_the_orthogonality_term_is_the_released_code_s_and_leaves_the_loss_its_say():
    model = micro("llama")
    method = registry.get("adalora")(rank=4)
    model = method.apply(model, context_of(model, "llama"))
    factors = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    norms = [torch.linalg.matrix_norm((p @ p.t() if "lora_A" in n else p.t() @ p) - torch.eye(6)) for n, p in factors.items()]
    added = method.loss(model, torch.zeros(()), None)
    torch.testing.assert_close(added, 0.1 * sum(norms) / len(norms))
    added.backward()
    steep = torch.stack([p.grad.norm() for p in factors.values()]).norm()
    assert steep < 0.05, "as a sum of squares it is a hundred times as steep and drowns the gradients of the task"


def test_adalora_equals_peft_allocator_step_by_step():
    from peft.tuners.adalora.layer import RankAllocator
    model = micro("llama")
    method = registry.get("adalora")(rank=2, init_rank=4, tinit=0.1, tfinal=0.2, delta_t=2)
    context = context_of(model, "llama")
    context.total_steps = 40
    model = method.apply(model, context)
    other = copy.deepcopy(model)
    config = next(iter(other.peft_config.values()))
    allocator = RankAllocator(other, config, "default")
    assert (config.total_step, config.tinit, config.tfinal) == (40, 4, 8)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=5e-3) for m in (model, other)]
    count = len(_allocator.triplets(model))
    pattern = None
    for step in range(40):
        for m, optimizer in zip((model, other), optimizers):
            optimizer.zero_grad()
            loss_of(m, "llama").backward()
            optimizer.step()
        context.progress, context.step = step / 40, step + 1
        method.after_step(model, context)
        if step <= 40 - 8:
            budget, found = allocator.update_and_allocate(other, step, force_mask=step == 32)
            pattern = found or pattern
        else:
            allocator.mask_using_rank_pattern(other, pattern)
        ours, theirs = (torch.cat([parts["lora_E"].flatten() for _, parts in _allocator.triplets(m)]) for m in (model, other))
        torch.testing.assert_close(ours, theirs)
        if step > 4 and step % 2 == 0 and step <= 32:
            assert int(torch.count_nonzero(ours)) == budget_at(step, 40, 4, 8, 4 * count, 2 * count) == budget
    assert sum(row[2] for row in method.layers(model, context)["rank"]) == 2 * count == int(torch.count_nonzero(ours))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("masked", (False, True))
def test_adalora_reaches_its_rank_and_merges_exactly(architecture, masked):
    model = micro(architecture)
    masks = half_masks(model) if masked else {}
    method = registry.get("adalora")(rank=2, init_rank=3, delta_t=1, tinit=0.2, tfinal=0.3)
    before, p = logits(model, inputs(architecture)), profile(model, architecture)
    context = context_of(model, architecture, masks=masks)
    model = method.apply(model, context)
    torch.testing.assert_close(logits(model, inputs(architecture)), before, rtol=1e-4, atol=1e-5)
    assert trainable(model) == method.footprint(p, Batch()).trainable
    assert {row[2] for row in method.layers(model, context)["rank"]} == {3}
    losses = train(method, model, context, architecture, steps=12)
    assert losses[-1] < losses[0]
    alive = sum(int(torch.count_nonzero(parts["lora_E"])) for _, parts in _allocator.triplets(model))
    assert alive == 2 * len(p.matrices) == sum(row[2] for row in method.layers(model, context)["rank"])
    name, layer = _peft.adapted(model)[0]
    a, b, scale = _peft.factors(layer)
    e, q = layer.lora_E["default"], layer.lora_A["default"]
    torch.testing.assert_close(scale * (b @ a), b @ torch.diag(e.flatten()) @ q * (16.0 / (3 + 1e-5)))
    unmerged = logits(model, inputs(architecture))
    model = method.finish(model, context)
    torch.testing.assert_close(logits(model, inputs(architecture)), unmerged, rtol=1e-4, atol=1e-4)
    for name, mask in masks.items():
        assert torch.all(dict(model.named_parameters())[name][~mask] == 0)


@pytest.mark.parametrize("steps", (0, 1, 5))
def test_adalora_stopped_early_still_ends_at_its_rank(steps):
    model = micro("llama")
    method = registry.get("adalora")(rank=2, init_rank=4)
    context = context_of(model, "llama")
    model = method.apply(model, context)
    train(method, model, context, "llama", steps=steps, total=1000)
    seen = {}
    merge, _peft.merge = _peft.merge, lambda m: seen.setdefault("alive", sum(int(v.sum()) for v in context.state["alive"].values())) and m
    try:
        method.finish(model, context)
    finally:
        _peft.merge = merge
    assert seen["alive"] == 2 * len(context.profile.matrices)


def test_adalora_of_constant_rank_never_zeroes():
    model = micro("llama")
    method = registry.get("adalora")(rank=3, init_rank=3, delta_t=1)
    context = context_of(model, "llama")
    model = method.apply(model, context)
    train(method, model, context, "llama", steps=8)
    assert all(torch.count_nonzero(parts["lora_E"]) == 3 for _, parts in _allocator.triplets(model))


def test_orthogonality_term_acts():
    found = {}
    for weight in (0.0, 5.0):
        model = micro("llama")
        method = registry.get("adalora")(rank=4, orthogonality=weight)
        context = context_of(model, "llama")
        model = method.apply(model, context)
        train(method, model, context, "llama", steps=10)
        found[weight] = float(_allocator.orthogonality(model, False))
    assert found[5.0] < 0.9 * found[0.0]


# -- full --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_counts_trains_and_keeps_masks(architecture):
    model = micro(architecture)
    masks = half_masks(model)
    p = profile(model, architecture)
    for options in ({}, {"freeze_embeddings": True}):
        method, live = registry.get("full")(**options), copy.deepcopy(model)
        context = context_of(live, architecture, masks=dict(masks))
        live = method.apply(live, context)
        assert trainable(live) == method.footprint(p, Batch()).trainable
        losses = train(method, live, context, architecture)
        assert losses[-1] < losses[0]
        live = method.finish(live, context)
        params = dict(live.named_parameters())
        assert all(torch.all(params[n][~m] == 0) for n, m in masks.items())
    assert registry.get("full")(freeze_embeddings=True).footprint(p, Batch()).trainable < p.parameters


def test_full_without_keep_mask_grows_back_and_from_scratch_forgets():
    model = micro("llama")
    masks = half_masks(model)
    context = context_of(model, "llama", masks=masks)
    method = registry.get("full")(keep_mask=False)
    model = method.apply(model, context)
    train(method, model, context, "llama", steps=2)
    assert not context.masks and all(int(torch.count_nonzero(x.weight)) > 0.9 * x.weight.numel() for _, x in matrices(model))
    old = {n: q.detach().clone() for n, q in model.named_parameters()}
    fresh = [registry.get("full")(from_scratch=True).apply(copy.deepcopy(model), context_of(model, "llama")) for _ in range(2)]
    for n, q in fresh[0].named_parameters():
        assert torch.equal(q, dict(fresh[1].named_parameters())[n])
        if q.dim() > 1:
            assert not torch.allclose(q, old[n])

"""Random, magnitude, Wanda and structured pruning on micro models of four architectures."""

import copy
import dataclasses
import math

import pytest
import torch

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError
from engines.models import matrices, profile_of, weight
from engines.models.folder import read_folder
from engines.profile import Batch
from engines.pruning import _masks, _shrink
from engines.pruning._blocks import BlockWalk, InputNorms
from tests.engines._micro import ARCHITECTURES, TASKS, context_of, half_masks, inputs, logits, micro, train

BATCH = Batch(rows=2, length=16)


def profile(model, architecture):
    return profile_of(model, "micro", TASKS[architecture])


def zeros(model) -> int:
    return sum(int((module.weight == 0).sum()) for _, module in matrices(model))


def size(model) -> int:
    return sum(module.weight.numel() for _, module in matrices(model))


def check_masks(model, masks) -> None:
    params = dict(model.named_parameters())
    assert set(masks) == {f"{m.name}.weight" for m, _ in matrices(model)}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == params[name].shape and torch.all(params[name][~mask] == 0)


# -- ratios, schedule, selection ---------------------------------------------------------------------------------
def test_erk_matches_the_known_values():
    shapes = [(10, 10), (100, 20)]
    assert _masks.erk_densities(shapes, 0.2) == pytest.approx([0.6, 0.18], abs=1e-12)
    assert _masks.erk_densities(shapes, 0.4) == pytest.approx([1.0, 0.37], abs=1e-12)
    assert _masks.zero_counts(shapes, 0.6, "erk") == [0, 1260]
    for density in (0.05, 0.3, 0.77, 1.0):
        mixed = [(7, 9), (64, 64), (256, 64), (64, 256), (3, 500)]
        got = _masks.erk_densities(mixed, density)
        assert sum(d * o * i for d, (o, i) in zip(got, mixed)) == pytest.approx(density * sum(o * i for o, i in mixed), rel=1e-12)
        assert all(0 <= d <= 1 for d in got)


def test_cubic_schedule_values():
    at = [_masks.cubic(t, 0.2, 0.6, 0.8) for t in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)]
    assert at == pytest.approx([0.0, 0.0, 0.8 * (1 - 0.75**3), 0.7, 0.8, 0.8])


def test_selection_is_exact_with_ties_and_across_matrices():
    g = torch.Generator().manual_seed(0)
    tied = torch.randint(0, 4, (9, 11), generator=g).float()
    for count in (0, 1, 30, 50, 98, 99):
        chosen = _masks.smallest(tied, count)
        assert int(chosen.sum()) == count
        if 0 < count < 99:
            assert tied[chosen].max() <= tied[~chosen].min()
    many = {str(i): torch.rand(5 + i, 8, generator=g) for i in range(4)}
    many["1"][0] = 0.0
    many["2"][:2] = 0.25
    total = sum(v.numel() for v in many.values())
    for count in (0, 3, 8, 12, 40, 100, total):
        chosen = _masks.smallest_of_all(many.__getitem__, list(many), count)
        assert sum(int(c.sum()) for c in chosen.values()) == count
        picked = torch.cat([many[n][c] for n, c in chosen.items()])
        rest = torch.cat([many[n][~c] for n, c in chosen.items()])
        assert not len(picked) or not len(rest) or picked.max() <= rest.min()


# -- random and magnitude -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("id", ("random", "magnitude"))
@pytest.mark.parametrize("distribution", ("uniform", "global", "erk"))
def test_claimed_sparsity_equals_the_counted_one(architecture, id, distribution):
    model = micro(architecture)
    p = profile(model, architecture)
    for sparsity in (0.37, 0.8):
        live = copy.deepcopy(model)
        context = context_of(live, architecture)
        method = registry.get(id)(sparsity=sparsity, distribution=distribution)
        method.check(p)
        live = method.finish(method.apply(live, context), context)
        assert zeros(live) / size(live) == method.footprint(p, BATCH).sparsity == pytest.approx(sparsity, abs=2e-3)
        check_masks(live, context.masks)
        found = {(a, b): v for a, b, v in method.layers(live, context)["sparsity"]}
        assert found == {(m.layer, m.role): int((x.weight == 0).sum()) / x.weight.numel() for m, x in matrices(live)}
        if distribution == "uniform":
            assert max(abs(v - sparsity) for v in found.values()) < 2e-3
        elif distribution == "erk":
            assert len(set(found.values())) > 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_magnitude_takes_the_smallest(dtype):
    model = micro("gpt2").to(dtype)
    old = {m.name: weight(x).detach().abs().clone() for m, x in matrices(model)}
    context = context_of(model, "gpt2")
    model = registry.get("magnitude")(sparsity=0.5, distribution="global").apply(model, context)
    kept = torch.cat([old[m.name][weight(x) != 0] for m, x in matrices(model)])
    gone = torch.cat([old[m.name][weight(x) == 0] for m, x in matrices(model)])
    assert gone.max() <= kept.min() and all(x.weight.dtype == dtype for _, x in matrices(model))


@pytest.mark.parametrize("id", ("magnitude", "wanda"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ("2:4", "4:8"))
def test_patterns_hold_along_the_inputs(id, architecture, pattern):
    model = micro(architecture)
    width = int(pattern[-1])
    method = registry.get(id)(pattern=pattern, **({"samples": 4} if id == "wanda" else {}))
    context = context_of(model, architecture)
    old = {m.name: weight(x).detach().abs().clone() for m, x in matrices(model)}
    model = method.apply(model, context)
    for m, x in matrices(model):
        w = weight(x).detach()
        groups = (w != 0).reshape(m.out, m.inp // width, width).sum(dim=2)
        assert torch.all(groups == width // 2)
        if id == "magnitude":
            a, alive = (t.reshape(m.out, -1, width) for t in (old[m.name], w != 0))
            assert torch.all(a.masked_fill(alive, 0).amax(-1) <= a.masked_fill(~alive, 9e9).amin(-1))
    assert method.footprint(context.profile, BATCH).sparsity == zeros(model) / size(model) == 0.5


def test_impossible_patterns_and_schedules_are_refused():
    p = profile(micro("llama", intermediate_size=50), "llama")
    magnitude, wanda = registry.get("magnitude"), registry.get("wanda")
    for cls in (magnitude, wanda):
        with pytest.raises(InputError, match="not a multiple of 4"):
            cls(pattern="2:4").check(p)
        with pytest.raises(InputError, match="fixes it at 0.5"):
            cls(pattern="2:4", sparsity=0.7).check(p)
    with pytest.raises(InputError, match="one-shot"):
        magnitude(pattern="2:4", schedule="gradual").check(p)
    with pytest.raises(InputError, match="end above the start"):
        magnitude(schedule="gradual", start=0.7, end=0.6).check(p)
    with pytest.raises(InputError, match="lora"):
        magnitude(schedule="gradual").fit(p, Budget(trainable=0.1))


@pytest.mark.parametrize("id", ("random", "magnitude"))
@pytest.mark.parametrize("distribution", ("uniform", "global"))
def test_gradual_follows_the_cubic_curve_and_only_adds_zeros(id, distribution):
    model = micro("llama")
    method = registry.get(id)(sparsity=0.8, schedule="gradual", distribution=distribution, start=0.2, end=0.7, updates=5)
    assert method.card.trains and not registry.get(id)().card.trains and not registry.get(id).card.trains
    context = context_of(model, "llama")
    p = context.profile
    assert method.footprint(p, BATCH).trainable == p.parameters
    model.requires_grad_(False)
    model = method.apply(model, context)
    seen, previous = [], None
    for step in range(10):
        context.progress = step / 10
        method.before_step(model, context)
        seen.append(zeros(model) / size(model))
        now = {n: m.clone() for n, m in context.masks.items()}
        if previous:
            assert all(not torch.any(now[n] & ~previous[n]) for n in now)
        previous = now or previous
    wanted = [0, 0, 0] + [0.8 * (1 - (1 - k / 5) ** 3) for k in (1, 2, 3, 4, 5, 5, 5)]
    assert seen == pytest.approx(wanted, abs=2e-3)


def test_gradual_trains_and_ends_exact_also_when_stopped_early():
    for steps, total in ((12, 12), (3, 100)):
        model = micro("bert")
        method = registry.get("magnitude")(sparsity=0.6, schedule="gradual")
        context = context_of(model, "bert")
        model = method.apply(model, context)
        losses = train(method, model, context, "bert", steps=steps, total=total)
        assert losses[-1] < losses[0]
        model = method.finish(model, context)
        assert zeros(model) / size(model) == method.footprint(context.profile, BATCH).sparsity
        check_masks(model, context.masks)


def test_pruning_again_keeps_earlier_zeros():
    for id in ("random", "magnitude", "wanda"):
        model = micro("gpt2")
        masks = half_masks(model)
        first = {n: m.clone() for n, m in masks.items()}
        already = zeros(model)
        context = context_of(model, "gpt2", masks=masks)
        model = registry.get(id)(sparsity=0.75).apply(model, context)
        assert zeros(model) > already and zeros(model) / size(model) == pytest.approx(0.75, abs=0.02)
        assert all(not torch.any(context.masks[n] & ~first[n]) for n in first)


# -- wanda -------------------------------------------------------------------------------------------------------
def test_wanda_matches_the_known_example():
    x = torch.tensor([[1.0, 0, 2, 1], [1, 3, -2, 1]])
    linear = torch.nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[1.2, 0.9, -0.8, 2], [10, 10, 10, 11]])
    norms = InputNorms(4, "cpu")
    norms(x[None], 1)
    torch.testing.assert_close(norms.norms(), torch.tensor([2**0.5, 3, 2 * 2**0.5, 2**0.5]))
    chosen = registry.get("wanda")(sparsity=0.5).select(linear, norms.norms())
    assert chosen.tolist() == [[True, False, True, False], [True, False, False, True]]
    whole = registry.get("wanda")(sparsity=0.5, group="layer").select(linear, norms.norms())
    assert whole.tolist() == [[True] * 4, [False] * 4]
    assert _masks.smallest_per_row(linear.weight.detach().abs(), 2)[0].tolist() == [False, True, True, False]


def test_input_norms_do_not_depend_on_batching():
    x = torch.randn(6, 5, 3)
    one, many = InputNorms(3, "cpu"), InputNorms(3, "cpu")
    one(x, 6)
    for part in x.split([1, 2, 3]):
        many(part, len(part))
    torch.testing.assert_close(one.mean, many.mean)
    torch.testing.assert_close(one.mean, x.square().sum(dim=(0, 1)) / 6)


def test_wanda_is_invariant_to_scales():
    torch.manual_seed(0)
    method, linear, norms = registry.get("wanda")(sparsity=0.4), torch.nn.Linear(20, 7), torch.rand(20) + 0.1
    mask = method.select(linear, norms)
    assert torch.all(mask.sum(dim=1) == 8)
    columns, rows = torch.rand(20) * 4 + 0.2, torch.rand(7) * 4 + 0.2
    linear.weight.data.div_(columns)
    assert torch.equal(method.select(linear, norms * columns), mask)
    linear.weight.data.mul_(rows[:, None])
    assert torch.equal(method.select(linear, norms * columns), mask)


def test_wanda_variant_reaches_the_sparsity_with_uneven_rows():
    torch.manual_seed(1)
    linear = torch.nn.Linear(200, 30)
    linear.weight.data.mul_(torch.randn(30, 200).exp())
    chosen = registry.get("wanda")(sparsity=0.5, variant=True).select(linear, torch.ones(200))
    assert float(chosen.float().mean()) == pytest.approx(0.5, abs=2e-3) and len(set(chosen.sum(dim=1).tolist())) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_wanda_prunes_every_row_alike(architecture, dtype):
    model = micro(architecture).to(dtype)
    context = context_of(model, architecture)
    method = registry.get("wanda")(sparsity=0.55, samples=6)
    calibration = context.calibration

    def typed(n, length=None):
        return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in c.items()} for c in calibration(n, length)]
    context.calibration = typed
    method.check(context.profile)
    model = method.apply(model, context)
    for m, x in matrices(model):
        assert torch.all((weight(x) == 0).sum(dim=1) == math.floor(0.55 * m.inp))
    assert zeros(model) / size(model) == method.footprint(context.profile, BATCH).sparsity
    check_masks(model, context.masks)
    assert not model.training and torch.isfinite(logits(model, typed(1)[0]).float()).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_walk_gives_each_block_what_the_model_gives_it(architecture):
    """Statistics of block b come from the pruned blocks before it, and are those of a plain forward pass."""
    model = micro(architecture)
    context = context_of(model, architecture)
    samples = context.calibration(5)
    walk = BlockWalk(model, samples, rows=2)
    count = 0
    for _, block, linears in walk:
        count += 1
        norms = {x: InputNorms(m.inp, "cpu") for m, x in linears}
        walk.run(block, norms)
        expected = {x: torch.zeros(m.inp) for m, x in linears}

        def add(module, args, expected=expected):
            expected[module] += args[0].reshape(-1, args[0].shape[-1]).square().sum(0)
        handles = [x.register_forward_pre_hook(add) for x in expected]
        for sample in samples:
            logits(model, sample)
        for h in handles:
            h.remove()
        for x, seen in norms.items():
            torch.testing.assert_close(seen.mean * 5, expected[x], rtol=1e-4, atol=1e-4)
        for _, x in linears:
            x.weight.data.mul_(torch.rand_like(x.weight) > 0.5)
        walk.advance(block)
    assert count == len(walk.blocks)


# -- structured --------------------------------------------------------------------------------------------------
def zeroed(model, kept, a):
    """The dense model with what was removed switched off: columns of the second matrices set to zero."""
    for layer, keep in kept.items():
        block = _shrink.block_of([p for p in matrices(model) if p[0].layer == int(layer)])
        for (_, module), indices in ((block.out, _shrink.rows_of(torch.tensor(keep["heads"]), a.head_dim)), (block.down, torch.tensor(keep["channels"]))):
            w = weight(module).detach()
            mask = torch.zeros(w.shape[1], dtype=torch.bool)
            mask[indices] = True
            with torch.no_grad():
                weight(module).mul_(mask)
    return model


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "distilbert", "qwen2"))
@pytest.mark.parametrize("criterion", ("l2", "activation", "taylor"))
def test_shrunk_model_equals_the_model_with_those_parts_zeroed(architecture, criterion, tmp_path):
    kind = {"distilbert": "bert", "qwen2": "llama"}.get(architecture, architecture)
    model = extra(architecture) if architecture != kind else micro(architecture)
    p = profile(model, kind)
    dense = copy.deepcopy(model)
    method = registry.get("structured")(heads=0.5, channels=0.5, criterion=criterion, samples=6)
    method.check(p)
    context = context_of(model, kind)
    model = method.finish(method.apply(model, context), context)
    a = _shrink.anatomy(p)
    expected = logits(zeroed(dense, context.state["layers"], a), inputs(kind))
    torch.testing.assert_close(logits(model, inputs(kind)), expected, rtol=1e-4, atol=1e-5)
    after, forecast = profile(model, kind), method.footprint(p, BATCH)
    assert after.tensors == method.result_profile(p).tensors and after.matrices == method.result_profile(p).matrices
    assert after.parameters == forecast.result_parameters < p.parameters
    assert all(v <= 0.51 for _, _, v in method.layers(model, context)["kept"])
    saved = models.save(model, None, tmp_path / "model")
    assert saved["weight_bytes"] == forecast.result
    read = read_folder(tmp_path / "model")
    assert {(t.name, t.shape) for t in read.tensors} == {(t.name, t.shape) for t in after.tensors}
    again = _load(tmp_path / "model", kind, model)
    torch.testing.assert_close(logits(again, inputs(kind)), logits(model, inputs(kind)))


def extra(architecture: str):
    import transformers as t
    torch.manual_seed(3)
    if architecture == "distilbert":
        return t.DistilBertForSequenceClassification(t.DistilBertConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3,
                                                                        max_position_embeddings=64)).eval()
    return t.Qwen2ForCausalLM(t.Qwen2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                            num_key_value_heads=2, max_position_embeddings=64)).eval()


def _load(folder, kind, model):
    """With plain transformers where config.json can say it, with our layout otherwise."""
    from engines.models import shapes
    assert ((folder / "fettle.json").is_file()) == (model.config.model_type in ("gpt2", "bert", "distilbert"))
    if not (folder / "fettle.json").is_file():
        return type(model).from_pretrained(folder).eval()
    import json

    from safetensors.torch import load_file
    fresh = type(model)(type(model.config).from_pretrained(folder))
    shapes.apply(fresh, json.loads((folder / "fettle.json").read_text())["shapes"])
    fresh.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    fresh.tie_weights()
    return fresh.eval()


@pytest.mark.parametrize("architecture", ("gpt2", "bert"))
def test_channels_alone_load_in_plain_transformers(architecture, tmp_path):
    model = micro(architecture)
    context = context_of(model, architecture)
    model = registry.get("structured")(heads=0.0, channels=0.5, criterion="l2").apply(model, context)
    models.save(model, None, tmp_path / "m")
    assert not (tmp_path / "m" / "fettle.json").exists()
    again = type(model).from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(again, inputs(architecture)), logits(model, inputs(architecture)))


@pytest.mark.parametrize("heads,kv,group", ((8, 4, 2), (8, 2, 4), (4, 1, 4), (4, 4, 1)))
def test_grouped_heads_stay_consistent(heads, kv, group):
    model = micro("llama", hidden_size=64, num_attention_heads=heads, num_key_value_heads=kv)
    p = profile(model, "llama")
    for share in (0.25, 0.5, 0.75):
        live, dense = copy.deepcopy(model), copy.deepcopy(model)
        method = registry.get("structured")(heads=share, channels=0.3, criterion="l2")
        context = context_of(live, "llama")
        live = method.apply(live, context)
        config = live.config
        assert 64 % config.num_attention_heads == 0 and config.num_attention_heads % config.num_key_value_heads == 0
        assert config.num_attention_heads == len(context.state["layers"]["0"]["heads"]) < heads and config.head_dim == 64 // heads
        assert config.intermediate_size == 32 and type(config)(**config.to_dict()).head_dim == 64 // heads
        expected = logits(zeroed(dense, context.state["layers"], _shrink.anatomy(p)), inputs("llama"))
        torch.testing.assert_close(logits(live, inputs("llama")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ("l2", "activation", "taylor"))
@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_dead_parts_go_first(criterion, architecture):
    model = micro(architecture)
    a = _shrink.anatomy(profile(model, architecture))
    dead = [1] if a.group == 1 else [2, 3]
    with torch.no_grad():
        for layer in range(a.layers):
            block = _shrink.block_of([p for p in matrices(model) if p[0].layer == layer])
            weight(block.out[1])[:, _shrink.rows_of(torch.tensor(dead), a.head_dim)] = 0
            weight(block.down[1])[:, 5:21] = 0
            if criterion == "l2":
                for pair in (block.query, block.key, block.value):
                    if not block.fused:
                        weight(pair[1])[-pair[0].out // 2:] = 0
                for up in block.ups:
                    weight(up[1])[5:21] *= 1e-3
    before = logits(model, inputs(architecture))
    context = context_of(model, architecture)
    share = len(dead) / a.heads
    model = registry.get("structured")(heads=share, channels=16 / a.mlp, criterion=criterion, samples=4).apply(model, context)
    if not (criterion == "l2" and architecture == "gpt2"):
        torch.testing.assert_close(logits(model, inputs(architecture)), before, rtol=1e-4, atol=1e-5)
    assert all(not set(range(5, 21)) & set(k["channels"]) for k in context.state["layers"].values())


def test_share_follows_the_size_limit_exactly():
    for architecture in ARCHITECTURES:
        p = profile(micro(architecture), architecture)
        full = registry.get("structured")(heads=0.0, channels=0.0).footprint(p, BATCH).result
        limit = 0.8 * full / 1e6
        method, why = registry.get("structured")(heads="auto", channels="auto").fit(p, Budget(size_mb=limit))
        assert method.footprint(p, BATCH).result <= limit * 1e6 and "obey" in why["heads"] and method.heads == method.channels
        if method.heads > 0.01:
            less = method.replace(heads=method.heads - 0.01, channels=method.channels - 0.01)
            assert less.footprint(p, BATCH).result > limit * 1e6
        with pytest.raises(InputError, match="embeddings"):
            registry.get("structured")(heads="auto", channels="auto").fit(p, Budget(size_mb=full / 1e8))


def test_masks_shrink_with_their_weights():
    model = micro("gpt2")
    context = context_of(model, "gpt2", masks=half_masks(model))
    model = registry.get("structured")(criterion="l2").apply(model, context)
    check_masks(model, context.masks)
    losses = train(registry.get("lora")(rank=2), _adapted(model, context), context, "gpt2", steps=4)
    assert losses[-1] < losses[0]


def _adapted(model, context):
    return registry.get("lora")(rank=2).apply(model, context)


def test_unknown_blocks_are_refused():
    p = profile(micro("llama"), "llama")
    odd = dataclasses.replace(p, matrices=tuple(m for m in p.matrices if m.role != "o_proj"))
    with pytest.raises(InputError, match="attention and an MLP"):
        registry.get("structured")().check(odd)


def test_blocks_with_their_own_masks_are_walked_with_them():
    """Local and global attention alternate in Gemma-like models: the walk gives each block its own mask."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from engines.pruning._blocks import BlockWalk
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                              head_dim=16, sliding_window=4, max_position_embeddings=64, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    model = Gemma3ForCausalLM(config).eval()
    samples = [dict(input_ids=torch.randint(0, 64, (1, 16))) for _ in range(2)]
    walk = BlockWalk(model, samples)
    assert walk.varied
    for _, block, _ in walk:
        walk.advance(block)
    # Batches are ordered by the walk, the samples have one shape, so their order is kept.
    with torch.no_grad():
        expected = torch.cat([model.model(input_ids=s["input_ids"]).last_hidden_state for s in samples])
        torch.testing.assert_close(model.model.norm(torch.cat(walk.hidden)), expected, atol=1e-5, rtol=1e-5)

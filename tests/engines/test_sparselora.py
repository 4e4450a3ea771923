"""SparseLoRA: the channels that are chosen, the gathered products against masked dense ones, schedule, merging."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers import sparselora as layers
from engines.models import profile_of
from engines.profile import Batch
from engines.training.loop import Limit
from engines.training.loss import task_loss
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro


def linear(out, inp, *, rank=None, bias=False, dtype=torch.float64):
    layer = nn.Linear(inp, out, bias=bias, dtype=dtype)
    if rank is not None:
        layer.weight.data = torch.randn(out, rank, dtype=dtype) @ torch.randn(rank, inp, dtype=dtype)
    return layer.requires_grad_(False)


class Fixed(nn.Module):
    """A choice that is made once and for all."""

    def __init__(self, shared, **kept):
        super().__init__()
        self.shared, self.kept = shared, {k: torch.tensor(v) for k, v in kept.items()}

    def choose(self, x):
        pass


def sparse(base, part, kept, *, tail=0.0, rank=3, mask=None):
    layer = layers.SparseLinear(base, rank, 1.5, part, torch.Generator().manual_seed(1), mask=mask).train()
    if rank:
        nn.init.normal_(layer.b)
        layer.a.data, layer.b.data = layer.a.data.double(), layer.b.data.double()
    shared = layers.Shared(tail)
    shared.active = True
    layer.follow(Fixed(shared, **{part: kept}), leads=True)
    return layer


# -- the choice ----------------------------------------------------------------------------------------------
def test_mlp_channels_follow_the_activation_and_not_its_parts():
    # One row in, so that gate and up outputs are the rows of the weights themselves.
    gate, up = torch.tensor([[2.0], [0.1], [-3.0]]), torch.tensor([[1.0], [5.0], [1.0]])
    choice = layers.MlpChoice(layers.Shared(), {"gate": (gate, None), "up": (up, None)}, 0.6, 8, F.silu)
    choice.choose(torch.ones(1, 1, 1))
    assert choice.kept["up"].tolist() == [0] and choice.kept["down"].tolist() == [0]


def test_an_estimator_of_full_rank_chooses_as_the_true_activations_do():
    torch.manual_seed(0)
    gate, up = linear(40, 12, rank=3).float(), linear(40, 12, rank=3, bias=True).float()
    choice = layers.MlpChoice(layers.Shared(), {"gate": (gate.weight, None), "up": (up.weight, up.bias)}, 0.8, 8, F.silu)
    x = torch.randn(5, 1, 12)
    choice.choose(x)
    inner = (F.silu(gate(x)) * up(x)).reshape(5, 40)
    assert choice.kept["up"].tolist() == sorted(inner.norm(dim=0).topk(8).indices.tolist())
    # Of a sequence the mean hidden state counts, of a padded one that of its tokens.
    longer = torch.cat([x, torch.full((5, 2, 12), 50.0)], dim=1)
    choice.choose(longer)
    assert choice.kept["up"].tolist() != sorted(inner.norm(dim=0).topk(8).indices.tolist())
    choice.shared.keep = torch.tensor([[True, False, False]] * 5)
    choice.choose(longer)
    assert choice.kept["up"].tolist() == sorted(inner.norm(dim=0).topk(8).indices.tolist())


def test_attention_channels_by_the_product_of_lengths_and_by_the_length_of_values():
    torch.manual_seed(0)
    q, k, v = linear(16, 10, rank=4).float(), linear(8, 10, rank=4, bias=True).float(), linear(8, 10, rank=4).float()
    choice = layers.AttentionChoice(layers.Shared(), {n: (m.weight, m.bias) for n, m in zip("qkv", (q, k, v))}, 0.5, 8, head=4)
    x = torch.randn(2, 6, 10)
    choice.choose(x)
    length = lambda m: m(x).reshape(12, -1).norm(dim=0)  # noqa: E731
    score = length(q).view(2, 2, 4).mean(dim=1).flatten() * length(k)
    assert choice.kept["k"].tolist() == sorted(score.topk(4).indices.tolist())
    assert choice.kept["v"].tolist() == sorted(length(v).topk(4).indices.tolist())
    assert len(choice.kept["q"]) == len(choice.kept["o"]) == 8
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[:, 3:] = False
    choice.shared.keep = keep
    choice.choose(torch.cat([x[:, :3], 1e3 * torch.randn(2, 3, 10)], dim=1))
    padded = choice.kept["v"]
    choice.shared.keep = None
    choice.choose(x[:, :3])
    assert torch.equal(choice.kept["v"], padded)


def test_query_heads_that_share_a_key_head():
    # Four query heads, two key heads of width 4.
    assert layers.query_channels(torch.tensor([5]), 2, 4).tolist() == [9, 13]
    assert layers.query_channels(torch.tensor([0, 7]), 2, 4).tolist() == [0, 4, 11, 15]
    assert layers.query_channels(torch.tensor([1, 6]), 1, 4).tolist() == [1, 6]


@pytest.mark.parametrize("width, share, count", [(1000, 0.99, 10), (100, 0.9, 10), (100, 0.7, 30), (768, 0.9, 76), (7, 0.0, 7)])
def test_counts_are_not_lost_to_rounding(width, share, count):
    assert len(layers.kept_of(torch.rand(width), share)) == count


def test_thin_factors_of_large_matrices_are_nearly_the_best_ones():
    torch.manual_seed(0)
    spectrum = 0.8 ** torch.arange(900.0)
    u, v = (torch.linalg.qr(torch.randn(900, 900))[0] for _ in range(2))
    weight = (u * spectrum) @ v
    a, b = layers.thin(weight, None, 8)
    again = layers.thin(weight, None, 8)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    best = spectrum[8:].norm()
    assert (weight - (a @ b[:-1]).t()).norm() < 1.02 * best


# -- the products --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part, rank, tail, bias", [("q", 3, 0.0, True), ("q", 0, 0.0, False), ("up", 3, 0.5, True), ("o", 3, 0.0, True),
                                                    ("down", 0, 0.0, False), ("down", 3, 0.5, True), ("o", 0, 0.5, True), ("v", 3, 1.0, True)])
def test_gathered_products_equal_masked_dense_ones(part, rank, tail, bias):
    torch.manual_seed(0)
    base = linear(10, 8, bias=bias)
    outputs = part not in ("o", "down")
    kept = [1, 2, 7, 9] if outputs else [0, 3, 4]
    layer = sparse(base, part, kept, tail=tail, rank=rank)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)

    other = x.detach().clone().requires_grad_()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.a, layer.b)) if rank else (None, None)
    gate = torch.zeros(10 if outputs else 8, dtype=torch.float64)
    gate[kept] = 1
    dense = F.linear(other, base.weight, base.bias)
    thinned = dense * gate if outputs else F.linear(other * gate, base.weight, base.bias)
    border = 6 - round(tail * 6)
    wanted = torch.cat([thinned[:, :border], dense[:, border:]], dim=1)
    if rank:
        wanted = wanted + 1.5 * F.linear(F.linear(other, a), b)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
    seed = torch.randn_like(y)
    y.backward(seed)
    wanted.backward(seed)
    torch.testing.assert_close(x.grad, other.grad, atol=1e-12, rtol=1e-12)
    if rank:
        torch.testing.assert_close(layer.a.grad, a.grad, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(layer.b.grad, b.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("part, width", [("q", 10), ("down", 8)])
def test_with_every_channel_it_is_lora(part, width):
    torch.manual_seed(0)
    layer = sparse(linear(10, 8, bias=True), part, list(range(width)))
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    found = layer(x)
    found.square().sum().backward()
    grads = [x.grad.clone(), layer.a.grad.clone(), layer.b.grad.clone()]
    x.grad = layer.a.grad = layer.b.grad = None
    layer.choice.shared.active = False
    dense = layer(x)
    dense.square().sum().backward()
    torch.testing.assert_close(found, dense, atol=1e-12, rtol=1e-12)
    for one, two in zip(grads, (x.grad, layer.a.grad, layer.b.grad)):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)


def test_pruned_zeros_stay_zero_in_the_sparse_product():
    torch.manual_seed(0)
    mask = torch.rand(10, 8) > 0.5
    base = linear(10, 8)
    base.weight.data *= mask
    layer = sparse(base, "q", list(range(10)), mask=mask)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.masked().double()), atol=1e-5, rtol=1e-5)


def block(model):
    return model.model.layers[1]


def applied(changes=(), architecture="llama", compute="float32", **context):
    model = micro.model(architecture)
    profile = profile_of(model, "micro", micro.TASKS[architecture])
    method = registry.build({"method": "sparselora", **dict(changes)}).fit(profile, Budget())[0]
    method.check(profile)
    around = micro.context(model, architecture, **context)
    around.compute, around.total_steps = compute, 8
    return method.apply(model, around), method, around


def test_gated_mlp_computes_only_the_kept_channels_and_its_gradient_is_exact():
    model, method, context = applied({"mlp": 0.75, "tail": 0.5})
    mlp = block(model).mlp.train()
    shared = model._fettle_sparse[0]
    x = torch.randn(2, 6, 64, requires_grad=True)
    calls = []
    plain = F.linear
    try:
        F.linear = lambda x, w, b=None: (calls.append(tuple(w.shape)), plain(x, w, b))[1]
        shared.active = True
        y = mlp(x)
    finally:
        F.linear = plain
    assert calls[:3] == [(32, 64), (32, 64), (64, 32)], "the products have the kept channels only"
    gate = torch.zeros(128)
    gate[mlp.own_choice.kept["up"]] = 1
    other = x.detach().clone().requires_grad_()
    inner = F.silu(mlp.gate_proj(other)) * mlp.up_proj(other)
    wanted = torch.cat([mlp.down_proj(inner[:, :3] * gate), mlp.down_proj(inner[:, 3:])], dim=1)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[:, 3:], type(mlp).forward(mlp, x[:, 3:])), "the tail is the dense layer itself"
    seed = torch.randn_like(y)
    y.backward(seed)
    wanted.backward(seed)
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)
    model.eval()
    torch.testing.assert_close(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_chosen_channels_overlap_the_true_ones_far_above_chance():
    model, method, context = applied({"mlp": 0.75})
    mlp, x = block(model).mlp, torch.randn(4, 6, 64) @ torch.diag(torch.logspace(0, -2, 64))
    mlp.own_choice.choose(x)
    mean = x.mean(dim=1)
    true = set((F.silu(mlp.gate_proj(mean)) * mlp.up_proj(mean)).norm(dim=0).topk(32).indices.tolist())
    assert len(true & set(mlp.own_choice.kept["up"].tolist())) > 1.7 * 32 * 0.25


# -- the run -------------------------------------------------------------------------------------------------
def test_dense_first_then_sparse_and_dense_when_evaluated():
    model, method, context = applied({"start": 0.5})
    shared, seen = model._fettle_sparse[0], []
    real = method.before_step

    class Watched:
        def __getattr__(self, name):
            return getattr(method, name)

        def before_step(self, model, context):
            real(model, context)
            seen.append(shared.active)
    train(model, Watched(), context, TrainSettings(lr=1e-3, batch=4, length=16, evaluations=1), Limit(steps=4))
    assert seen == [False, False, True, True]
    trained = micro.logits(model, "llama")
    shared.active = False
    assert torch.equal(trained, micro.logits(model, "llama"))
    figures = method.layers(model, context)
    assert {value for layer, _, value in figures["skipped"] if layer == 0} == {0.0} and [1, "up_proj", 0.9] in figures["skipped"]
    assert {role for _, role, _ in figures["rank"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_sparse_step_changes_the_loss_and_a_tail_brings_it_nearer():
    model, method, context = applied()
    inputs, shared = micro.inputs("llama"), model._fettle_sparse[0]
    model.train()
    far = {}
    with torch.no_grad():
        dense = model(**inputs).logits
        shared.active = True
        for tail in (0.0, 0.5, 1.0):
            shared.tail = tail
            far[tail] = float((model(**inputs).logits - dense).norm())
    assert far[0.0] > far[0.5] > 0 and far[1.0] < 1e-4 * far[0.0]


def test_padding_is_seen_by_the_choice():
    model, method, context = applied(architecture="bert")
    batch = context.data.batch(0, 4)[0]
    model(**{k: v for k, v in batch.items() if k != "labels"})
    keep = model._fettle_sparse[0].keep
    assert keep is None if "attention_mask" not in batch else torch.equal(keep, batch["attention_mask"].bool())
    model(input_ids=batch["input_ids"], attention_mask=torch.tril(torch.ones_like(batch["input_ids"])))
    assert model._fettle_sparse[0].keep[0].sum() == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointed_passes_choose_the_same_again(architecture):
    found = []
    for checkpointing in (False, True):
        model, method, context = applied({"targets": "all-linear", "mlp": 0.75}, architecture=architecture)
        model._fettle_sparse[0].active = True
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        task_loss(model, context.data.batch(0, 4)[0], "causal-lm").backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_width_weights_come_back_as_they_were(architecture, tmp_path):
    before = {n: p.clone() for n, p in micro.model(architecture).named_parameters()}
    model, method, context = applied(architecture=architecture, compute="bfloat16", folder=tmp_path)
    names = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert any("mlp" in n for n in names) and any("att" in n for n in names)
    train(model, method, context, TrainSettings(lr=0.0, batch=4, length=16, evaluations=1, precision="bf16"), Limit(steps=3))
    model = method.finish(model, context)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and not list(tmp_path.glob("frozen-*"))
    assert all(torch.equal(before[n], p) for n, p in after.items())
    assert not any(n.endswith("own_choice") for n, _ in model.named_modules()) and "forward" not in vars(model.get_submodule(f"{_blocks(model)}.1.mlp"))


def _blocks(model):
    return "model.layers" if hasattr(model, "model") else "transformer.h"


def test_a_peft_adapter_holds_the_update(tmp_path):
    from peft import PeftModel
    model, method, context = applied({"targets": "q_proj,v_proj", "rank": 4}, folder=tmp_path)
    base = copy.deepcopy(micro.model("llama"))
    train(model, method, context, TrainSettings(lr=5e-2, batch=4, length=16, evaluations=1), Limit(steps=3))
    wanted = micro.logits(method.finish(model, context), "llama")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(micro.logits(loaded, "llama"), wanted, atol=1e-4, rtol=1e-4)


def test_forecast_tells_less_compute_than_lora():
    model = micro.model("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    profile, batch = profile_of(model, "micro", "causal-lm"), Batch(rows=8, length=64)
    flops = lambda **c: registry.build({"rank": 4, **c}).footprint(profile, batch).flops_per_token  # noqa: E731
    dense = flops(method="lora", targets="attention")
    sparse = flops(method="sparselora", tail=0.0)
    assert flops(method="sparselora", tail=0.0, mlp=0.99, mlp_from=0.0, until=1.0) < sparse < flops(method="sparselora", tail=0.5) < dense


def test_the_tail_is_of_language_models_only():
    assert applied()[0]._fettle_sparse[0].tail == 0.5 and applied(architecture="bert")[0]._fettle_sparse[0].tail == 0.0


@pytest.mark.parametrize("architecture, name, width", [("llama", "self_attn.k_proj", 32), ("gpt2", "attn.c_attn", 64)])
def test_attention_without_any_channel_is_refused(architecture, name, width):
    profile = profile_of(micro.model(architecture), "micro", micro.TASKS[architecture])
    with pytest.raises(InputError, match=f"sparselora.attention = 0.99: it leaves none of the {width} channels of .*{name}. Choose at most 0.9"):
        registry.build({"method": "sparselora", "attention": 0.99, "attention_from": 0.0}).check(profile)
    registry.build({"method": "sparselora", "attention": 0.96, "attention_from": 0.0}).check(profile)


@pytest.mark.parametrize("changes, message", [
    (dict(rank=40), "sparselora.rank = 40: .* Choose at most 32"),
    (dict(mlp=0.995), "sparselora.mlp = 0.995: it leaves none of the 128 channels .* Choose at most 0.992"),
    (dict(mlp=0.0, attention=0.0), "none of 2 blocks is sparse"),
    (dict(targets="nothing"), "no matrix called 'nothing'")])
def test_refusals(changes, message):
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match=message):
        registry.build({"method": "sparselora", **changes}).check(profile)


def test_other_refusals():
    import dataclasses
    profile = profile_of(micro.model("bert"), "micro", "text-classification")
    with pytest.raises(InputError, match="the blocks of mamba"):
        registry.build({"method": "sparselora"}).check(dataclasses.replace(profile, architecture="mamba"))

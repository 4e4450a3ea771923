"""Hydra: the merge of both branches, LoRA as its half, the sequential branch behind the frozen layer."""

import pytest
import torch
from torch import nn

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.layers.hydra import Hydra
from engines.models import profile_of
from engines.training.loop import Limit
from engines.training.stage import train
from tests.contract import micro
from tests.contract.trial import settings


def method(**changes):
    return registry.build({"method": "hydra-lora", **changes})


def layer(out=3, inp=5, parallel=2, sequential=2, **changes):
    torch.manual_seed(0)
    made = Hydra(nn.Linear(inp, out).requires_grad_(False), parallel, sequential, 0.7, **changes)
    for p in made.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return made


def test_worked_example_merged_and_unmerged():
    base = nn.Linear(2, 2).requires_grad_(False)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([1.0, -1])
    made = Hydra(base, 2, 2, 0.1, biases=True)
    made.a_p.data, made.b_p.data = torch.eye(2), 0.5 * torch.eye(2)
    made.a_s.data, made.b_s.data = torch.eye(2), torch.tensor([[0.0, 1], [1, 0]])
    made.outer_p.data, made.outer_s.data = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    torch.testing.assert_close(made.effective(), torch.tensor([[1.35, 2.4], [3.1, 4.25]]))
    torch.testing.assert_close(made.changed_bias(), torch.tensor([0.94, -0.84]))
    torch.testing.assert_close(made(torch.ones(1, 2)), torch.tensor([[4.69, 6.51]]))


@pytest.mark.parametrize("biases, dropout", [(False, 0.0), (True, 0.0), (True, 1e-9)])
def test_gradients_are_those_of_the_formula(biases, dropout):
    """The branch behind the layer sees h = W x + b, also in what its factors learn from the bias."""
    made = layer(biases=biases, dropout=dropout)
    x = torch.randn(7, 5, requires_grad=True)
    h = x @ made.base.weight.t() + made.base.bias
    zero = torch.zeros(1)
    bias = {k: zero if getattr(made, k) is None else getattr(made, k) for k in ("inner_p", "outer_p", "inner_s", "outer_s")}
    parallel = (x @ made.a_p.t() + bias["inner_p"]) @ made.b_p.t() + bias["outer_p"]
    sequential = (h @ made.a_s.t() + bias["inner_s"]) @ made.b_s.t() + bias["outer_s"]
    wanted, found = h + 0.7 * (parallel + sequential), made(x)
    torch.testing.assert_close(found, wanted)
    trained = [x] + [p for p in made.parameters() if p.requires_grad]
    assert len(trained) == (9 if biases else 5)
    for mine, other in zip(torch.autograd.grad(found.sin().sum(), trained), torch.autograd.grad(wanted.sin().sum(), trained)):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_half_precision_weights_and_products():
    made = layer(out=16, inp=24)
    wanted = made(torch.ones(2, 24))
    made.base.weight.data = made.base.weight.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(torch.ones(2, 24))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.05)
    found.float().sum().backward()
    assert made.a_s.grad.dtype == torch.float32 and made.a_s.grad.abs().max() > 0


def test_a_mask_leaves_zeros():
    mask = torch.rand(3, 5) > 0.5
    made = layer(mask=mask)
    made.base.weight.data *= mask
    assert (made.masked()[~mask] == 0).all()
    x = torch.randn(4, 5)
    torch.testing.assert_close(made(x), x @ made.masked().t() + made.changed_bias())


def test_without_the_sequential_branch_it_trains_as_lora():
    losses = {}
    for name, stage in (("ours", dict(method="hydra-lora", branches="parallel", targets="all-linear", scale=2.0)),
                        ("theirs", dict(method="lora", rank=4))):
        model = micro.model("llama")
        chosen, _ = registry.build(stage).fit(profile_of(model, "micro", "causal-lm"), Budget())
        context = micro.context(model, "llama")
        context.total_steps = 6
        model = chosen.apply(model, context)
        if name == "ours":
            starts = {n.replace(".a_p", ""): p.detach().clone() for n, p in model.named_parameters() if n.endswith(".a_p")}
        else:
            for n, p in model.named_parameters():
                if ".lora_A." in n:
                    p.data = starts[n.split(".lora_A.")[0]].clone()
        train(model, chosen, context, settings(chosen, lr=5e-3), Limit(steps=6))
        losses[name] = context.reporter.series["loss"]
    assert losses["ours"] == losses["theirs"] and losses["ours"][-1][1] < losses["ours"][0][1]


def test_default_targets_are_the_last_matrices_of_the_mlps():
    for architecture, role in (("llama", "down_proj"), ("gpt2", "mlp.c_proj"), ("bert", "output.dense"), ("vit", "fc2")):
        profile = profile_of(micro.model(architecture), "micro", micro.TASKS[architecture])
        found = method().targeted(profile)
        assert len(found) == profile.layers and all(m.role.endswith(role) and "att" not in m.name for m in found)


def test_adapter_file_carries_the_changed_bias_to_peft(tmp_path):
    from peft import PeftModel
    model = micro.model("bert")
    context = micro.context(model, "bert", folder=tmp_path)
    chosen = method(biases=True)
    model = chosen.apply(model, context)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model = chosen.finish(model, context)
    theirs = PeftModel.from_pretrained(micro.model("bert"), tmp_path / "adapter")
    torch.testing.assert_close(micro.logits(theirs, "bert"), micro.logits(model, "bert"), atol=1e-4, rtol=1e-4)
    theirs = theirs.merge_and_unload()
    torch.testing.assert_close(micro.logits(theirs, "bert"), micro.logits(model, "bert"), atol=1e-4, rtol=1e-4)


def test_a_layer_without_bias_gets_none():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    assert method(biases=True).footprint(profile, micro_batch()).trainable == method().footprint(profile, micro_batch()).trainable
    profile = profile_of(micro.model("gpt2"), "micro", "causal-lm")
    assert method(biases=True).footprint(profile, micro_batch()).trainable > method().footprint(profile, micro_batch()).trainable


def micro_batch():
    from engines.profile import Batch
    return Batch(rows=2, length=8)


def test_a_rank_above_the_outputs_is_refused():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    with pytest.raises(InputError, match="sequential_rank = 65: .* has 64 outputs, .* Choose at most 64"):
        method(sequential_rank=65).check(profile)


def test_both_sides_of_every_claim_train_as_much():
    from engines import models
    from engines.models.folder import read_folder
    cls = registry.get("hydra-lora")
    assert {c.key for c in cls.claims} == {"above-lora", "above-sequential"}
    for claim in cls.claims:
        found = read_folder(models.locate(claim.model))
        ours, against = (registry.build(side).footprint(found, micro_batch()).trainable for side in (claim.ours, claim.against))
        assert ours == against, claim.key

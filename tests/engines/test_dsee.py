"""DSEE: the worked pruning by the update, the decomposition, reduction to LoRA, heads that go, a resume after the pruning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engines import models, registry
from engines.adaptation._adapter import adapters
from engines.budget import Budget
from engines.errors import InputError, StopRequested
from engines.layers import lowrank
from engines.layers.dsee import Dsee, decompose, rounds_for, support
from engines.models import matrices, profile_of
from engines.profile import Batch
from engines.pruning import _masks
from engines.training import checkpoint
from engines.training.loop import Limit
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro


def method(**fields):
    return registry.build({"method": "dsee", **fields})


def profile(architecture="llama"):
    return profile_of(micro.model(architecture), "micro", micro.TASKS[architecture])


def worked():
    base = nn.Linear(2, 2, bias=False).requires_grad_(False)
    base.weight.data = torch.tensor([[9.0, 1.0], [1.0, 9.0]])
    layer = Dsee(base, 1, 2.0, torch.tensor([2]))
    layer.a.data, layer.b.data, layer.values.data = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([-1.0])
    return layer


def test_worked_pruning_by_the_update():
    layer = worked()
    assert layer.update().tolist() == [[0.0, 4.0], [-2.0, 0.0]]
    for by, wanted in (("update", [[0.0, 5.0], [-1.0, 0.0]]), ("weight", [[9.0, 4.0], [-2.0, 9.0]]), ("sum", [[9.0, 4.0], [-2.0, 9.0]])):
        layer = worked()
        gone = _masks.smallest_of_all(lambda n: method(by=by).score(layer), ["w"], 2)["w"]  # noqa: B023
        layer.weight.data.masked_fill_(gone, 0.0)
        assert layer.effective().tolist() == wanted, by


def test_decomposition():
    torch.manual_seed(0)
    w = torch.randn(30, 40, dtype=torch.float64) * 0.02 + torch.outer(torch.randn(30, dtype=torch.float64), torch.randn(40, dtype=torch.float64))
    w[3, 5] += 2.0
    rounds = 4
    u, v, s = decompose(w, rounds, torch.Generator().manual_seed(0))
    assert u.shape == (30, 1 + 5 * (rounds - 1)) and torch.linalg.matrix_rank(u @ v) == u.shape[1]
    torch.testing.assert_close(u.t() @ u, torch.eye(u.shape[1], dtype=torch.float64))
    assert float((w - u @ v - s).abs().max()) < 0.01
    assert ((s == 0) | (s.abs() >= 0.01)).all() and (s == 0).any()
    assert rounds_for(768, 768) == 100 and rounds_for(3072, 768) == 100 and 1 + 5 * (rounds_for(64, 64) - 1) <= 0.65 * 64


def test_the_support_has_the_asked_number_even_where_fewer_pass():
    torch.manual_seed(0)
    w = torch.randn(64, 64) * 1e-4      # nothing passes the threshold
    for how in ("decomposition", "magnitude", "random"):
        index = support(w, 16, how, torch.Generator().manual_seed(0))
        assert index.unique().numel() == 16
    rough = torch.randn(64, 48)
    sparse = decompose(rough, rounds_for(64, 48), torch.Generator().manual_seed(0))[2].abs().view(-1)
    index = support(rough, 8, "decomposition", torch.Generator().manual_seed(0))
    assert sorted(index.tolist()) == sorted(torch.topk(sparse, 8).indices.tolist())
    assert support(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), 2, "magnitude").tolist() == [1, 2]


def test_without_entries_and_zeros_it_is_lora():
    torch.manual_seed(0)
    base = nn.Linear(6, 5).requires_grad_(False)
    layer = Dsee(base, 2, 1.5, torch.zeros(0, dtype=torch.int64))
    nn.init.normal_(layer.b)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), lowrank.low_rank_linear(x, base.weight, base.bias, layer.a, layer.b, 1.5))


@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_the_merged_weight(masked):
    torch.manual_seed(1)
    layer = Dsee(nn.Linear(6, 5).requires_grad_(False), 2, 1.5, torch.tensor([4, 11, 29]),
                 mask=torch.rand(5, 6) > 0.5 if masked else None)
    nn.init.normal_(layer.b)
    nn.init.normal_(layer.values)
    x, upstream = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)
    (layer(x) * upstream).sum().backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in (layer.a, layer.b, layer.values))]
    for p in (x, layer.a, layer.b, layer.values):
        p.grad = None
    (F.linear(x, layer.masked(), layer.bias) * upstream).sum().backward()
    for a, b in zip(found, (x.grad, layer.a.grad, layer.b.grad, layer.values.grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    a, b = layer.pairs()
    torch.testing.assert_close(b @ a, layer.update().detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_factors_and_entries_are_one_function(compute):
    torch.manual_seed(2)
    layer = Dsee(nn.Linear(6, 5).requires_grad_(False), 2, 1.5, torch.tensor([1, 4, 7, 13]))      # 1, 7 and 13 share a column, 1 and 4 a row
    nn.init.normal_(layer.b)
    nn.init.normal_(layer.values)
    x, upstream = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        y = layer(x)
    assert y.dtype == compute and y.grad_fn.name() == "_LowRankAndEntriesBackward"
    trained = (x, layer.a, layer.b, layer.values)
    found = [y.float(), *torch.autograd.grad((y.float() * upstream).sum(), trained)]
    wanted = F.linear(x, layer.effective(), layer.bias)
    wanted = [wanted, *torch.autograd.grad((wanted * upstream).sum(), trained)]
    for mine, other in zip(found, wanted):
        assert float((mine.float() - other).norm() / other.norm()) < (1e-5 if compute == torch.float32 else 0.02)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_heads_with_the_smallest_updates_go(architecture):
    """By the sum of |BA + S| over the head's rows of query and of value."""
    m, model = method(rank=2, prune="heads", heads=0.5), micro.model(architecture)
    context = micro.context(model, architecture)
    model = m.apply(model, context)
    sizes = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 2.5, 0.5, 1.0]])      # of query and value; together 4, 3.5, 2.5, 5
    with torch.no_grad():
        for name, layer in adapters(model):
            layer.a.fill_(1.0)
            rows = sizes.repeat_interleave(16, dim=1)
            rows = torch.cat([rows[0], torch.full((64,), 9.0), rows[1]]) if architecture == "gpt2" else rows[0 if "query" in name else 1]
            layer.b.copy_(-rows[:, None].expand_as(layer.b))
    m.cut(model, context)
    assert all(kept["heads"].tolist() == [0, 3] for kept in context.state["heads"].values())


def test_the_claim_on_heads_removes_the_share_that_it_tells():
    from engines.models.folder import read_folder
    claim = next(c for c in registry.get("dsee").claims if c.key == "as-good-heads")
    built, found = registry.build(claim.ours), read_folder(models.locate(claim.model))
    anatomy, kv, group = built.kept(found)
    assert kv * group == 3 and anatomy.heads == 4, "one of four"
    assert {x.role for x in built.targeted(found)} == set(claim.against["targets"].split(","))
    assert built.kept(read_folder(models.locate("stdlib-lm")))[1:] == (2, 1), "the language model cannot hold three"


def go(m, architecture="llama", steps=8, folder=None, pause_at=None, resume=False, compute="float32"):
    model = micro.model(architecture)
    context = micro.context(model, architecture, folder=folder)
    context.total_steps, context.resuming, context.compute = steps, resume, compute
    model = m.apply(model, context)
    if pause_at is not None:
        context.reporter.wants = lambda: "pause" if context.step >= pause_at else None
    settings = TrainSettings(lr=1e-2, batch=8, length=24, evaluations=1, precision="bf16" if compute == "bfloat16" else "fp32")
    try:
        train(model, m, context, settings, Limit(steps=steps), resume=checkpoint.latest(folder / "checkpoints") if resume else None)
    except StopRequested:
        return None, context
    return model, context


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_pruned(architecture, compute):
    m = method(rank=2, share=0.3, adapted_share=0.5)
    model, context = go(m, architecture, compute=compute)
    layers = dict(adapters(model))
    assert {n.rsplit(".", 1)[-1] for n in layers} == ({"q_proj", "v_proj"} if architecture == "llama" else {"c_attn"})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(2 * (x.out + x.inp) + 16 for x in layers.values())
    gone = context.state["gone"]
    whole = sum(x.out * x.inp for x in layers.values())
    assert sum(int(g.sum()) for g in gone.values()) == round(0.5 * whole)
    updates = {n: x.update().detach() for n, x in layers.items()}
    model = m.finish(model, context)
    for n, update in updates.items():
        weight = model.get_submodule(n).weight.detach()
        weight = weight.t() if architecture == "gpt2" else weight
        torch.testing.assert_close(weight[gone[n]], update[gone[n]], atol=1e-6, rtol=1e-5)      # the update alone is left there
        assert context.masks[f"{n}.weight"].all()
    rest = [(x, module) for x, module in matrices(model) if x.name not in layers]
    assert sum(int((module.weight == 0).sum()) for _, module in rest) == round(0.3 * sum(x.size for x, _ in rest))
    original = dict(micro.model(architecture).named_parameters())
    for x, module in rest:
        kept = context.masks[f"{x.name}.weight"]
        assert torch.equal(module.weight[kept], original[f"{x.name}.weight"][kept])


@pytest.mark.parametrize("prune", ["unstructured", "heads"])
def test_resume_after_the_pruning(prune, tmp_path):
    m = method(rank=2, prune=prune, prune_at=0.3)
    model, context = go(m, folder=tmp_path / "a")
    straight = m.finish(model, context).state_dict()
    _, context = go(m, folder=tmp_path / "b", pause_at=5)
    assert context.state["pruned"]
    torch.manual_seed(7)
    model, context = go(m, folder=tmp_path / "b", resume=True)
    found = m.finish(model, context).state_dict()
    assert all(torch.equal(found[k], v) for k, v in straight.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_heads_are_cut_out(architecture, tmp_path):
    m = method(rank=2, prune="heads", heads=0.5)
    before = profile(architecture)
    model, context = go(m, architecture)
    unmerged = micro.logits(model, architecture)
    model = m.finish(model, context)
    logits = micro.logits(model, architecture)
    torch.testing.assert_close(logits, unmerged, atol=1e-4, rtol=1e-4)
    after = profile_of(model, "micro", micro.TASKS[architecture])
    assert after.parameters == m.result_profile(before).parameters < before.parameters
    saved = models.save(model, micro.tokenizer(architecture), tmp_path / "m", dtype="float32")
    assert saved["weight_bytes"] == m.footprint(before, Batch(8, 24)).result
    torch.testing.assert_close(micro.logits(models.load(tmp_path / "m").model, architecture), logits, atol=1e-5, rtol=1e-5)


def test_without_pruning_the_update_is_a_lora(tmp_path):
    from peft import PeftModel
    m = method(rank=2, prune="none")
    model, context = go(m, folder=tmp_path)
    model = m.finish(model, context)
    assert not context.masks
    theirs = PeftModel.from_pretrained(micro.model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(micro.logits(theirs, "llama"), micro.logits(model, "llama"), atol=1e-4, rtol=1e-4)


def test_a_stage_that_stops_early_is_pruned_all_the_same():
    m, model = method(rank=2), micro.model("bert")
    context = micro.context(model, "bert")
    model = m.finish(m.apply(model, context), context)
    zeros = sum(int((module.weight == 0).sum()) for x, module in matrices(model) if x.role.rsplit(".", 1)[-1] not in ("query", "value"))
    assert zeros == m.zeros(context.profile) > 0


def test_budget_and_refusals():
    p = profile()
    each = sum(m.out + m.inp for m in p.matrices if m.role in ("q_proj", "v_proj"))
    chosen, reasons = method(rank="auto").fit(p, Budget(trainable=5 * each + 64 + 3))
    assert chosen.rank == 5 and "limit" in reasons["rank"]
    with pytest.raises(InputError, match="dsee.rank = 65: .* Choose at most 32"):
        method(rank=65).check(p)
    with pytest.raises(InputError, match="dsee.entries = 5000: .* has only 2,048 weights. Choose at most 2048"):
        method(entries=5000).check(p)
    with pytest.raises(InputError, match="dsee.heads = 0.0: of 4 heads none goes"):
        method(prune="heads", heads=0.0).check(p)
    with pytest.raises(InputError, match="dsee.targets = .all-linear.: a head cannot be cut out"):
        method(prune="heads", targets="all-linear").check(p)
    with pytest.raises(InputError, match="targets"):
        method(targets="nonsense").check(p)

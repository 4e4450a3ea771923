"""GaLore's optimizer against worked numbers and against Adam; what is alive during the backward pass."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines import registry
from engines.budget import Budget
from engines.errors import InputError
from engines.models import profile_of
from engines.optimizers import projected
from engines.optimizers.projected import Projected, back, basis, project, release
from engines.profile import Batch
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from tests.contract import micro


def optimizer(p, rank, *, scale=1.0, lr=1.0, eps=1e-6, refreshes=1, progress=lambda: 0.0, **more):
    return Projected([dict(params=[p], rank=rank, scale=scale, **more)], lr=lr, progress=progress, refreshes=refreshes, eps=eps, early=False)


def stepped(p, gradient, opt):
    before = p.detach().clone()
    p.grad = gradient.clone()
    opt.step()
    opt.zero_grad()
    return before - p.detach()


def test_first_step_on_ones():
    moved = stepped(p := nn.Parameter(torch.zeros(2, 2)), torch.ones(2, 2), optimizer(p, 1))
    torch.testing.assert_close(moved, torch.full((2, 2), 0.70711), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_whole_subspace_is_adam_in_a_turned_basis(shape):
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for _ in range(4)]
    p = nn.Parameter(torch.zeros(shape))
    opt = optimizer(p, min(shape), scale=0.25, lr=0.1)
    turn, _ = basis(gradients[0], min(shape))
    q = nn.Parameter(torch.zeros_like(project(gradients[0], turn)))
    adam = torch.optim.Adam([q], lr=0.1, eps=1e-12)
    for g in gradients:
        moved = stepped(p, g, opt)
        before = q.detach().clone()
        q.grad = project(g, turn)
        adam.step()
        torch.testing.assert_close(moved, 0.25 * back(before - q.detach(), turn, shape), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back(project(gradients[1], turn), turn, shape), gradients[1])


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_basis_is_that_of_the_singular_value_decomposition(shape):
    torch.manual_seed(1)
    g = torch.randn(shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    wanted = vh[:3].t() if shape[0] >= shape[1] else u[:, :3]
    found, share = basis(g, 3)
    torch.testing.assert_close((found.t() @ wanted).abs(), torch.eye(3), atol=1e-5, rtol=0)
    assert share == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), rel=1e-5)


def test_state_is_small_and_moments_outlive_a_new_projection():
    p, now = nn.Parameter(torch.zeros(6, 10)), [0.0]
    opt = optimizer(p, 2, refreshes=2, progress=lambda: now[0])
    torch.manual_seed(2)
    projections, moments = [], []
    for i in range(4):
        now[0] = i / 4
        stepped(p, torch.randn(6, 10), opt)
        projections.append(opt.state[p]["projection"].clone())
        moments.append(opt.state[p]["exp_avg_sq"].clone())
    state = opt.state[p]
    assert state["exp_avg"].numel() + state["exp_avg_sq"].numel() == 2 * 2 * 10 and state["projection"].numel() == 2 * 6
    assert torch.equal(projections[0], projections[1]) and not torch.equal(projections[1], projections[2]) and torch.equal(projections[2], projections[3])
    assert state["refreshes"] == 2 and state["step"] == 4
    assert (moments[2] > 0.99 * moments[1]).all(), "neither turned nor reset"


def trainer(accumulation=1, clip=1.0, rank=8, steps=6, model=None, **changes):
    model = model or micro.model("llama")
    method, context = registry.build({"method": "galore", "rank": rank, **changes}), micro.context(model, "llama")
    model = method.apply(model, context)
    given = TrainSettings(lr=5e-3, batch=8, length=micro.LENGTH, evaluations=1, accumulation=accumulation, clip=clip)
    return method, context, Trainer(model, method, context, given, Limit(steps=steps))


def test_full_gradients_are_gone_when_the_next_comes():
    _, _, t = trainer()
    alive = []
    for p in t.optimizer.param_groups[0]["params"]:
        p.register_post_accumulate_grad_hook(lambda p, t=t: alive.append(sum(q.grad is not None for q in t.optimizer.param_groups[0]["params"])))
    t._step()
    assert len(alive) == 14 and not any(alive)
    low = sum(8 * max(p.shape) for p in t.optimizer.param_groups[0]["params"])
    assert t.optimizer.gradient_bytes == 4 * low and not t.optimizer.low


def test_early_projection_changes_nothing():
    """Projected one by one during the backward pass, or all at the step: the same weights."""
    made = []
    for early in (True, False):
        _, context, t = trainer(clip=0.0)
        if not early:
            release(t.model)
        for _ in range(3):
            context.progress = t.progress()
            t._step()
        made.append({n: p.detach().clone() for n, p in t.model.named_parameters()})
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], atol=1e-6, rtol=1e-5)


def test_micro_batches_add_up():
    _, _, t = trainer(accumulation=2)
    t._gradients(t._batches())
    early, t.optimizer.low = t.optimizer.low, {}
    t.optimizer.zero_grad()
    release(t.model)
    t._gradients(t._batches())
    for p, low in early.items():
        torch.testing.assert_close(low, project(p.grad, t.optimizer.state[p]["projection"]), atol=1e-6, rtol=1e-4)


def test_clipping_sees_projected_gradients():
    _, _, t = trainer(rank=32)
    batches = t._batches()
    t._gradients(batches)
    norm = t.optimizer.clip(0.1)
    rest = torch.nn.utils.get_total_norm([p.grad for p in t.parameters if p.grad is not None] + list(t.optimizer.low.values()))
    assert float(norm) > 0.1 and float(rest) == pytest.approx(0.1, rel=1e-3)
    assert len(t.optimizer.low) == 14


def test_hooks_are_taken_off():
    method, context, t = trainer()
    t._step()
    p = t.optimizer.param_groups[0]["params"][0]
    model = method.finish(t.model, context)
    model(**micro.inputs("llama")).logits.sum().backward()
    assert p.grad is not None and not hasattr(p, "captured")
    rows = method.layers(model, context)["captured"]
    assert len(rows) == 14 and all(0 < value <= 1 for *_, value in rows)


def test_forecast_and_refusals():
    profile = profile_of(micro.model("llama"), "micro", "causal-lm")
    method = registry.build({"method": "galore", "rank": 4})
    full = registry.build({"method": "full"}).footprint(profile, Batch(2, 24))
    said = method.footprint(profile, Batch(2, 24))
    _, _, t = trainer(rank=4)
    t._step()
    held = sum(v.numel() * v.element_size() for s in t.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    assert said.optimizer == held < 0.4 * full.optimizer and said.gradients < 0.5 * full.gradients and said.trainable == full.trainable
    with pytest.raises(InputError, match="galore.rank = 64: .* is 32 by 64, .* Choose at most 32"):
        registry.build({"method": "galore", "rank": 64}).check(profile)
    with pytest.raises(InputError, match="no matrix called 'nothing'"):
        registry.build({"method": "galore", "targets": "nothing"}).check(profile)
    with pytest.raises(InputError, match="galore trains .* parameters, the limit is 10"):
        method.fit(profile, Budget(trainable=10))


class Largest(TorchDispatchMode):
    """Bytes of the largest block that is made while it is on."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("method", ["galore", "q-galore", "fira"])
def test_an_embedding_is_moved_in_pieces_and_states_stay_where_they_are(method, monkeypatch):
    """Whole copies of an embedding would be the worst moment of a step, and new states in every step hold the heap open."""
    monkeypatch.setattr(projected, "PIECE", 512)
    torch.manual_seed(0)
    _, context, t = trainer(method=method, model=micro.model("llama", vocab_size=1024))
    t._step()
    states = [v for s in t.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    table, widest = t.model.get_input_embeddings().weight, max(m.size for m in context.profile.matrices)
    places, step, seen = [v.data_ptr() for v in states], t.optimizer.step, []

    def watched():
        held = [*t.model.parameters(), *t.model.buffers(), *states, *t.optimizer.low.values(), *(p.grad for p in t.model.parameters() if p.grad is not None)]
        with Largest(held) as largest:
            step()
        seen.append(largest.bytes)
        assert all(p.grad is None for p in t.model.parameters()), "used gradients are let go one by one"
    t.optimizer.step = watched
    context.progress = t.progress()
    t._step()
    assert table.numel() >= 4 * widest and seen[0] <= 8 * widest < 4 * table.numel()
    now = [v for s in t.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert [v.data_ptr() for v in now] == places


@pytest.mark.parametrize("method", ["galore", "q-galore"])
def test_pieces_change_nothing(method, monkeypatch):
    made = []
    for piece in (512, 1 << 18):
        monkeypatch.setattr(projected, "PIECE", piece)
        torch.manual_seed(0)
        _, context, t = trainer(method=method, model=micro.model("llama", vocab_size=300))
        for _ in range(3):
            context.progress = t.progress()
            t._step()
        made.append([p.detach().view(torch.uint8).clone() for p in t.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_a_parameter_that_is_not_contiguous_is_moved_too():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.zeros(4, 6).t()), nn.Parameter(torch.zeros(6, 4))
    for _ in range(2):
        g = torch.randn(6, 4)
        torch.testing.assert_close(stepped(p, g, optimizer(p, 0)), stepped(q, g, optimizer(q, 0)))
    assert float(p.detach().abs().min()) > 0

"""Switches of the training loop: GradES and the spectral alarm against their sources' rules, resume, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch

from engines import models, registry
from engines.budget import Budget
from engines.errors import InputError, RunFailed, StopRequested
from engines.training import checkpoint
from engines.training.loop import Limit, Trainer
from engines.training.settings import TrainSettings
from engines.training.stage import train
from engines.training.switches.grades import Grades, total
from engines.training.switches.spectral_alignment import Alarm, SpectralAlignment, effective, leading
from tests.contract import micro

LLAMA_MATRICES = 14


def trained(switches=(), *, method="full", architecture="llama", steps=12, folder=None, wants=None, resume=None, seen=None, **changes):
    """The method's stage on a micro model; (weights, recorder, context, result)."""
    model = micro.model(architecture)
    profile = models.profile_of(model, "micro", micro.TASKS[architecture])
    method, _ = registry.build({"method": method} if isinstance(method, str) else method).fit(profile, Budget())
    context = micro.context(model, architecture, folder=folder)
    context.resuming = resume is not None
    if wants is not None:
        context.reporter.wants = lambda: wants(context)
    torch.manual_seed(0)
    model = method.apply(model, context)
    settings = TrainSettings(**{**dict(lr=5e-3, batch=8, length=micro.LENGTH, evaluations=1, items=6, weight_decay=0.1,
                                       switches=tuple(switches)), **changes})
    if seen is not None:
        seen(model, context)
    result = train(model, method, context, settings, Limit(steps=steps), resume=resume)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, context.reporter, context, result


def freezes(recorder):
    return [data for kind, _, data in recorder.events if kind == "freeze"]


# -- GradES --------------------------------------------------------------------------------------------------
def test_metric_of_one_sgd_and_one_adam_step():
    g = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    for optimizer, expected in ((torch.optim.SGD, 0.35), (torch.optim.AdamW, 0.3)):
        p = torch.nn.Parameter(torch.tensor([[0.3, 0.1], [-0.2, 0.4]]))
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer([p], lr=0.1, **({"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {})).step()
        assert float(total([p.detach() - before])) == pytest.approx(expected, abs=1e-6)
    assert float(total([g])) == 3.5
    assert float(total([g, 2 * g])) == 10.5, "the factors of one matrix are added up"
    assert float(total([torch.full((3,), 1 / 3, dtype=torch.bfloat16)])) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_tau_zero_is_the_plain_training_bit_for_bit(method):
    plain, _, _, _ = trained(method=method, steps=6)
    for metric in ("weight_change", "grad", "grad_change"):
        watched, recorder, _, _ = trained([Grades(tau=0.0, metric=metric)], method=method, steps=6)
        assert all(torch.equal(plain[n], watched[n]) for n in plain), metric
        assert not freezes(recorder)


@pytest.mark.parametrize("method, architecture, tau", [("full", "llama", 8.0), ("lora", "gpt2", 3.0), ("bone", "bert", 1.5)])
def test_frozen_matrices_stay_bit_identical_and_leave_the_optimizer(method, architecture, tau, monkeypatch):
    """AdamW with weight decay and warm moments would go on moving a matrix whose gradient is merely zero."""
    seen: list[dict] = []
    step = Trainer._step

    def spy(self):
        step(self)
        o = self.observers[0]
        for name in o.frozen:
            for p in o.components[name]:
                assert not p.requires_grad and p.grad is None and p not in self.optimizer.state, name
        seen.append({n: [p.detach().clone() for p in o.components[n]] for n in o.frozen})
    monkeypatch.setattr(Trainer, "_step", spy)
    # Under Adam the released metric is about rate times entries: small matrices pass one threshold first.
    switch = Grades(tau=tau, alpha=0.3, threshold="absolute")
    weights, recorder, context, result = trained([switch], method=method, architecture=architecture, steps=20)
    for earlier, later in zip(seen, seen[1:]):
        assert set(earlier) <= set(later), "freezing is permanent"
        for name, tensors in earlier.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, later[name])), name
    counts = [d["frozen"] for d in freezes(recorder)]
    assert counts and counts == sorted(counts) and min(d["step"] for d in freezes(recorder)) >= int(0.3 * 20)
    assert len(set(counts)) > 1, "matrices freeze one by one, not the whole model at once"
    assert recorder.maps[-1][1]["frozen"] and sum(r[2] for r in recorder.maps[-1][1]["frozen"]) == counts[-1]


def test_training_ends_when_the_share_is_frozen_and_says_so():
    _, recorder, _, result = trained([Grades(tau=1e9, alpha=0.5, threshold="absolute")], steps=20)
    assert result.steps == 10 and result.status == "finished"
    (event,) = freezes(recorder)
    assert event["frozen"] == event["of"] == LLAMA_MATRICES and event["step"] == 10
    assert any("ends the training at step 10, 50% of its budget" in text for _, text, _ in recorder.events)
    assert recorder.evaluations, "what was trained is evaluated as always"
    _, recorder, _, result = trained([Grades(tau=0.97, alpha=0.0, max_frozen=0.5)], steps=20)
    assert result.steps < 20 and freezes(recorder)[-1]["frozen"] >= LLAMA_MATRICES / 2


def test_the_first_sample_never_decides_and_components_are_matrices():
    def look(model, context):
        names = {m.name for m in context.profile.matrices}
        assert len(names) == LLAMA_MATRICES
    _, recorder, context, result = trained([Grades(tau=1e9, alpha=0.0, threshold="absolute")], method="lora", steps=6, seen=look)
    assert result.steps == 2, "the first check only fills the base"
    state = context.state["switch grades"]
    assert set(state["frozen"]) == {m.name for m in context.profile.matrices} and not state["kept"]


def test_a_pair_of_factors_is_one_component_and_costs_nothing_when_frozen():
    def both(model, context):
        from engines.adaptation import _peft
        name, layer = _peft.adapted(model)[0]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for p in (a, b):
            p.requires_grad_(False)
        x = torch.randn(2, 3, a.shape[1], requires_grad=True)
        layer(x).sum().backward()
        assert a.grad is None and b.grad is None and x.grad is not None
        for p in (a, b):
            p.requires_grad_(True)
        layer(x).sum().backward()
        assert a.grad is not None and b.grad is not None
    trained(method="lora", steps=1, seen=both)


@pytest.mark.parametrize("switches", [(Grades(tau=4.0, alpha=0.2, threshold="absolute"),), (Grades(tau=0.9, alpha=0.2, metric="grad_change"),),
                                      (SpectralAlignment(every=2), Grades(tau=6.0, alpha=0.2, interval=2, threshold="absolute"))],
                         ids=["weight_change", "grad_change", "both"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_resume_with_frozen_matrices_is_bit_identical(switches, method, tmp_path):
    straight, recorder, context, result = trained(switches, method=method, folder=tmp_path / "a", steps=14)
    at = sorted({d["step"] for d in freezes(recorder)})
    assert at and at[0] < result.steps, "something must be frozen before the pause"
    pause = at[0]
    with pytest.raises(StopRequested):
        trained(switches, method=method, folder=tmp_path / "b", steps=14, wants=lambda c: "pause" if c.step >= pause else None)
    torch.manual_seed(99)
    rest, later, again, second = trained(switches, method=method, folder=tmp_path / "b", steps=14,
                                         resume=checkpoint.latest(tmp_path / "b" / "checkpoints"))
    assert second.steps == result.steps
    assert straight.keys() == rest.keys()
    for n in straight:
        assert torch.equal(straight[n], rest[n]), n
    assert [d for d in freezes(recorder) if d["step"] > pause] == freezes(later)
    a, b = context.state["switch grades"], again.state["switch grades"]
    assert a["frozen"] == b["frozen"] and a["base"] == b["base"]


def test_a_method_that_trains_no_matrix_is_refused_with_the_remedy():
    def nothing(model, context):
        context.profile = models.profile_of(micro.model("gpt2"), "micro", "causal-lm")      # names of another model
    with pytest.raises(RunFailed, match="trains no matrix inside the blocks.*Switch it off"):
        trained([Grades()], seen=nothing)


# -- spectral alignment --------------------------------------------------------------------------------------
def diversity(weight, x):
    v = leading(weight, torch.randn(weight.shape[1], 2, generator=torch.Generator().manual_seed(0)), 50)[0][:, 0]
    side = x @ v
    return min(int((side > 0).sum()), int((side < 0).sum())) / int((side != 0).sum()), side / x.norm(dim=1) / v.norm()


def test_alignment_of_the_two_by_two_example():
    weight, x = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [-1.0, 2.0], [3.0, -1.0]])
    expected = torch.tensor([0.70710678, -0.44721360, 0.94868330])
    q, found = diversity(weight, x)
    assert q == pytest.approx(1 / 3)
    assert torch.allclose(found, expected * found[0].sign(), atol=1e-6)
    for changed, inputs in ((5.0 * weight, x), (-0.1 * weight, x), (weight, x * torch.tensor([[3.0], [0.2], [7.0]]))):
        assert diversity(changed, inputs)[0] == pytest.approx(1 / 3)


def test_leading_direction_is_on_the_input_side_and_tells_the_gap():
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 20, generator=g)
    u, s, vh = torch.linalg.svd(weight)
    plane, ratio = leading(weight, torch.randn(20, 2, generator=g), 200)
    assert abs(float(plane[:, 0] @ vh[0])) == pytest.approx(1.0, abs=1e-4) and plane.shape == (20, 2)
    assert float(ratio) == pytest.approx(float(s[0] / s[1]), rel=1e-3)
    x = torch.randn(100, 20, generator=g)
    assert torch.equal((u[:, 0] @ weight @ x.t()).sign(), (vh[0] @ x.t()).sign())


def test_equal_signs_make_the_singular_value_grow_and_paired_ones_do_not():
    lr, c = 0.1, 0.5
    weight = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
    u = v = torch.tensor([1.0, 0.0, 0.0])
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    x[:, 0] = x[:, 0].abs() + 0.1
    for rows, change in ((x, lr * c * float((x @ v).sum())), (torch.cat([x, -x]), 0.0)):
        delta = -c * u.expand(len(rows), 3)         # gradient of the outputs
        new = weight - lr * delta.t() @ rows
        assert float(u @ new @ v - u @ weight @ v) == pytest.approx(change, abs=1e-5)
        assert float(torch.linalg.svdvals(new)[0]) >= 2.0 + change - 1e-5


def test_the_alarm_sees_integers_that_are_trained():
    _, recorder, context, _ = trained([SpectralAlignment(every=2, tokens=64)], method="q-galore", steps=3)
    assert [s for s, _ in recorder.series["sign_diversity_median"]] == [0, 2]
    assert len(recorder.maps[-1][1]["diversity"]) == LLAMA_MATRICES


@pytest.mark.parametrize("method", ["full", "lora", "adalora", "bone", "q-galore"])
def test_effective_weight_is_what_the_layer_multiplies_with(method):
    def look(model, context):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.element_size() > 1:
                    p.add_(torch.randn_like(p) * 0.1)
            for m in context.profile.matrices[:4]:
                layer, x = model.get_submodule(m.name), torch.randn(5, m.inp)
                assert torch.allclose(layer(x), x @ effective(layer).t(), atol=1e-4), m.name
    trained(method=method, steps=1, seen=look)


@pytest.mark.parametrize("architecture", micro.ARCHITECTURES)
def test_the_alarm_changes_nothing_in_the_training_and_sees_every_matrix(architecture):
    plain, _, _, _ = trained(architecture=architecture, steps=5)
    watched, recorder, context, _ = trained([SpectralAlignment(every=2, tokens=64)], architecture=architecture, steps=5)
    assert all(torch.equal(plain[n], watched[n]) for n in plain)
    assert [s for s, _ in recorder.series["sign_diversity_median"]] == [0, 2, 4]
    assert all(0 <= v <= 0.5 for name in ("sign_diversity", "sign_diversity_median") for _, v in recorder.series.get(name, ()))
    rows = recorder.maps[-1][1]
    assert len(rows["diversity"]) == len(rows["gap"]) == len(context.profile.matrices)


def test_padding_and_first_positions_are_left_out():
    class Loop:
        device, parameters = "cpu", []
        model, context = micro.model("bert"), micro.context(micro.model("bert"), "bert")
    watch = Alarm(SpectralAlignment(tokens=1000), Loop)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 3:] = 0
    watch._padding(None, (), {"attention_mask": mask})
    allowed = sorted(watch._chosen((3, 6), "cpu").tolist())
    assert allowed == [1, 2, 3, 4, 5, 7, 8, 13, 14, 15, 16, 17]


def collapse(start: int, layer: str = "model.layers.0.mlp.down_proj"):
    """From step ``start`` on, a pre-hook puts all inputs of one layer on one side of its leading direction."""
    def seen(model, context):
        module = model.get_submodule(layer)

        def one_sided(_, args):
            if context.step < start:
                return None
            v = torch.linalg.svd(effective(module).detach())[2][0]
            x = args[0]
            along = x @ v
            return (x + (along.abs() - along)[..., None] * v,)
        module.register_forward_pre_hook(one_sided)
    return seen


def test_alarm_after_three_checks_below_and_only_where_signs_were_mixed_before():
    switch = SpectralAlignment(every=2, low=0.05, high=0.2, patience=3, iterations=16)
    _, recorder, context, _ = trained([switch], steps=16, lr=1e-5, seen=collapse(5))
    alarms = [(text, data) for kind, text, data in recorder.events if kind == "alarm"]
    assert len(alarms) == 1, "told once"
    text, data = alarms[0]
    assert data["matrices"] == ["model.layers.0.mlp.down_proj"] and data["over"] is False
    assert data["step"] == 10 and data["healthy_step"] == 4, "checks at 6, 8 and 10 are below"
    assert "100% of the inputs of down_proj in layer 0" in text and "lower the learning rate" in text
    _, recorder, _, _ = trained([switch], steps=12, lr=1e-5, seen=collapse(0))
    assert not [e for e in recorder.events if e[0] == "alarm"], "one-sided from the beginning: nothing to compare with"
    _, recorder, _, _ = trained([switch.replace(gap=100.0)], steps=16, lr=1e-5, seen=collapse(5))
    assert not [e for e in recorder.events if e[0] == "alarm"], "without a gap the direction means nothing"


# -- both ----------------------------------------------------------------------------------------------------
def test_switches_are_found_documented_and_guarded():
    from engines.method import FAMILIES
    found = registry.switches()
    assert list(found) == ["grades", "spectral-alignment"] and not set(found) & set(registry.methods())
    for id, cls in found.items():
        assert cls.card.id == id and cls.card.family == "switch" and cls.card.family not in FAMILIES
        assert cls.card.title and cls.card.differs and cls.card.needs and cls.card.cannot and 20 < len(cls.card.summary) < 200
        assert registry.switch(cls().settings()) == cls() == registry.switch(id)
        for row in cls.hyperparameters():
            assert len(row["help"]) > 8
            if row["low"] is not None:
                with pytest.raises(InputError):
                    cls(**{row["name"]: row["low"] - 1})
    assert "reconstructed" in found["spectral-alignment"].card.differs.lower()
    for bad, said in ((["nope"], "no such switch"), ([{"method": "grades", "taus": 1}], "no field of this name"), ([3], "named by its id")):
        with pytest.raises(InputError, match=said) as e:
            registry.switch(bad[0])
        assert e.value.remedy
    with pytest.raises(InputError, match="it is no stage.*training"):
        registry.get("grades")


def test_costs_follow_the_shapes():
    profile = models.profile_of(micro.model("llama"), "micro", "causal-lm")
    from engines.profile import Batch
    full = registry.get("full")().footprint(profile, Batch(rows=4, length=16))
    lora = registry.get("lora")().footprint(profile, Batch(rows=4, length=16))
    assert Grades().extra_bytes(profile, full) == 4 * profile.block_parameters
    assert Grades().extra_bytes(profile, lora) == lora.gradients
    assert Grades(metric="grad").extra_bytes(profile, full) == 0
    for switch in (Grades(), SpectralAlignment()):
        flops, moved = switch.step_cost(profile, full)
        assert math.isfinite(flops + moved) and 0 <= flops < 0.1 * full.flops_per_token * 64 * 24 and moved > 0

"""Merging adapters of runs: the sum is exact, what cannot be added is refused with its reason, crosstalk is what it says."""

import json
import types

import pytest
import torch

from engines import registry
from engines.adaptation import merge_adapters
from engines.budget import Budget
from engines.errors import InputError
from tests.contract import micro
from workbench import merging


def adapter(folder, architecture="bert", seed=0, **stage):
    """The adapter folder of one untrained run whose update is drawn; (folder, its merged model)."""
    model = micro.model(architecture)
    context = micro.context(model, architecture, folder=folder, seed=seed)
    method, _ = registry.build({"method": "lora", **stage}).fit(context.profile, Budget())
    model = method.apply(model, context)
    generator = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
    return folder / "adapter", method.finish(model, context)


def merged(architecture, folder=None, **fields):
    model = micro.model(architecture)
    context = micro.context(model, architecture, folder=folder)
    method = registry.build({"method": "merge-adapters", **fields})
    method.check(context.profile)
    return method.finish(method.apply(model, context), context), context, method


def change(model, architecture):
    start = dict(micro.model(architecture).named_parameters())
    return {n: p.detach() - start[n].detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("architecture, stages", [
    ("gpt2", [dict(rank=3), dict(rank=5, rslora=True, targets="attention")]),
    ("bert", [dict(method="hydra-lora", targets="all-linear"), dict(method="orthogonal-adaptation", rank=4)]),
    ("llama", [dict(method="adalora", rank=2), dict(method="nlora", form="slora", rank=4), dict(rank=2)])])
def test_the_sum_is_that_of_the_runs_own_results(architecture, stages, tmp_path):
    made = [adapter(tmp_path / str(i), architecture, i, **stage) for i, stage in enumerate(stages)]
    weights = [0.5, -1.0, 2.0][:len(made)]
    model, context, method = merged(architecture, tmp_path / "out", adapters=";".join(str(f) for f, _ in made), weights=";".join(map(str, weights)))
    changes = [change(m, architecture) for _, m in made]
    for name, found in change(model, architecture).items():
        share = sum(weights) if name.startswith("classifier") else 1.0
        wanted = sum(w * c[name] for w, c in zip(weights, changes)) / share
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    from peft import PeftModel
    again = PeftModel.from_pretrained(micro.model(architecture), tmp_path / "out" / "adapter")
    torch.testing.assert_close(micro.logits(again, architecture), micro.logits(model, architecture), atol=1e-4, rtol=1e-4)
    assert method.layers(model, context)["overlap"]


def test_overlap_and_crosstalk_on_known_factors():
    eye = torch.eye(4)
    one, same, other = {"m": (eye[:2], torch.ones(3, 2))}, {"m": (2 * eye[:2], torch.ones(3, 2))}, {"m": (eye[2:], torch.ones(3, 2))}
    assert merge_adapters._overlap([one, same]) == {"m": pytest.approx(1.0)}
    assert merge_adapters._overlap([one, other]) == {"m": pytest.approx(0.0)}
    # On data of i the others are as loud as the square root of the ratio of energies.
    assert merge_adapters._crosstalk({0: {"m": [4.0, 1.0]}, 1: {"m": [9.0, 1.0]}}) == {"m": pytest.approx((0.5 + 3.0) / 2)}
    assert merge_adapters._crosstalk({0: {"m": [0.0, 1.0]}, 1: {"m": [None, 1.0]}}) == {}


def test_orthogonal_adapters_disturb_one_another_less_than_lora(tmp_path, monkeypatch):
    data = micro.data("bert").table
    monkeypatch.setattr("engines.data.load", lambda *a, **k: data)
    seen = {}
    for name, stage in (("orthogonal", dict(method="orthogonal-adaptation", rank=8)), ("lora", dict(rank=8))):
        folders = [adapter(tmp_path / name / str(i), "bert", i, **stage, **(dict(adapter_number=i + 1) if name == "orthogonal" else {}))[0] for i in range(2)]
        _, context, _ = merged("bert", adapters=";".join(map(str, folders)), data=json.dumps(["a", "b"]))
        seen[name] = context.state["overlap"]
        assert [r["weight"] for r in context.state["parents"]] == [1.0, 1.0] and context.state["crosstalk"].keys() == seen[name].keys()
        assert [k for k, _, _ in context.reporter.events] == ["merge", "merge"]
    assert max(seen["orthogonal"].values()) < 1e-5 < 0.05 < min(seen["lora"].values())


def test_alone_figures_are_those_of_the_runs(tmp_path, monkeypatch):
    from engines.evaluation import evaluate
    monkeypatch.setattr("engines.data.load", lambda *a, **k: micro.data("bert").table)
    made = [adapter(tmp_path / str(i), "bert", i) for i in range(2)]
    model, context, _ = merged("bert", adapters=";".join(str(f) for f, _ in made), data='["a", "b"]')
    for row, (_, own) in zip(context.state["parents"], made):
        assert row["alone"] == pytest.approx(evaluate(own, context.data).value)
        assert row["merged"] == pytest.approx(evaluate(model, context.data).value)


def test_refusals_of_adapters(tmp_path):
    good, _ = adapter(tmp_path / "good")
    for fields, words in [
            (dict(adapters=str(good)), "takes two adapters or more"),
            (dict(adapters=f"{good};{tmp_path}"), "there is no adapter that can be read"),
            (dict(adapters=f"{good};{adapter(tmp_path / 'dora', dora=True)[0]}"), "DoRA rescales whole rows"),
            (dict(adapters=f"{good};{good}", weights="1;2;3"), "not 2 numbers other than zero"),
            (dict(adapters=f"{good};{good}", weights="1;-1"), "add up to zero, and classification heads are averaged"),
            (dict(adapters=f"{good};{good}", data="[1]"), "not a JSON list with one entry for each adapter")]:
        with pytest.raises(InputError, match=words) as refused:
            merged("bert", **fields)
        assert refused.value.remedy
    with pytest.raises(InputError, match="in micro it is not there. Merge adapters of one base model"):
        merged("gpt2", adapters=f"{good};{good}")
    config = json.loads((good / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for changes, words in [(dict(base_model_name_or_path="elsewhere"), "trained for elsewhere, not for micro"),
                           (dict(peft_type="VERA"), "a VERA adapter is not a product of two factors")]:
        (other / "adapter_config.json").write_text(json.dumps(config | changes))
        (other / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
        with pytest.raises(InputError, match=words):
            merged("bert", adapters=f"{good};{other}")


def test_other_heads_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    (good, _), (other, _) = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    state = load_file(other / "adapter_model.safetensors")
    state = {k: torch.zeros(7, *v.shape[1:]) if "classifier" in k else v for k, v in state.items()}
    save_file(state, other / "adapter_model.safetensors")
    with pytest.raises(InputError, match="its head tells 7 labels apart, that of .* 3. Merge runs on the same labels"):
        merged("bert", adapters=f"{good};{other}")


def home_with(tmp_path, runs):
    """A home whose store knows ``runs`` as (name, model, method, has an adapter)."""
    rows = {}
    for i, (name, model, method, has) in enumerate(runs, 1):
        rows[i] = dict(id=i, name=name, status="finished", forecast=None, spec=dict(model=model, data=f"{name}-data", pipeline=[{"method": method}], seed=i))
        if has:
            adapter(tmp_path / str(i))
    number = {r["name"]: i for i, r in rows.items()}
    store = types.SimpleNamespace(run=lambda i: rows[i], run_id=lambda given: number.get(given, given))
    return types.SimpleNamespace(store=store, folder=lambda i: tmp_path / str(i))


def test_the_spec_of_a_merge(tmp_path):
    home = home_with(tmp_path, [("a", "m", "lora", True), ("b", "m", "lora", True), ("c", "other", "lora", True), ("d", "m", "mosa", False)])
    made = merging.spec(["a", 2], [1, 0.5], "both", home=home)
    method = made.pipeline[0]
    assert method.folders() == [str(tmp_path / "1" / "adapter"), str(tmp_path / "2" / "adapter")] and method.factors() == [1.0, 0.5]
    assert method.sources() == ["a-data", "b-data"] and (made.model, made.data.source, made.name, made.seed) == ("m", "a-data", "both", 1)
    for ids, weights, words in [(["a"], None, "two different runs or more"), (["a", "a"], None, "two different runs or more"),
                                (["a", "c"], None, "it adapts other, a m"), (["a", "d"], None, r"its stages \(MoSA .*\) left no separate adapter"),
                                (["a", "b"], [1, 2, 3], "2 runs take as many weights")]:
        with pytest.raises(InputError, match=words):
            merging.spec(ids, weights, home=home)

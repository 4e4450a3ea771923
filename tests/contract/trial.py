"""One stage of one method on one micro model, carried out once and looked at by many tests."""

from __future__ import annotations

import functools
import tempfile
import types
from pathlib import Path

import torch

from engines import models, registry
from engines.budget import Budget
from engines.profile import Batch
from engines.training.loop import Limit
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro

STEPS = 20
BATCH = Batch(rows=16, length=micro.LENGTH)
VARIANTS = {
    "magnitude": [dict(schedule="gradual"), dict(pattern="2:4", distribution="uniform"), dict(distribution="global", sparsity=0.7),
                  dict(distribution="evolution", generations=4, search_tokens=64), dict(schedule="gradual", distribution="rd", search_tokens=64)],
    "random": [dict(distribution="erk", sparsity=0.6)],
    "wanda": [dict(pattern="2:4"), dict(distribution="rd", search_tokens=64), dict(distribution="erk", group="layer")],
    "bone": [dict(form="miss")],
    "kd-lora": [dict(targets="all-linear", dropout=0.0, weight=0.3, temperature=1.0)],
    "sparselora": [dict(targets="all-linear", rank=4, mlp=0.5, mlp_from=0.0, attention_from=0.0, start=0.0)],
    "corda": [dict(form="kpm", rank=4, alpha=8.0)],
    "dsee": [dict(rank=4, targets="attention", share=0.4, by="sum", support="magnitude")],
    "eva": [dict(rank=4, rho=1.0, samples=48)],
    "q-galore": [dict(rank=4, refreshes=4, scale=2.0, targets="attention")],
    "fira": [dict(rank=4, refreshes=3, by="matrix", scale=1.0)],
    "hyperfitting": [dict(passes=4, samples=32, texts=0)],
    "galore": [dict(rank=4, refreshes=3, scale=2.0, targets="mlp")],
    "lisa": [dict(blocks=1, draws=4, state="all")],
    "hydra-lora": [dict(targets="all-linear", biases=True, sequential_rank=2, dropout=0.05)],
    "increlora": [dict(rank=3, grow=5, scaling="constant", orthogonality=0.0)],
    "sara": [dict(share=0.5, threshold=0.05, side=8, again=0.25, nuclear=0.01)],
    "sensitivity-lora": [dict(form="inputs", most=1.0, rank=4)],
    "lora": [dict(dora=True), dict(rslora=True, targets="attention", rank=4), dict(ranks="gradient", rank=6)],
    "allora": [dict(by="outputs", rank=4)],
    "loldu": [dict(rank=20, start="uniform", train_scale=False, alpha=10.0)],
    "lamda": [dict(ranks="energy", freeze_share=0.6), dict(start="random", freeze_share=1.0, alpha=8.0)],
    "mosa": [dict(whole="none", experts=2, bottleneck=6, scale=1.0), dict(whole="up", consistency=0.0, experts=3, dropout=0.0)],
    "nlora": [dict(form="slora"), dict(form="inttune", rank=32, residual=True, alpha=64.0)],
    "orthogonal-adaptation": [dict(rank=6, adapter_number=3, basis="gaussian")],
    "randlora": [dict(rank=6, basis="sparse")],
    "s2ft": [dict(d_ratio=0.3, u_ratio=0.2, o_ratio=0.5, v_ratio=0.5, select="product")],
    "selective-lora": [dict(rank=4, penalty=20.0, warmup=0.5)],
    "spiel": [dict(growth="momentum", density=0.03, every=4, window=2, policy="cosine")],
    "svfit": [dict(rank=20)],
    "structured": [dict(criterion="l2", heads=0.0), dict(criterion="taylor", channels=0.25)],
    "int8": [dict(mode="dynamic", embedding="keep")],
    "int4": [dict(group=32, symmetric=True)],
    "mixed": [dict(by="lgreco", bits=6.0), dict(by="rd", levels="2,3,4", bits=3.5, search_tokens=64),
              dict(generations=3, search_tokens=64, embedding="keep")],
    "gptq": [dict(bits=8), dict(bits=3, group=0, act_order=True, true_sequential=True, embedding="int8")],
}
"""Settings beside the defaults; a method without an entry is covered by its defaults."""


RATES = {"adalora": 8e-2, "kd-lora": 3e-2, "corda": 1e-2, "sara": 2e-2, "increlora": 8e-2, "svfit": 2e-1, "randlora": 2e-2, "loldu": 6e-2, "allora": 1e-2, "nlora": 2e-2, "lamda": 5e-2,
         "s2ft": 3e-1, "spiel": 3e-2, "dsee": 2e-2, "hydra-lora": 3e-2, "mosa": 5e-2}
"""Learning rates for twenty steps, where 5e-3 moves too little: AdaLoRA's update is a product of three small factors."""


LONGER = {"mosa": 50}
"""Steps where twenty are too few: three of four experts rest in each, and what an adapter does is multiplied by a tenth."""

OF_RUNS = ("merge-adapters",)
"""Methods that work on what other runs have left and so have no default; their own tests cover them."""


def cases() -> list[tuple[str, tuple]]:
    """(method id, settings as sorted pairs) of every registered method."""
    return [(id, tuple(sorted(settings.items()))) for id in registry.methods() if id not in OF_RUNS for settings in [{}, *VARIANTS.get(id, [])]]


def name(case) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1])])


def served(case, architecture: str) -> bool:
    """False where the card says that this architecture or its task is not served."""
    card = registry.get(case[0]).card
    return architecture not in card.refuses and micro.TASKS[architecture] in card.tasks


def build(case):
    """The method, with few calibration sequences."""
    cls = registry.get(case[0])
    few = {"samples": 6} if any(row["name"] == "samples" for row in cls.hyperparameters()) else {}
    return registry.build({"method": case[0], **few, **dict(case[1])})


def settings(method, **changes) -> TrainSettings:
    rate = RATES.get(method.card.id) or method.own_rate("") or 5e-3
    return TrainSettings(**{**dict(lr=rate, batch=16, length=micro.LENGTH, evaluations=1, items=0, warmup=0.1), **changes})


def stage(case, architecture: str, steps: int = STEPS, folder: Path | None = None, before_training=None, seed: int = 0):
    """Everything about one stage: ``types.SimpleNamespace`` with what each step of it left."""
    t = types.SimpleNamespace(case=case, architecture=architecture, task=micro.TASKS[architecture])
    model = micro.model(architecture, seed)
    t.profile = models.profile_of(model, "micro", t.task)
    t.method, t.reasons = build(case).fit(t.profile, Budget())
    t.method.check(t.profile)
    t.footprint = t.method.footprint(t.profile, BATCH)
    t.context = context = micro.context(model, architecture, folder=folder, seed=seed)
    context.total_steps = steps
    t.before = {n: p.detach().clone() for n, p in model.named_parameters()}
    t.logits_before = micro.logits(model, architecture)
    torch.manual_seed(seed * 1009)
    model = t.method.apply(model, context)
    t.logits_applied = micro.logits(model, architecture)
    t.trained = t.method.card.trains
    if t.trained:
        t.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if before_training is not None:
            before_training(t)
        t.result = train(model, t.method, context, settings(t.method), Limit(steps=steps))
    t.figures = t.method.layers(model, context)
    t.logits_unmerged = micro.logits(model, architecture)
    model = t.method.finish(model, context).eval()
    t.figures = t.method.layers(model, context) or t.figures
    t.logits = micro.logits(model, architecture)
    t.recorder, t.model = context.reporter, model
    return t


@functools.cache
def trial(case, architecture: str):
    """``stage`` carried out once, and its result saved."""
    t = stage(case, architecture, LONGER.get(case[0], STEPS))
    t.folder = Path(_home().name) / f"{name(case)}-{architecture}".replace("/", "_")
    t.saved = models.save(t.model, micro.tokenizer(architecture), t.folder, dtype="float32")
    return t


@functools.cache
def _home():
    return tempfile.TemporaryDirectory(prefix="fettle-contract-")

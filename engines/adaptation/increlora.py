"""IncreLoRA: a low-rank update that starts at rank one and grows where it matters, by pieces trained in advance."""

from __future__ import annotations

import math

from engines.adaptation import _calibration, _peft
from engines.adaptation._adapter import AdapterMethod, adapters
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, hyper, register


@register
class IncreLora(AdapterMethod):
    """W + alpha / rank B diag(e) A; at each growth the matrices of highest score wake their reserve and get another one.

    Source: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning.
    """

    card = Card(
        id="increlora", name="IncreLoRA", family="adaptation",
        title="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", year=2023,
        summary="Starts every matrix at rank one and adds rank where it matters most, from pieces that were trained in advance.",
        needs=("training data", "enough steps for the ranks to grow (some hundred)", "an optimizer of Adam's kind for the pieces in reserve"),
        cannot=("does not make the model smaller or faster", "the exact number of trained parameters is known only at the end",
                "costs a whole gradient of every matrix while ranks grow", "no separate adapter file after pruning"),
        trains=True,
        differs="Growth follows the progress through the budget: evenly from warmup to until, not every so many steps. Exactly so many "
                "matrices grow each time (ties by position), none beyond its smaller side, and the total ends at most add - 1 ranks "
                "below the target, where the released code can pass it and then never ends. Reserves that are not needed are taken out "
                "rather than set to zero. As released, growth shrinks the update (the divisor is the current rank); scaling = constant "
                "divides by the target. With micro-batches or several processes the scores of the parts are added.")

    claims = (
        Claim("above-adalora", "Higher parameter efficiency than AdaLoRA and LoRA, above all with little data (DeBERTa-v3-base on GLUE, no "
              "figures in the abstract).", ours={"method": "increlora", "rank": 4}, against={"method": "adalora", "rank": 4},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, average rank 4"),
        Claim("above-lora", "Above LoRA at equal parameters, most where they are few (DeBERTa-v3-base on GLUE, average rank 2).",
              ours={"method": "increlora", "rank": 2}, against={"method": "lora", "rank": 2},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps; equal ranks at the end, reserves on the way"),
    )

    rank: int = hyper(8, "Average rank at the end; auto takes the largest whose dearest growth obeys the limit on trainable parameters",
                      low=1, high=1024, lever="trainable", log=True)
    start: int = hyper(1, "Rank of every matrix at the start", low=1, high=256)
    add: int = hyper(0, "Ranks that a matrix gets at a time, and of its reserve; 0 means half the average rank at the end", low=0, high=64)
    grow: int = hyper(0, "Matrices that grow each time; 0 means a quarter of them", low=0, high=10000)
    warmup: float = hyper(0.1, "Share of the budget before the first growth", low=0.0, high=0.9)
    until: float = hyper(0.5, "Share of the budget by which the ranks are complete", low=0.02, high=0.95)
    alpha: float = hyper(16.0, "Scale of the update; it is divided by the rank", low=0.01, high=4096.0)
    scaling: str = hyper("rank", "Divide by the matrix's current rank, as released, or by the rank at the end (constant), so that growth "
                                 "changes nothing", choices=("rank", "constant"))
    orthogonality: float = hyper(0.1, "Weight of the term that keeps rows and columns orthogonal", low=0.0, high=100.0)
    beta1: float = hyper(0.85, "Smoothing of the score", low=0.01, high=0.999, advanced=True)
    beta2: float = hyper(0.85, "Smoothing of its uncertainty", low=0.01, high=0.999, advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    learning_rate = 3e-2
    exact_count = False
    """The forecast of trained parameters is the most that the scores can lead to, at the moment when it is largest."""

    # -- from shapes -------------------------------------------------------------------------------------
    def piece(self, rank: int) -> int:
        return self.add or max(1, rank // 2)

    def growths(self, matrices: int, rank: int) -> int:
        """How often a single matrix grows, summed over matrices."""
        return (rank - self.start) * matrices // self.piece(rank)

    def each(self, matrices: int) -> int:
        """Matrices that grow at a time."""
        return min(matrices, self.grow or math.ceil(matrices / 4))

    def check(self, profile) -> None:
        super().check(profile)
        if self.rank != AUTO:
            if self.start > self.rank:
                raise InputError("increlora.start", self.start, f"ranks only grow, and the average at the end is {self.rank}",
                                 f"Give at most {self.rank}")
            if self.start < self.rank < self.start + self.piece(self.rank) / max(1, len(self.targeted(profile))):
                raise InputError("increlora.add", self.add, "not even one matrix can grow by so much", "Choose a smaller piece, or 0")
        if self.warmup >= self.until:
            raise InputError("increlora.until", self.until, f"the first growth comes at {self.warmup}, so nothing is left to grow in",
                             "Choose a share above warmup")

    def allowed(self, found, size: int) -> bool:
        return size >= self.start

    def trained(self, profile, size: int | None = None) -> int:
        size, found = self.size() if size is None else size, self.targeted(profile)
        head, caps, piece = _peft.head_parameters(profile), [min(m.out, m.inp) for m in found], self.piece(size)

        def most(total):
            return _calibration.most_parameters(found, total, caps, self.start) + total
        first, times = self.start * len(found), self.growths(len(found), size)
        if times <= 0:
            return most(first) + head
        # Just before the last growth every matrix still has its reserve.
        last = times % self.each(len(found)) or min(times, self.each(len(found)))
        reserves = piece * sum(m.out + m.inp for m in found)
        return max(most(first + times * piece), most(first + (times - last) * piece) + reserves) + head

    def inner_rank(self, size: int) -> int:
        return size + self.piece(size)

    def extra_bytes(self, profile, batch, found) -> int:
        # The gradient and the value of one whole update at a time.
        return 8 * max(m.size for m in found)

    # -- in a live model ---------------------------------------------------------------------------------
    def build(self, matrix, module, context, generator, mask):
        from engines.layers.increlora import Growing
        seed = int(torch.randint(2**31, (), generator=generator))
        return Growing(module, self.start, self.piece(self.rank), self.alpha, self.rank if self.scaling == "constant" else 0, seed, mask=mask)

    def apply(self, model, context):
        model = super().apply(model, context)
        layers = dict(adapters(model))
        past = {}
        if context.resuming and context.checkpoint is not None:
            from engines.training.checkpoint import state_of
            past = state_of(context.checkpoint)
        context.state.update(growth=past.get("growth", []), left=past.get("left", self.growths(len(layers), self.rank)))
        if context.state["left"] or context.state["growth"]:
            for layer in layers.values():
                layer.reserve(0)
        for event, row in enumerate(context.state["growth"], 1):
            for name in row["names"]:
                layers[name].wake(event)
                layers[name].reserve(event)
        if not context.state["left"]:
            for layer in layers.values():
                layer.retire()
        self._watch(layers, context)
        return model

    @staticmethod
    def _watch(layers: dict, context) -> None:
        for layer in layers.values():
            layer.watched, layer.heard = bool(context.state["left"]), None

    def parameter_groups(self, model, context):
        layers = [layer for _, layer in adapters(model)]
        own = {id(p) for layer in layers for p in layer.parameters()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        groups = [{"params": [p for layer in layers for p in layer.joined(0)] + others}]
        for event, row in enumerate(context.state["growth"], 1):
            groups.append({"params": [p for layer in layers for p in layer.joined(event)], "born": row["progress"]})
        return groups

    def loss(self, model, loss, context):
        if not self.orthogonality:
            return loss
        from engines.layers.increlora import orthogonality
        with torch.autocast(loss.device.type, enabled=False):
            return loss + self.orthogonality * orthogonality([layer for _, layer in adapters(model)])

    def after_step(self, model, context) -> None:
        state = context.state
        if not state["left"]:
            return
        layers = dict(adapters(model))
        self.observe(layers, state)
        due, last = self.due(context.progress, len(layers)), self.due(1.0, len(layers))
        resting: set[str] = set()
        # At the last one nothing may be left over, also where few matrices could grow.
        while state["left"] and (len(state["growth"]) < due or due == last):
            self.enlarge(layers, context, resting)

    def observe(self, layers: dict, state: dict) -> None:
        """Update the smoothed scores and their smoothed deviation with what the layers heard in this step."""
        import numpy as np

        from engines.training import distributed
        now = np.array([float(layer.heard) if layer.heard is not None else 0.0 for layer in layers.values()])
        group = distributed.current()
        if group is not None:
            now = group.total(now)
        mean, spread = np.array(state.get("mean", [0.0] * len(now))), np.array(state.get("spread", [0.0] * len(now)))
        mean = self.beta1 * mean + (1 - self.beta1) * now
        spread = self.beta2 * spread + (1 - self.beta2) * np.abs(now - mean)
        state["mean"], state["spread"] = mean.tolist(), spread.tolist()
        for layer in layers.values():
            layer.heard = None

    def due(self, progress: float, matrices: int) -> int:
        """How many growths there should have been at this share of the budget."""
        times = math.ceil(self.growths(matrices, self.rank) / self.each(matrices))
        if progress < self.warmup:
            return 0
        return min(times, math.floor(times * (progress - self.warmup) / (self.until - self.warmup) + 1e-9))

    def enlarge(self, layers: dict, context, resting: set) -> None:
        """One growth: the best-scored matrices wake their reserves, which are trained as a group of their own from now on.

        Args:
            resting: matrices that have grown in this step, which come again only after all others.
        """
        state = context.state
        score = {n: m * s for n, m, s in zip(layers, state["mean"], state["spread"])}
        able = [n for n, layer in layers.items() if layer.rank + layer.add <= layer.most]
        if not able:
            state["left"] = 0
        if resting.issuperset(able):
            resting.clear()
        ranked = sorted(able, key=lambda n: (n in resting, -score[n]))[:min(self.each(len(layers)), state["left"])]
        resting.update(ranked)
        state["left"] -= len(ranked)
        state["growth"] = [*state["growth"], {"progress": context.progress, "names": ranked}]
        event = len(state["growth"])
        for name in ranked:
            layers[name].wake(event)
            layers[name].reserve(event)
        optimizer = context.optimizer
        if not state["left"]:
            gone = {id(p) for layer in layers.values() for p in layer.retire()}
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) in gone:
                        optimizer.state.pop(p, None)
                group["params"] = [p for p in group["params"] if id(p) not in gone]
            self._watch(layers, context)
            context.reporter.log(f"the ranks are complete: {sum(layer.rank for layer in layers.values())} in {len(layers)} matrices")
        joined = [p for name in layers for p in layers[name].joined(event)]
        decay = optimizer.param_groups[0]["weight_decay"]
        for part, weight in (([p for p in joined if p.dim() >= 2], decay), ([p for p in joined if p.dim() < 2], 0.0)):
            if part:
                optimizer.add_param_group(dict(params=part, lr_scale=1.0, weight_decay=weight, born=context.progress))

    def finish(self, model, context):
        for _, layer in adapters(model):
            layer.retire()
        if context.state["left"]:
            context.reporter.log(f"stopped before the ranks were complete: {context.state['left']} growths did not happen")
        return super().finish(model, context)

    def layers(self, model, context):
        return _peft.place_map(model, adapters(model), "rank", lambda layer: layer.rank)

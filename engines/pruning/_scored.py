"""Pruning by a score of each weight, once or gradually during training: what random and magnitude share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engines import cost
from engines.errors import InputError
from engines.method import Card, Footprint, Method, hyper
from engines.profile import BYTES
from engines.pruning import _masks, _ratios


class CardBySchedule:
    """A method's card that says ``trains`` when the instance prunes gradually, so that the stage gets its training loop."""

    def __init__(self, card: Card):
        self.once, self.gradual = card, dataclasses.replace(card, trains=True)

    def __get__(self, instance, owner=None) -> Card:
        return self.gradual if instance is not None and getattr(instance, "schedule", "") == "gradual" else self.once


@dataclass(frozen=True)
class Scored(Method):
    """Zeroes the weights of smallest ``score``; subclasses give the score and the card."""

    sparsity: float = hyper(0.5, "Share of the weights inside the blocks that become zero", low=0.0, high=0.99)
    distribution: str = hyper("uniform", "How zeros are shared out: the same share in every matrix, one threshold for all of them, more "
                                         "zeros in larger matrices (erk), least measured distortion of the output (rd, RD-Prune's "
                                         "dynamic program), or a search by the whole model's divergence (evolution, EvoPress)",
                              choices=_masks.DISTRIBUTIONS)
    schedule: str = hyper("one-shot", "At once without training, or step by step while all weights are trained",
                          choices=("one-shot", "gradual"))
    start: float = hyper(0.0, "Gradual: share of the budget before the first zeros", low=0.0, high=0.95, advanced=True)
    end: float = hyper(0.6, "Gradual: share of the budget at which the full sparsity is reached", low=0.05, high=1.0, advanced=True)
    updates: int = hyper(40, "Gradual: number of times that zeros are added", low=1, high=10000, advanced=True)
    rounds: int = hyper(3, "Gradual with rd or evolution: times that ratios are measured, each on the model as it is then", low=1, high=1000,
                        advanced=True)
    step: float = _ratios.step_field()
    search_tokens: int = _ratios.tokens_field()
    generations: int = _ratios.generations_field()
    offspring: int = _ratios.offspring_field()

    pattern = "unstructured"

    def score(self, matrix, module, context):
        """Scores of one matrix, [out, in], none negative; the smallest are pruned. Equal at each call between two steps."""
        raise NotImplementedError

    # -- before the run ----------------------------------------------------------------------------------
    def check(self, profile) -> None:
        id = self.card.id
        if not profile.matrices:
            raise InputError("model", profile.source, "it has no dense matrices inside blocks (perhaps they are packed already)",
                             "Start from a model that is not quantized")
        _ratios.check(self, profile)
        if self.schedule == "gradual":
            _masks.check_share(f"{id}.end", self.start, self.end)
        if self.pattern == "unstructured":
            return
        if self.schedule == "gradual":
            raise InputError(f"{id}.pattern", self.pattern, "a fixed pattern has no sparsity in between to pass through",
                             "Set schedule to one-shot, or pattern to unstructured")
        zeros, width = _masks.groups(self.pattern)
        if abs(self.sparsity - zeros / width) > 1e-9:
            raise InputError(f"{id}.sparsity", self.sparsity, f"the pattern {self.pattern} fixes it at {zeros / width}",
                             f"Set sparsity to {zeros / width}, or pattern to unstructured")
        _masks.check_pattern(id, profile, self.pattern)

    def fit(self, profile, budget):
        limit = budget.trainable_count(profile.parameters)
        if self.schedule == "gradual" and limit is not None and profile.parameters > limit:
            raise InputError("budget.trainable", budget.trainable, f"gradual pruning trains all {profile.parameters:,} parameters, the limit "
                             f"is {limit:,}", "Prune one-shot and recover with lora, or raise the limit")
        return self, {}

    def footprint(self, profile, batch) -> Footprint:
        shapes = [(m.out, m.inp) for m in profile.matrices]
        total = max(1, profile.block_parameters)
        share = _masks.total_zeros(shapes, self.sparsity, self.distribution) / total
        # A score, its selection and the masks; one matrix at a time.
        extra = 20 * cost.largest_matrix(profile) + profile.block_parameters
        more = {}
        if self.distribution in _ratios.SEARCHED:
            found = _ratios.footprint(self, profile, batch)
            extra += found["extra"]
            more = dict(activations=found["activations"], calibration_tokens=found["tokens"], flops_per_token=profile.flops_per_token)
        if self.schedule != "gradual":
            return cost.without_training(profile, batch, extra=extra, sparsity=share, **more)
        return Footprint(**cost.with_training(profile, batch, trainable=profile.parameters, frozen=False, backward=2.0,
                                              size=BYTES.get(batch.weights, 4), extra=extra), sparsity=share)

    # -- in the run --------------------------------------------------------------------------------------
    def apply(self, model, context):
        if self.schedule == "gradual":
            model.requires_grad_(True)
            context.state["updates"] = 0
        else:
            self._prune(model, context, self.sparsity)
        return model

    def before_step(self, model, context) -> None:
        if self.schedule != "gradual":
            return
        share = (context.progress - self.start) / (self.end - self.start)
        reached = min(self.updates, int(share * self.updates + 1e-9)) if share > 0 else 0
        if reached > context.state["updates"]:
            context.state["updates"] = reached
            if self.distribution in _ratios.SEARCHED:
                self._prune_round(model, context, reached)
            else:
                self._prune(model, context, _masks.cubic(reached / self.updates, 0.0, 1.0, self.sparsity))

    def finish(self, model, context):
        if self.schedule == "gradual" and context.state["updates"] < self.updates:
            # Stopped early, or so few steps that the last update had no step of its own.
            context.state["updates"] = self.updates
            self._prune(model, context, self.sparsity)
        return model

    def layers(self, model, context):
        return _masks.sparsity_map(model)

    def _prune(self, model, context, sparsity: float) -> None:
        from engines.models import matrices
        found = {m.name: (m, module) for m, module in matrices(model)}
        shapes = [(m.out, m.inp) for m, _ in found.values()]
        if self.pattern != "unstructured":
            for m, module in found.values():
                _masks.put(context, m, module, _masks.smallest_in_groups(self.score(m, module, context), *_masks.groups(self.pattern)))
        elif self.distribution == "global":
            chosen = _masks.smallest_of_all(lambda n: self.score(*found[n], context), list(found), _masks.total_zeros(shapes, sparsity, "global"))
            for name, (m, module) in found.items():
                _masks.put(context, m, module, chosen[name])
        else:
            counts = _masks.zero_counts(shapes, sparsity, self.distribution)
            if self.distribution in _ratios.SEARCHED and self.schedule == "gradual":
                # The end of a stage that was broken off: what is missing is shared out without another search.
                there = _masks.zeros_there(found.values(), context)
                counts = _ratios.anchors(counts, there, [m.size for m, _ in found.values()])
            elif self.distribution in _ratios.SEARCHED:
                counts = self._sought(model, context, list(found.values()), counts)
            self._put(found.values(), context, counts)

    def _put(self, found, context, counts) -> None:
        for (m, module), count in zip(found, counts):
            _masks.put(context, m, module, _masks.smallest(self.score(m, module, context), count))

    def _sought(self, model, context, found, base) -> list[int]:
        return _ratios.sought(self, model, context, found, lambda m, module: self.score(m, module, context), _masks.smallest, base,
                              _masks.zeros_there(found, context))

    def _prune_round(self, model, context, update: int) -> None:
        """One update of a gradual schedule whose ratios are measured ``rounds`` times, on the model pruned so far."""
        from engines.models import matrices
        found, state = matrices(model), context.state
        shapes = [(m.out, m.inp) for m, _ in found]
        now = min(self.rounds, -(-update * self.rounds // self.updates))
        last = now * self.updates // self.rounds
        if state.get("round") != now:
            goal = _masks.zero_counts(shapes, _masks.cubic(max(last, update) / self.updates, 0.0, 1.0, self.sparsity), "uniform")
            there = _masks.zeros_there(found, context)
            state.update(round=now, there=there, zeros=self._sought(model, context, found, goal))
        there, goal = state["there"], state["zeros"]
        if update < last:
            wanted = sum(_masks.zero_counts(shapes, _masks.cubic(update / self.updates, 0.0, 1.0, self.sparsity), "uniform"))
            share = min(1.0, max(0.0, (wanted - sum(there)) / max(1, sum(goal) - sum(there))))
            goal = [a + int(share * (b - a)) for a, b in zip(there, goal)]
        self._put(found, context, goal)

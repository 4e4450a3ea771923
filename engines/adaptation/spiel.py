"""SpIEL: a short list of changed entries for each matrix, exchanged again and again for places with larger gradients."""

from __future__ import annotations

import math

from engines import cost
from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters, change_map, merge
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, Footprint, hyper, register


@register
class Spiel(AdapterMethod):
    """W + scatter(values, index); the entries that moved least are dropped and as many grown, by gradients or by SM3's sums.

    Source: Scaling Sparse Fine-Tuning to Large Language Models.
    """

    card = Card(
        id="spiel", name="SpIEL", family="adaptation", title="Scaling Sparse Fine-Tuning to Large Language Models", year=2024,
        summary="Trains a short list of single weights in each matrix and keeps moving it to where the gradients are largest.",
        needs=("training data", "time for one dense gradient of each matrix in every pass, which is not kept"),
        cannot=("does not make the model smaller or faster", "cannot train packed int8 or int4 weights",
                "no separate adapter file: peft's sparse adapters do not store which entries they chose",
                "no faster than full fine-tuning in the backward pass"),
        trains=True,
        differs="An entry's age counts the steps that its moments know, so that the correction of regrown entries is exact (the released "
                "code is one step behind). The first exchange comes at the latest after a quarter of the budget, and the share that is "
                "exchanged falls with the progress through the budget. Gradients of micro-batches are counted without the division by "
                "their number. Adam's betas are the run's, 0.9 and 0.95 for language models (the paper: 0.999). The paper's weight decay "
                "of 30 goes with a rate of 1e-5; here it is 0.1. Matrices get whole numbers of entries, rounded down.")

    claims = (
        Claim("above-lora", "Often above LoRA with equal trained parameters (LLaMA-2 7B and 13B, instructions, budget of LoRA rank 64).",
              ours={"method": "spiel", "density": 0.0194}, against={"method": "lora", "rank": 4},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("ma-above-lora", "The variant with SM3 is above LoRA, too, with equal trained parameters.",
              ours={"method": "spiel", "density": 0.0194, "growth": "momentum"}, against={"method": "lora", "rank": 4},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps"),
        Claim("seconds-lora", "Comparable run time to LoRA.", ours={"method": "spiel", "density": 0.0194}, against={"method": "lora", "rank": 4},
              measure="seconds", expect="at most", factor=1.25, differs="5.3 M parameters on a CPU; a quarter more counts as comparable",
              batch=16, length=256),
        Claim("ma-optimizer", "The variant with SM3 needs less optimizer memory than the one with Adam.",
              ours={"method": "spiel", "density": 0.0194, "growth": "momentum"}, against={"method": "spiel", "density": 0.0194},
              measure="optimizer", expect="at most", factor=0.5, differs="5.3 M parameters"),
    )

    density: float = hyper(0.01, "Changed entries as a share of all parameters of the model; auto takes the largest that obeys the limit on "
                                 "trainable parameters", low=1e-6, high=0.5, lever="trainable", log=True)
    growth: str = hyper("gradient", "New entries by gradients summed over a window, with Adam (gradient, SpIEL-AG), or by SM3's sums of rows "
                                    "and columns, with less optimizer memory (momentum, SpIEL-MA)", choices=("gradient", "momentum"))
    every: int = hyper(20, "Optimizer steps between two exchanges of entries", low=2, high=100_000)
    window: int = hyper(5, "Optimizer steps over which gradients of the candidates are summed", low=1, high=10_000)
    rate: float = hyper(0.2, "Share of the entries that is exchanged at first; it falls to zero with the budget. The very first exchange "
                             "replaces all", low=0.0, high=1.0)
    policy: str = hyper("linear", "How that share falls", choices=("linear", "cosine"), advanced=True)
    decay: float = hyper(0.1, "Pull of the changes towards zero, times the learning rate", low=0.0, high=1000.0, advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    size_field = "density"

    @property
    def learning_rate(self) -> float:
        """SM3 divides by the largest gradients that a row or a column has seen: its steps are smaller than Adam's at the same rate."""
        return 2e-2 if self.growth == "momentum" else 2e-3

    # -- from shapes -------------------------------------------------------------------------------------
    def share(self, found, parameters: int, density: float | None = None) -> dict[str, int]:
        """Matrix name -> entries: the total is shared out by size, rounded down."""
        density = self.size() if density is None else density
        total, whole = int(density * parameters + 1e-6), sum(m.size for m in found)
        return {m.name: total * m.size // whole for m in found}

    def size(self) -> float:
        return 0.01 if self.density == AUTO else self.density

    def trained(self, profile, size: float | None = None) -> int:
        return sum(self.share(self.targeted(profile), profile.parameters, size).values()) + _peft.head_parameters(profile)

    def check(self, profile) -> None:
        found = self.targeted(profile)
        _peft.check_rank("spiel", "density", AUTO, found, self.targets)
        if self.window >= self.every:
            raise InputError("spiel.window", self.window, f"windows overlap when entries are exchanged every {self.every} steps",
                             f"Choose at most {self.every - 1}")
        if self.density == AUTO:
            return
        whole, counts = sum(m.size for m in found), self.share(found, profile.parameters)
        if sum(counts.values()) > whole // 2:
            raise InputError("spiel.density", self.density, f"the chosen matrices have {whole:,} weights, and half of them must stay free to be grown",
                             f"Choose at most {math.floor(1e4 * whole / 2 / profile.parameters) / 1e4:g}, or more targets")
        if not any(counts.values()):
            raise InputError("spiel.density", self.density, f"it leaves less than one entry for each of {len(found)} matrices",
                             f"Choose at least {math.ceil(1e6 * whole / max(m.size for m in found) / profile.parameters) / 1e6:g}")

    def largest(self, profile, budget):
        limit, found = budget.trainable_count(profile.parameters), self.targeted(profile)
        if limit is None:
            whole = sum(m.size for m in found)
            least = math.ceil(whole / max(m.size for m in found)) / profile.parameters
            return max(0.01, least), "no limit on trainable parameters: the usual density"
        entries = min(limit - _peft.head_parameters(profile), sum(m.size for m in found) // 2)
        chosen = entries / profile.parameters
        if entries < 1 or chosen < 1e-6 or not any(self.share(found, profile.parameters, chosen).values()):
            raise InputError("budget.trainable", budget.trainable, f"after the classification head {max(0, entries):,} entries are left for {len(found)} "
                             "matrices, which is less than one for each", "Raise the limit, or change fewer matrices with targets")
        return min(0.5, chosen), f"{self.trained(profile, chosen):,} trainable parameters obey the limit of {limit:,}"

    def footprint(self, profile, batch) -> Footprint:
        found, counts = self.targeted(profile), self.share(self.targeted(profile), profile.parameters)
        trainable, entries, head = self.trained(profile), sum(counts.values()), _peft.head_parameters(profile)
        weights, half = cost.held_bytes(profile, batch.weights), batch.compute == "bfloat16"
        if half and batch.weights == "float32":
            weights -= 2 * sum(m.size for m in found)
        gradient, largest = self.growth == "gradient", max((m.size for m in found), default=0)
        # Places, candidates and their sums (of the window and of the step); one matrix with its changes and its dense gradient.
        extra = (20 if gradient else 12) * entries + (4 if half else 8) * largest
        parts = cost.with_training(profile, batch, trainable=trainable, frozen=True, backward=1.0, weights=weights, adapter=8 * entries + 4 * head,
                                   adapted=tuple(dict.fromkeys(m.role for m in found)), extra=extra)
        parts["optimizer"] = 12 * trainable if gradient else 4 * (sum(m.out + m.inp for m in found if counts[m.name]) + head)
        parts["flops_per_token"] += 2.0 * sum(m.size for m in found)
        return Footprint(**parts)

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.adaptation._adapter import wrap
        from engines.models import matrices
        named = matrices(model)
        found = _peft.choose([m for m, _ in named], self.targets, tuple(dict.fromkeys(m.role for m, _ in named)))
        counts = self.share(found, context.profile.parameters)
        chosen = [(m, module) for m, module in named if counts.get(m.name)]
        _peft.prepare(model, context, [m.name for m, _ in chosen])

        def build(matrix, module, context, generator, mask):
            from engines.layers.spiel import SparseDelta
            order = torch.randperm(matrix.size, generator=generator)
            if mask is not None:      # places that were pruned come last
                order = order[torch.argsort((~mask.cpu().reshape(-1)[order]).to(torch.int8), stable=True)]
            return SparseDelta(module, order[:counts[matrix.name]], mask=mask)
        wrap(model, context, chosen, build)
        context.state.update(open=self.growth == "gradient", fresh=True, micro=0, counted=0, exchanges=0)
        return model

    def parameter_groups(self, model, context):
        values = [layer.values for _, layer in adapters(model)]
        known = {id(p) for p in values}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": values, "pull": self.decay}, *([{"params": rest}] if rest else [])]

    def optimizer(self, groups, settings, context):
        from engines.optimizers.spiel import SM3, AgedAdamW
        if self.growth == "momentum":
            made = SM3(groups, lr=settings.lr)
        else:
            made = AgedAdamW(groups, lr=settings.lr, betas=(0.9, 0.95) if context.task == "causal-lm" else (0.9, 0.999))
        context.optimizer = made
        return made

    def before_step(self, model, context) -> None:
        state = context.state
        state["micro"] = 0
        for _, layer in adapters(model):
            layer.begin(state["open"], state["fresh"])

    def loss(self, model, loss, context):
        context.state["micro"] += 1
        return loss

    def after_backward(self, model, context) -> None:
        state = context.state
        if not state["open"]:
            return
        layers = [layer for _, layer in adapters(model)]
        micro = counted = state["micro"]
        group = _group()
        if group is not None:
            micro = counted = int(group.total(torch.tensor([float(micro)], dtype=torch.float64).numpy())[0])
            if state["fresh"]:
                # Candidates are those of the first process; what the others have summed in this step belongs to other places.
                counted = int(group.figures([state["micro"]])[0])
                for t in (t for x in layers for t in (x.candidates, x.step_sums, x.step_squares)):
                    if group.rank:
                        t.zero_()
                group.add([x.candidates for x in layers])
            group.add([t for x in layers for t in (x.step_sums, x.step_squares)])
        for layer in layers:
            layer.settle(micro)
        state["counted"] += counted
        state["per_step"] = micro
        state["fresh"] = False

    def due(self, context) -> bool:
        """Whether entries are exchanged after this step; the first time not later than a quarter of the budget."""
        step = context.step
        return step % self.every == self.window or not context.state["exchanges"] and context.progress >= 0.25

    def after_step(self, model, context) -> None:
        state = context.state
        if self.due(context) and (state["open"] and state["counted"] or self.growth == "momentum"):
            self.exchange(model, context)
            state["open"] = False
        if self.growth == "gradient" and not state["open"] and (context.step + 1) % self.every == 0:
            state.update(open=True, fresh=True, counted=0)
            for _, layer in adapters(model):
                layer.open()

    def share_now(self, context) -> float:
        """Share of the entries that is exchanged at this moment."""
        if not context.state["exchanges"]:
            return 1.0
        left = 1.0 - context.progress
        return self.rate * (left if self.policy == "linear" else 0.5 * (1.0 + math.cos(math.pi * context.progress)))

    def exchange(self, model, context) -> None:
        """Drop the entries that moved least and grow as many; their moments begin with what the window has seen."""
        from engines.layers.spiel import best_products, exchange
        state, share, moved, whole = context.state, self.share_now(context), 0, 0
        for _, layer in adapters(model):
            p, index = layer.values.data, layer.index.long()
            n = int(share * len(p))
            if self.growth == "momentum":
                sums = context.optimizer.sums(layer.values)
                places = best_products(sums["row"], sums["column"], index, n, layer.mask)
                slots = torch.argsort(p.abs(), stable=True)[:len(places)]
            else:
                slots, places, seen = exchange(index, p, layer.candidates.long(), layer.sums.abs(), n)
                # Gradients were counted by micro-batch, an optimizer's step has the mean of several.
                steps, count = state["counted"] / state["per_step"], state["counted"]
                context.optimizer.renew(layer.values, slots, layer.sums[seen] * steps / count, layer.squares[seen] * steps / count, steps)
            layer.index[slots] = places.to(torch.int32)
            p[slots] = 0.0
            moved, whole = moved + len(slots), whole + len(p)
        state["exchanges"] += 1
        context.reporter.log(f"exchange {state['exchanges']}: {moved:,} of {whole:,} entries moved to other places")

    def finish(self, model, context):
        if context.folder is not None:
            context.reporter.log("no separate adapter: peft's sparse adapters do not store which entries they chose; the merged model is complete")
        return merge(model)

    def layers(self, model, context):
        return change_map(model, lambda layer: float(layer.values.norm() / layer.weight.float().norm()))


def _group():
    from engines.training import distributed
    return distributed.current()

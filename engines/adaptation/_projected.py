"""What GaLore, Q-GaLore and Fira share: full-parameter training whose optimizer works in a subspace of each matrix's gradient."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _peft, _whole
from engines.method import Footprint, Method
from engines.profile import BYTES


class ProjectedMethod(Method):
    """Base with fields ``rank``, ``scale``, ``refreshes`` and ``targets``; not registered itself."""

    early = True
    """Gradients are projected as soon as autograd has them; otherwise full ones wait for the step."""
    whole = True
    eps = 1e-6

    def check(self, profile) -> None:
        _whole.refuse_packed(self, profile)
        _peft.check_rank(self.card.id, "rank", self.rank, _peft.targeted(profile, self.targets), self.targets)

    def fit(self, profile, budget):
        self.check(profile)
        _whole.refuse_limit(self, profile, budget, profile.parameters)
        return self, {}

    # -- from shapes -------------------------------------------------------------------------------------
    def numbers(self, profile) -> tuple[list, int, int, int]:
        """Projected matrices, parameters outside them, entries of all projected gradients, entries of all projections."""
        found = _peft.targeted(profile, self.targets)
        return (found, profile.parameters - sum(m.size for m in found), sum(self.rank * max(m.out, m.inp) for m in found),
                sum(self.rank * min(m.out, m.inp) for m in found))

    def work(self, widest) -> int:
        """Bytes of a new projection of the widest matrix: the gradient in float64, its product with itself, eigenvectors."""
        return 8 * widest.size + 24 * min(widest.out, widest.inp) ** 2

    def together(self, parts: dict, profile, batch, kept: int) -> None:
        """Leave of the activations in ``parts`` what lies beside the gradients.

        Before the backward pass all activations are there, and of ``kept`` entries of weights the casts for its products; while these
        go, gradients come, the output layer's first. (The common count adds both up: under AdamW the difference makes up for moments,
        which are made last and scatter over the heap.)
        """
        size = BYTES.get(batch.weights, 4)
        there = parts["activations"] + (2 * kept if batch.compute == "bfloat16" and size > 2 else 0)
        first = size * profile.vocab * profile.hidden if profile.task == "causal-lm" else 0
        parts["activations"] = max(0, there - max(0, parts["gradients"] - first))

    def footprint(self, profile, batch) -> Footprint:
        found, outside, low, projections = self.numbers(profile)
        size, widest = BYTES.get(batch.weights, 4), max(found, key=lambda m: m.size)
        parts = cost.with_training(profile, batch, trainable=profile.parameters, frozen=False, backward=2.0, size=size)
        # One full gradient at a time, or all of them; moments are float32 whatever the type of the weights.
        parts["gradients"] = size * outside + (4 * low + size * widest.size if self.early else size * (profile.parameters - outside))
        parts["optimizer"] = 8 * outside + 4 * (2 * low + projections)
        parts["extra"] = self.work(widest)
        self.together(parts, profile, batch, kept=sum(m.size for m in found))
        return Footprint(**parts)

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        model.requires_grad_(True)
        return model

    def chosen(self, model) -> list:
        """(Matrix, module) of every projected matrix."""
        from engines.models import matrices
        named = matrices(model)
        names = {m.name for m in _peft.choose([m for m, _ in named], self.targets, tuple(dict.fromkeys(m.role for m, _ in named)))}
        return [(m, module) for m, module in named if m.name in names]

    def parameter_groups(self, model, context):
        projected = [module.weight for _, module in self.chosen(model)]
        known = {id(p) for p in projected}
        return [{"params": projected, "rank": self.rank, "scale": self.scale},
                {"params": [p for p in model.parameters() if id(p) not in known], "rank": 0, "scale": 1.0}]

    def optimizer(self, groups, settings, context):
        from engines.training import distributed
        # Several processes add up full gradients: a subspace of one's own would part their weights.
        early = self.early and distributed.current() is None
        return self.made(groups, context, lr=settings.lr, progress=lambda: context.progress, refreshes=self.refreshes, eps=self.eps, early=early)

    def made(self, groups, context, **options):
        """The optimizer."""
        from engines.optimizers.projected import Projected
        return Projected(groups, **options)

    def finish(self, model, context):
        from engines.optimizers.projected import release
        context.state["captured"] = self.captured(model)
        release(model)
        return model

    def captured(self, model) -> list:
        rows = [(m, getattr(module.weight, "captured", None)) for m, module in self.chosen(model)]
        return [[m.layer, m.role, value] for m, value in rows if value is not None]

    def layers(self, model, context):
        rows = self.captured(model) or context.state.get("captured")
        return {"captured": rows} if rows else {}

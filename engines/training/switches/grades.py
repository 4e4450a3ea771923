"""GradES: each matrix stops being trained when it has stopped moving, and training ends when all have."""

from __future__ import annotations

from engines.claim import Claim
from engines.errors import RunFailed
from engines.lazy import torch
from engines.method import Card, hyper, register
from engines.training.switch import Observer, Switch

_DIFFERS = ("a model of 5.3 M parameters, 60 steps on prose instead of Qwen3 and Phi-4 on fine-tuning sets, thresholds by the rule of the card "
            "instead of a search for each model")
METRICS = ("weight_change", "grad", "grad_change")


@register
class Grades(Switch):
    """A matrix is frozen for good once its metric is below ``tau``, after a grace period of ``alpha`` of the budget.

    Source: GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping.
    """

    card = Card(
        id="grades", name="GradES", family="switch", year=2025,
        title="GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
        summary="Freezes each matrix for good when it has almost stopped moving, and ends the training when all of them have.",
        needs=("a stage that trains matrices inside blocks", "one copy of what is trained in them, except with the metric grad"),
        cannot=("follows only matrices inside blocks, not embeddings, norms and heads", "knows nothing of the held-out loss",
                "does not undo what a method itself writes into a frozen matrix",
                "a gradual schedule of the method that is cut short is brought to its end in one jump"),
        differs="The released code compares the sum of absolute changes with one threshold for all matrices, which depends on their size, the "
                "model and the learning rate and has to be found for each model. The default here (threshold: relative) needs no search: "
                "tau is a share of the matrix's own mean metric in the grace period, a tenth unless it is set; with a decaying learning "
                "rate every matrix gets there at the latest when the rate has fallen to about that share. threshold: absolute is the "
                "released rule. The first sample never decides. The paper's text monitors gradients, its code weight changes: both can "
                "be chosen. With an adapter the component of a matrix is all that is trained for it, such as LoRA's pair of factors.")

    claims = tuple(
        Claim(f"{key}-{name}", says, ours={**stage, "training": {"switches": ["grades"]}}, against=stage, differs=_DIFFERS, **how)
        for name, stage in (("full", {"method": "full"}), ("lora", {"method": "lora"}))
        for key, says, how in (
            ("sooner", "Training ends sooner: 1.57 to 7.22 times faster than without it.", dict(measure="duration", expect="at most", factor=1 / 1.57)),
            ("as-good", "The model is as good as without it (1.2 % higher average accuracy on eight benchmarks).", dict(expect="not worse"))))

    tau: float = hyper(0.1, "A matrix is frozen when its metric is below this: a share of its own mean in the grace period (relative) "
                            "or a sum of absolute values (absolute); 0 never freezes", low=0.0, high=1e9)
    alpha: float = hyper(0.3, "Grace period as a share of the stage's budget, in which nothing is frozen", low=0.0, high=0.99)
    threshold: str = hyper("relative", "relative: tau is a share of what each matrix did in the grace period; absolute: the released rule",
                           choices=("relative", "absolute"))
    metric: str = hyper("weight_change", "Summed absolute weight change since the last check, summed absolute gradient, or summed "
                                         "absolute change of the gradient", choices=METRICS)
    interval: int = hyper(1, "Steps between two checks", low=1, high=1000, advanced=True)
    max_frozen: float = hyper(1.0, "Training ends when this share of the matrices is frozen", low=0.01, high=1.0, advanced=True)

    def _followed(self, profile, footprint) -> float:
        """Bytes of one copy of what is trained inside blocks."""
        return footprint.gradients * min(1.0, profile.block_parameters / max(1, footprint.trainable))

    def extra_bytes(self, profile, footprint) -> int:
        return 0 if self.metric == "grad" else round(self._followed(profile, footprint))

    def step_cost(self, profile, footprint):
        # Read both, write and read the difference, write the copy.
        return 0.0, (1 if self.metric == "grad" else 5) * self._followed(profile, footprint) / self.interval

    def observer(self, loop):
        return Freezer(self, loop)


class Freezer(Observer):
    """``state``: frozen {matrix: step}, base {matrix: [sum, samples] of the grace period}, kept {matrix: tensors of the last check}."""

    def __init__(self, switch, loop):
        super().__init__(switch, loop)
        held, owners = {id(p) for p in loop.parameters}, {}
        places = {m.name: (m.layer, m.role) for m in self.context.profile.matrices}
        found: dict[str, dict] = {}
        for name, p in loop.model.named_parameters(remove_duplicate=False):
            parts = name.split(".")
            matrix = next((m for m in (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)) if m in places), None)
            owners.setdefault(id(p), set()).add(matrix)
            if matrix is not None and id(p) in held and p.element_size() > 1:     # integers of Q-GaLore have no differences
                found.setdefault(matrix, {})[id(p)] = p
        # What several matrices share belongs to none of them.
        self.components = {m: own for m, ps in found.items() if (own := [p for i, p in ps.items() if len(owners[i]) == 1])}
        self.places = {m: places[m] for m in self.components}
        if not self.components:
            raise RunFailed(f"GradES has nothing to follow: {loop.method.card.name} trains no matrix inside the blocks",
                            "Switch it off (training.switches), or choose other targets")
        self.values: dict[str, torch.Tensor] = {}

    @property
    def frozen(self) -> dict:
        return self.state.setdefault("frozen", {})

    def restored(self) -> None:
        kept = self.state.get("kept", {})
        for name, tensors in kept.items():
            kept[name] = [t.to(p.device) for t, p in zip(tensors, self.components[name])]
        for name in self.frozen:
            self._remove(name)
        self.ended = self._enough()

    # -- a step ----------------------------------------------------------------------------------------------
    def before_step(self) -> None:
        for name in self.frozen:        # a method that chooses anew what it trains may have freed it
            for p in self.components[name]:
                p.requires_grad_(False)
        if self.switch.metric == "weight_change" and "kept" not in self.state:
            self.state["kept"] = {name: [p.detach().clone() for p in ps] for name, ps in self.components.items()}

    def after_backward(self) -> None:
        if self.switch.metric == "weight_change" or (self.context.step + 1) % self.switch.interval:
            return
        kept = self.state.setdefault("kept", {})
        self.values = {}
        for name, ps in self._active():
            now = [p.grad for p in ps]
            if any(g is None for g in now):
                continue
            if self.switch.metric == "grad":
                self.values[name] = total(now)
            else:
                if name in kept:
                    self.values[name] = total([g - old for g, old in zip(now, kept[name])])
                kept[name] = [g.detach().clone() for g in now]

    def after_step(self) -> None:
        if self.context.step % self.switch.interval:
            return
        if self.switch.metric == "weight_change":
            kept, self.values = self.state["kept"], {}
            with torch.no_grad():
                for name, ps in self._active():
                    self.values[name] = total([p - old for p, old in zip(ps, kept[name])])
                    for p, old in zip(ps, kept[name]):
                        old.copy_(p)
        if self.values:
            names = list(self.values)
            self._decide(dict(zip(names, torch.stack([self.values[n] for n in names]).tolist())))

    def _active(self):
        return [(n, ps) for n, ps in self.components.items() if n not in self.frozen and all(p.requires_grad for p in ps)]

    # -- the decision ----------------------------------------------------------------------------------------
    def _decide(self, values: dict[str, float]) -> None:
        base, grace, now = self.state.setdefault("base", {}), self.loop.progress() < self.switch.alpha, []
        for name, value in values.items():
            known = base.setdefault(name, [0.0, 0])
            if grace or not known[1]:
                base[name] = [known[0] + value, known[1] + 1]
                continue
            bound = self.switch.tau * (known[0] / known[1] if self.switch.threshold == "relative" else 1.0)
            if value < bound:
                now.append(name)
        if now:
            for name in now:
                self.frozen[name] = self.loop.run_step
                self._remove(name)
            self._tell(now, values)

    def _remove(self, name: str) -> None:
        """Out of the backward pass and out of the optimizer: a stale gradient or a moment would go on moving it."""
        for p in self.components[name]:
            p.requires_grad_(False)
            p.grad = None
            self.loop.optimizer.state.pop(p, None)
        self.state.get("kept", {}).pop(name, None)

    def _enough(self) -> bool:
        return len(self.frozen) >= self.switch.max_frozen * len(self.components)

    def _tell(self, now: list[str], values: dict[str, float]) -> None:
        loop, reporter, whole = self.loop, self.context.reporter, len(self.components)
        labels = [f"{role} of layer {layer}" for layer, role in (self.places[n] for n in now)]
        more = f" and {len(now) - 3} more" if len(now) > 3 else ""
        reporter.event("freeze", f"GradES: {', '.join(labels[:3])}{more} frozen at step {loop.run_step:,}, {len(self.frozen)} of {whole} matrices",
                       step=loop.run_step, matrices=now, values=[values[n] for n in now], frozen=len(self.frozen), of=whole)
        reporter.points(loop.run_step, {"frozen": len(self.frozen) / whole})
        if self._enough():
            self.ended = True
            reporter.event("choice", f"GradES ends the training at step {loop.run_step:,}, {loop.progress():.0%} of its budget: "
                           f"{len(self.frozen)} of {whole} matrices are frozen", step=loop.run_step, share=loop.progress())

    def layers(self):
        return {"frozen": [[*self.places[n], 1 if n in self.frozen else 0] for n in self.components]}


def total(tensors) -> torch.Tensor:
    """Sum of all absolute values, float32."""
    return torch.stack([torch.linalg.vector_norm(t, 1, dtype=torch.float32) for t in tensors]).sum()

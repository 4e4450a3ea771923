"""AdaLoRA's rank allocation: smoothed sensitivity times its uncertainty, a budget that falls cubically.

Works on the triplets (a row of Q, an entry of Lambda, a column of P) of every adapted matrix together; equal to
peft's RankAllocator except that ties are broken by position, so that the count is always exact.
"""

from __future__ import annotations

from engines.adaptation import _peft
from engines.lazy import torch

PARTS = ("lora_A", "lora_B", "lora_E")


def budget_at(step: float, total: float, tinit: float, tfinal: float, first: int, last: int) -> int:
    """Components that may live at ``step`` (counted from 0) of ``total``: ``first`` up to ``tinit``, ``last`` in the
    final ``tfinal`` steps, between them cubically falling.
    """
    if step <= tinit:
        return first
    if step > total - tfinal:
        return last
    left = 1.0 - (step - tinit) / (total - tfinal - tinit)
    return int((first - last) * left**3 + last)


def triplets(model) -> list[tuple[str, dict]]:
    """(name, {"lora_A", "lora_B", "lora_E"} -> parameter) of every adapted matrix, in the model's order."""
    return [(name, {part: getattr(layer, part)[_peft.ADAPTER] for part in PARTS}) for name, layer in _peft.adapted(model)]


def observe(model, state: dict, beta1: float, beta2: float) -> None:
    """Update the averages with the gradients of this step and the weights after it.

    ``state["mean"]`` and ``state["spread"]`` map a parameter's name to smoothed |w g| and its smoothed deviation.
    """
    mean, spread = state.setdefault("mean", {}), state.setdefault("spread", {})
    with torch.no_grad():
        found = {f"{name}.{part}": p for name, parts in triplets(model) for part, p in parts.items()}
        for key, p in found.items():
            if key not in mean:
                mean[key], spread[key] = torch.zeros_like(p), torch.zeros_like(p)
            elif mean[key].device != p.device:
                mean[key], spread[key] = mean[key].to(p.device), spread[key].to(p.device)
        means, spreads = [mean[k] for k in found], [spread[k] for k in found]
        # A few passes over all parameters at once; one by one they are so small that the calls would cost more than the work.
        now = torch._foreach_mul(list(found.values()), [p.grad if p.grad is not None else torch.zeros_like(p) for p in found.values()])
        torch._foreach_abs_(now)
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, now, alpha=1.0 - beta1)
        torch._foreach_sub_(now, means)
        torch._foreach_abs_(now)
        torch._foreach_mul_(spreads, beta2)
        torch._foreach_add_(spreads, now, alpha=1.0 - beta2)


def scores(model, state: dict) -> list:
    """Score of each component of each matrix: its Lambda's plus the mean of its row of Q and of its column of P."""
    out = []
    for name, _ in triplets(model):
        part = {p: state["mean"][f"{name}.{p}"] * state["spread"][f"{name}.{p}"] for p in PARTS}
        out.append(part["lora_E"].view(-1) + part["lora_A"].mean(dim=1) + part["lora_B"].mean(dim=0))
    return out


def allocate(model, state: dict, budget: int) -> None:
    """Zero Lambda of all but the ``budget`` best components of all matrices; the pattern goes to ``state["alive"]``."""
    found = triplets(model)
    sizes = [parts["lora_E"].numel() for _, parts in found]
    drop = sum(sizes) - budget
    alive = torch.ones(sum(sizes), dtype=torch.bool)
    if drop > 0:
        if "mean" not in state:      # stopped before the first step: nothing has been learned, any component will do
            order = torch.arange(sum(sizes)).flip(0)
        else:
            order = torch.argsort(torch.cat(scores(model, state)).cpu(), stable=True)
        alive[order[:drop]] = False
    state["alive"] = {name: part for (name, _), part in zip(found, alive.split(sizes))}
    apply_pattern(model, state)


def apply_pattern(model, state: dict) -> None:
    """Zero Lambda where the last allocation said so."""
    with torch.no_grad():
        for name, parts in triplets(model):
            parts["lora_E"].masked_fill_(~state["alive"][name].to(parts["lora_E"].device)[:, None], 0.0)


def orthogonality(model, squared: bool):
    """How far Q Q^T and P^T P are from the identity: the mean of the Frobenius norms over both sides of all matrices, or the
    sum of their squares, which is some hundred times as steep for a model of some dozen matrices.
    """
    grams = []
    for _, parts in triplets(model):
        q, p = parts["lora_A"], parts["lora_B"]
        grams += [q @ q.t(), p.t() @ p]
    stacked = torch.stack(grams) - torch.eye(grams[0].shape[0], device=grams[0].device)
    if squared:
        return stacked.square().sum()
    return torch.linalg.matrix_norm(stacked).mean()

"""Diagonal second-order figures of matrices, and ranks in proportion to them.

Source: Sensitivity-LoRA: Low-Load Sensitivity-Based Fine-Tuning for Large Language Models (reconstructed from its abstract).
"""

from __future__ import annotations

import math

import torch

from engines.adaptation import _calibration


def diagonal_of_inputs(rows: torch.Tensor) -> torch.Tensor:
    """2 sum over tokens of x_j^2: the diagonal of the layer-wise Hessian of a least-squares error, equal for each output. [in], float64."""
    return 2.0 * rows.double().square().sum(dim=0)


def inputs(model, context, chosen, samples: int):
    """(name, diagonal [1, in]) of each matrix from the inputs of its layer; every output row has this diagonal."""
    sums = {m.name: 0.0 for m, _ in chosen}

    def add(name):
        def see(rows):
            sums[name] = sums[name] + diagonal_of_inputs(rows)
        return see
    see = {module: add(m.name) for m, module in chosen}
    with _calibration.frozen(model, context):
        for sample in context.calibration(samples):
            _calibration.look(model, context, sample, see)
    return [(name, h[None]) for name, h in sums.items()]


def fisher(model, context, chosen, samples: int):
    """(name, diagonal [out, in]) of each matrix: the mean over samples of the squared gradient of that sample's own loss.

    The model stays as it was. Entries that an earlier stage pruned have none.
    """
    from engines.training.loss import task_loss
    wanted, training = {p: p.requires_grad for p in model.parameters()}, model.training
    model.eval()
    model.requires_grad_(False)
    sums = {m.name: torch.zeros(module.weight.shape, device=module.weight.device) for m, module in chosen}
    try:
        for _, module in chosen:
            module.weight.requires_grad_(True)
            module.weight.grad = None
        for step in range(samples):
            (batch,) = context.data.batch(step, 1)
            task_loss(model, {k: v.to(context.device) for k, v in batch.items()}, context.task).backward()
            for m, module in chosen:
                g = module.weight.grad.float()
                sums[m.name].addcmul_(g, g, value=1.0 / samples)
                module.weight.grad = None
    finally:
        for p, need in wanted.items():
            p.requires_grad_(need)
            p.grad = None
        model.train(training)
    for m, _ in chosen:
        mask = context.masks.get(f"{m.name}.weight")
        if mask is not None:
            sums[m.name] *= mask.to(sums[m.name].device)
    return list(sums.items())


def effective_rank(h: torch.Tensor) -> float:
    """exp of the entropy of h / sum h: how many entries the sensitivity is spread over."""
    p = h.double().flatten() / h.double().sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def figures(h: torch.Tensor) -> tuple[float, float, float]:
    """Mean of the diagonal, mean of its largest hundredth, and effective rank as a share of the number of entries."""
    flat = h.double().flatten()
    count = max(1, math.ceil(flat.numel() / 100))
    return float(flat.mean()), float(flat.topk(count).values.mean()), effective_rank(flat) / flat.numel()


def mix(found: dict[str, tuple], weights) -> dict[str, float]:
    """Score of each matrix: its figures, each scaled to sum to one over the matrices, weighed; the scores sum to one."""
    total = sum(weights)
    out = dict.fromkeys(found, 0.0)
    for i, weight in enumerate(weights):
        whole = sum(row[i] for row in found.values())
        for name, row in found.items():
            # Where nothing is felt at all, as with a loss of zero, all are alike.
            out[name] += weight / total * (row[i] / whole if whole > 0 and math.isfinite(whole) else 1.0 / len(found))
    return out


def deal(score: dict[str, float], total: int, caps: dict[str, int], floor: int = 1) -> dict[str, int]:
    """Whole ranks in proportion to the scores by largest remainder, between ``floor`` and each cap, ``total`` in all.

    Raises:
        ValueError: the caps or the floor do not allow the total.
    """
    if not floor * len(score) <= total <= sum(caps.values()):
        raise ValueError(f"{total} ranks do not fit {len(score)} matrices from {floor} to {sum(caps.values())} in all")
    fixed: dict[str, int] = {}
    while True:
        free = {n: s for n, s in score.items() if n not in fixed}
        left, weight = total - sum(fixed.values()), sum(free.values())
        share = {n: left * (s / weight if weight > 0 else 1.0 / len(free)) for n, s in free.items()}
        over = {n: caps[n] for n, v in share.items() if v > caps[n]}
        under = {n: floor for n, v in share.items() if v < floor}
        if not over and not under:
            break
        # The side that is further out is settled first: settling one may bring the other back inside.
        excess, lack = sum(share[n] - caps[n] for n in over), sum(floor - share[n] for n in under)
        fixed |= over if excess >= lack else under
    ranks = {n: math.floor(v + 1e-9) for n, v in share.items()}
    order = sorted(share, key=lambda n: ranks[n] - share[n])
    rest = left - sum(ranks.values())
    for name in [n for n in order if ranks[n] < caps[n]][:rest]:
        ranks[name] += 1
    return {n: fixed.get(n, ranks.get(n)) for n in score}

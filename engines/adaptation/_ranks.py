"""Ranks of low-rank updates by matrix, from the spectrum of the first gradients, with the uniform setting's parameters in all.

Source: L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep Learning.
"""

from __future__ import annotations

import json
import math
import time

BATCHES = 10
ROWS = 4
"""Sequences or examples in each of them."""


def levels(rank: int, most: int) -> list[int]:
    """Ranks from half to twice the uniform one, as far as the matrix allows."""
    return list(range(max(1, rank // 2), max(rank, min(2 * rank, most)) + 1))


def by_gradient(model, context, found, rank: int) -> dict[str, int]:
    """Matrix name -> rank, with ``rank * sum(out + in)`` parameters in all.

    Decided once: on a resume the decision is read from the stage's folder, where there is one, because adapters of other
    shapes could not be restored.

    Args:
        found: the ``Matrix`` entries that get an update.
    """
    from engines.allocation.dynamic import least_error
    from engines.allocation.problem import Level, Problem
    from engines.allocation.tables import residuals

    file = context.folder / f"ranks-{context.stage}.json" if context.folder is not None else None
    if context.resuming and file is not None and file.is_file():
        return json.loads(file.read_text())
    began, names = time.perf_counter(), tuple(m.name for m in found)
    gradients = mean_gradients(model, context, found)
    options = [levels(rank, min(m.out, m.inp)) for m in found]
    rows = []
    for m, ranks in zip(found, options):
        errors = residuals(gradients.pop(m.name), ranks, seed=context.seed)
        rows.append(tuple(Level(r, r * (m.out + m.inp), e if math.isfinite(e) else 0.0) for r, e in zip(ranks, errors)))
    problem = Problem(names, tuple(rows), tuple(ranks.index(rank) for ranks in options))
    uniform = problem.error(problem.reference)
    result = least_error(problem, problem.size(problem.reference), exact=True)
    chosen = {name: int(value) for name, value in problem.values(result.choice).items()}
    least, most = min(chosen, key=chosen.get), max(chosen, key=chosen.get)
    context.reporter.event("choice", f"Ranks by the first gradients: {chosen[least]} in {least} to {chosen[most]} in {most}; their "
                           f"low-rank error {result.error:.4g}, {uniform:.4g} with equal ranks; {result.size:,} parameters in both",
                           by="lgreco", uniform=uniform, found=result.error, parameters=result.size, seconds=time.perf_counter() - began)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(chosen))
    return chosen


def mean_gradients(model, context, found) -> dict:
    """Mean gradient of the loss of each matrix over ten small batches, [out, in] float32 by name; the model stays as it was."""
    from engines.models import matrices
    from engines.training.loss import task_loss

    names = {m.name for m in found}
    modules = {m.name: (m, module) for m, module in matrices(model) if m.name in names}
    wanted = {p: p.requires_grad for p in model.parameters()}
    was_training = model.training
    model.eval()        # without dropout the table does not depend on the random state
    model.requires_grad_(False)
    out = {}
    try:
        for _, module in modules.values():
            module.weight.requires_grad_(True)
            module.weight.grad = None
        for step in range(BATCHES):
            for batch in context.data.batch(step, ROWS):
                batch = {k: v.to(context.device) for k, v in batch.items()}
                task_loss(model, batch, context.task).backward()
        for name, (m, module) in modules.items():
            g = module.weight.grad.float() / BATCHES
            out[name] = g.t() if m.conv1d else g
            mask = context.masks.get(f"{name}.weight")
            if mask is not None:
                mask = mask.to(g.device)
                out[name] = out[name] * (mask.t() if m.conv1d else mask)
            module.weight.grad = None
    finally:
        for p, need in wanted.items():
            p.requires_grad_(need)
            p.grad = None
        model.train(was_training)
    return out

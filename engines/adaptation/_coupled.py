"""Structures of a block that can be re-ordered without changing what it computes: MLP channels and groups of heads.

A channel is a row of the up (and gate) matrix and a column of the down matrix; a head is rows of query, key and value and columns of
the output matrix. Heads that share a key and a value move together. Source: S2FT: Efficient, Scalable and Generalizable LLM
Fine-tuning by Structured Sparsity.
"""

from __future__ import annotations

from engines.errors import InputError
from engines.lazy import torch
from engines.pruning import _shrink


def anatomy(profile, method: str):
    """``_shrink.anatomy`` with this method's name in its refusal."""
    if not profile.matrices:
        raise InputError("method", method, "the model has no dense matrices inside its blocks (perhaps they are packed into integers)",
                         "Start from a model that is not quantized")
    try:
        return _shrink.anatomy(profile)
    except InputError as e:
        raise InputError("method", method, e.problem, "Choose lora, or a llama, gpt2, bert or vit model") from None


def blocks(model) -> list:
    """``_shrink.Block`` of every block of a live model, in order."""
    from engines.models import matrices
    rows: dict[int, list] = {}
    for pair in matrices(model):
        rows.setdefault(pair[0].layer, []).append(pair)
    return [_shrink.block_of(rows[layer]) for layer in sorted(rows)]


def order_of(first, second, total: int):
    """(order, start of ``second``): only ``first``, both, only ``second``, all the rest; each ascending.

    Args:
        first, second: sorted int64 indices below ``total``.
    """
    a, b = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.bool)
    a[first], b[second] = True, True
    parts = [(a & ~b), (a & b), (b & ~a), ~(a | b)]
    return torch.cat([p.nonzero().view(-1) for p in parts]), int(parts[0].sum())


def features(order, width: int):
    """Order of the features when every unit of ``order`` has ``width`` neighbouring ones."""
    return (order[:, None] * width + torch.arange(width)).flatten()


def reorder(block, a, heads, channels) -> None:
    """Permute all matrices of one block: ``heads`` is an order of the key-value heads, ``channels`` of the MLP's; None leaves a part."""
    from engines.layers.s2ft import permute
    if heads is not None:
        keys, queries = features(heads, a.head_dim), features(heads, a.head_dim * a.group)
        if block.fused:
            width = a.heads * a.head_dim
            rows = torch.cat([queries, width + queries, 2 * width + queries])
            permute(block.query[1], block.query[0].conv1d, rows, out=True)
        else:
            for (m, module), rows in ((block.query, queries), (block.key, keys), (block.value, keys)):
                permute(module, m.conv1d, rows, out=True)
        permute(block.out[1], block.out[0].conv1d, queries, out=False)
    if channels is not None:
        for m, module in block.ups:
            permute(module, m.conv1d, channels, out=True)
        permute(block.down[1], block.down[0].conv1d, channels, out=False)


# -- importance --------------------------------------------------------------------------------------------------
def scores(model, context, a, by: str):
    """(heads [layers, key-value heads], channels [layers, mlp]), float64, each divided by its layer's mean.

    Args:
        by: ``weight`` (norm of all weights of a unit), ``activation`` (mean size of its outputs on training data), ``product`` of both,
            or ``gradient`` (norm of the loss's gradient of the columns that it is read by).
    """
    from engines.pruning import structured
    found = blocks(model)
    heads, channels = [], []
    if by in ("weight", "product"):
        for block in found:
            query, own, channel = structured.weight_norms(block, a)
            heads.append((query.view(a.kv_heads, -1).sum(dim=1) + own).double().sqrt())
            channels.append(channel.double().sqrt())
    if by in ("activation", "product"):
        seen = sizes(model, context, [p for block in found for p in (block.out, block.down)])
        rows = [(seen[block.out[0].name].view(a.kv_heads, -1).mean(dim=1), seen[block.down[0].name]) for block in found]
        heads = [r[0] * h for r, h in zip(rows, heads or [1.0] * len(rows))]
        channels = [r[1] * c for r, c in zip(rows, channels or [1.0] * len(rows))]
    if by == "gradient":
        from engines.adaptation._ranks import mean_gradients
        grads = mean_gradients(model, context, [p[0] for block in found for p in (block.out, block.down)])
        square = {name: g.double().square().sum(dim=0) for name, g in grads.items()}
        heads = [square[block.out[0].name].view(a.kv_heads, -1).sum(dim=1).sqrt() for block in found]
        channels = [square[block.down[0].name].sqrt() for block in found]
    both = [torch.stack([row.double().cpu() for row in rows]) for rows in (heads, channels)]
    return tuple(s / s.mean(dim=1, keepdim=True).clamp_min(1e-30) for s in both)


def sizes(model, context, pairs, steps: int = 4, rows: int = 4) -> dict:
    """Mean absolute value of every input feature of the modules in ``pairs`` over small training batches, float64 by name."""
    found, counts, handles = {}, {}, []

    def watch(name):
        def before(module, args):
            x = args[0].detach().flatten(0, -2).abs().double()
            found[name] = found.get(name, 0.0) + x.sum(dim=0)
            counts[name] = counts.get(name, 0) + x.shape[0]
        return before
    for m, module in pairs:
        handles.append(module.register_forward_pre_hook(watch(m.name)))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for step in range(steps):
                for batch in context.data.batch(step, rows):
                    model(**{k: v.to(context.device) for k, v in batch.items() if k != "labels"})
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: total / counts[name] for name, total in found.items()}

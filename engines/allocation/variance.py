"""Directions of most variance of each layer's inputs, and the ranks that follow from them.

Source: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation. The decomposition of each batch is peft's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch


def redistribute(ratios: dict[str, torch.Tensor], total: int, owners: dict[str, str] | None = None) -> dict[str, int]:
    """Ranks of the layers: the ``total`` largest of all ratios, counted by layer.

    Args:
        ratios: layer -> explained variance ratio of each of its components, the largest first; the order breaks ties.
        owners: layer -> layer with the same inputs whose decomposition it uses; of the two ranks the owner gets the larger, as in
            peft, where it has so many components.
    """
    names = [name for name, r in ratios.items() for _ in r]
    order = torch.cat(list(ratios.values())).argsort(descending=True, stable=True)[:total]
    counts = dict.fromkeys(ratios, 0)
    for i in order.tolist():
        counts[names[i]] += 1
    for name, owner in (owners or {}).items():
        if counts[owner] < counts[name] <= len(ratios[owner]):
            counts[name], counts[owner] = counts[owner], counts[name]
    return counts


def same_inputs(seen: dict[str, torch.Tensor]) -> dict[str, str]:
    """Layer -> the first layer that got an equal input, for every layer but the first of its kind."""
    first: dict[tuple, list[str]] = {}
    out = {}
    for name, x in seen.items():
        key = (tuple(x.shape), float(x.float().sum()))
        owner = next((n for n in first.get(key, ()) if seen[n] is x or torch.equal(seen[n], x)), None)
        if owner is None:
            first.setdefault(key, []).append(name)
        else:
            out[name] = owner
    return out


@dataclass
class Components:
    """The leading components of one layer's inputs, batch after batch (``partial_fit`` of peft's incremental PCA)."""

    count: int
    """Components kept."""
    tau: float
    """Cosine similarity with its value of the batch before from which on a component counts as settled."""
    settled: torch.Tensor = field(init=False)

    def __post_init__(self):
        from peft.utils.incremental_pca import IncrementalPCA
        self.pca = IncrementalPCA(n_components=self.count, copy=True, lowrank=True, lowrank_seed=42)
        self.settled = torch.zeros(self.count, dtype=torch.bool)

    @property
    def ready(self) -> bool:
        return hasattr(self.pca, "components_")

    def __call__(self, rows: torch.Tensor) -> None:
        """Take in one batch of inputs [tokens, features]; one with fewer tokens than components is passed over."""
        if rows.shape[0] < self.count:
            return
        before = self.pca.components_.clone() if self.ready else None
        # The randomized decomposition draws twice as many directions as it keeps; where there are not so many, the exact one.
        self.pca.lowrank = 2 * self.count <= min(rows.shape)
        self.pca.partial_fit(rows.float())
        if before is not None:
            self.settled = (torch.nn.functional.cosine_similarity(self.pca.components_, before) >= self.tau).cpu()

    def ratios(self) -> torch.Tensor:
        """Share of the inputs' variance that each component explains: [count], float64 on the CPU."""
        return self.pca.explained_variance_ratio_.double().cpu()

    def rows(self, rank: int, whiten: bool) -> torch.Tensor:
        """The first ``rank`` components: [rank, features], float32, orthonormal rows unless whitened."""
        found = self.pca.components_[:rank].float()
        return found / self.pca.singular_values_[:rank].float().sqrt()[:, None] if whiten else found.clone()


@dataclass
class Explained:
    """What ``explain`` found."""

    ranks: dict[str, int]
    rows: dict[str, torch.Tensor]
    """Layer -> start of the input factor [rank, in]; layers of rank 0 have none."""
    share: dict[str, float]
    """Layer -> share of its inputs' variance inside those rows."""
    batches: int
    """Batches taken in."""
    open: int
    """Layers that had not settled when the batches ended."""


def explain(names: list[str], caps: dict[str, int], total: int, batches, run, *, tau: float, whiten: bool = False) -> Explained | None:
    """Ranks and directions by explained variance.

    Args:
        names: the layers, in the model's order.
        caps: layer -> the most components it may get.
        total: ranks of all layers together.
        batches: iterable of model inputs; it ends the search when it ends.
        run: ``run(batch, {name: callable(rows)})`` shows the inputs of the named layers.

    Returns:
        None where no batch had as many tokens as a layer has components.
    """
    owners: dict[str, str] | None = None
    found: dict[str, Components] = {}
    caps, ranks, used = dict(caps), {}, 0
    for batch in batches:
        if owners is None:
            owners = same_inputs(inputs_of(batch, names, run))
            need = dict(caps)
            for name, owner in owners.items():
                need[owner] = max(need[owner], caps[name])
            found = {n: Components(need[n], tau) for n in names if n not in owners}
            use = {**{n: n for n in found}, **owners}
            ranks = dict(caps)
        unsettled = _unsettled(found, use, ranks)
        if not unsettled:
            break
        run(batch, unsettled)
        used += 1
        if all(c.ready for c in found.values()):
            ranks = redistribute({n: found[o].ratios()[:caps[n]] for n, o in use.items()}, total, owners)
    if not found or not all(c.ready for c in found.values()):
        return None
    rows = {n: found[use[n]].rows(ranks[n], whiten) for n in names if ranks[n]}
    share = {n: float(found[use[n]].ratios()[:ranks[n]].sum()) for n in names}
    return Explained({n: ranks[n] for n in names}, rows, share, used, len(_unsettled(found, use, ranks)))


def inputs_of(batch, names: list[str], run) -> dict[str, torch.Tensor]:
    """The inputs [tokens, features] of the named layers on one batch; ``run`` as in ``explain``."""
    seen: dict[str, torch.Tensor] = {}
    run(batch, {n: functools.partial(seen.__setitem__, n) for n in names})
    return seen


def _unsettled(found: dict[str, Components], use: dict[str, str], ranks: dict[str, int]) -> dict[str, Components]:
    need = dict.fromkeys(found, 0)
    for name, owner in use.items():
        need[owner] = max(need[owner], ranks[name])
    return {n: c for n, c in found.items() if not bool(c.settled[:need[n]].all())}

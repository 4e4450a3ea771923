"""Bottleneck adapters beside the MLP of a block, which a model keeps after training because their nonlinearity cannot be merged.

They are attached by hooks, so that the block and every name in it stay what they are. Sources: AdaptFormer: Adapting Vision
Transformers for Scalable Visual Recognition; Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

NAME = "added_adapter"
"""Attribute of a block under which its adapter lives; ``engines.profile.ADDED`` begins like it."""


class Split(nn.Module):
    """A matrix of which each of ``experts`` copies may move only entries of its own; all begin as ``start`` [rows, columns].

    In training a call returns one copy, drawn evenly; otherwise the mean of all. Entries of one expert are one parameter, so that an
    optimizer leaves those that were not drawn alone.
    """

    def __init__(self, start: torch.Tensor, experts: int, generator: torch.Generator):
        super().__init__()
        order = torch.rand(start.numel(), generator=generator).argsort()
        owner = torch.empty(start.numel(), dtype=torch.uint8)
        owner[order] = (torch.arange(start.numel()) * experts // start.numel()).to(torch.uint8)
        self.register_buffer("owner", owner.view(start.shape))
        self.register_buffer("start", start.clone())
        values = [start[self.mask(i)] for i in range(experts)]
        # Weight decay draws matrices towards zero: right where zero was the start, so only there the values stand in a row of their own.
        self.parts = nn.ParameterList([v if start.any() else v[None] for v in values])

    def mask(self, expert: int) -> torch.Tensor:
        """True where this expert may move: disjoint between experts, all entries together."""
        return self.owner == expert

    def expert(self, i: int) -> torch.Tensor:
        """Copy ``i`` as a whole matrix, differentiable in its own entries."""
        return self.start.masked_scatter(self.mask(i), self.parts[i])

    def merged(self) -> torch.Tensor:
        """start + the sum of all changes / experts: what a random copy is on average."""
        own = self.start
        for i, values in enumerate(self.parts):
            own = own.masked_scatter(self.mask(i), values)
        return self.start + (own - self.start) / len(self.parts)

    def forward(self) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            # The global random state, which checkpointed blocks get back when they are computed again.
            return self.expert(int(torch.randint(len(self.parts), ())))
        return self.merged()


class ParallelAdapter(nn.Module):
    """scale * Up(dropout(GELU(Down(norm(h))))) for h [..., width]; ``Up`` starts at zero.

    Args:
        how: where it is attached: ``norm`` (h is what the block's norm before the MLP reads), ``input`` (what the MLP itself reads) or
            ``residual`` (what the block's output module adds to its product).
        mlp, norm: names of these modules in the block.
    """

    kind = "parallel-adapter"

    def __init__(self, width: int, bottleneck: int, scale: float, *, how: str, mlp: str, norm: str = "", dropout: float = 0.0):
        super().__init__()
        self.width, self.bottleneck, self.scale, self.how, self.mlp, self.norm, self.dropout = width, bottleneck, scale, how, mlp, norm, dropout
        self.gain, self.offset = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.down, self.down_bias = nn.Parameter(torch.empty(bottleneck, width)), nn.Parameter(torch.zeros(bottleneck))
        self.up, self.up_bias = nn.Parameter(torch.zeros(width, bottleneck)), nn.Parameter(torch.zeros(width))
        self.seen, self.routes = None, 1
        """Routes of a pass in training: that many equal groups of rows, each with experts of its own."""

    def reset(self, generator: torch.Generator) -> None:
        """Draw Down."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)

    def split(self, name: str, experts: int, generator: torch.Generator) -> None:
        """Make ``down`` or ``up`` a ``Split``."""
        start = getattr(self, name).detach()
        delattr(self, name)
        setattr(self, name, Split(start, experts, generator))

    def experts(self) -> list:
        """The parameters that belong to single experts."""
        return [p for part in (self.down, self.up) if isinstance(part, Split) for p in part.parts]

    def settle(self) -> None:
        """Replace split matrices by their mean: an ordinary adapter, as it will be loaded."""
        self.dropout, self.routes = 0.0, 1
        for name in ("down", "up"):
            if isinstance(found := getattr(self, name), Split):
                with torch.no_grad():
                    mean = found.merged().clone()
                delattr(self, name)
                setattr(self, name, nn.Parameter(mean))

    def product(self, name: str, x):
        """x times the matrix ``name``, with the draw of each route on its rows, plus its bias."""
        found, bias = getattr(self, name), getattr(self, f"{name}_bias")
        if not isinstance(found, Split):
            return F.linear(x, found, bias)
        routes = self.routes if self.training and torch.is_grad_enabled() else 1
        parts = [F.linear(rows, found(), bias) for rows in x.chunk(routes)]
        return parts[0] if routes == 1 else torch.cat(parts)

    def forward(self, h):
        kind = self.gain.dtype
        x = F.layer_norm(h.to(kind), (self.width,), self.gain, self.offset)
        x = F.dropout(F.gelu(self.product("down", x)), self.dropout, self.training)
        return self.scale * self.product("up", x)

    # -- hooks -------------------------------------------------------------------------------------------
    def attach(self, block) -> None:
        """Become a part of ``block``."""
        setattr(block, NAME, self)
        if self.how == "residual":
            getattr(block, self.mlp).register_forward_pre_hook(self._residual)
            return
        if self.how == "norm":
            getattr(block, self.norm).register_forward_pre_hook(self._keep)
        getattr(block, self.mlp).register_forward_hook(self._add)

    def _keep(self, module, given):
        self.seen = given[0]

    def _add(self, module, given, y):
        h, self.seen = (self.seen if self.how == "norm" else given[0]), None
        return y + self(h).to(y.dtype)

    def _residual(self, module, given):
        product, h = given
        return product, h + self(h).to(h.dtype)

    # -- saved layout ------------------------------------------------------------------------------------
    def describe(self) -> dict:
        """What ``engines.models.added.rebuild`` needs."""
        return dict(kind=self.kind, width=self.width, bottleneck=self.bottleneck, scale=self.scale, how=self.how, mlp=self.mlp, norm=self.norm)

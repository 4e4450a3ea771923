"""GaLore's optimizer with 8-bit moments, 4-bit projections, 8-bit weights and subspaces that are renewed more rarely once they are stable.

Source: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients.
"""

from __future__ import annotations

import torch

from engines.layers import groupwise
from engines.optimizers import eight_bit
from engines.optimizers.projected import Projected, put

MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""Names in the state, and whether the values have signs."""


class QProjected(Projected):
    """As ``Projected``; the projected parameters are the integers of ``engines.layers.int8_trained.TrainedInt8Linear``.

    Args:
        threshold: mean cosine of successive first vectors from which a subspace counts as stable.
        queue: cosines that are averaged.
        factor: the gap to the next projection grows by it.
    """

    def __init__(self, groups, *, threshold: float, queue: int, factor: float, **options):
        self.threshold, self.queue, self.factor = threshold, queue, factor
        self.layers = {p: p.owner() for group in groups if group.get("rank") for p in group["params"]}
        super().__init__(groups, **options)

    def _listen(self) -> None:
        for layer in self.layers.values():
            layer.sink = self.collect

    # -- projections -------------------------------------------------------------------------------------
    def _renewed(self, state: dict, found: torch.Tensor) -> None:
        first = found[:, 0].clone()
        if "first" in state:
            # Singular vectors have no sign of their own.
            state["cosines"] = [*state.get("cosines", []), abs(float(first @ state["first"]))][-self.queue:]
            if len(state["cosines"]) == self.queue and sum(state["cosines"]) / self.queue >= self.threshold:
                state["gap"] *= self.factor
        put(state, "first", first)

    def _set_basis(self, state: dict, found: torch.Tensor) -> None:
        codes, scale, zero = groupwise.quantize(found, 4)
        for name, value in (("projection", groupwise.pack4(codes)), ("projection_scale", scale), ("projection_zero", zero)):
            put(state, name, value)
        state["sides"] = list(found.shape)

    def _basis(self, state: dict) -> torch.Tensor:
        rows, columns = state["sides"]
        codes = groupwise.unpack4(state["projection"], rows * columns)
        return groupwise.dequantize(codes, state["projection_scale"], state["projection_zero"]).view(rows, columns)

    # -- moments -----------------------------------------------------------------------------------------
    def _begin(self, state: dict, like: torch.Tensor) -> None:
        if like.numel() < eight_bit.LEAST:
            super()._begin(state, like)
            return
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
            state[f"{name}_most"] = torch.zeros(-(-like.numel() // eight_bit.BLOCK), device=like.device)

    def _moments(self, state: dict, here: slice):
        if "exp_avg_most" not in state:
            return super()._moments(state, here)
        blocks = _blocks(here)
        return tuple(eight_bit.decode(state[name].view(-1)[here], state[f"{name}_most"][blocks], signed) for name, signed in MOMENTS)

    def _keep(self, state: dict, first: torch.Tensor, second: torch.Tensor, here: slice) -> None:
        if "exp_avg_most" not in state:
            return
        for (name, signed), moment in zip(MOMENTS, (first, second)):
            codes, most = eight_bit.encode(moment, signed)
            state[name].view(-1)[here] = codes
            state[f"{name}_most"][_blocks(here)] = most

    # -- weights -----------------------------------------------------------------------------------------
    def _move(self, p, group, direction: torch.Tensor, scale: float) -> None:
        layer = self.layers.get(p)
        if layer is None:
            super()._move(p, group, direction, scale)
            return
        new = layer.dequantize().add_(direction, alpha=-group["lr"] * scale)
        if group["weight_decay"]:
            new.mul_(1 - group["lr"] * group["weight_decay"])
        layer.fill(new, stochastic=True)


def _blocks(here: slice) -> slice:
    """Blocks of the entries ``here``, which begin at a whole one."""
    return slice(here.start // eight_bit.BLOCK, -(-here.stop // eight_bit.BLOCK))

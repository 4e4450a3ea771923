"""Optimizers of SpIEL: AdamW in which every entry has its own age, and SM3, which keeps sums by row and by column only.

Sources: Scaling Sparse Fine-Tuning to Large Language Models; Memory-Efficient Adaptive Optimization (SM3).
"""

from __future__ import annotations

import torch


class AgedAdamW(torch.optim.Optimizer):
    """AdamW with a bias correction of its own for each entry: ``age`` counts the steps that its moments know.

    ``weight_decay`` and ``pull`` of a group are added: both draw towards zero, for differences that is the pretrained value.
    """

    def __init__(self, groups, lr: float, betas=(0.9, 0.999), eps: float = 1e-6):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, pull=0.0))

    def state_of(self, p) -> dict:
        state = self.state[p]
        if not state:
            state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), age=torch.zeros_like(p, dtype=torch.float32))
        return state

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state_of(p)
                m, v, age = state["exp_avg"], state["exp_avg_sq"], state["age"].add_(1)
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - group["lr"] * (group["weight_decay"] + group["pull"]))
                scale = v.sqrt().add_(group["eps"]).mul_(1 - torch.pow(b1, age)).div_((1 - torch.pow(b2, age)).sqrt_())
                p.addcdiv_(m, scale, value=-group["lr"])

    @torch.no_grad()
    def renew(self, p, slots, sums, squares, count: float) -> None:
        """Entries ``slots`` of ``p`` begin with the moments of ``count`` steps whose gradients have these sums and sums of squares."""
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        (b1, b2), state = group["betas"], self.state_of(p)
        state["exp_avg"][slots] = sums / count * (1 - b1**count)
        state["exp_avg_sq"][slots] = squares / count * (1 - b2**count)
        state["age"][slots] = float(count)


class SM3(torch.optim.Optimizer):
    """SM3 without momentum. A parameter with a ``layer`` attribute is the list of changed entries of that layer's matrix.

    A matrix has one sum for each row and one for each column; the smaller of both bounds an entry's own sum of squares.
    """

    def __init__(self, groups, lr: float, eps: float = 1e-8):
        super().__init__(groups, dict(lr=lr, eps=eps, weight_decay=0.0, pull=0.0))

    def sums(self, p) -> dict:
        """``row`` [out] and ``column`` [in], or ``row`` alone for a vector."""
        state = self.state[p]
        if not state:
            layer = getattr(p, "layer", None)
            shape = (layer.out, layer.inp) if layer is not None else p.shape
            for name, n in zip(("row", "column"), shape):
                state[name] = torch.zeros(n, device=p.device)
        return state

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, layer = self.sums(p), getattr(p, "layer", None)
                if layer is not None:
                    place = layer.index.long()
                    i, j = place // layer.inp, place % layer.inp
                    nu = torch.minimum(state["row"][i], state["column"][j]) + p.grad.square()
                    state["row"].scatter_reduce_(0, i, nu, "amax")
                    state["column"].scatter_reduce_(0, j, nu, "amax")
                elif p.dim() == 1:
                    nu = state["row"].add_(p.grad.square())
                else:
                    flat = p.grad.reshape(len(p), p.shape[1], -1)
                    bound = torch.minimum(state["row"][:, None], state["column"][None])
                    nu = (bound[:, :, None] + flat.square()).view_as(p.grad)
                    each = nu.view_as(flat)
                    state["row"].copy_(each.amax(dim=(1, 2)))
                    state["column"].copy_(each.amax(dim=(0, 2)))
                p.mul_(1 - group["lr"] * (group["weight_decay"] + group["pull"]))
                p.addcdiv_(p.grad, nu.add(group["eps"]).sqrt_(), value=-group["lr"])

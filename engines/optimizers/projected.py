"""Adam in a low-rank subspace of each matrix's gradient. Used for GaLore, and as the base of Q-GaLore's and Fira's optimizers.

Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection. A matrix [m, n] with m >= n is projected to
R = G P [m, r], otherwise to R = P' G [r, n]; P [smaller side, r] holds the leading singular vectors of a gradient. Adam's
moments have the shape of R. Gradients are projected as soon as autograd has them, so that those of all matrices are never alive
at once, and projections of several micro-batches add up.
"""

from __future__ import annotations

import weakref

import torch

PIECE = 1 << 18
"""Entries of an unprojected parameter that are moved at a time: an embedding's update is never there as a whole."""


def basis(gradient: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """The ``rank`` leading singular vectors of ``gradient`` [m, n] on its smaller side, and the share of its energy that they hold.

    From the eigenvectors of the product with itself in float64, which has the smaller side only: the same subspace as a whole
    singular value decomposition, to rounding.

    Returns:
        (float32 [min(m, n), rank] with orthonormal columns, the largest first; share in [0, 1]).
    """
    g = gradient.detach().double()
    values, vectors = torch.linalg.eigh(g.t() @ g if g.shape[0] >= g.shape[1] else g @ g.t())
    whole = float(values.clamp_(min=0).sum())
    share = float(values[-rank:].sum()) / whole if whole > 0 else 1.0
    return vectors[:, -rank:].flip(1).float().contiguous(), min(1.0, share)


def project(gradient: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[m, n] -> [m, r] or [r, n]."""
    g = gradient.float()
    return g @ p if g.shape[0] >= g.shape[1] else p.t() @ g


def back(low: torch.Tensor, p: torch.Tensor, shape) -> torch.Tensor:
    """[m, r] or [r, n] -> [m, n]."""
    return low @ p.t() if shape[0] >= shape[1] else p @ low


class Projected(torch.optim.Optimizer):
    """Groups with a ``rank`` above 0 are projected and their update is multiplied by ``scale``; the others get ordinary Adam.

    Moments are float32. Weight decay is decoupled and comes after the update.

    Args:
        progress: () -> share of the stage's budget that is used; drives when a projection is computed anew.
        refreshes: projections of one matrix in a stage.
        early: project during the backward pass; otherwise full gradients wait for ``step``.
    """

    def __init__(self, groups, *, lr: float, progress, refreshes: int, betas=(0.9, 0.999), eps: float = 1e-6, early: bool = True):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, rank=0, scale=1.0))
        self.progress, self.refreshes = progress, refreshes
        self.low: dict[torch.Tensor, torch.Tensor] = {}
        """Projected gradients of the step that is being made."""
        self.gradient_bytes = 0
        """Most bytes of projected gradients in any step so far."""
        self._group = {p: group for group in self.param_groups for p in group["params"] if group["rank"]}
        if early:
            self._listen()

    def _listen(self) -> None:
        # The hooks live with the parameters, the optimizer must not.
        me = weakref.ref(self)

        def hook(p):
            optimizer = me()
            if optimizer is not None and p.grad is not None:
                gradient, p.grad = p.grad, None
                optimizer.collect(p, gradient)
        for p in self._group:
            p.projecting = p.register_post_accumulate_grad_hook(hook)

    # -- gradients ---------------------------------------------------------------------------------------
    @torch.no_grad()
    def collect(self, p, gradient) -> None:
        """Add the gradient of one micro-batch to the projected one of this step."""
        if p not in self.low:
            self._refresh(p, gradient)
            self.low[p] = project(gradient, self._basis(self.state[p]))
        else:
            self.low[p] += project(gradient, self._basis(self.state[p]))

    def _refresh(self, p, gradient) -> None:
        """Compute the projection anew where it is due."""
        state, now = self.state[p], self.progress()
        if state and now < state["due"] - 1e-9:
            return
        state.setdefault("gap", 1.0 / self.refreshes)
        found, state["captured"] = basis(gradient, self._group[p]["rank"])
        self._renewed(state, found)
        self._set_basis(state, found)
        # The next whole multiple of the gap, as a step number that it divides.
        state["due"] = (int(now / state["gap"] + 1e-9) + 1) * state["gap"]
        state["refreshes"] = state.get("refreshes", 0) + 1
        p.captured = state["captured"]

    def _renewed(self, state: dict, found: torch.Tensor) -> None:
        """A new projection is about to take the place of the old one."""

    def _basis(self, state: dict) -> torch.Tensor:
        return state["projection"]

    def _set_basis(self, state: dict, found: torch.Tensor) -> None:
        put(state, "projection", found)

    @torch.no_grad()
    def clip(self, most: float) -> torch.Tensor:
        """Scale all gradients, projected ones included, to a common norm of at most ``most``; return the norm before."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None] + list(self.low.values())
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = torch.clamp(most / (norm + 1e-6), max=1.0)
        for g in gradients:
            g.mul_(factor.to(g.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.low.clear()

    # -- the step ----------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gradient_bytes = max(self.gradient_bytes, sum(low.numel() * low.element_size() for low in self.low.values()))
        for group in self.param_groups:
            for p in group["params"]:
                # Taken and popped: the room of what has been used is free for the next matrix.
                gradient, p.grad = p.grad, None
                if not group["rank"]:
                    if gradient is not None:
                        self._plain(p, gradient, group)
                    continue
                if p not in self.low and gradient is not None:
                    self.collect(p, gradient)
                del gradient
                if p in self.low:
                    self._move(p, group, self._direction(p, group, self.low.pop(p)), group["scale"])
        return loss

    def _direction(self, p, group, low: torch.Tensor) -> torch.Tensor:
        """Update [m, n] of a projected matrix, to be multiplied by rate and scale."""
        state = self.state[p]
        return back(self._adam(state, low, group), self._basis(state), p.shape)

    def _plain(self, p, gradient: torch.Tensor, group) -> None:
        """Ordinary Adam of a parameter that is not projected, piece by piece."""
        state, size = self.state[p], p.numel()
        self._count(state, p)
        # A piece is a view: what does not lie in one row is moved as a whole.
        step = PIECE if p.is_contiguous() and gradient.is_contiguous() else max(1, size)
        for at in range(0, size, step):
            here = slice(at, min(size, at + step))
            found = self._corrected(state, gradient.reshape(-1)[here].float(), group, here)
            self._move(p.view(-1)[here] if step == PIECE else p, group, found if step == PIECE else found.view(p.shape), 1.0)

    def _adam(self, state: dict, gradient: torch.Tensor, group) -> torch.Tensor:
        """Adam's bias-corrected direction, float32 of the shape of ``gradient``."""
        self._count(state, gradient)
        return self._corrected(state, gradient.reshape(-1), group, slice(0, gradient.numel())).view(gradient.shape)

    def _count(self, state: dict, like: torch.Tensor) -> None:
        """One more step of this state, which begins with moments of the shape of ``like``."""
        if "exp_avg" not in state:
            self._begin(state, like)
        state["step"] = state.get("step", 0) + 1

    def _corrected(self, state: dict, gradient: torch.Tensor, group, here: slice) -> torch.Tensor:
        """Direction of the entries ``here`` of a flattened state; ``eps`` is added before the correction, as in the authors' code."""
        (b1, b2), t = group["betas"], state["step"]
        first, second = self._moments(state, here)
        first.mul_(b1).add_(gradient, alpha=1 - b1)
        second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        found = second.sqrt().add_(group["eps"])
        torch.div(first, found, out=found).mul_((1 - b2**t) ** 0.5 / (1 - b1**t))
        self._keep(state, first, second, here)
        return found

    def _begin(self, state: dict, like: torch.Tensor) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(like.shape, dtype=torch.float32, device=like.device)

    def _moments(self, state: dict, here: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Both moments of the entries ``here``, flat float32."""
        return state["exp_avg"].view(-1)[here], state["exp_avg_sq"].view(-1)[here]

    def _keep(self, state: dict, first: torch.Tensor, second: torch.Tensor, here: slice) -> None:
        """Put changed moments back; these were changed in place."""

    def _move(self, p, group, direction: torch.Tensor, scale: float) -> None:
        p.add_(direction.to(p.dtype), alpha=-group["lr"] * scale)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    # -- resume ------------------------------------------------------------------------------------------
    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, saved in state_dict["state"].items():
            # torch casts a state to its parameter's type, which would round moments and break integers.
            p = parameters[i]
            self.state[p] = {k: v.to(p.device) if torch.is_tensor(v) else v for k, v in saved.items()}
            if "captured" in saved:
                p.captured = saved["captured"]


def put(state: dict, name: str, value: torch.Tensor) -> None:
    """Keep ``value`` in the place of what was there: new blocks in every step would scatter over the heap and hold it open."""
    if name in state and state[name].shape == value.shape:
        state[name].copy_(value)
    else:
        state[name] = value


def release(model) -> None:
    """Take the hooks of a ``Projected`` optimizer off a model."""
    for p in model.parameters():
        for name in ("projecting", "captured"):
            found = p.__dict__.pop(name, None)
            if name == "projecting" and found is not None:
                found.remove()

"""Spectral alignment: an alarm when the inputs of a layer gather on one side of its weight's leading direction."""

from __future__ import annotations

from engines.claim import Claim
from engines.lazy import torch
from engines.method import Card, hyper, register
from engines.training.switch import Observer, Switch

ITERATIONS = 8
"""Power iterations from a random start; later checks go on from the last vectors."""


@register
class SpectralAlignment(Switch):
    """Sign diversity of <x, v1> over tokens x, v1 the leading right singular vector of the weight [out, in] that x enters.

    Source: Spectral Alignment as Predictor of Loss Explosion in Neural Network Training.
    """

    card = Card(
        id="spectral-alignment", name="Spectral alignment", family="switch", year=2025,
        title="Spectral Alignment as Predictor of Loss Explosion in Neural Network Training",
        summary="Raises an alarm when nearly all inputs of a layer lie on one side of its weight's leading singular direction.",
        needs=("a stage that trains", "a layer whose inputs had mixed signs before: it is judged against itself"),
        cannot=("only warns: it changes nothing in the training", "says little where the two largest singular values are alike"),
        differs="Reconstructed from the abstract: the paper's method section was not at hand. Chosen here: sign diversity is the share of the "
                "rarer sign among random tokens of the step's first micro-batch (padding and the first position of each row left "
                "out); the vector comes from two warm iterations on a plane of two vectors, which also tells the gap of the singular "
                "values; the alarm is raised below 5 % in three checks in a row, after the matrix has been above 20 %, every 10 steps. In the bundled language model most matrices are one-sided from the "
                "beginning (median about 7 %), so few of them can raise an alarm; the curve shows the lowest of those.")
    claims = (
        Claim("cheap", "Watching costs little beside the training.", ours={"method": "full", "training": {"switches": ["spectral-alignment"]}},
              against={"method": "full"}, measure="seconds", expect="at most", factor=1.05, differs="the paper gives no figure; 5 % is taken here, as the "
              "median over steps of which one in ten looks"),
        Claim("warns-early", "The signs collapse markedly earlier than the loss explodes (language models trained from random weights).",
              not_comparable="an explosion builds up over thousands of steps of training from random weights, which three minutes do not hold; when "
              "ten times the usual rate forces one within 60 steps, the alarm comes about 15 steps after the loss begins to rise, and at the usual "
              "rate there is none"),
    )

    every: int = hyper(10, "Steps between two checks", low=1, high=10_000)
    tokens: int = hyper(512, "Tokens looked at in a check, drawn at random", low=16, high=65_536)
    low: float = hyper(0.05, "Alarm below this sign diversity (0.5: signs are even, 0: all alike)", low=0.0, high=0.5)
    high: float = hyper(0.2, "Only matrices that have been above this before are judged", low=0.0, high=0.5)
    patience: int = hyper(3, "Checks in a row below the bound before the alarm", low=1, high=1000)
    iterations: int = hyper(2, "Power iterations of a check", low=1, high=16, advanced=True)
    gap: float = hyper(1.02, "A matrix whose largest singular value is less than so many times the second raises no alarm", low=1.0, high=100.0,
                       advanced=True)

    def extra_bytes(self, profile, footprint) -> int:
        largest = max((m.size for m in profile.matrices), default=0)
        return 4 * (sum(2 * m.inp for m in profile.matrices) + 2 * largest + self.tokens * profile.hidden)

    def step_cost(self, profile, footprint):
        size = sum(m.size for m in profile.matrices)
        return 8.0 * self.iterations * size / self.every, 4.0 * (2 * self.iterations + 2) * size / self.every

    def observer(self, loop):
        return Alarm(self, loop)


class Alarm(Observer):
    """``state``: vectors {matrix: [in, 2]}, judged {matrix: [healthy step or -1, its diversity, checks below, alarmed 0 or 1]}."""

    def __init__(self, switch, loop):
        super().__init__(switch, loop)
        modules = dict(loop.model.named_modules())
        self.matrices = {m.name: m for m in self.context.profile.matrices if m.name in modules and min(m.out, m.inp) > 1}
        self.modules = {n: modules[n] for n in self.matrices}
        self.handles: list = []
        self.counts: dict[str, torch.Tensor] = {}
        self.rows: dict[tuple, torch.Tensor] = {}
        self.mask = None
        self.found: dict[str, float] = {}
        self.gaps: dict[str, float] = {}

    def before_step(self) -> None:
        self._let_go()
        if self.context.step % self.switch.every:
            return
        vectors, gaps = self.state.setdefault("vectors", {}), {}
        with torch.no_grad(), torch.autocast(self.loop.device.split(":")[0], enabled=False):
            for i, (name, module) in enumerate(self.modules.items()):
                weight = effective(module)
                if weight is None:
                    continue
                known = vectors.get(name)
                start = known.to(weight.device) if known is not None else torch.randn(
                    weight.shape[1], 2, generator=self.context.generator(4001 + i)).to(weight.device)
                vectors[name], gaps[name] = leading(weight, start, self.switch.iterations if known is not None else ITERATIONS)
        self._gaps = gaps
        self.handles = [self.modules[n].register_forward_pre_hook(self._look(n)) for n in gaps]
        self.handles.append(self.loop.model.register_forward_pre_hook(self._padding, with_kwargs=True))

    def _let_go(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.counts, self.rows, self.mask = [], {}, {}, None

    def _padding(self, module, args, kwargs) -> None:
        if not self.counts:
            self.mask = kwargs.get("attention_mask")

    def _look(self, name: str):
        def hook(module, args) -> None:
            if name in self.counts or not args:         # a recomputation, or a later micro-batch
                return
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                x = args[0].detach()
                x = x.reshape(-1, x.shape[-1])[self._chosen(args[0].shape[:-1], x.device)].float()
                side = x @ self.state["vectors"][name][:, 0]
                self.counts[name] = torch.stack([(side > 0).sum(), (side < 0).sum()])
        return hook

    def _chosen(self, shape, device):
        """Indices of random tokens; the first position of each row and padding are left out."""
        if shape not in self.rows:
            allowed = torch.ones(shape, dtype=torch.bool)
            if len(shape) == 2:
                if self.mask is not None and tuple(self.mask.shape) == tuple(shape):
                    allowed &= self.mask.cpu().bool()
                if shape[1] > 1:
                    allowed[:, 0] = False
            where = allowed.flatten().nonzero()[:, 0]
            order = torch.randperm(len(where), generator=self.context.generator(9001 + self.context.step))
            self.rows[shape] = where[order[:self.switch.tokens]].to(device)
        return self.rows[shape]

    # -- what was found --------------------------------------------------------------------------------------
    def after_backward(self) -> None:
        if not self.handles:
            return
        counts = dict(self.counts)
        self._let_go()
        if not counts:
            return
        names = list(counts)
        signs = torch.stack([counts[n] for n in names]).tolist()
        gaps = torch.stack([self._gaps[n] for n in names]).tolist()
        self.gaps = dict(zip(names, gaps))
        self.found = {n: min(a, b) / (a + b) for n, (a, b) in zip(names, signs) if a + b}
        if not self.found:
            return
        step, ordered = self.loop.run_step, sorted(self.found.values())
        self._judge(step)
        # The lowest of those that can raise an alarm: in many sound models some layers are one-sided from the beginning.
        mixed = [q for n, q in self.found.items() if self.state["judged"][n][0] >= 0]
        self.context.reporter.points(step, {"sign_diversity_median": ordered[len(ordered) // 2], **({"sign_diversity": min(mixed)} if mixed else {})})

    def _judge(self, step: int) -> None:
        switch, judged, raised, calm = self.switch, self.state.setdefault("judged", {}), [], []
        for name, q in self.found.items():
            healthy, before, low, alarmed = judged.get(name, [-1, 0.0, 0, 0])
            if q > switch.high:
                healthy, before = step, q
                if alarmed:
                    calm.append(name)
                alarmed = 0
            low = low + 1 if q < switch.low and self.gaps[name] >= switch.gap else 0
            if low >= switch.patience and healthy >= 0 and not alarmed:
                alarmed = 1
                raised.append(name)
            judged[name] = [healthy, before, low, alarmed]
        if raised:
            self._raise(step, raised, judged)
        elif calm and not any(j[3] for j in judged.values()):
            self.context.reporter.event("alarm", f"Spectral alarm over at step {step:,}: signs are mixed again in every layer", step=step, over=True)

    def _raise(self, step: int, raised: list[str], judged: dict) -> None:
        worst = min(raised, key=self.found.get)
        m, (healthy, before, _, _), q = self.matrices[worst], judged[worst], self.found[worst]
        also = f" (and of {len(raised) - 1} more matrices)" if len(raised) > 2 else " (and of one more matrix)" if len(raised) == 2 else ""
        lr = self.loop.settings.lr * self.loop._rate()  # not that of a new head, which may be ten times as large
        self.context.reporter.event(
            "alarm", f"Spectral alarm at step {step:,}: {1 - q:.0%} of the inputs of {m.role} in layer {m.layer}{also} lie on one side of the "
            f"weight's leading direction, {1 - before:.0%} at step {healthy:,}. The loss may explode: lower the learning rate (now {lr:.2g})",
            step=step, matrices=raised, diversity=q, healthy_step=healthy, over=False)

    def layers(self):
        places = self.matrices
        found = {"diversity": [[places[n].layer, places[n].role, q] for n, q in self.found.items()],
                 "gap": [[places[n].layer, places[n].role, g] for n, g in self.gaps.items()]}
        return {k: v for k, v in found.items() if v}


def effective(module):
    """The weight [out, in] in float32 with which ``module`` multiplies now, or None where there is no such matrix."""
    from engines.layers.adapter import Adapter
    if hasattr(module, "lora_A") and hasattr(module, "_fettle_mask"):
        from engines.adaptation import _peft
        return _peft.effective(module)
    if isinstance(module, Adapter):
        try:
            return module.masked().float()
        except NotImplementedError:
            return module.weight.float()        # its update depends on the input
    if hasattr(module, "dequantize"):
        return module.dequantize()              # integers that are trained
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    return (weight if isinstance(module, torch.nn.Linear) else weight.t()).float()


def leading(weight, start, iterations: int):
    """Plane of the two largest right singular vectors of ``weight`` [out, in], the leading one first.

    Args:
        start: [in, 2], from which the power iteration goes on.

    Returns:
        vectors [in, 2], orthonormal, and the ratio of the two singular values (a tensor without dimensions).
    """
    plane = start
    for _ in range(iterations):
        plane = weight.t() @ (weight @ plane)
        first = plane[:, 0] / plane[:, 0].norm().clamp_min(1e-30)
        second = plane[:, 1] - first * (first @ plane[:, 1])
        plane = torch.stack([first, second / second.norm().clamp_min(1e-30)], 1)
    # Within the plane the singular vectors are exact: the eigenvectors of a symmetric 2 x 2 matrix, in closed form.
    image = weight @ plane
    gram = image.t() @ image
    a, b, c = gram[0, 0], gram[0, 1], gram[1, 1]
    angle = 0.5 * torch.atan2(2 * b, a - c)
    cos, sin = angle.cos(), angle.sin()
    plane = torch.stack([cos * plane[:, 0] + sin * plane[:, 1], cos * plane[:, 1] - sin * plane[:, 0]], 1)
    middle, half = (a + c) / 2, torch.hypot((a - c) / 2, b)
    ratio = ((middle + half) / (middle - half).clamp_min(1e-30)).clamp(1.0, 1e12).sqrt()
    return plane, ratio

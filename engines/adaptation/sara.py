"""SaRA: the entries of smallest size are trained, held together by a nuclear norm, and chosen again at half of the run."""

from __future__ import annotations

from engines.adaptation import _peft
from engines.adaptation._adapter import AdapterMethod, adapters
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, hyper, register


@register
class Sara(AdapterMethod):
    """W with its entries of |w| < threshold trained as a vector; the rest is frozen, bit by bit.

    Source: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation.
    """

    card = Card(
        id="sara", name="SaRA", family="adaptation",
        title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", year=2024,
        summary="Trains only the entries that are nearly zero, as vectors in their places, kept low-rank by a nuclear norm.",
        needs=("training data", "one singular value decomposition of one matrix in each step"),
        cannot=("does not make the model smaller or faster", "no separate adapter file: the update is sparse, not of low rank",
                "computes the whole gradient of each matrix for a moment"),
        trains=True,
        differs="Shown on diffusion models; here matrices inside the blocks are chosen from (no biases, norms or embeddings). The threshold "
                "comes from the share that is trained, over all matrices together, so that it does not depend on the scale of the "
                "weights; the paper's 2e-3 is the option threshold, which lowers it. After the released masked-gradient optimizer: "
                "signs are kept and the nuclear norm acts. The step that chooses again also trains. Zeros of an earlier pruning are "
                "not chosen. The second choice is saved as vectors, not rebuilt from the weights.")

    claims = (
        Claim("optimizer", "Gradients and optimizer states only of the chosen entries (the smallest 10 to 20 % of the weights; no figures in the "
              "abstract).", ours={"method": "sara", "share": 0.1}, against={"method": "full"},
              measure="optimizer", expect="at most", factor=0.15, differs="a language model of 5.3 M parameters, AdamW"),
        Claim("above-lora", "Better than LoRA on Stable Diffusion models (no figures in the abstract).", ours={"method": "sara", "share": 0.05},
              against={"method": "lora", "rank": 8},
              differs="a language model of 5.3 M parameters on Python's reference prose, 60 steps, no diffusion; about equal trained parameters"),
        Claim("prior-kept", "Keeps more of what the model could do before than LoRA does (no figures in the abstract).",
              ours={"method": "sara", "share": 0.05}, against={"method": "lora", "rank": 8}, measure="forgetting", elsewhere="python-code",
              differs="a language model of 5.3 M parameters that comes from Python code and is trained on Python's reference prose, 60 steps, no "
                      "diffusion; about equal trained parameters"),
    )

    share: float = hyper(0.1, "Share of the weights that are trained, the smallest of all matrices together; auto takes the largest that "
                              "obeys the limit on trainable parameters", low=0.0001, high=1.0, lever="trainable", log=True)
    threshold: float = hyper(0.0, "Train only entries smaller than this (the paper takes 0.002); 0 means that the share decides alone",
                             low=0.0, high=10.0)
    nuclear: float = hyper(5e-4, "Weight of the nuclear norm of the trained entries, of one matrix drawn in each step", low=0.0, high=10.0)
    side: int = hyper(64, "Matrices are drawn for it whose smaller side is above this", low=0, high=100000, advanced=True)
    again: float = hyper(0.5, "Share of the budget after which the entries that are still small are chosen again; 1 never", low=0.0, high=1.0)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    size_field = "share"
    learning_rate = 3e-3

    @property
    def exact_count(self) -> bool:
        """False: with a threshold the weights decide how many entries are below it."""
        return not self.threshold

    # -- from shapes -------------------------------------------------------------------------------------
    def size(self) -> float:
        return 0.1 if self.share == AUTO else self.share

    def inner_rank(self, size) -> int:
        return 0

    def entries(self, found, share: float) -> int:
        return max(1, round(share * sum(m.size for m in found)))

    def trained(self, profile, size: float | None = None) -> int:
        return self.entries(self.targeted(profile), self.size() if size is None else size) + _peft.head_parameters(profile)

    def check(self, profile) -> None:
        _peft.check_rank("sara", "targets", AUTO, self.targeted(profile), self.targets)

    def largest(self, profile, budget):
        limit, head, found = budget.trainable_count(profile.parameters), _peft.head_parameters(profile), self.targeted(profile)
        if limit is None:
            return 0.1, "no limit on trainable parameters: the usual tenth"
        whole = sum(m.size for m in found)
        share = min(1.0, int((limit - head) / whole * 1e6) / 1e6)
        while share > 0 and self.trained(profile, share) > limit:
            share = round(share - 1e-6, 6)
        if share < 1e-4:
            raise InputError("budget.trainable", budget.trainable, f"the smallest share, a ten-thousandth, trains {self.trained(profile, 1e-4):,} "
                             f"parameters, the limit is {limit:,}", "Raise the limit")
        return share, f"{self.trained(profile, share):,} trainable parameters obey the limit of {limit:,}"

    def extra_bytes(self, profile, batch, found) -> int:
        # Positions of all entries, and one whole gradient or decomposition at a time.
        return 8 * self.entries(found, self.size()) + 16 * max(m.size for m in found)

    # -- in a live model ---------------------------------------------------------------------------------
    def prepare(self, model, context, chosen) -> None:
        # Before the weights are brought into half precision, so that the choice is by the values as they came.
        sizes = []
        for m, module in chosen:
            size = module.weight.detach().float().abs()
            mask = context.masks.get(f"{m.name}.weight")
            sizes.append((size if mask is None else size.masked_fill(~mask.to(size.device), float("inf"))).reshape(-1).cpu())
        every = torch.cat(sizes)
        count = min(self.entries([m for m, _ in chosen], self.share), int(torch.isfinite(every).sum()))
        mask, bound = smallest(every, count)
        if self.threshold:
            mask, bound = mask & (every < self.threshold), min(bound, self.threshold)
            if not mask.any():
                raise InputError("sara.threshold", self.threshold, f"no entry is smaller: the smallest is {float(every.min()):.2g}",
                                 "Raise it, or set it to 0")
        places = {}
        for (m, module), part in zip(chosen, mask.split([len(s) for s in sizes])):
            places[m.name] = part.nonzero().flatten().to(module.weight.device)
        # The entry at the bound is chosen: the next one up is the threshold of the second choice.
        context.state["threshold"] = bound * (1 + 1e-6)
        context.state["first"] = {name: len(index) for name, index in places.items()}
        object.__setattr__(context, "_places", places)
        super().prepare(model, context, chosen)

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.sara import Smallest
        return Smallest(module, context._places[matrix.name], mask=mask)

    def apply(self, model, context):
        model = super().apply(model, context)
        object.__delattr__(context, "_places")
        if context.resuming and context.checkpoint is not None:
            from engines.training.checkpoint import state_of
            counts = state_of(context.checkpoint).get("second")
            for name, layer in adapters(model) if counts else ():
                # Only the shapes matter, the contents come with the checkpoint; no two may share memory.
                kept = counts[name]
                layer.shrink(layer.index[:kept].clone(), layer.values.detach()[:kept].clone(), layer.index[kept:].clone(),
                             layer.values.detach()[kept:].clone())
        return model

    def before_step(self, model, context) -> None:
        if context.progress < self.again or self.again >= 1.0 or "second" in context.state:
            return
        renewed = {}
        for _, layer in adapters(model):
            context.optimizer.state.pop(old := layer.values, None)
            layer.choose_again(context.state["threshold"])
            renewed[id(old)] = (old, layer.values)
        for group in context.optimizer.param_groups:
            group["params"] = [renewed.get(id(p), (None, p))[1] for p in group["params"]]
        context.state["second"] = {name: len(layer.index) for name, layer in adapters(model)}
        first, second = sum(context.state["first"].values()), sum(context.state["second"].values())
        context.reporter.log(f"{second:,} of {first:,} entries are still small and are trained on; the others keep what they have learned")

    def after_backward(self, model, context) -> None:
        if not self.nuclear:
            return
        from engines.layers.sara import nuclear
        able = [layer for _, layer in adapters(model) if min(layer.out, layer.inp) > self.side and len(layer.index) > 100]
        if not able:
            return
        drawn = torch.randint(len(able), (), generator=context.generator(10_000 + context.step))
        layer = able[int(drawn)]
        with torch.no_grad():
            _, slope = nuclear(layer.base.weight, layer.index, layer.values)
            if layer.values.grad is not None:
                layer.values.grad.add_(slope, alpha=self.nuclear)

    def after_step(self, model, context) -> None:
        for _, layer in adapters(model):
            layer.write()

    def layers(self, model, context):
        return _peft.place_map(model, adapters(model), "trained", lambda layer: len(layer.index) / layer.weight.numel())


def smallest(values, count: int):
    """(bool [n], True at the ``count`` smallest of ``values`` [n] on the CPU, the first of equals; the largest of them), without a sort."""
    import numpy as np
    bound = float(np.partition(values.numpy(), count - 1)[count - 1])
    mask = values < bound
    equal = (values == bound).nonzero().flatten()
    mask[equal[:count - int(mask.sum())]] = True
    return mask, bound

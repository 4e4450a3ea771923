"""Per-layer levels measured on a live model: damage of one matrix alone, and divergence of whole settings.

Weights are [out, in] whatever the storage order. All figures compare with the model as it stood when ``Variants`` was made.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from engines.errors import StopRequested

ROWS = 8
"""Sequences per forward pass."""


class Variants:
    """The matrices of a live model, each of which can be put at one of its levels and back.

    Args:
        found: ``engines.models.matrices(model)``.
        make: (index of the matrix, level, dense weight [out, in]) -> the weight at that level, of the same shape.
    """

    def __init__(self, found: list, make: Callable):
        from engines.models import weight
        self.found, self.make = found, make
        self.views = [weight(module).detach() for _, module in found]
        self.dense = [view.clone() for view in self.views]
        self.now: list[int | None] = [None] * len(found)

    def put(self, index: int, level: int | None) -> None:
        """Write one matrix at ``level``; None is the weight as it came."""
        if self.now[index] != level:
            value = self.dense[index] if level is None else self.make(index, level, self.dense[index])
            self.views[index].copy_(value)
            self.now[index] = level

    def put_all(self, choice) -> None:
        """Write every matrix; only those that change are touched."""
        for index, level in enumerate(choice):
            self.put(index, level)

    def restore(self) -> None:
        """All weights as they came."""
        self.put_all([None] * len(self.found))


class Judge:
    """Measures a live model against its dense self on calibration inputs; a context manager, which leaves the weights as they came.

    Args:
        samples: inputs without padding, leading dimension 1, as from ``Context.calibration``.
        wants: asked between measurements; ``stop`` or ``pause`` ends them with ``StopRequested``.
    """

    def __init__(self, model, variants: Variants, samples: list[dict], *, task: str, device: str = "cpu", seed: int = 0,
                 wants: Callable[[], str | None] = lambda: None):
        from engines.training.loss import plain_head, unwrap
        self.model, self.variants, self.samples, self.task, self.device = model, variants, samples, task, device
        self.seed, self.wants = seed, wants
        self.head = plain_head(model) if task == "causal-lm" else None
        self.body = getattr(unwrap(model), unwrap(model).base_model_prefix) if self.head is not None else None
        self.lengths = [_length(s, model.config) for s in samples]

    def __enter__(self):
        self.training = self.model.training
        self.model.eval()
        return self

    def __exit__(self, *error):
        self.variants.restore()
        self.model.train(self.training)

    # -- running -----------------------------------------------------------------------------------------
    def _outputs(self, batch: dict):
        """[rows, positions, hidden] before the head of a language model that has a plain one, else logits."""
        batch = {k: v.to(self.device) for k, v in batch.items()}
        if self.body is not None:
            return self.body(**batch, use_cache=False).last_hidden_state
        more = {"use_cache": False} if self.task == "causal-lm" else {}
        return self.model(**batch, **more).logits

    def _logits(self, outputs):
        return (self.head(outputs.to(self.head.weight.dtype)) if self.head is not None else outputs).float()

    def _ask(self) -> None:
        if self.wants() in ("stop", "pause"):
            raise StopRequested(self.wants())

    def batch(self, tokens: int, draw: int) -> list[dict]:
        """A minibatch of ``tokens`` tokens of a language model: whole sequences without repetition, the last one cut (to two at least).

        For classifiers whole examples until ``tokens`` positions are reached. Fewer when the calibration data hold fewer.
        """
        from engines.pruning._blocks import stack
        order = list(range(len(self.samples)))
        random.Random(self.seed * 1_000_003 + draw).shuffle(order)
        chosen, left = [], tokens
        for i in order:
            if left < (2 if self.task == "causal-lm" and chosen else 1):
                break
            sample = self.samples[i]
            if self.task == "causal-lm" and self.lengths[i] > left:
                sample = {k: v[:, :max(2, left)] for k, v in sample.items()}
            chosen.append(sample)
            left -= self.lengths[i]
        return stack(chosen, ROWS)

    # -- whole settings ----------------------------------------------------------------------------------
    def divergence(self, choices: list, tokens: int, draw: int) -> list[float]:
        """KL(dense || variant) of each choice in nats per position, on minibatch ``draw``; the search's fitness.

        The last position of a sequence, which predicts nothing that is there, is left out.
        """
        batches = self.batch(tokens, draw)
        cut = slice(None, -1) if self.task == "causal-lm" else slice(None)
        with torch.inference_mode():
            self.variants.restore()
            dense = [self._outputs(b)[:, cut].flatten(0, -2) for b in batches]
            # Targets are kept where they are small; a wide vocabulary is gone through again for each choice.
            held = [self._targets(d) for d in dense] if sum(len(d) for d in dense) * self._width() <= 1 << 25 else None
            sums = []
            for choice in choices:
                self._ask()
                self.variants.put_all(choice)
                total, count = 0.0, 0
                for i, b in enumerate(batches):
                    found = self._outputs(b)[:, cut].flatten(0, -2)
                    for at in range(0, len(found), 512):
                        target = held[i][at: at + 512] if held else self._targets(dense[i][at: at + 512])
                        guess = torch.log_softmax(self._logits(found[at: at + 512]), -1)
                        total += float(torch.nn.functional.kl_div(guess, target, reduction="sum", log_target=True))
                    count += len(found)
                sums.append(total / max(1, count))
            self.variants.restore()
        return sums

    def _targets(self, outputs):
        return torch.log_softmax(self._logits(outputs), -1)

    def _width(self) -> int:
        return self.head.weight.shape[0] if self.head is not None else max(getattr(self.model.config, "num_labels", 2), 2)

    # -- one matrix at a time ----------------------------------------------------------------------------
    def distortion(self, levels: list[int], tokens: int, *, worst: bool = True, watch: Callable[[int], None] | None = None) -> list[list[float]]:
        """Squared change of the network's logits when one matrix alone is at each of its levels.

        Mean over positions and classes of each sample; of the samples the largest (``worst``) or the mean. Blocks before the
        matrix are not computed again.

        Args:
            levels: number of levels of each matrix.
            tokens: calibration tokens.
            watch: sees the number of matrices that are done.

        Returns:
            for each matrix the distortion at each level.

        Source: Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks.
        """
        batches = self.batch(tokens, 0)
        with torch.inference_mode(), _Suffix(self.model, self.variants.found) as suffix:
            gram = None
            if self.head is not None:
                w = self.head.weight.float()
                gram = w.t() @ w / w.shape[0]       # mean square of the logits' change from that of the hidden states
            self.variants.restore()
            dense = [suffix.record(lambda b=b: self._outputs(b)) for b in batches]
            out = []
            for index, count in enumerate(levels):
                row = []
                for level in range(count):
                    self._ask()
                    self.variants.put(index, level)
                    worst_of, total, n = 0.0, 0.0, 0
                    for i, b in enumerate(batches):
                        found = suffix.run(i, self.variants.found[index][0].layer, lambda b=b: self._outputs(b))
                        change = (found - dense[i]).float()
                        square = ((change @ gram) * change).sum(-1) if gram is not None else change.square().mean(-1)
                        each = square.flatten(1).mean(1) if square.dim() > 1 else square
                        worst_of, total, n = max(worst_of, float(each.max())), total + float(each.sum()), n + len(each)
                    row.append(max(0.0, worst_of if worst else total / max(1, n)))
                self.variants.put(index, None)
                out.append(row)
                if watch is not None:
                    watch(index + 1)
        return out


class _Suffix:
    """Runs a model from one block on: the blocks before it give back what they gave in the dense pass."""

    def __init__(self, model, found):
        from engines.pruning._blocks import block_list
        self.blocks = list(block_list(model, found))
        self.outputs: list[list] = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for block in self.blocks:
            block.__dict__.pop("forward", None)

    def record(self, run):
        """A dense pass over one more batch; returns its outputs."""
        kept: list = []
        handles = [block.register_forward_hook(lambda m, args, out: kept.append(out)) for block in self.blocks]
        try:
            found = run()
        finally:
            for handle in handles:
                handle.remove()
        self.outputs.append(kept)
        return found

    def run(self, batch: int, layer: int, run):
        """As ``run()``, with blocks before ``layer`` skipped, if this model calls each block exactly once."""
        kept = self.outputs[batch]
        if len(kept) != len(self.blocks):
            return run()
        for at, block in enumerate(self.blocks):
            if at < layer:
                block.forward = lambda *args, _kept=kept[at], **kwargs: _kept
            else:
                block.__dict__.pop("forward", None)
        return run()


def _length(sample: dict, config) -> int:
    """Positions of one sample: tokens of a text, patches of an image."""
    if "pixel_values" in sample:
        patch = getattr(config, "patch_size", None) or 16
        height, width = sample["pixel_values"].shape[-2:]
        return max(1, height // patch) * max(1, width // patch) + 1
    return sample["input_ids"].shape[1]


# -- tables from weights alone ---------------------------------------------------------------------------------
def residuals(matrix, ranks: list[int], *, seed: int = 0) -> list[float]:
    """||A - best approximation of rank r||_F of a matrix [out, in] for each rank: sqrt of the squared singular values beyond r.

    Above 1,024 on the smaller side the leading singular values come from a randomized decomposition with five power iterations.

    Source: L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep Learning.
    """
    a = matrix.detach().float()
    top = max(ranks, default=0)
    if min(a.shape) <= 1024:
        tail = torch.linalg.svdvals(a.double()).square().flip(0).cumsum(0).flip(0)
        tail = torch.cat([tail, tail.new_zeros(1)])
        return [float(tail[min(r, len(tail) - 1)].clamp_min(0).sqrt()) for r in ranks]
    with torch.random.fork_rng(devices=[a.device] if a.is_cuda else []):
        torch.manual_seed(seed)
        leading = torch.svd_lowrank(a, q=min(top + 8, min(a.shape)), niter=5)[1].double().square().cumsum(0)
    whole = float(a.double().square().sum())
    return [max(0.0, whole - (float(leading[r - 1]) if r else 0.0)) ** 0.5 for r in ranks]

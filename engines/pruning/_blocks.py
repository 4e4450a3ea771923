"""Walks the blocks of a model in order with calibration data, so that each block is measured on what the
already changed blocks before it put out. Only the hidden states between two blocks are kept.
"""

from __future__ import annotations

import contextlib

from engines.lazy import torch


class _Captured(Exception):
    """Ends the forward pass once the first block has been called."""


def block_list(model, found):
    """The ``nn.ModuleList`` that holds the blocks, from the name of any matrix inside it.

    Args:
        found: ``engines.models.matrices(model)``.
    """
    matrix = found[0][0]
    head = matrix.name.split(f".{matrix.layer}.", 1)[0]
    return model.get_submodule(head)


def stack(samples: list[dict], rows: int) -> list[dict]:
    """Join calibration inputs of equal shapes into batches of at most ``rows``, the shortest first."""
    samples = sorted(samples, key=lambda s: [tuple(v.shape) for v in s.values()])
    batches: list[list[dict]] = []
    shape = None
    for sample in samples:
        now = {k: (v.shape[1:], v.dtype) for k, v in sample.items()}
        if now == shape and len(batches[-1]) < rows:
            batches[-1].append(sample)
        else:
            batches.append([sample])
            shape = now
    return [{k: torch.cat([s[k] for s in part]) for k in part[0]} if len(part) > 1 else part[0] for part in batches]


class BlockWalk:
    """``for layer, block, linears in walk:`` measure with ``walk.run(block)``, change, then ``walk.advance(block)``.

    Args:
        model: a transformers model.
        samples: calibration inputs, as from ``Context.calibration``.
        compute: ``bfloat16`` runs the products under autocast.
        rows: sequences per forward pass.
    """

    def __init__(self, model, samples: list[dict], *, device: str = "cpu", compute: str = "float32", rows: int = 8):
        from engines.models import matrices
        self.model, self.device, self.compute = model, device, compute
        self.found = matrices(model)
        self.blocks = block_list(model, self.found)
        self.sequences: list[int] = []
        self.hidden: list = []
        self.calls: list[list[tuple[tuple, dict]]] = []
        """For each batch the other arguments of its blocks: one entry when all blocks get the same, else one a block."""
        kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
        self.varied = len(set(kinds)) > 1
        self._capture(stack(samples, rows))

    def _autocast(self):
        if self.compute != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)

    def _capture(self, batches: list[dict]) -> None:
        def take(module, args, kwargs):
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            rest = args[1:]
            # A cache would grow with every repeated call of the block.
            for key in ("past_key_values", "past_key_value", "layer_past"):
                if key in kwargs:
                    kwargs[key] = None
            if "use_cache" in kwargs:
                kwargs["use_cache"] = False
            if module is self.blocks[0]:
                self.hidden.append(hidden.detach())
                last = self.calls[-1] if self.calls else None
                # Sequences of one length share their masks and positions: keep one copy.
                self.calls.append([last[0] if last is not None and _same(last[0], (rest, kwargs)) else (rest, kwargs)])
            else:
                known = next((c for c in self.calls[-1] if _same(c, (rest, kwargs))), None)
                self.calls[-1].append(known or (rest, kwargs))
            # Where local and global attention alternate, masks and rotary tables differ by block: all blocks are seen then.
            if not self.varied or module is self.blocks[-1]:
                raise _Captured

        training = self.model.training
        self.model.eval()
        watched = self.blocks if self.varied else self.blocks[:1]
        handles = [block.register_forward_pre_hook(take, with_kwargs=True) for block in watched]
        config = getattr(self.model, "config", None)
        cache = getattr(config, "use_cache", None)
        try:
            if cache is not None:
                config.use_cache = False
            with torch.no_grad(), self._autocast():
                for batch in batches:
                    batch = {k: v.to(self.device) for k, v in batch.items()}
                    self.sequences.append(next(iter(batch.values())).shape[0])
                    with contextlib.suppress(_Captured):
                        self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(training)
            if cache is not None:
                config.use_cache = cache
        if not self.hidden:
            raise RuntimeError("the calibration data never reached the first block")

    def __iter__(self):
        training = self.model.training
        self.model.eval()
        try:
            for layer, block in enumerate(self.blocks):
                yield layer, block, [(m, module) for m, module in self.found if m.layer == layer]
        finally:
            self.model.train(training)

    def run(self, block, watch: dict | None = None) -> None:
        """Forward all calibration data through ``block`` as it is; its outputs are not kept.

        Args:
            watch: module -> callable(input, sequences) that sees each input [..., features] of the module.
        """
        self._forward(block, watch or {}, keep=False)

    def advance(self, block) -> None:
        """Forward through the changed block; its outputs become the inputs of the next one."""
        self._forward(block, {}, keep=True)

    def _forward(self, block, watch: dict, keep: bool) -> None:
        count = [0]

        def hook(see):
            def before(module, args):
                see(args[0].detach(), count[0])
            return before

        handles = [module.register_forward_pre_hook(hook(see)) for module, see in watch.items()]
        try:
            with torch.no_grad(), self._autocast():
                at = next(i for i, b in enumerate(self.blocks) if b is block) if self.varied else 0
                for i, calls in enumerate(self.calls):
                    rest, kwargs = calls[at]
                    count[0] = self.sequences[i]
                    out = block(self.hidden[i], *rest, **kwargs)
                    if keep:
                        self.hidden[i] = out[0] if isinstance(out, tuple) else out
        finally:
            for handle in handles:
                handle.remove()


def _same(a, b) -> bool:
    """Equal arguments of two block calls, tensors compared by value."""
    if type(a) is not type(b) and not (isinstance(a, tuple) and isinstance(b, tuple)):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if torch.is_tensor(a):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    return a is b or a == b


class InputNorms:
    """Running mean over sequences of the sum over tokens of squared inputs: [features], float32 (Wanda's n_j)."""

    def __init__(self, features: int, device):
        self.mean = torch.zeros(features, dtype=torch.float32, device=device)
        self.seen = 0

    def __call__(self, x, sequences: int) -> None:
        total = x.reshape(-1, x.shape[-1]).float().square().sum(dim=0)
        self.mean.mul_(self.seen / (self.seen + sequences)).add_(total, alpha=1.0 / (self.seen + sequences))
        self.seen += sequences

    def norms(self):
        """||x_j||_2 of each input feature, up to a constant factor."""
        return self.mean.sqrt()

"""What the methods that look at data before training share: forward passes of the frozen model, and decisions made only once."""

from __future__ import annotations

import contextlib
import os

from engines.lazy import torch


@contextlib.contextmanager
def frozen(model, context):
    """The model as it scores: evaluation mode, no gradients, no cache, products in the stage's type; put back afterwards."""
    training, config = model.training, getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    half = context.compute == "bfloat16"
    model.eval()
    try:
        if cache is not None:
            config.use_cache = False
        with torch.no_grad(), torch.autocast(torch.device(context.device).type, torch.bfloat16, enabled=half):
            yield
    finally:
        model.train(training)
        if cache is not None:
            config.use_cache = cache


def look(model, context, inputs: dict, see: dict) -> None:
    """One forward pass through the model's body, inside ``frozen``.

    Args:
        inputs: as the model takes them; ``labels`` are left out, an ``attention_mask`` tells padding.
        see: module -> callable(rows); ``rows`` are its inputs at the places that are not padding, [tokens, features].
    """
    inputs = {k: v.to(context.device) for k, v in inputs.items() if k != "labels"}
    real = inputs.get("attention_mask")
    real = real.bool() if real is not None else None

    def hook(callback):
        def before(module, args):
            x = args[0].detach()
            with torch.autocast(x.device.type, enabled=False):      # statistics are not for half precision
                if real is not None and x.dim() == 3 and x.shape[:2] == real.shape:
                    callback(x[real])
                else:
                    callback(x.reshape(-1, x.shape[-1]))
        return before

    handles = [module.register_forward_pre_hook(hook(callback)) for module, callback in see.items()]
    try:
        # The head is left out: its products are the dearest of a small model, and nothing looks at them.
        getattr(model, "base_model", model)(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def once(context, name: str, make) -> dict:
    """Tensors by name that ``make()`` decides, only once: on a resume they are read from the stage's folder, where there is one.

    Adapters of other shapes could not be restored, and a base that was changed otherwise would not fit the restored factors.
    """
    file = start_file(context, name)
    if file is not None and context.resuming and file.is_file():
        from safetensors.torch import load_file
        return load_file(file)
    found = make()
    if file is not None:
        from safetensors.torch import save_file
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        save_file({k: v.detach().cpu().contiguous() for k, v in found.items()}, fresh)
        fresh.replace(file)
    return found


def start_file(context, name: str):
    """Where ``once`` keeps its decision, or None without a folder."""
    return context.folder / f"{name}-{context.stage}.safetensors" if context.folder is not None else None


def oriented(matrix, tensor):
    """A weight, gradient or mask as [out, in], whatever the layer stores."""
    return tensor.t() if matrix.conv1d else tensor


def most_parameters(found, total: int, caps: list[int], floor: int = 0) -> int:
    """The most parameters that ``total`` ranks can be when each matrix gets from ``floor`` to its cap of them.

    Args:
        found: ``Matrix`` entries; a rank of one has ``out + inp`` parameters.
    """
    used = sum(floor * (m.out + m.inp) for m in found)
    left = total - floor * len(found)
    for m, cap in sorted(zip(found, caps), key=lambda pair: -(pair[0].out + pair[0].inp)):
        take = min(left, cap - floor)
        used, left = used + take * (m.out + m.inp), left - take
    return used

"""Parts of a footprint that many methods share; torch-free."""

from __future__ import annotations

from engines import activations
from engines.method import Footprint
from engines.profile import BYTES, Batch, ModelProfile, Tensor
from engines.shapes import file_bytes

FLOATS = ("float32", "bfloat16", "float16", "float64")


SVD, INVERSE = 30.0, 10.0
"""What decompositions cost, in operations of products that take as long: times min(out, in)² max(out, in), and n³. Measured on a processor
for sides of 256 to 768; they run far below the rate of products."""


def passes(profile: ModelProfile, sequences: int, length: int, backward: float = 0.0) -> float:
    """Operations of forward passes (and ``backward`` times as many) through the blocks for ``sequences`` of ``length`` tokens."""
    length = profile.context if profile.task == "image-classification" else length
    return sequences * length * (2.0 * profile.block_parameters + profile.attention_flops_per_token(length)) * (1.0 + backward)


def decompositions(found) -> float:
    """Operations of one singular value decomposition of each ``Matrix``."""
    return SVD * sum(min(m.out, m.inp)**2 * max(m.out, m.inp) for m in found)


def held_bytes(profile: ModelProfile, dtype: str | None = None) -> int:
    """Bytes of all weights in memory, floating-point tensors in ``dtype`` or as stored."""
    return sum(count * BYTES.get(dtype if dtype and stored in FLOATS else stored, 4) for stored, count in profile.counts.items())


def stored_file(profile: ModelProfile, tensors) -> int:
    """Exact bytes of the file that holds ``tensors``, saved in the type of ``profile``."""
    kind = stored_dtype(profile)
    return file_bytes([Tensor(t.name, t.shape, kind if t.dtype in FLOATS[:3] else t.dtype) for t in tensors])


def stored_dtype(profile: ModelProfile) -> str:
    return profile.dtype if profile.dtype in FLOATS[:3] else "float32"


def result_of(profile: ModelProfile) -> dict:
    """``result``, ``result_parameters`` and ``bits_per_weight`` of a model saved in the type of ``profile``."""
    if "file" not in profile.memo:
        profile.memo["file"] = stored_file(profile, profile.tensors)
    return dict(result=profile.memo["file"], result_parameters=profile.parameters,
                bits_per_weight=8.0 * BYTES[stored_dtype(profile)])


def largest_matrix(profile: ModelProfile) -> int:
    """Entries of the largest matrix inside the blocks."""
    return max((m.size for m in profile.matrices), default=0)


def without_training(profile: ModelProfile, batch: Batch, *, extra: int = 0, sequences: int = 0, length: int = 0, rows: int = 8,
                     passes: float = 2.0, **changes) -> Footprint:
    """Footprint of a training-free stage.

    Args:
        batch: tells the type in which weights are held.
        extra: bytes of scores, masks and statistics.
        sequences, length: calibration data; each token goes ``passes`` times through every block.
        rows: sequences per forward pass.
    """
    length = profile.context if profile.task == "image-classification" else length
    live = activations.forward_bytes(profile, Batch(rows=min(rows, sequences), length=length)) if sequences else 0
    hidden = sequences * length * profile.hidden * 4
    flops = passes * (2.0 * profile.block_parameters + profile.attention_flops_per_token(length)) if sequences else 0.0
    values = dict(weights=held_bytes(profile, batch.weights), activations=live + hidden, extra=extra, flops_per_token=flops,
                  calibration_tokens=sequences * length, **result_of(profile))
    return Footprint(**{**values, **changes})


def with_training(profile: ModelProfile, batch: Batch, *, trainable: int, frozen: bool, backward: float, size: int = 4,
                  weights: int | None = None, adapter: int = 0, extra: int = 0, **options) -> dict:
    """The parts of a training stage as keyword arguments of ``Footprint``.

    Args:
        trainable: parameters that get a gradient and AdamW's two moments, ``size`` bytes each.
        backward: cost of the backward pass in forward passes (2 when every weight has a gradient).
        options: for ``activations.block_bytes``.
    """
    return dict(trainable=trainable, weights=held_bytes(profile, batch.weights) if weights is None else weights, adapter=adapter,
                gradients=size * trainable, optimizer=2 * size * trainable,
                activations=activations.train_bytes(profile, batch, frozen=frozen, **options),
                logits=activations.logits_bytes(profile, batch), extra=extra,
                flops_per_token=profile.flops_per_token * (1.0 + backward), **result_of(profile))

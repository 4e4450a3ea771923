"""The total that a mixture of bits keeps, fixed before anything is measured; torch-free but for ``rounded``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from engines.profile import BYTES, ModelProfile, Tensor
from engines.quantization import _shared
from engines.shapes import CODES

BY = ("lgreco", "rd", "evolution")
LEVELS = {"4,8": (4, 8), "3,4": (3, 4), "2,3,4": (2, 3, 4)}
"""Steps between neighbours are equal, so that matrices of one shape can trade them and keep the total."""


@dataclass(frozen=True)
class Plan:
    """Exact bytes of a mixture.

    ``bytes``: matrix -> bytes at each of ``levels``; ``start``: levels of one mixture with the total, ``total``: its bytes;
    ``header``: bytes of the JSON header that every mixture of this total fits in; ``file``: bytes of the saved file.
    """

    levels: tuple[int, ...]
    bytes: dict
    start: tuple[int, ...]
    total: int
    header: int
    file: int
    group: int
    table: bool


def tensors(m, bits: int, group: int) -> list[Tensor]:
    """The stored tensors of one matrix."""
    return _shared.int8_tensors(m.name, m.out, m.inp) if bits == 8 else _shared.int4_tensors(m.name, m.out, m.inp, bits, group, False)


def _bytes(rows) -> int:
    return sum(t.size * BYTES[t.dtype] for t in rows)


def spread(matrices, levels: tuple[int, ...], bits: float) -> tuple[int, ...]:
    """Index of the level of each matrix so that the average is at most ``bits`` and as near as whole matrices allow.

    Matrices of one shape get the two neighbouring levels in the same proportion; what is left goes to the largest that fit.
    """
    low = max(i for i, b in enumerate(levels) if b <= bits + 1e-9)
    if low + 1 == len(levels):
        return (low,) * len(matrices)
    share = (bits - levels[low]) / (levels[low + 1] - levels[low])
    spare = share * sum(m.size for m in matrices) * (1 + 1e-12)
    found = [low] * len(matrices)
    shapes: dict[tuple, list[int]] = {}
    for i, m in enumerate(matrices):
        shapes.setdefault((m.out, m.inp), []).append(i)
    waiting = []
    for members in shapes.values():
        count = int(share * len(members) + 1e-9)
        for i in members[:count]:
            found[i] += 1
            spare -= matrices[i].size
        waiting += members[count:]
    for i in sorted(waiting, key=lambda i: (-matrices[i].size, i)):
        if matrices[i].size <= spare:
            found[i] += 1
            spare -= matrices[i].size
    return tuple(found)


class Frame:
    """What all mixtures of one model have in common, counted once; ``plan`` is then quick enough for a search by size."""

    def __init__(self, profile: ModelProfile, matrices: list, levels: tuple[int, ...], group: int, table: bool):
        self.matrices, self.levels, self.group, self.table = matrices, levels, group, table
        shapes: dict[tuple, list] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.longest: list[list[tuple[int, int]]] = []
        for m in matrices:
            key = (m.out, m.inp)
            if key not in shapes:
                rows = [[Tensor(t.name.removeprefix(m.name), t.shape, t.dtype) for t in tensors(m, b, group)] for b in levels]
                shapes[key] = [(_bytes(r), len(r), sum(map(_entry, r))) for r in rows]
            path = len(m.name.encode())
            self.sizes[m.name] = tuple(size for size, _, _ in shapes[key])
            self.longest.append([(count, entries + count * path) for _, count, entries in shapes[key]])
        rest = _shared.stored(profile, {m.name: [] for m in matrices}, table)
        self.rest, self.entries, self.count = _bytes(rest), sum(map(_entry, rest)), len(rest)

    def plan(self, bits: float) -> Plan:
        """What every mixture with an average of ``bits`` stores."""
        start = spread(self.matrices, self.levels, bits)
        total = sum(self.sizes[m.name][c] for m, c in zip(self.matrices, start))
        # The longest entries of each matrix, with offsets of as many digits as the largest has.
        digits = 2 * len(str(total + self.rest))
        longest = self.entries + digits * self.count + sum(max(e + digits * n for n, e in each) for each in self.longest)
        empty = len(json.dumps({"__metadata__": {"format": "pt", "filler": ""}}, separators=(",", ":")))
        header = 8 * math.ceil((empty + longest) / 8)
        return Plan(self.levels, self.sizes, start, total, header, 8 + header + total + self.rest, self.group, self.table)


def _entry(t: Tensor) -> int:
    """Bytes of one tensor's entry in the header, comma included, without the digits of its two offsets."""
    shape = ",".join(map(str, t.shape))
    return len(f'"{t.name}":{{"dtype":"{CODES[t.dtype]}","shape":[{shape}],"data_offsets":[,]}},'.encode())


def most_bits(fits, least: float, most: float) -> float:
    """The largest average, in hundredths from ``least`` to ``most``, for which ``fits(bits)`` holds (it holds for ``least``)."""
    low, high = 0, round((most - least) * 100)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(round(least + middle / 100, 2)) else (low, middle - 1)
    return round(least + low / 100, 2)


def rounded(weight, bits: int, group: int, mse: bool = False):
    """A matrix [out, in] as its packed layer computes with it: fp32, rounded to nearest."""
    from engines.layers.int4 import quantize_groups
    from engines.layers.int8 import quantize_rows
    if bits == 8:
        q, scale = quantize_rows(weight)
        return q.float() * scale.float()[:, None]
    q, scale, zero = quantize_groups(weight, bits, group, False, mse)
    out, inp = weight.shape
    return ((q.float().view(out, -1, group) - zero.float()[..., None]) * scale[..., None]).view(out, inp)

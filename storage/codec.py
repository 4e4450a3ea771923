"""Between Python values and what a STRICT table holds."""

from __future__ import annotations

import json
import math
from typing import Any


def _plain(value: Any):
    """What json.dumps does not know: numpy scalars and arrays, paths, sets."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def _finite(value: Any):
    """A copy in which numbers that JSON cannot write (nan, inf) are None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def encode(value: Any) -> str | None:
    """Compact JSON text of ``value``; None stays None; numbers that are not finite become null."""
    if value is None:
        return None
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=_plain)


def decode(text: str | None, default: Any = None) -> Any:
    """The value of JSON ``text``; ``default`` where there is none."""
    return default if text is None else json.loads(text)


def number(value: Any) -> float | int | None:
    """``value`` as SQLite can bind it: numpy and torch scalars become Python numbers."""
    if value is None or type(value) in (int, float):
        return value
    return value.item() if hasattr(value, "item") else float(value)


def floats(values: Any) -> bytes | None:
    """Little-endian float32 bytes of an array; bytes are taken as they are."""
    if values is None or isinstance(values, (bytes, bytearray, memoryview)):
        return None if values is None else bytes(values)
    import numpy as np
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def leaves(value: Any, path: str = ""):
    """Yield ``(dotted path, last key, scalar)`` of nested dicts and lists; positions in lists are left out."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from leaves(child, path)
    elif value is not None and path:
        yield path, path.rsplit(".", 1)[-1], value

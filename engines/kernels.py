"""Choice of the CPU's kernels for float32 products."""

from __future__ import annotations

import contextlib
import functools

from engines.lazy import torch


@functools.cache
def _amd() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            return any("AuthenticAMD" in line for line in f)
    except OSError:
        return False


@functools.cache
def onednn_is_exact() -> bool:
    """True where oneDNN's path for float32 products is worth taking and keeps float32's accuracy.

    MKL's own path is slow on AMD processors (1.8 to 2.3 times was measured). The setting that leads to oneDNN allows bf16, which a
    processor with AMX would use; so the result itself is looked at, once.
    """
    if not _amd() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        g = torch.Generator().manual_seed(0)
        a, b = torch.randn(64, 256, generator=g), torch.randn(256, 64, generator=g)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        exact = a.double() @ b.double()
        error = float(((a @ b).double() - exact).norm() / exact.norm())
        error = max(error, float((torch.nn.functional.linear(a, b.t().contiguous()).double() - exact).norm() / exact.norm()))
    except (RuntimeError, AttributeError):
        return False
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    return error < 1e-5


@contextlib.contextmanager
def fast_float32():
    """Inside, float32 products take the fastest path of this CPU that keeps their accuracy; yields its name."""
    if not onednn_is_exact():
        yield "default"
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield "oneDNN"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before

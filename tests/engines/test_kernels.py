"""The fast path of float32 products keeps float32's accuracy and leaves no setting behind."""

import torch

from engines.kernels import fast_float32


def test_products_stay_float32_exact_and_the_setting_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    g = torch.Generator().manual_seed(1)
    x = torch.randn(48, 384, generator=g, requires_grad=True)
    w = torch.randn(160, 384, generator=g, requires_grad=True)
    with fast_float32():
        out = torch.nn.functional.linear(x, w)
        out.square().mean().backward()
    exact = x.detach().double() @ w.detach().double().t()
    assert float((out.detach().double() - exact).norm() / exact.norm()) < 1e-5
    grad = (2 / exact.numel()) * exact.t() @ x.detach().double()
    assert float((w.grad.double() - grad).norm() / grad.norm()) < 1e-5
    assert torch.backends.mkldnn.matmul.fp32_precision == before

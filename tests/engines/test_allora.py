"""ALLoRA against a worked example, explicit gradients and plain LoRA."""

import pytest
import torch
from torch import nn

from engines.layers.allora import AlLora, row_norms


def made(out, inp, rank, eta2=4.0, by="rows", mask=None, seed=0):
    torch.manual_seed(seed)
    layer = AlLora(nn.Linear(inp, out).requires_grad_(False), rank, eta2, by, torch.Generator().manual_seed(seed), mask=mask)
    nn.init.normal_(layer.b)
    return layer


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, rtol=1e-4)


def test_worked_example():
    layer = made(2, 2, 2)
    layer.base.weight.data.zero_()
    layer.a.data, layer.b.data = torch.tensor([[3.0, 4], [0, 1]]), torch.tensor([[1.0, 0], [0, 0]])
    close(layer.factor(), [0.436436, 2])
    x = torch.tensor([[1.0, 2]], requires_grad=True)
    layer(x).sum().backward()
    close(layer.a.grad, [[0.436436, 0.872872], [0, 0]])
    close(layer.b.grad, [[4.8008, 0.8729], [22, 4]])
    close(x.grad, [[3.0, 4]])


def test_starts_at_the_model_with_eta_in_every_row():
    base = nn.Linear(6, 5).requires_grad_(False)
    layer, x = AlLora(base, 2, 9.0), torch.randn(4, 6)
    assert torch.equal(layer(x), base(x))
    close(layer.factor(), [3.0] * 5)


def test_the_gram_form_is_the_length_of_the_rows():
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    close(row_norms(a, b), (b @ a).norm(dim=1), atol=1e-5)


def test_the_factor_falls_with_the_length_of_its_row():
    layer = made(6, 5, 2)
    order = (layer.b @ layer.a).norm(dim=1).argsort()
    assert (layer.factor()[order].diff() < 0).all()


@pytest.mark.parametrize("by", ["rows", "outputs"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(by, masked):
    torch.manual_seed(3)
    mask = torch.rand(6, 5) > 0.4 if masked else None
    layer, x, upstream = made(6, 5, 2, by=by, mask=mask), torch.randn(9, 5, requires_grad=True), torch.randn(9, 6)
    if masked:
        layer.base.weight.data *= mask
    (layer(x) * upstream).sum().backward()
    delta = (layer.b @ layer.a).detach() if mask is None else (layer.b @ layer.a).detach() * mask
    size = delta.norm(dim=1) if by == "rows" else (x @ delta.t()).abs().detach()
    scaled = upstream / (size + 0.25).sqrt()
    dense = scaled.t() @ x.detach()
    dense = dense if mask is None else dense * mask
    close(layer.a.grad, layer.b.detach().t() @ dense)
    close(layer.b.grad, dense @ layer.a.detach().t())
    close(x.grad, upstream @ (layer.weight + delta))
    close(layer(x).detach(), nn.functional.linear(x, layer.masked(), layer.bias).detach())


def escape(optimizer, adaptive: bool, rate: float) -> float:
    """Length of b a after fifty steps towards a fixed matrix."""
    torch.manual_seed(0)
    base = nn.Linear(8, 8, bias=False).requires_grad_(False)
    target, x = base.weight + 0.5 * torch.randn(8, 8), torch.randn(64, 8)
    layer = AlLora(base, 4, 4.0 if adaptive else 1e-8, generator=torch.Generator().manual_seed(0))
    opt = optimizer([layer.a, layer.b], lr=rate)
    for _ in range(50):
        opt.zero_grad()
        (layer(x) - x @ target.t()).square().mean().backward()
        if not adaptive:      # a constant factor of one: plain LoRA
            factor = 1e-8 ** 0.5
            layer.a.grad /= factor
            layer.b.grad /= factor
        opt.step()
    return float((layer.b @ layer.a).detach().norm())


def test_it_leaves_zero_faster_than_lora_under_sgd():
    assert escape(torch.optim.SGD, True, 0.02) > 1.2 * escape(torch.optim.SGD, False, 0.02)


def test_a_constant_factor_cancels_under_adam():
    torch.manual_seed(0)
    moved = []
    for scale in (1.0, 2.0):
        p = nn.Parameter(torch.ones(5))
        opt = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0, eps=0.0)
        for t in range(5):
            p.grad = scale * torch.sin(torch.arange(5.0) + t + 1)
            opt.step()
        moved.append(p.detach().clone())
    close(moved[0], moved[1], atol=1e-6)

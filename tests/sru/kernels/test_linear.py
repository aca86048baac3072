"""The layer's matrix product: the same numbers as torch's, whichever library makes them."""

import pytest
import torch
from torch.nn import functional as F

from sru.kernels import cpu
from sru.kernels.linear import MIN_ROWS, linear, prefers_onednn

on_amd = pytest.mark.skipif(not prefers_onednn(), reason="not an AMD processor, or a torch without oneDNN")


def inputs(shape: tuple[int, ...], out: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, shape[-1], generator=generator, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(*shape[:-1], out, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    "shape", [(0, 4, 8), (1, 8), (7, 1, 3), (MIN_ROWS, 8), (5, 9, 1), (40, 3, 300), (70, 129), (201, 70)]
)
@pytest.mark.parametrize("out", [1, 12, 384])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_values_and_gradients_are_exact(shape, out, biased):
    x, weight, grad = inputs(shape, out)
    tensors = [x, weight, *([torch.randn(out, requires_grad=True)] if biased else [])]
    y = linear(*tensors)
    found = [y, *torch.autograd.grad(y, tensors, grad)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y64 = F.linear(*exact)
    for got, expected in zip(found, [y64, *torch.autograd.grad(y64, exact, grad.double())], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def made_by_onednn(y: torch.Tensor) -> bool:
    return "_LinearBackward" in (y.grad_fn.name(), *(function.name() for function, _ in y.grad_fn.next_functions))


@on_amd
def test_large_float32_products_take_onednn_and_no_others():
    x, weight, _ = inputs((MIN_ROWS, 8), 12)
    assert made_by_onednn(linear(x, weight))
    assert not made_by_onednn(linear(x[1:], weight))
    assert not made_by_onednn(linear(x.double(), weight.double()))


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 130), (300, 257), (7, 1000)], ids=str)
def test_the_transpose_is_torchs(shape):
    for matrix in (torch.randn(shape), torch.randn(shape[0], shape[1] + 3)[:, 1:-2]):
        assert torch.equal(cpu.transpose_matrix(matrix), matrix.t())
        assert cpu.transpose_matrix(matrix).is_contiguous()


@on_amd
def test_only_large_matrices_and_the_smaller_ones_are_transposed_by_the_kernel(monkeypatch):
    sizes, sound = [], cpu.transpose_matrix
    monkeypatch.setattr(cpu, "transpose_matrix", lambda matrix: sizes.append(tuple(matrix.shape)) or sound(matrix))
    for rows, columns, out in ((100, 8, 200), (400, 300, 200), (400, 200, 300), (1000, 100, 800)):
        x, weight, grad = inputs((rows, columns), out)
        torch.autograd.grad(linear(x, weight), weight, grad)
    # Either the gradient, or x and what comes of it.
    assert sizes == [(400, 200), (400, 300), (1000, 100), (100, 800)]


def test_views_are_read_as_they_are():
    x, weight, _ = inputs((50, 6, 16), 24)
    for view in (x.transpose(0, 1), x[::2], x[:, 1:4], x.flip(0), x[:1].expand(50, 6, 16)):
        torch.testing.assert_close(linear(view, weight), F.linear(view, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, weight[::2]), F.linear(x, weight[::2]), rtol=1e-5, atol=1e-5)


def test_many_gradients_at_once_are_one_after_another():
    x, weight, _ = inputs((40, 1, 64), 192)
    y, grads = linear(x, weight), torch.randn(2, 40, 1, 192)
    together = torch.autograd.grad(y, (x, weight), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for many, one in zip(together, torch.autograd.grad(y, (x, weight), grad, retain_graph=True), strict=True):
            torch.testing.assert_close(many[i], one)


def test_the_gradient_has_a_gradient():
    x, weight, _ = inputs((64, 5), 40)

    def penalty(product, x, weight):
        return torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)[0].square().sum()

    found = torch.autograd.grad(penalty(linear, x, weight), (x, weight))
    expected = torch.autograd.grad(penalty(F.linear, x, weight), (x, weight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_autocast_and_transforms_keep_torchs_meaning():
    x, weight, _ = inputs((64, 8), 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    per_sample = torch.func.vmap(linear, (0, None))(torch.stack([x, x]), weight)
    torch.testing.assert_close(per_sample[1], F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_frozen_inputs_get_no_gradient():
    x, weight, _ = inputs((64, 8), 16)
    y = linear(x.detach(), weight)
    y.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(16, 8), rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits():
    x, weight, grad = inputs((300, 64), 96)
    runs = [torch.autograd.grad(linear(x, weight), (x, weight), grad) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_inputs_that_no_gradient_needs_may_be_changed():
    x, weight, _ = inputs((64, 8), 16)
    y = linear(x.detach(), weight)
    with torch.no_grad():
        weight.add_(1)  # the gradient of the weight does not need it
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(16, 8), rtol=1e-5, atol=1e-5)


def test_forward_derivatives_are_left_to_torch(monkeypatch):
    """oneDNN's product has none."""
    monkeypatch.setattr("sru.kernels.linear.prefers_onednn", lambda: True)
    x, weight, _ = inputs((MIN_ROWS, 8), 12)
    with torch.autograd.forward_ad.dual_level():
        y = linear(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)), weight)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, weight.sum(1).expand(MIN_ROWS, -1))

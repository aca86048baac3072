"""The loss of a softmax a few rows at a time, against torch's."""

import pytest
import torch
from torch.nn import functional as F

from tasks.modules.linear_cross_entropy import NUMBERS, linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients_are_torchs(monkeypatch, rows, smoothing, biased):
    monkeypatch.setitem(NUMBERS, "cpu", 5 * rows)
    monkeypatch.setattr("tasks.modules.linear_cross_entropy.ROWS", 0)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (5, 4), (5,))]
    h, weight, bias = tensors if biased else [*tensors[:2], None]
    targets = torch.tensor([0, 4, 2, 2, 1, 0, 3])
    used = [a for a in (h, weight, bias) if a is not None]
    found = linear_cross_entropy(h, weight, bias, targets, smoothing=smoothing)
    expected = F.cross_entropy(F.linear(h, weight, bias), targets, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found * 3, used), torch.autograd.grad(expected * 3, used), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_to_predict_is_a_loss_of_zero():
    h, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(h, weight, None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()
    assert h.grad.shape == (0, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_made(monkeypatch, mode):
    h, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    made, zeros_like = [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **options: made.append(a) or zeros_like(*a, **options))
    linear_cross_entropy(h, weight, None, torch.arange(6) % 5).backward()
    assert len(made) == 2
    with mode():
        loss = linear_cross_entropy(h, weight, None, torch.arange(6) % 5)
    torch.testing.assert_close(loss, F.cross_entropy(h @ weight.t(), torch.arange(6) % 5, reduction="sum"))
    assert not loss.requires_grad
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_half_precision_and_sums_in_float32(dtype):
    h, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((300, 16), (50, 16), (50,)))
    targets = torch.randint(50, (300,))
    with torch.autocast("cpu", dtype):
        found = linear_cross_entropy(h, weight, bias, targets, smoothing=0.1)
        expected = F.cross_entropy(F.linear(h, weight, bias).float(), targets, label_smoothing=0.1, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.1)
    for ours, theirs in zip(
        torch.autograd.grad(found, (h, weight, bias)), torch.autograd.grad(expected, (h, weight, bias)), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)

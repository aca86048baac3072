"""The one matrix product of a layer, by the faster of torch's two libraries on a CPU."""

import functools
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this many rows oneDNN's reordering of the weight costs more than it saves.
MIN_ROWS = 32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., n) times the transpose of weight (m, n): (..., m), as torch.nn.functional.linear without a bias.

    torch sends a float32 product to MKL, whose AVX-512 code does not run on AMD's processors; oneDNN's does, at twice
    the speed there (bench/NOTES.md). Everywhere else, and while torch compiles, exports or transforms, this is torch's.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if rows < MIN_ROWS or not is_faster(x, weight):
        return F.linear(x, weight)
    return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product; both tensors on one kind of device and of one dtype."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() > 0
        and has_onednn()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


@functools.cache
def has_onednn() -> bool:
    """Whether this torch carries the op that its own compiler uses for linear layers on x86."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # By `linear` again, so that the gradient has a gradient.
        return (
            linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
        )

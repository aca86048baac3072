"""The one matrix product of a layer, by the faster of torch's two libraries on a CPU."""

import functools
import platform
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from sru.kernels import HAS_NUMBA
from sru.kernels.dispatch import (
    forward_mode_is_active,
    have_memory,
    is_batched,
    modes_are_active,
    transforms_are_active,
)

# Below this many rows oneDNN's reordering of the weight costs more than it saves.
MIN_ROWS = 32
MIN_TRANSPOSED = 2**16  # numbers from which a transpose of our own pays
FORWARD: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d)}
# The hooks that torch calls for every module, which are never replaced, only filled.
EVERYWHERE = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n) times the transpose of weight (m, n), plus bias (m,): (..., m), as torch.nn.functional.linear.

    torch sends a float32 product to MKL, whose AVX-512 code does not run on AMD's processors; oneDNN's does, at twice
    the speed there (bench/NOTES.md). Everywhere else, and while torch compiles, exports or transforms, this is torch's.
    """
    if not is_faster(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def affine(x: Tensor, module: nn.Module) -> Tensor:
    """What the module gives for x: by the faster product if it is a plain torch.nn.Linear, else by calling it."""
    if not is_plain(module, nn.Linear):
        return module(x)
    plain = cast(nn.Linear, module)
    return linear(x, plain.weight, plain.bias)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs the forward of its class and nothing else.

    A hook, a parametrisation, an adapter or a quantised weight is only heeded by a call.
    """
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    # The class of a parametrised module is another one; some libraries put their own `forward` into instance or class.
    if type(module) is not kind or any(own) or any(EVERYWHERE) or "forward" in module.__dict__:
        return False
    weight = cast(Tensor, module.weight)
    return kind.forward is FORWARD[kind] and (torch.compiler.is_compiling() or have_memory(weight))


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product and is faster at it."""
    # Before any size is looked at, which would tie a compiled or exported program to it.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active():
        return False
    return (
        suits_onednn(x, weight)
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not forward_mode_is_active()  # torch's product alone has that derivative
        and not modes_are_active()  # a counter of operations knows torch's own product
        and have_memory(x, weight)
        and not (is_batched(x) or is_batched(weight))
    )


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster at a product of numbers in a CPU's memory."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and weight.numel() > 0
        and prefers_onednn()
        and bool(torch.backends.mkldnn.enabled)
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, n) times the transpose of weight (m, n), of numbers in a CPU's memory, without a gradient."""
    if not suits_onednn(x, weight):
        return torch.mm(x, weight.t())
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is an AMD processor, and torch carries the oneDNN product that its own compiler uses.

    Not timed: a clock may decide otherwise in the next process, whose numbers would then differ in their last bits.
    """
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return (
        "AuthenticAMD" in vendor
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # By `linear` again, so that the gradient has a gradient.
        return (
            linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            gradient_of_weight(grad, x) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of grad (R, m) times x (R, n), with the fewest numbers copied to transpose them."""
    if x.numel() + x.shape[1] * grad.shape[1] < grad.numel():
        return transpose(linear(transpose(x), grad.t()))
    return linear(transpose(grad), x.t())


def transpose(matrix: Tensor) -> Tensor:
    """The transpose, contiguous where that helps: oneDNN would have torch copy it, which takes longer."""
    large = matrix.dim() == 2 and matrix.numel() >= MIN_TRANSPOSED and matrix.stride(1) == 1
    if not large or torch.is_grad_enabled() or not HAS_NUMBA or not is_faster(matrix.t(), matrix):
        return matrix.t()
    from sru.kernels import cpu

    return cpu.transpose_matrix(matrix)

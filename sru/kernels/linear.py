"""The matrix product of a layer, on a CPU by the faster of torch's two libraries."""

import functools
import platform
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from sru.kernels import HAS_NUMBA
from sru.kernels.dispatch import forward_mode_is_active, have_memory, is_batched, is_eager, modes_are_active

# With fewer rows, oneDNN's reordering of the weight costs more than it saves.
MIN_ROWS = 32
MIN_TRANSPOSED = 2**16  # with fewer elements, torch's own transpose is faster
FORWARD: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d)}
# torch's hooks for all modules; torch changes these dicts in place.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n) times the transpose of weight (m, n), plus bias (m,): (..., m), as torch.nn.functional.linear.

    torch computes float32 products by MKL, which does not use AVX-512 on AMD's processors; oneDNN does and is twice as
    fast there (bench/NOTES.md). On other processors, and while torch compiles, exports or transforms, this is F.linear.
    """
    if not is_faster(x, weight):
        return F.linear(x, weight, bias)
    function: Any = _Linear
    rows: Tensor = function.apply(x.flatten(0, -2), weight, bias)
    return rows.view(*x.shape[:-1], weight.shape[0])


def affine(x: Tensor, module: nn.Module) -> Tensor:
    """module(x), by the faster product if the module is a plain torch.nn.Linear."""
    if not is_plain(module, nn.Linear):
        return cast(Tensor, module(x))
    plain = cast(nn.Linear, module)
    return linear(x, plain.weight, plain.bias)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs only the forward method of its class.

    Hooks, parametrisations, adapters and quantised weights take effect only in a call.
    """
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    # A parametrised module has another class; some libraries replace `forward` in the instance or the class.
    if type(module) is not kind or any(own) or any(GLOBAL_HOOKS) or "forward" in module.__dict__:
        return False
    weight = cast(Tensor, module.weight)
    return kind.forward is FORWARD[kind] and (torch.compiler.is_compiling() or have_memory(weight))


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can compute this product and is faster."""
    # First, because a compiled or exported program must not depend on a size.
    if not is_eager():
        return False
    return (
        suits_onednn(x, weight)
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not forward_mode_is_active()  # only torch's product has that derivative
        and not modes_are_active()  # for example a FLOP counter, which knows only torch's product
        and have_memory(x, weight)
        and not (is_batched(x) or is_batched(weight))
    )


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster for these plain CPU tensors."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and weight.numel() > 0
        and prefers_onednn()
        and bool(torch.backends.mkldnn.enabled)
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, n) times the transpose of weight (m, n), for plain CPU tensors, without a gradient."""
    return multiply_by_onednn(x, weight) if suits_onednn(x, weight) else torch.mm(x, weight.t())


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is an AMD processor, and torch includes the oneDNN product that torch.compile uses.

    It is not measured, because the choice, and with it the last bits of results, could differ between processes.
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return multiply_by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # By `linear`, so that the gradient is differentiable.
        return (
            linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            gradient_of_weight(grad, x) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of grad (R, m) times x (R, n); transposes the smaller matrices."""
    if x.numel() + x.shape[1] * grad.shape[1] < grad.numel():
        return transpose(linear(transpose(x), grad.t()))
    return linear(transpose(grad), x.t())


def transpose(matrix: Tensor) -> Tensor:
    """The transpose, contiguous for large matrices: otherwise oneDNN lets torch copy it, which takes longer."""
    large = matrix.dim() == 2 and matrix.numel() >= MIN_TRANSPOSED and matrix.stride(1) == 1
    if not large or torch.is_grad_enabled() or not HAS_NUMBA or not is_faster(matrix.t(), matrix):
        return matrix.t()
    from sru.kernels import cpu

    return cpu.transpose_matrix(matrix)

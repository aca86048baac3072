"""The SRU recurrence: its interface, its checks, and the choice of a backend."""

import functools
import importlib.util
import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor

from sru.kernels import dispatch, ops, portable, reference  # noqa: F401  ops registers the operators
from sru.kernels.reference import Arguments

ACTIVATIONS = tuple(reference.ACTIVATIONS)
BACKENDS = ("auto", "cpu", "cuda", "reference")
HAS_NUMBA = importlib.util.find_spec("numba") is not None
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def recurrence(
    u: Tensor,
    x: Tensor | None,
    v: Tensor,
    b: Tensor,
    c0: Tensor,
    *,
    mask: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float | Tensor = 1.0,
    zoneout: float = 0.0,
    activation: str = "identity",
    bidirectional: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the elementwise part of an SRU layer over time: h (T, B, D) and c_last (B, D).

        f = sigmoid(u1 + v0 * c + b0),  r = sigmoid(u2 + v1 * c + b1)     with the previous state c
        f = zoneout + (1 - zoneout) * f
        c = f * c + (1 - f) * u0
        h = X + mask * r * (g(c) - X)                                     with X = scale * x, or scale * u3

    Args:
        u: (T, B, K, D), the projected input: candidate, forget, reset and, if K = 4, the skip.
        x: (T, B, D), the input of the highway; None if K = 4 or scale is 0.
        v, b: (2 * D,) or (2, D), recurrent weights and biases, of the forget gate and then of the reset gate; v = 0 is
            the cell of 2017.
        c0: (B, D), the state before the first step.
        mask: (B, D), a dropout mask for all steps of a sequence, already divided by 1 - p.
        pad: (T, B) of bool, True where a step is padding: there c does not change and h is 0.
        scale: factor of the skip, a number or a tensor with one number, which gets no gradient; 0 removes the highway,
            1 the scaling correction. Only the kernel reads a tensor, so the call does not wait for a GPU.
        zoneout: share of the state that every step keeps, the mean of random zoneout; 0 for none.
        activation: g, one of identity, tanh, relu.
        bidirectional: the second half of the D columns runs from the last step to the first; its c_last is the state
            after step 0.
        backend: auto (by the tensors' device and dtype), cpu or cuda (the compiled kernels) or reference (plain torch).
            An exported or traced program contains torch's own operators with any backend.

    h has the dtype of u. The state is computed and returned in float32 if u is float16 or bfloat16.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape; the message names it.
        RuntimeError: the backend that was named cannot run here.
    """
    tensors = {"u": u, "x": x, "v": v, "b": b, "c0": c0, "mask": mask, "pad": pad}
    check(tensors, scale, zoneout, activation, bidirectional)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend in ("cpu", "cuda"):
        reason = why_not_cpu(u) if backend == "cpu" else why_not_cuda(u)
        if reason:
            raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    v, b = v.flatten(), b.flatten()
    if isinstance(scale, Tensor):
        factor: Tensor | None = scale if scale.dim() == 1 else scale.reshape(1)
    elif scale == 0:  # no skip at all
        u, x, factor = u[:, :, :3], None, None
    else:
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        factor = None if scale == 1 else torch.full((1,), float(scale), dtype=wide, device=u.device)
    index, halves = ACTIVATIONS.index(activation), 2 if bidirectional else 1
    arguments = Arguments(u, x, v, b, c0, mask, pad, factor, float(zoneout), index, halves)
    if backend == "reference":
        return reference.recurrence(arguments)
    if torch.compiler.is_exporting():
        return portable.recurrence(arguments)
    transforms, compiling = dispatch.transforms_are_active(), torch.compiler.is_compiling()
    # Our operators have no forward-mode derivatives and no transforms within compiled code.
    without_operator = dispatch.forward_mode_is_active() or (transforms and compiling)
    if dispatch.is_tracing() or without_operator or not has_kernel(u):
        return reference.recurrence(arguments)
    from sru.kernels import autograd

    through = "transform" if transforms else ""
    intercepted = u.is_meta or compiling or dispatch.modes_are_active()
    if not transforms and (intercepted or not dispatch.have_memory(u, x, v, b, c0, mask, pad, factor)):
        through = "operators"
    return autograd.recurrence(arguments, through)


def why_not_cpu(u: Tensor) -> str:
    """Why the compiled CPU kernels cannot take u; empty if they can."""
    if u.device.type not in ("cpu", "meta"):
        return f"u is on {u.device}; move it with .cpu()"
    if u.dtype not in DTYPES:
        return f"u is {u.dtype}; the kernels take {', '.join(map(str, DTYPES))}"
    if not HAS_NUMBA:
        return "numba is not installed; type: pip install numba"
    return ""


def why_not_cuda(u: Tensor) -> str:
    """Why the CUDA kernels cannot take u; empty if they can."""
    if u.device.type not in ("cuda", "meta"):
        if not torch.cuda.is_available():
            return f"the tensors are on {u.device}, and torch {torch.__version__} finds no CUDA device to move them to"
        return f"the tensors are on {u.device}; move them, and the layer, with .cuda()"
    if u.dtype not in DTYPES:
        return f"u is {u.dtype}; the kernels take {', '.join(map(str, DTYPES))}"
    if u.is_meta:
        return ""
    from sru.kernels import cuda

    return cuda.why_not(u.device.index)


def has_kernel(u: Tensor) -> bool:
    """Whether a compiled kernel takes u; if the one for u's device cannot run, warn once and say what to do."""
    if u.device.type in ("cpu", "meta", "cuda"):
        reason = why_not_cuda(u) if u.device.type == "cuda" else why_not_cpu(u)
        if reason:
            name = "CUDA" if u.device.type == "cuda" else "CPU"
            warn_once(f"The SRU's {name} kernels cannot run, so the slow reference runs instead: {reason}")
        return not reason
    warn_once(f"There is no fused SRU kernel for {u.device.type}, so the slow reference runs.")
    return False


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def check(tensors: dict[str, Any], scale: float | Tensor, zoneout: float, activation: str, bidirectional: bool) -> None:
    """Raise TypeError or ValueError for arguments that no backend takes."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("u", "v", "b", "c0")):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    u, x, v, b, _, mask, pad = tensors.values()
    if u.dim() != 4 or u.shape[2] not in (3, 4):
        raise ValueError(f"u must be (T, B, K, D) with K 3 or 4, not {tuple(u.shape)}")
    if not u.is_floating_point():
        raise TypeError(f"u must be of a floating dtype, not {u.dtype}")
    steps, batch, matrices, size = u.shape
    shapes = {
        "x": (steps, batch, size),
        "v": (2, size) if v.dim() == 2 else (2 * size,),
        "b": (2, size) if b.dim() == 2 else (2 * size,),
        "c0": (batch, size),
        "mask": (batch, size),
        "pad": (steps, batch),
    }
    for name, shape in shapes.items():
        if (tensor := tensors[name]) is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for u {tuple(u.shape)}, not {tuple(tensor.shape)}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}; move one of them")
        if name != "pad" and not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, not {tensor.dtype}")
    if pad is not None and pad.dtype != torch.bool:
        raise TypeError(f"pad must be torch.bool, not {pad.dtype}; use pad != 0")
    if mask is not None and mask.requires_grad:
        raise ValueError("mask requires a gradient but cannot get one; pass mask.detach()")
    if matrices == 4 and x is not None:
        raise ValueError("x must be None when u holds the skip (K = 4)")
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point() or scale.device != u.device or scale.requires_grad:
            raise ValueError(
                f"scale (a layer's scale_x) must be a number, or a floating-point tensor with one number on {u.device} "
                f"without requires_grad, not {tuple(scale.shape)} of {scale.dtype} on {scale.device}"
            )
    elif not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number or a tensor with one number, not {type(scale).__name__}")
    elif not -math.inf < float(scale) < math.inf:
        raise ValueError(f"scale must be a finite number, not {scale}")
    if matrices == 3 and x is None and (isinstance(scale, Tensor) or scale != 0):
        raise ValueError(f"x is None and u holds no skip (K = 3), so scale must be the number 0, not {scale}")
    if not 0 <= zoneout < 1:
        raise ValueError(f"zoneout must lie in [0, 1), not {zoneout}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if bidirectional and size % 2:
        raise ValueError(f"a bidirectional u must have an even number of columns, not {size}")

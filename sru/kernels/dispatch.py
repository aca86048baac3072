"""Which kernels run for a tensor: by its device, and by torch's modes that are active around the call."""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing as is_tracing

HALVES = torch.float16, torch.bfloat16
PLAIN = (Tensor, torch.nn.Parameter)


def kernels(device: torch.device) -> ModuleType:
    """The module with `run_forward` and `run_backward` for a device, imported at first use."""
    if device.type == "cuda":
        from sru.kernels import cuda

        return cuda
    from sru.kernels import cpu

    return cpu


def is_batched(grad: Tensor) -> bool:
    """Whether a gradient is a batch of gradients, under vmap."""
    return torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)


def transforms_are_active() -> bool:
    """Whether a transform of torch.func is active."""
    return bool(getattr(torch._C, "_are_functorch_transforms_active", lambda: False)())


def modes_are_active() -> bool:
    """Whether a mode intercepts torch's operators, such as FakeTensorMode or a FLOP counter."""
    return bool(getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)() > 0)


def forward_mode_is_active() -> bool:
    """Whether forward-mode derivatives are computed, which our operators do not have."""
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)


def is_eager() -> bool:
    """Whether torch neither compiles nor traces nor transforms this call."""
    return not (torch.compiler.is_compiling() or is_tracing() or transforms_are_active())


def have_memory(*tensors: Tensor | None) -> bool:
    """Whether the tensors are plain ones with memory of their own, not wrappers."""
    return all(a is None or type(a) in PLAIN for a in tensors)


def has_numbers(tensor: Tensor) -> bool:
    """Whether Python may read the values of a tensor: it has some, and nothing intercepts or records the reading."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return have_memory(tensor) and not modes_are_active() and not transforms_are_active()

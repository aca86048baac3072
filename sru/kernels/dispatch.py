"""Which kernels a tensor takes: by its device, and by what is at work around the call."""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sru.kernels import reference

HALVES = torch.float16, torch.bfloat16
ACTIVATIONS = list(reference.ACTIVATIONS)  # kernels know them by their places
PLAIN = (Tensor, torch.nn.Parameter)


def kernels(device: torch.device) -> ModuleType:
    """The module with `run_forward` and `run_backward` for a device; imported here, where it is needed."""
    if device.type == "cuda":
        from sru.kernels import cuda

        return cuda
    from sru.kernels import cpu

    return cpu


def is_batched(grad: Tensor) -> bool:
    """Whether a gradient stands for many."""
    return torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)


def transforms_are_active() -> bool:
    """Whether a transform of torch.func is at work."""
    return getattr(torch._C, "_are_functorch_transforms_active", lambda: False)()


def modes_are_active() -> bool:
    """Whether something watches torch's operators, such as FakeTensorMode or a counter of operations."""
    return getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)() > 0


def forward_mode_is_active() -> bool:
    """Whether forward derivatives are taken, which no operator of ours has."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def have_memory(*tensors: Tensor | None) -> bool:
    """Whether the tensors are numbers in memory, and do not stand for other tensors."""
    return all(a is None or type(a) in PLAIN for a in tensors)


def has_numbers(tensor: Tensor) -> bool:
    """Whether Python may look at the numbers of a tensor: it has some, and nothing that watches would see less."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return have_memory(tensor) and not modes_are_active() and not transforms_are_active()

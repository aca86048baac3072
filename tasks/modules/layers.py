"""Layers that the tasks share: a fast dropout, and a plain linear layer through a faster product."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class Dropout(nn.Module):
    """torch.nn.Dropout, which draws its masks on a CPU ten times as slowly."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0 or torch.compiler.is_compiling():
            return nn.functional.dropout(x, self.p, self.training)
        # 16 random bits a number, four numbers a draw, from numpy's generator, which torch's seeds.
        seed = int(torch.empty((), dtype=torch.int64).random_())
        bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 65536 numbers
        kept = (bits >= dropped).astype(np.float32).reshape(x.shape)
        return x * torch.from_numpy(kept).to(x.dtype).div_(1 - dropped / 2**16)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is the product with its weight and no more.

    A hook, a parametrisation, an adapter or a quantised weight is only heeded by a call.
    """
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    every = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return type(module) is nn.Linear and not any((*own, *every)) and "forward" not in module.__dict__


def apply_linear(module: nn.Module, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
    """What the module gives for x: by `linear` if it is a plain torch.nn.Linear, else by calling it."""
    return linear(x, module.weight, module.bias) if is_plain(module) else module(x)

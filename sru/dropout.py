"""Dropout with a faster random generator on CPUs."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sru.kernels.dispatch import have_memory, transforms_are_active


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """torch.nn.functional.dropout; on a CPU with 16 random bits for each value, so that one draw serves four values.

    numpy's generator, seeded by torch's, is five to ten times as fast. p is rounded to a multiple of 1 / 65536.
    """
    is_fast = x.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_are_active()
    if not is_fast or not training or not 0 < p < 1 or not have_memory(x):
        return F.dropout(x, p, training)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
    limit = min(round(p * 2**16), 2**16 - 1)
    mask = (bits >= limit).astype(np.float32).reshape(x.shape)
    return x * torch.from_numpy(mask).to(x.dtype).div_(1 - limit / 2**16)

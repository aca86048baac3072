"""Dropout whose masks are drawn fast on a CPU too."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sru.kernels.ops import transforms_are_active


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """torch.nn.functional.dropout; on a CPU from 16 random bits a number, which are drawn four at a time.

    p is rounded to a multiple of 1 / 65536.
    """
    is_fast = x.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_are_active()
    if not is_fast or not training or not 0 < p < 1:
        return F.dropout(x, p, training)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 65536 numbers
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).div_(1 - dropped / 2**16)

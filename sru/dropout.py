"""Dropout whose masks are drawn fast on a CPU too."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """torch.nn.functional.dropout, which draws a Bernoulli mask on a CPU five times as slowly as uniform numbers."""
    if x.device.type != "cpu" or not training or p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return x * torch.rand_like(x).lt_(1 - p).div_(1 - p)

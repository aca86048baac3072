"""The cross entropy of a large softmax, computed in blocks of rows so that the logits never fill the memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

NUMBERS = {"cpu": 2**22, "cuda": 2**26}  # logits per block: they fit a CPU's cache, or keep a GPU busy
# A block has at least this many rows per feature: with fewer, adding up the weight's gradient takes as long as its
# matrix product.
ROWS = 4


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    smoothing: float = 0.0,
    linear: Callable[..., Tensor] = F.linear,
) -> Tensor:
    """Cross entropy of softmax(h weight' + bias) and targets (N,), summed over N; h is (N, n), weight (V, n).

    The result is the same as of torch.nn.functional.cross_entropy with label_smoothing. The gradient is computed
    together with the loss, so that the logits need not be stored; there is no second derivative. `linear` computes the
    products.
    """
    needs_grad = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (h, weight, bias))
    return _LinearCrossEntropy.apply(h, weight, bias, targets, smoothing, needs_grad, linear)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        needs_grad: bool,
        linear: Callable[..., Tensor],
    ) -> Tensor:
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        exact = torch.promote_types(weight.dtype, torch.float32)
        grads = [torch.zeros_like(a, dtype=exact) if a is not None and needs_grad else None for a in (h, weight, bias)]
        grad_h, grad_weight, grad_bias = grads
        loss = h.new_zeros((), dtype=exact)
        rows = max(ROWS * weight.shape[1], NUMBERS.get(device, 2**26) // max(1, len(weight)))
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            for i, (x, target) in enumerate(zip(h.to(dtype).split(rows), targets.split(rows), strict=True)):
                log_p = linear(x, w, b).to(exact).log_softmax(1)
                hit = log_p.gather(1, target[:, None])
                loss -= (1 - smoothing) * hit.sum() + smoothing * log_p.mean(1).sum()
                if grad_h is None or grad_weight is None:
                    continue
                grad = log_p.exp_().sub_(smoothing / len(weight))
                grad.scatter_add_(1, target[:, None], torch.full_like(hit, smoothing - 1))
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                grad_h[i * rows : i * rows + rows] = linear(grad, w.t())
                grad_weight += linear(grad.t(), x.t())
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if a is None else a.dtype for a in (h, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if a is None else (grad * a).to(dtype) for a, dtype in grads), None, None, None, None

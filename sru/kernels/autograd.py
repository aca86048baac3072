"""The fused kernels under autograd: dtypes, derivatives, and second derivatives by the reference."""

from typing import Any

import torch
from torch import Tensor

from sru.kernels import dispatch, ops, reference
from sru.kernels.dispatch import HALVES, is_batched
from sru.kernels.reference import Arguments


def recurrence(arguments: Arguments, through: str = "") -> tuple[Tensor, Tensor]:
    """As `sru.kernels.recurrence`, by the kernels' functions or through "operators" or a "transform" of torch.func."""
    u, x, v, b, c0, mask, pad, scale, *_ = arguments
    dtype = u.dtype
    wide = torch.float32 if dtype in HALVES else dtype
    v, b, c0 = v.to(wide), b.to(wide), c0.to(wide)
    mask, scale = (None if a is None else a.to(wide) for a in (mask, scale))
    if not dispatch.kernels(u.device).READS_HALVES:
        u = u.to(wide)
    if x is not None and x.dtype != u.dtype:
        x = x.to(wide)
    arguments = Arguments(u, x, v, b, c0, mask, pad, scale, arguments.zoneout, arguments.activation, arguments.halves)
    keep = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (u, x, v, b, c0))
    if through == "operators":
        h, _, c_last = torch.ops.sru.recurrence(*arguments, keep)
    elif through == "transform":
        operator: Any = ops.Transformed
        h, _, c_last = operator.apply(*arguments)
    elif keep:
        function: Any = Recurrence
        h, c_last = function.apply(u, x, v, b, c0, arguments)
    else:
        h, _, c_last = dispatch.kernels(u.device).run_forward(arguments, keep=False)
    return h.to(dtype), c_last


class Recurrence(torch.autograd.Function):
    """The recurrence with its backward kernel."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor | None, v: Tensor, b: Tensor, c0: Tensor, arguments: Arguments
    ) -> tuple[Tensor, Tensor]:
        h, c, c_last = dispatch.kernels(u.device).run_forward(arguments, keep=True)
        ctx.save_for_backward(*arguments[:8], c)
        ctx.options = arguments[8:]
        return h, c_last

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gc_last: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, c = ctx.saved_tensors
        if is_batched(gh) or is_batched(gc_last):  # by torch.autograd.grad(..., is_grads_batched=True)
            operator = torch.ops.sru.recurrence_backward
            gu, gx, gv, gb, gc0 = operator(gh, gc_last, *tensors, c, *ctx.options)
            gx = None if tensors[1] is None else gx
        elif torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            gu, gx, gv, gb, gc0 = differentiate_reference(gh, gc_last, Arguments(*tensors, *ctx.options))
        else:
            gu, gx, gv, gb, gc0 = dispatch.kernels(gh.device).run_backward(
                gh, gc_last, Arguments(*tensors, *ctx.options), c, needs_x=ctx.needs_input_grad[1]
            )
        return gu, gx, gv, gb, gc0, None


def differentiate_reference(gh: Tensor, gc_last: Tensor, arguments: Arguments) -> list[Tensor | None]:
    """The gradients as differentiable functions, from the reference."""
    # Views, because x may be part of the computation of u: each input's gradient must exclude the others.
    inputs: list[Any] = [
        a if a is None else a.view_as(a) if a.requires_grad else a.detach().requires_grad_() for a in arguments[:5]
    ]
    outputs = reference.recurrence(Arguments(*[*inputs, *arguments[5:]]))
    tensors = [a for a in inputs if a is not None]
    grads = iter(torch.autograd.grad(outputs, tensors, (gh, gc_last), create_graph=True, materialize_grads=True))
    return [None if a is None else next(grads) for a in inputs]

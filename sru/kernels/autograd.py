"""The fused kernels under autograd: which module runs them, in which dtypes, and the gradient of a gradient."""

from typing import Any

import torch
from torch import Tensor

from sru.kernels import dispatch, ops, reference
from sru.kernels.dispatch import ACTIVATIONS, HALVES, is_batched


def recurrence(
    u: Tensor,
    x: Tensor | None,
    v: Tensor,
    b: Tensor,
    c0: Tensor,
    *,
    mask: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    zoneout: float,
    activation: str,
    bidirectional: bool,
    through: str = "",
) -> tuple[Tensor, Tensor]:
    """As `sru.kernels.recurrence`; `through`: operators, or transform (of torch.func), where addresses mean nothing."""
    dtype = u.dtype
    wide = torch.float32 if dtype in HALVES else dtype
    v, b, c0 = v.to(wide), b.to(wide), c0.to(wide)
    mask, scale = (None if a is None else a.to(wide) for a in (mask, scale))
    if not dispatch.kernels(u.device).READS_HALVES:
        u = u.to(wide)
    if x is not None and x.dtype != u.dtype:
        x = x.to(wide)
    options = mask, pad, scale, zoneout, ACTIVATIONS.index(activation), 2 if bidirectional else 1
    keep = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (u, x, v, b, c0))
    if through == "operators":
        h, _, c_last = torch.ops.sru.recurrence(u, x, v, b, c0, *options, keep)
    elif through == "transform":
        h, _, c_last = ops.Transformed.apply(u, x, v, b, c0, *options)
    elif keep:
        h, c_last = Recurrence.apply(u, x, v, b, c0, *options)
    else:
        h, _, c_last = dispatch.kernels(u.device).run_forward(u, x, v, b, c0, *options, keep=False)
    return h.to(dtype), c_last


class Recurrence(torch.autograd.Function):
    """The recurrence with its backward kernel."""

    @staticmethod
    def forward(ctx, u, x, v, b, c0, mask, pad, scale, *options):
        h, c, c_last = dispatch.kernels(u.device).run_forward(u, x, v, b, c0, mask, pad, scale, *options, keep=True)
        ctx.save_for_backward(u, x, v, b, c0, mask, pad, scale, c)
        ctx.options = options
        return h, c_last

    @staticmethod
    def backward(ctx, gh, gc_last):
        if is_batched(gh) or is_batched(gc_last):  # by torch.autograd.grad(..., is_grads_batched=True)
            gu, gx, *grads = torch.ops.sru.recurrence_backward(gh, gc_last, *ctx.saved_tensors, *ctx.options)
            return gu, None if ctx.saved_tensors[1] is None else gx, *grads, *[None] * 6
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return *differentiate_reference(gh, gc_last, *ctx.saved_tensors[:8], *ctx.options), *[None] * 6
        grads = dispatch.kernels(gh.device).run_backward(
            gh, gc_last, *ctx.saved_tensors, *ctx.options, needs_x=ctx.needs_input_grad[1]
        )
        return *grads, *[None] * 6


def differentiate_reference(gh, gc_last, u, x, v, b, c0, mask, pad, scale, zoneout, activation, halves):
    """The gradients as functions that have gradients themselves: those of the reference."""
    # Views, since x may be what u was made of: a gradient of each alone is wanted.
    inputs: list[Any] = [
        a if a is None else a.view_as(a) if a.requires_grad else a.detach().requires_grad_() for a in (u, x, v, b, c0)
    ]
    outputs = reference.recurrence(
        *inputs,
        mask=mask,
        pad=pad,
        scale=scale,
        zoneout=zoneout,
        activation=ACTIVATIONS[activation],
        bidirectional=halves == 2,
    )
    given = [a for a in inputs if a is not None]
    found = iter(torch.autograd.grad(outputs, given, (gh, gc_last), create_graph=True, materialize_grads=True))
    return [None if a is None else next(found) for a in inputs]

"""The fused kernels as torch operators, for torch.compile and torch.func, which cannot look inside the kernels.

Eager code calls the kernels directly, which is faster: sru/kernels/autograd.py.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sru.kernels import dispatch
from sru.kernels.reference import Arguments

INPUTS = "Tensor u, Tensor? x, Tensor v, Tensor b, Tensor c0, Tensor? mask, Tensor? pad, Tensor? scale"
OPTIONS = "float zoneout, int activation, int halves"
# Our own namespace: a process may also load the official package, which uses sru_cpu and sru_cuda.
library = torch.library.Library("sru", "DEF")
library.define(f"recurrence({INPUTS}, {OPTIONS}, bool keep) -> (Tensor h, Tensor c, Tensor c_last)")
library.define(
    f"recurrence_backward(Tensor gh, Tensor gc_last, {INPUTS}, Tensor c, {OPTIONS}) "
    "-> (Tensor gu, Tensor gx, Tensor gv, Tensor gb, Tensor gc0)"
)
Tensors = tuple[Tensor, ...]


def run(*inputs: Any) -> Tensors:
    """h, c and c_last; c, for the backward pass, has no steps unless it is kept."""
    *arguments, keep = inputs
    u, c0 = inputs[0], inputs[4]
    h, c, c_last = dispatch.kernels(u.device).run_forward(Arguments(*arguments), keep=keep)
    return h, c if keep else c0.new_empty(0, *c0.shape), c_last


def run_fake(*inputs: Any) -> Tensors:
    u, c0, keep = inputs[0], inputs[4], inputs[-1]
    steps, batch, _, size = u.shape
    c = c0.new_empty(steps if keep else 0, batch, size)
    return u.new_empty(steps, batch, size), c, c0.new_empty(batch, size)


def run_backward(gh: Tensor, gc_last: Tensor, *inputs: Any) -> Tensors:
    """The gradients; gx has no steps if there is no x."""
    arguments, c = Arguments(*inputs[:8], *inputs[9:]), inputs[8]
    u, x, *_ = arguments
    run = dispatch.kernels(u.device).run_backward
    gu, gx, gv, gb, gc0 = run(gh, gc_last, arguments, c, needs_x=x is not None)
    return gu, u.new_empty(0) if gx is None else gx, gv.clone(), gb.clone(), gc0


def run_backward_fake(gh: Tensor, gc_last: Tensor, *inputs: Any) -> Tensors:
    u, x, v, _, c0, *_ = inputs
    steps, batch, _, size = u.shape
    gx = u.new_empty(0) if x is None else x.new_empty(steps, batch, size)
    return u.new_empty(u.shape), gx, v.new_empty(2 * size), v.new_empty(2 * size), c0.new_empty(batch, size)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.options = inputs[8:11]


def differentiate(ctx: Any, gh: Tensor, gc: Tensor, gc_last: Tensor) -> tuple[Tensor | None, ...]:
    u, c = ctx.saved_tensors[0], ctx.saved_tensors[-1]
    if c.shape[0] != u.shape[0]:
        raise RuntimeError("the recurrence ran without gradients, so it has none")
    gkeep = None
    return *call_backward(torch.ops.sru.recurrence_backward, ctx, gh, gc_last), gkeep


def call_backward(operator: Any, ctx: Any, gh: Tensor, gc_last: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all tensors and options, None where there is none."""
    *inputs, c = ctx.saved_tensors
    gu, gx, gv, gb, gc0 = operator(gh, gc_last, *inputs, c, *ctx.options)
    gmask = gpad = gscale = gzoneout = gactivation = ghalves = None
    gx = None if inputs[1] is None else gx
    return gu, gx, gv, gb, gc0, gmask, gpad, gscale, gzoneout, gactivation, ghalves


class Transformed(torch.autograd.Function):
    """The operators under a transform of torch.func, which does not use the derivative registered for an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        outputs: Tensors = torch.ops.sru.recurrence(*inputs, True)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.mark_non_differentiable(output[1])
        save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gc: Tensor, gc_last: Tensor) -> tuple[Tensor | None, ...]:
        return call_backward(TransformedBackward.apply, ctx, gh, gc_last)


class TransformedBackward(torch.autograd.Function):
    """The backward operator under a transform of torch.func; without this, a second gradient would silently be 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        outputs: Tensors = torch.ops.sru.recurrence_backward(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second(ctx, *grads)


def refuse_second(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "compiled SRU kernels have only a first derivative here: build the layer with backend='reference' for more, or "
        "take torch.autograd.grad(..., create_graph=True) of the layer itself, uncompiled"
    )


def run_one_by_one(operator: Callable[..., Tensors]) -> Callable[..., tuple[Tensors, tuple[int, ...]]]:
    """The vmap rule of an operator: one call for each element, because v and b may differ between elements."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensors, tuple[int, ...]]:
        outputs = []
        for i in range(info.batch_size):
            element = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            outputs.append(operator(*element))
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    return rule


for device in ("CPU", "CUDA"):
    library.impl("recurrence", run, device)
    library.impl("recurrence_backward", run_backward, device)
torch.library.register_fake("sru::recurrence", run_fake, lib=library)
torch.library.register_fake("sru::recurrence_backward", run_backward_fake, lib=library)
torch.library.register_autograd("sru::recurrence", differentiate, setup_context=save, lib=library)
torch.library.register_autograd("sru::recurrence_backward", refuse_second, lib=library)
for name in ("recurrence", "recurrence_backward"):
    torch.library.register_vmap(f"sru::{name}", run_one_by_one(getattr(torch.ops.sru, name)), lib=library)

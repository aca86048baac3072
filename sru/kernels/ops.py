"""The fused kernels as operators of torch, for torch.compile and torch.func, which look no further than an operator.

Eager code goes past them, for speed: sru/kernels/autograd.py.
"""

import torch

from sru.kernels import dispatch

INPUTS = "Tensor u, Tensor? x, Tensor v, Tensor b, Tensor c0, Tensor? mask, Tensor? pad, Tensor? scale"
OPTIONS = "float zoneout, int activation, int halves"
# A name of our own: a process may hold the official package too, which takes sru_cpu and sru_cuda.
library = torch.library.Library("sru", "DEF")
library.define(f"recurrence({INPUTS}, {OPTIONS}, bool keep) -> (Tensor h, Tensor c, Tensor c_last)")
library.define(
    f"recurrence_backward(Tensor gh, Tensor gc_last, {INPUTS}, Tensor c, {OPTIONS}) "
    "-> (Tensor gu, Tensor gx, Tensor gv, Tensor gb, Tensor gc0)"
)


def run(u, x, v, b, c0, mask, pad, scale, zoneout, activation, halves, keep):
    """h, c and c_last; c is what the backward pass needs, and has no steps where it is not kept."""
    h, c, c_last = dispatch.kernels(u.device).run_forward(
        u, x, v, b, c0, mask, pad, scale, zoneout, activation, halves, keep=keep
    )
    return h, c if keep else c0.new_empty(0, *c0.shape), c_last


def run_fake(u, x, v, b, c0, mask, pad, scale, zoneout, activation, halves, keep):
    steps, batch, _, size = u.shape
    return u.new_empty(steps, batch, size), c0.new_empty(steps if keep else 0, batch, size), c0.new_empty(batch, size)


def run_backward(gh, gc_last, u, x, v, b, c0, mask, pad, scale, c, *options):
    """The gradients; gx has no steps where there is no x."""
    run = dispatch.kernels(u.device).run_backward
    gu, gx, gv, gb, gc0 = run(gh, gc_last, u, x, v, b, c0, mask, pad, scale, c, *options, needs_x=x is not None)
    return gu, u.new_empty(0) if gx is None else gx, gv.clone(), gb.clone(), gc0


def run_backward_fake(gh, gc_last, u, x, v, b, c0, mask, pad, scale, c, *options):
    steps, batch, _, size = u.shape
    gx = u.new_empty(0) if x is None else x.new_empty(steps, batch, size)
    return u.new_empty(u.shape), gx, v.new_empty(2 * size), v.new_empty(2 * size), c0.new_empty(batch, size)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.options = inputs[8:11]


def differentiate(ctx, gh, _, gc_last):
    *inputs, c = ctx.saved_tensors
    if c.shape[0] != inputs[0].shape[0]:
        raise RuntimeError("the recurrence ran without gradients, so it has none")
    gu, gx, gv, gb, gc0 = torch.ops.sru.recurrence_backward(gh, gc_last, *inputs, c, *ctx.options)
    return gu, None if inputs[1] is None else gx, gv, gb, gc0, None, None, None, None, None, None, None


class Transformed(torch.autograd.Function):
    """The operators under a transform of torch.func, which does not take the gradient of an operator itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return torch.ops.sru.recurrence(*inputs, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, gh, _, gc_last):
        *inputs, c = ctx.saved_tensors
        gu, gx, gv, gb, gc0 = TransformedBackward.apply(gh, gc_last, *inputs, c, *ctx.options)
        return gu, None if inputs[1] is None else gx, gv, gb, gc0, *[None] * 6


class TransformedBackward(torch.autograd.Function):
    """The backward operator under a transform of torch.func: without it a second gradient would be 0, in silence."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return torch.ops.sru.recurrence_backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(lambda ctx, *grads: refuse_second(ctx, *grads))


def refuse_second(ctx, *_):
    raise RuntimeError(
        "compiled SRU kernels have only a first derivative here: build the layer with backend='reference' for more, or "
        "take torch.autograd.grad(..., create_graph=True) of the layer itself, uncompiled"
    )


def one_by_one(operator):
    """The rule of an operator under torch.vmap: a call an element, since v and b may differ from one to the next."""

    def rule(info, in_dims, *args):
        def element(i):
            return [a.select(d, i) if d is not None else a for a, d in zip(args, in_dims, strict=True)]

        outputs = [operator(*element(i)) for i in range(info.batch_size)]
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
    torch.library.register_vmap(f"sru::{name}", one_by_one(getattr(torch.ops.sru, name)), lib=library)

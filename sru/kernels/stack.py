"""A stack of plain layers on a CPU as one function of autograd, so that small steps pay for calls and checks once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sru.kernels import HAS_NUMBA, recurrence
from sru.kernels.dispatch import (
    ACTIVATIONS,
    forward_mode_is_active,
    have_memory,
    is_batched,
    modes_are_active,
    transforms_are_active,
)
from sru.kernels.linear import gradient_of_weight, linear, product


class Layer(NamedTuple):
    """What a layer computes with: weight (K * D, n), v and bias (2 * D,), alpha (1,), and masks of dropout.

    alpha is the weight of the input that is carried past the gates; None where none is: without a highway, or with a
    projected one. mask (B, D) is that of the recurrence, input_mask (B, n) that of what the weight gets.
    """

    weight: Tensor
    v: Tensor
    bias: Tensor
    alpha: Tensor | None
    input_mask: Tensor | None
    mask: Tensor | None


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether this file runs a stack over x: eager code, on numbers in a CPU's memory, all in one full precision.

    Under autocast to bfloat16, x may be bfloat16 already.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active():
        return False
    precision = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    return (
        HAS_NUMBA
        and x.device.type == "cpu"
        and (x.dtype in (torch.float32, torch.float64) or (is_cast() and x.dtype == torch.bfloat16))
        and (is_cast() or not torch.is_autocast_enabled("cpu"))
        and not forward_mode_is_active()
        and not modes_are_active()
        and have_memory(x, *others)
        and all(a is None or (a.dtype == precision and a.device == x.device) for a in others)
        and not is_batched(x)
    )


def is_cast() -> bool:
    """Whether autocast has products made in bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def run(
    x: Tensor,
    c0: Tensor,
    pad: Tensor | None,
    layers: Sequence[Layer],
    activation: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """h (T, B, D) of the last layer and the last states (L, B, D), of x (T, B, n) and c0 (L, B, D)."""
    if is_cast() and x.dtype != torch.float64:
        with torch.autocast("cpu", enabled=False):
            h, c = run_in(torch.bfloat16, x.float(), c0, pad, layers, activation, bidirectional)
            return h.bfloat16(), c
    return run_in(x.dtype, x, c0, pad, layers, activation, bidirectional)


def run_in(dtype, x, c0, pad, layers, activation, bidirectional):
    """`run` with products in this dtype, and all else in that of x, as are the products of a single step."""
    options = ACTIVATIONS.index(activation), 2 if bidirectional else 1
    parameters = [parameter for layer in layers for parameter in layer[:3]]
    if torch.is_grad_enabled() and any(a.requires_grad for a in (x, c0, *parameters)):
        rest = [(None if a.alpha is None else a.alpha.item(), a.input_mask, a.mask) for a in layers]
        return _Stack.apply(x, c0, pad, rest, options, dtype, *parameters)
    from sru.kernels import cpu, cpu_step

    if len(x) == 1 and pad is None and all(a.mask is None and a.input_mask is None for a in layers):
        found = cpu_step.run(x, c0, [layer[:4] for layer in layers], options[0])
        if found is not None:
            return found
    last = []
    for layer, c in zip(layers, c0, strict=True):
        skip = None if layer.alpha is None else x
        u = project(x, layer.weight, c, dtype, layer.input_mask)
        x, _, c = cpu.run_forward(
            u.to(x.dtype), skip, layer.v, layer.bias, c, layer.mask, pad, layer.alpha, 0.0, *options, keep=False
        )
        last.append(c)
    return x, torch.stack(last)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, c0, pad, rest, options, dtype, *parameters):
        from sru.kernels import cpu

        saved, last, inner = [], [], x
        for i, (alpha, input_mask, mask) in enumerate(rest):
            weight, v, bias = parameters[3 * i : 3 * i + 3]
            u = project(inner, weight, c0[i], dtype, input_mask)
            skip = None if alpha is None else inner
            h, c, c_last = cpu.run_forward(
                u.to(x.dtype), skip, v, bias, c0[i], mask, pad, alpha, 0.0, *options, keep=True
            )
            saved += [inner, u, c, input_mask, mask]
            last.append(c_last)
            inner = h
        ctx.save_for_backward(x, c0, pad, *parameters, *saved)
        ctx.alphas, ctx.options, ctx.dtype = [entry[0] for entry in rest], options, dtype
        return inner, torch.stack(last)

    @staticmethod
    def backward(ctx, gh, gc_last):
        x, c0, pad, *tensors = ctx.saved_tensors
        count = 3 * len(ctx.alphas)
        parameters, saved = tensors[:count], tensors[count:]
        if torch.is_grad_enabled() or is_batched(gh) or is_batched(gc_last):
            return differentiate(ctx, gh, gc_last, x, c0, pad, parameters, saved)
        # The products' dtype is that of the forward pass.
        with torch.autocast("cpu", enabled=False):
            return _Stack.gradients(ctx, gh, gc_last, x, c0, pad, parameters, saved)

    @staticmethod
    def gradients(ctx, gh, gc_last, x, c0, pad, parameters, saved):
        from sru.kernels import cpu

        count = len(parameters)
        needs = ctx.needs_input_grad
        grads: list[Any] = [None] * count
        gc0 = []
        for i, alpha in reversed(list(enumerate(ctx.alphas))):
            weight, v, bias = parameters[3 * i : 3 * i + 3]
            inner, u, c, input_mask, mask = saved[5 * i : 5 * i + 5]
            needs_inner = i > 0 or needs[0]
            gu, gskip, gv, gb, gc = cpu.run_backward(
                *(gh, gc_last[i], u.to(x.dtype), None if alpha is None else inner, v, bias, c0[i], mask, pad, alpha, c),
                *(0.0, *ctx.options),
                needs_x=needs_inner and alpha is not None,
            )
            gu = gu.view(-1, weight.shape[0]).to(ctx.dtype)
            if needs[6 + 3 * i]:
                rows = inner if input_mask is None else inner * input_mask
                grads[3 * i] = gradient_of_weight(gu, rows.reshape(-1, weight.shape[1]).to(ctx.dtype)).to(weight.dtype)
            grads[3 * i + 1 : 3 * i + 3] = gv, gb
            gc0.append(gc)
            if needs_inner:
                gh = product(gu, weight.to(ctx.dtype).t()).view(inner.shape).to(x.dtype)
                gh = gh if input_mask is None else gh.mul_(input_mask)
                gh = gh if gskip is None else gh.add_(gskip)
        return gh if needs[0] else None, torch.stack(gc0[::-1]) if needs[1] else None, *[None] * 4, *grads


def project(x: Tensor, weight: Tensor, c: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """u (T, B, K, D) of x (T, B, n), for a state c (B, D), by a product in this dtype."""
    x = x if mask is None else x * mask
    u = product(x.reshape(-1, x.shape[2]).to(dtype), weight.to(dtype))
    return u.view(*x.shape[:2], weight.shape[0] // c.shape[1], c.shape[1])


def differentiate(ctx, gh, gc_last, x, c0, pad, parameters, saved):
    """The gradients as functions that have gradients themselves, of the layers one by one."""
    create_graph = torch.is_grad_enabled()
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=ctx.dtype == torch.bfloat16)
    with torch.enable_grad(), cast:
        # Views, so that a gradient of each alone is wanted.
        inputs = [a.view_as(a) if a.requires_grad else a for a in (x, c0, *parameters)]
        h, states = inputs[0], []
        for i, alpha in enumerate(ctx.alphas):
            weight, v, bias = inputs[2 + 3 * i : 5 + 3 * i]
            input_mask, mask = saved[5 * i + 3 : 5 * i + 5]
            u = linear(h if input_mask is None else h * input_mask, weight).unflatten(2, (-1, c0.shape[2]))
            h, c = recurrence(
                *(u, None if alpha is None else h, v, bias, inputs[1][i]),
                mask=mask,
                pad=pad,
                scale=alpha if alpha is not None else 1.0 if u.shape[2] == 4 else 0.0,
                activation=ACTIVATIONS[ctx.options[0]],
                bidirectional=ctx.options[1] == 2,
            )
            states.append(c)
        wanted = [a for a in inputs if a.requires_grad]
        found = torch.autograd.grad(
            *((h.to(gh.dtype), torch.stack(states)), wanted, (gh, gc_last)),
            create_graph=create_graph,
            materialize_grads=True,
        )
    each = iter(found)
    grads = [next(each) if a.requires_grad else None for a in inputs]
    return *grads[:2], *[None] * 4, *grads[2:]

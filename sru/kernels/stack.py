"""A stack of plain layers on a CPU as one autograd function, which saves overhead per layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sru.kernels import ACTIVATIONS, HAS_NUMBA, recurrence
from sru.kernels.dispatch import forward_mode_is_active, have_memory, is_batched, is_eager, modes_are_active
from sru.kernels.linear import gradient_of_weight, linear, product
from sru.kernels.reference import Arguments


class Layer(NamedTuple):
    """The tensors of a layer: weight (K * D, n), v and bias (2 * D,), alpha (1,), and dropout masks.

    alpha scales the highway; None without a highway or with a projected one. input_mask (B, n) applies to the input of
    the weight, mask (B, D) within the recurrence.
    """

    weight: Tensor
    v: Tensor
    bias: Tensor
    alpha: Tensor | None
    input_mask: Tensor | None
    mask: Tensor | None


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether this file can run a stack over x: eager code, plain CPU tensors, all in float32 or all in float64.

    Under autocast to bfloat16, x may also be bfloat16.
    """
    if not is_eager():
        return False
    precision = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    return (
        HAS_NUMBA
        and x.device.type == "cpu"
        and (x.dtype in (torch.float32, torch.float64) or (uses_bfloat16() and x.dtype == torch.bfloat16))
        and (uses_bfloat16() or not torch.is_autocast_enabled("cpu"))
        and not forward_mode_is_active()
        and not modes_are_active()
        and have_memory(x, *others)
        and all(a is None or (a.dtype == precision and a.device == x.device) for a in others)
        and not is_batched(x)
    )


def uses_bfloat16() -> bool:
    """Whether autocast makes products in bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def run(
    x: Tensor,
    c0: Tensor,
    pad: Tensor | None,
    layers: Sequence[Layer],
    activation: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """h (T, B, D) of the last layer and the last states (L, B, D), from x (T, B, n) and c0 (L, B, D)."""
    options = ACTIVATIONS.index(activation), 2 if bidirectional else 1
    if uses_bfloat16() and x.dtype != torch.float64:
        with torch.autocast("cpu", enabled=False):
            h, c = run_in(torch.bfloat16, x.float(), c0, pad, layers, options)
            return h.bfloat16(), c
    return run_in(x.dtype, x, c0, pad, layers, options)


def run_in(
    dtype: torch.dtype, x: Tensor, c0: Tensor, pad: Tensor | None, layers: Sequence[Layer], options: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`run` with products in this dtype and everything else, also the products of a single step, in the dtype of x."""
    parameters = [parameter for layer in layers for parameter in layer[:3]]
    if torch.is_grad_enabled() and any(a.requires_grad for a in (x, c0, *parameters)):
        masks = [(a.input_mask, a.mask, None if a.alpha is None else a.alpha.item()) for a in layers]
        function: Any = _Stack
        h, c = function.apply(x, c0, pad, masks, options, dtype, *parameters)
        return h, c
    from sru.kernels import cpu, cpu_step

    if len(x) == 1 and pad is None and all(a.mask is None and a.input_mask is None for a in layers):
        results = cpu_step.run(x, c0, layers, options[0])
        if results is not None:
            return results
    last = []
    for layer, c in zip(layers, c0, strict=True):
        weight, v, bias, alpha, input_mask, mask = layer
        u = project(x, weight, c, dtype, input_mask).to(x.dtype)
        skip = None if alpha is None else x
        x, _, c = cpu.run_forward(Arguments(u, skip, v, bias, c, mask, pad, alpha, 0.0, *options), keep=False)
        last.append(c)
    return x, torch.stack(last)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        c0: Tensor,
        pad: Tensor | None,
        masks: list[Any],
        options: tuple[int, int],
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from sru.kernels import cpu

        saved: list[Tensor | None] = []
        last, inner = [], x
        for i, (input_mask, mask, alpha) in enumerate(masks):
            weight, v, bias = parameters[3 * i : 3 * i + 3]
            u = project(inner, weight, c0[i], dtype, input_mask)
            skip = None if alpha is None else inner
            arguments = Arguments(u.to(x.dtype), skip, v, bias, c0[i], mask, pad, alpha, 0.0, *options)
            h, c, c_last = cpu.run_forward(arguments, keep=True)
            saved += [inner, u, c, input_mask, mask]
            last.append(c_last)
            inner = h
        ctx.save_for_backward(x, c0, pad, *parameters, *saved)
        ctx.alphas, ctx.options, ctx.dtype = [entry[2] for entry in masks], options, dtype
        return inner, torch.stack(last)

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gc_last: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_batched(gh) or is_batched(gc_last):
            gx, gc0, *grads = differentiate(ctx, gh, gc_last)
        else:
            with torch.autocast("cpu", enabled=False):  # products in the dtype of the forward pass
                gx, gc0, *grads = run_backward(ctx, gh, gc_last)
        gpad = gmasks = goptions = gdtype = None
        return gx, gc0, gpad, gmasks, goptions, gdtype, *grads


def run_backward(ctx: Any, gh: Tensor, gc_last: Tensor) -> list[Tensor | None]:
    """The gradients of x, c0 and the parameters, by the kernels."""
    from sru.kernels import cpu

    x, c0, pad, *tensors = ctx.saved_tensors
    needs_x, needs_c0, _, _, _, _, *needs = ctx.needs_input_grad
    parameters, saved = tensors[: len(needs)], tensors[len(needs) :]
    grads: list[Tensor | None] = [None] * len(parameters)
    gc0 = []
    for i, alpha in reversed(list(enumerate(ctx.alphas))):
        weight, v, bias = parameters[3 * i : 3 * i + 3]
        inner, u, c, input_mask, mask = saved[5 * i : 5 * i + 5]
        needs_inner = i > 0 or needs_x
        skip = None if alpha is None else inner
        arguments = Arguments(u.to(x.dtype), skip, v, bias, c0[i], mask, pad, alpha, 0.0, *ctx.options)
        needs_skip = needs_inner and alpha is not None
        gu, gskip, gv, gb, gc = cpu.run_backward(gh, gc_last[i], arguments, c, needs_x=needs_skip)
        gu = gu.view(-1, weight.shape[0]).to(ctx.dtype)
        if needs[3 * i]:
            rows = inner if input_mask is None else inner * input_mask
            grads[3 * i] = gradient_of_weight(gu, rows.reshape(-1, weight.shape[1]).to(ctx.dtype)).to(weight.dtype)
        grads[3 * i + 1 : 3 * i + 3] = gv, gb
        gc0.append(gc)
        if needs_inner:
            gh = product(gu, weight.to(ctx.dtype).t()).view(inner.shape).to(x.dtype)
            gh = gh if input_mask is None else gh.mul_(input_mask)
            gh = gh if gskip is None else gh.add_(gskip)
    return [gh if needs_x else None, torch.stack(gc0[::-1]) if needs_c0 else None, *grads]


def project(x: Tensor, weight: Tensor, c: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """u (T, B, K, D) from x (T, B, n), for a state c (B, D), by a product in this dtype."""
    x = x if mask is None else x * mask
    u = product(x.reshape(-1, x.shape[2]).to(dtype), weight.to(dtype))
    return u.view(*x.shape[:2], weight.shape[0] // c.shape[1], c.shape[1])


def differentiate(ctx: Any, gh: Tensor, gc_last: Tensor) -> list[Tensor | None]:
    """The same as differentiable functions, layer by layer."""
    x, c0, pad, *tensors = ctx.saved_tensors
    count = 3 * len(ctx.alphas)
    parameters, saved = tensors[:count], tensors[count:]
    create_graph = torch.is_grad_enabled()
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=ctx.dtype == torch.bfloat16)
    with torch.enable_grad(), cast:
        # Views, so that each input's gradient excludes the others.
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
            (h.to(gh.dtype), torch.stack(states)),
            wanted,
            (gh, gc_last),
            create_graph=create_graph,
            materialize_grads=True,
        )
    grads = iter(found)
    return [next(grads) if a.requires_grad else None for a in inputs]

"""One step of a whole stack of layers on a CPU, matrix products included, for inference on few sequences.

One call runs all layers: it reads each weight once, in the order of memory, and calls no other library.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sru.kernels.cpu import compile_kernel, pack
from sru.kernels.cpu_kernels import C_LAST, INPUT, H, U, add_product, integers, parameter_rows, row, step

MAX_SEQUENCES = 8  # with more, a library's matrix product is faster
MAX_WEIGHT = 2**22  # for larger weights it is faster too, because it uses threads
LAYER = 6  # integers for each layer among the arguments


@functools.cache
def one_step(activation: int) -> Callable[[Any], None]:
    """The kernel that computes c_last (L, B, D) and h (B, D) from x (B, n) and c0 (L, B, D)."""

    def kernel(like: Any) -> None:
        one, a = like[0], integers(like)
        layers, B, D, size, x, c0, c_last = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        h, inner, u = a[9], a[10], a[11]  # layers write to inner (B, D) and h in turn; u (B, 4, D)
        numbers = one, one, one - one
        m = row(like, a[12], H)
        for k in range(D):
            m[k] = one
        for i in range(layers):
            at = 13 + LAYER * i
            weight, v, b, n, matrices, alpha = a[at], a[at + 1], a[at + 2], a[at + 3], a[at + 4], a[at + 5]
            for k in range(matrices * D):
                w = row(like, weight + size * k * n, INPUT)
                for j in range(B):
                    xn, total = row(like, x + size * j * n, H), one - one
                    for q in range(n):
                        total = add_product(total, w[q], xn[q])
                    row(like, u + size * (j * 4 * D + k), U)[0] = total
            parameters = parameter_rows(like, v, b, D, 0, size)
            target = inner if (layers - 1 - i) & 1 else h
            for j in range(B):
                at = u + size * j * 4 * D
                u0, u1 = row(like, at, U), row(like, at + size * D, U)
                u2, skip = row(like, at + size * 2 * D, U), row(like, at + size * 3 * D, U)
                if matrices == 3:
                    scale = row(like, alpha, INPUT)[0] if alpha else one - one
                    xn = row(like, x + size * j * n, H)
                    for k in range(D):
                        skip[k] = scale * xn[k] if alpha else one - one
                at = size * (i * B + j) * D
                cp, cn = row(like, c0 + at, INPUT), row(like, c_last + at, C_LAST)
                hn = row(like, target + size * j * D, H)
                step(D, numbers, (u0, u1, u2, skip, m), parameters, cp, cn, hn, activation)
            x = target

    return kernel


def run(x: Tensor, c0: Tensor, layers: Sequence[tuple[Any, ...]], activation: int) -> tuple[Tensor, Tensor] | None:
    """h (1, B, D) and the states (L, B, D) from x (1, B, n) and c0 (L, B, D), or None if this is not faster.

    layers: weight, v, bias, alpha (None without a highway of the input), ... of each, as in stack.Layer.
    """
    batch, size = c0.shape[1:]
    if not 0 < batch <= MAX_SEQUENCES:
        return None
    x, c0 = x.contiguous(), c0.contiguous()
    h, c_last = x.new_empty(1, batch, size), torch.empty_like(c0)
    scratch = x.new_empty(5 * batch + 1, size)
    inner = scratch.data_ptr()
    width = x.element_size() * size
    arguments = [0, 1, len(layers), batch, size, x.element_size()]
    arguments += [x.data_ptr(), c0.data_ptr(), c_last.data_ptr(), h.data_ptr()]
    arguments += [inner, inner + batch * width, inner + 5 * batch * width]
    for weight, v, bias, alpha, *_ in layers:
        if weight.numel() > MAX_WEIGHT or not (weight.is_contiguous() and v.is_contiguous() and bias.is_contiguous()):
            return None
        if not weight.data_ptr():  # its memory was freed
            return None
        arguments += [weight.data_ptr(), v.data_ptr(), bias.data_ptr(), weight.shape[1], weight.shape[0] // size]
        arguments.append(0 if alpha is None else alpha.data_ptr())
    memory = pack(x.dtype, 1.0, 0.0, arguments)
    compile_kernel(one_step(activation), x.dtype)[0](memory.buffer_info()[0])
    return h, c_last

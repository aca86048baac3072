"""The SRU recurrence on CPUs: kernels compiled by numba, and their launch over threads.

A kernel is a C function over raw addresses: calling it costs microseconds and releases the interpreter lock. It walks a
tile, a few sequences by a range of columns, from the first step to the last: memory is read in the order in which
it lies, and the tile's state stays in the nearest cache. Tiles depend on the shape alone, so results are bitwise the
same for any number of threads.
"""

import array
import ctypes
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import overload, register_jitable
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = {"identity": 0, "tanh": 1, "relu": 2}
TILE_BATCH = 4  # sequences of a tile
TILE_COLUMNS = 512
# Elements below which handing work to another thread costs more than it saves; bench/NOTES.md has the measurement.
SERIAL_ELEMENTS = 100_000

# An intrinsic's first argument comes from numba, which the decorator's own type does not say.
intrinsic: Any = numba.extending.intrinsic

LOG2E = np.float32(math.log2(math.e))
MAGIC = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which the low bits then hold
LIMIT = np.float32(126)
ONE = np.float32(1)
# 2**r on [-1/2, 1/2], least squares at Chebyshev nodes, relative error 2e-9.
P0, P1, P2, P3, P4, P5, P6 = (
    np.float32(c)
    for c in (
        1.0000000005920204,
        0.6931472056005099,
        0.24022646608713735,
        0.05550328997518715,
        0.009618519534387948,
        0.0013399860362685657,
        0.00015337576820039663,
    )
)


@intrinsic
def as_float(typingctx, bits):
    """The float32 with these bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], context.get_value_type(types.float32)
    )


@intrinsic
def as_bits(typingctx, number):
    """The bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], context.get_value_type(types.int32)
    )


@intrinsic
def pointer(typingctx, like, address):
    """The address as a pointer of the type of `like`."""
    return like(like, types.intp), lambda context, builder, signature, args: builder.inttoptr(
        args[1], context.get_value_type(signature.return_type)
    )


@intrinsic
def is_set(typingctx, address):
    """Whether the byte at an address is not 0."""

    def codegen(context, builder, signature, args):
        byte = context.get_value_type(types.uint8)
        loaded = builder.load(builder.inttoptr(args[0], byte.as_pointer()))
        return builder.icmp_unsigned("!=", loaded, byte(0))

    return types.boolean(types.intp), codegen


def sigmoid(z):
    """1 / (1 + exp(-z)), written so that the compiler turns a loop of it into vector instructions."""


@overload(sigmoid, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def sigmoid_of_type(z):
    def sigmoid32(z):
        y = -LOG2E * z
        # Comparisons that leave NaN alone.
        y = LIMIT if y > LIMIT else y
        y = -LIMIT if y < -LIMIT else y
        shifted = y + MAGIC
        r = y - (shifted - MAGIC)
        p = P6 * r + P5
        p = p * r + P4
        p = p * r + P3
        p = p * r + P2
        p = p * r + P1
        p = p * r + P0
        power = as_float((as_bits(shifted) << np.int32(23)) + np.int32(0x3F800000))
        return ONE / (ONE + p * power)

    def sigmoid64(z):
        return 1.0 / (1.0 + math.exp(-z))

    return sigmoid32 if z == types.float32 else sigmoid64


@register_jitable
def activate(c, one, activation):
    """g(c)."""
    if activation == 1:
        s = sigmoid(c + c)
        return s + s - one
    if activation == 2:
        return one - one if c <= one - one else c  # NaN stays
    return c


@register_jitable
def slope(c, y, one, activation):
    """g'(c) where y = g(c)."""
    if activation == 1:
        return one - y * y
    if activation == 2:
        return one - one if c <= one - one else one
    return one


@register_jitable
def row(like, address, n):
    """n contiguous numbers at an address, as an array."""
    return carray(pointer(like, address), (n,))


# Sizes, strides (in elements) and addresses reach a kernel as one array of integers: a call costs little, and the
# array's layout is the order of the first lines below.


def forward(a, like, one, scale, first, last):
    """Tiles first to last of the forward pass. `like` carries the dtype, whose size in bytes is a[6]."""
    T, B, D, tile_batch, tile_columns, halves, size = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    u, u_t, u_b, u_k, skip, skip_t, skip_b = a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    v, v_k, b, b_k, c0, c0_b, mask, mask_b, pad = a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22]
    activation, h, c, keep, c_last = a[23], a[24], a[25], a[26], a[27]
    half = D // halves
    blocks = (half + tile_columns - 1) // tile_columns
    for tile in range(first, last):
        side = tile // blocks % halves
        start = side * half + tile % blocks * tile_columns
        n = min(tile_columns, (side + 1) * half - start)
        b_first = tile // (blocks * halves) * tile_batch
        b_last = min(B, b_first + tile_batch)
        vf, vr = row(like, v + size * start, n), row(like, v + size * (v_k + start), n)
        bf, br = row(like, b + size * start, n), row(like, b + size * (b_k + start), n)
        for i in range(T):
            t = T - 1 - i if side else i
            # Where no gradient needs c, two rows take turns.
            now, before = (t, t + 1 if side else t - 1) if keep else (i & 1, 1 - (i & 1))
            for j in range(b_first, b_last):
                place = size * (j * D + start)
                cp = row(like, c0 + size * (j * c0_b + start) if i == 0 else c + size * before * B * D + place, n)
                cn = row(like, c + size * now * B * D + place, n)
                hn = row(like, h + size * t * B * D + place, n)
                if pad and is_set(pad + t * B + j):
                    for k in range(n):
                        cn[k] = cp[k]
                        hn[k] = one - one
                    continue
                at = u + size * (t * u_t + j * u_b + start)
                u0, u1, u2 = row(like, at, n), row(like, at + size * u_k, n), row(like, at + size * 2 * u_k, n)
                x = row(like, skip + size * (t * skip_t + j * skip_b + start), n)
                m = row(like, mask + size * (j * mask_b + start), n)
                if activation == 0:
                    for k in range(n):
                        f = sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
                        r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
                        state = u0[k] + (cp[k] - u0[k]) * f
                        carried = scale * x[k]
                        cn[k] = state
                        hn[k] = carried + m[k] * r * (state - carried)
                else:
                    for k in range(n):
                        f = sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
                        cn[k] = u0[k] + (cp[k] - u0[k]) * f
                        hn[k] = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
                    for k in range(n):
                        carried = scale * x[k]
                        hn[k] = carried + m[k] * hn[k] * (activate(cn[k], one, activation) - carried)
        for j in range(b_first, b_last):
            end = 0 if side else T - 1
            place = size * (j * D + start)
            source = c + size * (end if keep else (T - 1) & 1) * B * D + place
            cn = row(like, source if T else c0 + size * (j * c0_b + start), n)
            to = row(like, c_last + place, n)
            for k in range(n):
                to[k] = cn[k]


def backward(a, like, one, scale, first, last):
    """Tiles first to last of the backward pass, with the gates computed again from c.

    The gradient of c_t is the sum of what h_t and c_{t+1} hand down; all else is linear in it or apart from it, so that
    a step is a few loops without branches.
    """
    T, B, D, tile_batch, tile_columns, halves, size = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    u, u_t, u_b, u_k, skip, skip_t, skip_b = a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    v, v_k, b, b_k, c0, c0_b, mask, mask_b, pad = a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22]
    activation, c, gh, gh_t, gh_b, gu, gu_k = a[23], a[24], a[25], a[26], a[27], a[28], a[29]
    gskip, gskip_t, gskip_b, gc, sums, matrices = a[30], a[31], a[32], a[33], a[34], a[35]
    half = D // halves
    blocks = (half + tile_columns - 1) // tile_columns
    for tile in range(first, last):
        side = tile // blocks % halves
        start = side * half + tile % blocks * tile_columns
        n = min(tile_columns, (side + 1) * half - start)
        chunk = tile // (blocks * halves)
        b_first = chunk * tile_batch
        b_last = min(B, b_first + tile_batch)
        vf, vr = row(like, v + size * start, n), row(like, v + size * (v_k + start), n)
        bf, br = row(like, b + size * start, n), row(like, b + size * (b_k + start), n)
        at = sums + size * (chunk * 4 * D + start)
        svf, svr = row(like, at, n), row(like, at + size * D, n)
        sbf, sbr = row(like, at + size * 2 * D, n), row(like, at + size * 3 * D, n)
        for k in range(n):
            svf[k] = svr[k] = sbf[k] = sbr[k] = one - one
        for i in range(T):
            t = i if side else T - 1 - i
            before = t + 1 if side else t - 1
            for j in range(b_first, b_last):
                place = size * (j * D + start)
                at = gu + size * ((t * B + j) * matrices * D + start)
                gu0, gu1, gu2 = row(like, at, n), row(like, at + size * gu_k, n), row(like, at + size * 2 * gu_k, n)
                gx = row(like, gskip + size * (t * gskip_t + j * gskip_b + start), n)
                if pad and is_set(pad + t * B + j):
                    for k in range(n):
                        gu0[k] = gu1[k] = gu2[k] = gx[k] = one - one
                    continue
                cp = row(like, c0 + size * (j * c0_b + start) if i == T - 1 else c + size * before * B * D + place, n)
                cn = row(like, c + size * t * B * D + place, n)
                at = u + size * (t * u_t + j * u_b + start)
                u0, u1, u2 = row(like, at, n), row(like, at + size * u_k, n), row(like, at + size * 2 * u_k, n)
                x = row(like, skip + size * (t * skip_t + j * skip_b + start), n)
                m = row(like, mask + size * (j * mask_b + start), n)
                g = row(like, gh + size * (t * gh_t + j * gh_b + start), n)
                lam = row(like, gc + place, n)
                # Fewer arrays a loop keep the compiler's overlap checks, and so the vectors, affordable.
                for k in range(n):
                    r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
                    carried = scale * x[k]
                    y = activate(cn[k], one, activation)
                    kept = g[k] * m[k] * r
                    gu2[k] = kept * (y - carried) * (one - r)
                    gx[k] = scale * (g[k] - kept)
                    # gu0 holds the gradient of c_t until the next loop.
                    gu0[k] = kept * slope(cn[k], y, one, activation)
                for k in range(n):
                    f = sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
                    total = gu0[k] + lam[k]
                    gated = total * f
                    g1 = gated * (one - f) * (cp[k] - u0[k])
                    gu0[k] = total - gated
                    gu1[k] = g1
                    lam[k] = gated + g1 * vf[k] + gu2[k] * vr[k]
                for k in range(n):
                    svf[k] += gu1[k] * cp[k]
                    svr[k] += gu2[k] * cp[k]
                    sbf[k] += gu1[k]
                    sbr[k] += gu2[k]


@functools.cache
def compiled(kernel: Callable, dtype: torch.dtype) -> Callable:
    """The kernel as a C function, compiled at the first call and kept on disk for the next process."""
    number, c_number = (types.float32, ctypes.c_float) if dtype == torch.float32 else (types.float64, ctypes.c_double)
    integers, like = types.CPointer(types.int64), types.CPointer(number)
    signature = types.void(integers, like, number, number, types.int64, types.int64)
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
    try:
        code = numba.cfunc(signature, cache=True, **options)(kernel)
    except (RuntimeError, OSError):  # numba finds no folder that it could write to
        code = numba.cfunc(signature, **options)(kernel)
    # Plain addresses are cheaper to pass than typed pointers.
    pointers, bounds = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 2
    address: Any = code.address
    function: Any = ctypes.CFUNCTYPE(None, *pointers, c_number, c_number, *bounds)(address)
    function.code = code  # the machine code lives as long as the function
    return function


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Threads of the whole process, made at first use."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="sru")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=pool.cache_clear)


def launch(kernel: Callable, inputs: "Inputs", scale: float, options: list[int], tensors: list[Tensor]) -> None:
    """Run all tiles, shared among as many threads as torch may use where there is enough work.

    The options follow the inputs' arguments; the tensors are those whose addresses they hold.
    """
    function = compiled(kernel, inputs.dtype)
    packed = array.array("q", inputs.arguments + options)
    tiles = inputs.tiles
    threads = min(tiles, torch.get_num_threads()) if inputs.elements >= SERIAL_ELEMENTS else 1
    if threads <= 1:
        function(packed.buffer_info()[0], None, 1.0, scale, 0, tiles)
        return
    shares = iter([(tiles * i // threads, tiles * (i + 1) // threads) for i in range(threads)])
    done: SimpleQueue[None] = SimpleQueue()
    # An interrupt may end this call while another thread still works: that thread keeps what it writes to alive.
    alive = packed, inputs, tensors

    def work(alive: Any = alive) -> None:
        for first, last in shares:
            function(packed.buffer_info()[0], None, 1.0, scale, first, last)
            done.put(None)

    for _ in range(threads - 1):
        try:
            pool().submit(work)
        except RuntimeError:  # no more threads are to be had, as when the interpreter ends
            break
    # Shares are taken one by one, so that what no other thread takes up is done here.
    work()
    for _ in range(threads):
        done.get()


def recurrence(
    u: Tensor,
    x: Tensor | None,
    v: Tensor,
    b: Tensor,
    c0: Tensor,
    *,
    mask: Tensor | None,
    pad: Tensor | None,
    scale: float,
    activation: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """As `sru.kernels.recurrence`, for float32 and float64."""
    if scale == 0:
        x = None
    if any(a is not None and a.dtype != u.dtype for a in (x, v, b, c0, mask)):
        v, b, c0 = v.to(u.dtype), b.to(u.dtype), c0.to(u.dtype)
        x = None if x is None else x.to(u.dtype)
        mask = None if mask is None else mask.to(u.dtype)
    options = mask, pad, scale, ACTIVATIONS[activation], 2 if bidirectional else 1
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (u, x, v, b, c0)):
        return Recurrence.apply(u, x, v, b, c0, *options)
    h, _, c_last = run_forward(u, x, v, b, c0, *options, keep=False)
    return h, c_last


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last dimension does not lie together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Inputs:
    """The inputs of both passes as a kernel wants them: rows that lie together, addresses and strides."""

    def __init__(self, u, x, v, b, c0, mask, pad, scale, halves):
        steps, batch, matrices, size = u.shape
        u, v, b, c0 = map(with_rows, (u, v, b, c0))
        # What is not given is one row for all steps and sequences.
        mask = u.new_ones(size).expand(batch, size) if mask is None else with_rows(mask)
        if scale == 0:
            skip = u.new_zeros(size).expand(steps, batch, size)
        else:
            skip = u[:, :, 3] if matrices == 4 else with_rows(x)
        pad = None if pad is None else pad.contiguous()
        tile_batch = max(TILE_BATCH, -(-batch // 64))
        self.chunks = -(-batch // tile_batch)
        columns = TILE_COLUMNS if self.chunks >= 8 else TILE_COLUMNS // 4
        self.tiles = self.chunks * halves * -(-(size // halves) // columns)
        self.elements, self.dtype = steps * batch * size, u.dtype
        self.tensors = u, skip, v, b, c0, mask, pad  # the addresses below stay valid with them
        self.arguments = [
            *(steps, batch, size, tile_batch, columns, halves, u.element_size()),
            *(u.data_ptr(), *u.stride()[:3], skip.data_ptr(), *skip.stride()[:2]),
            *(v.data_ptr(), v.stride(0), b.data_ptr(), b.stride(0), c0.data_ptr(), c0.stride(0)),
            *(mask.data_ptr(), mask.stride(0), 0 if pad is None else pad.data_ptr()),
        ]


def run_forward(u, x, v, b, c0, mask, pad, scale, activation, halves, *, keep):
    """h, c and c_last; c has all steps where they are kept, else two rows of scratch."""
    steps, batch, _, size = u.shape
    inputs = Inputs(u, x, v, b, c0, mask, pad, scale, halves)
    h = u.new_empty(steps, batch, size)
    c = u.new_empty(steps if keep else 2, batch, size)
    c_last = u.new_empty(batch, size)
    outputs = [activation, h.data_ptr(), c.data_ptr(), int(keep), c_last.data_ptr()]
    launch(forward, inputs, scale, outputs, [h, c, c_last])
    return h, c, c_last


class Recurrence(torch.autograd.Function):
    """The recurrence with its backward kernel; first derivatives only."""

    @staticmethod
    def forward(ctx, u, x, v, b, c0, mask, pad, scale, activation, halves):
        h, c, c_last = run_forward(u, x, v, b, c0, mask, pad, scale, activation, halves, keep=True)
        ctx.save_for_backward(u, x, v, b, c0, mask, pad, c)
        ctx.options = scale, activation, halves
        return h, c_last

    @staticmethod
    @once_differentiable
    def backward(ctx, gh, gc_last):
        u, x, v, b, c0, mask, pad, c = ctx.saved_tensors
        scale, activation, halves = ctx.options
        steps, batch, matrices, size = u.shape
        inputs = Inputs(u, x, v, b, c0, mask, pad, scale, halves)
        gh = with_rows(gh)
        gu = u.new_empty(u.shape)
        needs_x = ctx.needs_input_grad[1]
        if matrices == 4:
            gskip = gu[:, :, 3]
        elif needs_x:
            gskip = u.new_empty(steps, batch, size)
        else:  # the kernel writes it always: all steps write the same rows, which nobody reads
            gskip = u.new_empty(batch, size).expand(steps, batch, size)
        gc = gc_last.clone(memory_format=torch.contiguous_format)
        sums = u.new_empty(inputs.chunks, 4, size)
        outputs = [
            *(activation, c.data_ptr(), gh.data_ptr(), gh.stride(0), gh.stride(1), gu.data_ptr(), gu.stride(2)),
            *(gskip.data_ptr(), gskip.stride(0), gskip.stride(1), gc.data_ptr(), sums.data_ptr(), matrices),
        ]
        launch(backward, inputs, scale, outputs, [c, gh, gu, gskip, gc, sums])
        total = sums.sum(0)
        return gu, gskip if needs_x else None, total[:2], total[2:], gc, None, None, None, None, None

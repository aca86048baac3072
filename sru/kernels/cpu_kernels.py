"""The machine code of the SRU recurrence on CPUs, written for numba.

A kernel is a C function over raw addresses: calling it costs microseconds and releases the interpreter lock. It walks
tiles, a few sequences by a range of columns, from the first step to the last: memory is read in the order in which it
lies, and the tile's state stays in the nearest cache. The inner loops over columns become vector instructions.
"""

import array
import ctypes
import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import overload, register_jitable

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
def integers(typingctx, numbers):
    """The integers of the packed arguments, which follow its numbers."""
    like = types.CPointer(types.int64)

    def codegen(context, builder, signature, args):
        address = builder.ptrtoint(args[0], context.get_value_type(types.intp))
        address = builder.add(address, address.type(8 * NUMBERS))
        return builder.inttoptr(address, context.get_value_type(like))

    return like(numbers), codegen


@intrinsic
def next_tile(typingctx, counter):
    """Take a number of the counter, which the threads of a call share."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], context.get_value_type(types.int64)(1), "monotonic")

    return types.int64(counter), codegen


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


# A kernel has one argument, the address of what `packed` makes: a few numbers of its dtype, then integers: the counter
# of tiles and how many there are, sizes, strides (in elements) and addresses, in the order of the kernels' first lines.
# Every thread that calls it takes tiles until there is none left.
NUMBERS = 4  # slots of eight bytes for the numbers: 1, scale, zoneout


def forward(like):
    """The forward pass."""
    one, scale, zoneout, a = like[0], like[1], like[2], integers(like)
    T, B, D, tile_batch, tile_columns, halves, size = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    u, u_t, u_b, u_k, skip, skip_t, skip_b = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
    v, b, c0, c0_b, mask, mask_b, pad = a[16], a[17], a[18], a[19], a[20], a[21], a[22]
    activation, h, c, keep, c_last = a[23], a[24], a[25], a[26], a[27]
    half = D // halves
    rest = one - zoneout
    blocks = (half + tile_columns - 1) // tile_columns
    while True:
        tile = next_tile(a)
        if tile >= a[1]:
            break
        side = tile // blocks % halves
        start = side * half + tile % blocks * tile_columns
        n = min(tile_columns, (side + 1) * half - start)
        b_first = tile // (blocks * halves) * tile_batch
        b_last = min(B, b_first + tile_batch)
        vf, vr = row(like, v + size * start, n), row(like, v + size * (D + start), n)
        bf, br = row(like, b + size * start, n), row(like, b + size * (D + start), n)
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
                        f = zoneout + rest * sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
                        r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
                        state = u0[k] + (cp[k] - u0[k]) * f
                        carried = scale * x[k]
                        cn[k] = state
                        hn[k] = carried + m[k] * r * (state - carried)
                else:
                    for k in range(n):
                        f = zoneout + rest * sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
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


def backward(like):
    """The backward pass, with the gates computed again from c.

    The gradient of c_t is the sum of what h_t and c_{t+1} hand down; all else is linear in it or apart from it, so that
    a step is a few loops without branches.
    """
    one, scale, zoneout, a = like[0], like[1], like[2], integers(like)
    T, B, D, tile_batch, tile_columns, halves, size = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    u, u_t, u_b, u_k, skip, skip_t, skip_b = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
    v, b, c0, c0_b, mask, mask_b, pad = a[16], a[17], a[18], a[19], a[20], a[21], a[22]
    activation, c, gh, gh_t, gh_b, gu, gu_k = a[23], a[24], a[25], a[26], a[27], a[28], a[29]
    gskip, gskip_t, gskip_b, gc, sums, matrices = a[30], a[31], a[32], a[33], a[34], a[35]
    half = D // halves
    rest = one - zoneout
    blocks = (half + tile_columns - 1) // tile_columns
    while True:
        tile = next_tile(a)
        if tile >= a[1]:
            break
        side = tile // blocks % halves
        start = side * half + tile % blocks * tile_columns
        n = min(tile_columns, (side + 1) * half - start)
        chunk = tile // (blocks * halves)
        b_first = chunk * tile_batch
        b_last = min(B, b_first + tile_batch)
        vf, vr = row(like, v + size * start, n), row(like, v + size * (D + start), n)
        bf, br = row(like, b + size * start, n), row(like, b + size * (D + start), n)
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
                    s = sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
                    total = gu0[k] + lam[k]
                    gated = total * (zoneout + rest * s)
                    g1 = total * rest * s * (one - s) * (cp[k] - u0[k])
                    gu0[k] = total - gated
                    gu1[k] = g1
                    lam[k] = gated + g1 * vf[k] + gu2[k] * vr[k]
                for k in range(n):
                    svf[k] += gu1[k] * cp[k]
                    svr[k] += gu2[k] * cp[k]
                    sbf[k] += gu1[k]
                    sbr[k] += gu2[k]


BLOCK = 64  # rows and columns of a tile of `transpose`


def transpose(like):
    """Rows to columns, a block at a time: read as it lies, kept in the nearest cache, written as it will lie."""
    a = integers(like)
    rows, columns, size, source, source_row, target = a[2], a[3], a[4], a[5], a[6], a[7]
    down = (rows + BLOCK - 1) // BLOCK
    block = np.empty((BLOCK, BLOCK), np.float32)
    while True:
        tile = next_tile(a)
        if tile >= a[1]:
            break
        r, c = tile % down * BLOCK, tile // down * BLOCK
        m, n = min(BLOCK, rows - r), min(BLOCK, columns - c)
        for i in range(m):
            x = row(like, source + size * ((r + i) * source_row + c), n)
            for j in range(n):
                block[i, j] = x[j]
        for j in range(n):
            y = row(like, target + size * ((c + j) * rows + r), m)
            for i in range(m):
                y[i] = block[i, j]


@functools.cache
def compiled(kernel: Callable, dtype: torch.dtype) -> tuple[Callable, int]:
    """The kernel as a C function and its address; compiled at the first call and kept on disk for the next process."""
    signature = types.void(types.CPointer(types.float32 if dtype == torch.float32 else types.float64))
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
    try:
        code = numba.cfunc(signature, cache=True, **options)(kernel)
    except (RuntimeError, OSError):  # numba finds no folder that it could write to
        code = numba.cfunc(signature, **options)(kernel)
    address: Any = code.address
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    function.code = code  # the machine code lives as long as the function
    return function, address


def packed(dtype: torch.dtype, scale: float, zoneout: float, arguments: list[int]) -> array.array:
    """The arguments of a kernel in one piece of memory; good for one run, which uses up the counter."""
    memory = array.array("q", [0] * NUMBERS + arguments)
    struct.pack_into("3f" if dtype == torch.float32 else "3d", memory, 0, 1.0, scale, zoneout)
    return memory

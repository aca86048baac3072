"""The machine code of the SRU recurrence on CPUs, written for numba.

A kernel is a C function over raw addresses: calling it costs microseconds and releases the interpreter lock. It walks
tiles, a few sequences by a range of columns, from the first step to the last: memory is read in the order in which it
lies, and the tile's state stays in the nearest cache. The inner loops over columns become vector instructions.
"""

import array
import ctypes
import functools
import math
import operator
import struct
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import models, overload, register_jitable, register_model

# An intrinsic's first argument comes from numba, which the decorator's own type does not say.
intrinsic: Any = numba.extending.intrinsic

# Names of the arrays of a kernel, for the compiler (see Row). Memory that a kernel writes has one name, under which
# alone it is read and written; memory that it only reads may have any. Different kernels use the same numbers.
INPUT, H, C, C_LAST = range(4)
GU0, GU1, GU2, GX, GC, SVF, SVR, SBF, SBR = range(1, 10)
U = 4
ARRAYS = 10
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


class Row(types.Type):
    """An address of numbers that lie together, of an array with a name.

    Numbers written through a row must not be read or written through a row of another name. The compiler relies on
    that: it turns loops over many arrays into vector instructions without checks for overlap.
    """

    def __init__(self, dtype, name):
        super().__init__(f"Row({dtype}, {name})")
        self.dtype, self.array = dtype, name


@register_model(Row)
class RowModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, manager.lookup(kind.dtype).get_value_type().as_pointer())


@intrinsic(prefer_literal=True)
def row(typingctx, like, address, name):
    """The row of an array at an address; `name` tells arrays apart, all that are only read have that of INPUT."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    kind = Row(like.dtype, name.literal_value)
    return kind(like, types.intp, name), codegen


def place(context, builder, kind, row, k, access):
    """Read or write element k of a row, and say which array it is of."""
    instruction = access(builder.gep(row, [k]))
    instruction.align = kind.dtype.bitwidth // 8
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "sru")])
    names = {n: module.add_metadata([ir.MetaDataString(module, f"sru {n}"), domain]) for n in range(ARRAYS)}
    instruction.set_metadata("alias.scope", module.add_metadata([names[kind.array]]))
    instruction.set_metadata("noalias", module.add_metadata([names[n] for n in names if n != kind.array]))
    return instruction


@intrinsic
def read(typingctx, kind, k):
    def codegen(context, builder, signature, args):
        return place(context, builder, kind, args[0], args[1], builder.load)

    return kind.dtype(kind, types.intp), codegen


@intrinsic
def write(typingctx, kind, k, value):
    def codegen(context, builder, signature, args):
        place(context, builder, kind, args[0], args[1], lambda at: builder.store(args[2], at))
        return context.get_dummy_value()

    return types.none(kind, types.intp, kind.dtype), codegen


@overload(operator.getitem)
def row_getitem(row, k):
    return (lambda row, k: read(row, k)) if isinstance(row, Row) else None


@overload(operator.setitem)
def row_setitem(row, k, value):
    return (lambda row, k, value: write(row, k, value)) if isinstance(row, Row) else None


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


# A kernel has one argument, the address of what `packed` makes: a few numbers of its dtype, then integers: the counter
# of tiles and how many there are, sizes, strides (in elements) and addresses, in the order of the kernels' first lines.
# Every thread that calls it takes tiles until there is none left.
NUMBERS = 4  # slots of eight bytes for the numbers: 1, scale, zoneout


@intrinsic
def add_product(typingctx, total, a, b):
    """total + a * b, in an order that the compiler chooses: a loop of it becomes vector instructions."""

    def codegen(context, builder, signature, args):
        flags = "reassoc", "contract", "nsz"
        return builder.fadd(args[0], builder.fmul(args[1], args[2], flags=flags), flags=flags)

    return total(total, a, b), codegen


@register_jitable(inline="always")
def step(n, numbers, u0, u1, u2, x, vf, vr, bf, br, m, cp, cn, hn, activation):
    """A step of a sequence: from the state cp to cn and h."""
    one, scale, zoneout = numbers
    for k in range(n):
        f = zoneout + (one - zoneout) * sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
        r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
        state = u0[k] + (cp[k] - u0[k]) * f
        carried = scale * x[k]
        cn[k] = state
        hn[k] = carried + m[k] * r * (activate(state, one, activation) - carried)


@functools.cache
def forward(activation):
    """The forward pass with one of the activations: a kernel each, without a branch in its loops."""

    def kernel(like):
        one, a = like[0], integers(like)
        numbers = one, like[1], like[2]
        T, B, D, tile_batch, tile_columns, halves, size = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        u, u_t, u_b, u_k, skip, skip_t, skip_b = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
        v, b, c0, c0_b, mask, mask_b, pad = a[16], a[17], a[18], a[19], a[20], a[21], a[22]
        h, c, keep, c_last = a[23], a[24], a[25], a[26]
        half = D // halves
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
            vf, vr = row(like, v + size * start, INPUT), row(like, v + size * (D + start), INPUT)
            bf, br = row(like, b + size * start, INPUT), row(like, b + size * (D + start), INPUT)
            for i in range(T):
                t = T - 1 - i if side else i
                # Where no gradient needs c, two rows take turns.
                now, before = (t, t + 1 if side else t - 1) if keep else (i & 1, 1 - (i & 1))
                for j in range(b_first, b_last):
                    at = size * (j * D + start)
                    cp = row(like, c0 + size * (j * c0_b + start) if i == 0 else c + size * before * B * D + at, C)
                    cn = row(like, c + size * now * B * D + at, C)
                    hn = row(like, h + size * t * B * D + at, H)
                    if pad and is_set(pad + t * B + j):
                        for k in range(n):
                            cn[k] = cp[k]
                            hn[k] = one - one
                        continue
                    at = u + size * (t * u_t + j * u_b + start)
                    u0, u1 = row(like, at, INPUT), row(like, at + size * u_k, INPUT)
                    u2 = row(like, at + size * 2 * u_k, INPUT)
                    x = row(like, skip + size * (t * skip_t + j * skip_b + start), INPUT)
                    m = row(like, mask + size * (j * mask_b + start), INPUT)
                    step(n, numbers, u0, u1, u2, x, vf, vr, bf, br, m, cp, cn, hn, activation)
            for j in range(b_first, b_last):
                end = 0 if side else T - 1
                at = size * (j * D + start)
                source = c + size * (end if keep else (T - 1) & 1) * B * D + at
                cn = row(like, source if T else c0 + size * (j * c0_b + start), C)
                to = row(like, c_last + at, C_LAST)
                for k in range(n):
                    to[k] = cn[k]

    return kernel


@register_jitable(inline="always")
def step_back(n, numbers, rows, results, activation):
    """The gradients of a step of a sequence."""
    one, scale, zoneout = numbers
    u0, u1, u2, x, vf, vr, bf, br, m, cp, cn, g = rows
    gu0, gu1, gu2, gx, lam, svf, svr, sbf, sbr = results
    rest = one - zoneout
    for k in range(n):
        f = sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
        r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
        carried = scale * x[k]
        y = activate(cn[k], one, activation)
        kept = g[k] * m[k] * r
        total = kept * slope(cn[k], y, one, activation) + lam[k]
        gated = total * (zoneout + rest * f)
        g1 = total * rest * f * (one - f) * (cp[k] - u0[k])
        g2 = kept * (y - carried) * (one - r)
        gu0[k] = total - gated
        gu1[k] = g1
        gu2[k] = g2
        gx[k] = scale * (g[k] - kept)
        lam[k] = gated + g1 * vf[k] + g2 * vr[k]
        svf[k] += g1 * cp[k]
        svr[k] += g2 * cp[k]
        sbf[k] += g1
        sbr[k] += g2


@functools.cache
def backward(activation):
    """The backward pass, with the gates computed again from c.

    The gradient of c_t is the sum of what h_t and c_{t+1} hand down; all else is linear in it or apart from it.
    """

    def kernel(like):
        one, a = like[0], integers(like)
        numbers = one, like[1], like[2]
        T, B, D, tile_batch, tile_columns, halves, size = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        u, u_t, u_b, u_k, skip, skip_t, skip_b = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
        v, b, c0, c0_b, mask, mask_b, pad = a[16], a[17], a[18], a[19], a[20], a[21], a[22]
        c, gh, gh_t, gh_b, gu, gu_k = a[23], a[24], a[25], a[26], a[27], a[28]
        gskip, gskip_t, gskip_b, gc, sums, matrices = a[29], a[30], a[31], a[32], a[33], a[34]
        half = D // halves
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
            vf, vr = row(like, v + size * start, INPUT), row(like, v + size * (D + start), INPUT)
            bf, br = row(like, b + size * start, INPUT), row(like, b + size * (D + start), INPUT)
            at = sums + size * (chunk * 4 * D + start)
            svf, svr = row(like, at, SVF), row(like, at + size * D, SVR)
            sbf, sbr = row(like, at + size * 2 * D, SBF), row(like, at + size * 3 * D, SBR)
            for k in range(n):
                svf[k] = one - one
                svr[k] = one - one
                sbf[k] = one - one
                sbr[k] = one - one
            for i in range(T):
                t = i if side else T - 1 - i
                before = t + 1 if side else t - 1
                for j in range(b_first, b_last):
                    at = gu + size * ((t * B + j) * matrices * D + start)
                    gu0, gu1 = row(like, at, GU0), row(like, at + size * gu_k, GU1)
                    gu2 = row(like, at + size * 2 * gu_k, GU2)
                    gx = row(like, gskip + size * (t * gskip_t + j * gskip_b + start), GX)
                    if pad and is_set(pad + t * B + j):
                        for k in range(n):
                            gu0[k] = one - one
                            gu1[k] = one - one
                            gu2[k] = one - one
                            gx[k] = one - one
                        continue
                    at = size * (j * D + start)
                    lam, cn = row(like, gc + at, GC), row(like, c + size * t * B * D + at, INPUT)
                    at = c0 + size * (j * c0_b + start) if i == T - 1 else c + size * before * B * D + at
                    cp = row(like, at, INPUT)
                    at = u + size * (t * u_t + j * u_b + start)
                    u0, u1 = row(like, at, INPUT), row(like, at + size * u_k, INPUT)
                    u2 = row(like, at + size * 2 * u_k, INPUT)
                    x = row(like, skip + size * (t * skip_t + j * skip_b + start), INPUT)
                    m = row(like, mask + size * (j * mask_b + start), INPUT)
                    g = row(like, gh + size * (t * gh_t + j * gh_b + start), INPUT)
                    rows = u0, u1, u2, x, vf, vr, bf, br, m, cp, cn, g
                    results = gu0, gu1, gu2, gx, lam, svf, svr, sbf, sbr
                    step_back(n, numbers, rows, results, activation)

    return kernel


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
            x = row(like, source + size * ((r + i) * source_row + c), INPUT)
            for j in range(n):
                block[i, j] = x[j]
        for j in range(n):
            y = row(like, target + size * ((c + j) * rows + r), H)
            for i in range(m):
                y[i] = block[i, j]


@functools.cache
def compile_kernel(kernel: Callable, dtype: torch.dtype) -> tuple[Callable, int]:
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


def pack(dtype: torch.dtype, scale: float, zoneout: float, arguments: list[int]) -> array.array:
    """The arguments of a kernel in one piece of memory; good for one run, which uses up the counter."""
    memory = array.array("q", [0] * NUMBERS + arguments)
    struct.pack_into("3f" if dtype == torch.float32 else "3d", memory, 0, 1.0, scale, zoneout)
    return memory

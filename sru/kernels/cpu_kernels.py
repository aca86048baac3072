"""The SRU recurrence on CPUs as functions that numba compiles to machine code.

A kernel is a C function of one address: a call costs microseconds and releases the interpreter lock. It processes
tiles, a few sequences by a range of columns, from the first step to the last: it reads memory in order, and the state
of the tile stays in the nearest cache. The inner loops over columns become vector instructions.
"""
# mypy: allow-untyped-decorators, allow-untyped-calls

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, overload, register_jitable, register_model

intrinsic: Any = numba.extending.intrinsic  # its type hint lacks the first argument, which numba passes
Codegen = Callable[[Any, Any, Any, Any], Any]  # of context, builder, signature and arguments

# Numbers of a kernel's arrays, for the compiler (see Row). Memory that a kernel writes has one number, by which all
# reads and writes go; memory that it only reads may have any. Kernels share these numbers.
INPUT, H, C, C_LAST = range(4)
GU0, GU1, GU2, GX, GC, SVF, SVR, SBF, SBR = range(1, 10)
U = 4
ARRAYS = 10
LOG2E = np.float32(math.log2(math.e))
MAGIC = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which the low bits then hold
LIMIT = np.float32(126)
ONE = np.float32(1)
# 2**r on [-1/2, 1/2], least squares at Chebyshev nodes, relative error 2e-9.
POWERS = 1.0, 0.6931472, 0.24022646, 0.05550329, 0.00961852, 0.001339986, 0.00015337577
P0, P1, P2, P3, P4, P5, P6 = map(np.float32, POWERS)


@intrinsic
def integers(typingctx: Any, numbers: Any) -> tuple[Any, Codegen]:
    """The integers of the packed arguments, which follow their numbers."""
    like = types.CPointer(types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(args[0], context.get_value_type(types.intp))
        address = builder.add(address, address.type(8 * NUMBERS))
        return builder.inttoptr(address, context.get_value_type(like))

    return like(numbers), codegen


@intrinsic
def next_tile(typingctx: Any, counter: Any) -> tuple[Any, Codegen]:
    """Take the next number from the counter that the threads of a call share."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], context.get_value_type(types.int64)(1), "monotonic")

    return types.int64(counter), codegen


class Row(types.Type):
    """The address of contiguous numbers in an array with a number of its own.

    Memory written through a row must not be read or written through a row of another array. The compiler relies on
    that to turn loops over many arrays into vector instructions without checks for overlap.
    """

    def __init__(self, dtype: Any, name: int) -> None:
        super().__init__(f"Row({dtype}, {name})")
        self.dtype, self.array = dtype, name


@register_model(Row)
class RowModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, manager.lookup(kind.dtype).get_value_type().as_pointer())


@intrinsic(prefer_literal=True)
def row(typingctx: Any, like: Any, address: Any, name: Any) -> tuple[Any, Codegen]:
    """The row at an address; `name` is the number of its array, INPUT for all arrays that are only read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    kind = Row(like.dtype, name.literal_value)
    return kind(like, types.intp, name), codegen


def access_element(builder: Any, kind: Any, row: Any, k: Any, access: Callable[[Any], Any]) -> Any:
    """Read or write element k of a row, and tell the compiler which array it belongs to."""
    instruction = access(builder.gep(row, [k]))
    instruction.align = kind.dtype.bitwidth // 8
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "sru")])
    names = {n: module.add_metadata([ir.MetaDataString(module, f"sru {n}"), domain]) for n in range(ARRAYS)}
    instruction.set_metadata("alias.scope", module.add_metadata([names[kind.array]]))
    instruction.set_metadata("noalias", module.add_metadata([names[n] for n in names if n != kind.array]))
    return instruction


@intrinsic
def read(typingctx: Any, kind: Any, k: Any) -> tuple[Any, Codegen]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return access_element(builder, kind, args[0], args[1], builder.load)

    return kind.dtype(kind, types.intp), codegen


@intrinsic
def write(typingctx: Any, kind: Any, k: Any, value: Any) -> tuple[Any, Codegen]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        access_element(builder, kind, args[0], args[1], lambda at: builder.store(args[2], at))
        return context.get_dummy_value()

    return types.none(kind, types.intp, kind.dtype), codegen


@overload(operator.getitem)
def row_getitem(row: Any, k: Any) -> Any:
    def get(row: Any, k: Any) -> Any:
        return read(row, k)

    return get if isinstance(row, Row) else None


@overload(operator.setitem)
def row_setitem(row: Any, k: Any, value: Any) -> Any:
    def set(row: Any, k: Any, value: Any) -> Any:
        return write(row, k, value)

    return set if isinstance(row, Row) else None


@intrinsic
def is_set(typingctx: Any, address: Any) -> tuple[Any, Codegen]:
    """Whether the byte at an address is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = context.get_value_type(types.uint8)
        loaded = builder.load(builder.inttoptr(args[0], byte.as_pointer()))
        return builder.icmp_unsigned("!=", loaded, byte(0))

    return types.boolean(types.intp), codegen


def sigmoid(z: Any) -> Any:
    """1 / (1 + exp(-z)), in a form that the compiler can turn into vector instructions."""


@overload(sigmoid, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def sigmoid_of_type(z: Any) -> Any:
    def sigmoid32(z: Any) -> Any:
        y = -LOG2E * z
        # These comparisons keep NaN.
        y = LIMIT if y > LIMIT else y
        y = -LIMIT if y < -LIMIT else y
        shifted = np.float32(y + MAGIC)
        r = y - (shifted - MAGIC)
        p = P6 * r + P5
        p = p * r + P4
        p = p * r + P3
        p = p * r + P2
        p = p * r + P1
        p = p * r + P0
        bits = np.int32((shifted.view(np.int32) << 23) + 0x3F800000)
        return ONE / (ONE + p * bits.view(np.float32))

    def sigmoid64(z: Any) -> Any:
        return 1.0 / (1.0 + math.exp(-z))

    return sigmoid32 if z == types.float32 else sigmoid64


@register_jitable
def activate(c: Any, one: Any, activation: int) -> Any:
    """g(c)."""
    if activation == 1:
        s = sigmoid(c + c)
        return s + s - one
    if activation == 2:
        return one - one if c <= one - one else c  # NaN stays
    return c


@register_jitable
def slope(c: Any, y: Any, one: Any, activation: int) -> Any:
    """g'(c), given y = g(c)."""
    if activation == 1:
        return one - y * y
    if activation == 2:
        return one - one if c <= one - one else one
    return one


# A kernel has one argument, the address of the arguments packed by cpu.pack: a few numbers of its dtype, then integers:
# the counter of tiles, the number of tiles, sizes, strides (in elements) and addresses, in the order of the kernels'
# first lines. Every thread that calls it takes tiles until none are left.
NUMBERS = 4  # slots of eight bytes for the numbers: 1, scale, zoneout


@intrinsic
def add_product(typingctx: Any, total: Any, a: Any, b: Any) -> tuple[Any, Codegen]:
    """total + a * b in any order, so that a loop of it becomes vector instructions."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = "reassoc", "contract", "nsz"
        return builder.fadd(args[0], builder.fmul(args[1], args[2], flags=flags), flags=flags)

    return total(total, a, b), codegen


@register_jitable(inline="always")
def step(n: int, numbers: Any, inputs: Any, parameters: Any, cp: Any, cn: Any, hn: Any, activation: int) -> None:
    """One step of a sequence, from the state cp to the state cn and the output hn."""
    one, scale, zoneout = numbers
    u0, u1, u2, x, m = inputs
    vf, vr, bf, br = parameters
    for k in range(n):
        f = zoneout + (one - zoneout) * sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
        r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
        state = u0[k] + (cp[k] - u0[k]) * f
        carried = scale * x[k]
        cn[k] = state
        hn[k] = carried + m[k] * r * (activate(state, one, activation) - carried)


@register_jitable(inline="always")
def place(a: Any, tile: int) -> Any:
    """A tile's direction, first column, number of columns, number among the tiles of sequences, and sequences."""
    B, D, tile_batch, tile_columns, halves = a[3], a[4], a[5], a[6], a[7]
    half = D // halves
    blocks = (half + tile_columns - 1) // tile_columns
    side = tile // blocks % halves
    start = side * half + tile % blocks * tile_columns
    n = min(tile_columns, (side + 1) * half - start)
    chunk = tile // (blocks * halves)
    return side, start, n, chunk, chunk * tile_batch, min(B, (chunk + 1) * tile_batch)


@register_jitable(inline="always")
def parameter_rows(like: Any, v: int, b: int, D: int, start: int, size: int) -> Any:
    """The rows of v and b from column `start`: of the forget gate, then of the reset gate."""
    vf, vr = row(like, v + size * start, INPUT), row(like, v + size * (D + start), INPUT)
    return vf, vr, row(like, b + size * start, INPUT), row(like, b + size * (D + start), INPUT)


@register_jitable(inline="always")
def input_rows(like: Any, a: Any, t: int, j: int, start: int) -> Any:
    """The rows of u, the skip and the mask at step t of sequence j."""
    size, at = a[8], a[9] + a[8] * (t * a[10] + j * a[11] + start)
    u0, u1, u2 = row(like, at, INPUT), row(like, at + size * a[12], INPUT), row(like, at + size * 2 * a[12], INPUT)
    x = row(like, a[13] + size * (t * a[14] + j * a[15] + start), INPUT)
    return u0, u1, u2, x, row(like, a[20] + size * (j * a[21] + start), INPUT)


@functools.cache
def forward(activation: int) -> Callable[[Any], None]:
    """The forward pass, a kernel for each activation, so that its loops have no branch."""

    def kernel(like: Any) -> None:
        one, a = like[0], integers(like)
        numbers = one, like[1], like[2]
        T, B, D, size, v, b, c0, c0_b, pad = a[2], a[3], a[4], a[8], a[16], a[17], a[18], a[19], a[22]
        h, c, keep, c_last = a[23], a[24], a[25], a[26]
        while True:
            tile = next_tile(a)
            if tile >= a[1]:
                break
            side, start, n, _, b_first, b_last = place(a, tile)
            parameters = parameter_rows(like, v, b, D, start, size)
            for i in range(T):
                t = T - 1 - i if side else i
                # Without a gradient, two rows of c alternate.
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
                    step(n, numbers, input_rows(like, a, t, j, start), parameters, cp, cn, hn, activation)
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
def step_back(
    n: int, numbers: Any, inputs: Any, parameters: Any, cp: Any, cn: Any, g: Any, results: Any, activation: int
) -> None:
    """The gradients of one step of a sequence, from the state cp to the state cn, for the gradient g of its output."""
    one, scale, zoneout = numbers
    u0, u1, u2, x, m = inputs
    vf, vr, bf, br = parameters
    gu0, gu1, gu2, gx, lam, svf, svr, sbf, sbr = results
    rest = one - zoneout
    for k in range(n):
        f = sigmoid(u1[k] + vf[k] * cp[k] + bf[k])
        r = sigmoid(u2[k] + vr[k] * cp[k] + br[k])
        carried = scale * x[k]
        y = activate(cn[k], one, activation)
        gated_g = g[k] * m[k] * r
        total = gated_g * slope(cn[k], y, one, activation) + lam[k]
        gated = total * (zoneout + rest * f)
        g1 = total * rest * f * (one - f) * (cp[k] - u0[k])
        g2 = gated_g * (y - carried) * (one - r)
        gu0[k] = total - gated
        gu1[k] = g1
        gu2[k] = g2
        gx[k] = scale * (g[k] - gated_g)
        lam[k] = gated + g1 * vf[k] + g2 * vr[k]
        svf[k] += g1 * cp[k]
        svr[k] += g2 * cp[k]
        sbf[k] += g1
        sbr[k] += g2


@functools.cache
def backward(activation: int) -> Callable[[Any], None]:
    """The backward pass, which computes the gates again from c.

    The gradient of c_t is the sum of the gradients through h_t and c_{t+1}.
    """

    def kernel(like: Any) -> None:
        one, a = like[0], integers(like)
        numbers = one, like[1], like[2]
        T, B, D, size, v, b, c0, c0_b, pad = a[2], a[3], a[4], a[8], a[16], a[17], a[18], a[19], a[22]
        c, gh, gh_t, gh_b, gu, gu_k = a[23], a[24], a[25], a[26], a[27], a[28]
        gskip, gskip_t, gskip_b, gc, sums, matrices = a[29], a[30], a[31], a[32], a[33], a[34]
        while True:
            tile = next_tile(a)
            if tile >= a[1]:
                break
            side, start, n, chunk, b_first, b_last = place(a, tile)
            parameters = parameter_rows(like, v, b, D, start, size)
            at = sums + size * (chunk * 4 * D + start)
            svf, svr = row(like, at, SVF), row(like, at + size * D, SVR)
            sbf, sbr = row(like, at + size * 2 * D, SBF), row(like, at + size * 3 * D, SBR)
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
                    g = row(like, gh + size * (t * gh_t + j * gh_b + start), INPUT)
                    inputs = input_rows(like, a, t, j, start)
                    results = gu0, gu1, gu2, gx, lam, svf, svr, sbf, sbr
                    step_back(n, numbers, inputs, parameters, cp, cn, g, results, activation)

    return kernel


BLOCK = 64  # rows and columns of a tile of `transpose`


def transpose(like: Any) -> None:
    """Transpose a matrix block by block; a block fits the nearest cache, so reads and writes are in memory order."""
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

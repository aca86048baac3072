"""The launch of the SRU recurrence on CPUs: addresses and threads around the kernels of cpu_kernels.py.

Sequences are cut into tiles by the shape alone, columns by the number of threads too. Columns do not meet and sums run
over sequences, so results are bitwise the same for any number of threads.
"""

import contextlib
import ctypes
import functools
import os
import sys
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sru.kernels.cpu_kernels import BLOCK, NUMBERS, backward, compile_kernel, forward, pack, transpose

READS_HALVES = False  # u and x come in float32 or float64
TILE_BATCH = 4  # sequences of a tile
TILE_COLUMNS = 512
PROCESS = os.getpid()  # that imported this
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
# Elements below which handing work to another thread costs more than it saves; bench/NOTES.md has the measurement.
SERIAL_ELEMENTS = 40_000


@functools.cache
def team(process: int) -> Callable | None:
    """GOMP_parallel of the OpenMP library that torch computes with, or None where torch uses another.

    Its threads are the ones that made the matrix product, and still awake: others would have to push them aside. But a
    forked process has none of them, and OpenMP would wait for them for ever.
    """
    if process != PROCESS:
        return None
    try:
        library = ctypes.CDLL(None)
        if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
            return None
        function = library.GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system where a process is no library
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    function.restype = None
    return function


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Threads of our own, made at first use, for where there is no team."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="sru")


if hasattr(os, "register_at_fork"):  # not on Windows
    # A forked child has none of its parent's threads.
    os.register_at_fork(after_in_child=pool.cache_clear)


def launch(kernel: Callable, inputs: "Inputs", zoneout: float, options: list[int], tensors: list[Tensor]) -> None:
    """Run a pass. The options follow the inputs' arguments; the tensors are those whose addresses they hold."""
    arguments = [0, inputs.tiles, *inputs.arguments, *options]
    run_tiles(
        kernel, inputs.dtype, pack(inputs.dtype, inputs.scale, zoneout, arguments), inputs.elements, (inputs, tensors)
    )


def run_tiles(kernel: Callable, dtype: torch.dtype, memory: array, elements: int, tensors: Any) -> None:
    """Run all tiles, shared among as many threads as torch may use where there is enough work.

    memory: the packed arguments; tensors: those whose addresses they hold.
    """
    function, address = compile_kernel(kernel, dtype)
    tiles = memory[NUMBERS + 1]
    start = memory.buffer_info()[0]
    threads = min(tiles, torch.get_num_threads()) if elements >= SERIAL_ELEMENTS else 1
    if threads <= 1:
        function(start)
    elif openmp := team(os.getpid()):
        openmp(address, start, threads, 0)
    else:
        # An interrupt may end this call while another thread still works: that thread keeps what it writes to alive.
        def work(alive: Any = (memory, tensors)) -> None:
            function(start)

        helpers = []
        with contextlib.suppress(RuntimeError):  # no more threads are to be had, as when the interpreter ends
            for _ in range(threads - 1):
                helpers.append(pool().submit(work))
        work()
        for helper in helpers:
            # One that has not begun finds no tile left.
            if not helper.cancel():
                helper.result()


@functools.cache
def madvise() -> Callable | None:
    """Linux's call of that name, or None on another system."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """like.new_empty, in huge pages where it is large: to touch new memory of small ones costs more than the kernel."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= 2 * HUGE_PAGE and (advise := madvise()):
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        # Advice: where it is refused, nothing is lost.
        advise(first, (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    return tensor


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last dimension does not lie together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.lru_cache(maxsize=64)
def constant_row(value: float, size: int, dtype: torch.dtype) -> Tensor:
    """A row of one number, which kernels read and nothing writes."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")


class Inputs:
    """The inputs of both passes as a kernel wants them: rows that lie together, addresses and strides."""

    def __init__(self, u, x, v, b, c0, mask, pad, scale, halves):
        steps, batch, matrices, size = u.shape
        u, v, b, c0 = map(with_rows, (u, v, b, c0))
        self.scale = 1.0 if scale is None else float(scale)
        # A missing mask or skip is one row for all steps and sequences, with strides of 0.
        mask = constant_row(1.0, size, u.dtype) if mask is None else with_rows(mask)
        mask_stride = mask.stride(0) if mask.dim() == 2 else 0
        if matrices == 4:
            skip = u
            skip_place = u.data_ptr() + 3 * u.stride(2) * u.element_size(), *u.stride()[:2]
        elif x is not None:
            skip = with_rows(x)
            skip_place = skip.data_ptr(), *skip.stride()[:2]
        else:
            skip = constant_row(0.0, size, u.dtype)
            skip_place = skip.data_ptr(), 0, 0
        pad = None if pad is None else pad.contiguous()
        tile_batch = max(TILE_BATCH, -(-batch // 64))
        self.chunks = -(-batch // tile_batch)
        # Wide tiles read memory fastest; narrow ones give every thread work.
        columns = TILE_COLUMNS if self.chunks * halves >= 2 * torch.get_num_threads() else TILE_COLUMNS // 4
        self.tiles = self.chunks * halves * -(-(size // halves) // columns)
        self.elements, self.dtype = steps * batch * size, u.dtype
        self.tensors = u, skip, v, b, c0, mask, pad  # the addresses below stay valid with them
        self.arguments = [
            *(steps, batch, size, tile_batch, columns, halves, u.element_size()),
            *(u.data_ptr(), *u.stride()[:3], *skip_place),
            *(v.data_ptr(), b.data_ptr(), c0.data_ptr(), c0.stride(0)),
            *(mask.data_ptr(), mask_stride, 0 if pad is None else pad.data_ptr()),
        ]


def run_forward(u, x, v, b, c0, mask, pad, scale, zoneout, activation, halves, *, keep):
    """h, c and c_last; c has all steps where they are kept, else two rows of scratch."""
    steps, batch, _, size = u.shape
    inputs = Inputs(u, x, v, b, c0, mask, pad, scale, halves)
    h = new_empty(u, steps, batch, size)
    c = new_empty(u, steps if keep else 2, batch, size)
    c_last = u.new_empty(batch, size)
    outputs = [h.data_ptr(), c.data_ptr(), int(keep), c_last.data_ptr()]
    launch(forward(activation), inputs, zoneout, outputs, [h, c, c_last])
    return h, c, c_last


def run_backward(gh, gc_last, u, x, v, b, c0, mask, pad, scale, c, zoneout, activation, halves, *, needs_x):
    """The gradients of u, x (None where it is not needed), v, b and c0."""
    steps, batch, matrices, size = u.shape
    inputs = Inputs(u, x, v, b, c0, mask, pad, scale, halves)
    gh = with_rows(gh)
    gu = new_empty(u, *u.shape)
    if matrices == 4:
        gskip = gu[:, :, 3]
    elif needs_x:
        gskip = new_empty(u, steps, batch, size)
    else:  # the kernel writes it always: all steps write the same rows, which nobody reads
        gskip = u.new_empty(batch, size).expand(steps, batch, size)
    gc = gc_last.clone(memory_format=torch.contiguous_format)
    sums = u.new_empty(inputs.chunks, 4, size)
    outputs = [
        *(c.data_ptr(), gh.data_ptr(), gh.stride(0), gh.stride(1), gu.data_ptr(), gu.stride(2)),
        *(gskip.data_ptr(), gskip.stride(0), gskip.stride(1), gc.data_ptr(), sums.data_ptr(), matrices),
    ]
    launch(backward(activation), inputs, zoneout, outputs, [c, gh, gu, gskip, gc, sums])
    total = sums.sum(0)
    gv, gb = total.view(2, -1)
    return gu, gskip if needs_x else None, gv, gb, gc


def transpose_matrix(matrix: Tensor) -> Tensor:
    """matrix.t().contiguous() of a float32 matrix with rows that lie together, twice as fast as torch makes it."""
    rows, columns = matrix.shape
    result = new_empty(matrix, columns, rows)
    tiles = -(-rows // BLOCK) * -(-columns // BLOCK)
    arguments = [rows, columns, 4, matrix.data_ptr(), matrix.stride(0), result.data_ptr()]
    memory = pack(torch.float32, 1.0, 0.0, [0, tiles, *arguments])
    run_tiles(transpose, torch.float32, memory, matrix.numel(), (matrix, result))
    return result

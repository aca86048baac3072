"""Run the SRU recurrence on CPUs: addresses, tiles and threads for the kernels of cpu_kernels.py.

The shape alone cuts sequences into tiles; the number of threads also affects the columns. Columns are independent and
sums run over sequences, so results are bitwise equal for any number of threads.
"""

import array
import contextlib
import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from numba import types
from torch import Tensor

from sru.kernels.cpu_kernels import BLOCK, NUMBERS, backward, forward, transpose
from sru.kernels.reference import Arguments

READS_HALVES = False  # u and x must be float32 or float64
TILE_BATCH = 4  # sequences of a tile
TILE_COLUMNS = 512
PROCESS = os.getpid()  # the process that imported this file
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
# Below this many elements, a second thread costs more than it saves; bench/NOTES.md has the measurement.
SERIAL_ELEMENTS = 40_000


@functools.cache
def compile_kernel(kernel: Callable[[Any], None], dtype: torch.dtype) -> tuple[Callable[[int], None], int]:
    """The kernel as a C function and its address; compiled at the first call and cached on disk for other processes."""
    signature = types.void(types.CPointer(types.float32 if dtype == torch.float32 else types.float64))
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
    try:
        code = numba.cfunc(signature, cache=True, **options)(kernel)
    except (RuntimeError, OSError):  # numba finds no writable folder for its cache
        code = numba.cfunc(signature, **options)(kernel)
    address: Any = code.address
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    function.code = code  # keeps the machine code alive as long as the function
    return function, address


def pack(dtype: torch.dtype, scale: float, zoneout: float, arguments: list[int]) -> "array.array[int]":
    """The arguments of a kernel in one block of memory, for one run, which uses up the counter of tiles."""
    memory = array.array("q", [0] * NUMBERS + arguments)
    struct.pack_into("3f" if dtype == torch.float32 else "3d", memory, 0, 1.0, scale, zoneout)
    return memory


@functools.cache
def team(process: int) -> Callable[..., None] | None:
    """GOMP_parallel of torch's OpenMP library, or None if torch uses another library.

    Its threads have just computed the matrix product and are still awake; other threads would compete with them. A
    forked process has no such threads, and OpenMP would wait for them forever.
    """
    if process != PROCESS:
        return None
    try:
        library = ctypes.CDLL(None)
        if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
            return None
        function = library.GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system that cannot load a process as a library
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    function.restype = None
    return function


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Our own threads, created at first use, for processes without `team`."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="sru")


if hasattr(os, "register_at_fork"):  # not on Windows
    # A forked child has none of its parent's threads.
    os.register_at_fork(after_in_child=pool.cache_clear)


def run_tiles(
    kernel: Callable[[Any], None], dtype: torch.dtype, memory: "array.array[int]", elements: int, tensors: list[Tensor]
) -> None:
    """Run all tiles, on torch's number of threads if there is enough work.

    memory: the packed arguments; tensors: the ones that the arguments point to, which must stay alive.
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
        # An interrupt may end this call while another thread still works; that thread keeps the memory alive.
        def work(alive: Any = (memory, tensors)) -> None:
            function(start)

        helpers = []
        with contextlib.suppress(RuntimeError):  # no new threads, for example while the interpreter exits
            for _ in range(threads - 1):
                helpers.append(pool().submit(work))
        work()
        for helper in helpers:
            # A helper that has not started would find no tile left.
            if not helper.cancel():
                helper.result()


@functools.cache
def madvise() -> Callable[..., int] | None:
    """The system call on Linux, or None on another system."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """like.new_empty, in huge pages if large: page faults of small pages take longer than the kernel."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= 2 * HUGE_PAGE and (advise := madvise()):
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        # Only advice: a failure has no effect.
        advise(first, (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    return tensor


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.lru_cache(maxsize=64)
def constant_row(value: float, size: int, dtype: torch.dtype) -> Tensor:
    """A read-only row filled with one number."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")


class Inputs:
    """The inputs of both passes in the kernels' form: contiguous rows, addresses and strides."""

    def __init__(self, arguments: Arguments) -> None:
        u, x, v, b, c0, mask, pad, scale, self.zoneout, _, halves = arguments
        steps, batch, matrices, size = u.shape
        u, v, b, c0 = map(with_rows, (u, v, b, c0))
        self.scale = 1.0 if scale is None else float(scale)
        # A missing mask or skip is one row for all steps and sequences, with stride 0.
        mask = constant_row(1.0, size, u.dtype) if mask is None else with_rows(mask)
        mask_stride = mask.stride(0) if mask.dim() == 2 else 0
        if matrices == 4:
            skip = u
            skip_layout = u.data_ptr() + 3 * u.stride(2) * u.element_size(), *u.stride()[:2]
        elif x is not None:
            skip = with_rows(x)
            skip_layout = skip.data_ptr(), *skip.stride()[:2]
        else:
            skip = constant_row(0.0, size, u.dtype)
            skip_layout = skip.data_ptr(), 0, 0
        pad = None if pad is None else pad.contiguous()
        tile_batch = max(TILE_BATCH, -(-batch // 64))
        self.chunks = -(-batch // tile_batch)
        # Wide tiles read memory fastest; narrow tiles give every thread some work.
        columns = TILE_COLUMNS if self.chunks * halves >= 2 * torch.get_num_threads() else TILE_COLUMNS // 4
        self.tiles = self.chunks * halves * -(-(size // halves) // columns)
        self.elements, self.dtype = steps * batch * size, u.dtype
        self.tensors = [a for a in (u, skip, v, b, c0, mask, pad) if a is not None]  # keep the addresses below valid
        self.arguments = [
            *(steps, batch, size, tile_batch, columns, halves, u.element_size()),
            *(u.data_ptr(), *u.stride()[:3], *skip_layout),
            *(v.data_ptr(), b.data_ptr(), c0.data_ptr(), c0.stride(0)),
            *(mask.data_ptr(), mask_stride, 0 if pad is None else pad.data_ptr()),
        ]

    def launch(self, kernel: Callable[[Any], None], arguments: list[int], tensors: list[Tensor]) -> None:
        """Run a pass; its own arguments, which point to the tensors, follow those of the inputs."""
        memory = pack(self.dtype, self.scale, self.zoneout, [0, self.tiles, *self.arguments, *arguments])
        run_tiles(kernel, self.dtype, memory, self.elements, self.tensors + tensors)


def run_forward(arguments: Arguments, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, c and c_last; c has all steps if keep, else two rows of scratch."""
    u, inputs = arguments.u, Inputs(arguments)
    steps, batch, _, size = u.shape
    h = new_empty(u, steps, batch, size)
    c = new_empty(u, steps if keep else 2, batch, size)
    c_last = u.new_empty(batch, size)
    outputs = [h.data_ptr(), c.data_ptr(), int(keep), c_last.data_ptr()]
    inputs.launch(forward(arguments.activation), outputs, [h, c, c_last])
    return h, c, c_last


def run_backward(
    gh: Tensor, gc_last: Tensor, arguments: Arguments, c: Tensor, *, needs_x: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The gradients of u, x (None unless needed), v, b and c0."""
    u, inputs = arguments.u, Inputs(arguments)
    steps, batch, matrices, size = u.shape
    gh = with_rows(gh)
    gu = new_empty(u, *u.shape)
    if matrices == 4:
        gskip = gu[:, :, 3]
    elif needs_x:
        gskip = new_empty(u, steps, batch, size)
    else:  # the kernel always writes it: all steps write the same unused rows
        gskip = u.new_empty(batch, size).expand(steps, batch, size)
    gc = gc_last.clone(memory_format=torch.contiguous_format)
    sums = u.new_empty(inputs.chunks, 4, size)
    outputs = [
        *(c.data_ptr(), gh.data_ptr(), gh.stride(0), gh.stride(1), gu.data_ptr(), gu.stride(2)),
        *(gskip.data_ptr(), gskip.stride(0), gskip.stride(1), gc.data_ptr(), sums.data_ptr(), matrices),
    ]
    inputs.launch(backward(arguments.activation), outputs, [c, gh, gu, gskip, gc, sums])
    total = sums.sum(0)
    gv, gb = total.view(2, -1)
    return gu, gskip if needs_x else None, gv, gb, gc


def transpose_matrix(matrix: Tensor) -> Tensor:
    """matrix.t().contiguous() for a float32 matrix with contiguous rows, twice as fast as torch's."""
    rows, columns = matrix.shape
    result = new_empty(matrix, columns, rows)
    tiles = -(-rows // BLOCK) * -(-columns // BLOCK)
    arguments = [rows, columns, 4, matrix.data_ptr(), matrix.stride(0), result.data_ptr()]
    memory = pack(torch.float32, 1.0, 0.0, [0, tiles, *arguments])
    run_tiles(transpose, torch.float32, memory, matrix.numel(), [matrix, result])
    return result

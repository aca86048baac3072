"""Run the SRU recurrence on CPUs: addresses, tiles and threads for the kernels of cpu_kernels.py.

The shape alone cuts sequences into tiles; the number of threads also affects the columns. Columns are independent and
sums run over sequences, so results are bitwise equal for any number of threads.

The threads are those of torch's OpenMP library: they have just computed the matrix product and are still awake; other
threads would compete with them.
"""

import array
import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba import types
from torch import Tensor

from sru.kernels.cpu_kernels import BLOCK, NUMBERS, backward, forward, transpose
from sru.kernels.reference import PROCESS, Arguments, with_rows

READS_HALVES = False  # u and x must be float32 or float64
TILE_BATCH = 4  # sequences of a tile
TILE_COLUMNS = 512
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
def c_function(name: str, *argument_types: type) -> Callable[..., Any] | None:
    """A C function of a library that this process has loaded; None if there is none, or the system is not Linux."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = argument_types
    return function


@functools.cache
def find_openmp(process: int) -> Callable[..., None] | None:
    """GOMP_parallel of torch's OpenMP library, or None: if torch uses another library, and in a forked process.

    A forked process has no threads, and OpenMP would wait for them forever.
    """
    if process != PROCESS or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    return c_function("GOMP_parallel", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def run_tiles(kernel: Callable[[Any], None], dtype: torch.dtype, memory: "array.array[int]", elements: int) -> None:
    """Run all tiles, given the packed arguments: on torch's number of threads if there is enough work, else on one."""
    function, address = compile_kernel(kernel, dtype)
    tiles, start = memory[NUMBERS + 1], memory.buffer_info()[0]
    threads = min(tiles, torch.get_num_threads()) if elements >= SERIAL_ELEMENTS else 1
    if threads > 1 and (openmp := find_openmp(os.getpid())):
        openmp(address, start, threads, 0)
    else:
        function(start)


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """like.new_empty, in huge pages if large: page faults of small pages take longer than the kernel."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= 2 * HUGE_PAGE and (
        advise := c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    ):
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        # Only advice: a failure has no effect.
        advise(first, (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    return tensor


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

    def launch(self, kernel: Callable[[Any], None], arguments: list[int]) -> None:
        """Run a pass; its own arguments follow those of the inputs."""
        memory = pack(self.dtype, self.scale, self.zoneout, [0, self.tiles, *self.arguments, *arguments])
        run_tiles(kernel, self.dtype, memory, self.elements)


def run_forward(arguments: Arguments, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, c and c_last; c has all steps if keep, else two rows of scratch."""
    u, inputs = arguments.u, Inputs(arguments)
    steps, batch, _, size = u.shape
    h = new_empty(u, steps, batch, size)
    c = new_empty(u, steps if keep else 2, batch, size)
    c_last = u.new_empty(batch, size)
    outputs = [h.data_ptr(), c.data_ptr(), int(keep), c_last.data_ptr()]
    inputs.launch(forward(arguments.activation), outputs)
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
    sums = u.new_zeros(inputs.chunks, 4, size)
    outputs = [
        *(c.data_ptr(), gh.data_ptr(), gh.stride(0), gh.stride(1), gu.data_ptr(), gu.stride(2)),
        *(gskip.data_ptr(), gskip.stride(0), gskip.stride(1), gc.data_ptr(), sums.data_ptr(), matrices),
    ]
    inputs.launch(backward(arguments.activation), outputs)
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
    run_tiles(transpose, torch.float32, memory, matrix.numel())
    return result

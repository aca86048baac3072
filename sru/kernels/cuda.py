"""Run the SRU recurrence on NVIDIA GPUs: CuPy compiles the .cu files for the device, dtypes and options.

Nothing here waits for the device, so launches are asynchronous and a CUDA graph can capture them.
"""

import functools
import importlib.metadata
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sru.kernels.reference import Arguments, with_rows

READS_HALVES = True  # u, x and h may be in half precision
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "Half", torch.bfloat16: "Bfloat"}
# With at most so many columns (of all sequences) and at least so many steps, blocks divide the steps too.
TILED_COLUMNS, TILED_STEPS = 2048, 128
# From this many bytes in one step's candidates, each thread can process several neighbouring columns.
WIDE_BYTES = 2**18
# Threads that must fit the registers of a multiprocessor, for each value of LOOK, to keep enough reads in flight.
RESIDENT_THREADS = 256, 512, 256
# struct Arguments in recurrence.cu: addresses, sizes, strides, and a number of the wide dtype.
STRUCTS = {torch.float32: struct.Struct("38qf0q"), torch.float64: struct.Struct("38qd")}


class Cut(NamedTuple):
    """How the work is divided; recurrence.cu explains the macros of the same names."""

    look: int
    lanes: int
    steps: int
    stages: int
    threads: int
    columns: int


class Stream(NamedTuple):
    """The attribute of a stream that CuPy reads. Its own class may return another thread's or a destroyed stream."""

    ptr: int


def cut(steps: int, columns: int, lanes: int, sizes: list[int], backward: bool) -> Cut:
    """How to divide the work on this many steps and columns (of all sequences).

    A thread may read up to `lanes` neighbouring columns at once; `sizes` are the bytes of one element in each array.
    """
    if columns <= TILED_COLUMNS and steps >= TILED_STEPS:
        return Cut(look=2, lanes=1, steps=4, stages=1, threads=256, columns=8)
    widest = min(4, 16 // sizes[0])
    if columns * sizes[0] >= WIDE_BYTES and lanes >= widest:
        return Cut(look=0, lanes=widest, steps=2 if backward else 4, stages=1, threads=128, columns=128)
    if lanes * min(sizes) >= 4:  # an asynchronous copy needs at least four aligned bytes
        return Cut(look=1, lanes=1, steps=4 if backward else 8, stages=4, threads=32, columns=32)
    return Cut(look=0, lanes=1, steps=4 if backward else 8, stages=1, threads=128, columns=128)


def neighbours(columns: int, arrays: list[Tensor]) -> int:
    """How many columns a thread may read at once: a power of two that fits the alignment of all rows."""
    if any(a.stride(-1) != 1 for a in arrays):
        return 1
    rows = [a.element_size() * n for a in arrays for n in a.stride()[:-1]]
    alignment = math.gcd(16, *rows, *(a.data_ptr() for a in arrays))  # of every row, in bytes
    return min(math.gcd(columns, 4), max(1, alignment // max(a.element_size() for a in arrays)))


def why_not(device: int) -> str:
    """Why kernels cannot run on a device, by compiling and loading one; empty if they can."""
    return probe(device)


# torch.compile treats the result as a constant. torch.compiler.assume_constant_result does the same but imports slowly.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def probe(device: int) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    wheel = f"cupy-cuda{torch.version.cuda.split('.')[0]}x"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error}); type: pip install {wheel}"
    except Exception as error:  # its import creates its cache folder
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"CuPy cannot be imported ({found}); type: export CUPY_CACHE_DIR=FOLDER, with a writable folder"
    try:
        with torch.cuda.device(device):
            cupy.cuda.runtime.setDevice(device)
            # A kernel that training uses: some need instructions that an older GPU lacks.
            kinds = torch.float32, torch.float32, torch.float32
            compile_variant(
                plan(torch.Size((8, 1, 3, 32)), 1, 1, kinds, True, False, True, False, 0, False)[0]
            ).compile()
    except Exception as error:  # CuPy passes on any exception of its libraries
        installed = sorted(set(importlib.metadata.packages_distributions().get("cupy", [])))
        advice = f"pip uninstall {' '.join(installed)}, pip install {wheel}"
        if installed in ([], [wheel]):
            advice = f'pip install "{wheel}[ctk]" in case the compiler is missing, or nvidia-smi to check the driver'
        return f"CuPy {cupy.__version__} fails ({type(error).__name__}: {' '.join(str(error).split())}); type: {advice}"
    return ""


class Variant(NamedTuple):
    """The compile-time options of a kernel; recurrence.cu explains the macros of the same names."""

    backward: bool
    u_type: torch.dtype
    x_type: torch.dtype
    wide: torch.dtype
    cut: Cut
    skip: bool
    pad: bool
    keep: bool
    zoneout: bool
    activation: int

    def source(self) -> str:
        """The source in one piece, because CuPy's cache does not notice changes in included files."""
        names = "recurrence.cu", "tiles.cu" if self.cut.look == 2 else "columns.cu"
        return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)

    def macros(self) -> list[str]:
        """The options for the compiler."""
        # A float64 takes two registers.
        blocks = max(1, RESIDENT_THREADS[self.cut.look] // (self.cut.threads * self.wide.itemsize // 4))
        named = self._asdict() | self.cut._asdict() | {"blocks": blocks}
        del named["cut"]
        return [f"-D{name.upper()}={TYPES.get(value) or int(value)}" for name, value in named.items()]


@functools.cache
def compile_variant(variant: Variant) -> Any:
    """A kernel, which CuPy compiles at its first call on a device and caches on disk for other processes."""
    import cupy

    name = "backward" if variant.backward else "forward"
    return cupy.RawKernel(variant.source(), name, options=("-std=c++17", *variant.macros()))


def launch(variant: Variant, blocks: int, shared: int, arguments: bytes, device: torch.device) -> None:
    """Launch a kernel on torch's current stream of a device."""
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(variant, blocks, shared, arguments, device)
    from cupy.cuda import runtime

    if runtime.getDevice() != device.index:  # in a thread that is new to CuPy, such as autograd's
        runtime.setDevice(device.index)
    by_value = np.frombuffer(arguments, dtype=f"V{len(arguments)}")
    stream = Stream(torch._C._cuda_getCurrentRawStream(device.index))
    compile_variant(variant)((blocks,), (variant.cut.threads,), (by_value,), shared_mem=shared, stream=stream)


@functools.lru_cache(4096)
def plan(
    shape: torch.Size,
    halves: int,
    lanes: int,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    skip: bool,
    pad: bool,
    keep: bool,
    zoneout: bool,
    activation: int,
    backward: bool,
) -> tuple[Variant, int, int]:
    """The variant for u of this shape, its number of blocks, and the bytes of shared memory for each block."""
    steps, batch, _, size = shape
    u_size, x_size, wide = (dtype.itemsize for dtype in types)
    work = cut(steps, batch * size, lanes, [u_size, x_size] if skip else [u_size], backward)
    shared = 0
    if work.look == 1:
        slots = [u_size] * (3 + backward) + [x_size] * skip + [wide] * backward
        shared = (sum(max(4, n) for n in slots) + 8 * pad) * work.steps * work.stages * work.threads
    elif work.look == 2:
        shared = (3 * work.threads // work.columns * work.steps + 1) * work.columns * wide
    blocks = -(-batch * size // (work.lanes * work.columns))
    return Variant(backward, *types, work, skip, pad, keep, zoneout, activation), blocks, shared


def run(backward: bool, arguments: Arguments, outputs: list[Any], keep: bool = False) -> None:
    """Run a kernel; the outputs, h to sums, in the order of recurrence.cu, None if absent."""
    inputs, (zoneout, activation, halves) = prepare(arguments), arguments[8:]
    u, skip, _, _, c0, mask, pad, _ = inputs
    *_, gh, gc_last, gu, gx, _, _ = outputs
    steps, batch, _, size = u.shape
    read_together = [u] if skip is None else [u, skip]
    lanes = neighbours(size // halves, [*read_together, gh, c0] if backward else read_together)
    types = u.dtype, u.dtype if skip is None else skip.dtype, c0.dtype
    flags = skip is not None, pad is not None, keep, zoneout > 0
    variant, blocks, shared = plan(u.shape, halves, lanes, types, *flags, activation, backward)
    packed = STRUCTS[c0.dtype].pack(
        *(0 if a is None else a.data_ptr() for a in (*inputs, *outputs)),
        *(steps, batch, size, halves, *u.stride()),
        *((0, 0, 0) if skip is None else skip.stride()),
        *(c0.stride(0), 0 if mask is None else mask.stride(0)),
        *((0, 0) if gh is None else gh.stride()[:2]),
        0 if gc_last is None else gc_last.stride(0),
        *((0, 0, 0) if gu is None else gu.stride()[:3]),
        *((0, 0) if gx is None else gx.stride()[:2]),
        zoneout,
    )
    launch(variant, blocks, shared, packed, u.device)


def prepare(arguments: Arguments) -> list[Any]:
    """The inputs, u to scale, in the kernels' form: the skip as one tensor, and contiguous rows."""
    u, x, v, b, c0, mask, pad, scale, *_ = arguments
    skip = u[:, :, 3] if u.shape[2] == 4 else x
    mask, pad = None if mask is None else with_rows(mask), None if pad is None else pad.contiguous()
    return [u, skip, with_rows(v), with_rows(b), with_rows(c0), mask, pad, None if skip is None else scale]


def run_forward(arguments: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """h, c (None unless keep) and c_last. u, x and h may be in half precision; all else is wide."""
    u, c0 = arguments.u, arguments.c0
    steps, batch, _, size = u.shape
    h, c_last = u.new_empty(steps, batch, size), c0.new_empty(batch, size)
    c = c0.new_empty(steps, batch, size) if keep else None
    if h.numel() == 0:
        return h, c, c_last.copy_(c0)
    run(False, arguments, [h, c, c_last, None, None, None, None, None, None], keep)
    return h, c, c_last


def run_backward(
    gh: Tensor, gc_last: Tensor, arguments: Arguments, c: Tensor, *, needs_x: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The gradients of u, x (None unless needed), v, b and c0."""
    u, x, _, _, c0, *_ = arguments
    _, batch, matrices, size = u.shape
    gu, gc0 = u.new_empty(u.shape), c0.new_empty(batch, size)
    gx = gu[:, :, 3] if matrices == 4 else x.new_empty(x.shape) if needs_x and x is not None else None
    sums = c0.new_empty(batch, 4, size)
    if gu.numel() == 0:
        gc0.copy_(gc_last)
        sums.zero_()
    else:
        outputs = [None, c.contiguous(), None, with_rows(gh), with_rows(gc_last), gu, gx, gc0, sums]
        run(True, arguments, outputs)
    total = sums[0] if batch == 1 else sums.sum(0)
    gv, gb = total.view(2, -1)
    return gu, gx if needs_x else None, gv, gb, gc0

"""The launch of the SRU recurrence on NVIDIA GPUs: the .cu files, compiled by CuPy for the device, dtypes and options.

Nothing here asks the device for an answer, so that launches run ahead of it and can be captured in a CUDA graph.
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

READS_HALVES = True  # u, x and h of half precision
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "Half", torch.bfloat16: "Bfloat"}
# Columns of all sequences up to which blocks share out the steps as well, and the steps that make it worth it.
TILED_COLUMNS, TILED_STEPS = 2048, 128
# Bytes of one step's candidates from which there are threads enough for several neighbouring columns each.
WIDE_BYTES = 2**18
# Threads that a multiprocessor must have registers for, of each way to look ahead: enough reads are under way then.
RESIDENT_THREADS = 256, 512, 256
# The struct of that name in recurrence.cu: addresses, sizes, strides, and a number of the wide dtype.
ARGUMENTS = {torch.float32: struct.Struct("38qf0q"), torch.float64: struct.Struct("38qd")}


class Cut(NamedTuple):
    """How the work is cut; recurrence.cu says what the macros of these names mean."""

    look: int
    lanes: int
    steps: int
    stages: int
    threads: int
    columns: int


class Stream(NamedTuple):
    """What CuPy wants to know of a stream. Its own streams would be another thread's, or hold on to a dead one."""

    ptr: int


def cut(steps: int, columns: int, lanes: int, sizes: list[int], backward: bool) -> Cut:
    """The cut of the work on so many steps and columns of all sequences.

    A thread may read up to `lanes` neighbouring columns at once, of arrays with elements of these sizes in bytes.
    """
    if columns <= TILED_COLUMNS and steps >= TILED_STEPS:
        return Cut(look=2, lanes=1, steps=4, stages=1, threads=256, columns=8)
    widest = min(4, 16 // sizes[0])
    if columns * sizes[0] >= WIDE_BYTES and lanes >= widest:
        return Cut(look=0, lanes=widest, steps=2 if backward else 4, stages=1, threads=128, columns=128)
    if lanes * min(sizes) >= 4:  # an asynchronous copy takes an aligned pair of two-byte numbers
        return Cut(look=1, lanes=1, steps=4 if backward else 8, stages=4, threads=32, columns=32)
    return Cut(look=0, lanes=1, steps=4 if backward else 8, stages=1, threads=128, columns=128)


def neighbours(columns: int, arrays: list[Tensor]) -> int:
    """How many of so many columns a thread may read at once: a power of two, which all rows' addresses allow."""
    if any(a.stride(-1) != 1 for a in arrays):
        return 1
    rows = [a.element_size() * n for a in arrays for n in a.stride()[:-1]]
    reach = math.gcd(16, *rows, *(a.data_ptr() for a in arrays))  # bytes that every row's address is a multiple of
    return min(math.gcd(columns, 4), max(1, reach // max(a.element_size() for a in arrays)))


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last dimension does not lie together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def why_not(device: int) -> str:
    """Why no kernel can run on a device, found by compiling and loading one; empty if they run."""
    return probe(device)


# torch.compile calls it and keeps what it says. As torch.compiler.assume_constant_result, which imports for seconds.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def probe(device: int) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA, whose kernels these are"
    wheel = f"cupy-cuda{torch.version.cuda.split('.')[0]}x"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error}); type: pip install {wheel}"
    except Exception as error:  # it makes its cache folder as it is imported
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"CuPy cannot be imported ({found}); type: export CUPY_CACHE_DIR=FOLDER, with one that can be written"
    try:
        with torch.cuda.device(device):
            cupy.cuda.runtime.setDevice(device)
            # A kernel that will be used: some need instructions that an older GPU has not.
            kinds = torch.float32, torch.float32, torch.float32
            compile_variant(
                plan(torch.Size((8, 1, 3, 32)), 1, 1, kinds, True, False, True, False, 0, False)[0]
            ).compile()
    except Exception as error:  # CuPy raises what its libraries do
        installed = sorted(set(importlib.metadata.packages_distributions().get("cupy", [])))
        advice = f"pip uninstall {' '.join(installed)}, pip install {wheel}"
        if installed in ([], [wheel]):
            advice = f'pip install "{wheel}[ctk]", for a compiler that may be missing, or nvidia-smi, for an old driver'
        return f"CuPy {cupy.__version__} fails ({type(error).__name__}: {' '.join(str(error).split())}); type: {advice}"
    return ""


class Variant(NamedTuple):
    """What a kernel is compiled for; recurrence.cu says what the macros of these names mean."""

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
        """What to compile: in one piece, since CuPy's cache knows nothing of the files that a piece includes."""
        names = "recurrence.cu", "tiles.cu" if self.cut.look == 2 else "columns.cu"
        return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)

    def macros(self) -> list[str]:
        """As options of a compiler."""
        # Registers of float64 come in pairs.
        blocks = max(1, RESIDENT_THREADS[self.cut.look] // (self.cut.threads * self.wide.itemsize // 4))
        named = self._asdict() | self.cut._asdict() | {"blocks": blocks}
        del named["cut"]
        return [f"-D{name.upper()}={TYPES.get(value) or int(value)}" for name, value in named.items()]


@functools.cache
def compile_variant(variant: Variant):
    """A kernel, which CuPy compiles at its first call on a device, and keeps on disk for the next process."""
    import cupy

    name = "backward" if variant.backward else "forward"
    return cupy.RawKernel(variant.source(), name, options=("-std=c++17", *variant.macros()))


def launch(variant: Variant, blocks: int, shared: int, arguments: bytes, device: torch.device) -> None:
    """Put a kernel on torch's current stream of a device."""
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(variant, blocks, shared, arguments, device)
    from cupy.cuda import runtime

    if runtime.getDevice() != device.index:  # in a thread that CuPy has not seen yet, as autograd's
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
    """The variant for u of this shape, how many blocks it takes, and the bytes of shared memory of each."""
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


def run(backward: bool, inputs: list[Any], options: tuple, outputs: list[Any], keep: bool = False) -> None:
    """Run a kernel: `inputs` are u to scale, `outputs` h to sums, in the order of recurrence.cu; None is left out."""
    u, skip, _, _, c0, mask, pad, _ = inputs
    *_, gh, gc_last, gu, gx, _, _ = outputs
    zoneout, activation, halves = options
    steps, batch, _, size = u.shape
    read_together = [u] if skip is None else [u, skip]
    lanes = neighbours(size // halves, [*read_together, gh, c0] if backward else read_together)
    types = u.dtype, u.dtype if skip is None else skip.dtype, c0.dtype
    flags = skip is not None, pad is not None, keep, zoneout > 0
    variant, blocks, shared = plan(u.shape, halves, lanes, types, *flags, activation, backward)
    arguments = ARGUMENTS[c0.dtype].pack(
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
    launch(variant, blocks, shared, arguments, u.device)


def prepare(u, x, v, b, c0, mask, pad, scale) -> list[Any]:
    """The inputs as the kernels take them: the skip, wherever it comes from, and rows that lie together."""
    skip = u[:, :, 3] if u.shape[2] == 4 else x
    mask, pad = None if mask is None else with_rows(mask), None if pad is None else pad.contiguous()
    return [u, skip, with_rows(v), with_rows(b), with_rows(c0), mask, pad, None if skip is None else scale]


def run_forward(u, x, v, b, c0, mask, pad, scale, zoneout, activation, halves, *, keep):
    """h, c (None where it is not kept) and c_last. u, h may be of half precision, and x; all else is wide."""
    steps, batch, _, size = u.shape
    h, c_last = u.new_empty(steps, batch, size), c0.new_empty(batch, size)
    c = c0.new_empty(steps, batch, size) if keep else None
    if h.numel() == 0:
        return h, c, c_last.copy_(c0)
    outputs = [h, c, c_last, *[None] * 6]
    run(False, prepare(u, x, v, b, c0, mask, pad, scale), (zoneout, activation, halves), outputs, keep)
    return h, c, c_last


def run_backward(gh, gc_last, u, x, v, b, c0, mask, pad, scale, c, zoneout, activation, halves, *, needs_x):
    """The gradients of u, x (None where it is not needed), v, b and c0."""
    _, batch, matrices, size = u.shape
    gu, gc0 = u.new_empty(u.shape), c0.new_empty(batch, size)
    gx = gu[:, :, 3] if matrices == 4 else x.new_empty(x.shape) if needs_x else None
    sums = c0.new_empty(batch, 4, size)
    if gu.numel() == 0:
        gc0.copy_(gc_last)
        sums.zero_()
    else:
        inputs = prepare(u, x, v, b, c0, mask, pad, scale)
        outputs = [None, c.contiguous(), None, with_rows(gh), with_rows(gc_last), gu, gx, gc0, sums]
        run(True, inputs, (zoneout, activation, halves), outputs)
    total = sums[0] if batch == 1 else sums.sum(0)
    gv, gb = total.view(2, -1)
    return gu, gx if needs_x else None, gv, gb, gc0

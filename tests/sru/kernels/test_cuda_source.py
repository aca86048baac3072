"""The CUDA kernels where there is no GPU: compiled for several, and run on the CPU against the equations in float64."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import inspect
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_kernels
import torch
from test_kernels import NAMES, PADS, assert_as_exact_as_float32_allows, inputs, left

from sru.kernels import cuda, dispatch, recurrence

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# (T, B, D) of each cut: registers with wide reads, a ring, tiles, and registers one column at a time.
SHAPES = {"wide": (9, 128, 1024), "ring": (9, 3, 40), "tiles": (130, 2, 20), "narrow": (9, 3, 41)}


@pytest.fixture(autouse=True)
def _plan_anew():
    """Where a test changes the limits between the cuts."""
    cuda.plan.cache_clear()
    yield
    cuda.plan.cache_clear()


@pytest.fixture
def record(monkeypatch):
    """The launches that calls would make: (variant, bytes of shared memory)."""
    launches = []
    monkeypatch.setattr(dispatch, "kernels", lambda device: cuda)
    monkeypatch.setattr(cuda, "launch", lambda variant, blocks, shared, *_: launches.append((variant, shared)))
    return launches


def nvrtc():
    """The compiler's library from its wheel, or None."""
    found = importlib.util.find_spec("nvidia")
    places = list(found.submodule_search_locations or []) if found else []
    names = [name for place in places for name in sorted(Path(place).glob("*/lib/libnvrtc.so.*"))]
    return ctypes.CDLL(str(names[0])) if names else None


@functools.cache
def registers(variant, architecture):
    """Registers a thread, and bytes spilled, of a kernel compiled for an architecture."""
    library = nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), variant.source().encode(), b"recurrence.cu", 0, None, None)
    # As CuPy calls it.
    options = ["-std=c++17", "-ftz=true", f"-arch={architecture}", "--ptxas-options=-v", *variant.macros()]
    array = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    failed = library.nvrtcCompileProgram(program, len(options), array)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    assert not failed, text
    return int(re.search(r"Used (\d+) registers", text)[1]), int(re.search(r"(\d+) bytes spill stores", text)[1])


def call(shape, dtype, x_dtype, *, skip="x", pad=False, activation="identity", **options):
    """A training step of the shape."""
    u, x, v, b, c0 = inputs(*shape, skip)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = [u.to(dtype), None if x is None else x.to(x_dtype), v.to(wide), b.to(wide), c0.to(wide)]
    arguments = [None if a is None else a.requires_grad_() for a in arguments]
    h, c = recurrence(*arguments, pad=left(*shape[:2]) if pad else None, activation=activation, **options)
    (h.sum() + c.sum()).backward()


@pytest.mark.skipif(nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
@pytest.mark.parametrize("cut", SHAPES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_dtype_compiles_and_spills_no_register(cut, architecture, record):
    pairs = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[2:]]
    for dtype, x_dtype in pairs:
        call(SHAPES[cut], dtype, x_dtype, pad=True)
    looks = {"wide": {0}, "ring": {1}, "tiles": {2}, "narrow": {0, 1}}[cut]
    assert {variant.cut.look for variant, _ in record} == looks
    for variant, shared in record:
        used, spilled = registers(variant, architecture)
        assert not spilled, variant
        # The threads that a multiprocessor must hold to keep its memory busy share its 65,536 registers.
        threads = {0: 256, 1: 512, 2: 256}[variant.cut.look] // (2 if variant.wide == torch.float64 else 1)
        assert used * threads <= 65536, (used, variant)
        assert shared <= 48 * 1024, variant


@pytest.mark.slow
@pytest.mark.skipif(nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
def test_every_option_compiles_and_spills_no_register(record):
    for cut, skip, pad, activation, zoneout in itertools.product(
        SHAPES, ("x", "u", "none"), (False, True), ("identity", "tanh", "relu"), (0.0, 0.1)
    ):
        scale = 0.0 if skip == "none" else 1.0
        call(
            SHAPES[cut],
            torch.float32,
            torch.float32,
            skip=skip,
            pad=pad,
            activation=activation,
            zoneout=zoneout,
            scale=scale,
        )
    assert not any(registers(variant, "sm_90")[1] for variant, _ in record)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """programs(variant): the kernel, built for the CPU."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: g++ or clang++")
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def build(variant):
        name = hashlib.sha256(repr(variant).encode()).hexdigest()
        source, library = folder / f"{name}.cu", folder / f"{name}.so"
        source.write_text(variant.source(), encoding="utf-8")
        options = [
            "-std=c++17",
            "-O1",
            "-w",
            "-fno-strict-aliasing",
            "-shared",
            "-fPIC",
            f'-DRECURRENCE="{source}"',
        ]
        subprocess.run([compiler, *options, *variant.macros(), "-o", library, HERE / "on_cpu.cpp"], check=True)
        return ctypes.CDLL(str(library))

    return build


@pytest.fixture
def on_cpu(programs, monkeypatch, request):
    """CUDA kernels run on the CPU, a block's threads in reverse where the test says so; the cuts that were used."""
    cuts = []

    def launch(variant, blocks, shared, arguments, device):
        cuts.append(variant.cut)
        reverse = int(getattr(request, "param", False))
        assert programs(variant).run(arguments, ctypes.c_longlong(blocks), shared, reverse) == 0

    monkeypatch.setattr(dispatch, "kernels", lambda device: cuda)
    monkeypatch.setattr(cuda, "launch", launch)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    yield cuts
    torch.use_deterministic_algorithms(False)


CASES = {
    "nothing": {},
    "all": {"pad": "scattered", "activation": "tanh", "bidirectional": True, "zoneout": 0.2, "mask": True},
}
LOOKS = {
    0: [(1, 2, 32), (17, 3, 48), (42, 5, 32)],
    1: [(1, 2, 32), (17, 3, 48), (42, 5, 32)],
    2: [(130, 3, 22), (200, 1, 16)],
}


@pytest.mark.parametrize("on_cpu", [False, True], ids=["in order", "in reverse"], indirect=True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("skip", ["x", "u", "none"])
@pytest.mark.parametrize("look", LOOKS)
def test_kernels_agree_with_the_equations(look, skip, case, on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "WIDE_BYTES", 128 if look == 0 else 10**9)
    options = {"scale": 0.0 if skip == "none" else 1.3} | CASES[case]
    for steps, batch, size in LOOKS[look]:
        given = options | {"pad": PADS[options["pad"]](steps, batch)} if "pad" in options else dict(options)
        given["mask"] = torch.bernoulli(torch.full((batch, size), 0.5)) * 2 if "mask" in options else None
        assert_as_exact_as_float32_allows("cpu", inputs(steps, batch, size, skip), **given)
    assert {work.look for work in on_cpu} == {look}


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("look", LOOKS)
def test_every_activation_and_v_of_0_agree_with_the_equations(look, activation, on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "WIDE_BYTES", 128 if look == 0 else 10**9)
    shape = LOOKS[look][-1]
    u, x, v, b, c0 = inputs(*shape)
    assert_as_exact_as_float32_allows("cpu", (u, x, v * 0, b, c0), pad=left(*shape[:2]), activation=activation)


@pytest.mark.parametrize(
    ("dtype", "x_dtype"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("look", LOOKS)
def test_half_precision_is_rounded_at_the_end_only(look, dtype, x_dtype, on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "WIDE_BYTES", 64 if look == 0 else 10**9)
    shape = LOOKS[look][-1]
    u, x, *others = inputs(*shape)
    arguments = [u.to(dtype), x.to(x_dtype), *others]
    grads = torch.randn(shape).to(dtype), torch.randn(shape[1:])
    results = []
    for wide in (False, True):
        given = [(a.double() if wide else a).detach().requires_grad_() for a in arguments]
        h, c = recurrence(*given, pad=left(*shape[:2]), backend="reference" if wide else "cpu")
        given_grads = grads[0].to(h.dtype), grads[1].to(c.dtype)
        results.append([h, c, *torch.autograd.grad([h, c], given, given_grads)])
    assert [a.dtype for a in results[0]] == [dtype, torch.float32, dtype, x_dtype, *[torch.float32] * 3]
    for name, found, truth in zip(NAMES, *results, strict=True):
        allowed = torch.finfo(found.dtype).eps * truth.abs() + 1e-5 * truth.abs().max()
        assert ((found.double() - truth).abs() <= allowed).all(), name
    assert {work.look for work in on_cpu} == {look}


def test_a_half_column_count_that_no_copy_fits_is_read_number_by_number(on_cpu):
    u, x, *others = inputs(9, 3, 7)
    h, c = recurrence(u.half(), x.half(), *others, backend="cpu")
    expected = recurrence(u.half(), x.half(), *others, backend="reference")
    torch.testing.assert_close((h, c), expected)
    assert [(work.look, work.lanes) for work in on_cpu] == [(0, 1)]


# What must hold of every kernel, in the words of tests/sru/kernels/test_kernels.py.
ALSO = {
    "no steps": [test_kernels.test_no_steps_return_the_initial_state_and_no_sequences_return_nothing, (0, 3, 4)],
    "no sequences": [test_kernels.test_no_steps_return_the_initial_state_and_no_sequences_return_nothing, (3, 0, 4)],
    "layouts": [test_kernels.test_memory_layout_changes_nothing, True],
    "expanded": [test_kernels.test_expanded_gradients_are_accepted],
    "left out": [test_kernels.test_gradients_that_are_not_needed_are_not_computed],
    "inference": [test_kernels.test_inference_equals_training, True],
    "padding": [test_kernels.test_padding_stops_every_gradient],
    "alone": [test_kernels.test_a_padded_batch_equals_each_sequence_alone, "right", True],
    "saturation": [test_kernels.test_gates_saturate_cleanly, torch.float32],
    "sigmoid": [test_kernels.test_the_sigmoid_is_exact_to_a_few_units_in_the_last_place, torch.float64],
    "nan": [test_kernels.test_a_nan_stays_in_its_column, 1, "relu", torch.float32],
    "mixed": [test_kernels.test_mixed_dtypes_compute_in_the_dtype_of_u],
    "second": [test_kernels.test_the_second_derivative_is_the_references],
    "gradcheck": [test_kernels.test_gradients_agree_with_finite_differences, "x"],
}


@pytest.mark.parametrize("name", ALSO)
def test_the_general_properties_of_kernels_hold(name, on_cpu):
    check, *arguments = ALSO[name]
    named = dict(zip([n for n in inspect.signature(check).parameters if n != "backend"], arguments, strict=True))
    check(backend="cpu", **named)


@pytest.fixture
def with_cupy(tmp_path, monkeypatch):
    """with_cupy(code): why the kernels cannot run where this is the module that is imported as CuPy."""

    def reason(code):
        (tmp_path / "cupy.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        cuda.probe.cache_clear()
        cuda.compile_variant.cache_clear()
        return cuda.why_not(0)

    yield reason
    sys.modules.pop("cupy", None)
    cuda.probe.cache_clear()
    cuda.compile_variant.cache_clear()


def test_a_cache_that_cupy_cannot_make_is_named(with_cupy):
    reason = with_cupy("raise PermissionError(13, 'Permission denied', '/nowhere/.cupy')")
    assert "PermissionError" in reason
    assert "/nowhere/.cupy" in reason
    assert "type: export CUPY_CACHE_DIR=" in reason


def test_the_probe_compiles_a_kernel_that_runs_later(with_cupy):
    """An empty kernel compiles for GPUs that lack the instructions of the real ones."""
    reason = with_cupy(
        """
__version__ = "14.2"
class cuda:
    class runtime:
        setDevice = staticmethod(lambda device: None)
class RawKernel:
    def __init__(self, source, name, options=()):
        self.source, self.options = source, options
    def compile(self):
        if "cp.async" in self.source and "-DLOOK=1" in self.options:
            raise RuntimeError("ptxas: cp.async needs sm_80")
"""
    )
    assert "ptxas: cp.async needs sm_80" in reason


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("version", ["12.8", "13.0"])
def test_without_cupy_the_message_names_the_wheel_for_torch(version, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    cuda.probe.cache_clear()
    reason = cuda.why_not(0)
    cuda.probe.cache_clear()
    assert reason.endswith(f"type: pip install cupy-cuda{version[:2]}x")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_says_so():
    assert "is not built for CUDA" in cuda.why_not(0)


def test_the_question_whether_a_gpu_can_run_breaks_no_graph():
    def double(x):
        return x if cuda.why_not(0) is None else x * 2

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_the_operators_keep_torchs_rules_in_half_precision(on_cpu):
    u, x, v, b, c0 = inputs(5, 3, 8)
    given = [a.requires_grad_() for a in (u.bfloat16(), x, v.flatten(), b.flatten(), c0)]
    options = None, None, torch.ones(1), 0.0, 0, 1
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sru.recurrence.default, (*given, *options, True), test_utils=checks)

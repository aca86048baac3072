"""The CUDA kernels on a GPU: streams, graphs, threads, devices, compiled code. test_kernels.py has their numbers."""

import copy
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from test_cuda_source import DTYPES, SHAPES
from test_kernels import NAMES, inputs, left

from sru import SRU
from sru.kernels import recurrence

pytestmark = pytest.mark.gpu
PAIRS = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[2:]]


def example(shape, dtype=torch.float32, x_dtype=None):
    """The five inputs on the GPU, which want gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = (dtype, x_dtype or dtype, wide, wide, wide)
    return [a.to("cuda", d).requires_grad_() for a, d in zip(inputs(*shape), dtypes, strict=True)]


def step(arguments, **options):
    """h, c_last and the gradients of all inputs."""
    h, c = recurrence(*arguments, backend="cuda", **options)
    return [h, c, *torch.autograd.grad(h.float().square().sum() + c.square().sum(), arguments)]


@pytest.mark.parametrize("shape", [*SHAPES.values(), (300, 1, 2048), (128, 32, 512), (1024, 4, 3072)], ids=str)
@pytest.mark.parametrize(("dtype", "x_dtype"), PAIRS, ids=str)
def test_every_cut_and_dtype_agrees_with_the_equations(shape, dtype, x_dtype):
    arguments = example(shape, dtype, x_dtype)
    pad = left(*shape[:2]).cuda()
    grads = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape[1:], device="cuda").to(arguments[4].dtype)
    results = []
    for wide in (False, True):
        given = [(a.double() if wide else a).detach().requires_grad_() for a in arguments]
        h, c = recurrence(*given, pad=pad, activation="tanh", backend="reference" if wide else "cuda")
        results.append([h, c, *torch.autograd.grad([h, c], given, [grads[0].to(h.dtype), grads[1].to(c.dtype)])])
    for name, found, truth in zip(NAMES, *results, strict=True):
        eps = torch.finfo(found.dtype).eps
        # Errors of a state are carried on; sums over steps and sequences add them up.
        allowed = eps * truth.abs() + 16 * torch.finfo(c.dtype if dtype == torch.float64 else torch.float32).eps * (
            math.sqrt(shape[0] * shape[1]) * truth.abs().max()
        )
        assert ((found.double() - truth).abs() <= allowed).all(), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_a_run_repeats_to_the_bit(shape):
    arguments = example(shape)
    first = step(arguments)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(step(arguments), first, strict=True))


def test_work_goes_to_the_current_stream():
    arguments = example((64, 8, 128))
    expected = step(arguments)
    late = [torch.zeros_like(a).requires_grad_() for a in arguments]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read zeros
        for to, value in zip(late, arguments, strict=True):
            to.copy_(value)
    with torch.cuda.stream(stream):
        found = step(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_graph_captures_inference():
    stack = SRU(64, 64, 3).cuda().eval()
    x, fresh = torch.randn(20, 8, 64, device="cuda"), torch.randn(20, 8, 64, device="cuda")
    with torch.no_grad():
        expected = stack(fresh)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            stack(x)  # compiles before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = stack(x)
    x.copy_(fresh)
    graph.replay()
    torch.testing.assert_close(found, expected)


def test_a_graph_captures_training():
    stack = SRU(64, 64, 2).cuda()
    twin, x = copy.deepcopy(stack), torch.randn(20, 8, 64, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(twin, (x,))
    for network in (stack, graphed):
        network(x)[0].square().sum().backward()
    for p, q in zip(stack.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_threads_with_streams_of_their_own_get_the_same_bits():
    stack, x = SRU(64, 64, 2).cuda(), torch.randn(50, 8, 64, device="cuda")
    parameters = list(stack.parameters())

    def run(_=None):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            h, c = stack(x)
            results = [h, c, *torch.autograd.grad(h.sum() + c.sum(), parameters)]
        stream.synchronize()
        return results

    expected = run()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(run, range(32)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_the_one_that_computes():
    stack, x = SRU(16, 16, 2), torch.randn(9, 3, 16)
    found = [gradients_on(stack, x, f"cuda:{i}") for i in (0, 1)]
    assert torch.cuda.current_device() == 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def gradients_on(stack, x, device):
    """h, c and the gradients of the parameters, computed on a device."""
    stack, x = copy.deepcopy(stack).to(device), x.to(device)
    h, c = stack(x)
    (h.sum() + c.square().sum()).backward()
    assert h.device == torch.device(device)
    return [a.detach().cpu() for a in (h, c, *(p.grad for p in stack.parameters()))]


def test_the_layer_gives_what_it_gives_on_the_cpu():
    stack, x = SRU(5, 7, 3, bidirectional=True).double(), torch.randn(11, 3, 5, dtype=torch.float64)
    for a, b in zip(gradients_on(stack, x, "cpu"), gradients_on(stack, x, "cuda:0"), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_in_one_graph_it_trains_alike():
    stack, x = SRU(8, 16, 2).cuda(), torch.randn(9, 3, 8, device="cuda")
    compiled = torch.compile(stack, fullgraph=True)
    results = []
    for network in (stack, compiled):
        stack.zero_grad()
        h, c = network(x)
        (h.square().sum() + c.sum()).backward()
        results.append([h.detach(), c.detach(), *(p.grad.clone() for p in stack.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_keep_torchs_rules(dtype):
    u, x, v, b, c0 = example((5, 3, 8), dtype)
    options = None, None, 1.0, 0.0, 0, 1
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sru.recurrence.default, (u, x, v, b, c0, *options, True), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_near_float32(dtype):
    stack, x = SRU(64, 64, 2).cuda(), torch.randn(30, 4, 64, device="cuda")
    plain = stack(x)[0]
    with torch.autocast("cuda", dtype=dtype):
        cast, c = stack(x)
    assert c.dtype == torch.float32
    torch.testing.assert_close(cast.float(), plain, rtol=0.05, atol=0.05)
    cast.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters())


def test_memory_is_flat():
    stack, x = SRU(64, 64, 2).cuda(), torch.randn(30, 4, 64, device="cuda")

    def run():
        stack.zero_grad()
        stack(x)[0].sum().backward()
        return torch.cuda.memory_allocated()

    run()
    assert run() == [run() for _ in range(50)][-1]


def test_offsets_beyond_32_bits():
    steps, batch, size = 1100, 64, 10240
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    assert steps * batch * 3 * size > 2**31
    u = torch.randn(steps, batch, 3, size, dtype=torch.bfloat16, device="cuda")
    v, b = torch.randn(2, 2, size, device="cuda")
    c0 = torch.zeros(batch, size, device="cuda")
    with torch.no_grad():
        h, c = recurrence(u, None, v, b, c0, scale=0.0, backend="cuda")
        _, middle = recurrence(u[:1000], None, v, b, c0, scale=0.0, backend="cuda")
        tail, last = recurrence(u[1000:].clone(), None, v, b, middle, scale=0.0, backend="cuda")
    assert torch.equal(h[1000:], tail)
    assert torch.equal(c, last)


def test_no_kernel_touches_memory_that_is_not_its_own():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    code = """
import torch
from sru.kernels import recurrence
for steps, batch, size in [(9, 128, 1024), (8, 3, 41), (130, 2, 21)]:  # whole words of padding
    for dtype in (torch.float32, torch.bfloat16):
        u = torch.randn(steps, batch, 3, size, device="cuda", dtype=dtype, requires_grad=True)
        x = torch.randn(steps, batch, size, device="cuda", dtype=dtype, requires_grad=True)
        v, b = torch.randn(2, 2, size, device="cuda", requires_grad=True)
        pad = torch.rand(steps, batch, device="cuda") < 0.5
        h, c = recurrence(u, x, v, b, torch.zeros(batch, size, device="cuda"), pad=pad, backend="cuda")
        (h.sum() + c.sum()).backward()
torch.cuda.synchronize()
"""
    # Each tensor in an allocation of its own, whose end the sanitizer knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [sanitizer, "--error-exitcode", "9", "--report-api-errors", "no", sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not run on this device")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

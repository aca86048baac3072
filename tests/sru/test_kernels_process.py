"""The compiled recurrence in a process: threads, forks, interrupts, memory, imports and the cache folder."""

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_kernels import NAMES, _fill_new_memory_with_nan, inputs, run, scattered  # noqa: F401  the fixture acts here

import sru.kernels
from sru.kernels import cpu, recurrence

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["OpenMP", "own threads"])
def threads(request, monkeypatch):
    """threads(n) sets torch's threads until the test ends, and shares out calls of any size."""
    if request.param == "own threads":
        monkeypatch.setattr(cpu, "team", lambda process: None)
    elif cpu.team(os.getpid()) is None:
        pytest.skip("torch computes without GNU OpenMP here")
    count, least = torch.get_num_threads(), cpu.SERIAL_ELEMENTS

    def use(n):
        torch.set_num_threads(n)
        cpu.SERIAL_ELEMENTS = 0

    yield use
    torch.set_num_threads(count)
    cpu.SERIAL_ELEMENTS = least


own_threads = pytest.mark.parametrize("threads", ["own threads"], indirect=True)


# Many tiles; two of columns only; so many that the sums over tiles are shared out too.
@pytest.mark.parametrize("shape", [(20, 37, 260), (4, 3, 700), (2, 260, 132)], ids=str)
def test_results_are_bitwise_equal_for_any_number_of_threads(shape, threads):
    steps, batch, size = shape
    arguments = inputs(*shape)
    grads = torch.randn(shape), torch.randn(batch, size)
    options = {"bidirectional": True, "pad": scattered(steps, batch)}
    serial = run(arguments, "cpu", grads=grads, **options)
    for n in (1, 2, 3):
        threads(n)
        for name, one, many in zip(NAMES, serial, run(arguments, "cpu", grads=grads, **options), strict=True):
            assert torch.equal(one, many), (n, name)
    if cpu.team(os.getpid()) is None:
        assert any(thread.name.startswith("sru") for thread in threading.enumerate())


def test_concurrent_callers_do_not_disturb_each_other(threads):
    threads(3)
    cases = [inputs(11, 9, 40 + i) for i in range(8)]
    grads = [(torch.randn(11, 9, 40 + i), torch.randn(9, 40 + i)) for i in range(8)]
    expected = [run(a, "cpu", grads=g) for a, g in zip(cases, grads, strict=True)]

    def work(i):
        results = [run(cases[i], "cpu", grads=grads[i]) for _ in range(20)]
        return all(torch.equal(e, r) for result in results for e, r in zip(expected[i], result, strict=True))

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(work, range(8)))


def test_a_forked_worker_computes_what_its_parent_does(threads):
    threads(2)
    arguments = inputs(9, 16, 64)
    expected = [a.tolist() for a in recurrence(*arguments, backend="cpu")]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parents_pool = cpu.pool()

    def work():
        results = [a.tolist() for a in recurrence(*arguments, backend="cpu")]
        # The caller alone would get there too; but the parent's threads are gone, and none would ever help it.
        sender.send((results, cpu.pool() is parents_pool))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    try:
        assert receiver.poll(30), "the worker hangs"
        assert receiver.recv() == (expected, False)
    finally:
        child.kill()
        child.join()


@own_threads
@pytest.mark.parametrize("refused", [False, True], ids=["all threads busy", "no thread to be had"])
def test_what_no_thread_takes_up_the_caller_does(refused, threads, monkeypatch):
    arguments = inputs(9, 16, 64)
    grads = torch.randn(9, 16, 64), torch.randn(16, 64)
    expected = run(arguments, "cpu", grads=grads)

    class Pool:
        def submit(self, work):
            if refused:
                raise RuntimeError("cannot schedule new futures after shutdown")
            return Future()

    threads(3)
    monkeypatch.setattr(cpu, "pool", Pool)
    for name, e, f in zip(NAMES, expected, run(arguments, "cpu", grads=grads), strict=True):
        assert torch.equal(e, f), name


@own_threads
def test_a_call_waits_for_the_slowest_thread(threads, monkeypatch):
    arguments = inputs(9, 16, 64)
    expected = recurrence(*arguments, backend="cpu")
    caller, begun, compiled = threading.current_thread(), threading.Event(), cpu.compile_kernel

    def slowed(*kind):
        function, address = compiled(*kind)

        def kernel(start):  # the caller leaves all the work to the other thread
            if threading.current_thread() is caller:
                begun.wait(30)
            else:
                begun.set()
                time.sleep(0.3)
                function(start)

        return kernel, address

    threads(2)
    monkeypatch.setattr(cpu, "compile_kernel", slowed)
    for e, f in zip(expected, recurrence(*arguments, backend="cpu"), strict=True):
        assert torch.equal(e, f)
    assert begun.is_set()


@own_threads
def test_an_interrupted_call_leaves_a_thread_the_memory_that_it_works_on(threads, monkeypatch):
    caller, begun, end = threading.current_thread(), threading.Event(), threading.Event()

    def kernel(*_):
        if threading.current_thread() is caller:
            begun.wait(30)
            raise KeyboardInterrupt
        begun.set()
        end.wait(30)

    threads(2)
    monkeypatch.setattr(cpu, "compile_kernel", lambda *_: (kernel, 0))
    u, *others = inputs(9, 16, 64)
    memory = weakref.ref(u)
    with contextlib.suppress(KeyboardInterrupt):
        recurrence(u, *others, backend="cpu")
    del u
    assert begun.is_set()
    assert memory() is not None
    end.set()
    for _ in range(1000):
        if memory() is None:
            break
        time.sleep(0.01)
    assert memory() is None


def test_backward_frees_what_forward_kept():
    u, *others = (a.requires_grad_() for a in inputs(3, 2, 4))
    u = u * 1
    memory = weakref.ref(u)
    h, _ = recurrence(u, *others, backend="cpu")
    del u
    assert memory() is not None
    h.sum().backward()
    assert memory() is None


def test_without_numba_one_warning_says_what_to_type_and_the_reference_runs(monkeypatch):
    monkeypatch.setattr(sru.kernels, "HAS_NUMBA", False)
    sru.kernels.warn_once.cache_clear()
    arguments = inputs(3, 2, 4)
    with pytest.warns(UserWarning, match="pip install numba") as caught:
        h, _ = recurrence(*arguments)
    assert caught[0].filename == __file__
    assert torch.equal(h, recurrence(*arguments, backend="reference")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recurrence(*arguments)


def test_a_device_without_a_kernel_gets_one_warning():
    sru.kernels.warn_once.cache_clear()
    elsewhere = SimpleNamespace(device=torch.device("xpu"))
    with pytest.warns(UserWarning, match="no fused SRU kernel for xpu") as caught:
        assert [sru.kernels.has_kernel(elsewhere) for _ in range(3)] == [False] * 3
    assert len(caught) == 1


def test_importing_the_kernels_imports_no_compiler():
    code = "import sys, sru.kernels; sys.exit('numba' in sys.modules or 'sru.kernels.cpu' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_process_that_can_keep_nothing_compiles_all_the_same(tmp_path):
    """No folder can be made below a regular file, whoever asks."""
    shutil.copytree(ROOT / "sru", tmp_path / "sru", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "sru" / "kernels" / "__pycache__"
    file.write_text("")
    code = """
import numba, torch
from sru.kernels import cpu, recurrence
try:
    numba.njit(cache=True)(cpu.forward(0))
except RuntimeError as error:
    print("no locator" in str(error))
u, row = torch.zeros(2, 1, 3, 4), torch.zeros(2, 4)
print(recurrence(u, torch.ones(2, 1, 4), row, row, torch.ones(1, 4), backend="cpu")[0][1, 0, 0].item())
"""
    folders = dict.fromkeys(("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME"), str(file / "below"))
    environment = os.environ | folders | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0.625"]

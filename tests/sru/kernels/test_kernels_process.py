"""The compiled recurrence in a process: threads, forks, memory and warnings."""

import multiprocessing
import os
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_kernels import NAMES, _fill_new_memory_with_nan, inputs, run, scattered  # noqa: F401  the fixture acts here

import sru.kernels
from sru.kernels import cpu, recurrence

ROOT = Path(__file__).parents[3]


@pytest.fixture
def threads():
    """threads(n) sets torch's threads until the test ends, and divides calls of any size among them."""
    if cpu.find_openmp(os.getpid()) is None:
        pytest.skip("torch computes without GNU OpenMP here")
    count, least = torch.get_num_threads(), cpu.SERIAL_ELEMENTS

    def use(n):
        torch.set_num_threads(n)
        cpu.SERIAL_ELEMENTS = 0

    yield use
    torch.set_num_threads(count)
    cpu.SERIAL_ELEMENTS = least


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


def test_a_forked_worker_computes_the_results_of_its_parent_on_one_thread(threads):
    threads(2)
    arguments = inputs(9, 16, 64)
    expected = [a.tolist() for a in recurrence(*arguments, backend="cpu")]
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():  # the threads of the parent are gone: OpenMP would wait for them forever
        results = [a.tolist() for a in recurrence(*arguments, backend="cpu")]
        sender.send((results, cpu.find_openmp(os.getpid())))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    try:
        assert receiver.poll(30), "the worker hangs"
        assert receiver.recv() == (expected, None)
    finally:
        child.kill()
        child.join()


FORK_FIRST = """
import multiprocessing, os, torch, sru
torch.set_num_threads(2)
torch.randn(4_000_000).exp()  # starts the threads of OpenMP
def work():
    sru.kernels.recurrence(torch.randn(64, 32, 3, 64), None, *torch.zeros(2, 128), torch.zeros(32, 64), scale=0.0)
    os._exit(0)
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
child.kill()
assert child.exitcode == 0
"""


def test_a_worker_forked_before_the_first_recurrence_does_not_wait_for_its_parents_threads():
    subprocess.run([sys.executable, "-c", FORK_FIRST], check=True, timeout=120)


def test_without_openmp_one_thread_gives_the_same_results(threads, monkeypatch):
    threads(2)
    arguments = inputs(9, 16, 64)
    expected = run(arguments, "cpu", grads=(torch.ones(9, 16, 64), torch.ones(16, 64)))
    monkeypatch.setattr(cpu, "find_openmp", lambda process: None)
    alone = run(arguments, "cpu", grads=(torch.ones(9, 16, 64), torch.ones(16, 64)))
    assert all(map(torch.equal, expected, alone))


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

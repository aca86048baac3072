"""The layer in threads, forked workers and long loops: same bits, no hang, no growth."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT

from sru import SRU
from sru.kernels import cpu


def test_a_run_repeats_to_the_bit():
    stack, x = SRU(32, 64, 2, bidirectional=True), torch.randn(70, 9, 32)

    def run():
        stack.zero_grad()
        h, c = stack(x)
        (h.sum() + c.sum()).backward()
        return [h, c, *(p.grad.clone() for p in stack.parameters())]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads share every call until the test ends."""
    count = torch.get_num_threads()
    monkeypatch.setattr(cpu, "SERIAL_ELEMENTS", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(count)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("grad", [False, True])
def test_memory_is_flat_over_a_thousand_steps(grad):
    code = f"""
import resource, torch
from sru import SRU
stack, x = SRU(64, 64, 2), torch.randn(8, 64)
def run(n):
    state = None
    for _ in range(n):
        with torch.set_grad_enabled({grad}):
            h, state = stack.step(x, state)
            if {grad}:
                h.sum().backward()
                state = state.detach()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(100)
print(run(1000) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096  # KiB


def test_eight_callers_at_once_get_the_bits_of_one(two_threads):
    stack, x = SRU(32, 64, 2), torch.randn(40, 8, 32)
    parameters = list(stack.parameters())

    def run(_=None):
        h, c = stack(x)
        return [h, c, *torch.autograd.grad(h.sum() + c.sum(), parameters)]

    expected = run()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(run, range(32)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Encoded(torch.utils.data.Dataset):
    """Items computed in a worker with the parent's network."""

    def __init__(self, network):
        self.network = network

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return self.network(torch.full((40, 32, 8), float(i)))[0]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_loader_worker_computes_what_its_parent_does(two_threads):
    network = SRU(8, 16, 2)
    items = Encoded(network)
    expected = [items[i] for i in range(4)]  # the parent has computed, with its threads, before the fork
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    loader = torch.utils.data.DataLoader(items, batch_size=None, **options)
    for found, value in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, value)

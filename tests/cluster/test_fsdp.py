"""FSDP2 on CPUs at the shape of SRU++ Large: sharded checkpoints for other numbers of processes, and memory."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from engines import anonymous_memory, free_ports, loopback_only
from torch import distributed, nn

from sru import SRUppEncoder
from sru.attention import Projection

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
MB = 2**20
LAYERS = 10  # of the published network, which is 4096 wide


@pytest.fixture(scope="module", autouse=True)
def _loopback():
    with loopback_only():
        yield


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width // 2)
        self.encoder = SRUppEncoder(width // 2, width, num_layers=LAYERS, memory_length=8)
        self.softmax = nn.Linear(width, 64)

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.softmax(self.encoder(self.embedding(x))[0]).flatten(0, 1), y.flatten())


class Peak(threading.Thread):
    """The highest anonymous memory of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.ends = 0, threading.Event()

    def run(self) -> None:
        while not self.ends.wait(0.003):
            self.value = max(self.value, anonymous_memory())


def process(rank, world, port, kind, width, steps, load, save, results):
    """Trains `Model` for `steps`, each process on its half of a batch of 4; sends losses and memory."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    empty = anonymous_memory()
    model = Model(width)
    if kind == "fsdp":
        mesh = distributed.device_mesh.init_device_mesh("cpu", (world,))
        for module in model.modules():
            if isinstance(module, Projection):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def state():
        weights, moments = get_state_dict(model, optimizer)
        return {"weights": weights, "moments": moments}

    if load:
        loaded = state()
        checkpoint.load(loaded, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=loaded["weights"], optim_state_dict=loaded["moments"])
    losses, peak = [], Peak()
    for step in steps:
        if step == steps[-1]:
            peak.start()  # the moments exist
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(64, (17, 4), generator=generator)[:, rank * 4 // world : (rank + 1) * 4 // world]
        loss = trained(text[:-1], text[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        distributed.all_reduce(mean)
        losses.append(float(mean))
    peak.ends.set()
    if save:
        checkpoint.save(state(), checkpoint_id=save)
    results.put((losses, peak.value - empty, anonymous_memory() - empty))
    distributed.barrier()
    distributed.destroy_process_group()


def train(world, kind, width, steps, load=None, save=None):
    """(losses, peak memory of a step, memory between steps), the larger of all processes."""
    context = torch.multiprocessing.get_context("spawn")
    results, [port] = context.Queue(), free_ports(1)
    args = (world, port, kind, width, steps, load, save, results)
    started = [context.Process(target=process, args=(i, *args)) for i in range(world)]
    for each in started:
        each.start()
    until = time.monotonic() + 300
    while any(each.exitcode is None for each in started) and not any(each.exitcode for each in started):
        assert time.monotonic() < until
        time.sleep(0.1)
    for each in started:
        each.kill()
        each.join()
    assert [each.exitcode for each in started] == [0] * world
    every = [results.get() for _ in started]
    return every[0][0], max(each[1] for each in every), max(each[2] for each in every)


def test_a_sharded_checkpoint_is_loaded_by_one_and_by_two_processes(tmp_path):
    whole, _, _ = train(1, "alone", 128, range(6))
    saved = tmp_path / "checkpoint"
    first, _, _ = train(2, "fsdp", 128, range(3), save=saved)
    assert first == pytest.approx(whole[:3], rel=1e-5)
    assert len(list(Path(saved).glob("*.distcp"))) == 2
    for world, kind in ((1, "alone"), (2, "fsdp"), (2, "ddp")):
        rest, _, _ = train(world, kind, 128, range(3, 6), load=saved)
        assert rest == pytest.approx(whole[3:], rel=1e-5), (world, kind)


def test_a_process_needs_less_memory_than_with_the_whole_network(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system
    width = 1536
    found = {kind: train(2, kind, width, range(3)) for kind in ("ddp", "fsdp")}
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in Model(width).parameters())
    report = {kind: [round(value / size, 2) for value in values[1:]] for kind, values in found.items()}
    print(f"{size / MB:.0f} MB of weights; peak of a step and memory between steps, in sizes of the weights: {report}")
    assert found["fsdp"][0] == pytest.approx(found["ddp"][0], rel=1e-4)
    (peak, kept), (peak_of_ddp, kept_of_ddp) = found["fsdp"][1:], found["ddp"][1:]
    assert kept < 0.6 * kept_of_ddp
    assert peak < 0.8 * peak_of_ddp

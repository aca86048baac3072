"""Two torchruns on two loopback addresses: a killed process and a killed torchrun leave the result as it was."""

import subprocess
import sys

import engines
import pytest
from conftest import ROOT
from engines import (
    DDP,
    STEPS,
    TEXT,
    assert_same_run,
    free_ports,
    kill,
    loopback_only,
    pace,
    processes_with,
    saved_step,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
NAME = "two-machines"  # the job's --rdzv-id


@pytest.fixture(scope="module", autouse=True)
def _loopback():
    with loopback_only():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return engines.reference(tmp_path_factory.getbasetemp())


@pytest.fixture
def machines(tmp_path):
    """machines(i) starts the torchrun of machine i, with a process each."""
    [port] = free_ports(1)
    running = {}

    def start(i):
        host = f"127.0.0.{i + 1}"
        options = [
            "--nnodes=2", "--nproc-per-node=1", f"--rdzv-id={NAME}-{port}", "--rdzv-backend=c10d", "--max-restarts=3",
            f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={1 - i}", f"--local-addr={host}",
        ]  # fmt: skip
        words = [*TEXT, *DDP, pace(0.3), f"run_dir={tmp_path / 'run'}"]
        with (tmp_path / f"{i}.out").open("a") as out:
            running[i] = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, "train.py", *words],
                cwd=ROOT, stdout=out, stderr=out,
                env=engines.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", MACHINE=f"{i}-{port}"),
            )  # fmt: skip
        return running[i]

    start.processes = lambda i: processes_with(MACHINE=f"{i}-{port}")
    start.workers = lambda i: processes_with(MACHINE=f"{i}-{port}", TORCHELASTIC_RUN_ID=f"{NAME}-{port}")
    yield start
    kill(*start.processes(0), *start.processes(1))
    for each in running.values():
        each.wait()


def finish(tmp_path, *started):
    for each in started:
        assert each.wait(300) == 0, "".join(path.read_text()[-4000:] for path in tmp_path.glob("*.out"))


@pytest.mark.parametrize("machine", [0, 1])
def test_a_killed_process_is_started_again_on_both_machines(machines, reference, tmp_path, machine):
    both = machines(0), machines(1)
    wait_until(lambda: saved_step(tmp_path / "run") >= 20, 200, "two checkpoints")
    before = machines.workers(machine)
    kill(*before)
    finish(tmp_path, *both)
    assert not set(before) & set(machines.workers(machine))
    assert "resume" in (tmp_path / "run/config.yaml").read_text()
    assert_same_run(tmp_path / "run", reference)


def test_a_lost_machine_is_replaced_by_the_same_command(machines, reference, tmp_path):
    first, _ = machines(0), machines(1)
    wait_until(lambda: saved_step(tmp_path / "run") >= 20, 200, "two checkpoints")
    kill(*machines.processes(1))
    wait_until(lambda: not machines.processes(1), 20, "the second machine is lost")
    assert saved_step(tmp_path / "run") < STEPS
    second = machines(1)
    finish(tmp_path, first, second)
    assert_same_run(tmp_path / "run", reference)

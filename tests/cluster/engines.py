"""Shared by the tests of cluster engines: a short run with slow steps, its processes, and comparisons."""

import contextlib
import csv
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import ROOT

HERE = Path(__file__).parent
STEPS = 120  # of a run: 12 epochs of 10
# Dropout and carried states: a wrong restart changes the weights.
TEXT = (
    "task=lm", "logger=csv", "depth=1", "width=8", "task.embedding_size=8", "dropout=0.3", "data.unroll=16",
    "data.eval_unroll=64", "trainer.limit_train_batches=10", "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2", f"epochs={STEPS // 10}", "trainer.enable_progress_bar=false",
)  # fmt: skip
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


class Pace(pl.Callback):
    """Waits after each training step, so that a test has time to interfere with a run on any machine."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)


def pace(seconds: float) -> str:
    return f"+callbacks.pace={{_target_:engines.Pace,seconds:{seconds}}}"


def environment(**more: str) -> dict[str, str]:
    """Variables of a process of the test: one thread, this Python, loopback only, no trace of another launcher."""
    foreign = ("SLURM", "TORCHELASTIC", "MASTER_", "RAY_", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{HERE}",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Processes that are started within have no network but loopback; torch's store and Ray listen on all addresses.

    This needs root: without it, they have the network of the machine.
    """
    library = ctypes.CDLL(None)
    with open("/proc/self/ns/net") as before:
        if library.unshare(0x40000000):  # CLONE_NEWNET
            yield
            return
        try:
            with socket.socket() as any_socket:
                up = struct.pack("16sh14x", b"lo", 1)  # IFF_UP
                fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
                # With 127.0.0.1 alone, SLURM finds the name of this machine in no /etc/hosts (AI_ADDRCONFIG).
                second = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("127.0.0.2"))
                fcntl.ioctl(any_socket, 0x8916, second)  # SIOCSIFADDR
            yield
        finally:
            library.setns(before.fileno(), 0)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((host, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of a condition; an AssertionError that says what did not happen in time."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"after {seconds} seconds, not yet: {what}"
        time.sleep(0.2)
    return value


def processes_with(**variables: str) -> list[int]:
    """The living processes of this machine that have these environment variables."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                found.append(int(path.name))
        except OSError:  # it has ended
            continue
    return found


def anonymous_memory() -> int:
    """Bytes of this process that are not pages of files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 2**10


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill(*processes: int) -> None:
    for each in processes:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(
    *words: str, by: tuple[str, ...] = (), within: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs train.py to its end; AssertionError with its errors unless it succeeds."""
    command = [*(by or (sys.executable,)), str(ROOT / "train.py"), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=within
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def reference(below: Path) -> Path:
    """The run that nothing disturbs, by two processes of one command; it runs once in each session of pytest."""
    folder = below / "reference"
    if not (folder / "metrics.json").exists():
        run(*TEXT, *DDP, "trainer.devices=2", f"run_dir={folder}")
    return folder


def read_checkpoint(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "checkpoints/last.ckpt", weights_only=True))


def saved_step(folder: Path) -> int:
    """The step of the last checkpoint, 0 before the first."""
    if not (folder / "checkpoints/last.ckpt").exists():
        return 0
    return int(read_checkpoint(folder)["global_step"])


def assert_same_run(folder: Path, reference: Path) -> None:
    """Weights, moments, random and carried states and all metrics are equal, bit for bit."""
    one, two = read_checkpoint(folder), read_checkpoint(reference)
    assert one["global_step"] == two["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "processes"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    metrics = [json.loads((each / "metrics.json").read_text()) for each in (folder, reference)]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]
    assert metrics[0]["epochs"] == metrics[1]["epochs"] == STEPS // 10
    assert losses(folder) == losses(reference)


def losses(folder: Path) -> dict[tuple[str, str], float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {
            (row["step"], name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if name in ("train/loss", "val/loss", "test/loss") and value
        }

"""Texts larger than memory: a run in less memory than its corpus has, and shards of a text of 200 GB."""

import contextlib
import gzip
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from engines import (
    anonymous_memory,
    environment,
    kill,
    losses,
    pace,
    processes_with,
    read_checkpoint,
    saved_step,
    wait_until,
)

from data.lm import Segments

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
MB = 2**20
CORPUS, LIMIT = 12 * (100 * MB // 1000) * 1000, 700 * MB
GROUPS = Path("/sys/fs/cgroup/memory")
WORDS = (
    "task=lm", "data=bytes", "logger=csv", "depth=1", "width=32", "dropout=0.2", "data.batch_size=32", "data.unroll=64",
    "data.valid_bytes=100000", "data.test_bytes=100000", "trainer.limit_train_batches=60", "epochs=1",
    "trainer.limit_val_batches=2", "trainer.limit_test_batches=2", "trainer.val_check_interval=10",
    "trainer.enable_progress_bar=false",
)  # fmt: skip


@pytest.fixture
def group(tmp_path):
    """A control group with LIMIT bytes for its processes, also for the file pages that they read."""
    place = GROUPS / f"sru-{os.getpid()}"
    if not (GROUPS / "memory.limit_in_bytes").exists() or not os.access(GROUPS, os.W_OK):
        pytest.skip("limiting memory needs root and control groups of version 1")
    place.mkdir()
    (place / "memory.limit_in_bytes").write_text(str(LIMIT))
    yield place
    for process in (place / "cgroup.procs").read_text().split():
        kill(int(process))
    for _ in range(50):
        with contextlib.suppress(OSError):
            place.rmdir()
            break
        time.sleep(0.2)


def write_corpus(path: Path) -> None:
    """CORPUS bytes of text in a small file."""
    letters = np.frombuffer(b"abcdefgh \n", np.uint8)
    with path.open("wb") as file:
        for i in range(12):
            part = np.random.default_rng(i).choice(letters, 1000).tobytes()
            file.write(gzip.compress(part * (100 * MB // 1000), 6))


def test_a_run_needs_less_memory_than_its_text_and_resumes_within_an_epoch(group, tmp_path):
    corpus = tmp_path / "corpus.gz"
    write_corpus(corpus)
    assert corpus.stat().st_size < CORPUS / 10

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=ROOT, env=environment(SRU_CACHE=str(tmp_path / "cache"), TEST=str(tmp_path)), stderr=subprocess.PIPE,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())), text=True,
        )  # fmt: skip

    def finish(started):
        _, err = started.communicate(timeout=400)
        assert started.returncode == 0, err

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(*WORDS, f"data.path={corpus}", f"run_dir={whole}"))
    prepared = [path for path in (tmp_path / "cache").rglob("all") if path.is_file()]
    assert [path.stat().st_size for path in prepared] == [CORPUS]
    broken = start(*WORDS, f"data.path={corpus}", f"run_dir={parts}", pace(0.2))
    wait_until(lambda: saved_step(parts) >= 20, 200, "two checkpoints within the epoch")
    kill(*processes_with(TEST=str(tmp_path)))
    broken.wait()
    assert 20 <= saved_step(parts) < 60
    finish(start(f"resume={parts}"))
    one, two = read_checkpoint(whole), read_checkpoint(parts)
    assert one["global_step"] == two["global_step"] == 60
    for key in ("state_dict", "optimizer_states", "state"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert losses(whole) == losses(parts)
    assert int((group / "memory.max_usage_in_bytes").read_text()) <= LIMIT < CORPUS


def test_shards_of_a_text_of_200_gigabytes_are_disjoint_and_cost_no_memory(tmp_path):
    size, processes, streams, unroll = 200 * 10**9, 8, 4, 512
    path = tmp_path / "text"
    with path.open("wb") as file:
        file.truncate(size)  # sparse: blocks of zeros take no place
    if path.stat().st_blocks * 512 > 10 * MB:
        pytest.skip("this file system has no sparse files")
    writable = np.memmap(path, np.uint8, "r+")
    shards = [
        Segments(np.memmap(path, np.uint8, "r"), streams, unroll, rank=i, world_size=processes)
        for i in range(processes)
    ]
    steps = shards[0].steps
    assert steps == (size - 1) // (processes * streams)
    for stream, segment in itertools.product(range(processes * streams), (0, 1, 2, 1000)):
        writable[stream * steps + segment * unroll] = 1 + stream  # one byte marks whose segment this is
    ends = []
    for i, shard in enumerate(shards):
        low, high = np.lib.array_utils.byte_bounds(shard.inputs)
        start = np.lib.array_utils.byte_bounds(shard.inputs.base)[0]
        ends += [low - start, high - start]
        for position in (0, 1, 2, 1000):
            shard.load_state_dict({"epoch": 0, "position": position})
            x, _, first = next(iter(shard))
            assert x[0].tolist() == [1 + i * streams + row for row in range(streams)]
            assert first == (position == 0)
    assert ends == [i * streams * steps for i in range(processes) for i in (i, i + 1)]  # together all, none twice

    reader = shards[3]
    reader.load_state_dict({"epoch": 0, "position": 0})
    batches, memory = iter(reader), []
    for i, (x, _, _) in enumerate(batches):
        if i in (100, 3000):
            memory.append(anonymous_memory())
        if i == 1000:
            resumed = Segments(np.memmap(path, np.uint8, "r"), streams, unroll, rank=3, world_size=processes)
            resumed.load_state_dict(reader.state_dict())
            x, y, _ = next(batches)
            again, after, _ = next(iter(resumed))
            assert torch.equal(x, again)
            assert torch.equal(y, after)
        if i == 3000:
            break
    assert memory[1] - memory[0] < 8 * MB

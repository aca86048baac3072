"""A run survives signals, kills, full disks, damaged files, clock changes and other jobs in its folder."""

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hydra.errors import InstantiationException

import train
from data import download
from tasks.base import Task
from tasks.run import checkpoints, distributed, errors, files, run_dir
from tasks.run.preemption import Interruption

SHORT = ("trainer.limit_train_batches=6", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")
SMALL = ("width=8", "data.batch_size=8")
TEXT = ("task=lm", "data=pydoc_text", "depth=1", "width=16", "task.embedding_size=16", "data.batch_size=4")


def checkpoint(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


def rows(folder):
    """metrics.csv without the columns that depend on time."""
    clock = re.compile("seconds|.*_per_second|step_ms/.*|peak_memory_mb")
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not clock.fullmatch(k)} for row in csv.DictReader(file)]


def leaves(node):
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in leaves(value)]
    if isinstance(node, list | tuple):
        return [leaf for value in node for leaf in leaves(value)]
    return [node]


def assert_same_training(one, two):
    """Compare, bit for bit: weights, optimiser, schedules, random state, position in the data, metrics."""
    for name in ("last", "best"):
        a, b = checkpoint(one, name), checkpoint(two, name)
        assert a["global_step"] == b["global_step"]
        for each in (a, b):  # the count of started validations differs
            each["loops"] = {k: v for k, v in each["loops"]["fit_loop"].items() if "val_loop" not in k}
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "loops"):
            pairs = list(zip(leaves(a[key]), leaves(b[key]), strict=True))
            assert pairs or key == "lr_schedulers"
            assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs), key
    assert rows(one) == rows(two)


@pytest.fixture
def tell(monkeypatch):
    """tell(signal, stage, call): the process sends itself the signal in the given call of a stage's step."""
    # A shell starts background jobs with SIGINT ignored, and training then keeps ignoring it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    plain = {stage: getattr(Task, f"{stage}_step") for stage in ("training", "validation", "test")}

    def send(number, stage, call):
        left = call
        for name, step in plain.items():
            monkeypatch.setattr(Task, f"{name}_step", step)

        def step(self, batch):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return plain[stage](self, batch)

        monkeypatch.setattr(Task, f"{stage}_step", step)

    yield send
    signal.signal(signal.SIGINT, before)


def exit_status(cfg):
    with pytest.raises(SystemExit) as caught:
        train.run(cfg)
    return caught.value.code


def test_a_run_stopped_several_times_equals_an_uninterrupted_run(configure, tmp_path, tell, capfd):
    words = ("trainer.limit_train_batches=4", *SHORT[1:], *SMALL, "trainer.max_epochs=2", "dropout=0.5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(configure(*words, f"run_dir={whole}"))
    for number, stage, call, step in (
        (signal.SIGTERM, "training", 1, 1),  # before any other checkpoint
        (signal.SIGINT, "training", 3, 4),  # a validation follows: the resume begins with it
        (signal.SIGUSR1, "validation", 1, 4),  # in the middle of it
        (signal.SIGTERM, "training", 2, 6),  # in the middle of an epoch
        (signal.SIGTERM, "training", 2, 8),  # the last step: only the test is left
    ):
        before = signal.getsignal(number)
        tell(number, stage, call)
        resume = [f"resume={parts}"] if parts.exists() else []
        torch.manual_seed(99)
        assert exit_status(configure(*words, f"run_dir={parts}", *resume)) == 128 + number
        assert signal.getsignal(number) == before
        told = capfd.readouterr()
        assert f"{number.name}: stopping after this step; a second one stops at once." in told.err
        assert f"Continue with: python train.py resume={parts}" in told.out
        assert checkpoint(parts)["global_step"] == step
        assert not (parts / "metrics.json").exists()
        assert not (parts / ".lock").exists()
    train.run(configure(*words, f"run_dir={parts}", f"resume={parts}"))
    assert_same_training(whole, parts)
    one, two = (json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (whole, parts))
    assert one == two


def test_a_finished_run_that_trains_longer_has_no_result_until_it_ends(configure, tmp_path, tell):
    run = tmp_path / "run"
    train.run(configure(*SHORT, *SMALL, "epochs=1"))
    assert (run / "metrics.json").exists()
    tell(signal.SIGTERM, "training", 2)
    assert exit_status(configure(*SHORT, *SMALL, "epochs=2", f"resume={run}")) == 143
    assert not (run / "metrics.json").exists()  # the configuration beside it is of two epochs


def test_a_checkpoint_counts_the_examples_since_the_last_validation(configure, tmp_path, tell):
    words = (*SHORT, *SMALL, "data.batch_size=4", "epochs=1")
    tell(signal.SIGTERM, "training", 3)
    assert exit_status(configure(*words)) == 143
    assert checkpoint(tmp_path / "run")["callbacks"]["Clock"]["examples"] == 12


def test_a_language_model_stops_after_a_complete_optimiser_step_and_resumes_with_its_state(configure, tmp_path, tell):
    words = (*TEXT, *SHORT, "trainer.accumulate_grad_batches=2", "epochs=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(configure(*words, f"run_dir={whole}"))
    tell(signal.SIGTERM, "training", 3)
    assert exit_status(configure(*words, f"run_dir={parts}")) == 143
    assert checkpoint(parts)["global_step"] == 2  # of two batches each
    train.run(configure(*words, f"run_dir={parts}", f"resume={parts}"))
    assert_same_training(whole, parts)


def in_a_child(function):
    """Fork a process that calls the function; returns its id. Its exit status is 0 if the function returns."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    finally:
        os._exit(1)


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_ends_the_process_at_once_but_not_within_a_second():
    def tell_twice(pause):
        Interruption("")._listen()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)

    assert status_of(in_a_child(lambda: tell_twice(1.1))) == -signal.SIGTERM
    assert status_of(in_a_child(lambda: tell_twice(0))) == 0


def test_a_signal_between_two_handlers_is_not_lost(configure, monkeypatch):
    """It arrives after Lightning has installed its handler and before this callback has."""
    plain = Interruption._listen

    def late(self):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self)

    monkeypatch.setattr(Interruption, "_listen", late)
    assert exit_status(configure(*SHORT, *SMALL)) == 143


def test_a_slurm_job_is_requeued_and_resumes(configure, tmp_path, tell, monkeypatch):
    run = tmp_path / "run"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\ntest -f "{run}/checkpoints/last.ckpt" && echo "$@" >> "{tmp_path}/requeued"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 1, "JOB_ID": 7, "JOB_NAME": "sru", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    tell(signal.SIGUSR1, "training", 2)
    command = [f"run_dir={run}", "depth=1"]
    assert distributed.arguments(command) == command
    assert exit_status(configure(*SHORT, *SMALL)) == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert checkpoint(run)["global_step"] == 2
    assert not list(run.glob("hpc_ckpt*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert distributed.arguments(command) == ["depth=1", f"resume={run}"]
    other = [f"run_dir={tmp_path / 'other'}"]
    assert distributed.arguments(other) == other


def test_train_exits_with_the_status_of_the_signal_and_prints_how_to_resume(tmp_path):
    """In its own process, with a signal at any moment of training."""
    words = [f"run_dir={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'hydra'}", "logger=csv", "epochs=1000", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "train.py", *words, *SHORT],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 143, err
    step = checkpoint(tmp_path / "run")["global_step"]
    assert f"SIGTERM: {tmp_path}/run/checkpoints/last.ckpt is saved; a resume continues after step {step}." in out
    assert f"Continue with: python train.py resume={tmp_path}/run" in out
    assert "Traceback" not in err


def test_a_kill_during_a_save_leaves_a_complete_checkpoint_and_a_resume_cleans_up(configure, tmp_path):
    run = tmp_path / "run"
    last, half = run / "checkpoints/last.ckpt", run / "checkpoints/.last.ckpt.tmp"
    train.run(configure(*SHORT, *SMALL, "trainer.max_epochs=1"))
    content = torch.load(last, weights_only=True)
    turns = torch.zeros(3_000_000)

    def save():
        while True:
            turns.add_(1)
            checkpoints.AtomicCheckpoints().save_checkpoint(content | {"turns": turns}, last)

    for _ in range(3):
        child = in_a_child(save)
        while not half.exists() or not half.stat().st_size:  # in the middle of it
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
        assert len(checkpoints.read_checkpoint(last).get("turns", torch.zeros(1)).unique()) == 1
    half.write_bytes(b"half")
    (run / "config.yaml.tmp").write_bytes(b"half")
    train.run(configure(*SHORT, *SMALL, "trainer.max_epochs=2", f"resume={run}"))
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert checkpoint(run)["global_step"] == 12


@pytest.fixture
def disk(tmp_path):
    """disk(megabytes): a folder with this much space; call it again to change the size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        again = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a disk of a few megabytes cannot be had here ({error})")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_damages_no_saved_file_and_the_run_resumes_with_more_space(configure, disk):
    run = disk(14) / "run"  # for two checkpoints of 5.4 MB, but not for a third
    words = (*SHORT, *SMALL, f"run_dir={run}", "epochs=3")
    with pytest.raises(OSError, match="No space left") as caught:
        train.run(configure(*words))
    told = errors.explain(caught.value)
    assert re.fullmatch(
        rf"{run}/checkpoints/(best|last)\.ckpt: No space left on device, \d MiB are free there\. Files "
        r"saved before are complete\. Make room .* continues with: python train\.py resume=FOLDER",
        told,
    ), told
    assert checkpoints.read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 6
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    disk(64)
    train.run(configure(*words, f"resume={run}"))
    assert [row["step"] for row in rows(run)] == ["6", "12", "18", "18"]


@pytest.mark.parametrize(
    "words",
    [
        ("task=lm", "data=bytes", "data.path={text}"),
        ("task=squad", "data=squad_sample"),
        ("task=translation", "data=translation_sample"),
        ("task=hybrid", "data=frames_sample"),
    ],
)
def test_a_full_disk_of_the_cache_is_named_and_more_space_is_enough(configure, tmp_path, disk, words):
    from hydra.utils import instantiate

    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 400)
    folder = disk(1)
    (folder / "filler").write_bytes(bytes((1 << 20) - (16 << 10)))  # folders and locks fit
    words = [word.format(text=text) for word in words]
    cfg = configure(*words, f"data.cache={folder / 'cache'}")
    with pytest.raises(OSError, match=r"No space left|Error writing") as caught:
        instantiate(cfg.data).setup()
    told = errors.explain(caught.value)
    assert told.startswith(f"{folder}/cache/"), told
    assert "MiB are free there" in told
    disk(64)
    instantiate(cfg.data).setup()


def test_no_file_of_a_run_is_halved_by_a_limit(tmp_path):
    path, old = tmp_path / "config.yaml", "a: 1\n"
    files.write_text(path, old)
    checkpoints.AtomicCheckpoints().save_checkpoint({"x": torch.zeros(9)}, tmp_path / "last.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        for name, write in {
            "config.yaml": lambda: files.write_text(path, "b" * 10**6),
            "last.ckpt": lambda: checkpoints.AtomicCheckpoints().save_checkpoint(
                {"x": torch.ones(10**6)}, tmp_path / "last.ckpt"
            ),
        }.items():
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert caught.value.filename == str(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == old
    assert torch.equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["x"], torch.zeros(9))
    assert len(list(tmp_path.iterdir())) == 2


def test_only_errors_of_data_files_name_data_root(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        download.digest(tmp_path / "corpus", "", "sha256")
    assert errors.explain(caught.value) == (
        f"{tmp_path}/corpus: Is a directory. Corpora are stored in data.root=FOLDER, prepared data in data.cache=FOLDER"
    )
    with pytest.raises(IsADirectoryError) as caught:
        torch.load(tmp_path / "corpus", weights_only=True)
    assert errors.explain(caught.value) == f"{tmp_path}/corpus: Is a directory"


def test_a_second_job_in_a_folder_is_refused_and_a_killed_job_does_not_block(configure, tmp_path):
    cfg, ready = configure(), tmp_path / "ready"

    def hold():
        with run_dir.open_run_dir(cfg):
            ready.touch()
            time.sleep(600)

    child = in_a_child(hold)
    while not ready.exists():
        time.sleep(0.01)
    began = time.monotonic()
    with pytest.raises(FileExistsError, match=rf"Another process is training in run_dir={tmp_path}/run"):
        train.run(cfg)
    assert time.monotonic() - began < 30  # refused, not waited for
    os.kill(child, signal.SIGKILL)
    status_of(child)
    assert (tmp_path / "run/.lock").exists()
    with run_dir.open_run_dir(cfg):
        pass
    assert not (tmp_path / "run").exists()


def test_two_jobs_prepare_the_same_corpus_at_once(configure, tmp_path):
    from hydra.utils import instantiate

    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 20_000)
    cfg = configure("task=lm", "data=bytes", f"data.path={text}")
    children = [in_a_child(lambda: instantiate(cfg.data).setup()) for _ in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    data = instantiate(cfg.data)
    data.setup()
    assert sum(map(len, data.splits.values())) == text.stat().st_size
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_the_error_of_a_damaged_checkpoint_names_the_complete_one(configure, tmp_path, damage):
    run = tmp_path / "run"
    last, best = run / "checkpoints/last.ckpt", run / "checkpoints/best.ckpt"
    content = {"random_state": {}, "state_dict": {"x": torch.zeros(10**5)}, "epoch": 1, "loops": {}, "global_step": 6}
    checkpoints.AtomicCheckpoints().save_checkpoint(content | {"pytorch-lightning_version": "2"}, best)
    whole = best.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    last.write_bytes({"flipped": bytes(flipped), "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    (run / "config.yaml").touch()
    with pytest.raises(ValueError, match=f"^{last} is damaged") as caught:
        train.run(configure(f"resume={run}"))
    told = str(caught.value)
    assert (
        f"{best} is complete, of step 6: to resume from it, type `cp {best} {last}` and the same command again." in told
    )
    best.write_bytes(b"")
    with pytest.raises(ValueError, match="Use a copy of the folder, or start a new run"):
        train.run(configure(f"resume={run}"))


def test_a_run_resumes_from_the_best_checkpoint_copied_over_the_last(configure, tmp_path):
    run = tmp_path / "run"
    train.run(configure(*SHORT, *SMALL, "epochs=1"))
    (run / "checkpoints/last.ckpt").write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    train.run(configure(*SHORT, *SMALL, "epochs=1", f"resume={run}", "trainer.max_epochs=2"))
    assert [row["step"] for row in rows(run)] == ["6", "12", "12"]


def test_a_clock_that_goes_back_changes_nothing(configure, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -10))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    train.run(configure(*SHORT, *SMALL, "epochs=2"))
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 < found["seconds"] <= found["wall_seconds"] < 600
    assert [row["step"] for row in rows(tmp_path / "run")] == ["6", "12", "12"]
    with pytest.raises(FileExistsError, match="already contains a run"):  # the earlier run
        train.run(configure(*SHORT, *SMALL, "epochs=2"))


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_the_error_of_too_little_memory_says_what_to_type(configure, tmp_path):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    cfg = configure("width=100000", "depth=1")  # 480 MB
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20), limits[1]))
    try:
        with pytest.raises((MemoryError, RuntimeError, InstantiationException)) as caught:
            train.run(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    told = errors.explain(caught.value)
    assert told.startswith("the memory is too small"), told
    assert "data.batch_size=" in told
    assert "width=" in told
    assert not (tmp_path / "run").exists()


def test_a_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "predict.py"]  # it prints its options
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=200)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""

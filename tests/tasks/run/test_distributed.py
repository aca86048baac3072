"""Several processes on CPUs train as one with larger batches, write one record, and resume after a kill."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

import train
from tasks.run import config_checks, distributed

TWO = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
TINY = ("logger=csv", "depth=1", "width=8", "trainer.enable_progress_bar=false")
WORDS = (*TINY, "task.embedding_size=8", "trainer.limit_train_batches=6")
TEXT = (*TINY, "task=lm", "data.unroll=16", "data.eval_unroll=64", "trainer.limit_train_batches=6",
        "trainer.limit_val_batches=3", "trainer.limit_test_batches=3")  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def process(number, runs, ports):
    """One of two processes with torchrun's variables; it makes several runs."""
    together = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in together.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost"}
    for config, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train.run(OmegaConf.create(config))


def run_by_two(configure, *runs):
    """Make the runs one after another in the same two processes."""
    configs = [OmegaConf.to_container(configure(*TWO, *words), resolve=True) for words in runs]
    ports = [free_port() for _ in runs]
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=process, args=(i, configs, ports)) for i in range(2)]
    for each in both:
        each.start()
    while any(each.exitcode is None for each in both) and not any(each.exitcode for each in both):
        time.sleep(0.05)
    for each in both:
        each.kill()  # it may wait for a failed one
        each.join()
    assert [each.exitcode for each in both] == [0, 0]


def start(*words, by=(sys.executable,), **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*by, "train.py", *words], cwd=ROOT, text=True, **pipes, **options)


def finish(running, within=300):
    out, err = running.communicate(timeout=within)
    return running.returncode, out, err


def checkpoint(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


def assert_alike(one, two, **tolerance):
    """Compare weights and moments."""
    for first, second in (
        (one["state_dict"], two["state_dict"]),
        *((one["optimizer_states"][0]["state"][i], each) for i, each in two["optimizer_states"][0]["state"].items()),
    ):
        for key in second:
            torch.testing.assert_close(first[key], second[key], **tolerance)


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {
            (row["step"], name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if name.startswith(("train/", "val/", "test/")) and value
        }


def test_two_processes_train_as_one_with_twice_the_batch(configure, tmp_path):
    """For sentences and a text: weights, moments, and metrics of training, validation and test."""
    kinds = {"words": (*WORDS, "dropout=0", "model.dropout=0", "epochs=2"), "text": (*TEXT, "dropout=0", "epochs=2")}
    evaluated = {"words": (), "text": ("data.eval_batch_size=2",)}
    run_by_two(
        configure,
        *[[*words, *evaluated[kind], f"run_dir={tmp_path / kind}", "data.batch_size=8"]
          for kind, words in kinds.items()]
    )  # fmt: skip
    for kind, words in kinds.items():
        alone = tmp_path / f"{kind} alone"
        train.run(configure(*words, *evaluated[kind], f"run_dir='{alone}'", "data.batch_size=16"))
        expected = losses(alone)
        assert {name for _, name in expected} >= {"train/loss", "val/loss", "test/loss"}
        assert losses(tmp_path / kind) == pytest.approx(expected, rel=1e-5)
        assert_alike(checkpoint(tmp_path / kind), checkpoint(alone), rtol=1e-4, atol=1e-6)
        counted = [json.loads((each / "metrics.json").read_text())["epochs"] for each in (tmp_path / kind, alone)]
        assert counted == [2, 2]


@pytest.mark.slow
def test_a_resume_by_two_processes_equals_one_that_was_never_interrupted(configure, tmp_path):
    """Within an epoch, with dropout and carried states."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = (*TEXT, "dropout=0.5", "data.batch_size=2", "trainer.val_check_interval=4")
    run_by_two(
        configure,
        [*often, "epochs=2", f"run_dir={whole}"],
        [*often, "epochs=2", f"run_dir={parts}", "trainer.max_steps=4"],
        [*often, "epochs=2", f"run_dir={parts}", f"resume={parts}"],
    )
    one, two = checkpoint(whole), checkpoint(parts)
    assert_alike(one, two, rtol=0, atol=0)
    states = one["processes"]
    assert len(states) == len(two["processes"]) == 2
    assert not torch.equal(states[0]["random_state"]["cpu"], states[1]["random_state"]["cpu"])
    assert not torch.equal(states[0]["state"], states[1]["state"])
    for first, second in zip(states, two["processes"], strict=True):
        assert torch.equal(first["random_state"]["cpu"], second["random_state"]["cpu"])
        assert torch.equal(first["state"], second["state"])
    assert losses(whole) == losses(parts)


TASKS = {
    "squad": (*TINY, "task=squad", "data=squad_sample", "task.embedding_size=8"),
    "translation": (*TINY, "task=translation", "task.embedding_size=8", "task.validates_bleu=true", "task.beam=1"),
    "hybrid": (*TINY, "task=hybrid", "data.batch_size=4"),
    "image": (*TINY, "task=image"),
    "speech": (*TINY, "task=speech", "data.num_mels=20"),
}


@pytest.mark.slow
def test_two_processes_test_every_task_as_one_does(configure, tmp_path):
    """With a learning rate of 0 the weights stay, so that only the split and the sums of the test could differ."""
    still = ("epochs=1", "trainer.limit_train_batches=2", "task.optimizer.lr=0")
    run_by_two(configure, *[[*words, *still, f"run_dir={tmp_path / kind}"] for kind, words in TASKS.items()])
    for kind, words in TASKS.items():
        alone = tmp_path / f"{kind}-alone"
        train.run(configure(*words, *still, f"run_dir={alone}"))
        found, expected = losses(tmp_path / kind), losses(alone)
        held_out = {key: value for key, value in expected.items() if key[1].startswith(("val/", "test/"))}
        assert len(held_out) >= 3
        assert {key: found[key] for key in held_out} == pytest.approx(held_out, rel=1e-4)
        for name in ("predictions.json", "hypotheses.txt"):
            if (alone / name).exists():
                assert (tmp_path / kind / name).read_text() == (alone / name).read_text()
    written = "".join(sorted((tmp_path / f"hybrid/likelihoods.{i}.scp").read_text() for i in range(2)))
    keys = sorted(line.split()[0] for line in written.splitlines())
    assert keys == sorted(line.split()[0] for line in (tmp_path / "hybrid-alone/likelihoods.scp").open())


@pytest.mark.slow
def test_a_command_starts_its_processes_and_writes_one_record(tmp_path):
    quiet = ["logger=wandb" if word == "logger=csv" else word for word in WORDS]
    status, out, err = finish(start(*quiet, *TWO, "trainer=ddp", "epochs=1", f"hydra.run.dir={tmp_path}/a run"))
    assert status == 0, err
    folder = tmp_path / "a run"
    assert [path.name for path in tmp_path.iterdir()] == ["a run"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.csv", "metrics.json", "run.json", "wandb", "wandb_id.txt"}
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert out.count("run folder") == out.count("epoch 1") == 1
    assert "trainer=ddp" in json.loads((folder / "run.json").read_text())["overrides"]
    assert len(checkpoint(folder)["processes"]) == 2


def wait_for(path, running):
    until = time.monotonic() + 240
    while not path.exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def of_process(number, parent):
    """The process id of the child with this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            is_below = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except OSError:
            continue
        if is_below and f"RANK={number}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process {number}")


LONG = (*TEXT, "trainer.val_check_interval=2", "trainer.max_epochs=100000")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_job_which_resumes(tmp_path, number):
    folder = tmp_path / "run"
    running = start(*LONG, *TWO, f"hydra.run.dir={folder}")
    wait_for(folder / "checkpoints/last.ckpt", running)
    other = of_process(1 - number, running.pid)
    os.kill(of_process(number, running.pid), signal.SIGKILL)
    status, _, err = finish(running, within=120)
    assert status == 1
    assert f"process {number} of 2 ended by signal 9; the others were stopped" in err
    assert f"resume={folder}" in err
    assert "Traceback" not in err
    assert not Path(f"/proc/{other}").exists()
    state = checkpoint(folder)
    done = state["epoch"] + 1
    status, _, err = finish(start(f"resume={folder}", f"trainer.max_epochs={done + 1}"))
    assert status == 0, err
    assert json.loads((folder / "metrics.json").read_text())["epochs"] == done + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_resumes_from_the_last_checkpoint_after_a_kill(tmp_path):
    folder = tmp_path / "run"
    by = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
          "--master-port", str(free_port()))  # fmt: skip
    steps = ("trainer.max_epochs=100", "trainer.max_steps=300")
    running = start(*LONG[:-1], *TWO[::2], *steps, f"run_dir={folder}", f"hydra.run.dir={folder}", by=by)
    wait_for(folder / "checkpoints/last.ckpt", running)
    os.kill(of_process(1, running.pid), signal.SIGKILL)
    status, out, err = finish(running)
    assert status == 0, err
    assert out.count("run folder") == 1
    assert checkpoint(folder)["global_step"] == 300
    steps = [int(step) for step, name in losses(folder) if name == "val/loss"]
    assert steps == sorted(set(steps)) == list(range(2, 301, 2))
    assert OmegaConf.load(folder / "config.yaml").resume == str(folder)


@pytest.mark.slow
def test_slurm_tasks_connect_and_share_one_folder(tmp_path):
    """Two tasks with the variables that srun sets."""
    given = {"SLURM_JOB_ID": "4321", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "sru", "SLURM_NTASKS": "2"}
    given |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    given |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *WORDS, *TWO[::2], "epochs=1"],
            cwd=tmp_path,
            env=os.environ | given | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    (status, out, err), (other, silence, err_of_other) = (finish(each) for each in both)
    assert (status, other) == (0, 0), err + err_of_other
    assert "run folder" in out
    assert silence == ""
    assert [path.name for path in (tmp_path / "runs/slurm").iterdir()] == ["4321"]
    assert (tmp_path / "runs/slurm/4321/metrics.json").exists()


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_processes(tmp_path):
    status, _, err = finish(
        start("-m", "depth=1,2", *WORDS[:1], *WORDS[2:], *TWO, "epochs=1", f"hydra.sweep.dir={tmp_path}")
    )
    assert status == 0, err
    found = sorted(tmp_path.glob("*/metrics.json"))
    assert len(found) == 2
    sizes = [json.loads(path.read_text())["encoder_parameters"] for path in found]
    assert sizes[0] < sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_on_a_signal_all_processes_save_and_the_sweep_ends(tmp_path, number):
    running = start("-m", "seed=1,2", *LONG, *TWO, f"hydra.sweep.dir={tmp_path}")
    wait_for(tmp_path / "0/checkpoints/last.ckpt", running)
    running.send_signal(number)
    status, out, err = finish(running, within=120)
    assert status == 128 + number, err
    assert f"Continue with: python train.py resume={tmp_path}" in out
    assert len(checkpoint(tmp_path / "0")["processes"]) == 2
    assert not (tmp_path / "0/failed.json").exists()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("words", "started", "message"),
    [
        (["trainer.devices=2"], {}, r"trainer\.devices=2 needs several processes: type trainer=ddp trainer\.devices=2"),
        (["trainer.accelerator=tpu"], {}, r"trainer\.accelerator=tpu must be one of auto, cpu, gpu"),
        (["trainer=ddp", "trainer.strategy=fsdp"], {}, r"trainer\.strategy=fsdp must be one of auto, ddp"),
        (
            ["trainer=ddp"],
            {"TORCHELASTIC_RUN_ID": "a"},
            "WORLD_SIZE is not set, but torchrun and srun set a whole number",
        ),
        (
            ["trainer=ddp"],
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "x"},
            "SLURM_NTASKS is x, but torchrun and srun set",
        ),
        (["trainer=ddp", "trainer.devices=0"], {}, r"trainer\.devices=0 must be a whole number, 1 or more, or auto"),
        (["trainer=ddp", "trainer.devices=[0,1]"], {}, "CUDA_VISIBLE_DEVICES"),
        (["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=4"], {}, "torchrun --nnodes=2 --nproc-per-node=4"),
        (
            ["trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=4096"],
            {},
            r"this machine has \d+ GPUs|torch finds no GPU here",
        ),
        (["trainer=ddp", "trainer.devices=3"], {"WORLD_SIZE": "2"}, r"2 processes were started on each of 1 machines"),
        ([], {"WORLD_SIZE": "2"}, "2 processes were started, but this trainer uses one: type trainer=ddp"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(configure, monkeypatch, words, started, message):
    if started and "SLURM_STEP_ID" not in started:
        started = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "LOCAL_WORLD_SIZE": "2"} | started
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    cfg = configure(*words)
    monkeypatch.setattr(distributed, "launch", lambda *_: pytest.fail("nothing was refused"))
    with pytest.raises(ValueError, match=message):
        train.run(cfg)


def test_an_absent_gpu_is_refused_before_the_data_are_read(configure, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.accelerator=gpu: torch finds no GPU here; type trainer\.acc"):
        train.run(configure("trainer=gpu", "data.root=/nowhere"))


def test_fsdp_by_one_process_is_ordinary_training(configure):
    cfg = configure("trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed")
    config_checks.check(cfg)
    assert distributed.resolve_devices(cfg) == 1
    assert cfg.trainer.strategy == "auto"


def test_fsdp_refuses_a_precision_that_lightning_lacks(configure):
    cfg = configure("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=16-mixed")
    config_checks.check(cfg)
    with pytest.raises(ValueError, match=r"trainer\.precision=16-mixed: trainer=fsdp takes 32-true, bf16-mixed"):
        distributed.resolve_devices(cfg)


SHARDED = (*TEXT, "model=srupp", "depth=2", "task.tied=true", "data.eval_batch_size=2", "epochs=2")


@pytest.mark.slow
def test_two_processes_with_a_part_of_the_network_each_train_as_one(configure, tmp_path):
    """FSDP2 on CPUs: losses, gradients clipped by the global norm, and a checkpoint like that of one process."""
    parts, alone = tmp_path / "parts", tmp_path / "alone"
    words = (*SHARDED, "dropout=0", "trainer.gradient_clip_val=0.1")
    run_by_two(configure, [*words, f"run_dir={parts}", "data.batch_size=8", "trainer=fsdp"])
    train.run(configure(*words, f"run_dir={alone}", "data.batch_size=16"))
    assert losses(parts) == pytest.approx(losses(alone), rel=1e-5)
    one, two = checkpoint(parts), checkpoint(alone)
    assert list(one["state_dict"]) == list(two["state_dict"])
    assert_alike(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_resume_of_a_sharded_network_equals_one_that_was_never_interrupted(configure, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*SHARDED, "dropout=0.5", "data.batch_size=2", "trainer.val_check_interval=4", "trainer=fsdp")
    run_by_two(
        configure,
        [*words, f"run_dir={whole}"],
        [*words, f"run_dir={parts}", "trainer.max_steps=4"],
        [*words, f"run_dir={parts}", f"resume={parts}"],
    )
    assert_alike(checkpoint(whole), checkpoint(parts), rtol=0, atol=0)
    assert losses(whole) == losses(parts)


def test_fsdp_gathers_each_layer_of_srupp_as_one_unit(configure, monkeypatch):
    from hydra.utils import instantiate
    from torch.distributed import fsdp

    from tasks.run.sharding import FullyShard

    strategy = instantiate(configure("trainer=fsdp").trainer.strategy)
    assert isinstance(strategy, FullyShard)
    network = instantiate(configure("model=srupp", "depth=3").model)(input_size=8)
    units = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, mesh: units.append(module))
    monkeypatch.setattr(FullyShard, "device_mesh", {"data_parallel": None})
    strategy.shard(network)
    assert units == [*(network[i].transform_module for i in range(3)), network]


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, ["depth=2"], ["depth=2"]),
        ({"TORCHELASTIC_RUN_ID": "job-1", "WORLD_SIZE": "2"}, ["a=1"], ["a=1", "hydra.run.dir='runs/torchrun/job-1'"]),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, ["run_dir=x"], ["run_dir=x"]),
        (
            {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"},
            [],
            ["hydra.run.dir='runs/slurm/77'"],
        ),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, [], []),
    ],
)
def test_processes_of_torchrun_and_srun_share_a_folder(monkeypatch, environment, given, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.arguments(given) == expected


def test_a_job_without_a_name_or_with_many_runs_says_what_to_type(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the jobs of a sweep start their processes themselves"):
        distributed.arguments(["-m", "depth=1,2"])
    with pytest.raises(ValueError, match=r"run_dir=FOLDER, or torchrun --rdzv-id=NAME"):
        distributed.arguments([])


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_job_resumes(tmp_path, monkeypatch, variable):
    if variable.startswith("TORCH"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
        monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["depth=2", f"run_dir={tmp_path}"]
    monkeypatch.setenv(variable, "1")
    assert distributed.arguments(given) == given  # there is no checkpoint yet
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert distributed.arguments(given) == ["depth=2", f"resume={tmp_path}"]
    both = [*given, "hydra.run.dir=elsewhere"]
    assert distributed.arguments(both) == ["depth=2", f"resume={tmp_path}"]
    monkeypatch.setenv(variable, "0")
    # With torchrun, this machine may replace a lost one.
    expected = ["depth=2", f"resume={tmp_path}"] if variable.startswith("TORCH") else given
    assert distributed.arguments(given) == expected


def test_a_resume_by_another_number_of_processes_is_refused(configure, tmp_path):
    train.run(configure(*WORDS, "epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1"))
    folder = tmp_path / "run"
    state = checkpoint(folder)
    torch.save(state | {"processes": [{}, {}]}, folder / "checkpoints/last.ckpt")
    cfg = configure(*WORDS, f"resume={folder}")
    with pytest.raises(ValueError, match=re.escape("trained by 2 processes, and these are 1")):
        train.run(cfg)

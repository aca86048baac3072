"""A real SLURM with two node daemons of this machine: its jobs end with the weights of a run that nothing disturbed."""

import json
import re
import shlex
import subprocess
import sys

import engines
import pytest
from conftest import ROOT
from engines import DDP, STEPS, TEXT, assert_same_run, loopback_only, pace, run, saved_step, wait_until
from slurm import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
SCRIPT = re.search(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture(scope="module", autouse=True)
def _loopback():
    with loopback_only():
        yield


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(slurm, tmp_path_factory):
    return engines.reference(tmp_path_factory.getbasetemp())


def script(*words, minutes=10, signal_at=10):
    """The script of docs/cluster.md for two nodes of one process each."""
    replaced = {
        "--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8": "--nodes=2 --ntasks-per-node=1",
        "--time=24:00:00": f"--time={minutes}",
        "USR1@300": f"USR1@{signal_at}",
        "trainer=ddp trainer.devices=8 trainer.num_nodes=4 task=lm data=enwik8": shlex.join(
            [*TEXT, *DDP, "trainer.devices=1", "trainer.num_nodes=2", *words]
        ),
    }
    text = SCRIPT
    for old, new in replaced.items():
        assert old in text, "docs/cluster.md has another script: change this test"
        text = text.replace(old, new)
    return text


def test_two_nodes_train_as_one_machine(slurm, reference, tmp_path):
    folder = tmp_path / "run"
    job = slurm.submit(script(f"run_dir={folder}"))
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", slurm.output(job)
    assert slurm.output(job).count("run folder") == 1
    assert_same_run(folder, reference)


def test_a_job_that_meets_its_time_limit_is_requeued_and_ends_the_same(slurm, reference, tmp_path):
    """SLURM sends the signal 80 to 110 seconds after the start; the steps alone take 120."""
    folder = tmp_path / "run"
    job = slurm.submit(script(f"run_dir={folder}", pace(1.0), minutes=2))
    ended = slurm.wait(job, 900)
    assert ended["JobState"] == "COMPLETED", slurm.output(job)
    assert int(ended["Restarts"]) >= 1
    saved = [int(step) for step in re.findall(r"SIGTERM: .* a resume continues after step (\d+)", slurm.output(job))]
    assert len(saved) == int(ended["Restarts"])
    assert all(0 < step < STEPS for step in saved)
    assert_same_run(folder, reference)


def test_a_cancelled_job_has_saved_and_resumes_on_one_machine(slurm, reference, tmp_path):
    folder = tmp_path / "run"
    job = slurm.submit(script(f"run_dir={folder}", pace(0.3)))
    wait_until(lambda: saved_step(folder), 200, "the first checkpoint")
    slurm("scancel", job)
    assert slurm.wait(job, 60)["JobState"] == "CANCELLED"
    wait_until(lambda: "is saved; a resume continues after step" in slurm.output(job), 30, "the job has saved")
    assert 0 < saved_step(folder) < STEPS
    assert "Traceback" not in slurm.output(job)
    run(f"resume={folder}", "trainer.devices=2", "trainer.num_nodes=1")
    assert_same_run(folder, reference)


def test_a_job_that_loses_a_node_is_requeued_and_ends_the_same(slurm, reference, tmp_path):
    folder = tmp_path / "run"
    job = slurm.submit(script(f"run_dir={folder}", pace(0.3)))
    wait_until(lambda: saved_step(folder) >= 20, 200, "two checkpoints")
    slurm.kill_node("n2")
    try:
        wait_until(lambda: slurm.job(job).get("Restarts") == "1", 120, "the job is requeued")
        assert slurm.job(job)["JobState"] == "PENDING"
        assert saved_step(folder) < STEPS
    finally:
        slurm.start_node("n2")
    assert slurm.wait(job, 400)["JobState"] == "COMPLETED", slurm.output(job)
    assert_same_run(folder, reference)


def test_a_job_whose_training_fails_is_a_failed_job(slurm, tmp_path):
    job = slurm.submit(script(f"run_dir={tmp_path / 'run'}", "depth=5000"))
    ended = slurm.wait(job, 120)
    # srun returns the highest status: 1, or 143 if the first process to fail had another terminated.
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), slurm.output(job)
    assert ended["ExitCode"] in ("1:0", "143:0")
    assert "error: " in slurm.output(job)


def test_a_sweep_by_submitit_runs_one_job_each_and_lists_the_failed(slurm, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "sweep"
    words = ("depth=1,2,5000", *[word for word in TEXT if not word.startswith(("depth", "epochs"))], "epochs=1")
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=test", "hydra.launcher.timeout_min=10")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *words, *launcher, f"hydra.sweep.dir={folder}"],
        cwd=tmp_path, env=slurm.environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "finished 2, failed 1" in done.stdout
    sizes = [json.loads((folder / f"{i}/metrics.json").read_text())["encoder_parameters"] for i in (0, 1)]
    assert sizes[0] < sizes[1]
    assert "depth=5000" in json.loads((folder / "2/failed.json").read_text())["overrides"]
    assert {path.name.partition("_")[2] for path in folder.glob(".submitit/*_*/*_log.out")} == {
        f"{i}_0_log.out" for i in range(3)
    }

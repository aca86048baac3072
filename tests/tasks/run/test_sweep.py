"""Sweeps: failures, resume after a kill, parallel jobs, searches, and the files of conf/sweep/."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import joblib
import pytest
import torch
from conftest import ROOT, options
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_conf import bind

import train
from tasks.run import checkpoints, config_checks, errors, files, sweep

TINY = ("logger=csv", "width=16", "data.batch_size=8", "trainer.enable_progress_bar=false")
TINY += ("trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(*words): run train.py in this process, because a new one takes seconds; returns the exit status."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that monkeypatch restores it
    monkeypatch.setenv("SRU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.delenv("HYDRA_FULL_ERROR")
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        try:
            errors.guard(train.command)
        except SystemExit as ended:
            return ended.code
        finally:
            HydraConfig.instance().cfg = None
        return 0

    return call


def test_a_sweep_whose_jobs_would_share_one_run_of_wandb_is_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "id7")
    ended = command("-m", *TINY, "logger=wandb", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ended == (
        "error: WANDB_RUN_ID=id7 would put all jobs into one run of wandb; type unset WANDB_RUN_ID, or leave out -m"
    )
    assert not (tmp_path / "sweep").exists()


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def last_step(folder):
    return checkpoints.read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"]


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def results(folder):
    return {path.parent.name: json.loads(path.read_text())["metrics"] for path in folder.glob("*/metrics.json")}


def test_a_failed_job_stops_no_other_and_a_resume_runs_it_again(command, tmp_path, capsys):
    folder, corpus = tmp_path / "a sweep", tmp_path / "late.txt"
    (tmp_path / "early.txt").write_bytes(b"what is said is said again. " * 400)
    words = ("task=lm", "data=bytes", f"data.path={corpus},{tmp_path / 'early.txt'}", "depth=1", "trainer=debug")
    assert command("-m", *words, *TINY, f"hydra.sweep.dir='{folder}'") == 1
    told = capsys.readouterr().out
    assert f"Sweep {folder}: finished 1, failed 1." in told
    line = next(line for line in told.splitlines() if line.startswith(f"  task=lm data=bytes data.path={corpus}"))
    assert line.endswith(f"({folder}/0)")
    assert "late.txt" in json.loads((folder / "0/failed.json").read_text())["error"]
    assert f"python train.py resume='{folder}'" in told
    done = times(folder / "1")
    corpus.write_bytes(b"another text, which comes late. " * 400)
    assert command(f"resume={folder}") == 0
    assert f"Sweep {folder}: finished 2, failed 0." in capsys.readouterr().out
    assert not (folder / "0/failed.json").exists()
    assert times(folder / "1") == done


def test_a_killed_sweep_resumes_to_the_same_bits(command, configure, tmp_path):
    folder, words = tmp_path / "sweep", ("depth=1", "trainer.max_epochs=12", *TINY)
    start = [sys.executable, "train.py", "-m", "seed=1,2,3", *words, f"hydra.sweep.dir={folder}"]
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not (folder / "1/checkpoints/last.ckpt").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (folder / "0/metrics.json").exists()
    assert not (folder / "1/metrics.json").exists()
    assert not (folder / "2").exists()
    done = times(folder / "0")
    assert command(f"resume={folder}") == 0
    assert times(folder / "0") == done
    # The second job was killed during training, the third had not begun.
    for seed in (2, 3):
        whole = tmp_path / f"whole{seed}"
        value = train.run(configure(*words, f"seed={seed}", f"run_dir={whole}"))
        one, two = weights(whole), weights(folder / str(seed - 1))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert value == results(folder)[str(seed - 1)]["val/accuracy"]


def test_a_resumed_sweep_is_the_same_sweep(command, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert command("-m", "seed=1", "depth=1", "trainer=debug", *TINY, f"hydra.sweep.dir={folder}") == 0
    done = times(folder / "0")
    for word in ("depth=2", "seed=1,2", "hydra.sweeper.max_batch_size=3", "run_dir=elsewhere"):
        assert f"{word} would change it" in command(f"resume={folder}", word)
    assert "already contains a sweep" in command("-m", "seed=2", *TINY, f"hydra.sweep.dir={folder}")
    # A changed record must not return results of other jobs.
    record = folder / "sweep.json"
    record.write_text(record.read_text().replace("seed=1", "seed=2"))
    assert "holds the job seed=1" in command(f"resume={folder}")
    assert times(folder / "0") == done
    record.write_text(record.read_text().replace("seed=2", "seed=1"))
    assert command(f"resume={folder / '0'}") == 0  # a job resumes as a run and stays a job of the sweep
    done = times(folder / "0")
    assert command(f"resume={folder}") == 0
    for damage in ("", "{", "[]", '{"overrides": "seed=1"}', '{"overrides": ["--config-dir=/x"]}'):
        record.write_text(damage)
        assert "sweep.json is damaged" in command(f"resume={folder}")
    assert times(folder / "0") == done
    assert "Traceback" not in capsys.readouterr().err


def test_a_job_restarted_by_a_scheduler_resumes(command, tmp_path, capsys):
    words = ("-m", "seed=1", "depth=1", "trainer=debug", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert command(*words) == 0
    job = tmp_path / "sweep/0"
    (tmp_path / "sweep/sweep.json").unlink()  # the process of a launcher does not read it
    assert command(*words) == 0
    assert f"finished already: {job}" in capsys.readouterr().out
    (tmp_path / "sweep/sweep.json").unlink()
    (job / "metrics.json").write_text("{")
    assert command(*words) == 0
    told = capsys.readouterr().out
    assert f"{job / 'metrics.json'} is damaged: the job is tested again" in told
    assert "only the test is left" in told
    assert results(tmp_path / "sweep")["0"]["test/accuracy"] >= 0


def test_a_failure_recorded_for_another_job_is_refused(command, tmp_path):
    folder = tmp_path / "sweep"
    assert (
        command("-m", "seed=1", "task=lm", "data=bytes", "data.path=absent", "logger=csv", f"hydra.sweep.dir={folder}")
        == 1
    )
    path = folder / "0/failed.json"
    path.write_text(path.read_text().replace("seed=1", "seed=2"))
    assert f"{folder}/0 holds the job seed=2" in command(f"resume={folder}")
    path.write_text("{")  # the job replaces it
    assert command(f"resume={folder}") == 1
    assert "absent" in json.loads(path.read_text())["error"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_parallel_jobs_with_complete_checkpoints_and_the_sweep_resumes(command, tmp_path, number):
    folder = tmp_path / "sweep"
    words = ("seed=1,2,3", "depth=1", "trainer.max_epochs=100000", *TINY, f"hydra.sweep.dir={folder}")
    start = [sys.executable, "train.py", "-m", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    def hear_ctrl_c():  # a shell starts background jobs, perhaps this one, with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    running = subprocess.Popen(start, cwd=ROOT, text=True, preexec_fn=hear_ctrl_c, **pipes)
    until = time.monotonic() + 240
    while not all((folder / job / "checkpoints/last.ckpt").exists() for job in "01"):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    running.send_signal(number)
    try:
        output, _ = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 128 + number, output
    assert f"Continue with: python train.py resume={folder}" in output
    assert "Traceback" not in output
    assert not (folder / "2/run.json").exists()
    steps = []
    for job in "01":
        with FileLock(folder / job / ".lock", timeout=20):  # it is not running any more
            steps.append(last_step(folder / job))
    # The same sweep with fewer epochs: two more than the jobs have, of 4 steps each.
    epochs = max(steps) // 4 + 2
    for path in (folder / "sweep.json", *folder.glob("*/run.json")):
        path.write_text(path.read_text().replace("trainer.max_epochs=100000", f"trainer.max_epochs={epochs}"))
    assert command(f"resume={folder}", "hydra/launcher=basic") == 0
    for job in "012":
        assert last_step(folder / job) == 4 * epochs


def test_a_full_disk_is_refused_before_a_sweep_begins(command, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_text", full)
    told = command("-m", "seed=1,2", "trainer=debug", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert "sweep.json: No space left on device" in told
    assert not list(tmp_path.glob("sweep/*/"))


def test_a_sweep_that_does_not_compose_leaves_nothing(command, tmp_path):
    assert "There is no data=nothing" in command("-m", "data=pydoc,nothing", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert not (tmp_path / "sweep").exists()


def test_an_unwritable_folder_is_refused_once(command, tmp_path, recwarn):
    (tmp_path / "file").touch()
    folder = tmp_path / "file/sweep"
    told = command("task=image", "-m", "seed=1,2", f"hydra.sweep.dir={folder}")  # a flag between two overrides
    assert "cannot be written (Not a directory); name another" in told
    assert not [each for each in recwarn if "Watch" in str(each.message)]


def test_a_damaged_record_of_a_failure_hides_no_other(tmp_path, capsys):
    for name, text in (("0", "{"), ("1", '{"overrides": ["seed=2"], "error": "so it is"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "failed.json").write_text(text)
    assert len(sweep.report(tmp_path, is_done=True)) == 2
    told = capsys.readouterr().out
    assert f"failed.json is damaged; with a resume the job runs again ({tmp_path}/0)" in told
    assert f"seed=2: so it is ({tmp_path}/1)" in told


def test_joblib_runs_jobs_in_parallel_and_they_share_the_cores(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / "sweep"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    words = ("seed=1,2", "depth=1,5000", "trainer=debug", *TINY)
    assert command("-m", *words, *launcher, f"hydra.sweep.dir={folder}") == 1
    assert results(folder).keys() == {"0", "2"}
    assert {path.parent.name for path in folder.glob("*/failed.json")} == {"1", "3"}
    assert json.loads((folder / "0/run.json").read_text())["threads"] == max(1, joblib.cpu_count() // 2)
    done = times(folder / "0")
    assert command(f"resume={folder}", "hydra/launcher=basic") == 1
    assert times(folder / "0") == done


@pytest.mark.slow
def test_a_signal_ends_jobs_that_run_side_by_side(tmp_path):
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    words = ("seed=1,2", "depth=1", "trainer.max_epochs=100000", *TINY, f"hydra.sweep.dir={tmp_path}")
    start = [sys.executable, "train.py", "-m", *words, *launcher]
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not all((tmp_path / f"{i}/checkpoints/last.ckpt").exists() for i in (0, 1)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"Continue with: python train.py resume={tmp_path}" in out
    for i in (0, 1):  # no job runs on unseen
        with FileLock(tmp_path / f"{i}/.lock", timeout=20):
            pass


@pytest.mark.slow
def test_jobs_run_by_submitit(command, tmp_path):
    folder = tmp_path / "sweep"
    words = ("seed=1,2", "depth=1,5000", "trainer=debug", *TINY, "hydra/launcher=submitit_local")
    assert command("-m", *words, f"hydra.sweep.dir={folder}") == 1
    assert results(folder).keys() == {"0", "2"}
    assert {path.parent.name for path in folder.glob("*/failed.json")} == {"1", "3"}


def test_a_search_finds_the_best_trial_and_resumes(command, tmp_path, capsys):
    words = ("sweep=search", "hydra.sweeper.sampler.n_startup_trials=1", "depth=1", "trainer=debug", *TINY)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("-m", *words, "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={whole}") == 0
    assert command("-m", *words, "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={parts}") == 0
    done = times(parts / "0") | times(parts / "1")
    assert command(f"resume={parts}", "hydra.sweeper.n_trials=3") == 0
    assert times(parts / "0") | times(parts / "1") == done
    assert results(parts) == results(whole)
    found = [OmegaConf.load(folder / "optimization_results.yaml") for folder in (parts, whole)]
    assert found[0] == found[1]
    assert found[0].best_value == max(metrics["val/accuracy"] for metrics in results(whole).values())


def master(*words):
    """The configuration that Hydra composes for a sweep before its jobs."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=["hydra.mode=MULTIRUN", *words], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


@pytest.fixture
def _no_leftover():
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.usefixtures("_no_leftover")
@pytest.mark.parametrize("name", options("sweep"))
def test_every_value_of_a_sweep_composes_binds_and_passes_the_checks(configure, name):
    cfg = master(f"sweep={name}", "run_dir=x")
    if "Optuna" in cfg.hydra.sweeper._target_:
        fixed = [f"{key}={low}" for key, low in (("task.optimizer.lr", 1e-4), ("dropout", 0), ("model.forget_bias", 3))]
        assert {word.split("=")[0] for word in fixed} == set(cfg.hydra.sweeper.params)
        values = [[word] for word in fixed]
    else:
        parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in cfg.hydra.sweeper.params.items()])
        values = [
            [f"{word.get_key_element()}={value}" for value in word.sweep_string_iterator()]
            if word.is_sweep_override()
            else [word.input_line]
            for word in parsed
        ]
    for number in range(max(map(len, values))):
        job = configure(f"sweep={name}", *(column[number % len(column)] for column in values))
        bind(OmegaConf.to_container(job, resolve=True, throw_on_missing=True))
        config_checks.check(job)


@pytest.mark.usefixtures("_no_leftover")
def test_a_search_maximises_or_minimises_by_the_tasks_metric():
    found = {}
    for task in options("task"):
        cfg = master(f"task={task}", "sweep=search", "run_dir=x")
        found[cfg.callbacks.best.mode] = cfg.hydra.sweeper.direction
    assert found == {"max": "maximize", "min": "minimize"}


@pytest.mark.usefixtures("_no_leftover")
def test_the_command_line_overrides_a_sweep(configure):
    cfg = master("sweep=figure5", "data.vectors=null", "epochs=3", "run_dir=x")
    words = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    parse = OverridesParser.create().parse_overrides
    assert len(BasicSweeper.split_arguments(parse(words), None)[0]) == 4 * 4 * 2 * 3
    (jobs,) = BasicSweeper.split_arguments(parse([*words, "sweep=figure5", "depth=5", "data.vectors=null"]), None)
    assert len(jobs) == 4 * 4 * 3
    job = configure(*jobs[-1])
    assert (job.choices.data, job.choices.ablation, job.depth) == ("trec", ["no_scaling"], 5)
    assert (job.data.fold, job.data.vectors) == (2, None)

"""Sweeps: a failed job does not stop the others and is listed at the end; `resume=` runs the missing jobs."""

import contextlib
import gc
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from tasks.run import config_checks, errors, files, run_dir
from tasks.run.config_hints import key_of

# A resume may change how the jobs run, and the length of a search, but not the jobs.
FREE = ("hydra/launcher", "hydra.launcher.", "hydra.sweeper.n_trials")
# Words that a resume, of the sweep or of one job, adds.
OWN = ("resume", "run_dir", "hydra.sweep.dir", "hydra.mode")
# What reading a damaged JSON file may raise.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class SweepCallback(Callback):
    """Records the sweep's words in sweep.json of its folder, for a resume, and locks the folder.

    SIGTERM and SIGUSR1 end the sweep, as Ctrl-C does; during training, preemption.py handles them first.
    """

    folder: ClassVar[Path | None] = None  # of the sweep that this process started
    lock: ClassVar[FileLock | None] = None
    is_new: ClassVar[bool] = False  # not resumed
    handlers: ClassVar[dict[int, Any]] = {}  # of the signals, before the sweep

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Hydra turns an Exception of a callback into a warning, but not SystemExit.
        folder = Path(config.hydra.sweep.dir).absolute()
        SweepCallback.lock = FileLock(folder / ".lock", timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            SweepCallback.lock.acquire()
        except Timeout:
            sys.exit(f"error: Another process runs the sweep in {folder}; wait for it, or name another folder.")
        except OSError as error:
            sys.exit(
                f"error: hydra.sweep.dir={folder} cannot be written ({error.strerror}); name another with "
                "hydra.sweep.dir=FOLDER."
            )
        if os.environ.get("WANDB_RUN_ID") and "wandb" in (config.get("loggers") or {}):
            sys.exit(
                f"error: WANDB_RUN_ID={os.environ['WANDB_RUN_ID']} would put all jobs into one run of wandb; type "
                "unset WANDB_RUN_ID, or leave out -m"
            )
        SweepCallback.is_new = not config.resume
        if SweepCallback.is_new:
            if (folder / "sweep.json").exists():
                sys.exit(
                    f"error: hydra.sweep.dir={folder} already contains a sweep. Continue with resume={folder}, or name "
                    "another folder."
                )
            words = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
            words = [word for word in words if key_of(word) not in OWN]
            try:
                files.write_text(folder / "sweep.json", json.dumps({"overrides": words}, indent=2) + "\n")
            except OSError as error:
                sys.exit(f"error: {errors.explain_failure(error)}.")
        SweepCallback.folder = folder
        for number in (signal.SIGTERM, signal.SIGUSR1):
            old = signal.signal(number, lambda received, _: sys.exit(128 + received))
            SweepCallback.handlers.setdefault(number, old)
        # The processes of a launcher then find this project from any folder.
        paths = [str(config_checks.ROOT), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def is_job() -> bool:
    """Whether this run is a job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def job(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Run one job; an error is written to failed.json in its folder, and the sweep goes on.

    In a resumed sweep, and if a cluster restarts the job: a finished job returns its recorded value, and a job with a
    checkpoint resumes.
    """
    import torch

    config = HydraConfig.get()
    folder = Path(config.runtime.output_dir)
    failure = folder / "failed.json"
    words = [word for word in config.overrides.task if key_of(word) not in OWN]
    before = read_job(folder)
    if cfg.resume and before not in (None, words):
        # It ends the whole sweep; an Exception would end only this job.
        sys.exit(
            f"error: {folder} holds the job {' '.join(before or [])}, but the sweep's job is now {' '.join(words)}: "
            "conf/ has changed since, or a search has no hydra.sweeper.sampler.seed. Start a new sweep."
        )
    if cfg.resume or before == words:
        if (outcome := read_result(folder)) is not None:
            failure.unlink(missing_ok=True)
            print(f"finished already: {folder}")
            return outcome["metrics"].get(outcome["monitor"])
        # A search chooses its next trial by the results so far: a failed trial stays failed.
        if failure.exists() and "optuna" in str(config.runtime.choices["hydra/sweeper"]):
            print(f"failed already: {folder}")
            return None
        cfg.resume = str(folder) if (folder / "checkpoints/last.ckpt").exists() else None
    failure.unlink(missing_ok=True)
    try:
        if Path(cfg.run_dir).absolute() != folder.absolute():
            raise ValueError("run_dir= is for one run; the jobs of a sweep have folders below hydra.sweep.dir=FOLDER")
        return run(cfg)
    except Exception as error:
        record = {"overrides": words, "error": errors.explain(error), "traceback": traceback.format_exc()}
        print(f"failed: {record['error']}")
        try:
            folder.mkdir(parents=True, exist_ok=True)  # a refused run removes its empty folder
            files.write_text(failure, json.dumps(record, indent=2) + "\n")
        except OSError as full:
            print(f"{errors.explain_failure(full)}; the list of failures will lack this job, and a resume runs it")
        return None
    finally:
        # Free the memory for the next job in this process.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def read_job(folder: Path) -> list[str] | None:
    """The words of the job that began or failed in a folder; None without one."""
    for name in ("run.json", "failed.json"):
        with contextlib.suppress(OSError, ValueError):  # a damaged record is written anew
            return [word for word in run_dir.read_recorded_words(folder / name) if key_of(word) not in OWN]
    return None


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of metrics.json of a finished job; None for other jobs, and if the file is damaged."""
    path = folder / "metrics.json"
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        float(outcome["metrics"].get(outcome["monitor"], 0.0))
        return dict(outcome)
    except FileNotFoundError:
        return None
    except DAMAGED:
        print(f"{path} is damaged: the job is tested again")
        return None


def folder_to_resume(arguments: list[str]) -> Path | None:
    """The folder in resume=FOLDER if it holds a sweep; None for a run's folder, and without resume=."""
    names = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    folder = Path(names[0].strip("'\"")).absolute() if names else None
    return folder if folder and (folder / "sweep.json").is_file() else None


def add_recorded_words(folder: Path, arguments: list[str]) -> list[str]:
    """The recorded words of a sweep and those of the command, which may change only how the jobs run."""
    words = run_dir.read_recorded_words(folder / "sweep.json")
    new = [word for word in arguments if key_of(word) != "resume" and word not in ("-m", "--multirun", *words)]
    for word in new:
        if not key_of(word).startswith(FREE):
            raise ValueError(
                f"resume={folder} goes on with the same sweep, and {word} would change it. Leave that out, or start "
                "a new sweep; only hydra/launcher=, hydra.launcher.* and a search's hydra.sweeper.n_trials may differ."
            )
    if any(key_of(word) == "hydra/launcher" for word in new):
        words = [word for word in words if not key_of(word).startswith(("hydra/launcher", "hydra.launcher."))]
    words = [word for word in words if key_of(word) not in map(key_of, new)]
    quoted = run_dir.quote(folder)
    return ["-m", *words, *new, f"resume={quoted}", f"hydra.sweep.dir={quoted}"]


@contextlib.contextmanager
def report_failures() -> Iterator[None]:
    """When a sweep ends, for whatever reason, list its failed jobs and how to resume; they give exit status 1."""
    SweepCallback.folder = SweepCallback.lock = None
    failed: list[Path] = []
    is_done = False
    try:
        yield
        is_done = True
    finally:
        while SweepCallback.handlers:
            signal.signal(*SweepCallback.handlers.popitem())
        if folder := SweepCallback.folder:
            if any(folder.glob("*/")):
                failed = report(folder, is_done)
            elif SweepCallback.is_new:  # refused before its first job
                for name in ("sweep.json", "multirun.yaml"):
                    (folder / name).unlink(missing_ok=True)
        if SweepCallback.lock is not None and SweepCallback.lock.is_locked:
            run_dir.release(SweepCallback.lock)
    if failed:
        sys.exit(1)


def report(folder: Path, is_done: bool) -> list[Path]:
    """Print the state of a sweep; returns the failed jobs."""
    failed = sorted(folder.rglob("failed.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    # evaluate.py may have written another metrics.json below a job.
    done = {path.parent for path in folder.rglob("config.yaml") if path.with_name("metrics.json").exists()}
    early = "" if is_done else ", and it stopped early"
    print(f"Sweep {folder}: finished {len(done - {path.parent for path in failed})}, failed {len(failed)}{early}.")
    for path in failed:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            message = record["error"].splitlines() or [""]
            print(f"  {' '.join(record['overrides'])}: {message[0]} ({path.parent})")
        except DAMAGED:
            print(f"  failed.json is damaged; with a resume the job runs again ({path.parent})")
    if failed or not is_done:
        print(f"Continue with: python train.py resume={shlex.quote(str(folder))}")
    return failed

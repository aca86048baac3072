"""Sweeps: one failed job stops no other, a list at the end tells which failed, and a sweep that stopped goes on."""

import contextlib
import gc
import json
import multiprocessing
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

from tasks.run import config_checks, errors, run_dir

# Words of a resumed sweep that say how it runs and not what; a search may also get longer.
FREE = ("hydra/launcher", "hydra.launcher.", "hydra.sweeper.n_trials")
# Words that differ between the calls of a sweep, or where one of its jobs is resumed as a run.
OWN = ("resume", "run_dir", "hydra.sweep.dir", "hydra.mode")


def key(word: str) -> str:
    return word.lstrip("+~").split("=")[0]


class SweepCallback(Callback):
    """Keeps the words of a sweep in sweep.json of its folder, for a resume, and the folder for one process.

    A signal ends the sweep. Between jobs nobody else hears it; a training puts its own handler in this one's place.
    joblib's processes, where jobs run side by side, are handed it: each ends its training with a checkpoint, and begins
    no other job.
    """

    folder: ClassVar[Path | None] = None  # of the sweep that this process has started
    lock: ClassVar[FileLock | None] = None
    is_new: ClassVar[bool] = False  # rather than resumed
    before: ClassVar[dict[signal.Signals, Any]] = {}  # what heard the signals
    by_joblib: ClassVar[bool] = False  # jobs run in its processes
    is_busy: ClassVar[bool] = False  # with a job, in a process of joblib's
    heard: ClassVar[int | None] = None  # the signal that this process was told to stop by

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from tasks.run import files  # not at the top: it imports torch, and Hydra imports this file for every command

        # An Exception would become a warning here.
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
                    f"error: hydra.sweep.dir={folder} holds a sweep already. Go on with resume={folder}, or name "
                    "another folder."
                )
            words = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
            words = [word for word in words if key(word) not in OWN]
            try:
                files.write_text(folder / "sweep.json", json.dumps({"overrides": words}, indent=2) + "\n")
            except OSError as error:
                sys.exit(f"error: {errors.explain_failure(error)}.")
        SweepCallback.folder = folder
        SweepCallback.by_joblib = runs_by_joblib(config.hydra.runtime.choices)
        numbers = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), signal.SIGINT)
        SweepCallback.before = {number: signal.getsignal(number) for number in numbers}
        for number, before in SweepCallback.before.items():
            if before != signal.SIG_IGN:
                signal.signal(number, SweepCallback.hear)
        # A launcher's processes find this project from any folder.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(config_checks.ROOT), os.environ.get("PYTHONPATH")])
        )

    @staticmethod
    def hear(number: int, _frame: Any) -> None:
        """In the process of the sweep: hand it to joblib's, which then end; without such, or again, end at once."""
        others = multiprocessing.active_children() if SweepCallback.by_joblib and SweepCallback.heard is None else []
        SweepCallback.heard = number
        for process in others:
            with contextlib.suppress(OSError):  # it has just ended
                os.kill(process.pid or 0, signal.SIGTERM)
        if not others:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)

    @staticmethod
    def hear_apart(number: int, _frame: Any) -> None:
        """In one of joblib's processes, within a job, but not in its training."""
        SweepCallback.heard = number
        if SweepCallback.is_busy:
            sys.exit(128 + number)


def runs_by_joblib(choices: Any) -> bool:
    return str(choices["hydra/launcher"]) == "joblib"


def is_job() -> bool:
    """Whether this run is one of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def job(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Run one job; its failure is kept in its folder and stops no other job.

    In a resumed sweep a finished job gives the value that it had, and one with a checkpoint goes on from there; so does
    one that a cluster's scheduler has started again.
    """
    import torch

    from tasks.run import files

    config = HydraConfig.get()
    folder = Path(config.runtime.output_dir)
    failure = folder / "failed.json"
    if by_joblib := runs_by_joblib(config.runtime.choices):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, SweepCallback.hear_apart)
        if SweepCallback.heard is not None:
            return None
    words = [word for word in config.overrides.task if key(word) not in OWN]
    before = words_before(folder)
    if cfg.resume and before not in (None, words):
        # No Exception, which would be this job's alone.
        sys.exit(
            f"error: {folder} holds the job {' '.join(before or [])}, where now {' '.join(words)} is due: conf/ has "
            "changed since, or a search has no hydra.sweeper.sampler.seed. Start a new sweep."
        )
    if cfg.resume or before == words:
        if (outcome := read_result(folder)) is not None:
            failure.unlink(missing_ok=True)
            print(f"finished already: {folder}")
            return outcome["metrics"].get(outcome["monitor"])
        # What a search tries next depends on what it has seen: a trial that failed stays failed.
        if failure.exists() and "optuna" in str(config.runtime.choices["hydra/sweeper"]):
            print(f"failed already: {folder}")
            return None
        cfg.resume = str(folder) if (folder / "checkpoints/last.ckpt").exists() else None
    failure.unlink(missing_ok=True)
    SweepCallback.is_busy = by_joblib
    try:
        if Path(cfg.run_dir).absolute() != folder.absolute():
            raise ValueError("run_dir= is for one run; the jobs of a sweep have folders below hydra.sweep.dir=FOLDER")
        return run(cfg)
    except SystemExit as ended:
        # joblib would kill its other processes, which are still saving.
        if not by_joblib or not isinstance(ended.code, int) or ended.code <= 128:
            raise
        SweepCallback.heard = ended.code - 128
        return None
    except Exception as error:
        kept = {"overrides": words, "error": errors.explain(error), "traceback": traceback.format_exc()}
        print(f"failed: {kept['error']}")
        try:
            folder.mkdir(parents=True, exist_ok=True)  # a run that is refused takes its empty folder away
            files.write_text(failure, json.dumps(kept, indent=2) + "\n")
        except OSError as refused:
            print(
                f"{errors.explain_failure(refused)}; so no list will have this failure, and a resume runs the job again"
            )
        return None
    finally:
        SweepCallback.is_busy = False
        # The next job of this process gets the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def words_before(folder: Path) -> list[str] | None:
    """The words of the job that a folder holds, which began or failed; None of a folder that holds none."""
    for name in ("run.json", "failed.json"):
        with contextlib.suppress(OSError, ValueError):  # what is damaged is written anew
            return [word for word in run_dir.read_recorded_words(folder / name) if key(word) not in OWN]
    return None


def read_result(folder: Path) -> dict[str, Any] | None:
    """What metrics.json says of a finished job; without it, or where it is damaged, the job is not finished."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        float(outcome["metrics"].get(outcome["monitor"], 0.0))
        return dict(outcome)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        print(f"{path} is damaged: the job is tested again")
        return None


def resumes_sweep(arguments: list[str]) -> bool:
    return (folder_of(arguments) / "sweep.json").is_file()


def folder_of(arguments: list[str]) -> Path:
    named = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    return Path(named[0].strip("'\"")).absolute() if named else Path("/nonexistent")


def add_recorded_words(arguments: list[str]) -> list[str]:
    """The words of the sweep in `resume=FOLDER`, with those given now, which may change only how it runs."""
    folder = folder_of(arguments)
    words = run_dir.read_recorded_words(folder / "sweep.json")
    given = [word for word in arguments if key(word) != "resume" and word not in ("-m", "--multirun", *words)]
    for word in given:
        if not key(word).startswith(FREE):
            raise ValueError(
                f"resume={folder} goes on with the same sweep, and {word} would change it. Leave that out, or start "
                "a new sweep; only hydra/launcher=, hydra.launcher.* and a search's hydra.sweeper.n_trials may differ."
            )
    if any(key(word) == "hydra/launcher" for word in given):
        words = [word for word in words if not key(word).startswith(("hydra/launcher", "hydra.launcher."))]
    words = [word for word in words if key(word) not in map(key, given)]
    quoted = "'" + str(folder).replace("'", "\\'") + "'"
    return ["-m", *words, *given, f"resume={quoted}", f"hydra.sweep.dir={quoted}"]


@contextlib.contextmanager
def report_failures() -> Iterator[None]:
    """When a sweep has ended, and however it has, tell what failed and how to go on; failures are exit status 1."""
    SweepCallback.folder = SweepCallback.lock = SweepCallback.heard = None
    failed: list[Path] = []
    is_done = False
    try:
        yield
        is_done = SweepCallback.heard is None
    finally:
        if folder := SweepCallback.folder:
            for number, before in SweepCallback.before.items():
                signal.signal(number, before)
            if any(folder.glob("*/")):
                failed = report(folder, is_done)
            elif SweepCallback.is_new:  # refused as a whole
                for name in ("sweep.json", "multirun.yaml"):
                    (folder / name).unlink(missing_ok=True)
        if SweepCallback.lock is not None and SweepCallback.lock.is_locked:
            # Before it is released: another process may hold it from then on.
            Path(SweepCallback.lock.lock_file).unlink(missing_ok=True)
            SweepCallback.lock.release()
            run_dir.remove_if_empty(Path(SweepCallback.lock.lock_file).parent)
    if SweepCallback.heard is not None:
        sys.exit(128 + SweepCallback.heard)
    if failed:
        sys.exit(1)


def report(folder: Path, is_done: bool) -> list[Path]:
    """Print how a sweep stands; returns the jobs that failed."""
    failed = sorted(folder.rglob("failed.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    # Below a job may lie what evaluate.py has written.
    done = {path.parent for path in folder.rglob("config.yaml") if path.with_name("metrics.json").exists()}
    early = "" if is_done else ", and it stopped early"
    print(f"Sweep {folder}: finished {len(done - {path.parent for path in failed})}, failed {len(failed)}{early}.")
    for path in failed:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            message = kept["error"].splitlines() or [""]
            print(f"  {' '.join(kept['overrides'])}: {message[0]} ({path.parent})")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            print(f"  failed.json is damaged; with a resume the job runs again ({path.parent})")
    if failed or not is_done:
        print(f"Go on with: python train.py resume={shlex.quote(str(folder))}")
    return failed

"""Sweeps: one failed job stops no other, a list at the end tells which failed, and a sweep that stopped goes on."""

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

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from tasks import door, messages
from tasks.record import write_text

# Words of a resumed sweep that say how it runs and not what; a search may also get longer.
FREE = ("hydra/launcher", "hydra.launcher.", "hydra.sweeper.n_trials")
# Words that differ between the calls of a sweep, or where one of its jobs is resumed as a run.
OWN = ("resume", "run_dir", "hydra.sweep.dir", "hydra.mode")


def key(word: str) -> str:
    return word.lstrip("+~").split("=")[0]


class Watch(Callback):
    """Keeps the words of a sweep in sweep.json of its folder, for a resume, and the folder for one process."""

    folder: ClassVar[Path | None] = None  # of the sweep that this process has started
    lock: ClassVar[FileLock | None] = None
    before: ClassVar[Any] = None  # what heard SIGTERM

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # An Exception would become a warning here.
        folder = Path(config.hydra.sweep.dir).absolute()
        Watch.lock = FileLock(folder / ".lock", timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Watch.lock.acquire()
        except Timeout:
            sys.exit(f"error: Another process runs the sweep in {folder}; wait for it, or name another folder.")
        except OSError as error:
            sys.exit(
                f"error: hydra.sweep.dir={folder} cannot be written ({error.strerror}); name another with "
                "hydra.sweep.dir=FOLDER."
            )
        if not config.resume:
            if (folder / "sweep.json").exists():
                sys.exit(
                    f"error: hydra.sweep.dir={folder} holds a sweep already. Go on with resume={folder}, or name "
                    "another folder."
                )
            words = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
            words = [word for word in words if key(word) not in OWN]
            write_text(folder / "sweep.json", json.dumps({"overrides": words}, indent=2) + "\n")
        Watch.folder = folder
        # Between jobs, and where others run them, nobody hears it; a training puts its own in this one's place.
        Watch.before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        # A launcher's processes find this project from any folder.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(door.ROOT), os.environ.get("PYTHONPATH")]))


def is_job() -> bool:
    """Whether this run is one of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def job(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Run one job; its failure is kept in its folder and stops no other job.

    In a resumed sweep a finished job gives the value that it had, and one with a checkpoint goes on from there.
    """
    config = HydraConfig.get()
    folder = Path(config.runtime.output_dir)
    failure = folder / "failed.json"
    words = [word for word in config.overrides.task if key(word) not in OWN]
    if cfg.resume:
        refuse_another(words, folder)
        if (folder / "metrics.json").exists():
            failure.unlink(missing_ok=True)
            print(f"finished already: {folder}")
            return finished(folder)
        # What a search tries next depends on what it has seen: a trial that failed stays failed.
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
        kept = {"overrides": words, "error": messages.explain(error), "traceback": traceback.format_exc()}
        folder.mkdir(parents=True, exist_ok=True)  # a run that is refused takes its empty folder away
        write_text(failure, json.dumps(kept, indent=2) + "\n")
        print(f"failed: {kept['error']}")
        return None
    finally:
        # The next job of this process gets the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def refuse_another(words: list[str], folder: Path) -> None:
    """End a resumed sweep whose jobs are not those that it had, before it takes one's result for another's."""
    record = folder / "run.json"
    if record.exists():
        before = [word for word in door.recorded(record) if key(word) not in OWN]
        if before != words:
            # No Exception, which would be this job's alone.
            sys.exit(
                f"error: {folder} holds the job {' '.join(before)}, where now {' '.join(words)} is due: conf/ has "
                "changed since, or a search has no hydra.sweeper.sampler.seed. Start a new sweep."
            )


def finished(folder: Path) -> float | None:
    path = folder / "metrics.json"
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        value = outcome["metrics"].get(outcome["monitor"])
        return None if value is None else float(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f"error: {path} is damaged; delete it, and the job is tested again.")


def is_resumed(arguments: list[str]) -> bool:
    return (folder_of(arguments) / "sweep.json").is_file()


def folder_of(arguments: list[str]) -> Path:
    named = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    return Path(named[0].strip("'\"")).absolute() if named else Path("/nonexistent")


def resumed(arguments: list[str]) -> list[str]:
    """The words of the sweep in `resume=FOLDER`, with those given now, which may change only how it runs."""
    folder = folder_of(arguments)
    words = door.recorded(folder / "sweep.json")
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
def told() -> Iterator[None]:
    """When a sweep has ended, and however it has, tell what failed and how to go on; failures are exit status 1."""
    Watch.folder = Watch.lock = None
    failed: list[Path] = []
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if folder := Watch.folder:
            signal.signal(signal.SIGTERM, Watch.before)
            if any(folder.glob("*/")):
                failed = report(folder, is_done)
            else:  # refused as a whole
                for name in ("sweep.json", "multirun.yaml"):
                    (folder / name).unlink(missing_ok=True)
        if Watch.lock is not None and Watch.lock.is_locked:
            Watch.lock.release()
            Path(Watch.lock.lock_file).unlink(missing_ok=True)
            door.remove_if_empty(Path(Watch.lock.lock_file).parent)
    if failed:
        sys.exit(1)


def report(folder: Path, is_done: bool) -> list[Path]:
    """Print how a sweep stands; returns the jobs that failed."""
    finished = sum(1 for _ in folder.rglob("metrics.json"))
    failed = sorted(folder.rglob("failed.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    early = "" if is_done else ", and it stopped early"
    print(f"Sweep {folder}: finished {finished}, failed {len(failed)}{early}.")
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

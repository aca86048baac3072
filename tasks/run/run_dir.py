"""The folder of a run: opened, locked, and checked before a resume."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks.run import distributed, files

# Where classes and functions lie now that the records of earlier versions name elsewhere.
MOVED = {
    "tasks.average.Average": "tasks.run.checkpoint_averaging.Average",
    "tasks.clock.Clock": "tasks.run.throughput.ThroughputMonitor",
    "tasks.dashboard.Wandb": "tasks.run.wandb_logger.Wandb",
    "tasks.interruption.Interruption": "tasks.run.preemption.Interruption",
    "tasks.newbob.newbob": "tasks.modules.newbob.newbob",
    "tasks.record.AtomicCheckpoints": "tasks.run.checkpoints.AtomicCheckpoints",
    "tasks.record.Checkpoint": "tasks.run.checkpoints.Checkpoint",
    "tasks.record.MetricsFile": "tasks.run.metrics.MetricsFile",
    "tasks.sweep.Watch": "tasks.run.sweep.SweepCallback",
}


def rename_moved(text: str) -> str:
    """The text of a record with today's names of what has moved."""
    for old, new in MOVED.items():
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", new, text)
    return text


@contextlib.contextmanager
def open_run_dir(cfg: DictConfig) -> Iterator[Path]:
    """The run's folder, made, writable, and this process's alone; what a run has recorded in it is not overwritten.

    Of several processes the first one sees to that, for all.
    """
    folder = Path(cfg.run_dir)
    if distributed.rank():
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"Another process is training in run_dir={folder}; wait for it, or name another run_dir."
        ) from None
    except OSError as error:
        raise PermissionError(
            f"run_dir={folder} cannot be written ({error.strerror}); name another with run_dir=FOLDER."
        ) from error
    try:
        if cfg.resume:
            check_resume(cfg, folder)
        elif (folder / "checkpoints/last.ckpt").exists() or (folder / "metrics.json").exists():
            raise FileExistsError(
                f"run_dir={folder} holds a run already. Go on with resume={folder}, or name another run_dir."
            )
        files.remove_leftovers(folder)
        yield folder
    finally:
        # Before it is released: another process may hold it from then on.
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        remove_if_empty(folder)


def check_resume(cfg: DictConfig, folder: Path) -> None:
    """Refuse to go on with a damaged run or another experiment; print what else has changed."""
    from tasks.run import checkpoints

    last = folder / "checkpoints/last.ckpt"
    if not last.exists():
        raise FileNotFoundError(
            f"resume={folder}: it has no checkpoints/last.ckpt, so it stopped before its first epoch ended. "
            f"Start it anew: the same command without resume, with run_dir={folder}."
        )
    state = checkpoints.read_checkpoint(last)
    try:
        before = OmegaConf.create(rename_moved((folder / "config.yaml").read_text(encoding="utf-8")))
        OmegaConf.resolve(before)
        if not OmegaConf.is_dict(before) or "run_dir" not in before:
            raise ValueError("config.yaml has no run_dir")
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"resume={folder}: damaged ({error}); use a copy of the folder, or start a new run."
        ) from error
    then, now = len(state.get("processes", [state])), distributed.world_size()
    if then != now:
        raise ValueError(
            f"resume={folder} was trained by {then} processes, and these are {now}: each goes on with its own part of "
            f"the data. Type {f'trainer=ddp trainer.devices={then}' if then > 1 else 'trainer=default'}, or as many "
            "machines as then."
        )
    # A checkpoint between two validations of an epoch counts the epoch that is not done.
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done, wanted = state["epoch"] + progress["is_last_batch"], cfg.trainer.max_epochs
    if wanted < done:
        raise ValueError(
            f"trainer.max_epochs={wanted} lies below the {done} epochs that resume={folder} has trained; "
            f"type for example trainer.max_epochs={done + 1}"
        )
    # What a run may be given anew; the optimiser's settings are not among it, for the checkpoint holds them.
    free = ("epochs", "paper", "trainer.", "callbacks.", "loggers.", "data.root", "data.cache", "run_dir")
    for key, old, new in changes(before, cfg):
        # What only names the folder is no change, a list repeats what has keys of its own, the terminal sets the bar.
        moved = str(old).replace(str(before.run_dir), cfg.run_dir) == str(new)
        repeated = key in ("trainer.callbacks", "trainer.logger", "choices.ablation")
        if moved or repeated or key in ("resume", "trainer.enable_progress_bar"):
            continue
        is_kind_of_mean = key in ("callbacks.average.of", "callbacks.average.monitor", "callbacks.average.mode")
        if is_kind_of_mean or not key.startswith(free):
            raise ValueError(
                f"resume={folder} goes on with the same experiment, but {key} was {old} and is {new}. Leave that "
                "out, or start a new run. More epochs: trainer.max_epochs=N."
            )
        print(f"resumed with {key}: {old} -> {new}")
    if wanted == done:
        print(f"All {done} epochs are trained, only the test is left. To train longer: trainer.max_epochs=N.")


def add_recorded_words(arguments: list[str]) -> list[str]:
    """Put the overrides of the run in `resume=FOLDER` before those given now, and go on in its folder."""
    folders = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    if not folders:
        return arguments
    folder = Path(folders[0].strip("'\"")).resolve()
    if len(folders) > 1 or {"-m", "--multirun"} & set(arguments):
        raise ValueError("resume goes on with one run: give it once, and without -m.")
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"resume={folder} is no run folder (it has no run.json); runs lie below runs/.")
    if any(word.startswith(("run_dir=", "hydra.run.dir=")) for word in arguments):
        raise ValueError(f"resume={folder} goes on in that folder: leave run_dir out.")
    overrides = read_recorded_words(folder / "run.json")
    quoted = "'" + str(folder).replace("'", "\\'") + "'"
    own = ("resume=", "run_dir=", "hydra.run.dir=")
    # A plus is right once: what it adds is there already, if it is typed again.
    given = [word for word in arguments if word[:1] != "+" or word not in overrides]
    kept = [word for word in [*overrides, *given] if not word.startswith(own)]
    return [*kept, f"resume={quoted}", f"run_dir={quoted}", f"hydra.run.dir={quoted}"]


def read_recorded_words(path: Path) -> list[str]:
    """The overrides that run.json or sweep.json keeps."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["overrides"]
        if not isinstance(words, list) or not all(isinstance(word, str) and word[:1] != "-" for word in words):
            raise ValueError("overrides are a list of KEY=VALUE")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; use a copy of the folder, or start anew.") from error
    return [rename_moved(word) for word in words]


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {dotted key: value}."""
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {key: value for name in node for key, value in leaves(node[name], f"{prefix}{name}.").items()}


def changes(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """The keys whose values differ, as (dotted key, old, new)."""
    old, new = (leaves(OmegaConf.to_container(cfg, resolve=True)) for cfg in (before, after))
    return [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what is not empty, or not there, is not removed
        folder.rmdir()

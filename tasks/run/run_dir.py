"""The folder of a run: create and lock it, check a resume, and restore the words of its command."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks.run import distributed, files

# Dotted paths in the records of earlier versions, and where the classes and functions are now.
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
    """Replace the dotted paths of earlier versions in a record."""
    for old, new in MOVED.items():
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", new, text)
    return text


def find_checkpoint(checkpoint: str | Path) -> Path:
    """A .ckpt file, or in the folder of a run the checkpoint that its test used."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        paths = [path / "checkpoints" / name for name in ("average.ckpt", "best.ckpt", "last.ckpt")]
        path = next((each for each in paths if each.is_file()), paths[1])
        if path == paths[2]:
            print(
                f"{paths[1]} does not exist, because no validation has ended, so {path} is used. If the run stopped "
                f"early, continue it: python train.py resume={checkpoint}",
                file=sys.stderr,
            )
        elif not path.is_file() and (path.parent.parent / "run.json").is_file():
            raise FileNotFoundError(
                f"checkpoint={checkpoint} has no checkpoint yet, because no validation has ended. Start the run again: "
                f"the same command, with run_dir={checkpoint}"
            )
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint={checkpoint} is neither a run's folder nor a .ckpt (there is no {path}); runs lie below runs/"
        )
    return path


@contextlib.contextmanager
def open_run_dir(cfg: DictConfig) -> Iterator[Path]:
    """Create and lock the run's folder; refuse a folder that holds another run, and check a resume.

    Of several processes, only the first does so.
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
                f"run_dir={folder} already contains a run. Continue with resume={folder}, or name another run_dir."
            )
        files.remove_leftovers(folder)
        yield folder
    finally:
        release(lock)


def release(lock: FileLock) -> None:
    """Release the lock of a folder, and remove the folder if it is empty."""
    path = Path(lock.lock_file)
    path.unlink(missing_ok=True)  # before the release: then another process may lock it
    lock.release()
    remove_if_empty(path.parent)


def check_resume(cfg: DictConfig, folder: Path) -> None:
    """Refuse to resume a damaged run or another experiment; print the changes that a resume may make."""
    from tasks.run import checkpoints

    last = folder / "checkpoints/last.ckpt"
    if not last.exists():
        raise FileNotFoundError(
            f"resume={folder}: it has no checkpoints/last.ckpt, so it stopped before its first epoch ended. "
            f"Start it again: the same command without resume, with run_dir={folder}."
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
            f"the data. Type {f'trainer=ddp trainer.devices={then}' if then > 1 else 'trainer=default'}, or use as "
            "many machines as before."
        )
    # In a checkpoint within an epoch, `epoch` is the one in progress.
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done, wanted = state["epoch"] + progress["is_last_batch"], cfg.trainer.max_epochs
    if wanted < done:
        raise ValueError(
            f"trainer.max_epochs={wanted} is less than the {done} epochs that resume={folder} has trained; "
            f"type for example trainer.max_epochs={done + 1}"
        )
    # What a resume may change. The optimiser's settings come from the checkpoint.
    free = ("epochs", "paper", "trainer.", "callbacks.", "loggers.", "data.root", "data.cache", "run_dir")
    for key, old, new in changes(before, cfg):
        is_path_in_folder = str(old).replace(str(before.run_dir), cfg.run_dir) == str(new)
        # These lists repeat other keys, and the terminal decides about the bar.
        repeated = ("trainer.callbacks", "trainer.logger", "choices.ablation", "trainer.enable_progress_bar", "resume")
        if is_path_in_folder or key in repeated:
            continue
        fixed = ("callbacks.average.of", "callbacks.average.monitor", "callbacks.average.mode")
        if key in fixed or not key.startswith(free):
            raise ValueError(
                f"resume={folder} continues the same experiment, but {key} was {old} and is {new}. Leave that "
                "out, or start a new run. More epochs: trainer.max_epochs=N."
            )
        print(f"resumed with {key}: {old} -> {new}")
    if wanted == done:
        print(f"All {done} epochs are trained, only the test is left. To train longer: trainer.max_epochs=N.")


def add_recorded_words(arguments: list[str]) -> list[str]:
    """The words of a command with resume=FOLDER: those of the run in FOLDER first, then the new ones."""
    folders = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    if not folders:
        return arguments
    folder = Path(folders[0].strip("'\"")).resolve()
    if len(folders) > 1 or {"-m", "--multirun"} & set(arguments):
        raise ValueError("resume= continues one run: type it once, and without -m.")
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"resume={folder} is not a run folder (it has no run.json); runs lie below runs/.")
    if any(word.startswith(("run_dir=", "hydra.run.dir=")) for word in arguments):
        raise ValueError(f"resume={folder} goes on in that folder: leave run_dir out.")
    overrides = read_recorded_words(folder / "run.json")
    quoted = quote(folder)
    own = ("resume=", "run_dir=", "hydra.run.dir=")
    # Hydra refuses a repeated word with a plus.
    new = [word for word in arguments if word[:1] != "+" or word not in overrides]
    kept = [word for word in [*overrides, *new] if not word.startswith(own)]
    return [*kept, f"resume={quoted}", f"run_dir={quoted}", f"hydra.run.dir={quoted}"]


def quote(folder: Path) -> str:
    """The folder as a quoted value of a Hydra override."""
    return "'" + str(folder).replace("'", "\\'") + "'"


def read_recorded_words(path: Path) -> list[str]:
    """The overrides in run.json or sweep.json."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["overrides"]
        if not isinstance(words, list) or not all(isinstance(word, str) and word[:1] != "-" for word in words):
            raise ValueError("overrides must be a list of KEY=VALUE")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; use a copy of the folder, or start a new run.") from error
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
    with contextlib.suppress(OSError):  # it is not empty, or does not exist
        folder.rmdir()

"""What stands at a command's door: its options and its run folder are checked."""

import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks import imports, processes, wandb_options
from tasks.outlines import outline

ROOT = Path(__file__).parent.parent
# Key: lowest and highest value, example. An example with a point takes any number, one without only whole ones.
RANGES: dict[str, tuple[float, float, float]] = {
    "seed": (0, 2**32 - 1, 1),
    "depth": (1, 1000, 2),
    "width": (1, 100_000, 128),
    "dropout": (0, 0.999, 0.5),
    "epochs": (1, 10**6, 100),
    "data.batch_size": (1, 10**6, 32),
    "data.fold": (0, 9, 0),
    "data.min_count": (1, 10**6, 2),
    "data.unroll": (1, 10**6, 128),
    "data.eval_batch_size": (1, 10**6, 1),
    "data.eval_unroll": (1, 10**6, 128),
    "task.dropout": (0, 0.999, 0.5),
    "task.embedding_dropout": (0, 0.999, 0.5),
    "task.embedding_size": (1, 10**6, 128),
    "task.optimizer.lr": (0, 1e9, 0.001),
    "task.max_answer": (1, 10**6, 15),
    "task.beam": (1, 1000, 5),
    "task.length_penalty": (0, 100, 0.6),
    "task.label_smoothing": (0, 0.999, 0.1),
    "data.vocab_size": (1, 10**7, 32_000),
    "data.max_length": (1, 10**6, 100),
    "data.tokens_per_batch": (1, 10**9, 4096),
    "data.eval_tokens_per_batch": (1, 10**9, 4096),
    "task.tuned_words": (0, 10**9, 1000),
    "data.delay": (0, 10**4, 10),
    "data.segment": (1, 10**6, 20),
    "data.right": (0, 10**6, 20),
    "data.eval_frames_per_batch": (1, 10**9, 8000),
    "data.window": (1, 10**6, 1000),
    "data.seed": (0, 2**32 - 1, 1234),
    "task.frequency_masks": (0, 100, 2),
    "task.frequency_width": (0, 256, 8),
    "task.time_masks": (0, 100, 2),
    "task.time_width": (0, 1, 0.05),
    "task.colour": (0, 10, 0.5),
    "task.warp": (0, 0.9, 0.15),
    "data.frames_per_batch": (1, 10**9, 12_000),
    "data.volume": (0, 60, 20.0),
    "data.repeats": (1, 10_000, 2),
    "trainer.max_steps": (-1, 10**9, 400_000),
    "trainer.accumulate_grad_batches": (1, 10**6, 1),
    "trainer.max_epochs": (1, 10**6, 100),
}
# Options that name files or folders.
TEXTS = ("data.root", "data.cache", "data.path", "data.train", "data.val", "data.test", "data.vectors")

# Options of the library's layers that no task can use, and why.
LIBRARY = {
    "batch_first": "time comes first in every task",
    "nn_rnn_compatible_return": "the tasks take a state as sru.SRU gives it",
    "device": "the trainer chooses it, by trainer.accelerator",
    "dtype": "the trainer chooses it, by trainer.precision=64-true and the like",
    "transform_module": "a module cannot be typed",
    "custom_m": "a module cannot be typed",
    "amp_recurrence_fp16": "it has no effect",
}


def unusable(part: str, name: str) -> str | None:
    """What to say of an option that the class takes and no run can use; None of others."""
    if part == "model" and name in LIBRARY:
        return f"model.{name} is not for a run: {LIBRARY[name]}; leave out model.{name}"
    if part in ("callbacks.best", "callbacks.last") and name == "save_weights_only":
        return f"{part}.{name} is not for a run: a resume and the test need the whole checkpoint. Leave it out"
    if part == "trainer" and name in ("strategy", "num_nodes"):
        return f"trainer.{name} is for several processes: type trainer=ddp, and for example trainer.devices=2"
    return None


def check(cfg: DictConfig) -> None:
    """Refuse a value out of range, and an option that the class named by data, model or task does not take."""
    for key, (low, high, example) in RANGES.items():
        value = OmegaConf.select(cfg, key, default=example)
        kinds = (int, float) if isinstance(example, float) else (int,)
        if type(value) not in kinds or not low <= value <= high:
            kind = "a number" if isinstance(example, float) else "a whole number"
            raise ValueError(f"{key}={value} must be {kind}, {low} to {high}; type for example {key}={example}")
    processes.check(cfg)
    if "max_epochs" not in cfg.trainer:
        raise ValueError("trainer.max_epochs is missing, without which a run has no end; leave out ~trainer.max_epochs")
    both = OmegaConf.select(cfg, "bidirectional", default=False)
    if type(both) is not bool:
        raise ValueError(f"bidirectional={both} must be true or false")
    for stage in ("train", "val", "test"):
        limit = cfg.trainer[f"limit_{stage}_batches"]
        is_number = type(limit) in (int, float) and limit >= 0
        if limit is not None and (not is_number or (stage == "train" and not limit)):
            raise ValueError(f"trainer.limit_{stage}_batches={limit} must be a number above 0, or null for all")
    every, accumulated = cfg.trainer.val_check_interval, cfg.trainer.accumulate_grad_batches
    if not (type(every) is int and every > 1) and not (type(every) is float and 0 < every <= 1):
        raise ValueError(
            f"trainer.val_check_interval={every} must be a part of an epoch, above 0.0 and up to 1.0, or a whole "
            "number of batches, above 1; type for example trainer.val_check_interval=0.25"
        )
    if every != 1.0 and accumulated > 1 and every % accumulated:
        raise ValueError(
            f"trainer.val_check_interval={every} must be 1.0 or a multiple of trainer.accumulate_grad_batches="
            f"{accumulated}: a checkpoint, which is written then, holds no gradient; type for example "
            f"trainer.val_check_interval={100 * accumulated}"
        )
    if cfg.resume and cfg.trainer.get("fast_dev_run"):
        raise ValueError("fast_dev_run keeps nothing that it trains: leave it out, or resume=")
    if cfg.trainer.precision == "16-true":
        raise ValueError(
            "trainer.precision=16-true loses what a step adds; type trainer.precision=16-mixed or bf16-mixed"
        )
    if not isinstance(cfg.run_dir, str) or not cfg.run_dir:
        raise ValueError(f"run_dir={cfg.run_dir} must name a folder; leave it out for one below runs/")
    for key in TEXTS:
        value = OmegaConf.select(cfg, key, default="")
        may_be_null = key not in ("data.root", "data.cache")
        if key.removeprefix("data.") in cfg.data and not (
            (isinstance(value, str) and value) or (value is None and may_be_null)
        ):
            raise ValueError(f"{key}={value} must be a text{', or null for none' if may_be_null else ''}")
    if "wandb" in cfg.loggers:
        wandb_options.check(cfg.loggers.wandb)
    for part in ("data", "model", "task"):
        target = outline(str(cfg[part]._target_))
        if not isinstance(target, type):
            imports.import_lightning()
            target = get_class(cfg[part]._target_)
        known, flags = options_of(target), options_of(target, bool)
        for name in cfg[part]:
            if name in known and cfg[part][name] not in (None, False) and (why := unusable(part, name)):
                raise ValueError(f"{part}.{name}={cfg[part][name]}: {why.partition(': ')[2]}")
            if name in flags and type(cfg[part][name]) is not bool:
                raise ValueError(f"{part}.{name}={cfg[part][name]} must be true or false")
            if name not in known and name not in ("_target_", "_partial_"):
                raise ValueError(
                    f"{part} {cfg[part]._target_} has no option {name!r} (from an ablation or an experiment?). "
                    f"It has: {', '.join(each for each in known if not unusable(part, each))}."
                )


def options_of(target: type, kind: type | None = None) -> list[str]:
    """What a class of this project, and those that it extends, can be given; `kind`: only what is said to be of it."""
    ours = [
        c for c in target.__mro__ if "__init__" in vars(c) and c.__module__.split(".")[0] in ("sru", "data", "tasks")
    ]
    found = [parameter for c in ours for parameter in inspect.signature(c).parameters.values()]
    return sorted({p.name for p in found if p.kind is not p.VAR_KEYWORD and kind in (None, p.annotation)})


@contextlib.contextmanager
def opened_folder(cfg: DictConfig) -> Iterator[Path]:
    """The run's folder, made, writable, and this process's alone; what a run has recorded in it is not overwritten.

    Of several processes the first one sees to that, for all.
    """
    from tasks import record  # not at the top: it imports torch

    folder = Path(cfg.run_dir)
    if processes.rank():
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
        record.remove_leftovers(folder)
        yield folder
    finally:
        # Before it is released: another process may hold it from then on.
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        remove_if_empty(folder)


def check_resume(cfg: DictConfig, folder: Path) -> None:
    """Refuse to go on with a damaged run or another experiment; print what else has changed."""
    from tasks import record

    last = folder / "checkpoints/last.ckpt"
    if not last.exists():
        raise FileNotFoundError(
            f"resume={folder}: it has no checkpoints/last.ckpt, so it stopped before its first epoch ended. "
            f"Start it anew: the same command without resume, with run_dir={folder}."
        )
    state = record.checkpoint(last)
    try:
        before = OmegaConf.load(folder / "config.yaml")
        OmegaConf.resolve(before)
        if not OmegaConf.is_dict(before) or "run_dir" not in before:
            raise ValueError("config.yaml has no run_dir")
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"resume={folder}: damaged ({error}); use a copy of the folder, or start a new run."
        ) from error
    then, now = len(state.get("processes", [state])), processes.world_size()
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


def check_data(cfg: DictConfig, data: Any, last: Path | None) -> None:
    """Refuse data of another task, and a resume on data that has changed, before a network is built for it."""
    known = inspect.signature(get_class(cfg.task._target_)).parameters
    if other := [name for name in data.DIMS if name not in known]:  # not dims, for which a corpus is downloaded
        raise ValueError(
            f"data={cfg.choices.data} does not go with task={cfg.choices.task}, which knows no {', '.join(other)}; "
            "texts (pydoc_text, bytes, ptb, ...) are for task=lm, sentences (pydoc, cr, trec, ...) for "
            "task=classification, images (digits, mnist_rows, ...) for task=image, questions (squad, squad_sample) for "
            "task=squad, pairs of texts (multi30k, ...) for task=translation, recordings (speech_sample, fsdd_strings, "
            "librispeech_100, ...) for task=speech, and with data.unit=label for task=keywords, Kaldi's folders "
            "(frames_sample, kaldi) for task=hybrid"
        )
    if last is not None:
        from tasks import record

        data.load_state_dict(record.checkpoint(last)[type(data).__qualname__])


def resumed(arguments: list[str]) -> list[str]:
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
    overrides = recorded(folder / "run.json")
    quoted = "'" + str(folder).replace("'", "\\'") + "'"
    own = ("resume=", "run_dir=", "hydra.run.dir=")
    # A plus is right once: what it adds is there already, if it is typed again.
    given = [word for word in arguments if word[:1] != "+" or word not in overrides]
    kept = [word for word in [*overrides, *given] if not word.startswith(own)]
    return [*kept, f"resume={quoted}", f"run_dir={quoted}", f"hydra.run.dir={quoted}"]


def recorded(path: Path) -> list[str]:
    """The overrides that run.json or sweep.json keeps."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["overrides"]
        if not isinstance(words, list) or not all(isinstance(word, str) and word[:1] != "-" for word in words):
            raise ValueError("overrides are a list of KEY=VALUE")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; use a copy of the folder, or start anew.") from error
    return words


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

"""Checks of a run's options: ranges, and names that the classes take."""

import inspect
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from tasks.run import distributed, imports, wandb_options
from tasks.run.signatures import outline

ROOT = Path(__file__).parents[2]
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


def why_unusable(part: str, name: str) -> str | None:
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
    distributed.check(cfg)
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
            if name in known and cfg[part][name] not in (None, False) and (why := why_unusable(part, name)):
                raise ValueError(f"{part}.{name}={cfg[part][name]}: {why.partition(': ')[2]}")
            if name in flags and type(cfg[part][name]) is not bool:
                raise ValueError(f"{part}.{name}={cfg[part][name]} must be true or false")
            if name not in known and name not in ("_target_", "_partial_"):
                raise ValueError(
                    f"{part} {cfg[part]._target_} has no option {name!r} (from an ablation or an experiment?). "
                    f"It has: {', '.join(each for each in known if not why_unusable(part, each))}."
                )


def options_of(target: type, kind: type | None = None) -> list[str]:
    """What a class of this project, and those that it extends, can be given; `kind`: only what is said to be of it."""
    ours = [
        c for c in target.__mro__ if "__init__" in vars(c) and c.__module__.split(".")[0] in ("sru", "data", "tasks")
    ]
    found = [parameter for c in ours for parameter in inspect.signature(c).parameters.values()]
    return sorted({p.name for p in found if p.kind is not p.VAR_KEYWORD and kind in (None, p.annotation)})


def check_data(cfg: DictConfig, data: Any, last: Path | None) -> None:
    """Refuse data of another task, and a resume on data that has changed, before a network is built for it."""
    known = inspect.signature(get_class(cfg.task._target_)).parameters
    if other := [
        name for name in data.MODEL_KWARGS if name not in known
    ]:  # not model_kwargs, for which a corpus is downloaded
        raise ValueError(
            f"data={cfg.choices.data} does not go with task={cfg.choices.task}, which knows no {', '.join(other)}; "
            "texts (pydoc_text, bytes, ptb, ...) are for task=lm, sentences (pydoc, cr, trec, ...) for "
            "task=classification, images (digits, mnist_rows, ...) for task=image, questions (squad, squad_sample) for "
            "task=squad, pairs of texts (multi30k, ...) for task=translation, recordings (speech_sample, fsdd_strings, "
            "librispeech_100, ...) for task=speech, and with data.unit=label for task=keywords, Kaldi's folders "
            "(frames_sample, kaldi) for task=hybrid"
        )
    if last is not None:
        from tasks.run import checkpoints

        data.load_state_dict(checkpoints.read_checkpoint(last)[type(data).__qualname__])

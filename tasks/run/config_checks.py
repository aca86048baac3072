"""Check a run's options: their ranges, and the arguments of the classes that they name."""

import difflib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_class, get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from tasks.run import distributed, imports, signatures, wandb_options

ROOT = Path(__file__).parents[2]
# Bounds of options that no class checks before a corpus is read. Key: lowest value, highest value, example; a float as
# the example accepts any number, an int only whole numbers.
RANGES: dict[str, tuple[float, float, float]] = {
    "seed": (0, 2**32 - 1, 1),
    "depth": (1, 1000, 2),
    "width": (1, 100_000, 128),
    "dropout": (0, 0.999, 0.5),
    "epochs": (1, 10**6, 100),
    "data.batch_size": (1, 10**6, 32),
    "data.fold": (0, 9, 0),
    "data.min_count": (1, 10**6, 2),
    "task.dropout": (0, 0.999, 0.5),
    "task.embedding_dropout": (0, 0.999, 0.5),
    "task.embedding_size": (1, 10**6, 128),
    "task.optimizer.lr": (0, 1e9, 0.001),
    "task.max_answer": (1, 10**6, 15),
    "task.beam": (1, 1000, 5),
    "task.length_penalty": (0, 100, 0.6),
    "task.label_smoothing": (0, 0.999, 0.1),
    "task.tuned_words": (0, 10**9, 1000),
    "data.seed": (0, 2**32 - 1, 1234),
    "task.frequency_masks": (0, 100, 2),
    "task.frequency_width": (0, 256, 8),
    "task.time_masks": (0, 100, 2),
    "task.time_width": (0, 1, 0.05),
    "task.colour": (0, 10, 0.5),
    "task.warp": (0, 0.9, 0.15),
    "data.repeats": (1, 10_000, 2),
    "trainer.max_steps": (-1, 10**9, 400_000),
    "trainer.accumulate_grad_batches": (1, 10**6, 1),
    "trainer.max_epochs": (1, 10**6, 100),
    "data.unroll": (1, 10**6, 128),
    "data.eval_batch_size": (1, 10**6, 1),
    "data.eval_unroll": (1, 10**6, 128),
    "data.vocab_size": (1, 10**7, 32_000),
    "data.max_length": (1, 10**6, 100),
    "data.tokens_per_batch": (1, 10**9, 4096),
    "data.eval_tokens_per_batch": (1, 10**9, 4096),
    "data.delay": (0, 10**4, 10),
    "data.segment": (1, 10**6, 20),
    "data.right": (0, 10**6, 20),
    "data.eval_frames_per_batch": (1, 10**9, 8000),
    "data.window": (1, 10**6, 1000),
    "data.frames_per_batch": (1, 10**9, 12_000),
    "data.volume": (0, 60, 20.0),
}
# Options of data that name files or folders.
FOLDERS = ("root", "cache")
FILES = ("path", "train", "val", "test", "vectors")  # or null
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
# Options of the library's layers that no task can use, and why.
LIBRARY = {
    "batch_first": "time comes first in every task",
    "nn_rnn_compatible_return": "the tasks need the state as sru.SRU returns it",
    "device": "trainer.accelerator selects it",
    "dtype": "trainer.precision sets it, for example 64-true",
    "transform_module": "a module cannot be typed",
    "custom_m": "a module cannot be typed",
    "amp_recurrence_fp16": "it has no effect",
}


def why_unusable(path: str, name: str) -> str | None:
    """Why no run can use an option that its class takes; None for other options."""
    if path == "model" and name in LIBRARY:
        return f"model.{name} cannot be set in a run: {LIBRARY[name]}; leave out model.{name}"
    if path in ("callbacks.best", "callbacks.last") and name == "save_weights_only":
        return f"{path}.{name} cannot be set in a run: a resume and the test need the whole checkpoint. Leave it out"
    if path == "trainer" and name in ("strategy", "num_nodes"):
        return f"trainer.{name} is for several processes: type trainer=ddp, and for example trainer.devices=2"
    return None


def check(cfg: DictConfig) -> None:
    """Refuse values out of range, and options that the class of data, model or task does not take."""
    for key, (low, high, example) in RANGES.items():
        value = OmegaConf.select(cfg, key, default=example)
        kinds = (int, float) if isinstance(example, float) else (int,)
        if type(value) not in kinds or not low <= value <= high:
            kind = "a number" if isinstance(example, float) else "a whole number"
            raise ValueError(f"{key}={value} must be {kind}, {low} to {high}; type for example {key}={example}")
    distributed.check(cfg)
    check_trainer(cfg)
    both = OmegaConf.select(cfg, "bidirectional", default=False)
    if type(both) is not bool:
        raise ValueError(f"bidirectional={both} must be true or false")
    if not isinstance(cfg.run_dir, str) or not cfg.run_dir:
        raise ValueError(f"run_dir={cfg.run_dir} must name a folder; leave it out for one below runs/")
    for name in (*FOLDERS, *FILES):
        value = OmegaConf.select(cfg, f"data.{name}", default="")
        is_text = isinstance(value, str) and value
        if name in cfg.data and not is_text and not (value is None and name in FILES):
            raise ValueError(f"data.{name}={value} must be a text{', or null for none' if name in FILES else ''}")
    if "wandb" in cfg.loggers:
        wandb_options.check(cfg.loggers.wandb)
    for part in ("data", "model", "task"):
        target = outline_of(cfg[part], part)
        known, flags = options_of(target), options_of(target, bool)
        for name, value in cfg[part].items():
            if name in known and value not in (None, False) and (why := why_unusable(part, name)):
                raise ValueError(f"{part}.{name}={value}: {why.partition(': ')[2]}")
            if name in flags and type(value) is not bool:
                raise ValueError(f"{part}.{name}={value} must be true or false")
            if name not in known and name not in ("_target_", "_partial_"):
                raise ValueError(
                    f"{part} {cfg[part]._target_} has no option {name!r} (from an ablation or an experiment?). "
                    f"It has: {', '.join(each for each in known if not why_unusable(part, each))}."
                )


def check_trainer(cfg: DictConfig) -> None:
    trainer = cfg.trainer
    if "max_epochs" not in trainer:
        raise ValueError("trainer.max_epochs is missing; leave out ~trainer.max_epochs")
    for stage in ("train", "val", "test"):
        limit = trainer[f"limit_{stage}_batches"]
        is_number = type(limit) in (int, float) and limit >= 0
        if limit is not None and (not is_number or (stage == "train" and not limit)):
            raise ValueError(f"trainer.limit_{stage}_batches={limit} must be a number above 0, or null for all")
    every, accumulated = trainer.val_check_interval, trainer.accumulate_grad_batches
    if not (type(every) is int and every > 1) and not (type(every) is float and 0 < every <= 1):
        raise ValueError(
            f"trainer.val_check_interval={every} must be a part of an epoch, above 0.0 and up to 1.0, or a whole "
            "number of batches, above 1; type for example trainer.val_check_interval=0.25"
        )
    if every != 1.0 and accumulated > 1 and every % accumulated:
        raise ValueError(
            f"trainer.val_check_interval={every} must be 1.0 or a multiple of trainer.accumulate_grad_batches="
            f"{accumulated}: each validation writes a checkpoint, and checkpoints contain no gradients; type for "
            f"example trainer.val_check_interval={100 * accumulated}"
        )
    if cfg.resume and trainer.get("fast_dev_run"):
        raise ValueError("fast_dev_run saves nothing, so it cannot resume a run: leave it out, or resume=")
    if trainer.precision == "16-true":
        raise ValueError(
            "trainer.precision=16-true loses small weight updates; type trainer.precision=16-mixed or bf16-mixed"
        )


def check_data(cfg: DictConfig, data: Any, last: Path | None) -> None:
    """Refuse data of another task, and a resume on changed data, before the network is built."""
    known = inspect.signature(get_class(cfg.task._target_)).parameters
    # Not model_kwargs, which downloads the corpus.
    if other := [name for name in data.MODEL_KWARGS if name not in known]:
        raise ValueError(
            f"data={cfg.choices.data} does not go with task={cfg.choices.task}, which does not accept "
            f"{', '.join(other)}; texts (pydoc_text, bytes, ptb, ...) are for task=lm, sentences (pydoc, cr, trec, "
            "...) for task=classification, images (digits, mnist_rows, ...) for task=image, questions (squad, "
            "squad_sample) for task=squad, pairs of texts (multi30k, ...) for task=translation, recordings "
            "(speech_sample, fsdd_strings, librispeech_100, ...) for task=speech, and with data.unit=label for "
            "task=keywords, Kaldi's folders (frames_sample, kaldi) for task=hybrid"
        )
    if last is not None:
        from tasks.run import checkpoints

        data.load_state_dict(checkpoints.read_checkpoint(last)[type(data).__qualname__])


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """The nodes that name a class, with their dotted paths; copies made by an interpolation are left out."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{path}.{key}" if path else key)
    elif isinstance(node, ListConfig):
        for i, value in enumerate(node):
            yield from targets(value, f"{path}.{i}")


def outline_of(node: DictConfig, path: str) -> Any:
    """The outline of a node's class, or the class itself if its arguments are known only after import."""
    return signatures.outline(str(node._target_)) or import_class(node, path)


def import_class(node: DictConfig, path: str) -> Any:
    """The object that `_target_` names; ValueError with similar names."""
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it would log the same error
    imports.import_lightning()
    try:
        return get_object(node._target_)
    except Exception as error:  # a module may raise anything
        module, _, name = str(node._target_).rpartition(".")
        try:
            known = [f"{module}.{each}" for each in difflib.get_close_matches(name, dir(get_object(module)))]
        except Exception:
            known = []
        hint = f". Did you mean: {', '.join(known)}?" if known else f" ({str(error).strip().splitlines()[-1]})"
        raise ValueError(f"{path}._target_={node._target_} cannot be imported{hint}") from error


def options_of(target: Any, annotation: type | None = None) -> list[str]:
    """The arguments of a class of this project and its bases; with `annotation`, only those annotated so."""
    ours = [
        c
        for c in getattr(target, "__mro__", ())
        if "__init__" in vars(c) and c.__module__.split(".")[0] in signatures.OURS
    ]
    parameters = [parameter for c in ours for parameter in inspect.signature(c).parameters.values()]
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and annotation in (None, p.annotation)}
    # The official package's names for options of the SRU, which its signature does not show.
    official = getattr(target, "official_options", ()) if annotation is None else ()
    return sorted(names | {*(official or ())})


def arguments(node: DictConfig, path: str) -> tuple[list[str], bool]:
    """The arguments of a node's class, and whether it accepts others too."""
    target = outline_of(node, path)
    own = next((c for c in getattr(target, "__mro__", ()) if "__init__" in vars(c)), target)
    if own.__module__.split(".")[0] in signatures.OURS and inspect.isclass(target):
        return options_of(target), False
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # a class written in C has no signature
        return [], True
    return [p.name for p in parameters if p.kind not in VARIADIC], any(p.kind is VARIADIC[0] for p in parameters)


def code_arguments(cfg: DictConfig, path: str, node: DictConfig) -> list[str]:
    """The arguments that the code passes to a node's class, so that the configuration must not set them."""
    if not node.get("_partial_"):
        return []
    if path == "model":
        return ["input_size", "source_size"]
    if path == "task":
        names = getattr(outline_of(cfg.data, "data"), "MODEL_KWARGS", ())
        return ["encoder", *(names if isinstance(names, tuple) else ())]  # a property depends on options
    parameters = list(inspect.signature(outline_of(node, path)).parameters.values())
    return [p.name for p in parameters[:1] if p.default is p.empty]


def check_required(node: DictConfig, path: str) -> None:
    """Refuse a class without one of its required arguments."""
    if node.get("_partial_") or "_args_" in node:
        return
    try:
        parameters = inspect.signature(outline_of(node, path)).parameters.values()
    except ValueError:
        return
    absent = [p.name for p in parameters if p.default is p.empty and p.kind not in VARIADIC and p.name not in node]
    if absent and path.startswith(("task", "model")):
        raise ValueError(f"{path}: the code passes {absent[0]} to {node._target_}; type +{path}._partial_=true")
    if absent:
        raise ValueError(f"{path}: {node._target_} needs {', '.join(absent)}; type +{path}.{absent[0]}=VALUE")

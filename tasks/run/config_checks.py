"""Check a run's options: their ranges, and the arguments of the classes that they name."""

import difflib
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_class, get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from tasks.run import distributed, imports, signatures, wandb_options

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
# Bounds of options that no class checks before a corpus is read: lowest, highest, an example, and keys. Where the
# highest is a float, any number fits, elsewhere only whole numbers. A batch may be larger than the corpus.
RANGES: tuple[tuple[float, float, float, str], ...] = (
    (0, 2**32 - 1, 1234, "seed data.seed"),
    (0, 9, 0, "data.fold"),
    (1, 1000, 4, "depth task.beam"),
    (1, 10**5, 256, "width task.embedding_size"),
    (1, 10**6, 20, "epochs trainer.max_epochs trainer.accumulate_grad_batches task.max_answer"),
    (-1, 10**9, 10000, "trainer.max_steps"),
    (1, 10**9, 32, "data.batch_size data.eval_batch_size data.unroll data.eval_unroll data.segment"),
    (1, 10**9, 8000, "data.tokens_per_batch data.frames_per_batch data.vocab_size"),
    (1, 10**9, 8000, "data.eval_tokens_per_batch data.eval_frames_per_batch"),
    (1, 10**9, 400, "data.window data.max_length"),
    (1, 10**9, 2, "data.min_count data.repeats"),
    (0, 10**6, 3, "data.delay data.right"),
    (0, 60.0, 6, "data.volume"),
    (0, 0.999, 0.2, "dropout task.dropout task.embedding_dropout task.label_smoothing"),
    (0, 1e9, 0.001, "task.optimizer.lr"),
    (0, 100.0, 0.6, "task.length_penalty"),
    (0, 10**9, 1000, "task.tuned_words"),
    (0, 100, 2, "task.frequency_masks task.time_masks"),
    (0, 256, 27, "task.frequency_width"),
    (0, 1.0, 0.05, "task.time_width"),
    (0, 10.0, 0.2, "task.colour"),
    (0, 0.9, 0.1, "task.warp"),
)
PARTS = ("data", "model", "task")
EXAMPLES = {
    "task.optimizer": "for example task.optimizer._target_=torch.optim.AdamW",
    "task.scheduler": "+task.scheduler._target_=CLASS +task.scheduler._partial_=true, or task.scheduler=null for none",
}
# Options of data that name files or folders.
FOLDERS = ("root", "cache")
FILES = ("path", "train", "val", "test", "vectors")  # or null
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
CALLBACKS = ("best", "average", "last", "clock", "interruption")  # train.py and the callbacks read them
# Options that no run can use, and why.
UNUSABLE = {
    "model.batch_first": "time comes first in every task",
    "model.nn_rnn_compatible_return": "the tasks need the state as sru.SRU returns it",
    "model.device": "trainer.accelerator selects it",
    "model.dtype": "trainer.precision sets it, for example 64-true",
    "model.transform_module": "a module cannot be typed",
    "model.custom_m": "a module cannot be typed",
    "model.amp_recurrence_fp16": "it has no effect",
    "trainer.strategy": "several processes need trainer=ddp, and for example trainer.devices=2",
    "trainer.num_nodes": "several machines need trainer=ddp",
    "callbacks.best.save_weights_only": "a resume and the test need the whole checkpoint",
    "callbacks.last.save_weights_only": "a resume and the test need the whole checkpoint",
    "callbacks.last.save_top_k": "last.ckpt is one file, and a resume needs it",
    "callbacks.best.save_top_k": "best.ckpt is one file; to keep more, type "
    "+callbacks.top._target_=pytorch_lightning.callbacks.ModelCheckpoint +callbacks.top.save_top_k=3 "
    "+callbacks.top.monitor=val/loss '+callbacks.top.dirpath=${run_dir}/top'",
}


def groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def check(cfg: DictConfig) -> None:
    """Refuse values out of range, and options that the class of data, model or task does not take."""
    for low, high, example, keys in RANGES:
        kinds, kind = ((int, float), "a number") if type(high) is float else ((int,), "a whole number")
        for key in keys.split():
            value = OmegaConf.select(cfg, key, default=low)
            if type(value) not in kinds or not low <= value <= high:
                allowed = f"{kind}, {low} to {high:.10g}"
                raise ValueError(f"{key}={value} must be {allowed}; type for example {key}={example}")
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
    for part in PARTS:
        check_options(cfg, part, cfg[part])


def check_options(cfg: DictConfig, path: str, node: DictConfig) -> None:
    """Refuse options that a node's class does not take, and those that no run can use."""
    parameters = signatures.parameters(outline_of(node, path))
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    supplied = code_arguments(cfg, path, node)
    usable = [name for name in parameters if name not in supplied and f"{path}.{name}" not in UNUSABLE]
    for name in map(str, node):
        key, parameter = f"{path}.{name}", parameters.get(name)
        if name in supplied:
            raise ValueError(f"{key} is set by the program: leave it out")
        if key in UNUSABLE and path != "trainer" and node[name] is not None and node[name] is not False:
            raise ValueError(f"{key}={node[name]} cannot be set in a run: {UNUSABLE[key]}; leave it out")
        if parameter is None and name not in HYDRA_KEYS and not takes_more:
            near = difflib.get_close_matches(name, usable)
            hint = f"Did you mean: {', '.join(near)}?" if near else f"It has: {', '.join(usable)}."
            raise ValueError(
                f"{path} {node._target_} has no option {name!r} (from an ablation or an experiment?). {hint}"
            )
        if node[name] == "":
            raise ValueError(f"{key}= is empty: type a value, or leave it out")
        kind = inspect.formatannotation(parameter.annotation) if parameter and path in PARTS else ""
        kinds = (bool,) if kind[:4] == "bool" else (int, float, type(None))
        is_word = (kind, node[name]) == ("bool | str", "dropout")
        if kind in signatures.KINDS and type(node[name]) not in kinds and not is_word:
            raise ValueError(f"{key}={node[name]} must be {signatures.KINDS[kind]}")


def check_classes(cfg: DictConfig) -> None:
    """Refuse words that nothing reads, and classes that a run cannot build from their options."""
    known = [*OmegaConf.load(CONF / "config.yaml"), *groups(), "loggers", "callbacks"]
    text = OmegaConf.to_yaml(cfg, resolve=False)
    for word in distributed.overrides():
        key = re.split(r"[.=]", word.lstrip("+"))[0]
        if word[0] == "+" and key not in known and not re.search(rf"\$\{{[^}}]*\b{re.escape(key)}\b", text):
            near = difflib.get_close_matches(key, map(str, known))
            raise ValueError(f"Nothing reads {key!r}." + (f" Did you mean: {', '.join(near)}?" if near else ""))
    if absent := [name for name in CALLBACKS if name not in cfg.callbacks]:
        raise ValueError(f"callbacks.{absent[0]} is missing, and every run needs it: do not remove it")
    monitor, mode = cfg.callbacks.best.get("monitor"), cfg.callbacks.best.get("mode")
    if not str(monitor).startswith("val/") or mode not in ("min", "max"):
        raise ValueError(
            f"callbacks.best.monitor={monitor} callbacks.best.mode={mode} must be a metric of the validation, and min "
            "or max; type for example callbacks.best.monitor=val/loss callbacks.best.mode=min"
        )
    nodes = {f"{group}.{name}": value for group in ("loggers", "callbacks") for name, value in cfg[group].items()}
    nodes["task.optimizer"] = cfg.task.get("optimizer")
    if cfg.task.get("scheduler") is not None:
        nodes["task.scheduler"] = cfg.task.scheduler
    for path, node in nodes.items():
        if not OmegaConf.is_dict(node) or "_target_" not in node:
            example = EXAMPLES.get(path, f"+{path}._target_=CLASS")
            raise ValueError(f"{path}{'' if OmegaConf.is_dict(node) else f'={node}'} must have a class; type {example}")
    for path, node in targets(cfg):
        if path not in PARTS:
            check_options(cfg, path, node)
        if node.get("_partial_") or "_args_" in node:
            continue
        if absent := [name for name in required_arguments(node, path) if name not in node]:
            if path.startswith(("task", "model")):
                raise ValueError(f"{path}: the code passes {absent[0]} to {node._target_}; type +{path}._partial_=true")
            raise ValueError(f"{path}: {node._target_} needs {', '.join(absent)}; type +{path}.{absent[0]}=VALUE")


def check_trainer(cfg: DictConfig) -> None:
    trainer = cfg.trainer
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
        defaults = OmegaConf.load(CONF / f"task/{cfg.choices.task}.yaml").defaults
        default = next(each["/data"] for each in defaults if "/data" in each)
        raise ValueError(
            f"data={cfg.choices.data} does not go with task={cfg.choices.task}, which does not accept "
            f"{', '.join(other)}; data for this task are: {', '.join(data_like(data_class(default)))}"
        )
    if last is not None:
        from tasks.run import checkpoints

        data.load_state_dict(checkpoints.read_checkpoint(last)[type(data).__qualname__])


def data_class(name: str) -> Any:
    """The class that a file of conf/data names."""
    cfg: Any = OmegaConf.load(CONF / f"data/{name}.yaml")
    return get_class(cfg._target_) if "_target_" in cfg else data_class(cfg.defaults[0])


def data_like(kind: Any) -> list[str]:
    """The files of conf/data with the same kind of vocabulary as a class."""
    return [name for name in choices("data") if data_class(name).vocabulary_of is kind.vocabulary_of]


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


def code_arguments(cfg: DictConfig, path: str, node: DictConfig) -> list[str]:
    """The arguments that the code passes to a node's class, so that the configuration must not set them."""
    if not node.get("_partial_"):
        return []
    if path == "model":
        return ["input_size", "source_size"]
    if path == "task":
        names = getattr(outline_of(cfg.data, "data"), "MODEL_KWARGS", ())
        return ["encoder", *(names if isinstance(names, tuple) else ())]  # a property depends on options
    return required_arguments(node, path)[:1]


def required_arguments(node: DictConfig, path: str) -> list[str]:
    """The arguments that a node's class needs."""
    parameters = signatures.parameters(outline_of(node, path)).values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in VARIADIC]

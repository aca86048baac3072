"""Load a trained network from its checkpoint, and data to test it: `task, vocabulary = load("runs/lm/<time>")`.

`task.encoder` is the recurrent network, called with x (T, B, input_size); a task with several has `task.encoders`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningDataModule
from torch import nn

from tasks.base import Task
from tasks.run import checkpoints, config_checks, config_hints, errors, run_dir, signatures
from tasks.run.signatures import OURS

PRODUCT = "sru.kernels.linear.linear"  # the only function that a configuration may name
# Errors from a configuration that is damaged, or belongs to another checkpoint.
MISFITS = AttributeError, ImportError, KeyError, TypeError, RuntimeError, yaml.YAMLError, OmegaConfBaseException
# Always from conf/data: a checkpoint may come from a stranger.
DOWNLOADS = ("files", "rows", "parts", "url", "archive")
# With other values of these, examples of training would be in the test.
HELD_OUT = ("fold", "seed", "num_train", "num_val", "valid_bytes", "test_bytes")


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its path, the configuration of its run, and its other content.

    source: where the configuration is from: the checkpoint or, if that is older, config.yaml of the run's folder.
    """

    path: Path
    config: dict[str, Any]
    content: dict[str, Any]
    source: str


def load(checkpoint: str | Path, device: str = "auto") -> tuple[Any, Any]:
    """The task of a run, in eval mode, and its vocabulary.

    Reads no corpus, and builds only classes of this project.

    Args:
        checkpoint: a .ckpt file, or the folder of a run for the checkpoint that its test used.
        device: auto, cpu, cuda or cuda:N.
    """
    check_device(device)
    task, vocabulary = build(open_checkpoint(checkpoint))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return task.eval().to(device), vocabulary


def check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) or (device[:4] == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device} must be auto, cpu, or cuda if torch finds a GPU")


def open_checkpoint(checkpoint: str | Path) -> Saved:
    """Read a .ckpt file, or the checkpoint that a run's test used, without executing its content."""
    path = run_dir.find_checkpoint(checkpoint)
    content = checkpoints.read_checkpoint(path)
    if isinstance(content.get("config"), dict):
        return check_parts(Saved(path, content["config"], content, f"the configuration in {path}"))
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is too old to contain its run's configuration, and there is no {file}: copy the whole folder of "
            "the run"
        )
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (UnicodeDecodeError, *MISFITS) as error:
        raise ValueError(f"{file} is damaged ({error}); use a copy of the folder") from error
    return check_parts(Saved(path, config, content, str(file)))


def check_parts(saved: Saved) -> Saved:
    """Refuse a configuration without one of its parts."""
    is_dict = isinstance(saved.config, dict)
    parts = ("data", "model", "task", "trainer", "choices")
    if missing := [name for name in parts if not is_dict or not isinstance(saved.config.get(name), dict)]:
        raise ValueError(f"{saved.source} is damaged: it has no {missing[0]}; use a copy of the run's folder")
    return saved


def class_and_options(config: dict[str, Any], part: str, base: type) -> tuple[Any, dict[str, Any]]:
    """The class of a part of a configuration, and its options.

    The configuration may come from a stranger: ValueError unless it is a subclass of `base` of this project, and its
    options name no other class.
    """
    options: dict[str, Any] = dict(config[part])
    name = str(options.pop("_target_"))
    options.pop("_partial_", None)
    has_product = part == "task" and options.get("linear") == {"_target_": PRODUCT, "_partial_": True}
    if has_product:
        del options["linear"]
    target = get_object(name) if re.fullmatch(rf"({'|'.join(OURS)})(\.\w+)+", name) else None
    is_own = isinstance(target, type) and issubclass(target, base)
    # A module of this project may import a class from elsewhere.
    is_own = is_own and target.__module__.split(".")[0] == name.split(".")[0]
    if not is_own or "_target_" in json.dumps(options):
        raise ValueError(
            f"the run names {name} as {part}, or classes within: not part of this project; nothing was built"
        )
    return target, options | ({"linear": get_object(PRODUCT)} if has_product else {})


def build(saved: Saved) -> tuple[Any, Any]:
    """The task with the weights of a checkpoint, and its vocabulary."""
    try:
        data, _ = class_and_options(saved.config, "data", LightningDataModule)
        model, model_options = class_and_options(saved.config, "model", nn.Module)
        of_training = ("optimizer", "scheduler")
        task_config = {name: value for name, value in saved.config["task"].items() if name not in of_training}
        task_class, task_options = class_and_options({"task": task_config}, "task", Task)
        weights = saved.content["state_dict"]
        if model_options.get("num_layers", 0) > len(weights):  # building them could take hours
            raise KeyError(f"the weights of {model_options['num_layers']} layers")
        vocabulary = data.vocabulary_of(saved.content[data.__qualname__])
        options = task_options | vocabulary.model_kwargs
        make = partial(task_class, encoder=partial(model, **model_options), optimizer=torch.optim.SGD, **options)
        with torch.device("meta"):  # compare sizes before any memory is allocated
            # A copy: torch stores assign=True in the dict, and the second load would untie weights.
            make().load_state_dict(dict(weights), assign=True)
        task = make()
        task.load_state_dict(weights)
        for name, tensor in task.state_dict().items():  # of two tied weights, the second overwrites the first
            if not torch.equal(tensor.nan_to_num(), weights[name].nan_to_num()):
                raise KeyError(f"{name}, tied to another")
    except MISFITS as error:
        is_absent = isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] not in OURS
        if is_absent or errors.explain_failure(error):  # a missing package, or too little memory
            raise
        raise ValueError(
            f"{saved.source} is damaged, or does not belong to {saved.path} ({type(error).__name__}: {error}); "
            "take both from one run"
        ) from error
    return task, vocabulary


def check_names(part: str, names: Iterable[str], known: list[str], fixed: Iterable[str]) -> None:
    """Refuse options that a part does not have, and those that belong to the checkpoint."""
    for name in names:
        if name in fixed:
            raise ValueError(f"{part}.{name} is fixed by the checkpoint: leave it out")
        if name not in known:
            hint = config_hints.suggest_keys(name, [each for each in known if each not in fixed])
            raise ValueError(f"there is no option {part}.{name}.{hint}")


def build_task(saved: Saved, changes: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """The task with its recorded or changed options, and the vocabulary."""
    task, vocabulary = build(saved)  # first unchanged, which checks that its classes are this project's
    changed = [f"{part}.{name}={value}" for part in ("task", "model") for name, value in changes[part].items()]
    if not changed:
        return task, vocabulary
    fixed = ("encoder", "optimizer", "scheduler", "linear", *vocabulary.model_kwargs)
    check_names("task", changes["task"], list(signatures.parameters(type(task))), fixed)
    check_names("model", changes["model"], saved.config["model"], {*changes["model"]} - {"eval_memory_length"})
    config = saved.config | {part: saved.config[part] | changes[part] for part in ("task", "model")}
    config_checks.check(OmegaConf.create(config))
    try:
        return build(replace(saved, config=config))
    except ValueError as error:
        if error.__cause__ is None:  # the class itself refuses a value
            raise
        raise ValueError(f"{' '.join(changed)} does not fit the checkpoint's weights: leave it out") from error


def build_data(saved: Saved, vocabulary: Any, split: str, name: str | None, changes: dict[str, Any]) -> Any:
    """The data of training, or other data of the same kind, with the checkpoint's vocabulary."""
    before, choices = saved.config["data"], saved.config["choices"]
    training_class, _ = class_and_options(saved.config, "data", LightningDataModule)
    # Before Hydra composes them: a name could be the path of a file that came with the checkpoint.
    for part, chosen in (("data", name or choices.get("data")), ("task", choices.get("task"))):
        if chosen not in (known := config_checks.choices(part)):
            source = f"data={name}" if name and part == "data" else f"the checkpoint's {part}, {chosen!r},"
            hint = config_hints.suggest_keys(str(chosen), known)
            raise ValueError(f"{source} is not a file of conf/{part}.{hint}")
    choices = choices | {"data": name or choices["data"]}
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_checks.CONF)):
        cfg = hydra.compose("config", [f"task={choices['task']}", f"data={choices['data']}"])
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    data_class, _ = class_and_options({"data": values}, "data", LightningDataModule)
    if data_class.vocabulary_of is not training_class.vocabulary_of:
        raise ValueError(
            f"data={name} is of another kind than the data of training, {saved.config['choices']['data']}; of the same "
            f"kind are: {', '.join(config_checks.data_like(training_class))}"
        )
    known, fixed = list(signatures.parameters(data_class)), data_class.FIXED_BY_CHECKPOINT
    is_same = choices["data"] == saved.config["choices"]["data"]
    for key, value in before.items():
        if key in config_checks.FOLDERS:
            is_kept = key in values and Path(str(value)).expanduser().is_dir()
        else:
            is_kept = (key in fixed and key in known) or (is_same and key not in ("_target_", *DOWNLOADS))
        if is_kept:
            values[key] = value
    check_names("data", changes, known, fixed)
    for key in HELD_OUT:
        if is_same and key in changes and changes[key] != before.get(key):
            raise ValueError(
                f"data.{key}={changes[key]} would test examples of training ({before.get(key)}): leave it out"
            )
    values |= changes
    # If each split has its own file, only the one of this split is read.
    values |= {key: values[split] for key in ("test", "val", "train") if key in values}
    data_class, options = class_and_options({"data": values}, "data", LightningDataModule)
    config_checks.check(OmegaConf.create(saved.config | {"data": values, "choices": choices}))
    data = data_class(**options)
    data.checkpoint_vocabulary = vocabulary
    return data

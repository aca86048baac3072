"""Use a trained network: `python predict.py checkpoint=runs/lm/<time> prompt="The "`; without words, what there is."""

import inspect
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningDataModule
from torch import nn

from tasks import door
from tasks.base import Task

# What a configuration that is damaged, or belongs to another checkpoint, leads to.
MISFITS = AttributeError, ImportError, KeyError, TypeError, RuntimeError, yaml.YAMLError, OmegaConfBaseException

USAGE = """Use a trained network: python predict.py checkpoint=FOLDER_OR_FILE KEY=VALUE ...

Everything after the first = is the value, as it is."""


def load(checkpoint: str, device: str = "auto") -> tuple[Any, Any]:
    """The task of a run, in eval mode, and its vocabulary; from a .ckpt, or a run's folder: what its test took.

    Nothing of the corpus is read, and no class is built that is not of this project.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        average = path / "checkpoints/average.ckpt"
        path = average if average.is_file() else path / "checkpoints/best.ckpt"
    folder = path.parent.parent
    if not path.is_file() or not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"checkpoint={checkpoint} is neither a run's folder nor a .ckpt in one (there is no "
            f"{path if not path.is_file() else folder / 'config.yaml'}); runs lie below runs/"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) or (device[:4] == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device} must be auto, cpu, or cuda where torch finds a GPU")
    content = door.checkpoint(path)
    try:
        task, vocabulary = built(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True), content)
    except MISFITS as error:
        raise ValueError(
            f"{folder / 'config.yaml'} is damaged, or not that of {path} ({type(error).__name__}: {error}); "
            "take both from one run"
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return task.eval().to(device), vocabulary


def built(cfg: Any, content: dict[str, Any]) -> tuple[Any, Any]:
    """The task with a checkpoint's weights, and its vocabulary."""
    for name in ("optimizer", "scheduler"):
        cfg["task"].pop(name, None)
    data, _ = door.class_and_options(cfg, "data", LightningDataModule)
    model, model_options = door.class_and_options(cfg, "model", nn.Module)
    task_class, task_options = door.class_and_options(cfg, "task", Task)
    if not hasattr(task_class, "predict"):
        raise ValueError(f"{cfg['task']['_target_']}, which the checkpoint is of, has no predictions of single texts")
    vocabulary = data.vocabulary_of(content[data.__qualname__])
    options = task_options | vocabulary.dims
    make = partial(task_class, encoder=partial(model, **model_options), optimizer=torch.optim.SGD, **options)
    with torch.device("meta"):  # another configuration takes no memory before its sizes are compared
        make().load_state_dict(content["state_dict"], assign=True)
    task = make()
    task.load_state_dict(content["state_dict"])
    return task, vocabulary


def main(words: list[str]) -> None:
    if not words or {"-h", "--help", "help"} & set(words):
        print(USAGE)
        for path in sorted((door.ROOT / "conf/task").glob("*.yaml")):
            task = get_class(OmegaConf.load(path).task._target_)
            if hasattr(task, "predict"):
                options_of = inspect.cleandoc(task.predict.__doc__ or "").partition("Args:")[2].rstrip()
                print(f"\nWith task={path.stem}:{options_of}")
        print("\nWith any: device: auto, cpu or cuda.")
        return
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name in options:
            raise ValueError(f"{word!r} is no KEY=VALUE that was not given before; type for example prompt='The '")
        options[name] = value
    if "checkpoint" not in options:
        raise ValueError("checkpoint is missing; type checkpoint=FOLDER, where FOLDER is that of a run, below runs/")
    task, vocabulary = load(options.pop("checkpoint"), options.pop("device", "auto"))
    known = {
        name: p.annotation for name, p in inspect.signature(task.predict).parameters.items() if name != "vocabulary"
    }
    required = [
        name for name, p in inspect.signature(task.predict).parameters.items() if p.default is p.empty and name in known
    ]
    if missing := [name for name in required if name not in options]:
        raise ValueError(f"{missing[0]} is missing; type {missing[0]}=FILE")
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"there is no option {name!r}; there are: checkpoint, device, {', '.join(known)}")
        kind = {"int": int, "float": float}.get(getattr(known[name], "__name__", ""), str)
        if known[name] is bool and value not in ("true", "false"):
            raise ValueError(f"{name}={value} must be true or false")
        try:
            values[name] = value == "true" if known[name] is bool else kind(value)
        except ValueError:
            raise ValueError(f"{name}={value} must be a {'whole ' if kind is int else ''}number") from None
    for text in task.predict(vocabulary, **values):
        print(text, end="", flush=True)


if __name__ == "__main__":
    door.guard(lambda: main(sys.argv[1:]))

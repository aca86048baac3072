"""Use a trained network: `python predict.py checkpoint=runs/lm/<time> prompt="The "`; without words, what there is."""

import inspect
import sys
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from tasks.run import config_checks, console, errors
from tasks.trained import load

USAGE = """Use a trained network: python predict.py checkpoint=FOLDER_OR_FILE KEY=VALUE ...

Everything after the first = is the value, as it is."""


def main(words: list[str]) -> None:
    if not words or {"-h", "--help", "help"} & set(words):
        print(USAGE)
        for path in sorted((config_checks.ROOT / "conf/task").glob("*.yaml")):
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
    if not hasattr(task, "predict"):
        raise ValueError(
            f"{type(task).__name__}, of which the checkpoint is, has no predictions of single texts; see evaluate.py"
        )
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
    console.use_utf8()
    errors.guard(lambda: main(sys.argv[1:]))

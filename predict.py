"""Apply a trained network to your own input: `python predict.py checkpoint=runs/lm/<time> prompt="The "`."""

import ast
import inspect
import sys
from typing import Any

from omegaconf import OmegaConf

from tasks.run import config_checks, console, errors, run_dir, signatures

USAGE = """Apply a trained network: python predict.py checkpoint=FOLDER_OR_FILE KEY=VALUE ...

The value is everything after the first =, unchanged."""


def main(words: list[str]) -> None:
    if not words or {"-h", "--help", "help"} & set(words):
        print(USAGE)
        for path in sorted((config_checks.CONF / "task").glob("*.yaml")):
            task_class = signatures.definition(*OmegaConf.load(path).task._target_.rsplit(".", 1))
            for method in task_class[1].body if task_class else ():
                if isinstance(method, ast.FunctionDef) and method.name == "predict":
                    arguments = (ast.get_docstring(method) or "").partition("Args:")[2].rstrip()
                    print(f"\nWith task={path.stem}:{arguments}")
        print("\nWith any: device: auto, cpu or cuda.")
        return
    options = console.options_of_checkpoint(words, example="prompt='The '")
    checkpoint = run_dir.find_checkpoint(options.pop("checkpoint"))
    from tasks.trained import load  # not before: it imports torch, which takes seconds

    task, vocabulary = load(checkpoint, options.pop("device", "auto"))
    if not hasattr(task, "predict"):
        raise ValueError(f"{type(task).__name__} does not support predict.py; use evaluate.py")
    parameters = {name: p for name, p in inspect.signature(task.predict).parameters.items() if name != "vocabulary"}
    for name, p in parameters.items():
        if p.default is p.empty and name not in options:
            raise ValueError(f"{name} is missing; type {name}=FILE")
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in parameters:
            raise ValueError(f"there is no option {name!r}; there are: checkpoint, device, {', '.join(parameters)}")
        kind = parameters[name].annotation
        try:
            if kind is bool:
                values[name] = {"true": True, "false": False}[value]
            else:
                values[name] = kind(value) if kind in (int, float) else value
        except (KeyError, ValueError):
            expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{name}={value} must be {expected}") from None
    for text in task.predict(vocabulary, **values):
        print(text, end="", flush=True)


if __name__ == "__main__":
    console.use_utf8()
    errors.guard(lambda: main(sys.argv[1:]))

"""Test a trained network on any split of any data: `python evaluate.py checkpoint=runs/classification/<time>`."""

import json
import logging
import math
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from tasks.run import config_hints, console, errors, files, imports, run_dir

USAGE = """Test a trained network: python evaluate.py checkpoint=FOLDER_OR_FILE KEY=VALUE ...

Without other options it reproduces the test results of training.

checkpoint    the folder of a run, below runs/, for the checkpoint that its test used; or any .ckpt file
split         test, val or train; train is read in the order and batches of a test (test)
data          a file of conf/data, of the same kind as the data of training: data=mr for a network trained on cr. The
              checkpoint's vocabulary and labels are kept.
data.KEY      an option of the data: data.root=, data.test=FILE, data.batch_size=, data.eval_unroll=, ...
task.KEY      an option of the task that does not change its network: task.beam=, ...
model.eval_memory_length    of SRU++ and Transformer-XL
limit         a number of batches, or a part of them: 10, 0.5, or 1.0 for all (as in training)
precision     32-true, bf16-mixed or 16-mixed (as in training)
device        auto, cpu or cuda (auto)
output        a folder for metrics.json and the files that a test writes, such as translations; or FILE.json for the
              metrics, with the other files beside it. Without it nothing is written. Nothing is overwritten.
"""
OWN = ("checkpoint", "split", "data", "limit", "precision", "device", "output")
SPLITS = ("test", "val", "train")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def main(words: list[str]) -> dict[str, float]:
    """Evaluate and print a table; returns the metrics."""
    if not words or {"-h", "--help", "help"} & set(words):
        print(USAGE, end="")
        return {}
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*isinstance.treespec, LeafSpec")
    options, changes = parse(words)
    checkpoint = run_dir.find_checkpoint(options["checkpoint"])
    with imports.no_garbage():  # not before: it takes seconds
        imports.import_lightning()
        import pytorch_lightning as pl

        from tasks import trained
        from tasks.run import metrics
    split, device = options.get("split", "test"), options.get("device", "auto")
    trained.check_device(device)
    saved = trained.open_checkpoint(checkpoint)
    task, vocabulary = trained.build_task(saved, changes)
    data = trained.build_data(saved, vocabulary, split, options.get("data"), changes["data"])
    training = saved.config["trainer"]
    precision = options.get("precision", training.get("precision", PRECISIONS[0]))
    limit = read_limit(options["limit"]) if "limit" in options else training.get(f"limit_{split}_batches")
    start = time.perf_counter()
    with ExitStack() as stack:
        artifacts = task.test_artifacts if split == "test" else ()
        file = prepare_output(options["output"], artifacts) if "output" in options else None
        if file is None and hasattr(task, "writes_likelihoods"):
            task.writes_likelihoods = False  # gigabytes in a temporary folder
        trainer = pl.Trainer(
            accelerator="gpu" if device[:4] == "cuda" else device,
            devices=[int(device[5:])] if ":" in device else 1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            default_root_dir=file.parent if file else stack.enter_context(tempfile.TemporaryDirectory()),
            limit_test_batches=limit,
            limit_val_batches=limit,
        )
        data.prepare_data()
        data.setup()
        run = trainer.test if split == "test" else trainer.validate
        parts = run(task, data.evaluation(split), verbose=False)
    values = {
        f"{split}/{name.partition('/')[2]}": value for part in parts for name, value in part.items() if name != "step"
    }
    if undefined := [name for name, value in values.items() if math.isnan(value)]:
        raise ValueError(f"{undefined[0]} is NaN for checkpoint={saved.path}; use another checkpoint")
    record = {
        "metrics": values,
        "checkpoint": str(saved.path),
        "split": split,
        "data": options.get("data", saved.config["choices"]["data"]),
        "options": changes,
        "limit": limit,
        "precision": precision,
    }
    rows = [*metrics.metric_rows(values, metrics.sizes(task)), ("data", f"{record['data']}, {split}")]
    if limit not in (None, 1.0) or type(limit) is int:  # 1 is one batch, 1.0 all of them
        rows.append(("only", f"{limit} of the batches" if type(limit) is float else f"{limit} batches"))
    rows += [("checkpoint", str(saved.path)), ("wall time", f"{time.perf_counter() - start:.1f} s")]
    print(metrics.table(rows))
    if file is not None:
        files.write_text(file, json.dumps(record, indent=2) + "\n")
        print(f"written: {', '.join(map(str, [file, *(file.parent / name for name in artifacts)]))}")
    return values


def parse(words: list[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The options of this command, and those of data, task and model."""
    options = console.options_of_checkpoint(words, example="split=val")
    changes: dict[str, dict[str, Any]] = {"data": {}, "task": {}, "model": {}}
    for name, value in list(options.items()):
        part, _, key = name.partition(".")
        if part in changes and key:
            try:
                changes[part][key] = yaml.safe_load(options.pop(name))
                if value == "":
                    raise ValueError(f"{name}= is empty: type a value, or leave it out")
            except yaml.YAMLError as error:
                raise ValueError(f"{name}={value} cannot be read; type a list as 'data.speeds=[1.0]'") from error
        elif name not in OWN:
            known = [*OWN, "data.batch_size", "data.root", "task.beam"]
            raise ValueError(f"there is no option {name!r}.{config_hints.suggest_keys(name, known)}")
    for name, values in (("split", SPLITS), ("precision", PRECISIONS)):
        if options.get(name, values[0]) not in values:
            raise ValueError(f"{name}={options[name]} must be one of {', '.join(values)}")
    return options, changes


def read_limit(limit: str) -> int | float:
    try:
        value = yaml.safe_load(limit)
    except yaml.YAMLError:
        value = None
    if type(value) not in (int, float) or not value > 0 or (type(value) is float and value > 1):
        raise ValueError(f"limit={limit} must be a number of batches, as 10, or a part of them, as 0.5 or 1.0")
    return value


def prepare_output(output: str, artifacts: tuple[str, ...]) -> Path:
    """The file for the metrics, in a folder that exists; FileExistsError if a file would be overwritten."""
    path = Path(output).expanduser()
    file = path if path.suffix == ".json" else path / "metrics.json"
    paths = (file, *(file.parent / name for name in artifacts))
    if existing := [str(each) for each in paths if each.exists()]:
        raise FileExistsError(f"output={output}: {' and '.join(existing)} would be overwritten; name another folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # fail now, not after minutes of work
            pass
    except OSError as error:
        raise PermissionError(f"output={output} cannot be written ({error.strerror}); name another") from error
    return file


if __name__ == "__main__":
    console.use_utf8()
    errors.guard(lambda: main(sys.argv[1:]))

"""Test a trained network on any split of any data: `python evaluate.py checkpoint=runs/classification/<time>`."""

import json
import logging
import math
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

from tasks import trained
from tasks.run import config_checks, console, errors, files
from tasks.run.metrics import sizes, table

USAGE = """Test a trained network: python evaluate.py checkpoint=FOLDER_OR_FILE KEY=VALUE ...

Without more it gives the numbers that its training ended with.

checkpoint    the folder of a run, below runs/, for what its test took; or a .ckpt, wherever it lies
split         test, val or train; the last as it is read for evaluation (test)
data          a file of conf/data, of the same kind as the data of training: data=mr for a network trained on cr. The
              checkpoint's vocabulary and labels are kept.
data.KEY      an option of the data: data.root=, data.test=FILE, data.batch_size=, data.eval_unroll=, ...
task.KEY      an option of the task that leaves its network as it is: task.beam=, ...
model.eval_memory_length    of SRU++ and Transformer-XL
limit         batches, or with a point a part of them: 1.0 for all (as in training)
precision     32-true, bf16-mixed or 16-mixed (as in training)
device        auto, cpu or cuda (auto)
output        a folder for metrics.json and for what a test writes, translations for example; or FILE.json for the
              metrics, which the others are written beside. Without it nothing is written. Nothing is overwritten.
"""
OWN = ("checkpoint", "split", "data", "limit", "precision", "device", "output")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
# What may be downloaded is said by this project, not by a checkpoint that somebody may have sent.
DOWNLOADS = ("files", "rows", "parts", "url", "archive")
PLACES = ("root", "cache")
SPLITS = ("train", "val", "test")
# What decides which examples are held out: others of the same corpus were trained on.
HELD_OUT = ("fold", "seed", "num_train", "num_val", "valid_bytes", "test_bytes")


def main(words: list[str]) -> dict[str, float]:
    """Evaluate, print the table; returns the metrics."""
    if not words or {"-h", "--help", "help"} & set(words):
        print(USAGE, end="")
        return {}
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*isinstance.treespec, LeafSpec")
    options, changes = parse(words)
    split, device = options.get("split", "test"), options.get("device", "auto")
    if split not in SPLITS:
        raise ValueError(f"split={split} must be one of test, val, train")
    trained.check_device(device)
    saved = trained.open_checkpoint(options["checkpoint"])
    task, vocabulary = network(saved, changes)
    data = corpus(saved, vocabulary, split, options.get("data"), changes["data"])
    trainer_options = saved.config["trainer"]
    precision = options.get("precision", trainer_options.get("precision", PRECISIONS[0]))
    if options.get("precision", PRECISIONS[0]) not in PRECISIONS:
        raise ValueError(f"precision={precision} must be one of {', '.join(PRECISIONS)}")
    limit = batches(options["limit"]) if "limit" in options else trainer_options.get(f"limit_{split}_batches")
    start = time.perf_counter()
    with ExitStack() as stack:
        written = task.test_artifacts if split == "test" else ()
        folder, file = places(options.get("output"), written)
        if folder is None and hasattr(task, "writes_likelihoods"):
            task.writes_likelihoods = False  # gigabytes, which nobody would see
        trainer = pl.Trainer(
            accelerator="gpu" if device[:4] == "cuda" else device,
            devices=[int(device[5:])] if ":" in device else 1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            default_root_dir=folder or stack.enter_context(tempfile.TemporaryDirectory()),
            limit_test_batches=limit,
            limit_val_batches=limit,
        )
        data.prepare_data()
        data.setup()
        run = trainer.test if split == "test" else trainer.validate
        found = {
            name: value for part in run(task, data.evaluation(split), verbose=False) for name, value in part.items()
        }
    metrics = {f"{split}/{name.partition('/')[2]}": value for name, value in found.items() if name != "step"}
    if nothing := [name for name, value in metrics.items() if math.isnan(value)]:
        raise ValueError(f"{nothing[0]} is no number, by the weights of {saved.path}; take another checkpoint")
    outcome = {
        "metrics": metrics,
        "checkpoint": str(saved.path),
        "split": split,
        "data": options.get("data", saved.config["choices"]["data"]),
        "options": changes,
        "limit": limit,
        "precision": precision,
    }
    print(table([*summary(outcome, task), ("wall time", f"{time.perf_counter() - start:.1f} s")]))
    if folder is not None and file is not None:
        files.write_text(file, json.dumps(outcome, indent=2) + "\n")
        print(f"written: {', '.join(map(str, [file, *(folder / name for name in written)]))}")
    return metrics


def summary(outcome: dict[str, Any], task: Any) -> list[tuple[str, str]]:
    """What was evaluated, and its metrics, for people."""
    counts, limit = sizes(task), outcome["limit"]
    rows = [(name, f"{value:.4g}") for name, value in outcome["metrics"].items()]
    rows.append(("parameters", f"{counts['parameters']:,} ({counts['encoder_parameters']:,} in the encoder)"))
    rows.append(("data", f"{outcome['data']}, {outcome['split']}"))
    if limit not in (None, 1.0) or type(limit) is int:  # 1 is one batch
        rows.append(("only", f"{limit} of the batches" if type(limit) is float else f"{limit} batches"))
    return [*rows, ("checkpoint", outcome["checkpoint"])]


def parse(words: list[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The options of this command, and those of data, task and model."""
    options: dict[str, str] = {}
    changes: dict[str, dict[str, Any]] = {"data": {}, "task": {}, "model": {}}
    for word in words:
        name, equals, value = word.partition("=")
        part, _, key = name.partition(".")
        if not equals or not value or name in options or key in changes.get(part, {}):
            raise ValueError(f"{word!r} is no KEY=VALUE that was not given before; type for example split=val")
        if part in changes and key:
            try:
                changes[part][key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{word} cannot be read; type a list as 'data.speeds=[1.0]'") from error
        elif name in OWN:
            options[name] = value
        else:
            known = [*OWN, "data.batch_size", "data.root", "task.beam"]
            raise ValueError(f"there is no option {name!r}.{errors.suggest_keys(name, known)}")
    if "checkpoint" not in options:
        raise ValueError("checkpoint is missing; type checkpoint=FOLDER, where FOLDER is that of a run, below runs/")
    return options, changes


def batches(limit: str) -> int | float:
    """How many, or which part of them."""
    try:
        value = yaml.safe_load(limit)
    except yaml.YAMLError:
        value = None
    if type(value) not in (int, float) or not value > 0 or (type(value) is float and value > 1):
        raise ValueError(f"limit={limit} must be a number of batches, as 10, or a part of them, as 0.5 or 1.0")
    return value


def places(output: str | None, writes: tuple[str, ...]) -> tuple[Path | None, Path | None]:
    """The folder and the file of the metrics; FileExistsError where something would be overwritten."""
    if output is None:
        return None, None
    path = Path(output).expanduser()
    folder, file = (path.parent, path) if path.suffix == ".json" else (path, path / "metrics.json")
    if there := [str(each) for each in (file, *(folder / name for name in writes)) if each.exists()]:
        raise FileExistsError(f"output={output}: {' and '.join(there)} would be overwritten; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # not after minutes of work
            pass
    except OSError as error:
        raise PermissionError(f"output={output} cannot be written ({error.strerror}); name another") from error
    return folder, file


def network(saved: trained.Saved, changes: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """The task with its options as they were, or changed, and the vocabulary."""
    task, vocabulary = trained.build(saved)  # of which the classes are this project's
    changed = [f"{part}.{name}={value}" for part in ("task", "model") for name, value in changes[part].items()]
    if not changed:
        return task, vocabulary
    known = [
        name
        for name in config_checks.options_of(type(task))
        if name not in ("encoder", "optimizer", "scheduler", "linear")
    ]
    for name in changes["task"]:
        if name not in known or name in vocabulary.model_kwargs:
            known = [name for name in known if name not in vocabulary.model_kwargs]
            raise ValueError(f"{type(task).__name__} has no option task.{name}.{errors.suggest_keys(name, known)}")
    for name in changes["model"]:
        if name != "eval_memory_length" or name not in saved.config["model"]:
            raise ValueError(f"model.{name} is settled by the checkpoint, whose weights belong to it: leave it out")
    parts = {part: saved.config[part] | changes[part] for part in ("task", "model")}
    config_checks.check(OmegaConf.create(saved.config | parts))
    try:
        return trained.build(replace(saved, config=saved.config | parts))
    except ValueError as error:
        if error.__cause__ is None:  # a value that the class itself refuses
            raise
        raise ValueError(
            f"{' '.join(changed)} makes another network than that of the checkpoint's weights: leave it out"
        ) from error


def corpus(saved: trained.Saved, vocabulary: Any, split: str, name: str | None, changes: dict[str, Any]) -> Any:
    """The data of training, or others of their kind, to be read with the checkpoint's vocabulary."""
    run, choices = saved.config["data"], saved.config["choices"]
    of_training, _ = trained.class_and_options(saved.config, "data", pl.LightningDataModule)
    is_other = name not in (None, choices["data"])
    # Before they are composed: a name may be a path, to a file that came with the checkpoint.
    for part, chosen in (("data", name or choices.get("data")), ("task", choices.get("task"))):
        stems = sorted(path.stem for path in (config_checks.ROOT / "conf" / part).glob("[!_]*.yaml"))
        if chosen not in stems:
            said = f"{part}={chosen}" if name and part == "data" else f"the checkpoint's {part}, {chosen!r},"
            raise ValueError(f"{said} is no file of conf/{part}.{errors.suggest_keys(str(chosen), stems)}")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_checks.ROOT / "conf")):
        cfg = hydra.compose("config", [f"task={choices['task']}", f"data={name or choices['data']}"])
    values: dict[str, Any] = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    target, _ = trained.class_and_options({"data": values}, "data", pl.LightningDataModule)
    if target.vocabulary_of is not of_training.vocabulary_of:
        raise ValueError(
            f"data={name} is of another kind than the data of training, {choices['data']}; of the same are: "
            f"{', '.join(kin(of_training))}"
        )
    known, settled = config_checks.options_of(target), target.FIXED_BY_CHECKPOINT
    if not is_other:
        values |= {key: value for key, value in run.items() if key not in ("_target_", *PLACES, *DOWNLOADS)}
    values |= {key: run[key] for key in settled if key in run and key in known}
    # The folders of training, where they are here.
    values |= {key: run[key] for key in PLACES if key in values and Path(str(run.get(key))).expanduser().is_dir()}
    for key in changes:
        top = key.partition(".")[0]
        if top in settled:
            raise ValueError(f"data.{key} is settled by the checkpoint, {values.get(top)}: leave it out")
        if top not in known:
            free = [each for each in known if each not in settled]
            raise ValueError(f"the data have no option data.{key}.{errors.suggest_keys(top, free)}")
        if not is_other and key in HELD_OUT and changes[key] != run.get(key):
            raise ValueError(f"data.{key}={changes[key]} would test what was trained on ({run.get(key)}): leave it out")
        if "." in key:
            raise ValueError(f"type data.{top}={{...}} as a whole, not data.{key}")
    values |= changes
    # Nothing but the split is read, where each has files of its own: they stand for all.
    values |= {key: values[split] for key in SPLITS if key in values}
    target, options = trained.class_and_options({"data": values}, "data", pl.LightningDataModule)
    full = OmegaConf.create(saved.config | {"data": values, "choices": choices | {"data": name or choices["data"]}})
    config_checks.check(full)
    data = target(**options)
    data.checkpoint_vocabulary = vocabulary
    return data


def kin(of_training: Any) -> list[str]:
    """The files of conf/data that are read alike."""

    def target(path: Path) -> Any:
        cfg: Any = OmegaConf.load(path)
        return get_class(cfg._target_) if "_target_" in cfg else target(path.with_name(f"{cfg.defaults[0]}.yaml"))

    paths = sorted((config_checks.ROOT / "conf/data").glob("[!_]*.yaml"))
    return [path.stem for path in paths if target(path).vocabulary_of is of_training.vocabulary_of]


if __name__ == "__main__":
    console.use_utf8()
    errors.guard(lambda: main(sys.argv[1:]))

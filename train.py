"""Train, test and record one run: `python train.py task=classification data=trec model=sru`."""

import difflib
import inspect
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).parent


def run(cfg: DictConfig) -> float | None:
    """Run what the configuration says; returns the monitored metric's best value, which sweepers optimise."""
    from tasks.record import finish_wandb, result, summary_table, write_result, write_text

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # A corpus in memory needs no workers, a resumed run finds its checkpoints, how Lightning uses torch is its own.
    warnings.filterwarnings(
        "ignore", ".*does not have many workers.*|Checkpoint directory .* is not empty|.*isinstance.treespec, LeafSpec"
    )
    check_options(cfg)
    folder = open_folder(cfg)
    # A bar in a file is a wall of lines.
    cfg.trainer.enable_progress_bar &= sys.stdout.isatty()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **data.dims)
    outcome = None
    try:
        trainer = instantiate(cfg.trainer)
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_text(folder / "run.json", json.dumps(provenance(), indent=2) + "\n")
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
        trainer.fit(task, datamodule=data, ckpt_path=folder / "checkpoints/last.ckpt" if cfg.resume else None)
        # Before the test, which sets the callbacks back to the best epoch.
        found = result(trainer, task) | {"commit": provenance()["commit"]}
        best = trainer.checkpoint_callback.best_model_path
        (tested,) = trainer.test(task, datamodule=data, ckpt_path=best or None, verbose=False)
        found["metrics"] |= tested
        write_result(found, cfg.run_dir)
        outcome = found
    finally:
        finish_wandb(outcome and outcome["metrics"])
        if outcome is None and (folder / "checkpoints/last.ckpt").exists():
            print(f"The run stopped early. Go on with: python train.py resume={shlex.quote(str(folder))}")
    print(summary_table(outcome, cfg.run_dir))
    return outcome["metrics"].get(outcome["monitor"])


def check_options(cfg: DictConfig) -> None:
    """Refuse a size that is no number, and an option that the class named by data, model or task does not take."""
    for key, example in {"seed": 1, "depth": 2, "width": 128, "epochs": 100, "dropout": 0.5}.items():
        if type(cfg[key]) not in (int, type(example)):
            raise ValueError(f"{key}={cfg[key]} is no number; type for example {key}={example}")
    for part in ("data", "model", "task"):
        target = get_class(cfg[part]._target_)
        classes = [
            c
            for c in target.__mro__
            if "__init__" in vars(c) and c.__module__.split(".")[0] in ("sru", "data", "tasks")
        ]
        known = sorted({name for c in classes for name in inspect.signature(c).parameters if name != "options"})
        for name in cfg[part]:
            if name not in known and name not in ("_target_", "_partial_"):
                raise ValueError(
                    f"{part} {cfg[part]._target_} has no option {name!r} (from an ablation or an experiment?). "
                    f"It has: {', '.join(known)}."
                )


def open_folder(cfg: DictConfig) -> Path:
    """The run's folder, made and writable; a finished or begun run in it is not overwritten."""
    folder = Path(cfg.run_dir)
    if cfg.resume:
        if not (folder / "checkpoints/last.ckpt").exists():
            raise FileNotFoundError(
                f"resume={cfg.resume}: no checkpoints/last.ckpt there; start the run anew without resume."
            )
        before = OmegaConf.load(folder / "config.yaml")
        for key, old, new in changes(before, cfg):
            # What only names the folder is no change, and a list repeats what has keys of its own.
            if (
                str(old).replace(before.run_dir, cfg.run_dir) != str(new)
                and not isinstance(new, list)
                and key != "resume"
            ):
                print(f"resumed with {key}: {old} -> {new}")
    elif (folder / "config.yaml").exists():
        raise FileExistsError(
            f"run_dir={folder} holds a run already. Go on with resume={folder}, or name another run_dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise PermissionError(
            f"run_dir={folder} cannot be written ({error.strerror}); name another with run_dir=FOLDER."
        ) from error
    return folder


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {dotted key: value}."""
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {key: value for name in node for key, value in leaves(node[name], f"{prefix}{name}.").items()}


def changes(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """The keys whose values differ, as (dotted key, old, new)."""
    old, new = (leaves(OmegaConf.to_container(cfg, resolve=True)) for cfg in (before, after))
    return [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]


def provenance() -> dict[str, Any]:
    """What a repetition of the run needs beside its configuration."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain") else ""),
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    return run(cfg)


def resumed(arguments: list[str]) -> list[str]:
    """Put the overrides of the run in `resume=FOLDER` before those given now, and go on in its folder."""
    folders = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    if not folders:
        return arguments
    folder = Path(folders[-1].strip("'\"")).resolve()
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("resume goes on with one run; give it without -m.")
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"resume={folder} is no run folder (it has no run.json); runs lie below runs/.")
    overrides = json.loads((folder / "run.json").read_text(encoding="utf-8"))["overrides"]
    quoted = "'" + str(folder).replace("'", "\\'") + "'"
    rest = [word for word in arguments if not word.startswith("resume=")]
    kept = [word for word in overrides if not word.startswith(("resume=", "run_dir="))]
    return [*kept, *rest, f"resume={quoted}", f"run_dir={quoted}", f"hydra.run.dir={quoted}"]


def explain(error: Exception) -> str:
    """One message for a person: what is wrong, what is there, what was perhaps meant."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    text = (
        f"{error}" if isinstance(error, (ValueError, OSError, HydraException)) else f"{type(error).__name__}: {error}"
    )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        missing_file = re.search(r"Could not find '([\w/]+)/(\S+)'", text)
        missing_key = re.search(r"Could not override '([^']+)'", text)
        if missing_file:
            wrong, known = missing_file[2], [path.stem for path in (ROOT / "conf" / missing_file[1]).glob("[!_]*.yaml")]
        elif missing_key:
            with hydra.initialize(version_base="1.3", config_path="conf"):
                cfg = hydra.compose("config")
            wrong, known = missing_key[1], list(leaves(OmegaConf.to_container(cfg)))
        else:
            return text
        close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
        text += f"\nDid you mean: {', '.join(close)}?" if close else f"\nThere are: {', '.join(sorted(known))}."
    return text


if __name__ == "__main__":
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    # Hydra would print a traceback and exit; with this it hands the error on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = resumed(sys.argv[1:])
        main()
    except Exception as error:
        if show_traceback:
            raise
        sys.exit(f"error: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where.)")

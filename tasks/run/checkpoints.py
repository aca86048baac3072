"""Checkpoints: write them atomically, with the run's configuration, and read them without executing their content."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import TorchCheckpointIO

from tasks.run import distributed
from tasks.run.files import atomic_write, write_text


class AtomicCheckpoints(TorchCheckpointIO):
    """Saves beside the old file and then replaces it.

    Lightning copies from the system's temporary folder: a kill during the copy leaves half a checkpoint and no old one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, path.with_name(f".{path.name}.tmp")) as file:
            torch.save(checkpoint, file)


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with three changes.

    It saves after the validation, not after the epoch, so that a run that stops within an epoch resumes there. A run
    folder may be moved. A hook that never saves is not called in each step.
    """

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Lightning skips a hook that is None.
        if not self._every_n_train_steps and self._train_time_interval is None:
            self.on_train_batch_end = None  # type: ignore[assignment, method-assign]

    def _should_save_on_train_epoch_end(self, trainer: pl.Trainer) -> bool:
        return not trainer.enable_validation

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def move(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {key: move(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        models = {move(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"best_k_models": models, "dirpath": self.dirpath})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a run's checkpoint, without executing any of it; ValueError for other files."""
    try:
        content = load_checked(path)
    except Exception as error:  # torch.load may raise anything
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of this project ({type(error).__name__}); none of it was "
            f"executed. {instead_of(path)}"
        ) from error
    if not {"random_state", "state_dict", "epoch", "loops", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"{path} is not a checkpoint of this project; use a copy of the folder, or start a new run.")
    return content


def load_checked(path: Path) -> dict[str, Any]:
    # torch does not compare checksums: a flipped bit would change a weight unnoticed.
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} is wrong")
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def instead_of(damaged: Path) -> str:
    """What to type instead of a damaged checkpoint: the run's other one may be complete."""
    other = damaged.with_name("best.ckpt" if damaged.name == "last.ckpt" else "last.ckpt")
    try:
        step = load_checked(other)["global_step"]
    except Exception:
        return "Use a copy of the folder, or start a new run."
    if damaged.name == "last.ckpt":
        copy = f"`cp {other} {damaged}`"
        return f"{other} is complete, of step {step}: to resume from it, type {copy} and the same command again."
    return f"{other} is complete, of step {step}: use that."


class Recorder(pl.Callback):
    """Writes config.yaml and run.json, which a resume needs, and adds the configuration to each checkpoint.

    It writes when training begins, so that a run with an unreadable checkpoint keeps its record. It also removes the
    results of an earlier call.
    """

    def __init__(self, config: Any, origin: dict[str, Any], folder: Path) -> None:
        self.config, self.origin, self.folder = config, origin, folder
        self.has_begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.has_begun = True
        if not distributed.rank():
            for name in ("metrics.json", "checkpoints/average.ckpt"):
                (self.folder / name).unlink(missing_ok=True)
            write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config)))
            write_text(self.folder / "run.json", json.dumps(self.origin, indent=2) + "\n")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

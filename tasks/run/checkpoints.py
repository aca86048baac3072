"""Checkpoints: written atomically, read without executing anything, with the configuration of their run."""

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
    """Saves beside the old file and then takes its place; Lightning goes through the system's temporary folder, and a
    kill during the copy from there would leave half a checkpoint and no old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with atomic_write(path, temporary) as file:
            torch.save(checkpoint, file)


class Checkpoint(ModelCheckpoint):
    """Lightning's, but for this: a run folder that was moved keeps the best epoch so far, and a run that stops within
    an epoch goes on there, since what is saved is the state after the validation and not after the epoch. A hook of
    the step that never saves is left out."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # A hook that never saves: Lightning skips what cannot be called.
        if not self._every_n_train_steps and self._train_time_interval is None:
            self.on_train_batch_end = None  # type: ignore[assignment, method-assign]

    def _should_save_on_train_epoch_end(self, trainer: pl.Trainer) -> bool:
        return not trainer.enable_validation

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {key: moved(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        models = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"best_k_models": models, "dirpath": self.dirpath})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A run's checkpoint, of which nothing is executed; ValueError for what is none."""
    try:
        content = load_checked(path)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this project ({type(error).__name__}); nothing of it was run. "
            f"{instead_of(path)}"
        ) from error
    if not {"random_state", "state_dict", "epoch", "loops", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of this project; use a copy of the folder, or start a new run.")
    return content


def load_checked(path: Path) -> dict[str, Any]:
    # torch compares no checksums: a flipped bit would be a weight like any other.
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} is wrong")
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def instead_of(damaged: Path) -> str:
    """What to type where a checkpoint is damaged: the other one of the run may be whole."""
    other = damaged.with_name("best.ckpt" if damaged.name == "last.ckpt" else "last.ckpt")
    try:
        step = load_checked(other)["global_step"]
    except Exception:  # as above
        return "Use a copy of the folder, or start a new run."
    if damaged.name == "last.ckpt":
        return f"{other} is whole, of step {step}: to go on from there, `cp {other} {damaged}` and the same again."
    return f"{other} is whole, of step {step}: take that."


class Recorder(pl.Callback):
    """Writes config.yaml and run.json, which a resume starts from, and the configuration into each checkpoint, which
    is then enough to use the network.

    Not before training begins: a run whose checkpoint cannot be read keeps its record. What an earlier training ended
    with is no result of this one, and is removed.
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

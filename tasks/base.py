"""The base class of all tasks: training and evaluation steps, optimiser, logging and resume."""

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor, nn

from tasks.run.distributed import all_gather_object, all_reduce_sum, rank, world_size
from tasks.run.files import write_text

NOT_FINITE = "the network returns NaN or infinite values: its checkpoint is damaged, or its training diverged"
# Hooks of a training step whose return value Lightning ignores.
STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


class NoProfiler(PassThroughProfiler):
    """Lightning's default profiler without its generators, which Lightning enters dozens of times per step."""

    NOTHING = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.NOTHING


def skip_empty_hooks(trainer: Any) -> None:
    """Make Lightning skip the hooks that nothing overrides; calling them takes 0.2 ms per step (bench/NOTES.md)."""
    for owner, base in [(trainer.lightning_module, pl.LightningModule), *((c, pl.Callback) for c in trainer.callbacks)]:
        for name in STEP_HOOKS:
            if getattr(getattr(owner, name), "__func__", None) is getattr(base, name):
                setattr(owner, name, None)  # Lightning skips a hook that is not callable
    if type(trainer.profiler) is PassThroughProfiler:
        trainer.profiler = NoProfiler()


class Task(pl.LightningModule, ABC):
    """A network with its loss and metrics; a subclass builds the network and defines `loss`.

    Validation and test metrics are means over an epoch; training metrics are means since the last validation. Each of
    several processes computes a part of the batch and weights its loss by the size of that part, so that the averaged
    gradient is the gradient of the whole batch.

    Args:
        optimizer: builds the optimiser from the trainable parameters.
        scheduler: builds the learning-rate schedule, as in tasks/schedules.py; None keeps the rate constant.
    """

    unit = "examples"  # what the size that `loss` returns counts
    test_artifacts: tuple[str, ...] = ()  # files that a test writes into the run folder

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batch_size = 0  # size of the last batch, read by ThroughputMonitor
        self.sums: dict[str, dict[str, Any]] = {}  # {stage: {metric: sum}} since the last log entry
        self.random_state: dict[str, Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this attribute dozens of times per step; nn.Module would search its parameters each time.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        skip_empty_hooks(self.trainer)

    def configure_model(self) -> None:
        if hasattr(self.trainer.strategy, "shard"):  # trainer=fsdp
            self.trainer.strategy.shard(self)

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss to minimise, other metrics, and the number of examples over which all of them are means."""

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        """Metrics that need the whole epoch: a mean over batches would be wrong. `means` are the other metrics."""
        return {}

    @property
    def encoders(self) -> list[nn.Module]:
        """The networks whose time and parameters are reported separately."""
        return [self.encoder]  # type: ignore[list-item]

    def _step(self, batch: Any, stage: str) -> Tensor:
        loss, metrics, size = self.loss(batch)
        self.batch_size = size
        sums = self.sums.setdefault(stage, {"size": 0})
        sums["size"] += size
        # The sum over an epoch needs more digits than float32 has; Apple's GPUs have no float64.
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        for name, value in {"loss": loss, **metrics}.items():
            if name not in sums:
                sums[name] = torch.zeros_like(value, dtype=dtype)
            sums[name].add_(value.detach(), alpha=size)
        if stage == "train" and world_size() > 1:
            sizes = all_reduce_sum(torch.tensor(float(size), device=loss.device))
            return loss * (size * world_size() / sizes.clamp(min=1))
        return loss

    def _log_means(self, stage: str) -> None:
        if sums := self.sums.pop(stage, None):
            sums["size"] = torch.tensor(float(sums["size"]), device=self.device)
            sums = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in sums.items()}
            size = sums.pop("size")
            # An epoch without any example has no loss, rather than a loss of 0.
            means = {name: value / size for name, value in sums.items() if size > 0}
            if self.trainer.state.fn == "fit" and means and not torch.isfinite(means["loss"]):
                raise ValueError(
                    f"the {stage} loss is {means['loss']:g} after {self.trainer.global_step} steps; type a lower "
                    "task.optimizer.lr=, trainer.gradient_clip_val=1, or trainer.precision=32-true"
                )
            means |= self.epoch_metrics(means, stage)
            self.log_dict({f"{stage}/{name}": value.float() for name, value in means.items()}, prog_bar=stage == "val")
            # The loggers' x axis; Lightning's own counter differs after a resume within an epoch.
            self.log("step", float(self.trainer.global_step))

    def training_step(self, batch: Any) -> Tensor:
        return self._step(batch, "train")

    # Lightning inspects the signature at every step; `inspect` is faster if it finds it here.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def validation_step(self, batch: Any) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Any) -> None:
        self._step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_means("train")
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def on_train_epoch_end(self) -> None:
        self._repeat_batches()
        if not self.trainer.enable_validation:
            self._log_means("train")

    def _repeat_batches(self) -> None:
        # trainer.overfit_batches needs the same batches in every epoch, and the loaders shuffle by epoch.
        trainer: Any = self.trainer
        for loader in trainer.fit_loop._combined_loader.flattened if trainer.overfit_batches else ():
            if getattr(loader, "start", 0) == 0 and hasattr(loader, "epoch"):
                loader.epoch = 0

    def write_artifact(self, name: str, text: str) -> None:
        """Write a file of `test_artifacts` into the run folder, once for all processes."""
        if not rank():
            write_text(Path(self.trainer.default_root_dir) / name, text)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if not gradient_clip_val:
            return
        # FSDP splits the network over the processes; only it can compute the norm of all parts.
        network: Any = self.trainer.strategy.model
        if gradient_clip_algorithm != "value" and hasattr(network, "clip_grad_norm_"):
            network.clip_grad_norm_(gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    def own_state(self) -> dict[str, Any]:
        """State of this process that a resumed run needs, on the CPU."""
        # Lightning saves no random state; without it, a resumed run would draw other dropout masks.
        random_state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        sums = self.sums.get("train")  # set in a checkpoint between two validations
        return {
            "random_state": random_state,
            "sums": sums and {name: torch.as_tensor(sums[name]).cpu().clone() for name in sums},
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.random_state = state["random_state"]
        if sums := state.get("sums"):  # absent in checkpoints of older versions
            self.sums["train"] = sums

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.own_state()
        checkpoint.update(own)
        if len(every := all_gather_object(own)) > 1:
            checkpoint["processes"] = every

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Evaluation may use another number of processes, and any state will do. (Training refuses another number.)
        every = checkpoint.get("processes", [])
        self.load_own_state(every[rank()] if rank() < len(every) else checkpoint)
        # Older versions stored each gate's biases as one row: the same numbers in another shape.
        parameters = [p for p in self.parameters() if p.requires_grad]
        for optimizer in checkpoint.get("optimizer_states", []):
            for i, p in enumerate(parameters):
                state = optimizer["state"].get(i, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dim() > p.dim() and value.numel() == p.numel():
                        state[name] = value.reshape(p.shape)

    def on_train_start(self) -> None:
        self._repeat_batches()
        # Sums from a checkpoint are on the CPU.
        self.sums = self.transfer_batch_to_device(self.sums, self.device, 0)
        if self.random_state is None and rank():
            torch.manual_seed(torch.initial_seed() + rank())  # otherwise all processes would draw the same masks
        if self.random_state is not None:
            torch.set_rng_state(self.random_state["cpu"])
            torch.cuda.set_rng_state_all(self.random_state["cuda"])
            self.random_state = None


class StatefulTask(Task):
    """A task that trains on consecutive segments of sequences: truncated back-propagation through time.

    `state` is the encoder's state after the last training segment, without gradient, and is part of a checkpoint.
    """

    state: Any = None

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {"state": self.transfer_batch_to_device(self.state, torch.device("cpu"), 0)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.state = state["state"]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.state = self.transfer_batch_to_device(self.state, self.device, 0)

"""What every task shares: the stages, the optimiser, the log and the random state across a resume."""

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor, nn

from tasks.run.distributed import all_gather_object, all_reduce_sum, rank, world_size

# The hooks of a training step from which Lightning needs no result.
STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


class NoProfiler(PassThroughProfiler):
    """Lightning's own without its generators: it enters a profiler's context dozens of times a step."""

    NOTHING = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.NOTHING


def leave_out_idle_hooks(trainer: Any) -> None:
    """Have Lightning call only the hooks of a step that do something.

    The idle ones of all callbacks take 0.2 ms a step (bench/NOTES.md, "Small steps").
    """
    for owner, base in [(trainer.lightning_module, pl.LightningModule), *((c, pl.Callback) for c in trainer.callbacks)]:
        for name in STEP_HOOKS:
            if getattr(getattr(owner, name), "__func__", None) is getattr(base, name):
                setattr(owner, name, None)  # Lightning skips what cannot be called
    if type(trainer.profiler) is PassThroughProfiler:
        trainer.profiler = NoProfiler()


class Task(pl.LightningModule, ABC):
    """A network with its loss and metrics; a subclass builds the network and defines `loss`.

    Metrics are means over what the loss counts. Those of training are over the time since the last validation.

    Of several processes each has a part of a batch, and their gradients are averaged. A mean over its own part counts
    as much as that part is of the whole: the gradient is that of one batch of all parts.

    Args:
        optimizer: builds the optimiser from the parameters that are trained.
        scheduler: builds the schedule of its learning rate, as tasks/schedules.py does; None leaves it as it is.
    """

    unit = "examples"  # what `loss` counts
    test_artifacts: tuple[str, ...] = ()  # the files that a test leaves in the trainer's folder

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batch_size = 0  # of the last step, for the clock
        self.sums: dict[str, dict[str, Any]] = {}  # of each stage, since they were last logged
        self.random_state: dict[str, Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this dozens of times a step, and torch checks each time whether it is a parameter.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        leave_out_idle_hooks(self.trainer)

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss to minimise, further metrics, and the number of examples that both are means over."""

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        """Metrics that follow from the whole of a stage, where the mean of what follows from a batch would be wrong."""
        return {}

    @property
    def encoders(self) -> list[nn.Module]:
        """The networks whose time and parameters are told apart."""
        return [self.encoder]  # type: ignore[list-item]

    def _step(self, batch: Any, stage: str) -> Tensor:
        loss, metrics, size = self.loss(batch)
        self.batch_size = size
        sums = self.sums.setdefault(stage, {"size": 0})
        sums["size"] += size
        # The sum of an epoch has more digits than a float32; Apple's GPUs have no float64.
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
            # Nothing that counts for the loss is no loss, rather than one of 0.
            means = {name: value / size for name, value in sums.items() if size > 0}
            if self.trainer.state.fn == "fit" and means and not torch.isfinite(means["loss"]):
                raise ValueError(
                    f"the {stage} loss is {means['loss']:g} after {self.trainer.global_step} steps; type a lower "
                    "task.optimizer.lr=, trainer.gradient_clip_val=1, or trainer.precision=32-true"
                )
            means |= self.epoch_metrics(means, stage)
            self.log_dict({f"{stage}/{name}": value.float() for name, value in means.items()}, prog_bar=stage == "val")
            # The row of the loggers; Lightning's own count is another one after a resume within an epoch.
            self.log("step", float(self.trainer.global_step))

    def training_step(self, batch: Any) -> Tensor:
        return self._step(batch, "train")

    # Lightning asks for it at every step, and `inspect` takes what stands here.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def validation_step(self, batch: Any) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Any) -> None:
        self._step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_means("train")
        self._log_means("val")

    def on_train_epoch_end(self) -> None:
        self._repeat_batches()
        if not self.trainer.enable_validation:
            self._log_means("train")

    def _repeat_batches(self) -> None:
        # Those of trainer.overfit_batches are the same in every epoch, whatever the order of the others would be.
        trainer: Any = self.trainer
        for loader in trainer.fit_loop._combined_loader.flattened if trainer.overfit_batches else ():
            if getattr(loader, "start", 0) == 0 and hasattr(loader, "epoch"):
                loader.epoch = 0

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if not gradient_clip_val:
            return
        # Where each process has a part of the network, the norm is that of all parts.
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
        """What a resumed run goes on with, and another process has otherwise; on the CPU."""
        # Lightning keeps no random state; without it, a resumed run would draw other dropout masks.
        random_state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        sums = self.sums.get("train")  # of a checkpoint between two validations
        return {
            "random_state": random_state,
            "sums": sums and {name: torch.as_tensor(sums[name]).cpu().clone() for name in sums},
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.random_state = state["random_state"]
        if sums := state.get("sums"):  # which those of older versions lack
            self.sums["train"] = sums

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.own_state()
        checkpoint.update(own)
        if len(every := all_gather_object(own)) > 1:
            checkpoint["processes"] = every

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Of another number of processes, which the door lets no training go on with, the first one's will do.
        every = checkpoint.get("processes", [])
        self.load_own_state(every[rank()] if rank() < len(every) else checkpoint)
        # Earlier versions kept a gate's biases as a row each: the same numbers in another shape.
        parameters = [p for p in self.parameters() if p.requires_grad]
        for optimizer in checkpoint.get("optimizer_states", []):
            for i, p in enumerate(parameters):
                state = optimizer["state"].get(i, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dim() > p.dim() and value.numel() == p.numel():
                        state[name] = value.reshape(p.shape)

    def on_train_start(self) -> None:
        self._repeat_batches()
        # What a checkpoint brought lies on the CPU.
        self.sums = self.transfer_batch_to_device(self.sums, self.device, 0)
        if self.random_state is None and rank():
            torch.manual_seed(torch.initial_seed() + rank())  # or all would drop the same
        if self.random_state is not None:
            torch.set_rng_state(self.random_state["cpu"])
            torch.cuda.set_rng_state_all(self.random_state["cuda"])
            self.random_state = None

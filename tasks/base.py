"""What every task shares: the stages, the optimiser, the log and the random state across a resume."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """torch.nn.Dropout, which draws its masks on a CPU five times as slowly."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return nn.functional.dropout(x, self.p, self.training)
        return x * torch.rand_like(x).lt_(1 - self.p).div_(1 - self.p)


class Task(pl.LightningModule, ABC):
    """A network with its loss and metrics; a subclass builds the network and defines `loss`.

    Args:
        optimizer: builds the optimiser from the parameters that are trained.
    """

    def __init__(self, optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.batch_size = 0  # of the last step, for the clock
        self.random_state: dict[str, Any] | None = None

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss to minimise, further metrics, and the number of examples that both are means over."""

    def _step(self, batch: Any, stage: str) -> Tensor:
        loss, metrics, size = self.loss(batch)
        self.batch_size = size
        values = {f"{stage}/{name}": value for name, value in {"loss": loss.detach(), **metrics}.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size, prog_bar=stage == "val")
        return loss

    def training_step(self, batch: Any) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Any) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])

    # Lightning keeps no random state in a checkpoint; without it, a resumed run would draw other dropout masks.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.random_state = checkpoint["random_state"]

    def on_train_start(self) -> None:
        if self.random_state is not None:
            torch.set_rng_state(self.random_state["cpu"])
            torch.cuda.set_rng_state_all(self.random_state["cuda"])
            self.random_state = None

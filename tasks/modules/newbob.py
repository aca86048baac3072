"""A learning rate that is reduced after validations without improvement (SRU 2017, section 4.5)."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Newbob(LRScheduler):
    """Multiplies the rate by `factor` after each validation whose loss is not the lowest so far.

    The momentum is 0 until the first validation, usually one epoch, and `momentum` from then on. The task calls
    `after_validation`. The optimiser holds the rate and the momentum, and saves them in its checkpoint.
    """

    def __init__(self, optimizer: Optimizer, *, factor: float, momentum: float) -> None:
        if not 0 < factor <= 1 or not 0 <= momentum < 1:
            raise ValueError(
                f"task.scheduler.factor={factor} must be above 0 and at most 1, task.scheduler.momentum={momentum} "
                "0 or above and below 1; type for example task.scheduler.factor=0.5 task.scheduler.momentum=0.9"
            )
        if any("momentum" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"{type(optimizer).__name__} has no momentum for the schedule to set; type "
                "task.optimizer._target_=torch.optim.SGD, or task.scheduler=null"
            )
        self.factor, self.momentum = factor, momentum
        self.best = math.inf
        for group in optimizer.param_groups:
            group["momentum"] = 0.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates as they are: steps and epochs do not change them."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def after_validation(self, loss: float) -> None:
        for group in self.optimizer.param_groups:
            group["momentum"] = self.momentum
            group["lr"] *= 1 if loss < self.best else self.factor
        self.best = min(self.best, loss)


def newbob(optimizer: Optimizer, *, factor: float, momentum: float) -> dict[str, Any]:
    """`Newbob`, in the form that Lightning takes."""
    return {"scheduler": Newbob(optimizer, factor=factor, momentum=momentum), "interval": "epoch"}

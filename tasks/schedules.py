"""The papers' learning-rate schedules, in the form that Lightning takes.

Each is a function of a counter only: the number n = 1, 2, ... of the optimiser step or, in `decay`, of the epoch.
Lightning saves the counter, so a resumed run continues with the same rates. `lr` is the optimiser's initial rate.
"""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _schedule(optimizer: Optimizer, factor: Callable[[int], float], interval: str) -> dict[str, Any]:
    # LambdaLR counts finished steps, from 0; the papers count the current step, from 1.
    return {"scheduler": LambdaLR(optimizer, lambda done: factor(done + 1)), "interval": interval}


def noam(optimizer: Optimizer, *, size: int, warmup: int) -> dict[str, Any]:
    """lr * size^-0.5 * min(n^-0.5, n * warmup^-1.5) at step n: rises for `warmup` steps, then falls as 1 / sqrt(n).

    Vaswani et al. (2017), section 5.3. SRU (2018) uses it for translation and language models, with a factor lr of 3
    and the hidden size (not the projection's) as `size`.
    """
    if size < 1 or warmup < 1:
        raise ValueError(
            f"task.scheduler.size={size} task.scheduler.warmup={warmup}: both must be 1 or more; "
            "type for example task.scheduler.size=1024 task.scheduler.warmup=16000"
        )
    return _schedule(optimizer, lambda n: size**-0.5 * min(n**-0.5, n * warmup**-1.5), "step")


def cosine(optimizer: Optimizer, *, steps: int, warmup: int) -> dict[str, Any]:
    """SRU++ (2021): lr * n / warmup up to step `warmup`, then a cosine that reaches 0 at step `steps` and stays there.

    After the warm-up the rate is lr * (1 + cos(pi n / steps)) / (1 + cos(pi warmup / steps)): the cosine starts at the
    first step, not at the end of the warm-up, and is scaled to be lr there. torch's recursive CosineAnnealingLR gives
    the same rates if a warm-up overwrites its first ones.
    """
    if not 0 <= warmup < steps:
        raise ValueError(
            f"trainer.max_steps={steps} task.scheduler.warmup={warmup}: the cosine needs a last step, after "
            "a warm-up of 0 steps or more; type for example trainer.max_steps=400000 task.scheduler.warmup=16000"
        )

    def factor(n: int) -> float:
        if n <= warmup:
            return n / warmup
        if n >= steps:
            return 0.0
        return (1 + math.cos(math.pi * n / steps)) / (1 + math.cos(math.pi * warmup / steps))

    return _schedule(optimizer, factor, "step")


def decay(optimizer: Optimizer, *, factor: float, start: int) -> dict[str, Any]:
    """lr in epochs 1 to `start`, lr * factor^k in epoch start + k. SRU (2017) on Penn Treebank: 0.98 and 175."""
    if not 0 < factor <= 1 or start < 0:
        raise ValueError(
            f"task.scheduler.factor={factor} task.scheduler.start={start}: the factor must lie in (0, 1], the start be "
            "0 or more; type for example task.scheduler.factor=0.98 task.scheduler.start=175"
        )
    return _schedule(optimizer, lambda epoch: factor ** max(0, epoch - start), "epoch")

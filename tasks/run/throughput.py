"""What training costs: its time, speed and memory, and when its time is over."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from tasks.run.distributed import all_reduce_sum, world_size


class ThroughputMonitor(pl.Callback):
    """Log, with every validation, what training costs: time, speed, how a step's time is shared, memory.

    `epoch`: how many were trained, in parts too; `seconds` of training, without validation; examples (or tokens) a
    second; `step_ms/data`, `/forward`, `/backward` and `/optimizer`, and `/encoder`, which is the encoders' share of
    forward and backward: means over one step in `SAMPLING`; `peak_memory_mb` of the process, or on a GPU what torch
    has allocated there. Time goes on across a resume. Prints a line a validation.

    Args:
        max_seconds: stop after so much training; None for never.
    """

    state_key = "Clock"  # the name under which checkpoints hold its state
    PARTS = ("data", "forward", "backward", "optimizer")
    KEPT = ("seconds", "examples", "epochs", "parts", "sampled")
    SAMPLING = 16  # the parts of one step in so many are timed: that costs time, and on a GPU waits until each is done

    def __init__(self, max_seconds: float | None = None) -> None:
        if max_seconds is not None and (type(max_seconds) not in (int, float) or not max_seconds > 0):
            raise ValueError(f"callbacks.clock.max_seconds={max_seconds} must be above 0, or null for no limit")
        self.max_seconds = max_seconds
        self.seconds = 0.0
        self.examples = 0
        self._more = 0  # of this process, since the last log
        self.epochs = 0.0
        self.parts = dict.fromkeys((*self.PARTS, "encoder"), 0.0)
        self.sampled = 0
        self._batches = 0  # of this process
        self._since = 0.0
        self._mark: float | None = None  # None while the parts are not timed
        self._interval: Any = None  # batches between validations
        self._hooks: list[Any] = []
        self._step_hooks: dict[nn.Module, list[Any]] = {}  # on an encoder's parameters, in a step that is timed

    def state_dict(self) -> dict[str, Any]:
        # A stop may come long after a validation. That other processes had as many examples is near enough.
        more = self._more * world_size()
        return {name: getattr(self, name) for name in self.KEPT} | {"examples": self.examples + more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.KEPT:
            setattr(self, name, state_dict[name])

    def _wait(self, module: Any) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()

    def _begin(self, module: Any) -> None:
        for hooks in self._step_hooks.values():
            for hook in hooks:
                hook.remove()
        self._step_hooks.clear()
        # Of a process the second step is the first one: the first compiles.
        self._mark = self._wait(module) if self._batches % self.SAMPLING == 1 else None

    def _lap(self, part: str, module: Any) -> None:
        if self._mark is not None:
            now = self._wait(module)
            self.parts[part] += now - self._mark
            self._mark = now

    def _watch(self, encoder: nn.Module, module: Any) -> None:
        """Time an encoder: its calls, and backward from the gradient of its output to that of its last parameter."""
        since: float | None = None
        parameters = [p for p in encoder.parameters() if p.requires_grad]

        def begin(*_: Any) -> None:
            nonlocal since
            since = self._wait(module) if self._mark is not None and module.training else None

        def add(*_: Any) -> None:
            nonlocal since
            if since is not None:
                now = self._wait(module)
                self.parts["encoder"] += now - since
                since = now

        def called(_encoder: nn.Module, _inputs: Any, outputs: Any) -> None:
            if since is None:
                return
            add()
            if outputs[0].requires_grad:
                outputs[0].register_hook(begin)
                if encoder not in self._step_hooks:
                    self._step_hooks[encoder] = [p.register_post_accumulate_grad_hook(add) for p in parameters]

        self._hooks += [encoder.register_forward_pre_hook(begin), encoder.register_forward_hook(called)]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for encoder in pl_module.encoders:
            self._watch(encoder, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Not only with an epoch: a resumed run may start within one.
        self.on_train_epoch_start(trainer, pl_module)
        # Lightning takes the end of an epoch for the end only where a validation was due. One was made (see
        # on_train_batch_end); without this a run that goes on from there would train a step that is no epoch's.
        self._interval = trainer.val_check_batch
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches:
            trainer.val_check_batch = trainer.num_training_batches

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin(pl_module)
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._lap("data", pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._lap("forward", pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._lap("backward", pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._lap("optimizer", pl_module)
        self.sampled += self._mark is not None
        self._batches += 1
        self._more += pl_module.batch_size
        self.epochs += 1 / trainer.num_training_batches
        self._begin(pl_module)
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        # Lightning would end at max_steps, and an epoch, without a validation, and so without a checkpoint.
        out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
        is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        is_at_end = is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        # What was accumulated towards a step of the optimiser is in no checkpoint.
        is_step = (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        out_of_time = self.max_seconds is not None and self.seconds >= self.max_seconds and is_step
        if self.max_seconds is not None:  # where one process stops, all do
            out_of_time = trainer.strategy.reduce_boolean_decision(out_of_time, all=False)
        if out_of_steps or is_at_end or out_of_time:
            trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_in_training(trainer):
            self.seconds += self._wait(pl_module) - self._since

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_in_training(trainer):
            self._log(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_in_training(trainer):
            values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            words = [f"epoch {self.epochs:.4g}", *(f"{name} {value:.4g}" for name, value in values.items())]
            pl_module.print("  ".join([*words, f"{self.speed:.0f} {pl_module.unit}/s"]))
        self._begin(pl_module)
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.val_check_batch = self._interval
        if not trainer.enable_validation:
            self._log(pl_module)

    def _log(self, module: Any) -> None:
        self.examples += int(all_reduce_sum(torch.tensor(self._more, device=module.device)))
        self._more = 0
        values = {"seconds": self.seconds, f"{module.unit}_per_second": self.speed, **self.step_milliseconds()}
        module.log_dict(values | {"epoch": self.epochs, "peak_memory_mb": peak_memory(module.device)})

    def step_milliseconds(self) -> dict[str, float]:
        return {f"step_ms/{part}": 1e3 * sum_ / max(1, self.sampled) for part, sum_ in self.parts.items()}

    @property
    def encoder_share(self) -> float:
        """The encoders' part of the time of a step."""
        total = sum(self.parts[part] for part in self.PARTS)
        return self.parts["encoder"] / total if total else 0.0

    @property
    def speed(self) -> float:
        """Examples or tokens a second of training."""
        return self.examples / self.seconds if self.seconds else 0.0


def is_in_training(trainer: pl.Trainer) -> bool:
    """Whether a validation belongs to a training that has begun."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def peak_memory(device: torch.device) -> float:
    """The most megabytes (2**20 bytes) that torch held on a GPU, or that the process held, its memory maps included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":  # which does not tell
        return float("nan")
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

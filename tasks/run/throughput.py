"""Measure the time, speed and memory of training, and stop it after max_seconds."""

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from tasks.run.distributed import all_reduce_sum, world_size


class ThroughputMonitor(pl.Callback):
    """Logs time, speed and memory of training with every validation, and prints a line.

    `epoch`: epochs trained, with fractions; `seconds` of training, without validation; examples (or tokens) per second;
    `step_ms/data`, `/forward`, `/backward`, `/optimizer`, and `/encoder`, the encoders' share of forward and backward:
    means over every `SAMPLING`th step; `peak_memory_mb` of the process, or of torch on a GPU. A resumed run continues
    the counts.

    Args:
        max_seconds: stop after this time of training; None for no limit.
    """

    state_key = "Clock"  # the key of its state in checkpoints
    PARTS = ("data", "forward", "backward", "optimizer")
    KEPT = ("seconds", "examples", "epochs", "parts", "sampled")
    SAMPLING = 16  # only every 16th step is timed in parts: timing costs time, and on a GPU it waits for each part

    def __init__(self, max_seconds: float | None = None) -> None:
        if max_seconds is not None and (type(max_seconds) not in (int, float) or not max_seconds > 0):
            raise ValueError(f"callbacks.clock.max_seconds={max_seconds} must be above 0, or null for no limit")
        self.max_seconds = max_seconds
        self.seconds = 0.0
        self.examples = 0
        self._more = 0  # examples of this process since the last log
        self.epochs = 0.0
        self.parts = dict.fromkeys((*self.PARTS, "encoder"), 0.0)
        self.sampled = 0
        self._batches = 0  # trained by this process
        self._since = 0.0
        self._mark: float | None = None  # None in steps that are not timed
        self._interval: Any = None  # batches between validations
        self._hooks: list[Any] = []
        self._step_hooks: dict[nn.Module, list[Any]] = {}  # on an encoder's parameters, in a timed step

    def state_dict(self) -> dict[str, Any]:
        # A run may stop long after a validation. Other processes had about as many examples.
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
        # The first step compiles; so the second is the first to be timed.
        self._mark = self._wait(module) if self._batches % self.SAMPLING == 1 else None

    def _lap(self, part: str, module: Any) -> None:
        if self._mark is not None:
            now = self._wait(module)
            self.parts[part] += now - self._mark
            self._mark = now

    def _watch(self, encoder: nn.Module, module: Any) -> None:
        """Time an encoder: its calls, and backward from its output's gradient to its last parameter's."""
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

        def end(_encoder: nn.Module, _inputs: Any, outputs: Any) -> None:
            if since is None:
                return
            add()
            if outputs[0].requires_grad:
                outputs[0].register_hook(begin)
                if encoder not in self._step_hooks:
                    self._step_hooks[encoder] = [p.register_post_accumulate_grad_hook(add) for p in parameters]

        self._hooks += [encoder.register_forward_pre_hook(begin), encoder.register_forward_hook(end)]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for encoder in pl_module.encoders:
            self._watch(encoder, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Not only at the start of an epoch: a resumed run may start within one.
        self.on_train_epoch_start(trainer, pl_module)
        # A resume at the end of an epoch: Lightning recognises the end only if a validation was due there, and would
        # train one step too many. on_train_batch_end has forced a validation.
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
        # At max_steps and at the last batch, Lightning would stop without a validation, so without a checkpoint.
        out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
        is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        is_at_end = is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        # A checkpoint contains no accumulated gradients.
        is_step = (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        out_of_time = self.max_seconds is not None and self.seconds >= self.max_seconds and is_step
        if self.max_seconds is not None:  # if one process stops, all do
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
        """The encoders' fraction of the time of a step."""
        total = sum(self.parts[part] for part in self.PARTS)
        return self.parts["encoder"] / total if total else 0.0

    @property
    def speed(self) -> float:
        """Examples or tokens per second of training."""
        return self.examples / self.seconds if self.seconds else 0.0


def is_in_training(trainer: pl.Trainer) -> bool:
    """Whether a validation is part of training, after the sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def peak_memory(device: torch.device) -> float:
    """Peak memory of torch on a GPU, or of the process with its memory maps, in units of 2**20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

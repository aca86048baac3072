"""A training that is told to stop: it ends after the step at hand, with a checkpoint that goes on there."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from tasks.run.throughput import is_in_training

AGAIN = 1.0  # seconds; what comes sooner is the same signal by another way (to the group, and from a launcher)


class Interruption(pl.Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C write last.ckpt after the step at hand, and end with 128 + the signal's number.

    During a validation, last.ckpt is the state before it, and a resume begins with it; of several processes, which
    have not the same number of batches there, the validation is first brought to its end. So is the one after which
    training would end anyway. A second signal ends the process at once. In a job of SLURM that Lightning requeues, its
    own handler of the signal does so, after the checkpoint is written.

    Args:
        dirpath: where the checkpoints of a run lie.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._requeue: Any = None  # Lightning's handler of SLURM's signal

    def _listen(self) -> None:
        # Once a stage has begun, after Lightning has put its own handlers there, and before it puts the old ones back.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None)):
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue
            if number not in (signal.SIGTERM, signal.SIGINT) and callable(there := signal.getsignal(number)):
                self._requeue = there
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
            # Not print, which may be what the signal has come into.
            os.write(2, f"\n{self.signal.name}: stopping after this step; a second one stops at once.\n".encode())
        elif now - self._since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _was_signalled(self, trainer: pl.Trainer) -> bool:
        """Whether any process was told to stop: all of them ask at the same step."""
        told = self.signal is not None
        return trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told

    def _stop(self, trainer: pl.Trainer) -> None:
        number = self.signal or signal.SIGTERM  # which another process got
        trainer.save_checkpoint(self.path)
        trainer.print(f"{number.name}: {self.path} goes on after step {trainer.global_step}.")
        if number.name == "SIGUSR1" and self._requeue is not None:
            self._requeue(number, None)
            if trainer.is_global_zero:  # what it saves is what last.ckpt is
                for path in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
                    path.unlink()
        raise SystemExit(128 + number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._listen()
        # It came just before: Lightning would end the run with status 0, and has trained nothing.
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SystemExit(128 + signal.SIGTERM)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._listen()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._was_signalled(trainer):
            return
        # What was accumulated towards a step of the optimiser is in no checkpoint. What follows the last batch, and
        # a batch with a validation behind it, would be left out by a resume: that stops in the validation, or later.
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        is_validated = trainer.enable_validation and (
            trainer.should_stop or (batch_idx + 1) % (trainer.val_check_batch or float("inf")) == 0
        )
        if is_step and not is_last and not is_validated:
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_in_training(trainer) and not trainer.should_stop and self._was_signalled(trainer):
            self._stop_validation(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        alone = trainer.world_size == 1
        if alone and is_in_training(trainer) and not trainer.should_stop and self._was_signalled(trainer):
            self._stop_validation(trainer)

    def _stop_validation(self, trainer: pl.Trainer) -> None:
        # As if it had come to the first batch, from where Lightning begins the validation anew.
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        progress.reset()
        progress.increment_ready()
        progress.increment_started()
        self._stop(trainer)

    def on_test_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.signal is not None and trainer.world_size == 1:  # the training is saved already
            raise SystemExit(128 + self.signal)

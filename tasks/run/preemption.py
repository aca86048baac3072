"""Stop training on a signal: save a checkpoint after the current step, and exit."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from tasks.run.throughput import is_in_training

AGAIN = 1.0  # seconds; within these, it is the same signal: sent to the process group, and passed on by a launcher


class Interruption(pl.Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C write last.ckpt after the current step, and exit with 128 + the signal's number.

    During a validation, last.ckpt is the state before it, and a resume begins with the validation. Several processes
    finish the validation first, because their numbers of batches differ, and so does one process if training ends with
    it. A second signal ends the process at once. In a SLURM job, Lightning's handler of SIGUSR1 requeues the job after
    the checkpoint is written.

    Args:
        dirpath: the folder of the run's checkpoints.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._requeue: Any = None  # Lightning's handler of SIGUSR1

    def _listen(self) -> None:
        # Called after Lightning has installed its handlers; at the end of the stage, it restores the previous ones.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            if (current := signal.getsignal(number)) == signal.SIG_IGN:
                continue
            if number == signal.SIGUSR1 and callable(current):
                self._requeue = current
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
            # Not print: the signal may have interrupted one.
            os.write(2, f"\n{self.signal.name}: stopping after this step; a second one stops at once.\n".encode())
        elif now - self._since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _was_signalled(self, trainer: pl.Trainer) -> bool:
        """Whether any process has received a signal; every process must call it at the same step."""
        own = self.signal is not None
        return trainer.strategy.reduce_boolean_decision(own, all=False) if trainer.world_size > 1 else own

    def _stop(self, trainer: pl.Trainer) -> None:
        number = self.signal or signal.SIGTERM  # or another process received it
        trainer.save_checkpoint(self.path)
        trainer.print(f"{number.name}: {self.path} is saved; a resume continues after step {trainer.global_step}.")
        if number.name == "SIGUSR1" and self._requeue is not None:
            self._requeue(number, None)
            if trainer.is_global_zero:  # Lightning has saved the same state as last.ckpt
                for path in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
                    path.unlink()
        raise SystemExit(128 + number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._listen()
        # A signal came before; Lightning would exit with status 0.
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SystemExit(128 + signal.SIGTERM)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._listen()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._was_signalled(trainer):
            return
        # A checkpoint contains no accumulated gradients. A resume would leave out what follows the last batch of an
        # epoch, and a validation that is due: then the run stops in the validation, or later.
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        is_validated = trainer.enable_validation and (
            trainer.should_stop or (batch_idx + 1) % (trainer.val_check_batch or float("inf")) == 0
        )
        if is_step and not is_last and not is_validated:
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if is_in_training(trainer) and not trainer.should_stop and self._was_signalled(trainer):
            # With this state, Lightning begins the validation again.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._stop(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.world_size == 1:
            self.on_validation_start(trainer, trainer.lightning_module)

    def on_test_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.signal is not None and trainer.world_size == 1:  # training has been saved
            raise SystemExit(128 + self.signal)

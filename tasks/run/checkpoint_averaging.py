"""Average the weights of several checkpoints, as is usual for translation (SRU 2018, Table 3, in brackets)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.run.checkpoints import AtomicCheckpoints, Checkpoint
from tasks.run.distributed import all_gather_object


class Average(Checkpoint):
    """Keeps the weights of `count` validations, and writes their mean to average.ckpt when training ends.

    The test, and evaluate.py and predict.py with the run's folder, then use it instead of the best epoch.

    Args:
        dirpath: the folder of the run's checkpoints.
        count: the number of validations; 1 for no mean.
        of: which validations: the best, by monitor and mode, or the last.
    """

    def __init__(self, dirpath: str, count: int, of: str, monitor: str, mode: str) -> None:
        if type(count) is not int or count < 1:
            raise ValueError(f"callbacks.average.count={count} must be a whole number, 1 for no mean, or more")
        if not str(monitor).startswith("val/") or mode not in ("min", "max"):
            raise ValueError(
                f"callbacks.average.monitor={monitor} mode={mode}: leave both out; they are those of callbacks.best"
            )
        if of not in ("best", "last"):
            raise ValueError(f"callbacks.average.of={of} must be best or last")
        super().__init__(
            dirpath=dirpath,
            filename="kept-{step}",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            monitor=monitor if of == "best" else "step",
            mode=mode if of == "best" else "max",
            save_top_k=count if count > 1 else 0,
            save_weights_only=True,
        )
        self.path = Path(dirpath) / "average.ckpt"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep `count` files that exist: a run may be killed after it deletes one and before it saves its state."""
        super().load_state_dict(state_dict)
        files = [path for path in self.best_k_models if Path(path).is_file()]
        files.sort(key=lambda path: float(self.best_k_models[path]), reverse=self.mode == "max")
        kept = files[: max(0, self.save_top_k)]
        self.best_k_models = {path: self.best_k_models[path] for path in kept}
        self.kth_best_model_path = kept[-1] if kept else ""

    def write(self, best: str) -> str:
        """Write the checkpoint `best` with the mean weights; returns the path of the checkpoint to test."""
        if self.save_top_k and len(self.best_k_models) < self.save_top_k:
            print(f"callbacks.average.count={self.save_top_k}: only {len(self.best_k_models)} checkpoints to average")
        if len(self.best_k_models) < 2:
            self.path.unlink(missing_ok=True)  # from an earlier call
            return best
        content = load(best)
        states = {path: load(path)["state_dict"] for path in sorted(self.best_k_models)}
        own = content["state_dict"]
        for path, state in states.items():
            if {k: v.numel() for k, v in state.items()} != {k: v.numel() for k, v in own.items()}:
                raise ValueError(f"{path} has the weights of another network; move it away to average the others")
            # Earlier versions stored the biases of the gates as two rows.
            states[path] = {name: value.reshape(own[name].shape) for name, value in state.items()}
        content["state_dict"] = mean(list(states.values()))
        AtomicCheckpoints().save_checkpoint(content, self.path)
        return str(self.path)


def load(path: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load may raise anything
        raise ValueError(f"{path} is damaged; move it away to average the others") from error


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of floating-point tensors, in float64; other tensors are the first state's."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def checkpoint_to_test(trainer: Any) -> str | None:
    """The checkpoint to test: the mean, the best one, or None without a validation."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    average = next((callback for callback in trainer.callbacks if isinstance(callback, Average)), None)
    if average is None or not best:
        return best or None
    return all_gather_object(average.write(best) if trainer.is_global_zero else None)[0]

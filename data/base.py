"""The base of the DataModules: prepare once, load each split, refuse to resume on other data."""

from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
from torch import Tensor

from data.batching import StatefulLoader

Loader = TypeVar("Loader", bound=StatefulLoader)


class DataModule(pl.LightningDataModule, Generic[Loader]):
    """A corpus with the splits `train`, `val` and `test`. A subclass defines:

    MODEL_KWARGS: the keyword arguments of the task that the data determine.
    FIXED_BY_CHECKPOINT: options that evaluation takes from the checkpoint's run.
    SPLIT_OPTIONS: options that choose the examples; with FIXED_BY_CHECKPOINT they are named if a resume is refused.
    ADDED_STATE: entries of `state_dict` that older checkpoints lack.
    load: downloads and reads the corpus; sets `vocabulary` and `splits`.
    train_loader, evaluation: the batches of a split.
    state_dict: what a checkpoint stores to identify the data and to apply the network to new input.
    vocabulary_of: the vocabulary from such a state, without the corpus.

    A vocabulary holds what the network must know about its input and output. Its `model_kwargs` are those of the task.
    If `checkpoint_vocabulary` is set before `load`, it is used instead of one built from the corpus.
    """

    FIXED_BY_CHECKPOINT: tuple[str, ...] = ()
    SPLIT_OPTIONS: tuple[str, ...] = ()
    ADDED_STATE: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint_vocabulary: Any = None
        self.vocabulary: Any = None
        self.splits: dict[str, Any] = {}

    def load(self) -> None:
        raise NotImplementedError

    def train_loader(self) -> Loader:
        raise NotImplementedError

    def evaluation(self, split: str) -> Loader:
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Downloads and prepares the data in one process, before the others open them."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Loads the data; a second call does nothing."""
        if not self.splits:
            self.load()

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The keyword arguments named in MODEL_KWARGS. Loads the data first."""
        self.setup()
        return self.vocabulary.model_kwargs

    def train_dataloader(self) -> Loader:
        loader = self.train_loader()
        if self.trainer is not None:
            loader.limit(self.trainer.limit_train_batches)
        return loader

    def val_dataloader(self) -> Loader:
        return self.evaluation("val")

    def test_dataloader(self) -> Loader:
        return self.evaluation("test")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on other data."""
        now = {k: value for k, value in self.state_dict().items() if k in state_dict or k not in self.ADDED_STATE}
        changed = [name for name, value in now.items() if not is_equal(value, state_dict.get(name))]
        if changed:
            differences = "; ".join(difference(name, state_dict.get(name), now[name]) for name in changed)
            options = ", ".join(f"data.{name}" for name in (*self.SPLIT_OPTIONS, *self.FIXED_BY_CHECKPOINT))
            raise ValueError(
                f"the checkpoint was trained on other data: {differences}. Use the files and options of the "
                f"checkpoint's run (data=, {options}), or train again."
            )


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)


def difference(name: str, then: Any, now: Any) -> str:
    """How an entry of a checkpoint differs from that of the data."""
    if isinstance(then, list) and isinstance(now, list):
        places = (i for i, (old, new) in enumerate(zip(then, now, strict=False)) if old != new)
        place = next(places, None)
        where = "" if place is None else f" (number {place} was {then[place]!r} and is {now[place]!r})"
        return f"{name} had {len(then)} entries and has {len(now)}{where}"
    return f"{name} was {then} and is {now}" if isinstance(now, str | int) else f"{name} differ"


def require_whole(lowest: int = 1, **options: Any) -> None:
    """ValueError unless each option is a whole number, `lowest` or more."""
    for name, value in options.items():
        if type(value) is not int or value < lowest:
            raise ValueError(f"data.{name}={value} must be a whole number, {lowest} or more")

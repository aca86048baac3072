"""Batches of examples of about the same length, in an order of seed and epoch, from where an epoch was left."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch.distributed

POOL = 20  # batches of a fixed number whose examples are sorted by length together

Batch = TypeVar("Batch")


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class StatefulLoader:
    """Batches of epochs, in a loader that goes on within one; Lightning calls `state_dict` and `load_state_dict`."""

    def __init__(self, length: int) -> None:
        self.length = length  # batches of an epoch, which Lightning may cut short
        self.epoch = -1
        self.position = 0  # batches that the current epoch has yielded
        self.start = 0  # where the next epoch begins

    def __len__(self) -> int:
        raise NotImplementedError

    def limit(self, limit: int | float) -> None:
        """Lightning's `limit_train_batches`: an epoch of so many is over after them, also when resumed."""
        self.length = min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next epoch goes on at that position, or is the one after it where that was finished."""
        self.epoch = state_dict.get("epoch", -1)  # which texts of older versions lack, and need not
        self.position = state_dict["position"]
        self.start = self.position if self.position < self.length else 0


class FixedBatches(StatefulLoader, Generic[Batch]):
    """The same batches, in the same order, in every epoch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        super().__init__(len(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        begin, self.start = self.start, 0
        for position in range(begin, len(self)):
            self.position = position + 1
            yield self.batches[position]


class Batches(StatefulLoader, Generic[Batch]):
    """`make` of the examples of each batch, which are of about the same size.

    batch_size: so many examples are a batch; or
    budget: so many that their number times the largest size is at most this. One that is larger comes alone.
    seed: in training the examples are shuffled, sorted by size, and the batches shuffled again, by seed and epoch
        alone. With `batch_size` they are sorted in pools of `POOL` batches; with `budget` all together, so that each
        epoch has as many batches as any other. None, in evaluation: they come by size, and always in the same order.

    Of several processes each takes its part of the batches, and all take as many: where they do not come out even, the
    largest are halved. So each example comes once.

    `state_dict` and `load_state_dict` go on within an epoch; Lightning calls them.
    """

    def __init__(
        self,
        make: Callable[[list[Any]], Batch],
        examples: Sequence[Any] | np.ndarray,
        sizes: Sequence[int] | np.ndarray,
        *,
        batch_size: int | None = None,
        budget: int | None = None,
        seed: int | None = None,
    ) -> None:
        if (batch_size is None) == (budget is None):
            raise TypeError(f"either batch_size={batch_size} or budget={budget} cuts the examples into batches")
        self.make, self.examples, self.sizes = make, examples, np.asarray(sizes, np.int64)
        self.batch_size, self.budget, self.seed = batch_size, budget, seed
        self.rank, self.processes = rank_and_world_size()
        batches = len(self.cuts(np.sort(self.sizes))) + 1 if len(self.sizes) else 0
        self.count = -(-batches // self.processes)
        if self.count * self.processes > len(self.sizes):
            raise ValueError(
                f"{len(self.sizes)} examples are too few for {self.processes} processes, each of which needs "
                f"{self.count}: type fewer trainer.devices"
            )
        super().__init__(self.count)

    def __len__(self) -> int:
        return self.count

    def part(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """This process's part of the batches of an epoch."""
        while len(batches) % self.processes:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batches[largest : largest + 1] = np.array_split(batches[largest], 2)
        return batches[self.rank :: self.processes]

    def cuts(self, sizes: np.ndarray) -> Sequence[int]:
        """Where sizes in rising order are cut into those of batches."""
        if self.batch_size is not None:
            return range(self.batch_size, len(sizes), self.batch_size)
        budget, cuts, begin = self.budget or 0, [], 0
        while begin < len(sizes):
            most = budget // max(int(sizes[begin]), 1)  # if all were as short as the first
            window = sizes[begin : begin + most]
            begin += max(1, int((window * np.arange(1, len(window) + 1) <= budget).sum()))
            cuts.append(begin)
        return cuts[:-1]

    def order(self) -> list[np.ndarray]:
        """The examples of each batch of the epoch."""
        if not self.count:
            return []
        if self.seed is None:
            ranked = np.argsort(self.sizes, kind="stable")
            return np.split(ranked, self.cuts(self.sizes[ranked]))
        generator = np.random.default_rng([self.seed, self.epoch])
        shuffled = generator.permutation(len(self.sizes))
        pool = len(shuffled) if self.batch_size is None else POOL * self.batch_size
        batches: list[np.ndarray] = []
        for group in np.split(shuffled, range(pool, len(shuffled), pool)):
            group = group[np.argsort(self.sizes[group], kind="stable")]
            batches += np.split(group, self.cuts(self.sizes[group]))
        return [batches[i] for i in generator.permutation(len(batches))]

    def __iter__(self) -> Iterator[Batch]:
        begin, self.start = self.start, 0
        self.epoch += begin == 0
        for position, batch in enumerate(self.part(self.order())[begin:], start=begin):
            self.position = position + 1
            yield self.make([self.examples[i] for i in batch])

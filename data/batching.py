"""Batches of examples of similar length, in an order set by seed and epoch, that resume within an epoch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch.distributed

POOL = 20  # batches whose examples are sorted by length together, if batch_size is fixed

Batch = TypeVar("Batch")


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def pad_columns(rows: Sequence[Any], fill: float, dtype: Any = np.int64) -> np.ndarray:
    """(T, B, ...): the rows as columns, with `fill` after their ends; T is the longest length, at least 1."""
    array = np.full((max(1, *map(len, rows)), len(rows), *np.shape(rows[0])[1:]), fill, dtype)
    for column, row in enumerate(rows):
        array[: len(row), column] = row
    return array


class StatefulLoader:
    """A loader that resumes within an epoch; Lightning calls `state_dict` and `load_state_dict`."""

    def __init__(self, length: int) -> None:
        self.length = length  # batches of an epoch; Lightning may stop before len(self)
        self.epoch = -1
        self.position = 0  # batches that the current epoch has yielded
        self.start = 0  # the first batch of the next epoch

    def __len__(self) -> int:
        raise NotImplementedError

    def limit(self, limit: int | float) -> None:
        """Sets the length of an epoch to Lightning's `limit_train_batches`."""
        self.length = min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self))

    def start_epoch(self) -> range:
        """The positions of the batches of the next epoch, or of the rest of a resumed one."""
        begin, self.start = self.start, 0
        self.epoch += begin == 0
        return range(begin, len(self))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next epoch starts at that position, or at 0 if that epoch was complete."""
        self.epoch = state_dict.get("epoch", 0)  # older checkpoints of texts lack it and do not need it
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
        for position in self.start_epoch():
            self.position = position + 1
            yield self.batches[position]


class Batches(StatefulLoader, Generic[Batch]):
    """Yields `make(examples)` for each batch; examples of a batch have similar sizes.

    batch_size: examples of a batch; or
    budget: the largest product of the number of examples and the largest size. A larger example is a batch of its own.
    seed: for training; seed and epoch determine the order. Examples are shuffled, sorted by size and cut into batches,
        and the batches are shuffled. With `batch_size` they are sorted in pools of `POOL` batches, with `budget` all
        together, so that all epochs have the same number of batches. None, for evaluation: the fixed order of size.

    Each of several processes takes the same number of batches; if the number does not divide, the largest batches are
    halved. Each example occurs once.
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
        self.make, self.examples, self.sizes = make, examples, np.asarray(sizes, np.int64)
        self.batch_size, self.budget, self.seed = batch_size, budget, seed
        self.rank, self.processes = rank_and_world_size()
        batches = len(self.cuts(np.sort(self.sizes))) + 1 if len(self.sizes) else 0
        self.count = -(-batches // self.processes)
        if self.count * self.processes > len(self.sizes):
            raise ValueError(
                f"{len(self.sizes)} examples are too few for {self.processes} processes, which need "
                f"{self.count} each: type fewer trainer.devices"
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
        """The places where examples with these sizes, in rising order, are cut into batches."""
        if self.batch_size is not None:
            return range(self.batch_size, len(sizes), self.batch_size)
        budget, cuts, begin = self.budget or 0, [], 0
        while begin < len(sizes):
            most = budget // max(int(sizes[begin]), 1)  # as if all were as short as the first
            window = sizes[begin : begin + most]
            begin += max(1, int((window * np.arange(1, len(window) + 1) <= budget).sum()))
            cuts.append(begin)
        return cuts[:-1]

    def order(self) -> list[np.ndarray]:
        """The indices of the examples of each batch of the epoch."""
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
        positions = self.start_epoch()
        batches = self.part(self.order())
        for position in positions:
            self.position = position + 1
            yield self.make([self.examples[i] for i in batches[position]])

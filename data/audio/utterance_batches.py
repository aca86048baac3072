"""Batches of utterances with frame targets: whole, or cut into segments in parallel streams."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.audio.kaldi_ark import Archive
from data.audio.kaldi_frames import Frames
from data.batching import Batches, StatefulLoader, pad_columns


class Batch(NamedTuple):
    """Frames and targets of utterances or segments.

    x (T, B, n): frames; targets (S, B): of the first S frames, -1 for none; pad (T, B): True after the end of a
    sequence; begins (B,): True if an utterance begins at step 0; keys: the names of whole utterances.
    """

    x: Tensor
    targets: Tensor
    pad: Tensor
    begins: Tensor
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameConfig:
    """How frames are read, the same in training and evaluation.

    counts (num_targets,): occurrences of each target in training. stats (2, input_size): mean and scale of cmvn=global.
    The others: see data.kaldi.Kaldi.
    """

    cmvn: str | None
    delay: int
    segment: int
    right: int
    input_size: int
    counts: Tensor
    stats: Tensor | None

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """log_priors: targets that never occur count as one occurrence. archive: the class that writes Kaldi files."""
        counts = self.counts.clamp(min=1).double()
        return {
            "input_size": self.input_size,
            "num_targets": len(self.counts),
            "log_priors": (counts / counts.sum()).log().float(),
            "delay": self.delay,
            "segment": self.segment,
            "right": self.right,
            "archive": Archive,
        }

    def frames(self, path: Path, name: str, scored: str) -> Frames:
        """The utterances of a folder, normalised as in training."""
        sizes = {"input_size": self.input_size, "num_targets": len(self.counts)}
        frames = Frames(path, name=name, scored=scored, cmvn=self.cmvn, **sizes)
        frames.stats = None if self.stats is None else self.stats.numpy()
        return frames

    def sequence(self, frames: Frames, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Features of utterance i, with its last frame repeated `delay` times, and targets, delayed by `delay`."""
        x, targets = frames.features(i), frames.align(i)
        late = np.full(self.delay, -1, np.int64)
        return np.concatenate([x, x[-1:].repeat(self.delay, 0)]), np.concatenate([late, targets])

    def batch(self, frames: Frames, rows: list[int]) -> Batch:
        """A batch of whole utterances."""
        sequences = [self.sequence(frames, i) for i in rows]
        x = torch.from_numpy(pad_columns([features for features, _ in sequences], 0, np.float32))
        targets = torch.from_numpy(pad_columns([wanted for _, wanted in sequences], -1))
        pad = torch.arange(len(x))[:, None] >= torch.tensor([len(features) for features, _ in sequences])
        return Batch(x, targets, pad, torch.ones(len(rows), dtype=torch.bool), tuple(frames.keys[i] for i in rows))

    def batches(self, frames: Frames, budget: int) -> Batches[Batch]:
        """All utterances in batches of similar length, of at most `budget` frames including padding."""
        return Batches(
            lambda rows: self.batch(frames, rows), range(len(frames)), frames.lengths + self.delay, budget=budget
        )

    def read(self, path: str, frames_per_batch: int) -> tuple[Frames, Batches[Batch]]:
        """The utterances of a folder or its feats.scp, without targets, and their batches."""
        frames = self.frames(Path(path).expanduser(), f"input={path}", "none")
        return frames, self.batches(frames, frames_per_batch)


class Streams(StatefulLoader):
    """Segments of utterances in parallel streams: batches of `segment` steps, and `right` steps of context after them.

    The utterances of an epoch, in an order set by seed and epoch, are cut into segments, with padding after the last of
    each. All segments in a row are divided into W * B streams of equal length for W processes; process r has streams
    r * B to r * B + B - 1. So each frame occurs once, and an utterance begins at a segment. An utterance at the end of
    a stream is cut: its rest begins the next stream like an utterance.
    """

    def __init__(
        self, config: FrameConfig, frames: Frames, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.frames, self.seed = config, frames, seed
        self.streams = range(rank * batch_size, (rank + 1) * batch_size)
        self.pieces = -(-(frames.lengths + config.delay) // config.segment)
        self.steps = -(-int(self.pieces.sum()) // (batch_size * world_size))
        super().__init__(self.steps)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        positions = self.start_epoch()
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.frames))
        ends = self.pieces[order].cumsum()
        current: dict[int, tuple[int, tuple[np.ndarray, np.ndarray]]] = {}  # by stream: its current utterance
        segment, steps = self.config.segment, self.config.segment + self.config.right
        for position in positions:
            self.position = position + 1
            x = np.zeros((steps, len(self.streams), self.config.input_size), np.float32)
            targets = np.full((segment, len(self.streams)), -1)
            lengths = np.zeros(len(self.streams), np.int64)
            begins = np.ones(len(self.streams), bool)
            for column, stream in enumerate(self.streams):
                number = stream * self.steps + position  # of the segment in the epoch
                place = int(ends.searchsorted(number, "right"))
                if place == len(order):  # the last streams may have fewer segments
                    continue
                if current.get(stream, (-1,))[0] != place:
                    current[stream] = place, self.config.sequence(self.frames, order[place])
                part = number - int(ends[place] - self.pieces[order[place]])
                features, wanted = (a[part * segment :] for a in current[stream][1])
                lengths[column] = min(len(features), steps)
                x[: lengths[column], column] = features[:steps]
                targets[: len(wanted[:segment]), column] = wanted[:segment]
                begins[column] = part == 0 or position == 0
            pad = np.arange(steps)[:, None] >= lengths
            yield Batch(*[torch.from_numpy(a) for a in (x, targets, pad, begins)])  # type: ignore[arg-type]

"""Kaldi folders for hybrid DNN-HMM recognisers: frames with targets (SRU 2017, section 4.5)."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from data.audio import synthesis
from data.audio.fbank import Frontend
from data.audio.kaldi_ark import Archive
from data.audio.kaldi_frames import NORMALISATIONS, Frames
from data.audio.utterance_batches import Batch, FrameConfig, Streams
from data.base import DataModule, require_whole
from data.batching import Batches, rank_and_world_size
from data.cache import prepare_folder
from data.download import find_below

log = logging.getLogger(__name__)


class Kaldi(DataModule):
    """Kaldi folders with feats.scp, and ali.scp or ali.ark with a target (pdf) for each frame: docs/tasks/hybrid.md.

    Features are read from disk when they are needed. Utterances without targets, or with another number of targets than
    of frames, are left out of training and validation; the test writes their likelihoods.

    root: folder of the corpora, may be read-only. cache: folder for global statistics.
    train, val, test: folders, below root or paths.
    cmvn: extent of mean and variance normalisation: utterance, speaker (from cmvn.scp and utt2spk), global, or null.
    delay: step t predicts the target of frame t - delay; the last frame is repeated `delay` times.
    batch_size, segment: streams of a process, and steps of truncated back-propagation, in training.
    right: steps of right context after each segment for a bidirectional network, in training and evaluation.
    num_targets: of the HMM; null: one more than the largest in training.
    eval_frames_per_batch: the largest size of a batch of whole utterances in frames, including padding.
    """

    MODEL_KWARGS = ("input_size", "num_targets", "log_priors", "delay", "segment", "right", "archive")
    FIXED_BY_CHECKPOINT = ("cmvn", "delay", "segment", "right", "num_targets")
    SPLIT_OPTIONS = ("train", "val", "test")

    def __init__(
        self,
        *,
        root: str,
        cache: str,
        train: str,
        val: str,
        test: str,
        cmvn: str | None = "speaker",
        delay: int = 0,
        batch_size: int = 80,
        segment: int = 20,
        right: int = 0,
        num_targets: int | None = None,
        eval_frames_per_batch: int = 8000,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if num_targets is not None:
            require_whole(num_targets=num_targets)
        if cmvn not in NORMALISATIONS:
            raise ValueError(f"data.cmvn={cmvn} must be one of null, utterance, speaker, global")
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.names = {"train": train, "val": val, "test": test}
        self.cmvn, self.delay, self.segment, self.right = cmvn, delay, segment, right
        self.batch_size, self.num_targets, self.seed = batch_size, num_targets, seed
        self.eval_frames_per_batch = eval_frames_per_batch

    def load(self) -> None:
        """Reads tables, headers and targets; `splits` are `Frames`."""
        if self.checkpoint_vocabulary is not None:
            self.vocabulary = self.checkpoint_vocabulary
            self.splits = {split: self.frames(split, "some") for split in self.names}
            return
        options: dict[str, Any] = {"cmvn": self.cmvn, "num_targets": self.num_targets}
        train = Frames(self.locate("train"), name=f"data.train={self.names['train']}", scored="all", **options)
        stats = train.stats = train.global_stats(self.cache) if self.cmvn == "global" else None
        self.vocabulary = FrameConfig(
            cmvn=self.cmvn,
            delay=self.delay,
            segment=self.segment,
            right=self.right,
            input_size=train.input_size,
            counts=torch.from_numpy(train.counts),
            stats=None if stats is None else torch.from_numpy(stats),
        )
        self.splits = {"train": train, "val": self.frames("val", "all"), "test": self.frames("test", "some")}
        for frames in self.splits.values():
            log.info("%s", frames.report)
        self.train_loader()  # fails now if there are too few segments

    def frames(self, split: str, scored: str) -> Frames:
        """The frames of a split, normalised as in training."""
        return self.vocabulary.frames(self.locate(split), f"data.{split}={self.names[split]}", scored)

    def locate(self, split: str) -> Path:
        """The folder of a split."""
        advice = (
            "type the path of a Kaldi folder with feats.scp and ali.scp (docs/tasks/hybrid.md), or data=frames_sample "
            "to try it without one"
        )
        return find_below(
            self.root, split, str(self.names[split]), advice, lambda path: path if path.is_dir() else None
        )

    def train_loader(self) -> Streams:
        rank, world_size = rank_and_world_size()
        train = self.splits["train"]
        streams = Streams(self.vocabulary, train, self.batch_size, self.seed, rank=rank, world_size=world_size)
        if (total := int(streams.pieces.sum())) < self.batch_size * world_size:
            raise ValueError(
                f"{train.report}: {total} segments of data.segment={self.segment} are too few for "
                f"{self.batch_size * world_size} streams; type data.batch_size={max(1, total // world_size)} or less"
            )
        return streams

    def evaluation(self, split: str) -> Batches[Batch]:
        return self.vocabulary.batches(self.splits[split], self.eval_frames_per_batch)

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        checks = {split: self.splits[split].check for split in ("train", "val")}  # the test folder may change
        return vars(self.vocabulary) | {"files": checks}

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> FrameConfig:
        return FrameConfig(**{name: value for name, value in state_dict.items() if name != "files"})


class SpokenWords(Kaldi):
    """Synthetic words, by other voices in training, validation and test: no file, no download.

    There are 31 targets: 0 is a pause, and each of ten words has one for each third of its length.
    """

    SPEAKERS: ClassVar = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}
    UTTERANCES: ClassVar = {"train": 200, "val": 30, "test": 30}

    def __init__(self, *, root: str = "", cache: str, **options: Any) -> None:
        folder = Path(cache).expanduser() / f"spoken_words-{synthesis.VERSION}"
        folders: dict[str, Any] = {split: str(folder / split) for split in self.UTTERANCES}
        super().__init__(root=root, cache=cache, **folders, **options)

    def load(self) -> None:
        """Writes absent folders first."""
        for split in self.UTTERANCES:
            prepare_folder(Path(self.names[split]), partial(self.write, split))
        super().load()

    def write(self, split: str, folder: Path) -> None:
        """Writes the archives of a split."""
        frontend = Frontend(rate=synthesis.RATE, num_mels=40)  # frames of 25 ms every 10 ms
        final = Path(self.names[split])
        place = f"../../{final.parent.name}/{final.name}"  # relative to the table, so the cache can be moved
        with (
            Archive(folder / "feats.ark", f"{place}/feats.ark") as features,
            Archive(folder / "ali.ark", f"{place}/ali.ark") as alignments,
        ):
            for number in range(self.UTTERANCES[split]):
                speaker = self.SPEAKERS[split][number % len(self.SPEAKERS[split])]
                chosen = np.random.default_rng([speaker, number])
                words = chosen.integers(len(synthesis.WORDS), size=chosen.integers(2, 6))
                wave, spans = synthesis.synthesise([synthesis.WORDS[word] for word in words], speaker, number)
                frames = frontend.frames(wave)
                middle = 80 * np.arange(len(frames)) + 100  # the middle of each frame, in samples
                targets = np.zeros(len(frames), np.int32)
                for word, (begin, end) in zip(words, spans, strict=True):
                    inside = (begin <= middle) & (middle < end)
                    targets[inside] = 1 + 3 * word + 3 * (middle[inside] - begin) // (end - begin)
                features.write(key := f"speaker{speaker:02}-{number:03}", frames)
                alignments.write(key, targets)

"""Kaldi folders for the hybrid of a network and HMMs: frames with targets (SRU 2017, section 4.5)."""

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.audio import synthesis
from data.audio.fbank import Frontend
from data.audio.kaldi_ark import Archive
from data.audio.kaldi_frames import NORMALISATIONS, Frames
from data.audio.utterance_batches import Batch, FrameConfig, Streams
from data.batching import Batches, rank_and_world_size
from data.download import lock, require_writable

log = logging.getLogger(__name__)


class Kaldi(pl.LightningDataModule):
    """Folders of Kaldi: feats.scp, and ali.scp or ali.ark with a target (pdf) for each frame; docs/kaldi.md makes them.

    Nothing of a corpus is held in memory but what is known of each utterance. An utterance without targets, or with
    another number of them than of frames, is neither trained nor validated on; a test writes its likelihoods.

    root: folder of the corpora, which may be read-only. cache: folder for what is computed from them.
    train, val, test: folders, below root or paths.
    cmvn: null, or what mean and variance are normalised over: utterance, speaker (of cmvn.scp and utt2spk), global.
    delay: at step t the network says the target of frame t - delay; the last frame is repeated so many times.
    batch_size, segment: streams of a process, and steps that are back-propagated through, in training.
    right: steps that a bidirectional network sees after each segment, in training and in evaluation.
    num_targets: of the HMM; null: one more than the largest in training.
    eval_frames_per_batch: frames of a batch of whole utterances, padding included, in validation and test.
    """

    MODEL_KWARGS = (
        "input_size",
        "num_targets",
        "log_priors",
        "delay",
        "segment",
        "right",
        "archive",
    )  # the names in `model_kwargs`
    FIXED_BY_CHECKPOINT = ("cmvn", "delay", "segment", "right", "num_targets")  # by a checkpoint

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
        for name, value, low in (
            ("delay", delay, 0),
            ("batch_size", batch_size, 1),
            ("segment", segment, 1),
            ("right", right, 0),
            ("num_targets", 1 if num_targets is None else num_targets, 1),
            ("eval_frames_per_batch", eval_frames_per_batch, 1),
        ):
            if type(value) is not int or value < low:
                raise ValueError(f"data.{name}={value} must be a whole number, {low} or more")
        if cmvn not in NORMALISATIONS:
            raise ValueError(f"data.cmvn={cmvn} must be one of null, utterance, speaker, global")
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.names = {"train": train, "val": val, "test": test}
        self.cmvn, self.delay, self.segment, self.right = cmvn, delay, segment, right
        self.batch_size, self.num_targets, self.seed = batch_size, num_targets, seed
        self.eval_frames_per_batch = eval_frames_per_batch
        self.checkpoint_vocabulary: FrameConfig | None = (
            None  # a checkpoint's, to read with; none is made of the corpus then
        )
        self.splits: dict[str, Frames] = {}

    def prepare_data(self) -> None:
        """Looks all through once."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Reads the tables, the heads of the features and the targets; a second call does nothing."""
        if self.splits:
            return
        if self.checkpoint_vocabulary is not None:
            self.recipe = self.checkpoint_vocabulary
            self.splits = {
                split: self.recipe.frames(self.locate(split), f"data.{split}={name}", "some")
                for split, name in self.names.items()
            }
            return
        options: dict[str, Any] = {"cmvn": self.cmvn, "num_targets": self.num_targets}
        train = Frames(self.locate("train"), name=f"data.train={self.names['train']}", scored="all", **options)
        stats = train.stats = train.global_stats(self.cache) if self.cmvn == "global" else None
        self.recipe = FrameConfig(
            cmvn=self.cmvn,
            delay=self.delay,
            segment=self.segment,
            right=self.right,
            input_size=train.input_size,
            counts=torch.from_numpy(train.counts),
            stats=None if stats is None else torch.from_numpy(stats),
        )
        others = {
            split: self.recipe.frames(self.locate(split), f"data.{split}={self.names[split]}", scored)
            for split, scored in (("val", "all"), ("test", "some"))
        }
        for frames in (train, *others.values()):
            log.info("%s", frames.report)
        self.splits = {"train": train, **others}
        self.train_dataloader()  # what is too short for its streams is told now

    def locate(self, split: str) -> Path:
        """The folder of a split."""
        name = self.names[split]
        places = [self.root / str(name), Path(str(name)).expanduser()]
        found = next((path for path in places if path.is_dir()), None)
        if found is None:
            raise FileNotFoundError(
                f"data.{split}={name} is no folder, neither below {self.root} nor here; type the path of a Kaldi "
                "folder with feats.scp and ali.scp (docs/kaldi.md), or data=frames_sample to try it without one"
            )
        return found

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know, and what writes its archives. Prepares the data first."""
        self.setup()
        return self.recipe.model_kwargs

    def train_dataloader(self) -> Streams:
        rank, world_size = rank_and_world_size()
        train = self.splits["train"]
        streams = Streams(self.recipe, train, self.batch_size, self.seed, rank=rank, world_size=world_size)
        if (total := int(streams.pieces.sum())) < self.batch_size * world_size:
            raise ValueError(
                f"{train.report}: {total} segments of data.segment={self.segment} are too few for "
                f"{self.batch_size * world_size} streams; type data.batch_size={max(1, total // world_size)} or less"
            )
        if self.trainer is not None:
            streams.limit(self.trainer.limit_train_batches)
        return streams

    def val_dataloader(self) -> Batches[Batch]:
        return self.evaluation("val")

    def test_dataloader(self) -> Batches[Batch]:
        return self.evaluation("test")

    def evaluation(self, split: str) -> Batches[Batch]:
        return self.recipe.batches(self.splits[split], self.eval_frames_per_batch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read frames, and to know the corpus that it was trained on."""
        self.setup()
        checks = {split: self.splits[split].check for split in ("train", "val")}  # another test may be made
        return vars(self.recipe) | {"files": checks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on another corpus, or read it in another way."""

        def same(one: Any, two: Any) -> bool:
            both = isinstance(one, Tensor) and isinstance(two, Tensor)
            return one.shape == two.shape and bool((one == two).all()) if both else bool(one is two or one == two)

        now = self.state_dict()
        if changed := [name for name in now if name not in state_dict or not same(now[name], state_dict[name])]:
            told = "; ".join(
                f"{name} was {state_dict.get(name)}, is {now[name]}" if isinstance(now[name], str | int) else name
                for name in changed
            )
            raise ValueError(
                f"the checkpoint was trained on other frames: {told}. Use the folders and options of the checkpoint's "
                "run (data.train, data.val, data.test, data.cmvn, data.delay, data.segment, data.right, "
                "data.num_targets), or train again."
            )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> FrameConfig:
        """How frames are read, in a `state_dict`."""
        return FrameConfig(**{name: value for name, value in state_dict.items() if name != "files"})


class SpokenWords(Kaldi):
    """Words that are computed, by voices that training, validation and test do not share: no file, no download.

    There are 31 targets: 0 is a pause, and each of ten words has three of a third of its length.
    """

    SPEAKERS: ClassVar = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}
    UTTERANCES: ClassVar = {"train": 200, "val": 30, "test": 30}

    def __init__(self, *, root: str = "", cache: str, **options: Any) -> None:
        folder = Path(cache).expanduser() / f"spoken_words-{synthesis.VERSION}"
        folders: dict[str, Any] = {split: str(folder / split) for split in self.UTTERANCES}
        super().__init__(root=root, cache=cache, **folders, **options)

    def setup(self, stage: str | None = None) -> None:
        """Writes the folders where they are not there."""
        for split in self.UTTERANCES:
            folder = Path(self.names[split])
            if (folder / "feats.scp").exists():
                continue
            require_writable(folder)
            with lock(folder):  # a second process waits here, and then finds what the first has written
                if not (folder / "feats.scp").exists():
                    self.write(split, folder)
        super().setup(stage)

    def write(self, split: str, folder: Path) -> None:
        """The archives of a split; that of the features comes last."""
        frontend = Frontend(rate=synthesis.RATE, num_mels=40)  # of 25 ms, each 10 ms
        place = f"../../{folder.parent.name}/{split}"  # as seen from the table, so that the cache may be moved
        with (  # the last is the first that is closed
            Archive(folder / "feats.ark", f"{place}/feats.ark") as features,
            Archive(folder / "ali.ark", f"{place}/ali.ark") as alignments,
        ):
            for number in range(self.UTTERANCES[split]):
                speaker = self.SPEAKERS[split][number % len(self.SPEAKERS[split])]
                chosen = np.random.default_rng([speaker, number])
                words = chosen.integers(len(synthesis.WORDS), size=chosen.integers(2, 6))
                wave, spans = synthesis.synthesise([synthesis.WORDS[word] for word in words], speaker, number)
                frames = frontend.frames(wave)
                middle = 80 * np.arange(len(frames)) + 100  # of each frame, in samples
                targets = np.zeros(len(frames), np.int32)
                for word, (begin, end) in zip(words, spans, strict=True):
                    inside = (begin <= middle) & (middle < end)
                    targets[inside] = 1 + 3 * word + 3 * (middle[inside] - begin) // (end - begin)
                features.write(key := f"speaker{speaker:02}-{number:03}", frames)
                alignments.write(key, targets)

"""Recordings with transcripts, or with one label each, as log-mel features (SRU 2017, section 4.5, of open corpora)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.audio.fbank import Frontend, Part, StepStream, check_frontend, read
from data.audio.feature_table import Recorded, Utterance, perturb, prepare
from data.audio.labels import BLANK, UNITS, Symbols, frames_needed
from data.batching import Batches

log = logging.getLogger(__name__)

LABEL = "label"


class Item(NamedTuple):
    """What evaluation needs to know of a recording: its name, and its transcript."""

    id: str
    text: str


class Batch(NamedTuple):
    """Recordings and what is said in them.

    x (T, B, n): steps, 0 at the end of those that are shorter; pad (T, B): True there. targets (B, L): symbols, padded
    with 0; lengths (B,): how many they are.
    """

    x: Tensor
    pad: Tensor
    targets: Tensor
    lengths: Tensor
    items: list[Item]


class Vocabulary:
    """What a recogniser hears and writes, without a corpus: its frontend, and its symbols or labels."""

    def __init__(self, frontend: Frontend, symbols: Symbols | None, labels: Sequence[str] | None) -> None:
        self.frontend, self.symbols, self.labels = frontend, symbols, labels

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: input_size; and num_mels, vocab_size and how to `decode`, or num_classes."""
        if self.symbols is None:
            return {"input_size": self.frontend.size, "num_classes": len(self.labels or ())}
        sizes = {"input_size": self.frontend.size, "num_mels": self.frontend.num_mels, "vocab_size": len(self.symbols)}
        return sizes | {"decode": self.symbols.decode}

    def read(self, path: str | Path, offset: float = 0.0, duration: float = 0.0) -> tuple[np.ndarray, int]:
        """The sound of a file, or of a part of it (in seconds; duration 0: up to the end), float32 of one channel, and
        its samples a second; ValueError where there is none."""
        wave, rate, _ = read(Path(path).expanduser(), Part(offset, duration))
        return wave, rate

    def stream(self, rate: int) -> StepStream:
        """Makes steps of sound that comes in pieces."""
        return StepStream(self.frontend, rate)


class Recordings(pl.LightningDataModule):
    """Recordings that a subclass lists by `utterances`, in batches of about the same length.

    A batch is a `Batch`; with unit=label it is (x (T, B, n), labels (B,), pad (T, B)), and a recording's text, whole,
    is its class. Features are computed once for all runs (data/audio/feature_table.py).

    cache: folder for what is computed.
    rate, num_mels, stack, level: see data.audio.fbank.Frontend; stack frames of 10 ms are a step of the network.
    unit: characters, words, bpe or unigram (subwords, vocab_size of them), or label.
    lowercase: of the transcripts.
    speeds: in training, each recording is heard at each of these speeds (Ko et al., 2015); 1.0 is as it is.
    volume: and louder or softer by up to so many dB.
    noise: and with white noise, at least and at most so many dB below it; null for none. Both are drawn once for all
        runs.
    frames_per_batch: a batch of training has at most so many frames of 10 ms, with the padding.
    eval_frames_per_batch: the same in validation and test.

    A recording with too few steps for its symbols is left out of training. Characters or words that no training
    transcript has cannot be written, but count in the error rates. Both are counted in the log.
    """

    # By a checkpoint.
    FIXED_BY_CHECKPOINT = (
        "rate",
        "num_mels",
        "stack",
        "level",
        "unit",
        "vocab_size",
        "lowercase",
        "speeds",
        "volume",
        "noise",
    )

    def __init__(
        self,
        *,
        cache: str,
        rate: int = 16000,
        num_mels: int = 80,
        stack: int = 3,
        level: str = "running",
        unit: str = "characters",
        vocab_size: int = 500,
        lowercase: bool = True,
        speeds: Sequence[float] = (1.0,),
        volume: float = 0.0,
        noise: Sequence[float] | None = None,
        frames_per_batch: int = 12000,
        eval_frames_per_batch: int = 24000,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if unit not in (*UNITS, LABEL):
            raise ValueError(f"data.unit={unit} must be one of {', '.join((*UNITS, LABEL))}")
        check_frontend(rate, num_mels, stack, level)
        sizes = {"vocab_size": vocab_size, "frames_per_batch": frames_per_batch}
        for name, value in (sizes | {"eval_frames_per_batch": eval_frames_per_batch}).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number, 1 or more")
        if type(lowercase) is not bool:
            raise ValueError(f"data.lowercase={lowercase} must be true or false")
        speeds = speeds if isinstance(speeds, Sequence) else []
        if not speeds or any(type(speed) not in (int, float) or not 0.5 <= speed <= 2 for speed in speeds):
            raise ValueError(
                f"data.speeds={list(speeds)} must be a list of numbers, 0.5 to 2: type 'data.speeds=[1.0]'"
            )
        if type(volume) not in (int, float) or not 0 <= volume <= 60:
            raise ValueError(f"data.volume={volume} must be dB, 0 to 60")
        self.cache = Path(cache).expanduser()
        self.options: dict[str, Any] = {"rate": rate, "num_mels": num_mels, "stack": stack, "level": level}
        self.unit, self.vocab_size, self.lowercase = unit, vocab_size, lowercase
        numbers = noise is None or (
            isinstance(noise, Sequence) and len(noise) == 2 and all(type(level) in (int, float) for level in noise)
        )
        if not numbers or (noise is not None and not -20 <= noise[0] <= noise[1] <= 100):
            raise ValueError(f"data.noise={noise} must be two numbers of dB, as [5,40], or null")
        self.noise = None if noise is None else (float(noise[0]), float(noise[1]))
        self.speeds, self.volume = sorted({float(speed) for speed in speeds}), volume
        self.frames_per_batch, self.eval_frames_per_batch, self.seed = frames_per_batch, eval_frames_per_batch, seed
        self.checkpoint_vocabulary: Vocabulary | None = (
            None  # a checkpoint's, to read with; none is made of the corpus then
        )
        self.recorded: dict[str, Recorded] = {}

    @property
    def MODEL_KWARGS(self) -> tuple[str, ...]:
        """The names in `model_kwargs`."""
        written = ("num_classes",) if self.unit == LABEL else ("num_mels", "vocab_size", "decode")
        return ("input_size", *written)

    def utterances(self) -> dict[str, list[Utterance]]:
        """What is in `train`, `val` and `test`; downloads what is absent."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Downloads what is absent and computes features, once for all runs."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens what is prepared, and prepares it where it is not; a second call does nothing."""
        if self.recorded:
            return
        frontend = Frontend(**self.options)
        listed = self.utterances()
        for split, own in listed.items():
            if not own:
                raise ValueError(f"data.{split} has no recording: 1 or more are needed")
        heard = {split: [self.clean_text(utterance) for utterance in own] for split, own in listed.items()}
        if self.checkpoint_vocabulary is None:
            heard["train"] = perturb(heard["train"], self.speeds, self.volume, self.noise)
        texts = {split: [utterance.text for utterance in own] for split, own in heard.items()}
        symbols, labels = self.collect_labels(texts)
        found = {split: prepare(own, frontend, self.cache, split) for split, own in heard.items()}
        train = found["train"]
        frontend = Frontend(**self.options, mean=train.mean, deviation=train.deviation)
        self.vocabulary = self.checkpoint_vocabulary or Vocabulary(frontend, symbols, labels)
        self.rows = self.fitting("train", train)
        if not len(self.rows) and self.checkpoint_vocabulary is None:
            raise ValueError(
                f"all {len(train)} recordings of data.train are too short for their transcripts: type a smaller "
                f"data.stack than {self.options['stack']}, or data.unit=bpe"
            )
        for split in ("val", "test"):
            self.fitting(split, found[split])
            if not (frontend.steps(found[split].sizes) > 0).any():
                raise ValueError(f"all {len(found[split])} recordings of data.{split} are shorter than a step")
        for split, recorded in found.items():
            hours = recorded.sizes.sum() / 360_000
            unknown = sorted({c for text in recorded.texts for c in symbols.unknown(text)}) if symbols else []
            rare = f"; no training transcript has {' '.join(map(repr, unknown[:9]))}, which cannot be written"
            log.info("%s: %d recordings, %.2f hours%s", split, len(recorded), hours, rare if unknown else "")
        self.recorded = found
        voices = {split: {u.speaker for u in own} - {""} for split, own in listed.items()}
        for split in ("val", "test"):
            both = voices[split] & voices["train"]
            if voices[split]:
                log.info("%s: %d speakers, %d of them heard in training", split, len(voices[split]), len(both))

    def clean_text(self, utterance: Utterance) -> Utterance:
        """The utterance, its text without spaces that nobody says."""
        text = " ".join(utterance.text.split())
        return utterance._replace(text=text.lower() if self.lowercase else text)

    def collect_labels(self, texts: dict[str, list[str]]) -> tuple[Symbols | None, list[str] | None]:
        """The symbols or the labels of the transcripts of each split, before any feature is computed."""
        if self.checkpoint_vocabulary is not None and self.unit != LABEL:
            return self.checkpoint_vocabulary.symbols, None
        if self.unit != LABEL:
            if not any(texts["val"]):
                raise ValueError(
                    "the transcripts of data.val are all empty: there is no error rate to choose a network by"
                )
            return Symbols.learn(dict.fromkeys(texts["train"]), self.unit, self.vocab_size), None
        labels = (
            sorted({*texts["train"]})
            if self.checkpoint_vocabulary is None
            else [*(self.checkpoint_vocabulary.labels or ())]
        )
        if len(labels) < 2:
            raise ValueError(
                f"data.train has one label, {labels[0]!r}: there is nothing to tell apart; add recordings of another"
            )
        for split, own in texts.items():
            if unknown := sorted({*own} - {*labels}):
                raise ValueError(
                    f"labels {', '.join(map(repr, unknown[:5]))} of data.{split} are none "
                    + (
                        "to train on"
                        if self.checkpoint_vocabulary is None
                        else f"of the checkpoint's, {', '.join(labels)}"
                    )
                )
        return None, labels

    def fitting(self, split: str, recorded: Recorded) -> np.ndarray:
        """The recordings that have a step for each of their symbols."""
        symbols = self.vocabulary.symbols
        steps = self.vocabulary.frontend.steps(recorded.sizes)
        needed = [1 if symbols is None else frames_needed(symbols.encode(text)) for text in recorded.texts]
        fits = steps >= np.maximum(needed, 1)
        if short := len(fits) - int(fits.sum()):
            what = "left out" if split == "train" else "that add nothing to the loss"
            log.warning(
                "%s: %d %s, too short for their transcripts with data.stack=%d",
                split,
                short,
                what,
                self.options["stack"],
            )
        return np.flatnonzero(fits)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know, see `Vocabulary`. Prepares the data first."""
        self.setup()
        return self.vocabulary.model_kwargs

    def batch(self, recorded: Recorded, rows: list[int]) -> Batch | tuple[Tensor, Tensor, Tensor]:
        """Recordings by their numbers."""
        frontend, symbols = self.vocabulary.frontend, self.vocabulary.symbols
        found = [recorded[row] for row in rows]
        steps = [frontend.normalise(frames) for _, _, frames in found]
        # A recording that is shorter than a step is a step of padding.
        x = torch.zeros(max(1, *map(len, steps)), len(rows), frontend.size)
        pad = torch.ones(x.shape[:2], dtype=torch.bool)
        for column, frames in enumerate(steps):
            x[: len(frames), column] = torch.from_numpy(frames)
            pad[: len(frames), column] = False
        if symbols is None:
            classes = {label: number for number, label in enumerate(self.vocabulary.labels or ())}
            return x, torch.tensor([classes[text] for _, text, _ in found]), pad
        encoded = [symbols.encode(text) for _, text, _ in found]
        lengths = torch.tensor([len(numbers) for numbers in encoded])
        targets = torch.full((len(rows), max(1, int(lengths.max()))), BLANK)
        for target, numbers in zip(targets, encoded, strict=True):
            target[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return Batch(x, pad, targets, lengths, [Item(name, text) for name, text, _ in found])

    def loader(self, split: str, rows: np.ndarray, budget: int, seed: int | None = None) -> Batches[Any]:
        recorded = self.recorded[split]
        return Batches(
            lambda chosen: self.batch(recorded, chosen), rows, recorded.sizes[rows], budget=budget, seed=seed
        )

    def train_dataloader(self) -> Batches[Any]:
        batches = self.loader("train", self.rows, self.frames_per_batch, self.seed)
        if self.trainer is not None:
            batches.limit(self.trainer.limit_train_batches)
        return batches

    def val_dataloader(self) -> Batches[Any]:
        return self.evaluation("val")

    def test_dataloader(self) -> Batches[Any]:
        return self.evaluation("test")

    def evaluation(self, split: str) -> Batches[Any]:
        return self.loader(split, np.arange(len(self.recorded[split])), self.eval_frames_per_batch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hear and write, and to know the recordings that it was trained on."""
        self.setup()
        frontend, symbols = self.vocabulary.frontend, self.vocabulary.symbols
        assert frontend.mean is not None
        assert frontend.deviation is not None
        return {
            **self.options,
            "mean": frontend.mean.tolist(),
            "deviation": frontend.deviation.tolist(),
            "symbols": symbols and symbols.options,
            "labels": self.vocabulary.labels,
            "recordings": {split: recorded.checksum for split, recorded in self.recorded.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on other recordings, or hears or writes others."""
        now = self.state_dict()
        if changed := [name for name in now if now[name] != state_dict.get(name)]:
            raise ValueError(
                f"the checkpoint was trained on other data: {', '.join(changed)} differ. Use the files and options of "
                "the checkpoint's run (data=, data.rate, data.num_mels, data.stack, data.level, data.unit, "
                "data.speeds, data.volume, data.noise), or train again."
            )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Vocabulary:
        """What is heard and written, of a `state_dict`."""
        frontend = Frontend(
            rate=state_dict["rate"],
            num_mels=state_dict["num_mels"],
            stack=state_dict["stack"],
            level=state_dict["level"],
            mean=np.array(state_dict["mean"], np.float32),
            deviation=np.array(state_dict["deviation"], np.float32),
        )
        check_frontend(frontend.rate, frontend.num_mels, frontend.stack, frontend.level)
        if {len(state_dict["mean"]), len(state_dict["deviation"])} != {frontend.num_mels}:
            raise ValueError(f"the checkpoint has no mean and deviation of {frontend.num_mels} energies: it is damaged")
        symbols = state_dict["symbols"] and Symbols(**state_dict["symbols"])
        return Vocabulary(frontend, symbols, state_dict["labels"])

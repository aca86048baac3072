"""Recordings with transcripts or labels as log-mel features (SRU 2017, section 4.5, on open corpora)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.audio.fbank import Frontend, Part, StepStream, check_frontend, read
from data.audio.feature_table import Recorded, Utterance, perturb, prepare
from data.audio.labels import BLANK, UNITS, Symbols, least_steps
from data.base import DataModule
from data.batching import Batches, pad_columns

log = logging.getLogger(__name__)

LABEL = "label"


class Item(NamedTuple):
    """A recording for evaluation: its name, and its transcript."""

    id: str
    text: str


class Batch(NamedTuple):
    """Recordings and their transcripts.

    x (T, B, n): steps, padded at the end with 0; pad (T, B): True in the padding. targets (B, L): symbols, padded with
    0; lengths (B,): their numbers.
    """

    x: Tensor
    pad: Tensor
    targets: Tensor
    lengths: Tensor
    items: list[Item]


class Vocabulary:
    """The input and output of a recogniser: its frontend, and its symbols or labels."""

    def __init__(self, frontend: Frontend, symbols: Symbols | None, labels: Sequence[str] | None) -> None:
        self.frontend, self.symbols, self.labels = frontend, symbols, labels

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """input_size; and num_classes, or num_mels, vocab_size and the function to decode."""
        if self.symbols is None:
            return {"input_size": self.frontend.size, "num_classes": len(self.labels or ())}
        sizes = {"input_size": self.frontend.size, "num_mels": self.frontend.num_mels, "vocab_size": len(self.symbols)}
        return sizes | {"decode": self.symbols.decode}

    def read(self, path: str | Path, offset: float = 0.0, duration: float = 0.0) -> tuple[np.ndarray, int]:
        """Mono float32 samples of a file, or of a part of it in seconds (duration 0: to the end), and their rate."""
        wave, rate, _ = read(Path(path).expanduser(), Part(offset, duration))
        return wave, rate

    def stream(self, rate: int) -> StepStream:
        """Computes the network's steps from sound that arrives in pieces."""
        return StepStream(self.frontend, rate)


class Recordings(DataModule[Batches]):
    """Recordings that a subclass lists in `utterances`, in batches of similar length.

    A batch is a `Batch`; with unit=label it is (x (T, B, n), labels (B,), pad (T, B)), and a recording's text is its
    class. Features are computed once for all runs (data/audio/feature_table.py).

    cache: folder for the features. root: folder of the corpora, may be read-only.
    rate, num_mels, stack, level: see data.audio.fbank.Frontend; a step of the network is `stack` frames of 10 ms.
    unit: characters, words, bpe or unigram (`vocab_size` subwords), or label.
    lowercase: convert transcripts to lower case.
    speeds: in training, each recording is used at each of these speeds (Ko et al., 2015); 1.0 is unchanged.
    volume: in training, the largest random gain, + or -, in dB.
    noise: in training, the lowest and highest signal-to-noise ratio of added white noise in dB; null for none. Gain and
        noise are drawn once for all runs.
    frames_per_batch: the largest size of a training batch in frames of 10 ms, including padding.
    eval_frames_per_batch: the same in validation and test.

    Recordings with too few steps for their symbols are left out of training. Characters or words that no training
    transcript contains cannot be recognised, but count in the error rates. Both are counted in the log.
    """

    FIXED_BY_CHECKPOINT = (
        *("rate", "num_mels", "stack", "level", "unit", "vocab_size", "lowercase"),
        *("speeds", "volume", "noise"),
    )

    def __init__(
        self,
        *,
        cache: str,
        root: str = "",
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
        if not are_numbers(speeds, 0.5, 2) or not speeds:
            raise ValueError(f"data.speeds={speeds} must be a list of numbers, 0.5 to 2: type 'data.speeds=[1.0]'")
        if noise is not None and not (are_numbers(noise, -20, 100) and len(noise) == 2 and noise[0] <= noise[1]):
            raise ValueError(f"data.noise={noise} must be two numbers in dB, such as [5,40], or null")
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.options: dict[str, Any] = {"rate": rate, "num_mels": num_mels, "stack": stack, "level": level}
        self.unit, self.vocab_size, self.lowercase = unit, vocab_size, lowercase
        self.noise = None if noise is None else (float(noise[0]), float(noise[1]))
        self.speeds, self.volume = sorted({float(speed) for speed in speeds}), volume
        self.frames_per_batch, self.eval_frames_per_batch, self.seed = frames_per_batch, eval_frames_per_batch, seed

    @property
    def MODEL_KWARGS(self) -> tuple[str, ...]:
        return ("input_size", *(("num_classes",) if self.unit == LABEL else ("num_mels", "vocab_size", "decode")))

    def utterances(self) -> dict[str, list[Utterance]]:
        """The recordings of `train`, `val` and `test`; downloads absent files."""
        raise NotImplementedError

    def load(self) -> None:
        """Computes absent features; `splits` are `Recorded`."""
        listed = self.utterances()
        for split, own in listed.items():
            if not own:
                raise ValueError(f"data.{split} has no recording: 1 or more are needed")
        utterances = {split: [self.clean_text(utterance) for utterance in own] for split, own in listed.items()}
        if self.checkpoint_vocabulary is None:
            utterances["train"] = perturb(utterances["train"], self.speeds, self.volume, self.noise)
        symbols, labels = self.collect_labels(
            {split: [utterance.text for utterance in own] for split, own in utterances.items()}
        )
        frontend = Frontend(**self.options)
        splits = {split: prepare(own, frontend, self.cache, split) for split, own in utterances.items()}
        train = splits["train"]
        frontend = Frontend(**self.options, mean=train.mean, deviation=train.deviation)
        self.vocabulary = self.checkpoint_vocabulary or Vocabulary(frontend, symbols, labels)
        self.rows = self.rows_with_enough_steps("train", train)
        if not len(self.rows) and self.checkpoint_vocabulary is None:
            raise ValueError(
                f"all {len(train)} recordings of data.train are too short for their transcripts: type a smaller "
                f"data.stack than {self.options['stack']}, or data.unit=bpe"
            )
        for split in ("val", "test"):
            self.rows_with_enough_steps(split, splits[split])
            if not (frontend.steps(splits[split].sizes) > 0).any():
                raise ValueError(f"all {len(splits[split])} recordings of data.{split} are shorter than a step")
        self.splits = splits
        speakers = {split: {utterance.speaker for utterance in own} - {""} for split, own in listed.items()}
        for split, recorded in splits.items():
            unknown = sorted({c for text in recorded.texts for c in symbols.unknown(text)}) if symbols else []
            rare = f"; no training transcript has {' '.join(map(repr, unknown[:9]))}, which cannot be recognised"
            hours = recorded.sizes.sum() / 360_000
            log.info("%s: %d recordings, %.2f hours%s", split, len(recorded), hours, rare if unknown else "")
            if split != "train" and speakers[split]:
                both = len(speakers[split] & speakers["train"])
                log.info("%s: %d speakers, %d of them also in training", split, len(speakers[split]), both)

    def clean_text(self, utterance: Utterance) -> Utterance:
        """The utterance with single spaces in its text."""
        text = " ".join(utterance.text.split())
        return utterance._replace(text=text.lower() if self.lowercase else text)

    def collect_labels(self, texts: dict[str, list[str]]) -> tuple[Symbols | None, list[str] | None]:
        """The symbols or the labels of the transcripts; refuses unusable ones before features are computed."""
        known = self.checkpoint_vocabulary
        if self.unit != LABEL:
            if known is not None:
                return known.symbols, None
            if not any(texts["val"]):
                raise ValueError("the transcripts of data.val are all empty: they give no error rate to select by")
            return Symbols.learn(dict.fromkeys(texts["train"]), self.unit, self.vocab_size), None
        labels = sorted({*texts["train"]}) if known is None else [*known.labels]
        if len(labels) < 2:
            raise ValueError(f"data.train has one label, {labels[0]!r}: add recordings with another")
        for split, own in texts.items():
            if unknown := sorted({*own} - {*labels}):
                where = "to train on" if known is None else f"of the checkpoint's, {', '.join(labels)}"
                raise ValueError(f"labels {', '.join(map(repr, unknown[:5]))} of data.{split} are none {where}")
        return None, labels

    def rows_with_enough_steps(self, split: str, recorded: Recorded) -> np.ndarray:
        """The numbers of the recordings with enough steps for their symbols."""
        symbols = self.vocabulary.symbols
        steps = self.vocabulary.frontend.steps(recorded.sizes)
        needed = [1 if symbols is None else least_steps(symbols.encode(text)) for text in recorded.texts]
        fits = steps >= np.maximum(needed, 1)
        if short := len(fits) - int(fits.sum()):
            effect = "left out" if split == "train" else "not part of the loss"
            stack = self.options["stack"]
            log.warning("%s: %d %s, too short for their transcripts with data.stack=%d", split, short, effect, stack)
        return np.flatnonzero(fits)

    def batch(self, recorded: Recorded, rows: list[int]) -> Batch | tuple[Tensor, Tensor, Tensor]:
        frontend, symbols = self.vocabulary.frontend, self.vocabulary.symbols
        names, texts, frames = zip(*(recorded[row] for row in rows), strict=True)
        sequences = [frontend.normalise(own) for own in frames]
        x = torch.from_numpy(pad_columns(sequences, 0, np.float32))
        pad = torch.arange(len(x))[:, None] >= torch.tensor([*map(len, sequences)])
        if symbols is None:
            classes = {label: number for number, label in enumerate(self.vocabulary.labels)}
            return x, torch.tensor([classes[text] for text in texts]), pad
        encoded = [symbols.encode(text) for text in texts]
        targets = torch.from_numpy(pad_columns(encoded, BLANK).T.copy())
        return Batch(x, pad, targets, torch.tensor([*map(len, encoded)]), [*map(Item, names, texts)])

    def batches(self, split: str, rows: np.ndarray, budget: int, seed: int | None = None) -> Batches[Any]:
        recorded = self.splits[split]
        return Batches(lambda own: self.batch(recorded, own), rows, recorded.sizes[rows], budget=budget, seed=seed)

    def train_loader(self) -> Batches[Any]:
        return self.batches("train", self.rows, self.frames_per_batch, self.seed)

    def evaluation(self, split: str) -> Batches[Any]:
        return self.batches(split, np.arange(len(self.splits[split])), self.eval_frames_per_batch)

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        frontend, symbols = self.vocabulary.frontend, self.vocabulary.symbols
        return {
            **self.options,
            "mean": frontend.mean.tolist(),
            "deviation": frontend.deviation.tolist(),
            "symbols": symbols and symbols.options,
            "labels": self.vocabulary.labels,
            "recordings": {split: recorded.checksum for split, recorded in self.splits.items()},
        }

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Vocabulary:
        options = {name: state_dict[name] for name in ("rate", "num_mels", "stack", "level")}
        check_frontend(**options)
        mean, deviation = (np.array(state_dict[name], np.float32) for name in ("mean", "deviation"))
        if {len(mean), len(deviation)} != {options["num_mels"]}:
            raise ValueError(
                f"the checkpoint is damaged: it has no mean and deviation of {options['num_mels']} energies"
            )
        symbols = state_dict["symbols"] and Symbols(**state_dict["symbols"])
        return Vocabulary(Frontend(**options, mean=mean, deviation=deviation), symbols, state_dict["labels"])


def are_numbers(values: Any, low: float, high: float) -> bool:
    """Whether `values` is a list of numbers within these bounds."""
    return isinstance(values, Sequence) and all(
        type(value) in (int, float) and low <= value <= high for value in values
    )

"""A text as one long sequence of bytes, characters or words, for language models."""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.base import DataModule, require_whole
from data.batching import StatefulLoader, rank_and_world_size
from data.download import own_file
from data.text import lines, token_array
from data.text.python_manual import manual_text
from data.text.token_array import EOS, UNITS, UNK

Token = int | str


class Vocabulary:
    """The tokens of a text in the order of their numbers, to encode and decode text.

    unit: bytes (tokens are ints, 0 to 255), characters, or words (the end of a line is <eos>).
    """

    def __init__(self, unit: str, tokens: Sequence[Token]) -> None:
        self.unit = unit
        self.tokens = list(tokens)
        self.index = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"vocab_size": len(self), "unit": self.unit}

    def encode(self, text: str) -> list[int]:
        """The numbers of the text's tokens; unknown words are <unk>. ValueError if the vocabulary has no <unk>."""
        pieces: Sequence[Token] = text
        if self.unit == "bytes":
            pieces = text.encode(errors="surrogateescape")  # a file need not be UTF-8
        elif self.unit == "words":
            pieces = [word.decode() for word in token_array.words_of(text.encode())]
        if self.unit == "words" and UNK in self.index:
            return [self.index.get(piece, self.index[UNK]) for piece in pieces]
        try:
            return [self.index[piece] for piece in pieces]
        except KeyError as error:
            unknown = bytes([error.args[0]]) if self.unit == "bytes" else error.args[0]
            raise ValueError(
                f"{unknown!r} is not in the model's vocabulary of {len(self)} {self.unit}: "
                "take it out of the text, or train on a text that holds it"
                + (" (data.min_count=2 makes rare words <unk>)" if self.unit == "words" else "")
            ) from None

    def lines(self, content: bytes, name: str) -> list[str]:
        """The lines of a file, read as in training; bytes that are not UTF-8 become surrogates."""
        if self.unit == "bytes":
            return content.decode("utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
        return lines.lines_of(lines.decode(content, name))

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of the numbers; bytes that are not UTF-8 become U+FFFD."""
        pieces: list[Any] = [self.tokens[number] for number in numbers]
        if self.unit == "bytes":
            return bytes(pieces).decode("utf-8", errors="replace")
        if self.unit == "characters":
            return "".join(pieces)
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == EOS else word for word in pieces))


class Segments(StatefulLoader):
    """Consecutive segments of a text in parallel streams: (x (T, B), y (T, B), first), int64, y one token ahead of x.

    N tokens are W * B streams of n = (N - 1) // (W * B) steps for W processes; process r has streams r * B to
    r * B + B - 1. Stream s reads tokens s * n to s * n + n - 1. The last segment may be shorter. `first` is True at the
    start of the streams, where a state carried from segment to segment must be reset.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, unroll: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.unroll = unroll
        streams = batch_size * world_size
        self.steps = (len(tokens) - 1) // streams
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        size = streams * self.steps
        self.inputs = tokens[:size].reshape(streams, self.steps)[mine]
        self.targets = tokens[1 : size + 1].reshape(streams, self.steps)[mine]
        super().__init__(len(self))

    def __len__(self) -> int:
        return -(-self.steps // self.unroll)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        for position in self.start_epoch():
            self.position = position + 1
            span = slice(position * self.unroll, (position + 1) * self.unroll)
            x, y = (
                torch.from_numpy(np.ascontiguousarray(side[:, span].T, np.int64))
                for side in (self.inputs, self.targets)
            )
            yield x, y, position == 0


class Text(DataModule[Segments]):
    """A text in `Segments`, read from a memory map, so its size costs no memory.

    root: folder of the corpora, may be read-only; absent files are downloaded.
    cache: folder for prepared data, shared by all runs.
    unit: bytes, characters or words.
    files: arguments of `token_array.Source` for the keys `train`, `val` and `test`, or for `all`, which is split.
    path: instead of `files`, any file, which is split.
    train, val, test: instead, a file each.
    valid_bytes, test_bytes: units of `all` for validation, and at its end for the test; the rest is for training. None:
        a twentieth each.
    min_count: training words with fewer occurrences become <unk>; above 1, <unk> always exists. None: 2 for words of
        `path` or `train`, else 1.
    batch_size, unroll: streams of a process, and steps of a segment, in training.
    eval_batch_size, eval_unroll: the same in validation and test. These streams are divided among the processes, so
        their number does not change results; if they cannot be divided, each process reads all. With one stream every
        token but the first is predicted.
    """

    MODEL_KWARGS = ("vocab_size", "unit")
    FIXED_BY_CHECKPOINT = ("min_count",)
    SPLIT_OPTIONS = ("path", "unit")

    def __init__(
        self,
        *,
        root: str,
        cache: str,
        unit: str,
        files: Mapping[str, Mapping[str, Any]] | None = None,
        path: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        valid_bytes: int | None = None,
        test_bytes: int | None = None,
        min_count: int | None = None,
        batch_size: int = 32,
        unroll: int = 128,
        eval_batch_size: int = 1,
        eval_unroll: int = 128,
    ) -> None:
        super().__init__()
        if unit not in UNITS:
            raise ValueError(f"data.unit={unit} is not one of {', '.join(UNITS)}")
        if path and {train, val, test} != {None}:
            raise ValueError(
                "data.path= is one text, which is split: leave out data.train=, data.val= and data.test=, or type "
                "data.path=null"
            )
        named = {"path": path, "train": train, "val": val, "test": test}
        own = {key.replace("path", "all"): {"name": str(own_file(key, name))} for key, name in named.items() if name}
        if own and files:
            raise ValueError(
                f"data.{'= data.'.join(key for key, name in named.items() if name)}= name your own text, but this "
                "corpus has its own files: type data=words, or data=bytes for bytes or characters"
            )
        self.files: Mapping[str, Mapping[str, Any]] = own or files or {}
        if min_count is None:
            min_count = 2 if unit == "words" and own else 1
        self.held_out = {"valid_bytes": valid_bytes, "test_bytes": test_bytes}
        require_whole(2, **{name: size for name, size in self.held_out.items() if size is not None})
        if not self.files:
            raise ValueError(
                "name your text: type data.path=FILE, which is split into training, validation and test (sizes: "
                "data.valid_bytes= and data.test_bytes=), or data.train=FILE data.val=FILE data.test=FILE"
            )
        if set(self.files) not in ({"all"}, {"train", "val", "test"}):
            missing = [f"data.{key}=FILE" for key in ("train", "val", "test") if key not in self.files]
            raise ValueError(
                f"the text has files for {', '.join(sorted(self.files))}: type {' '.join(missing)} as well"
            )
        if min_count != 1 and unit != "words":
            raise ValueError(f"data.min_count has no effect on {unit}: leave it out, or type data=words")
        if {valid_bytes, test_bytes} != {None} and "all" not in self.files:
            raise ValueError(
                "data.valid_bytes= and data.test_bytes= have no effect on files for each split: leave them out"
            )
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.unit, self.min_count = unit, min_count
        self.batch_size, self.unroll = batch_size, unroll
        self.eval_batch_size, self.eval_unroll = eval_batch_size, eval_unroll

    def load(self) -> None:
        if self.checkpoint_vocabulary is not None and self.checkpoint_vocabulary.unit != self.unit:
            raise ValueError(
                f"data.unit={self.unit}: the checkpoint reads {self.checkpoint_vocabulary.unit}; name data with them"
            )
        tokens, arrays = self.read()
        if "all" in arrays:
            train, val = token_array.ends_of(len(arrays["all"]), *self.held_out.values())
            arrays = dict(zip(("train", "val", "test"), np.split(arrays["all"], [train, val]), strict=True))
        self.vocabulary = Vocabulary(self.unit, tokens)
        self.checksums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
        self.splits = arrays
        for split in arrays:  # fails now if one is too short
            self.segments(split, "eval_" if split != "train" or self.checkpoint_vocabulary else "")

    def read(self) -> tuple[list[Token], dict[str, np.ndarray]]:
        """The vocabulary, and the token numbers of each file."""
        sources = {key: token_array.Source(root=self.root, **file) for key, file in self.files.items()}
        known = None if self.checkpoint_vocabulary is None else self.checkpoint_vocabulary.tokens
        held_out = self.held_out["valid_bytes"], self.held_out["test_bytes"]
        return token_array.prepare(sources, self.cache / "text", self.unit, self.min_count, known, held_out)

    def train_loader(self) -> Segments:
        return self.segments("train")

    def evaluation(self, split: str) -> Segments:
        return self.segments(split, "eval_")

    def segments(self, split: str, prefix: str = "") -> Segments:
        """The segments of this process, with the options of this prefix; ValueError if the text is too short."""
        rank, world_size = rank_and_world_size()
        text = self.splits[split]
        batch_size, unroll = getattr(self, f"{prefix}batch_size"), getattr(self, f"{prefix}unroll")
        if prefix and batch_size % world_size:
            rank, world_size = 0, 1
        elif prefix:
            batch_size //= world_size
        streams, least = batch_size * world_size, 1 if prefix else unroll
        steps = max(len(text) - 1, 0) // streams
        if steps < least:
            advice = "Use a longer text"
            if most := max(len(text) - 1, 0) // world_size:  # steps of a single stream
                fitting = min(unroll, most)
                options = f"data.{prefix}batch_size={most if prefix else most // fitting}"
                advice = f"Type {options}{'' if prefix else f' data.unroll={fitting}'} or less, or use a longer text"
            if prefix and "all" in self.files:
                advice += f", or type a larger data.{split.replace('val', 'valid')}_bytes="
            raise ValueError(
                f"the {split} split has {len(text)} {self.unit}, {steps} steps in {streams} streams: too few for "
                f"data.{prefix}batch_size={batch_size} and data.{prefix}unroll={unroll}, which need "
                f"{streams * least + 1}. {advice}"
            )
        return Segments(text, batch_size, unroll, rank=rank, world_size=world_size)

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        return {"unit": self.unit, "tokens": self.vocabulary.tokens, "checksums": self.checksums}

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Vocabulary:
        return Vocabulary(state_dict["unit"], state_dict["tokens"])


class PythonManual(Text):
    """Python's reference manual as characters (data/text/python_manual.py): no file, no download."""

    def __init__(self, **options: Any) -> None:
        super().__init__(unit="characters", files={"all": {}}, **options)

    def read(self) -> tuple[list[Token], dict[str, np.ndarray]]:
        text = manual_text()
        vocabulary = self.checkpoint_vocabulary or Vocabulary("characters", sorted(set(text)))
        return vocabulary.tokens, {"all": np.array(vocabulary.encode(text), token_array.dtype_of(len(vocabulary)))}

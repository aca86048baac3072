"""A text as one long sequence of bytes, characters or words, for language models."""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.batching import StatefulLoader, rank_and_world_size
from data.download import own_file
from data.text import lines, token_array
from data.text.token_array import EOS, UNITS, UNK

Token = int | str
OWN = (
    "data.path=FILE, whose last two twentieths validate and test (or data.valid_bytes= and data.test_bytes= of it), or "
    "data.train=FILE data.val=FILE data.test=FILE"
)


class Vocabulary:
    """The tokens of a text in the order of their numbers, to read and write text with; needs no corpus.

    unit: bytes (tokens are ints, 0 to 255), characters, or words (a line's end is <eos>).
    """

    def __init__(self, unit: str, tokens: Sequence[Token]) -> None:
        self.unit = unit
        self.tokens = list(tokens)
        self.index = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know."""
        return {"vocab_size": len(self), "unit": self.unit}

    def encode(self, text: str) -> list[int]:
        """The text's numbers; an unknown word is <unk>. ValueError names what is unknown where there is no <unk>."""
        pieces: Sequence[Token] = text
        if self.unit == "bytes":
            pieces = text.encode(errors="surrogateescape")  # a file need not be UTF-8
        elif self.unit == "words":
            pieces = [word.decode() for word in token_array.words_of(text.encode())]
        try:
            return [self.index[piece] for piece in pieces]
        except KeyError as error:
            if self.unit == "words" and UNK in self.index:
                return [self.index.get(piece, self.index[UNK]) for piece in pieces]
            unknown = bytes([error.args[0]]) if self.unit == "bytes" else error.args[0]
            raise ValueError(
                f"{unknown!r} is none of the {len(self)} {self.unit} that the model was trained on: "
                "take it out of the text, or train on a text that holds it"
                + (" (data.min_count=2 makes rare words <unk>)" if self.unit == "words" else "")
            ) from None

    def lines(self, content: bytes, name: str) -> list[str]:
        """The lines of a file, as a text that is trained on is read; bytes that are no UTF-8 are surrogates."""
        if self.unit == "bytes":
            return content.decode("utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
        return lines.lines_of(lines.decode(content, name))

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of the numbers; bytes that are no UTF-8 become U+FFFD."""
        pieces: list[Any] = [self.tokens[number] for number in numbers]
        if self.unit == "bytes":
            return bytes(pieces).decode("utf-8", errors="replace")
        if self.unit == "characters":
            return "".join(pieces)
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == EOS else word for word in pieces))


class Segments(StatefulLoader):
    """A text in parallel streams, cut in time: yields (x (T, B), y (T, B), first), int64, y one token ahead of x.

    N tokens are W * B streams of n = (N - 1) // (W * B) steps for W processes; process r has streams r * B to
    r * B + B - 1. Stream s reads tokens s * n to s * n + n - 1. The last segment may be shorter. `first` is True where
    the streams begin, so that whoever carries a state from segment to segment starts it there.
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
        begin, self.start = self.start, 0
        for position in range(begin, len(self)):
            self.position = position + 1
            span = slice(position * self.unroll, (position + 1) * self.unroll)
            x, y = (
                torch.from_numpy(np.ascontiguousarray(side[:, span].T, np.int64))
                for side in (self.inputs, self.targets)
            )
            yield x, y, position == 0


class Text(pl.LightningDataModule):
    """A text in `Segments`, read from a memory map, so that its size costs no memory.

    root: folder of the corpora, which may be read-only; a file that is absent is downloaded.
    cache: folder for what is prepared from them, once for all runs.
    unit: bytes, characters or words.
    files: what `corpus.Source` takes, for the keys `train`, `val` and `test`, or for `all`, which is split by size.
    path: instead of `files`, any file, which is split by size.
    train, val, test: instead, a file each.
    valid_bytes, test_bytes: units at the end of `all` for validation, and after it for the test; the rest trains.
        None: a twentieth each.
    min_count: training words seen less often become <unk>; above 1, there is always an <unk>. None: 1, or 2 for words
        of `path` or of `train`.
    batch_size, unroll: streams of a process, and steps of a segment, in training.
    eval_batch_size, eval_unroll: the same for validation and test, but streams of all processes, so that their number
        changes no result; where they cannot be shared out, each process reads all. One stream predicts every token but
        the first.
    """

    MODEL_KWARGS = ("vocab_size", "unit")  # the names in `model_kwargs`
    FIXED_BY_CHECKPOINT = ("min_count",)  # by a checkpoint

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
        self.root = Path(root).expanduser()
        self.cache = Path(cache).expanduser()
        self.unit = unit
        own = {"path": path} if path else {"train": train, "val": val, "test": test}
        own = {key: name for key, name in own.items() if name is not None}
        self.files: dict[str, Mapping[str, Any]] = dict(files or {})
        if own:
            self.files = {key.replace("path", "all"): {"name": str(own_file(key, name))} for key, name in own.items()}
        self.held_out: dict[str, int | None] = {"valid_bytes": valid_bytes, "test_bytes": test_bytes}
        if min_count is None:
            min_count = 2 if unit == "words" and own else 1
        self.min_count = min_count
        self.batch_size, self.unroll = batch_size, unroll
        self.eval_batch_size, self.eval_unroll = eval_batch_size, eval_unroll
        self.checkpoint_vocabulary: Vocabulary | None = (
            None  # a checkpoint's, to read with; none is made of the corpus then
        )
        self.splits: dict[str, np.ndarray] = {}
        if unit not in UNITS:
            raise ValueError(f"data.unit={unit} is not one of {', '.join(UNITS)}")
        for name in ("batch_size", "unroll", "eval_batch_size", "eval_unroll", "min_count"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number, 1 or more")
        for name, size in self.held_out.items():
            if size is not None and (type(size) is not int or size < 2):
                raise ValueError(f"data.{name}={size} must be a whole number, 2 (a token, and the next) or more")
        if own and files:
            raise ValueError(
                f"data.{'= data.'.join(own)}= name a text of yours, and this corpus has files of its own: type "
                "data=words, or data=bytes for bytes or characters"
            )
        if path and {train, val, test} != {None}:
            raise ValueError(
                "data.path= is one text, which is split by size: leave out data.train=, data.val= and data.test=, or "
                "type data.path=null"
            )
        if not self.files:
            raise ValueError(f"the text is a file of yours: type {OWN}")
        for name, given, fits, instead in (
            ("data.min_count", self.min_count != 1, unit == "words", ", or type data=bytes"),
            ("data.valid_bytes= and data.test_bytes=", {valid_bytes, test_bytes} != {None}, "all" in self.files, ""),
        ):
            if given and not fits:
                raise ValueError(
                    f"{name} changes nothing here: {unit} of {', '.join(sorted(self.files))}; leave it out{instead}"
                )
        if set(self.files) not in ({"all"}, {"train", "val", "test"}):
            missing = [f"data.{key}=FILE" for key in ("train", "val", "test") if key not in self.files]
            raise ValueError(
                f"the text has files for {', '.join(sorted(self.files))}: type {' '.join(missing)} as well"
            )

    def prepare_data(self) -> None:
        """Downloads and checks what is absent, and prepares it in the cache; done once for all runs."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens what is prepared, and prepares it where it is not; a second call does nothing."""
        if self.splits:
            return
        if self.checkpoint_vocabulary is not None and self.checkpoint_vocabulary.unit != self.unit:
            raise ValueError(
                f"data.unit={self.unit}: the checkpoint reads {self.checkpoint_vocabulary.unit}; "
                "name data that has them"
            )
        tokens, arrays = self.read()
        if "all" in arrays:
            train, val = token_array.ends_of(len(arrays["all"]), *self.held_out.values())
            arrays = dict(zip(("train", "val", "test"), np.split(arrays["all"], [train, val]), strict=True))
        self.vocabulary = Vocabulary(self.unit, tokens)
        self.checksums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
        self.splits = arrays
        for split in arrays:  # what is too short for its streams is told now
            self.segments(split, "eval_" if split != "train" or self.checkpoint_vocabulary else "")

    def read(self) -> tuple[list[Token], dict[str, np.ndarray]]:
        """The vocabulary's tokens, and the numbers of the tokens of each file."""
        sources = {key: token_array.Source(root=self.root, **file) for key, file in self.files.items()}
        known = None if self.checkpoint_vocabulary is None else self.checkpoint_vocabulary.tokens
        held_out = self.held_out["valid_bytes"], self.held_out["test_bytes"]
        return token_array.prepare(sources, self.cache / "text", self.unit, self.min_count, known, held_out)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: vocab_size and unit. Prepares the data first."""
        self.setup()
        return self.vocabulary.model_kwargs

    def train_dataloader(self) -> Segments:
        segments = self.segments("train")
        if self.trainer is not None:
            segments.limit(self.trainer.limit_train_batches)
        return segments

    def val_dataloader(self) -> Segments:
        return self.evaluation("val")

    def test_dataloader(self) -> Segments:
        return self.evaluation("test")

    def evaluation(self, split: str) -> Segments:
        return self.segments(split, "eval_")

    def segments(self, split: str, prefix: str = "") -> Segments:
        """The segments of this process; ValueError if the text is too short for them."""
        rank, world_size = rank_and_world_size()
        text = self.splits[split]
        batch_size, unroll = getattr(self, f"{prefix}batch_size"), getattr(self, f"{prefix}unroll")
        if prefix and batch_size % world_size:
            rank, world_size = 0, 1  # each process reads all: one stream cannot be parted
        elif prefix:
            batch_size //= world_size
        steps = (len(text) - 1) // (batch_size * world_size)
        least = 1 if prefix else unroll
        if steps < least:
            raise ValueError(
                f"the {split} split has {len(text)} {self.unit}: in {batch_size * world_size} streams they are "
                f"{max(steps, 0)} steps, too few for data.{prefix}batch_size={batch_size} and data.{prefix}unroll="
                f"{unroll}, which take {batch_size * world_size * least + 1}. "
                f"{self.suggest_smaller(prefix, (len(text) - 1) // world_size)}take a longer text"
                + (
                    f", or type a larger data.{split.replace('val', 'valid')}_bytes="
                    * bool(prefix and "all" in self.files)
                )
            )
        return Segments(text, batch_size, unroll, rank=rank, world_size=world_size)

    def suggest_smaller(self, prefix: str, steps: int) -> str:
        """What to type for a text of so many steps in a process."""
        if steps < 1:
            return "It cannot be parted: "
        if prefix:
            return f"Type data.{prefix}batch_size={steps} or less, or "
        unroll = min(self.unroll, steps)
        return f"Type data.batch_size={steps // unroll} data.unroll={unroll} or less, or "

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read and write text, and to know the text that it was trained on."""
        self.setup()
        return {"unit": self.unit, "tokens": self.vocabulary.tokens, "checksums": self.checksums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on another text."""
        now, then = self.state_dict(), state_dict
        if now["tokens"] == then["tokens"] and now != then:
            raise ValueError(
                "the text is not the one that the checkpoint was trained on, though its vocabulary is: a file or the "
                "sizes of its parts have changed. Put the old file there, or train again."
            )
        if now != then:
            pairs = enumerate(zip(now["tokens"], then["tokens"], strict=False))
            place = next((i for i, (new, old) in pairs if new != old), None)
            where = (
                "" if place is None else f"; number {place} was {then['tokens'][place]!r}, is {now['tokens'][place]!r}"
            )
            raise ValueError(
                f"the checkpoint's vocabulary has {len(then['tokens'])} {then['unit']}, the data's "
                f"{len(now['tokens'])} {now['unit']}{where}: the text or its options have changed. Use the options of "
                "the checkpoint's run (data=, data.path, data.unit, data.min_count), or train again."
            )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Vocabulary:
        """The vocabulary in a `state_dict`."""
        return Vocabulary(state_dict["unit"], state_dict["tokens"])


class PythonManual(Text):
    """Python's reference manual, the text of `pydoc_data.topics` by topic, as characters: no file, no download.

    It differs a little between Python versions, and the numbers reached on it with it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(unit="characters", files={"all": {}}, **options)

    def read(self) -> tuple[list[Token], dict[str, np.ndarray]]:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        vocabulary = self.checkpoint_vocabulary or Vocabulary("characters", sorted(set(text)))
        return vocabulary.tokens, {"all": np.array(vocabulary.encode(text), token_array.dtype_of(len(vocabulary)))}

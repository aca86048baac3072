"""Parallel texts, line by line, as memory-mapped subword numbers, prepared once."""

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.cache import prepare_folder
from data.download import open_unpacked, unpacking
from data.text import lines
from data.text.columns import Ragged
from data.text.subwords import VERSION, Batch, Item, Subwords, batch_of, learn

FORMAT = 1  # version of the prepared folders; increase it when their content changes
BLOCK = 1 << 20  # bytes read at once
COLUMNS = ("source", "target", "source_text", "target_text")
LEARNT = 4_000_000  # subwords are learnt from at most so many lines: more need memory and change little


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or packed, without their ends; ValueError with the place of other bytes."""
    with open_unpacked(path) as file, unpacking(path):
        for number, line in enumerate(file, start=1):
            if number == 1:
                yield from lines.lines_of(lines.decode(line, path))  # several if the file has no LF
            else:
                yield lines.decode(line, path, number).removesuffix("\n").removesuffix("\r")


class Text(NamedTuple):
    """A checked file, the checksum of its unpacked content, and the number of its lines."""

    path: Path
    sha256: str
    lines: int


def check_text(path: Path) -> Text:
    """Reads a file once; ValueError with the place of bytes that are not UTF-8."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8-sig")()
    feeds = returns = 0
    last, is_text = "", True
    try:
        with open_unpacked(path) as file, unpacking(path):
            while block := file.read(BLOCK):
                digest.update(block)
                feeds, returns = feeds + block.count(b"\n"), returns + block.count(b"\r")
                text = decoder.decode(block)
                last = text[-1:] or last
                is_text = is_text and "\0" not in text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        for _ in lines_of(path):  # raises at the place
            pass
    ends = feeds or returns
    return Text(path, digest.hexdigest(), ends + (last not in ("", "\n" if feeds else "\r")))


def require_pairs(name: str, source: Text, target: Text) -> None:
    """ValueError unless both files have the same number of lines, at least one."""
    if source.lines != target.lines:
        raise ValueError(
            f"{name}: {source.path} has {source.lines:,} lines, {target.path} has {target.lines:,}: line n of one "
            "must be the translation of line n of the other"
        )
    if not source.lines:
        raise ValueError(f"{name}: {source.path} and {target.path} are empty: give them a sentence a line")


def key_of(*identity: Any) -> str:
    """The name of a folder in the cache."""
    return hashlib.sha256(json.dumps([FORMAT, VERSION, *identity]).encode()).hexdigest()[:24]


def subwords_of(files: Sequence[Text], cache: Path, kind: str, vocab_size: int) -> bytes:
    """The sentencepiece model of all these files, from the cache, or learnt from them."""

    def build(folder: Path) -> None:
        for file in files:
            if not any(map(str.strip, lines_of(file.path))):
                raise ValueError(
                    f"no subwords can be learnt: {file.path} has no text, only blank lines; give it a sentence a line"
                )
        every = -(-sum(file.lines for file in files) // LEARNT)
        texts = (text for file in files for text in islice(lines_of(file.path), 0, None, every) if text.strip())
        (folder / "model").write_bytes(learn(texts, kind, vocab_size))

    key = key_of(*(file.sha256 for file in files), kind, vocab_size)
    return (prepare_folder(cache / "subwords" / key, build) / "model").read_bytes()


class Pairs:
    """Prepared pairs by line number, read-only.

    sizes: for each pair, the subwords of its longer side and </s>.
    empty: the pairs without a word on one or both sides.
    key: identifies the files and their subwords.
    """

    def __init__(self, columns: dict[str, Ragged], empty: np.ndarray, key: str) -> None:
        self.columns, self.empty, self.key = columns, empty, key
        self.sizes = np.maximum(columns["source"].sizes, columns["target"].sizes) + 1

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, rows: Iterable[int]) -> Batch:
        source, target, *texts = (self.columns[name] for name in COLUMNS)
        items = [Item(int(row), *(text[row].tobytes().decode() for text in texts)) for row in rows]
        return batch_of([(item, source[item.number], target[item.number]) for item in items])


def prepare(source: Text, target: Text, cache: Path, subwords: Subwords) -> Pairs:
    """The pairs of two files from the cache, or read and cut into subwords."""
    number_type: Any = np.uint16 if len(subwords) <= 1 << 16 else np.int32

    def build(folder: Path) -> None:
        empty = array("q")
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / f"{name}.values", "wb")) for name in COLUMNS}
            offsets = {name: array("q", [0]) for name in COLUMNS}
            pairs = zip(lines_of(source.path), lines_of(target.path), strict=True)
            for row, texts in enumerate(tqdm(pairs, desc=source.path.name, unit=" pairs", delay=2)):
                if not all(map(str.strip, texts)):
                    empty.append(row)
                numbers = [np.array(subwords.encode(text), number_type) for text in texts]
                characters = [np.frombuffer(text.encode(), np.uint8) for text in texts]
                for name, values in zip(COLUMNS, [*numbers, *characters], strict=True):
                    files[name].write(values.data)
                    offsets[name].append(offsets[name][-1] + len(values))
        for name in COLUMNS:
            (folder / f"{name}.offsets").write_bytes(offsets[name].tobytes())
        (folder / "empty").write_bytes(empty.tobytes())

    key = key_of(source.sha256, target.sha256, hashlib.sha256(subwords.options["model"]).hexdigest())
    place = prepare_folder(cache / "parallel" / key, build)

    def open_array(name: str, kind: Any) -> np.ndarray:
        is_empty = not (place / name).stat().st_size  # an empty file cannot be mapped
        return np.empty(0, kind) if is_empty else np.memmap(place / name, kind, mode="r").view(np.ndarray)

    columns = {}
    for name in COLUMNS:
        kind = np.uint8 if name.endswith("_text") else number_type
        columns[name] = Ragged(open_array(f"{name}.values", kind), open_array(f"{name}.offsets", np.int64))
    return Pairs(columns, open_array("empty", np.int64), place.name)

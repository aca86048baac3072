"""A text as memory-mapped arrays of token numbers, prepared once, and in a stream, from files however packed."""

import codecs
import fnmatch
import hashlib
import itertools
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.download import fetch, fetch_from_hub, find, lock, open_unpacked, require_writable, unpacking
from data.text import lines

UNITS = ("bytes", "characters", "words")
EOS, UNK = "<eos>", "<unk>"  # a line's end, and a word that the vocabulary lacks
FORMAT = 1  # of the prepared folder; a change of what is written in it counts it up
VOCABULARY = "vocabulary.json"
BLOCK = 1 << 15  # bytes read at once; the heap falls to pieces around larger ones, and grows with the text

Piece = np.ndarray | list[bytes]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of text below `root`, or several.

    name: of the file, plain or with .gz, .xz or .zip behind it; with `members`, of a folder or the .tar.gz of one.
    url, sha256, md5: where it is downloaded from when absent, and the checksum of its content (of a .tar.gz: its own).
    hub: keywords of datasets.load_dataset, for a text whose rows on the hub are its lines; see `fetch_from_hub`.
    members: pattern of folder/file below `name`; `shards` is how many there must be. They are read in order of name.
    first_of: another source, whose first `tokens` bytes are this file where the file itself is absent.
    tokens: the published count.
    """

    root: Path
    name: str
    url: str | None = None
    sha256: str | None = None
    md5: str | None = None
    hub: Mapping[str, Any] | None = None
    members: str | None = None
    shards: int | None = None
    first_of: Mapping[str, Any] | None = None
    tokens: int | None = None

    def locate(self, check: bool) -> tuple[Path, int | None]:
        """Where it lies, and how many bytes of that are it (None: all); downloaded if absent, its checksum compared."""
        path = self.root / self.name
        if self.members is not None:
            if path.is_dir():
                return path, None
            path = path.with_name(path.name + ".tar.gz")
        present = find(path)
        if present is None and self.first_of is not None:
            return Source(root=self.root, **self.first_of).locate(check)[0], self.tokens
        if present is None and self.hub is not None:
            fetch_from_hub(path, self.hub)
        if present is None or check:
            present = fetch(path, self.url, self.sha256 or self.md5)
        return present, None

    def identity(self) -> list[Any]:
        """What changes when the content does."""
        path, limit = self.locate(check=False)
        files = self.find_members(path) if path.is_dir() else [path]
        stats = [(file.resolve(), file.stat()) for file in files]
        states = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats]
        return [states, limit, self.members, self.shards, self.tokens]

    def find_members(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(self.members or "*"), key=lambda file: file.name)

    def check(self, sizes: Mapping[str, int], unit: str) -> None:
        """ValueError unless the sizes of its files, in units, are those that are published."""
        path, _ = self.locate(check=False)
        if self.members is not None and len(sizes) != (self.shards or len(sizes) or 1):
            raise ValueError(
                f"{path} holds {len(sizes)} files {self.members}, expected {self.shards or 'some'}: "
                "unpack it whole, or type another data.root=DIR, where the .tar.gz is read as it is"
            )
        total = sum(sizes.values())
        if unit != "characters" and total != (self.tokens or total):  # published are counts of bytes and of words
            raise ValueError(
                f"{path} holds {total} {unit}, expected {self.tokens}: not the published file. Put the right file "
                "there, or type another data.root=DIR to download it to."
            )
        if not total:
            raise ValueError(f"{path} is empty: name a file with text")

    def streams(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Name and blocks of each file, in the order in which they are found."""
        path, limit = self.locate(check=False)
        if path.is_dir():
            for file in self.find_members(path):
                with open(file, "rb") as stream:
                    yield file.name, blocks(stream, file)
        elif self.members is not None:
            with unpacking(path), tarfile.open(path, "r|gz") as archive:
                for member in archive:
                    if member.isfile() and fnmatch.fnmatch(f"/{member.name}", f"*/{self.members}"):
                        yield Path(member.name).name, blocks(archive.extractfile(member), path)  # type: ignore[arg-type]
        else:
            with open_unpacked(path) as stream:
                yield path.name, blocks(stream, path, limit)


def blocks(stream: IO[bytes], path: Path, limit: int | None = None) -> Iterator[bytes]:
    """The first `limit` bytes of a stream (None: all), a block at a time; `path` is named if they are damaged."""
    left = sys.maxsize if limit is None else limit
    while left:
        with unpacking(path):
            block = stream.read(min(BLOCK, left))
        if not block:
            return
        left -= len(block)
        yield block


def pieces(source: Iterable[bytes], unit: str, name: str) -> Iterator[Piece]:
    """The codes of the bytes or characters, or the words, of each block; a line's end is the word <eos>.

    Bytes are as they are; a text has LF at the end of its lines, see data/text/lines.py.
    """
    if unit != "bytes":
        source = lines.with_line_feeds(source, name, "; data.unit=bytes reads any file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, last, first = b"", b"\n", 1
    for block in itertools.chain(source, [b""]):
        if unit == "bytes":
            yield np.frombuffer(block, np.uint8)
            continue
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = lines.line_at(error.object, error.start, first)
            raise lines.not_utf8_error(error, name, line, ", or type data.unit=bytes, which reads any file") from None
        first += block.count(b"\n")
        if unit == "characters":
            yield np.frombuffer(text.encode("utf-32-le"), np.uint32)
            continue
        last = block[-1:] or last
        block = rest + (block or (b"" if last == b"\n" else b"\n"))  # the last line may lack its mark
        cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
        rest = block[cut:]
        yield words_of(block[:cut])


def words_of(text: bytes) -> list[bytes]:
    """What lies between spaces. Other spaces than ASCII's are letters, as for those who count the corpora's words."""
    return text.replace(b"\n", f" {EOS} ".encode()).split()


def ends_of(size: int, valid_bytes: int | None, test_bytes: int | None) -> tuple[int, int]:
    """Where training and validation end in a text of so many units; None is a twentieth."""
    if size < 2:
        raise ValueError(f"the text has {size} of the 2 tokens that it needs at least: name a longer one")
    valid, test = (size // 20 if held_out is None else held_out for held_out in (valid_bytes, test_bytes))
    if size - test - valid < 2:
        raise ValueError(
            f"data.valid_bytes={valid} and data.test_bytes={test} leave nothing of {size} to train on: type less"
        )
    return size - test - valid, size - test


def prepare(
    sources: Mapping[str, Source],
    folder: Path,
    unit: str,
    min_count: int,
    known: list[Any] | None = None,
    held_out: tuple[int | None, int | None] = (None, None),
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """The vocabulary's tokens, and the token numbers of each source in a read-only map; built if they are not there.

    The vocabulary of bytes and characters is all that occur in any source, sorted. That of words is `train`'s words of
    at least `min_count`, the most frequent first, ties in alphabetical order; <unk> is among them if a source has it or
    `min_count` is above 1, and stands for all others. Or it is `known`, of another corpus. Of one text for all splits,
    `train` is what `held_out`, the valid_bytes and test_bytes of `ends_of`, leaves.
    """
    identity: list[Any] = [
        FORMAT + (unit != "bytes"),
        unit,
        min_count,
        {key: source.identity() for key, source in sources.items()},
    ]
    if unit == "words" and "all" in sources:
        identity.append(held_out)
    place = folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    found = open_prepared(place, sources)
    if known is not None and (found is None or found[0] != known):
        identity.append(hashlib.sha256(json.dumps(known).encode()).hexdigest())
        place = folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        found = open_prepared(place, sources)
    if found is None:
        require_writable(folder)
        with lock(place):  # a second process waits here, and then finds what the first has built
            found = open_prepared(place, sources)
            if found is None:
                for source in sources.values():
                    source.locate(check=True)
                scratch = place.with_name(place.name + ".part")
                for leftover in (scratch, place):  # of a process that was killed, or damaged since
                    shutil.rmtree(leftover, ignore_errors=True)
                scratch.mkdir()
                try:
                    build(scratch, sources, unit, min_count, known, held_out)
                    os.rename(scratch, place)
                except BaseException:
                    shutil.rmtree(scratch)
                    raise
                found = open_prepared(place, sources)
    assert found is not None
    return found


def open_prepared(place: Path, keys: Iterable[str]) -> tuple[list[Any], dict[str, np.ndarray]] | None:
    """What a prepared folder holds; None if there is none, or it is not what was written."""
    try:
        checksums = json.loads((place / "checksums.json").read_bytes())
        if {name: checksum(place / name) for name in (*keys, VOCABULARY)} != checksums:
            return None
        tokens = json.loads((place / VOCABULARY).read_bytes())
    except (OSError, ValueError):
        return None
    return tokens, {key: np.memmap(place / key, dtype_of(len(tokens)), "r") for key in keys}


def build(
    place: Path,
    sources: Mapping[str, Source],
    unit: str,
    min_count: int,
    known: list[Any] | None = None,
    held_out: tuple[int | None, int | None] = (None, None),
) -> None:
    """Writes vocabulary and numbers: one pass counts, a second writes, so that only the vocabulary is in memory."""
    counts: Counter[bytes] = Counter()
    seen = np.zeros(sys.maxunicode + 1 if unit == "characters" else 256, bool)
    sizes: dict[str, dict[str, int]] = {}
    for key, source in sources.items():
        sizes[key] = {}
        has_words = unit != "words"
        for name, stream in source.streams():
            sizes[key][name] = 0
            for piece in pieces(stream, unit, name):
                sizes[key][name] += len(piece)
                has_words = has_words or any(word != EOS.encode() for word in piece)
                if isinstance(piece, np.ndarray):
                    seen[piece] = True
                elif key == "train":
                    counts.update(piece)
        source.check(sizes[key], unit)
        if not has_words:
            raise ValueError(f"{source.locate(check=False)[0]} has no words, only blank lines: name a file with text")
    if unit == "words" and "all" in sources:  # how much of it trains is known now
        left, _ = ends_of(sum(sizes["all"].values()), *held_out)
        for name, stream in sources["all"].streams():
            for piece in pieces(stream, unit, name):
                counts.update(piece[: max(left, 0)])
                left -= len(piece)
    tokens: list[Any] = np.flatnonzero(seen).tolist() if unit == "bytes" else list(map(chr, np.flatnonzero(seen)))
    if unit == "words":
        tokens = rank_words(counts, min_count)
    if known is not None:
        unknown = [] if unit == "words" else [token for token in tokens if token not in {*known}]
        if unknown:
            raise ValueError(
                f"the text has {unit} that the checkpoint's vocabulary has not, {', '.join(map(repr, unknown[:5]))}: "
                "name another text, or take them out"
            )
        tokens = known
        seen[:] = False
        seen[[token if unit == "bytes" else ord(token) for token in tokens if unit != "words"]] = True
    dtype = dtype_of(len(tokens))
    codes = (np.cumsum(seen) - 1).astype(dtype)
    words = Numbers((word.encode(), i) for i, word in enumerate(tokens) if unit == "words")
    for key, source in sources.items():
        names = sorted(sizes[key])
        starts = dict(zip(names, itertools.accumulate((sizes[key][name] for name in names), initial=0), strict=False))
        with open(place / key, "wb") as file:
            for name, stream in source.streams():  # an archive has its files in any order
                file.seek(starts[name] * np.dtype(dtype).itemsize)
                for piece in pieces(stream, unit, name):
                    if isinstance(piece, np.ndarray):
                        file.write(codes[piece].tobytes())
                    else:
                        file.write(np.fromiter(map(words.__getitem__, piece), dtype, len(piece)).tobytes())
    (place / VOCABULARY).write_text(json.dumps(tokens, ensure_ascii=False, indent=0), encoding="utf-8")
    checksums = {name: checksum(place / name) for name in (*sources, VOCABULARY)}
    (place / "checksums.json").write_text(json.dumps(checksums))


class Numbers(dict[bytes, int]):
    """The numbers of words; that of <unk> for one that is not there."""

    def __missing__(self, word: bytes) -> int:
        if UNK.encode() not in self:
            raise ValueError(
                f"validation or test holds {word.decode()!r}, which training does not, and there is no {UNK}: "
                "train with data.min_count=2, which makes rare words unknown"
            )
        return self[UNK.encode()]


def rank_words(counts: Counter[bytes], min_count: int) -> list[str]:
    """The words seen often enough, and <unk> for the others, most frequent first, ties in alphabetical order."""
    always = (EOS.encode(), UNK.encode())
    kept = {word: count for word, count in counts.items() if count >= min_count or word in always}
    if min_count > 1:
        kept[always[1]] = counts[always[1]] + counts.total() - sum(kept.values())
    return [word.decode() for word in sorted(kept, key=lambda word: (-kept[word], word))]


def dtype_of(size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """The narrowest type for the numbers of a vocabulary."""
    return np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as stream:
        for block in blocks(stream, path):
            value = zlib.crc32(block, value)
    return value

"""A text as memory-mapped arrays of token numbers, prepared once by streaming over plain or packed files."""

import codecs
import fnmatch
import hashlib
import itertools
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.cache import checksum, open_or_build
from data.download import fetch, fetch_from_hub, find, open_unpacked, unpacking
from data.text import lines

UNITS = ("bytes", "characters", "words")
EOS, UNK = "<eos>", "<unk>"  # the end of a line, and words outside the vocabulary
FORMAT = 1  # version of the prepared folder; increase it when its content changes
VOCABULARY = "vocabulary.json"
BLOCK = 1 << 15  # bytes read at once; larger blocks fragment the heap, which then grows with the text

Piece = np.ndarray | list[bytes]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One or several files of text below `root`.

    name: of the file, plain or with .gz, .xz or .zip appended; with `members`, of a folder or its .tar.gz.
    url, sha256, md5: download address, and the checksum of the unpacked content (of a .tar.gz: of the archive).
    hub: keywords of datasets.load_dataset for a dataset with a row for each line; see `fetch_from_hub`.
    members: pattern of folder/file below `name`; there must be `shards` of them. They are read in order of name.
    first_of: another source; if this file is absent, the first `tokens` bytes of that source are used.
    tokens: the published size.
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
        """The path, and the number of bytes to read (None: all); downloads an absent file, verifies if `check`."""
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
        """Paths, sizes and times, which change with the content."""
        path, limit = self.locate(check=False)
        files = self.find_members(path) if path.is_dir() else [path]
        stats = [(file.resolve(), file.stat()) for file in files]
        states = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats]
        return [states, limit, self.members, self.shards, self.tokens]

    def find_members(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(self.members or "*"), key=lambda file: file.name)

    def check(self, sizes: Mapping[str, int], unit: str) -> None:
        """ValueError unless the number of files and their total size in units are as published."""
        path, _ = self.locate(check=False)
        if self.members is not None and len(sizes) != (self.shards or len(sizes) or 1):
            raise ValueError(
                f"{path} holds {len(sizes)} files {self.members}, expected {self.shards or 'some'}: unpack the whole "
                "archive, or type another data.root=DIR with the .tar.gz, which is read without unpacking"
            )
        total = sum(sizes.values())
        if unit != "characters" and total != (self.tokens or total):  # published sizes are in bytes or words
            raise ValueError(
                f"{path} holds {total} {unit}, expected {self.tokens}: not the published file. Put the right file "
                "there, or type another data.root=DIR to download it to."
            )
        if not total:
            raise ValueError(f"{path} is empty: name a file with text")

    def streams(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Name and blocks of each file, in the order of the folder or archive."""
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
    """The first `limit` bytes of a stream (None: all) in blocks; errors name `path`."""
    left = sys.maxsize if limit is None else limit
    while left:
        with unpacking(path):
            block = stream.read(min(BLOCK, left))
        if not block:
            return
        left -= len(block)
        yield block


def pieces(source: Iterable[bytes], unit: str, name: str) -> Iterator[Piece]:
    """For each block, the codes of its bytes or characters, or its words; the end of a line is the word <eos>.

    Characters and words have lines that end with LF, see data/text/lines.py; bytes are not changed.
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
        block = rest + (block or (b"" if last == b"\n" else b"\n"))  # the last line may lack its LF
        cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
        rest = block[cut:]
        yield words_of(block[:cut])


def words_of(text: bytes) -> list[bytes]:
    """The words between ASCII spaces, as in the published word counts."""
    return text.replace(b"\n", f" {EOS} ".encode()).split()


def ends_of(size: int, valid_bytes: int | None, test_bytes: int | None) -> tuple[int, int]:
    """The ends of training and validation in a text of `size` units; None is a twentieth."""
    if size < 2:
        raise ValueError(f"the text has {size} tokens, at least 2 are needed: name a longer one")
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
    """The vocabulary, and the token numbers of each source in a read-only memory map; built if absent.

    The vocabulary of bytes and characters contains all that occur in any source, sorted. That of words contains the
    words of `train` with at least `min_count` occurrences, most frequent first, ties in alphabetical order. All others
    are <unk>, which exists if a source contains it or `min_count` is above 1. `known` replaces this vocabulary.
    If the source is `all`, `train` is what `held_out`, the valid_bytes and test_bytes of `ends_of`, leaves.
    """
    identity: list[Any] = [
        FORMAT + (unit != "bytes"),
        unit,
        min_count,
        {key: source.identity() for key, source in sources.items()},
    ]
    if unit == "words" and "all" in sources:
        identity.append(held_out)

    def open_prepared(place: Path) -> tuple[list[Any], dict[str, np.ndarray]] | None:
        try:
            checksums = json.loads((place / "checksums.json").read_bytes())
            if {name: checksum(place / name) for name in (*sources, VOCABULARY)} != checksums:
                return None
            tokens = json.loads((place / VOCABULARY).read_bytes())
        except (OSError, ValueError):
            return None
        return tokens, {key: np.memmap(place / key, dtype_of(len(tokens)), "r") for key in sources}

    def place_of(identity: list[Any]) -> Path:
        return folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    if known is not None:
        content = open_prepared(place_of(identity))
        if content is not None and content[0] == known:
            return content
        identity.append(hashlib.sha256(json.dumps(known).encode()).hexdigest())
    return open_or_build(
        place_of(identity), open_prepared, lambda place: build(place, sources, unit, min_count, known, held_out)
    )


def build(
    place: Path,
    sources: Mapping[str, Source],
    unit: str,
    min_count: int,
    known: list[Any] | None = None,
    held_out: tuple[int | None, int | None] = (None, None),
) -> None:
    """Writes vocabulary and numbers. One pass counts and a second writes, so only the vocabulary is in memory."""
    for source in sources.values():
        source.locate(check=True)
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
    if unit == "words" and "all" in sources:  # the size of the training part is known now
        left, _ = ends_of(sum(sizes["all"].values()), *held_out)
        for name, stream in sources["all"].streams():
            for piece in pieces(stream, unit, name):
                counts.update(piece[: max(left, 0)])
                left -= len(piece)
    tokens: list[Any] = np.flatnonzero(seen).tolist() if unit == "bytes" else list(map(chr, np.flatnonzero(seen)))
    if unit == "words":
        tokens = rank_words(counts, min_count)
    if known is not None:
        if unit != "words" and (unknown := [token for token in tokens if token not in {*known}]):
            raise ValueError(
                f"the text has {unit} that the checkpoint's vocabulary has not, {', '.join(map(repr, unknown[:5]))}: "
                "name another text, or remove them"
            )
        tokens = known
        seen[:] = False
        seen[[token if unit == "bytes" else ord(token) for token in tokens if unit != "words"]] = True
    dtype = dtype_of(len(tokens))
    place.mkdir()
    codes = (np.cumsum(seen) - 1).astype(dtype)
    words = Numbers((word.encode(), i) for i, word in enumerate(tokens) if unit == "words")
    for key, source in sources.items():
        names = sorted(sizes[key])
        starts = dict(zip(names, itertools.accumulate((sizes[key][name] for name in names), initial=0), strict=False))
        with open(place / key, "wb") as file:
            for name, stream in source.streams():  # an archive may have its files in any order
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
    """The numbers of words; unknown words have the number of <unk>."""

    def __missing__(self, word: bytes) -> int:
        if UNK.encode() not in self:
            raise ValueError(
                f"validation or test contains {word.decode()!r}, training does not, and there is no {UNK}: train with "
                f"data.min_count=2, which makes rare words {UNK}"
            )
        return self[UNK.encode()]


def rank_words(counts: Counter[bytes], min_count: int) -> list[str]:
    """The words with at least `min_count` occurrences, and <unk>, most frequent first, ties in alphabetical order."""
    always = (EOS.encode(), UNK.encode())
    kept = {word: count for word, count in counts.items() if count >= min_count or word in always}
    if min_count > 1:
        kept[always[1]] = counts[always[1]] + counts.total() - sum(kept.values())
    return [word.decode() for word in sorted(kept, key=lambda word: (-kept[word], word))]


def dtype_of(size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """The narrowest type for token numbers below `size`."""
    return np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32

"""A text as memory-mapped arrays of token numbers, prepared once by streaming over plain or packed files."""

import codecs
import fnmatch
import hashlib
import itertools
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.cache import prepare_folder
from data.download import fetch_source, find, open_unpacked, unpacking
from data.text import lines
from data.text.columns import Numbering

UNITS = {"bytes": np.uint8, "characters": np.uint32, "words": np.uint32}  # the types of their codes
EOS, UNK = "<eos>", "<unk>"  # the end of a line, and words outside the vocabulary
FORMAT = 1  # version of the prepared folder; increase it when its content changes
VOCABULARY = "vocabulary.json"
BLOCK = 1 << 15  # bytes read at once; larger blocks fragment the heap, which then grows with the text
CODES = {"bytes": 256, "characters": sys.maxunicode + 1}  # the number of different ones


@dataclass(frozen=True, kw_only=True)
class Source:
    """One or several files of text below `root`.

    name: of the file, plain or with .gz, .xz or .zip appended; with `members`, of a folder or its .tar.gz.
    url, sha256, md5: download address, and the checksum of the unpacked content (of a .tar.gz: of the archive).
    hub: keywords of datasets.load_dataset for a dataset with a row for each line; see `data.download`.
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
        if present is None or check:
            present = fetch_source(path, vars(self))
        return present, None

    def identity(self) -> list[Any]:
        """Paths, sizes and times, which change with the content."""
        path, limit = self.locate(check=False)
        stats = [(file.resolve(), file.stat()) for file in (self.find_members(path) if path.is_dir() else [path])]
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


def encode(source: Iterable[bytes], unit: str, name: str, numbering: Numbering) -> Iterator[np.ndarray]:
    """For each block, the codes of its bytes, characters, or words by `numbering`; a line ends with the word <eos>.

    Characters and words have lines that end with LF, see data/text/lines.py; bytes are not changed.
    """
    if unit == "bytes":
        yield from (np.frombuffer(block, UNITS[unit]) for block in source)
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, last, first = b"", b"\n", 1
    for block in itertools.chain(lines.with_line_feeds(source, name, "; data.unit=bytes reads any file"), [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = lines.line_at(error.object, error.start, first)
            raise lines.not_utf8_error(error, name, line, ", or type data.unit=bytes, which reads any file") from None
        first += block.count(b"\n")
        if unit == "characters":
            yield np.frombuffer(text.encode("utf-32-le"), UNITS[unit])
            continue
        last = block[-1:] or last
        block = rest + (block or (b"" if last == b"\n" else b"\n"))  # the last line may lack its LF
        cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
        rest = block[cut:]
        words = words_of(block[:cut])
        yield np.fromiter(map(numbering.__getitem__, words), UNITS[unit], len(words))


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
    are <unk>, which exists if `train` contains it or `min_count` is above 1. `known` replaces this vocabulary.
    If the source is `all`, `train` is what `held_out`, the valid_bytes and test_bytes of `ends_of`, leaves.
    """
    identities = {key: source.identity() for key, source in sources.items()}
    identity: list[Any] = [FORMAT + (unit != "bytes"), unit, min_count, identities]
    if unit == "words" and "all" in sources:
        identity.append(held_out)

    def place_of(identity: list[Any]) -> Path:
        return folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    if known is not None and read_vocabulary(place_of(identity)) != known:
        identity.append(hashlib.sha256(json.dumps(known).encode()).hexdigest())
    place = prepare_folder(place_of(identity), lambda place: build(place, sources, unit, min_count, known, held_out))
    tokens = read_vocabulary(place) or []
    return tokens, {key: np.memmap(place / key, dtype_of(len(tokens)), "r") for key in sources}


def read_vocabulary(place: Path) -> list[Any] | None:
    """The tokens of a prepared folder; None if it is absent or damaged."""
    try:
        return json.loads((place / VOCABULARY).read_bytes())
    except (OSError, ValueError):
        return None


def build(
    place: Path,
    sources: Mapping[str, Source],
    unit: str,
    min_count: int,
    known: list[Any] | None,
    held_out: tuple[int | None, int | None],
) -> None:
    """Writes vocabulary and numbers, with only the vocabulary in memory.

    The text is read once, into files of codes: bytes, characters, or words numbered as they occur. Then the codes are
    counted, and replaced by the numbers of the vocabulary.
    """
    for source in sources.values():
        source.locate(check=True)
    numbering = Numbering({EOS.encode(): 0})

    def token_of(code: int) -> Any:
        return code if unit == "bytes" else chr(code) if unit == "characters" else list(numbering)[code].decode()

    texts: dict[str, np.ndarray] = {}
    spans: dict[str, dict[str, slice]] = {}  # the place of each file in the codes of its source
    counts: dict[str, np.ndarray] = {}
    for key, source in sources.items():
        codes = place / f"{key}.codes"
        spans[key] = write_codes(codes, source, unit, numbering)
        source.check({name: span.stop - span.start for name, span in spans[key].items()}, unit)
        texts[key] = np.memmap(codes, UNITS[unit], "r")
        counts[key] = count_codes(texts[key], CODES.get(unit, len(numbering)))
        if unit == "words" and counts[key][0] == len(texts[key]):
            raise ValueError(f"{source.locate(check=False)[0]} has no words, only blank lines: name a file with text")
    if unit == "words":
        if "all" in texts:
            left, _ = ends_of(len(texts["all"]), *held_out)
            counts["train"] = count_codes(texts["all"][:left], len(numbering))
        tokens: list[Any] = known or rank_words(dict(zip(numbering, counts["train"].tolist(), strict=False)), min_count)
        codes_of_tokens = [numbering[token.encode()] for token in tokens]
        occurring = np.arange(len(numbering))
    else:
        occurring = np.flatnonzero(sum(counts.values()))
        tokens = known or list(map(token_of, occurring.tolist()))
        codes_of_tokens = tokens if unit == "bytes" else list(map(ord, tokens))
    numbers = np.full(CODES.get(unit, len(numbering)), tokens.index(UNK) if UNK in tokens else -1)
    numbers[codes_of_tokens] = range(len(tokens))
    if unknown := occurring[numbers[occurring] < 0][:5].tolist():
        names = ", ".join(repr(token_of(code)) for code in unknown)
        owner = "training part" if known is None else "checkpoint"
        advice = f"train with data.min_count=2, which makes rare words {UNK}, " if unit == "words" else ""
        raise ValueError(
            f"the text has {unit} that the {owner}'s vocabulary has not, {names}: {advice}"
            "name another text, or remove them"
        )
    numbers = numbers.astype(dtype_of(len(tokens)))
    for key, text in texts.items():
        with open(place / key, "wb") as file:
            for _, span in sorted(spans[key].items()):  # an archive may have its files in any order
                for i in range(span.start, span.stop, BLOCK):
                    file.write(numbers[text[i : min(i + BLOCK, span.stop)]].tobytes())
        (place / f"{key}.codes").unlink()
    (place / VOCABULARY).write_text(json.dumps(tokens, ensure_ascii=False, indent=0), encoding="utf-8")


def write_codes(path: Path, source: Source, unit: str, numbering: Numbering) -> dict[str, slice]:
    """Writes the codes of a source's files to one file; returns their places in it, by name."""
    spans, end = {}, 0
    with open(path, "wb") as file:
        for name, stream in source.streams():
            start = end
            for codes in encode(stream, unit, name, numbering):
                file.write(codes.tobytes())
                end += len(codes)
            spans[name] = slice(start, end)
    return spans


def count_codes(text: np.ndarray, size: int) -> np.ndarray:
    """The number of occurrences of each code below `size`."""
    counts = np.zeros(size, np.int64)
    for i in range(0, len(text), BLOCK):
        np.add.at(counts, text[i : i + BLOCK], 1)
    return counts


def rank_words(counts: Mapping[bytes, int], min_count: int) -> list[str]:
    """The words with at least `min_count` occurrences, and <unk>, most frequent first, ties in alphabetical order."""
    eos, unk = EOS.encode(), UNK.encode()
    kept = {word: count for word, count in counts.items() if count >= min_count or (count and word in (eos, unk))}
    if min_count > 1:
        kept[unk] = counts.get(unk, 0) + sum(counts.values()) - sum(kept.values())
    return [word.decode() for word in sorted(kept, key=lambda word: (-kept[word], word))]


def dtype_of(size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """The narrowest type for token numbers below `size`."""
    return np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32

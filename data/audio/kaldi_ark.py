"""Kaldi's archives: matrices and vectors by utterance, found through a table (scp) or one behind the other (ark).

What a table or an archive asks to have run is refused: a table's commands, and the pickles that kaldiio would load.
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from data.text import lines

VALUE_BYTES = {"FM": 4, "DM": 8, "CM": 1, "CM2": 2, "CM3": 1}  # of a matrix, compressed or not


class Place(NamedTuple):
    """Where an object lies: a file, and the byte behind its key."""

    path: str
    offset: int


class Head(NamedTuple):
    """What is known of an object before it is read. kind: a key of VALUE_BYTES, `ints` or `text`."""

    kind: str
    rows: int
    columns: int  # 0: a vector
    size: int  # bytes


def read_table(path: Path, copy: str) -> tuple[dict[str, Place], dict[str, int]]:
    """Where a table's objects lie, and of files that are not there how many they would hold.

    A relative file is one below the working directory, as for Kaldi, else one below the table's folder.
    copy: the command of Kaldi that would write them into a plain archive.
    """
    places: dict[str, Place] = {}
    absent: dict[str, int] = {}
    files: dict[str, str | None] = {}
    advice = f"Write a plain archive: {copy} scp:{path} ark,scp:DIR/{path.stem}.ark,DIR/{path.name}"
    for number, line in enumerate(lines_of(path), start=1):
        where = f"{path}, line {number}"
        key, *rest = line.split(maxsplit=1)
        if not rest:
            raise ValueError(f"{where}: {line.strip()!r} is no utterance and a file behind it")
        name = rest[0].strip()
        if "|" in name:
            raise ValueError(f"{where}: {name!r} is a command, and none is run. {advice}")
        if name == "-":
            raise ValueError(f"{where}: standard input is not read. {advice}")
        if name.endswith("]"):
            raise ValueError(f"{where}: parts of a matrix, as {name!r}, are not read. {advice}")
        if key in places:
            raise ValueError(f"{where}: the utterance {key} is there twice; take one of them out")
        found = re.fullmatch(r"(.+):(\d+)", name)
        file, offset = (found[1], int(found[2])) if found else (name, 0)
        if file not in files:
            tried = [Path(file)] if os.path.isabs(file) else [Path(file), path.parent / file]
            files[file] = next((str(each.absolute()) for each in tried if each.is_file()), None)
        known = files[file]
        if known is None:
            absent[file] = absent.get(file, 0) + 1
        else:
            places[key] = Place(known, offset)
    if not places and not absent:
        raise ValueError(f"{path} is empty: there is no utterance in it")
    return places, absent


def lines_of(path: Path) -> list[str]:
    """The lines of a text of Kaldi's that are not empty."""
    try:
        return [line for line in lines.lines_of(lines.decode(path.read_bytes(), path)) if line.strip()]
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error.strerror}") from error


def scan_archive(path: Path) -> dict[str, Place]:
    """Where the objects of an archive lie, which is read from one head to the next."""
    places: dict[str, Place] = {}
    with path.open("rb") as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            file.seek(position)
            key, space, _ = file.read(4096).partition(b" ")
            try:
                name = key.decode() if space else ""
            except UnicodeDecodeError:
                name = ""
            if not name or not name.isprintable():
                raise ValueError(f"{path} is damaged, or no archive: no key stands at byte {position:,}")
            if name in places:
                raise ValueError(f"{path}: the utterance {name} is there twice; take one of them out")
            places[name] = Place(str(path), position + len(key) + 1)
            position = places[name].offset + read_head(places[name], name, file).size
    if not places:
        raise ValueError(f"{path} is empty: there is no utterance in it")
    return places


def read_head(place: Place, key: str, file: BinaryIO | None = None) -> Head:
    """What lies there; ValueError where that is neither a matrix nor whole numbers, or not all of it."""
    if file is None:
        with open(place.path, "rb") as opened:
            return read_head(place, key, opened)
    end = os.fstat(file.fileno()).st_size
    file.seek(place.offset)
    start = file.read(40)
    name, _, rest = start[2:].partition(b" ")
    kind = name.decode("latin-1")
    head = None
    if start[:3] == b"\0B\4" and len(start) >= 7:
        (rows,) = struct.unpack("<i", start[3:7])
        head = Head("ints", rows, 0, 7 + 5 * rows)
    elif start[:2] == b"\0B" and kind in ("FM", "DM") and len(rest) >= 10:
        rows, columns = struct.unpack("<xixi", rest[:10])
        head = Head(kind, rows, columns, 13 + len(name) + VALUE_BYTES[kind] * rows * columns)
    elif start[:2] == b"\0B" and kind in ("CM", "CM2", "CM3") and len(rest) >= 16:
        rows, columns = struct.unpack("<8xii", rest[:16])
        size = VALUE_BYTES[kind] * rows * columns + (8 * columns if kind == "CM" else 0)
        head = Head(kind, rows, columns, 19 + len(name) + size)
    elif re.match(rb" *[\[\d\n-]", start):  # and nothing else: kaldiio's own kinds begin with a word, as PKL
        text, values, is_matrix = read_numbers(place, key, file)
        return Head("text", len(values), len(values[0]) if is_matrix and values else 0, len(text))
    if head is None:
        raise ValueError(
            f"{place.path} is damaged at byte {place.offset:,}, utterance {key}, or no archive of matrices and whole "
            f"numbers: there stands {start[:12]!r}"
        )
    if min(head.rows, head.columns) < 0 or place.offset + head.size > end:
        raise ValueError(
            f"{place.path} is damaged: utterance {key} at byte {place.offset:,} says {head.rows} x {head.columns} "
            f"values, {head.size:,} bytes, and the file ends after {end - place.offset:,}"
        )
    return head


def read_numbers(place: Place, key: str, file: BinaryIO) -> tuple[bytes, list, bool]:
    """An object in text: its bytes, its rows of words or, of a vector, its words, and whether it is a matrix."""
    file.seek(place.offset)
    pieces = [file.readline()]
    is_open = b"[" in pieces[0]
    while is_open and b"]" not in pieces[-1]:
        pieces.append(file.readline())
        if not pieces[-1]:
            raise ValueError(f"{place.path} is damaged: no ] ends the utterance {key} at byte {place.offset:,}")
    text = b"".join(pieces)
    inner = text.partition(b"[")[2].partition(b"]")[0] if is_open else text
    is_matrix = is_open and b"\n" in inner
    return text, [row.split() for row in inner.split(b"\n") if row.split()] if is_matrix else inner.split(), is_matrix


def read_matrix(place: Place, key: str, dtype: type = np.float32) -> np.ndarray:
    """The matrix (T, n) there; ValueError where there is none."""
    from kaldiio.matio import read_matrix_or_vector

    with open(place.path, "rb") as file:
        head = read_head(place, key, file)
        if not head.columns:
            raise ValueError(f"{place.path}: utterance {key} at byte {place.offset:,} is no matrix with columns")
        if head.kind == "text":
            try:
                return np.array(read_numbers(place, key, file)[1], dtype)
            except ValueError as error:
                raise ValueError(f"{place.path} is damaged: utterance {key} is no matrix ({error})") from error
        file.seek(place.offset)
        return np.asarray(read_matrix_or_vector(file), dtype)


def read_ints(place: Place, key: str) -> np.ndarray:
    """The whole numbers (T,) there, int32; ValueError where there are none."""
    with open(place.path, "rb") as file:
        head = read_head(place, key, file)
        if head.kind == "ints":
            file.seek(place.offset + 7)
            # Before each number stands how many bytes it has.
            content = np.frombuffer(file.read(5 * head.rows), np.dtype([("bytes", "i1"), ("value", "<i4")]))
            if (content["bytes"] == 4).all():
                return np.ascontiguousarray(content["value"])
        elif head.kind == "text" and not head.columns:
            words = read_numbers(place, key, file)[1]
            if all(re.fullmatch(rb"-?\d{1,9}", word) for word in words):
                return np.array(words, np.int32)
    raise ValueError(
        f"{place.path}: utterance {key} at byte {place.offset:,} is no vector of whole numbers, one a frame, as "
        "ali-to-pdf writes them"
    )


class Archive:
    """Writes PATH.ark and PATH.scp, which Kaldi reads; neither is there before both are whole, at the end of `with`.

    name: what the table calls the archive; None: by its path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        if path.suffix != ".ark":
            raise ValueError(f"{path} must end in .ark; its table is named as it is, and ends in .scp")
        self.path, self.name = path, name or str(path.absolute())
        self.table = path.with_suffix(".scp")
        self.places: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self.file = self.path.with_name(f".{self.path.name}.tmp").open("wb")
        except OSError as error:
            raise PermissionError(f"{self.path} cannot be written: {error.strerror}") from error
        return self

    def write(self, key: str, array: np.ndarray) -> None:
        """A matrix of float32 or float64, or a vector of int32."""
        from kaldiio.matio import write_array

        self.file.write(f"{key} ".encode())
        self.places[key] = self.file.tell()
        write_array(self.file, array)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.file.close()
        written, table = Path(self.file.name), self.table.with_name(f".{self.table.name}.tmp")
        try:
            if kind is None:
                # Kaldi looks sorted tables through, as LC_ALL=C sorts them.
                lines: Iterator[str] = (f"{key} {self.name}:{self.places[key]}\n" for key in sorted(self.places))
                table.write_text("".join(lines), encoding="utf-8")
                self.table.unlink(missing_ok=True)  # never a table beside the archive of another
                os.replace(written, self.path)
                os.replace(table, self.table)
        finally:
            written.unlink(missing_ok=True)
            table.unlink(missing_ok=True)

"""Read and write Kaldi's archives (ark) and tables (scp) of matrices and vectors by utterance.

Nothing in these files is executed: commands in tables and pickles, which kaldiio would load, are refused.
"""

import contextlib
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
    """The place of an object: a file, the byte after its key, and the key."""

    path: str
    offset: int
    key: str

    def __str__(self) -> str:
        return f"utterance {self.key} at byte {self.offset:,}"


class Head(NamedTuple):
    """The header of an object. kind: a key of VALUE_BYTES, `ints` or `text`."""

    kind: str
    rows: int
    columns: int  # 0: a vector
    size: int  # bytes


def read_table(path: Path, copy: str) -> tuple[dict[str, Place], dict[str, int]]:
    """The places of a table's objects, and the number of objects in each missing file.

    A relative path is below the working directory, as in Kaldi, or else below the table's folder.
    copy: Kaldi's command to write the objects to a plain archive, for error messages.
    """
    places: dict[str, Place] = {}
    absent: dict[str, int] = {}
    files: dict[str, str | None] = {}
    advice = f"Write a plain archive: {copy} scp:{path} ark,scp:DIR/{path.stem}.ark,DIR/{path.name}"
    for number, line in enumerate(lines_of(path), start=1):
        where = f"{path}, line {number}"
        key, *rest = line.split(maxsplit=1)
        if not rest:
            raise ValueError(f"{where}: {line.strip()!r} must be an utterance and a file")
        name = rest[0].strip()
        if "|" in name:
            raise ValueError(f"{where}: {name!r} is a command; commands are not executed. {advice}")
        if name == "-":
            raise ValueError(f"{where}: standard input is not read. {advice}")
        if name.endswith("]"):
            raise ValueError(f"{where}: parts of a matrix, such as {name!r}, are not read. {advice}")
        if key in places:
            raise ValueError(f"{where}: duplicate utterance {key}; remove one")
        match = re.fullmatch(r"(.+):(\d+)", name)
        file, offset = (match[1], int(match[2])) if match else (name, 0)
        if file not in files:
            tried = [Path(file)] if os.path.isabs(file) else [Path(file), path.parent / file]
            files[file] = next((str(each.absolute()) for each in tried if each.is_file()), None)
        known = files[file]
        if known is None:
            absent[file] = absent.get(file, 0) + 1
        else:
            places[key] = Place(known, offset, key)
    if not places and not absent:
        raise ValueError(f"{path} is empty: it has no utterance")
    return places, absent


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file to read it; OSError with what to type if the system refuses."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise OSError(
            f"{path} cannot be read ({error.strerror}): type chmod u+r {path}, or name another folder"
        ) from error


def lines_of(path: Path) -> list[str]:
    """The lines of one of Kaldi's text files, without empty ones."""
    with open_file(path) as file:
        return [line for line in lines.lines_of(lines.decode(file.read(), path)) if line.strip()]


def scan_archive(path: Path) -> dict[str, Place]:
    """The places of an archive's objects, found by their headers."""
    places: dict[str, Place] = {}
    with open_file(path) as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            file.seek(position)
            key, space, _ = file.read(4096).partition(b" ")
            try:
                name = key.decode() if space else ""
            except UnicodeDecodeError:
                name = ""
            if not name or not name.isprintable():
                raise ValueError(f"{path} is damaged, or not an archive: it has no key at byte {position:,}")
            if name in places:
                raise ValueError(f"{path}: duplicate utterance {name}; remove one")
            places[name] = Place(str(path), position + len(key) + 1, name)
            position = places[name].offset + read_head(places[name], file).size
    if not places:
        raise ValueError(f"{path} is empty: it has no utterance")
    return places


def read_head(place: Place, file: BinaryIO | None = None) -> Head:
    """The header at a place; ValueError unless it is a complete matrix or vector of whole numbers."""
    if file is None:
        with open_file(place.path) as own:
            return read_head(place, own)
    end = os.fstat(file.fileno()).st_size
    file.seek(place.offset)
    start = file.read(40)
    name, _, rest = start[2:].partition(b" ")
    kind = name.decode("latin-1") if start[:2] == b"\0B" else ""
    if start[:3] == b"\0B\4" and len(start) >= 7:
        (rows,) = struct.unpack("<i", start[3:7])
        head = Head("ints", rows, 0, 7 + 5 * rows)
    elif kind in ("FM", "DM") and len(rest) >= 10:
        rows, columns = struct.unpack("<xixi", rest[:10])
        head = Head(kind, rows, columns, 13 + len(name) + VALUE_BYTES[kind] * rows * columns)
    elif kind in ("CM", "CM2", "CM3") and len(rest) >= 16:
        rows, columns = struct.unpack("<8xii", rest[:16])
        size = VALUE_BYTES[kind] * rows * columns + (8 * columns if kind == "CM" else 0)
        head = Head(kind, rows, columns, 19 + len(name) + size)
    elif re.match(rb" *[\[\d\n-]", start):  # text; kaldiio's own formats, such as PKL, begin with a word
        values, size = read_text(place, file)
        return Head("text", len(values), values.shape[1] if values.ndim == 2 else 0, size)
    else:
        raise ValueError(
            f"{place.path} is damaged at byte {place.offset:,}, utterance {place.key}, or not an archive of matrices "
            f"and whole numbers: found {start[:12]!r}"
        )
    if min(head.rows, head.columns) < 0 or place.offset + head.size > end:
        raise ValueError(
            f"{place.path} is damaged: {place} says {head.rows} x {head.columns} values, {head.size:,} bytes, and the "
            f"file ends after {end - place.offset:,}"
        )
    return head


def read_text(place: Place, file: BinaryIO) -> tuple[np.ndarray, int]:
    """A vector or matrix in text format, and its length in bytes."""
    file.seek(place.offset)
    text = file.readline()
    while b"[" in text and b"]" not in text:
        if not (line := file.readline()):
            raise ValueError(f"{place.path} is damaged: {place} has no closing ]")
        text += line
    inner = text.partition(b"[")[2].partition(b"]")[0] if b"[" in text else text.strip()
    rows = [row.split() for row in inner.split(b"\n")]
    try:
        return np.array([row for row in rows if row] if len(rows) > 1 else rows[0], np.float64), len(text)
    except ValueError as error:
        raise ValueError(f"{place.path} is damaged: {place} is not a matrix or vector ({error})") from error


def read_matrix(place: Place, dtype: type = np.float32) -> np.ndarray:
    """The matrix (T, n) at a place; ValueError if it is something else."""
    from kaldiio.matio import read_matrix_or_vector

    with open_file(place.path) as file:
        head = read_head(place, file)
        if not head.columns:
            raise ValueError(f"{place.path}: {place} is not a matrix with columns")
        if head.kind == "text":
            return read_text(place, file)[0].astype(dtype)
        file.seek(place.offset)
        return np.asarray(read_matrix_or_vector(file), dtype)


def read_ints(place: Place) -> np.ndarray:
    """The whole numbers (T,) at a place, int32; ValueError if it is something else."""
    with open_file(place.path) as file:
        head = read_head(place, file)
        if head.kind == "ints":
            file.seek(place.offset + 7)
            # Each number is preceded by its size in bytes.
            content = np.frombuffer(file.read(5 * head.rows), np.dtype([("bytes", "i1"), ("value", "<i4")]))
            if (content["bytes"] == 4).all():
                return np.ascontiguousarray(content["value"])
        elif head.kind == "text" and not head.columns:
            values = read_text(place, file)[0]
            if (np.abs(values) < 2**31).all() and (values % 1 == 0).all():
                return values.astype(np.int32)
    raise ValueError(
        f"{place.path}: {place} is not a vector of whole numbers, one for each frame, as written by ali-to-pdf"
    )


class Archive:
    """Writes PATH.ark and PATH.scp for Kaldi; both appear, complete, at the end of `with`.

    name: of the archive in the table; None: its path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        if path.suffix != ".ark":
            raise ValueError(f"{path} must end in .ark; its table has the same name with .scp")
        self.path, self.name = path, name or str(path.absolute())
        self.scratch = path.with_name(f".{path.name}.tmp")
        self.places: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self.file = self.scratch.open("wb")
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
        table = self.path.with_suffix(".scp")
        part = table.with_name(f".{table.name}.tmp")
        try:
            if kind is None:
                # Kaldi expects the order of LC_ALL=C.
                entries = [f"{key} {self.name}:{self.places[key]}\n" for key in sorted(self.places)]
                part.write_text("".join(entries), encoding="utf-8")
                table.unlink(missing_ok=True)  # a table never refers to another archive
                os.replace(self.scratch, self.path)
                os.replace(part, table)
        finally:
            self.scratch.unlink(missing_ok=True)
            part.unlink(missing_ok=True)

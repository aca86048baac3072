"""Prepared data on the disk: one process builds them, the others wait; damaged ones are built again."""

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Content = TypeVar("Content")
CHECKSUMS = "checksums.json"


def open_or_build(
    place: Path, open_prepared: Callable[[Path], Content | None], build: Callable[[Path], None]
) -> Content:
    """The content of a prepared file or folder.

    open_prepared: returns None if nothing is there or it is damaged.
    build: writes to the path that it gets, which is renamed to `place` when it is complete.
    """
    content = open_prepared(place)
    if content is not None:
        return content
    require_writable(place.parent)
    with lock(place):
        content = open_prepared(place)  # another process may have built it meanwhile
        if content is None:
            scratch = place.with_name(place.name + ".part")
            remove(scratch)  # of a process that was killed
            remove(place)
            try:
                build(scratch)
                os.rename(scratch, place)
            except BaseException:
                remove(scratch)
                raise
            content = open_prepared(place)
    assert content is not None
    return content


def prepare_folder(place: Path, build: Callable[[Path], None]) -> Path:
    """The folder with the files that `build` writes into an empty one; their checksums are verified at each call."""

    def write(folder: Path) -> None:
        folder.mkdir()
        build(folder)
        checksums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
        (folder / CHECKSUMS).write_text(json.dumps(checksums))

    def find_whole(folder: Path) -> Path | None:
        try:
            checksums = json.loads((folder / CHECKSUMS).read_bytes())
            is_whole = checksums and checksums == {name: checksum(folder / name) for name in checksums}
        except (OSError, ValueError, TypeError):
            return None
        return folder if is_whole else None

    return open_or_build(place, find_whole, write)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(place: Path, lock_file: Path | None = None) -> Iterator[None]:
    """Lets one process at a time write a file or folder. The lock file is `place`.lock by default.

    The lock of a killed process is free. System errors that name no file, such as a full disk, get the name of `place`.
    """
    with FileLock(lock_file or f"{place}.lock"):
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(place)
            raise


def require_writable(folder: Path) -> None:
    """Creates the folder; PermissionError with what to type if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror or error}): choose another place with "
            "data.root=DIR (corpora) or data.cache=DIR (prepared files), or set SRU_DATA and SRU_CACHE"
        ) from error


def checksum(path: Path) -> int:
    """The CRC-32 of a file, read in small blocks."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 15):
            value = zlib.crc32(block, value)
    return value


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

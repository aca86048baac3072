"""Files that are replaced in one step."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def name_path(path: Path) -> Iterator[None]:
    """Name the file in an error of the system, which says nothing of it where writing fails."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except RuntimeError as error:
        # torch.save hides what the system said behind a complaint of its own.
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a break never leaves half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with atomic_write(path, temporary) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_write(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole, on the disk too; none is left of one that is not."""
    with name_path(path):
        try:
            with temporary.open("wb") as file:
                yield file
                # Else a power cut may leave the new name with no content.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_leftovers(folder: Path) -> None:
    """What a kill has left of files that were being written."""
    for path in (*folder.glob("*.tmp"), *folder.glob("checkpoints/.*.tmp")):
        path.unlink(missing_ok=True)

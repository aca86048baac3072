"""Write files atomically, and name the file in errors of the operating system."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def name_path(path: Path) -> Iterator[None]:
    """Add the path to an OSError of a write, which has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except RuntimeError as error:
        # torch.save replaces the OSError by an error without its cause.
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a crash never leaves half of it."""
    with atomic_write(path, path.with_name(path.name + ".tmp")) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_write(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` once it is complete and on disk; after an error it is removed."""
    with name_path(path):
        try:
            with temporary.open("wb") as file:
                yield file
                # Without this, a power cut may leave the new name with no content.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove the incomplete files of a run that was killed."""
    for path in (*folder.glob("*.tmp"), *folder.glob("checkpoints/.*.tmp")):
        path.unlink(missing_ok=True)

"""Text to and from a terminal, a file or a pipe: UTF-8, whatever the locale says."""

import codecs
import io
import os
import sys
from pathlib import Path


def use_utf8() -> None:
    """Write UTF-8 to a file or a pipe; a terminal keeps its encoding, and shows what that lacks as \\u2026.

    For the start of every command.
    """
    codecs.register_error("escaped", escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test, or whoever else put something else there, sees to it
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors="escaped")


def escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name as they are, and anything else as backslashreplace has it."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return error.object[error.start : error.end].encode(error.encoding, "surrogateescape"), error.end
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def read(name: str) -> bytes:
    """The content of the file that input=NAME names, or of standard input for -."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"input={name} cannot be read: {error.strerror}") from error


def decode_argument(text: str) -> str:
    """A text of the command line, read as UTF-8 where it is that, though the locale says otherwise."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text

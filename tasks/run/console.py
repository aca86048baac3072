"""The words of a command, and text to and from a terminal, a file or a pipe: UTF-8 in any locale."""

import codecs
import io
import os
import sys
from pathlib import Path


def use_utf8() -> None:
    """Write UTF-8 to files and pipes; a terminal keeps its encoding and shows other characters as \\u2026.

    Every command calls this first.
    """
    codecs.register_error("escaped", escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have replaced it
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors="escaped")


def escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of file names unchanged, and other characters as `backslashreplace` writes them."""
    assert isinstance(error, UnicodeEncodeError)
    try:
        return error.object[error.start : error.end].encode(error.encoding, "surrogateescape"), error.end
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def read(name: str) -> bytes:
    """The content of the file in input=NAME, or of standard input for -."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"input={name} cannot be read: {error.strerror}") from error


def decode_argument(text: str) -> str:
    """A text of the command line as UTF-8, if it is valid UTF-8, in any locale."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def options_of_checkpoint(words: list[str], example: str) -> dict[str, str]:
    """The options of a command that needs checkpoint=; ValueError unless each word is KEY=VALUE with a new key."""
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name in options:
            raise ValueError(f"{word!r}: expected KEY=VALUE, each key once; type for example {example}")
        options[name] = value
    if not options.get("checkpoint"):
        raise ValueError("checkpoint is missing; type checkpoint=FOLDER, the folder of a run below runs/")
    return options

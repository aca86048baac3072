"""Decode text files: wrong encodings, byte order marks, and the line ends of Windows and old Macs.

A line ends with LF or CRLF, or with CR in a file without LF, as on old Macs. No other character ends a line, unlike in
str.splitlines.
"""

import codecs
import itertools
from collections.abc import Iterable, Iterator

MARK = codecs.BOM_UTF8
OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, which begins with the same bytes
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
HEAD = 1 << 16  # if so many bytes of a stream have no LF, its lines end with CR


def strip_byte_order_mark(content: bytes, name: object) -> bytes:
    """The content without UTF-8's byte order mark; ValueError for the mark of another encoding."""
    if other := next((encoding for mark, encoding in OTHERS.items() if content.startswith(mark)), None):
        raise ValueError(
            f"{name} is in {other}, not in UTF-8: type `iconv -f {other} -t UTF-8 FILE > NEW`, and name the new file"
        )
    return content.removeprefix(MARK)


def line_at(content: bytes, place: int, first: int) -> int:
    """The line number of the byte at `place`, if the content begins with line `first`."""
    return content.count(b"\n", 0, place) + first


def refuse_nul(content: bytes, name: object, first: int = 1, advice: str = "") -> None:
    """ValueError with the line of the first NUL byte, if there is one."""
    if (place := content.find(b"\0")) >= 0:
        raise ValueError(
            f"{name}:{line_at(content, place, first)}: the text contains a NUL byte: if the file is in UTF-16, type "
            f"`iconv -f UTF-16LE -t UTF-8 FILE > NEW`, and name the new file{advice}"
        )


def not_utf8_error(error: UnicodeDecodeError, name: object, line: int, advice: str = "") -> ValueError:
    """The error for a byte that is not UTF-8, with its line."""
    return ValueError(
        f"{name}:{line}: byte {error.object[error.start]:#04x} is not UTF-8 ({error.reason}): convert the file, "
        f"for example by `iconv -f latin1 -t utf-8 FILE > NEW` if it is in latin1, and name the new file{advice}"
    )


def decode(content: bytes, name: object, first: int = 1) -> str:
    """The text of a file from line `first` on; ValueError with the line of a byte that is not UTF-8, or NUL."""
    content = strip_byte_order_mark(content, name) if first == 1 else content
    refuse_nul(content, name, first)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise not_utf8_error(error, name, line_at(content, error.start, first)) from None


def lines_of(text: str) -> list[str]:
    """The lines of a text without their ends; an empty text has none.

    Byte order marks at the start of lines are removed too; they occur if files with marks were concatenated.
    """
    end = "\n" if "\n" in text else "\r"
    lines = text.removesuffix(end).split(end) if text else []
    return [line.removesuffix("\r").removeprefix("\ufeff") for line in lines]


def with_line_feeds(blocks: Iterable[bytes], name: object, advice: str) -> Iterator[bytes]:
    """The blocks of a text without byte order mark and with LF at the end of lines; ValueError for a NUL."""
    head, first, is_begun, is_mac = b"", 1, False, False
    for block in itertools.chain(blocks, [b""]):
        head += block
        if not is_begun:
            if block and b"\n" not in head and len(head) < HEAD:
                continue
            head, is_begun, is_mac = strip_byte_order_mark(head, name), True, b"\n" not in head
        refuse_nul(head, name, first, advice)
        first += head.count(b"\n")
        held = b"\r" if block and head.endswith(b"\r") else b""  # perhaps the first half of CRLF
        ready = head.removesuffix(held).replace(b"\r\n", b"\n")
        head = held
        if ready:
            yield ready.replace(b"\r", b"\n") if is_mac else ready

"""Find, download and check the files of a corpus."""

import contextlib
import gzip
import hashlib
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import requests
from tqdm import tqdm

from data.cache import lock, open_or_build, require_writable


def open_member(path: Path, mode: str) -> IO[bytes]:
    """Opens the only file of a .zip, or the one with the archive's name."""
    with zipfile.ZipFile(path) as archive:
        own = path.name.partition(".zip")[0]
        files = [name for name in archive.namelist() if not name.endswith("/")]
        chosen = [name for name in files if len(files) == 1 or name.rpartition("/")[2] == own]
        if len(chosen) != 1:
            raise ValueError(f"{path} holds {len(files)} files ({', '.join(files[:5])}): unpack the one you want")
        return archive.open(chosen[0])


NO_NETWORK = (
    "No network is needed by data=pydoc, with task=lm by data=pydoc_text, with task=squad by data=squad_sample, "
    "with task=translation by data=translation_sample, with task=speech by data=speech_sample, and with task=image by "
    "data=digits."
)
Content = Callable[[Iterable[Mapping[str, Any]]], Iterator[bytes]]  # the lines of a file from the rows of a dataset
Found = TypeVar("Found")
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zip": open_member}


def find(path: Path) -> Path | None:
    """The first of `path`, `path`.gz, `path`.xz and `path`.zip that exists, or None."""
    return next((p for p in (path.parent / f"{path.name}{suffix}" for suffix in OPENERS) if p.is_file()), None)


def find_below(folder: Path, option: str, name: str, advice: str, find: Callable[[Path], Found | None]) -> Found:
    """What `find` finds at `folder`/`name` or at `name`; FileNotFoundError with `advice` if there is neither."""
    for path in (folder / Path(name).expanduser(), Path(name).expanduser()):
        if present := find(path):
            return present
    raise FileNotFoundError(f"data.{option}={name} is neither in {folder} nor here; {advice}")


def own_file(option: str, name: Any) -> Path:
    """The path of the user's file that data.OPTION names; FileNotFoundError if it exists neither plain nor packed."""
    path = Path(str(name)).expanduser().absolute()
    if not path.name or find(path) is None:
        raise FileNotFoundError(
            f"data.{option}={name} is not a file: type data.{option}=FILE, plain or .gz, .xz or .zip"
        )
    return path


def open_unpacked(path: Path) -> IO[bytes]:
    """Opens a plain, .gz, .xz or .zip file; ValueError if the packed file is damaged."""
    with unpacking(path):
        return OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[operator]


def read_bytes(path: Path) -> bytes:
    """The unpacked content of a file; ValueError if the packed file is damaged."""
    with open_unpacked(path) as file, unpacking(path):
        return file.read()


@contextlib.contextmanager
def unpacking(path: Path):
    """Turns the errors that a damaged archive can raise into a ValueError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): replace it with a complete file; another data.root=DIR downloads it again"
        ) from error


def wikitext_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The lines of WikiText from its rows on the hub; a row without text is the line " "."""
    return ((row["text"] or " \n").encode() for row in rows)


def fetch_source(path: Path, source: Mapping[str, Any], content: Content = wikitext_lines) -> Path:
    """`fetch` by the url and the sha256 or md5 of a source, or `fetch_from_hub` by its `hub`."""
    if source.get("hub") and find(path) is None:
        fetch_from_hub(path, source["hub"], content)
    return fetch(path, source.get("url"), source.get("sha256") or source.get("md5"))


def fetch(path: Path, url: str | None = None, checksum: str | None = None) -> Path:
    """The file at `path` (or packed: `path`.gz, .xz or .zip), downloaded from `url` if absent, its checksum verified.

    checksum: sha256 or md5 of the unpacked bytes, distinguished by length. If None, the sha256 of the first download is
    written to `path`.sha256 and later calls verify it. Existing files are never deleted. A download gets its name, with
    the suffix of `url` if it is packed, after its checksum is verified.

    FileNotFoundError: absent and no url. ValueError: wrong checksum. ConnectionError: no network, or refused by the
    server. PermissionError: the folder is not writable.
    """
    present = find(path)
    if present is None:
        if url is None:
            raise FileNotFoundError(f"{path} is missing and has no address to download it from: put it there")
        require_writable(path.parent)
        with lock(path, path.with_name(f".{path.name}.lock")):
            present = find(path)  # another process may have downloaded it meanwhile
            if present is None:
                packing = next((suffix for suffix in OPENERS if suffix and url.endswith(suffix)), "")
                packing = "" if path.name.endswith(packing) else packing
                return download(path, packing, url, checksum or read_checksum(path))
    expected = checksum or read_checksum(path)
    if expected:
        found = digest(present, present.name.removeprefix(path.name), kind_of(expected))
        if found != expected:
            raise ValueError(
                f"{present} is not the right file: its {kind_of(expected)} (unpacked) is {found}, expected {expected}. "
                "Put the right file there, or type another data.root=DIR to download it to."
            )
    return present


def kind_of(checksum: str) -> str:
    """The algorithm of a checksum."""
    return "md5" if len(checksum) == 32 else "sha256"


def digest(file: Path, packing: str, kind: str) -> str:
    """The checksum of a file's unpacked content; `packing` is .gz, .xz, .zip or empty."""
    with unpacking(file), OPENERS[packing](file, "rb") as content:  # type: ignore[operator]
        return hashlib.file_digest(content, kind).hexdigest()


def read_checksum(path: Path) -> str | None:
    """The checksum that the first download wrote beside the file, if any."""
    record = path.with_name(path.name + ".sha256")
    if not record.is_file():
        return None
    digest = record.read_bytes().decode("ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{record} is damaged: it holds no sha256; type another data.root=DIR to download the file to")
    return digest


def download(path: Path, packing: str, url: str, checksum: str | None) -> Path:
    """Downloads `url` to `path` + `packing`. A broken transfer stays in .part, and the next call continues it."""
    target = path.with_name(path.name + packing)
    part = target.with_name(target.name + ".part")
    try:
        transfer(url, part)
    except requests.RequestException as error:
        # The innermost reason; requests wraps it in four layers of class names.
        reason = re.split(r": |\] |, '", str(error))[-1].strip("()'\" ")
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            reason = "the connection broke off"
        if error.response is not None:
            reason = f"the server answers {error.response.status_code} {error.response.reason}"
        raise ConnectionError(
            f"cannot download {url} to {path}: {reason}. Run the same command again (the download continues), "
            f"or put the file there by hand. {NO_NETWORK}"
        ) from error
    found = None
    with contextlib.suppress(ValueError):  # a damaged archive
        found = digest(part, packing, kind_of(checksum or ""))
    if found is None or found != (checksum or found):
        part.unlink()
        raise ValueError(
            f"the download of {path} was not the right file and is deleted: expected "
            f"{checksum or 'a complete archive'}, got {found or 'a damaged archive'}. It came from {url}. Run the same "
            f"command again; if that fails too, the file at this address has changed: put the right one at {path}."
        )
    if checksum is None:
        path.with_name(path.name + ".sha256").write_text(found + "\n")
    os.replace(part, target)
    return target


def transfer(url: str, part: Path) -> None:
    """Downloads the rest of `url` into `part`; retries while each attempt adds bytes."""
    while True:
        start = before = part.stat().st_size if part.is_file() else 0
        # A range of a compressed transfer would not be a range of the file.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                if start and response.status_code == 416:  # .part is longer than the file: from another version
                    part.unlink()
                    continue
                response.raise_for_status()
                if response.status_code != 206:  # the server ignored the range and sends the whole file
                    start = 0
                size = response.headers.get("Content-Length")
                total = None if size is None else int(size) + start
                with (
                    open(part, "ab" if start else "wb") as file,
                    tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, delay=1) as bar,
                ):
                    for block in response.iter_content(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            return
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.Timeout):
            if not part.is_file() or part.stat().st_size <= before:
                raise


def load_from_hub(rows: Mapping[str, Any], advice: str = "") -> Any:
    """datasets.load_dataset(**rows); ConnectionError with `advice` if it fails."""
    from datasets import load_dataset

    try:
        return load_dataset(**rows)
    except Exception as error:  # the hub's client passes on the errors of all its layers
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"cannot get {' '.join(map(str, rows.values()))} from the hub: {reason}. "
            f"Run the same command again{advice}. {NO_NETWORK}"
        ) from error


def fetch_from_hub(path: Path, rows: Mapping[str, Any], content: Content) -> None:
    """Writes `content(rows)` of a dataset on the hub to `path`, if absent; `rows` are keywords of load_dataset."""
    require_writable(path.parent)
    with lock(path, path.with_name(f".{path.name}.lock")):
        if find(path) is not None:
            return
        dataset = load_from_hub(rows, f", or put the file at {path} by hand")
        part = path.with_name(path.name + ".part")
        try:
            with open(part, "wb") as file:
                file.writelines(content(dataset))
        except KeyError as error:
            part.unlink()
            raise ValueError(f"the rows of {' '.join(map(str, rows.values()))} on the hub have no {error}") from error
        os.replace(part, path)


def unpack_archive(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> Path:
    """The folder with those files of a tar archive that end in `suffixes`, unpacked once; ValueError if damaged."""

    def build(scratch: Path) -> None:
        scratch.mkdir()
        with open_unpacked(archive) as file, unpacking(archive), tarfile.open(fileobj=file, mode="r|") as content:
            for member in content:
                if member.isfile() and member.name.endswith(suffixes):
                    content.extract(member, scratch, filter="data")

    return open_or_build(folder, lambda folder: folder if folder.is_dir() else None, build)

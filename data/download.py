"""Find, download and check the files of a corpus."""

import contextlib
import gzip
import hashlib
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pooch
import requests
from filelock import FileLock
from tqdm import tqdm


def open_member(path: Path, mode: str) -> IO[bytes]:
    """The file in a .zip that holds one, or that of the archive's name."""
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
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zip": open_member}


def find(path: Path) -> Path | None:
    """`path`, `path`.gz, `path`.xz or `path`.zip, whichever is there; None if none is."""
    return next((p for p in (path.with_name(path.name + suffix) for suffix in OPENERS) if p.is_file()), None)


def own_file(option: str, name: Any) -> Path:
    """The path of a person's own file, plain or packed, that data.OPTION names; FileNotFoundError if there is none."""
    path = Path(str(name)).expanduser().absolute()
    if not path.name or find(path) is None:
        raise FileNotFoundError(f"data.{option}={name} is no file: type data.{option}=FILE, plain or .gz, .xz or .zip")
    return path


def open_unpacked(path: Path) -> IO[bytes]:
    """The unpacked bytes of a plain, .gz, .xz or .zip file; ValueError if the packed file is damaged."""
    with unpacking(path):
        return OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[operator]


def read_bytes(path: Path) -> bytes:
    """All unpacked bytes of a file; ValueError if the packed file is damaged."""
    with open_unpacked(path) as file, unpacking(path):
        return file.read()


@contextlib.contextmanager
def unpacking(path: Path):
    """Turns the many errors of a damaged archive into one ValueError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put a whole one there; another data.root=DIR downloads a corpus anew"
        ) from error


def fetch(path: Path, url: str | None = None, checksum: str | None = None) -> Path:
    """The file at `path` (or packed: `path`.gz, .xz or .zip), downloaded from `url` if absent, its checksum verified.

    checksum: sha256 or md5 of the unpacked bytes, told by its length. If None, the sha256 of the first download is
    written to `path`.sha256 and holds from then on. A file that was there before is never deleted; a download takes
    its name, to which the packing of `url` is appended, only after the check.

    FileNotFoundError: absent and no url. ValueError: wrong checksum. ConnectionError: no network, or the
    server refuses. PermissionError: the folder cannot be written.
    """
    present = find(path)
    if present is None:
        if url is None:
            raise FileNotFoundError(f"{path} is missing and has no address to download it from: put it there")
        require_writable(path.parent)
        with lock(path, path.with_name(f".{path.name}.lock")):  # a second process waits here, and then finds the file
            present = find(path)
            if present is None:
                packing = next((suffix for suffix in OPENERS if suffix and url.endswith(suffix)), "")
                packing = "" if path.name.endswith(packing) else packing
                return download(path, packing, url, checksum or recorded_checksum(path))
    expected = checksum or recorded_checksum(path)
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
    """The checksum of a file's content, of which `packing` is .gz, .xz, .zip or nothing."""
    with unpacking(file), OPENERS[packing](file, "rb") as content:  # type: ignore[operator]
        return hashlib.file_digest(content, kind).hexdigest()


def recorded_checksum(path: Path) -> str | None:
    """The checksum that the first download left beside the file, if any."""
    record = path.with_name(path.name + ".sha256")
    if not record.is_file():
        return None
    digest = record.read_bytes().decode("ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(
            f"{record} holds no checksum, as a download wrote: type another data.root=DIR to download the file to"
        )
    return digest


@contextlib.contextmanager
def lock(place: Path, lock: Path | None = None) -> Iterator[None]:
    """One process at a time makes a file or folder, which an error of the system names: a full disk's does not.

    The lock is `place`.lock, or `lock`; that of a process that was killed is free.
    """
    with FileLock(lock or f"{place}.lock"):
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(place)
            raise


def require_writable(folder: Path) -> None:
    """Creates the folder; PermissionError with what to type if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror or error}): choose another place with "
            "data.root=DIR (corpora) or data.cache=DIR (prepared files), or set SRU_DATA and SRU_CACHE"
        ) from error


def download(path: Path, packing: str, url: str, checksum: str | None) -> Path:
    """Downloads `url` to `path` + `packing`; what a broken transfer leaves in .part is where the next call goes on."""
    target = path.with_name(path.name + packing)
    part = target.with_name(target.name + ".part")

    def downloader(url: str, output_file: str, _pooch: object) -> None:
        transfer(url, part)
        found = None
        with contextlib.suppress(ValueError):
            found = digest(part, packing, kind_of(checksum or ""))
        if found is None or found != (checksum or found):
            part.unlink()
            raise ValueError(
                f"{path} was not the right file: expected {checksum or 'one that is whole'}, "
                f"got {found or 'a damaged archive'}; it is deleted."
            )
        if checksum is None:
            path.with_name(path.name + ".sha256").write_text(found + "\n")
        os.replace(part, output_file)

    pooch.get_logger().setLevel("WARNING")  # at INFO it prints checksums to be pasted into code
    try:
        pooch.retrieve(url, None, fname=target.name, path=path.parent, downloader=downloader)
    except requests.RequestException as error:
        # The innermost reason: requests wraps it in four layers of class names.
        reason = re.split(r": |\] |, '", str(error))[-1].strip("()'\" ")
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            reason = "the connection broke off"
        if error.response is not None:
            reason = f"the server answers {error.response.status_code} {error.response.reason}"
        raise ConnectionError(
            f"cannot download {url} to {path}: {reason}. Run the same command again (it goes on where it stopped), "
            f"or put the file there by hand. {NO_NETWORK}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{error} It came from {url}. Run the same command again; if that does not help, the file has changed at "
            f"its source: put the right one at {path}."
        ) from error
    return target


def transfer(url: str, part: Path) -> None:
    """Appends to `part` what is missing of `url`. A break is retried for as long as each attempt brings new bytes."""
    while True:
        start = before = part.stat().st_size if part.is_file() else 0
        # Identity: a range of a compressed transfer would not be a range of the file.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                if (
                    start and response.status_code == 416
                ):  # the part is longer than the file: it belongs to another version
                    part.unlink()
                    continue
                response.raise_for_status()
                if response.status_code != 206:  # the server sends the whole file, asked for a range or not
                    start = 0
                total = (
                    int(response.headers["Content-Length"]) + start if "Content-Length" in response.headers else None
                )
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


def lines_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """As WikiText lies on the hub: a row is a line with its mark, but a line of one space is a row without text."""
    return ((row["text"] or " \n").encode() for row in rows)


def fetch_from_hub(
    path: Path,
    rows: Mapping[str, Any],
    content: Callable[[Iterable[Mapping[str, Any]]], Iterator[bytes]] = lines_of,
) -> Path:
    """Writes to `path` what `content` makes of a dataset's rows; `rows` are keywords of `datasets.load_dataset`."""
    require_writable(path.parent)
    with lock(path, path.with_name(f".{path.name}.lock")):
        if find(path) is not None:
            return path
        from datasets import load_dataset

        try:
            dataset = load_dataset(**rows)
        except Exception as error:  # the hub's client raises what its layers raise
            reason = str(error).partition("\n")[0]
            raise ConnectionError(
                f"cannot get {' '.join(map(str, rows.values()))} from the hub for {path}: {reason}. "
                f"Run the same command again, or put the file there by hand. {NO_NETWORK}"
            ) from error
        part = path.with_name(path.name + ".part")
        try:
            with open(part, "wb") as file:
                file.writelines(content(dataset))
        except KeyError as error:
            part.unlink()
            raise ValueError(f"the rows of {' '.join(map(str, rows.values()))} on the hub have no {error}") from error
        os.replace(part, path)
    return path


def unpack_archive(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> Path:
    """The folder with those files of a tar archive whose names end so, unpacked once; ValueError if it is damaged."""
    if folder.is_dir():
        return folder
    require_writable(folder.parent)
    with lock(folder):  # a second process waits here, and then finds what the first has unpacked
        if not folder.is_dir():
            scratch = folder.with_name(folder.name + ".part")
            shutil.rmtree(scratch, ignore_errors=True)
            with open_unpacked(archive) as file, unpacking(archive), tarfile.open(fileobj=file, mode="r|") as content:
                for member in content:
                    if member.isfile() and member.name.endswith(suffixes):
                        content.extract(member, scratch, filter="data")
            scratch.mkdir(exist_ok=True)
            os.rename(scratch, folder)
    return folder

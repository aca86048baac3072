"""The features of utterances as an Arrow table in a memory map, computed once, on all cores."""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from data.audio import Damaged, Frontend, read, resampled
from data.fetch import require_writable

log = logging.getLogger(__name__)

FORMAT = 1  # of what is kept in the cache; a change of what is written counts it up
SHOWN = 3  # files of each fault that are named
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("features", pa.large_binary())])
GROUP = 64  # utterances of a record batch


class Utterance(NamedTuple):
    """What is said in a file, or in some, one behind the other."""

    id: str
    files: tuple[Path, ...]
    text: str
    speaker: str
    speed: float = 1.0  # 1.1 is heard faster, and higher
    gain: float = 0.0  # in dB
    noise: float | None = None  # white, in dB below the sound; None: without


class Recorded:
    """Utterances with their features, read-only: id, text, and frames (T, num_mels) float16; `sizes` are their T.

    report: of damaged files, those resampled, and others, for the log. mean, deviation: (num_mels,), of all frames.
    """

    def __init__(self, table: pa.Table, meta: dict[str, Any]) -> None:
        self.batches = table.to_batches()
        self.starts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        self.report, self.num_mels = meta["report"], meta["num_mels"]
        self.mean, self.deviation = (np.array(meta[name], np.float32) for name in ("mean", "deviation"))
        offsets = [batch.column(2).buffers()[1] for batch in self.batches]
        bytes_of = [
            np.diff(np.frombuffer(found, np.int64)[: len(b) + 1])
            for found, b in zip(offsets, self.batches, strict=True)
        ]
        self.sizes = np.concatenate([np.zeros(0, np.int64), *bytes_of]) // (2 * self.num_mels)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> tuple[str, str, np.ndarray]:
        place = int(np.searchsorted(self.starts, i, side="right")) - 1
        name, text, features = (column[i - self.starts[place]] for column in self.batches[place].columns)
        frames = np.frombuffer(features.as_buffer(), np.float16).reshape(-1, self.num_mels)
        return name.as_py(), text.as_py(), frames

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch.column(1).to_pylist()]

    @property
    def checksum(self) -> str:
        """Of the recordings' names, texts and lengths."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for batch in self.batches:
            digest.update(json.dumps([batch.column(i).to_pylist() for i in (0, 1)]).encode())
        return digest.hexdigest()


def identity_of(utterances: Sequence[Utterance], frontend: Frontend) -> str:
    """What the features depend on: a file counts as another one when its size or its time of change is."""
    versions = [version(package) for package in ("kaldi-native-fbank", "soxr")]
    digest = hashlib.sha256(json.dumps([FORMAT, versions, frontend.rate, frontend.num_mels]).encode())
    seen: dict[Path, tuple[int, int]] = {}
    for utterance in utterances:
        for path in utterance.files:
            if path not in seen:
                found = path.stat() if path.exists() else None
                seen[path] = (found.st_size, found.st_mtime_ns) if found else (-1, -1)
        files = [(str(path), *seen[path]) for path in utterance.files]
        digest.update(
            json.dumps([utterance.id, utterance.text, utterance.speed, utterance.gain, utterance.noise, files]).encode()
        )
    return digest.hexdigest()[:24]


def prepared(utterances: Sequence[Utterance], frontend: Frontend, cache: Path, name: str) -> Recorded:
    """The utterances with their features, from the cache or computed; those with a damaged file are left out.

    ValueError if nothing is left.
    """
    place = cache / "speech" / identity_of(utterances, frontend)
    found = opened(place)
    if found is None:
        require_writable(place.parent)
        with FileLock(f"{place}.lock"):  # a second process waits here, and then finds what the first has built
            found = opened(place)
            if found is None:
                scratch = place.with_name(place.name + ".part")
                for leftover in (scratch, place):  # of a process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                scratch.mkdir()
                write(utterances, frontend, scratch, name)
                os.rename(scratch, place)
                found = opened(place)
    assert found is not None
    for line in found.report:
        log.warning("%s: %s", name, line)
    if not len(found):
        raise ValueError(f"data.{name}: none of {len(utterances)} recordings can be used: {'; '.join(found.report)}")
    return found


def opened(place: Path) -> Recorded | None:
    """What a prepared folder holds; None if there is none, or it is not whole."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        if (place / "features.arrow").stat().st_size != meta["bytes"]:
            return None
        return Recorded(pa.ipc.open_stream(pa.memory_map(str(place / "features.arrow"))).read_all(), meta)
    except (OSError, ValueError, KeyError):
        return None


def write(utterances: Sequence[Utterance], frontend: Frontend, folder: Path, name: str) -> None:
    """Compute and write the features of utterances, and what was found of them."""
    damaged: list[str] = []
    short: list[str] = []
    rates: dict[int, int] = {}
    stereo = frames_seen = 0
    sums, squares = np.zeros(frontend.num_mels), np.zeros(frontend.num_mels)
    with (
        ThreadPoolExecutor(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ) as pool,
        pa.OSFile(str(folder / "features.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
        tqdm(total=len(utterances), desc=f"features of {name}", unit=" utterances", delay=2, disable=None) as bar,
    ):
        for group in grouped(utterances, GROUP):
            rows: list[tuple[str, str, bytes]] = []
            for utterance, (features, found) in zip(
                group, pool.map(lambda utterance: features_of(utterance, frontend), group), strict=True
            ):
                for rate, channels in found:
                    stereo += channels > 1
                    if rate != frontend.rate:
                        rates[rate] = rates.get(rate, 0) + 1
                if isinstance(features, Damaged):
                    damaged.append(str(features))
                elif not len(features):
                    short.append(str(utterance.files[0]))
                else:
                    sums += features.sum(0, dtype=np.float64)
                    squares += np.square(features, dtype=np.float64).sum(0)
                    frames_seen += len(features)
                    rows.append((utterance.id, utterance.text, features.astype(np.float16).tobytes()))
            if rows:
                arrays = [
                    pa.array(column, kind.type) for column, kind in zip(zip(*rows, strict=True), SCHEMA, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            bar.update(len(group))
    mean = sums / max(1, frames_seen)
    deviation = np.sqrt(np.maximum(squares / max(1, frames_seen) - mean**2, 1e-4))
    report = [
        line
        for count, line in (
            (len(damaged), f"{len(damaged)} left out, damaged: {'; '.join(damaged[:SHOWN])}"),
            (len(short), f"{len(short)} left out, shorter than a frame of 25 ms: {', '.join(short[:SHOWN])}"),
            (len(rates), f"resampled to {frontend.rate} Hz: {', '.join(f'{n} of {r} Hz' for r, n in rates.items())}"),
            (stereo, f"{stereo} of several channels, of which the mean is taken"),
        )
        if count
    ]
    meta = {
        "report": report,
        "num_mels": frontend.num_mels,
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "bytes": (folder / "features.arrow").stat().st_size,
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def features_of(utterance: Utterance, frontend: Frontend) -> tuple[np.ndarray | Damaged, list[tuple[int, int]]]:
    """Frames (T, num_mels), or what is wrong with a file; and rate and channels of each file."""
    waves, found = [], []
    try:
        for path in utterance.files:
            wave, rate, channels = read(path)
            found.append((rate, channels))
            waves.append(resampled(wave, round(rate * utterance.speed), frontend.rate))
    except Damaged as error:
        return error, found
    wave = np.concatenate(waves)
    if utterance.noise is not None:
        generator = np.random.default_rng(zlib.crc32(f"{utterance.id} {utterance.speed}".encode()))
        loudness = np.sqrt(np.square(wave).mean()) * 10 ** (-utterance.noise / 20)
        wave = wave + (loudness * generator.normal(size=len(wave))).astype(np.float32)
    return frontend.frames(wave * np.float32(10 ** (utterance.gain / 20))), found

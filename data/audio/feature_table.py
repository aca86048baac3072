"""The features of utterances as an Arrow table in a memory map, computed once, on all cores."""

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data.audio.fbank import WHOLE, Damaged, Frontend, Part, read, resample
from data.download import lock, require_writable

log = logging.getLogger(__name__)

FORMAT = 2  # of what is kept in the cache; a change of what is written counts it up
SHOWN = 3  # files of each fault that are named
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("features", pa.large_binary())])
GROUP = 64  # utterances of a record batch
PERTURBATION_SEED = 1234  # a run's own seed never changes a recording
PART = 4096  # utterances of a folder of the cache


class Utterance(NamedTuple):
    """What is said in a file or in a part of it, or in several files, one behind the other."""

    id: str
    files: tuple[Path, ...]
    text: str
    speaker: str
    speed: float = 1.0  # 1.1 is heard faster, and higher
    gain: float = 0.0  # in dB
    noise: float | None = None  # white, in dB below the sound; None: without
    part: Part = WHOLE  # of each file


def perturb(
    utterances: Sequence[Utterance], speeds: Sequence[float], volume: float, noise: tuple[float, float] | None
) -> list[Utterance]:
    """Each utterance at each of these speeds, louder or softer by up to `volume` dB, and with noise."""
    generator = np.random.default_rng(PERTURBATION_SEED)
    return [
        utterance._replace(
            speed=speed,
            gain=round(generator.uniform(-volume, volume), 2),
            noise=None if noise is None else round(generator.uniform(*noise), 2),
        )
        for speed in speeds
        for utterance in utterances
    ]


class Recorded:
    """Utterances with their features, read-only: id, text, and frames (T, num_mels) float16; `sizes` are their T.

    report: of damaged files, those resampled, and others, for the log. mean, deviation: (num_mels,), of all frames.
    """

    def __init__(self, places: Sequence[Path], tables: Sequence[pa.Table], metas: Sequence[dict[str, Any]]) -> None:
        self.places = [place for place, table in zip(places, tables, strict=True) for _ in table.to_batches()]
        self.batches = [batch for table in tables for batch in table.to_batches()]
        self.starts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        self.num_mels: int = metas[0]["num_mels"]
        count = max(1, sum(meta["frames"] for meta in metas))
        sums, squares = (np.sum([meta[name] for meta in metas], axis=0) / count for name in ("sums", "squares"))
        self.mean = sums.astype(np.float32)
        self.deviation = np.sqrt(np.maximum(squares - sums**2, 1e-4)).astype(np.float32)
        self.report = report(metas)
        offsets = [np.frombuffer(batch.column(2).buffers()[1], np.int64)[: len(batch) + 1] for batch in self.batches]
        self.sizes = np.concatenate([np.zeros(0, np.int64), *map(np.diff, offsets)]) // (2 * self.num_mels)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> tuple[str, str, np.ndarray]:
        place = int(np.searchsorted(self.starts, i, side="right")) - 1
        name, text, features = (column[i - self.starts[place]] for column in self.batches[place].columns)
        frames = np.frombuffer(features.as_buffer(), np.float16).reshape(-1, self.num_mels)
        if not np.isfinite(frames).all():
            raise ValueError(f"{self.places[place]} is damaged: `rm -r {self.places[place]}` to compute it again")
        return name.as_py(), text.as_py(), frames

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch.column(1).to_pylist()]

    @property
    def checksum(self) -> str:
        """Of the recordings' names, texts and lengths."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for i in (0, 1):
            digest.update(json.dumps([one for batch in self.batches for one in batch.column(i).to_pylist()]).encode())
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
        identity = [utterance.id, utterance.text, utterance.speed, utterance.gain, utterance.noise, files]
        if utterance.part != WHOLE:  # of whole files, what earlier versions computed holds
            identity.append(utterance.part)
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()[:24]


def prepare(utterances: Sequence[Utterance], frontend: Frontend, cache: Path, name: str) -> Recorded:
    """The utterances with their features, from the cache or computed; those with a damaged file are left out.

    They are computed and kept a part at a time: who breaks off loses the part that was begun. ValueError where no
    utterance is left.
    """
    parts = [utterances[i : i + PART] for i in range(0, len(utterances), PART)]
    with tqdm(total=len(utterances), desc=f"features of {name}", unit=" utterances", delay=2, disable=None) as bar:
        kept = [part_of(part, frontend, cache / "speech" / identity_of(part, frontend), bar) for part in parts]
    if not kept:
        raise ValueError(f"data.{name} has no recording")
    found = Recorded(*zip(*kept, strict=True))
    for line in found.report:
        log.warning("%s: %s", name, line)
    if not len(found):
        raise ValueError(f"data.{name}: none of {len(utterances)} recordings can be used: {'; '.join(found.report)}")
    return found


def part_of(
    utterances: Sequence[Utterance], frontend: Frontend, place: Path, bar: tqdm
) -> tuple[Path, pa.Table, dict[str, Any]]:
    """A part of a split in its folder of the cache."""
    found = open_prepared(place, frontend)
    if found is None:
        require_writable(place.parent)
        with lock(place):  # a second process waits here, and then finds what the first has built
            found = open_prepared(place, frontend)
            if found is None:
                scratch = place.with_name(place.name + ".part")
                for leftover in (scratch, place):  # of a process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                scratch.mkdir()
                write(utterances, frontend, scratch, bar)
                os.rename(scratch, place)
                found = open_prepared(place, frontend)
    assert found is not None
    return place, *found


def open_prepared(place: Path, frontend: Frontend) -> tuple[pa.Table, dict[str, Any]] | None:
    """What a prepared folder holds; None if there is none, or it is not whole."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        shapes = meta["num_mels"], len(meta["sums"]), len(meta["squares"])
        is_whole = (place / "features.arrow").stat().st_size == meta["bytes"] and {*shapes} == {frontend.num_mels}
        if not is_whole or not math.isfinite(sum(meta["sums"])):
            return None
        return pa.ipc.open_stream(pa.memory_map(str(place / "features.arrow"))).read_all(), meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(utterances: Sequence[Utterance], frontend: Frontend, folder: Path, bar: tqdm) -> None:
    """Compute and write the features of utterances, and what was found of them."""
    damaged: list[str] = []
    short: list[str] = []
    rates: dict[str, int] = {}
    stereo = frames = 0
    sums, squares = np.zeros(frontend.num_mels), np.zeros(frontend.num_mels)
    with (
        ThreadPoolExecutor(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ) as pool,
        pa.OSFile(str(folder / "features.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
    ):
        for group in in_groups(utterances, GROUP):
            rows: list[tuple[str, str, bytes]] = []
            for utterance, (features, found) in zip(
                group, pool.map(lambda utterance: features_of(utterance, frontend), group), strict=True
            ):
                for rate, channels in found:
                    stereo += channels > 1
                    if rate != frontend.rate:
                        rates[str(rate)] = rates.get(str(rate), 0) + 1
                if isinstance(features, Damaged):
                    damaged.append(str(features))
                elif not len(features):
                    start = f" from {utterance.part.offset:g} s on" if utterance.part != WHOLE else ""
                    short.append(f"{utterance.files[0]}{start}")
                else:
                    sums += features.sum(0, dtype=np.float64)
                    squares += np.square(features, dtype=np.float64).sum(0)
                    frames += len(features)
                    rows.append((utterance.id, utterance.text, features.tobytes()))
            if rows:
                columns = zip(*rows, strict=True)
                arrays = [pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            bar.update(len(group))
    meta = {
        "num_mels": frontend.num_mels,
        "rate": frontend.rate,
        "frames": frames,
        "sums": sums.tolist(),
        "squares": squares.tolist(),
        "damaged": [len(damaged), damaged[:SHOWN]],
        "short": [len(short), short[:SHOWN]],
        "rates": rates,
        "stereo": stereo,
        "bytes": (folder / "features.arrow").stat().st_size,
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def report(metas: Sequence[dict[str, Any]]) -> list[str]:
    """What was found of all parts, in words."""
    damaged, short = (sum(meta[name][0] for meta in metas) for name in ("damaged", "short"))
    named = {name: [one for meta in metas for one in meta[name][1]][:SHOWN] for name in ("damaged", "short")}
    rates: Counter[str] = sum((Counter(meta["rates"]) for meta in metas), Counter())
    stereo = sum(meta["stereo"] for meta in metas)
    resampled_files = ", ".join(f"{count} of {rate} Hz" for rate, count in rates.items())
    return [
        line
        for count, line in (
            (damaged, f"{damaged} left out, damaged: {'; '.join(named['damaged'])}"),
            (short, f"{short} left out, shorter than a frame of 25 ms: {', '.join(named['short'])}"),
            (len(rates), f"resampled to {metas[0]['rate']} Hz: {resampled_files}"),
            (stereo, f"{stereo} of several channels, of which the mean is taken"),
        )
        if count
    ]


def in_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def features_of(utterance: Utterance, frontend: Frontend) -> tuple[np.ndarray | Damaged, list[tuple[int, int]]]:
    """Frames (T, num_mels) float16, or what is wrong with a file; and rate and channels of each file."""
    waves, found = [], []
    try:
        for path in utterance.files:
            wave, rate, channels = read(path, utterance.part)
            found.append((rate, channels))
            waves.append(resample(wave, round(rate * utterance.speed), frontend.rate))
    except Damaged as error:
        return error, found
    wave = np.concatenate(waves)
    if utterance.noise is not None:
        generator = np.random.default_rng(zlib.crc32(f"{utterance.id} {utterance.speed}".encode()))
        loudness = np.sqrt(np.square(wave).mean()) * 10 ** (-utterance.noise / 20)
        wave = wave + (loudness * generator.normal(size=len(wave))).astype(np.float32)
    return frontend.frames(wave * np.float32(10 ** (utterance.gain / 20))).astype(np.float16), found

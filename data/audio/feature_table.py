"""The features of utterances as Arrow tables in memory maps, computed once, on all cores."""

import hashlib
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data.audio.fbank import WHOLE, Damaged, Frontend, Part, read, resample
from data.cache import available_cores, open_or_build

log = logging.getLogger(__name__)

FORMAT = 2  # version of the prepared folders; increase it when their content changes
EXAMPLES = 3  # files of each fault in the log
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("features", pa.large_binary())])
GROUP = 64  # utterances of a record batch
PERTURBATION_SEED = 1234  # the seed of a run does not change the recordings
PART = 4096  # utterances in one folder of the cache


class Utterance(NamedTuple):
    """A transcript, and its sound: a file, a part of it, or several files concatenated."""

    id: str
    files: tuple[Path, ...]
    text: str
    speaker: str
    speed: float = 1.0  # 1.1 is faster, and higher
    gain: float = 0.0  # in dB
    noise: float | None = None  # white noise, in dB below the sound
    part: Part = WHOLE  # of each file


def perturb(
    utterances: Sequence[Utterance], speeds: Sequence[float], volume: float, noise: tuple[float, float] | None
) -> list[Utterance]:
    """Each utterance at each of these speeds, with a random gain of up to +-`volume` dB, and random noise in dB."""
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
    """Utterances, read-only: id, text, and frames (T, num_mels) float16; `sizes` are their T.

    report: damaged, short and resampled files, for the log. mean, deviation (num_mels,): of all frames.
    """

    def __init__(self, places: Sequence[Path], tables: Sequence[pa.Table], metas: Sequence[dict[str, Any]]) -> None:
        self.places, self.ends = places, np.cumsum([*map(len, tables)])
        self.ids, self.text_column, self.features = pa.concat_tables(tables).columns
        self.num_mels: int = metas[0]["num_mels"]
        count = max(1, sum(meta["frames"] for meta in metas))
        sums, squares = (np.sum([meta[name] for meta in metas], axis=0) / count for name in ("sums", "squares"))
        self.mean = sums.astype(np.float32)
        self.deviation = np.sqrt(np.maximum(squares - sums**2, 1e-4)).astype(np.float32)
        self.report = report(metas)
        self.sizes = pc.binary_length(self.features).to_numpy() // (2 * self.num_mels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[str, str, np.ndarray]:
        name, text, features = (column[int(i)] for column in (self.ids, self.text_column, self.features))
        frames = np.frombuffer(features.as_buffer(), np.float16).reshape(-1, self.num_mels)
        if not np.isfinite(frames).all():
            place = self.places[int(np.searchsorted(self.ends, i, side="right"))]
            raise ValueError(f"{place} is damaged: `rm -r {place}` to compute it again")
        return name.as_py(), text.as_py(), frames

    @property
    def texts(self) -> list[str]:
        return self.text_column.to_pylist()

    @property
    def checksum(self) -> str:
        """The checksum of names, texts and lengths."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for names in (self.ids.to_pylist(), self.texts):
            digest.update(json.dumps(names).encode())
        return digest.hexdigest()


def identity_of(utterances: Sequence[Utterance], frontend: Frontend) -> str:
    """A checksum of everything that the features depend on; of files, the size and the time of modification."""
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
        if utterance.part != WHOLE:  # keeps the caches of earlier versions valid
            identity.append(utterance.part)
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()[:24]


def prepare(utterances: Sequence[Utterance], frontend: Frontend, cache: Path, name: str) -> Recorded:
    """The utterances with their features, from the cache or computed, without those with damaged files.

    They are computed and stored in parts, so an interruption loses one part. ValueError if no utterance is left.
    """
    parts = [utterances[i : i + PART] for i in range(0, len(utterances), PART)]
    with tqdm(total=len(utterances), desc=f"features of {name}", unit=" utterances", delay=2, disable=None) as bar:
        prepared = []
        for part in parts:
            place = cache / "speech" / identity_of(part, frontend)
            build = partial(write, part, frontend, bar)
            prepared.append((place, *open_or_build(place, partial(open_prepared, frontend), build)))
    recorded = Recorded(*zip(*prepared, strict=True))
    for line in recorded.report:
        log.warning("%s: %s", name, line)
    if not len(recorded):
        raise ValueError(f"data.{name}: none of {len(utterances)} recordings can be used: {'; '.join(recorded.report)}")
    return recorded


def open_prepared(frontend: Frontend, place: Path) -> tuple[pa.Table, dict[str, Any]] | None:
    """The content of a prepared folder; None if it is absent or damaged."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        shapes = meta["num_mels"], len(meta["sums"]), len(meta["squares"])
        is_whole = (place / "features.arrow").stat().st_size == meta["bytes"] and {*shapes} == {frontend.num_mels}
        if not is_whole or not math.isfinite(sum(meta["sums"])):
            return None
        return pa.ipc.open_stream(pa.memory_map(str(place / "features.arrow"))).read_all(), meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(utterances: Sequence[Utterance], frontend: Frontend, bar: tqdm, folder: Path) -> None:
    """Computes and writes the features of utterances, and the numbers of `report`."""
    folder.mkdir()
    damaged: list[str] = []
    short: list[str] = []
    rates: dict[str, int] = {}
    stereo = frames = 0
    sums, squares = np.zeros((2, frontend.num_mels))
    with (
        ThreadPoolExecutor(available_cores()) as pool,
        pa.OSFile(str(folder / "features.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
    ):
        for start in range(0, len(utterances), GROUP):
            group = utterances[start : start + GROUP]
            rows: list[tuple[str, str, bytes]] = []
            computed = pool.map(lambda utterance: features_of(utterance, frontend), group)
            for utterance, (features, formats) in zip(group, computed, strict=True):
                for rate, channels in formats:
                    stereo += channels > 1
                    if rate != frontend.rate:
                        rates[str(rate)] = rates.get(str(rate), 0) + 1
                if isinstance(features, Damaged):
                    damaged.append(str(features))
                elif not len(features):
                    part = f" from {utterance.part.offset:g} s on" if utterance.part != WHOLE else ""
                    short.append(f"{utterance.files[0]}{part}")
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
        "damaged": [len(damaged), damaged[:EXAMPLES]],
        "short": [len(short), short[:EXAMPLES]],
        "rates": rates,
        "stereo": stereo,
        "bytes": (folder / "features.arrow").stat().st_size,
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def report(metas: Sequence[dict[str, Any]]) -> list[str]:
    """The faults of all parts, for the log."""
    damaged, short = (sum(meta[name][0] for meta in metas) for name in ("damaged", "short"))
    named = {name: [one for meta in metas for one in meta[name][1]][:EXAMPLES] for name in ("damaged", "short")}
    rates: Counter[str] = sum((Counter(meta["rates"]) for meta in metas), Counter())
    stereo = sum(meta["stereo"] for meta in metas)
    resampled_files = ", ".join(f"{count} of {rate} Hz" for rate, count in rates.items())
    return [
        line
        for count, line in (
            (damaged, f"{damaged} left out, damaged: {'; '.join(named['damaged'])}"),
            (short, f"{short} left out, shorter than a frame of 25 ms: {', '.join(named['short'])}"),
            (len(rates), f"resampled to {metas[0]['rate']} Hz: {resampled_files}"),
            (stereo, f"{stereo} with several channels, which are averaged"),
        )
        if count
    ]


def features_of(utterance: Utterance, frontend: Frontend) -> tuple[np.ndarray | Damaged, list[tuple[int, int]]]:
    """Frames (T, num_mels) float16, or the error of a damaged file; and rate and channels of each file."""
    waves, formats = [], []
    try:
        for path in utterance.files:
            wave, rate, channels = read(path, utterance.part)
            formats.append((rate, channels))
            waves.append(resample(wave, round(rate * utterance.speed), frontend.rate))
    except Damaged as error:
        return error, formats
    wave = np.concatenate(waves)
    if utterance.noise is not None:
        generator = np.random.default_rng(zlib.crc32(f"{utterance.id} {utterance.speed}".encode()))
        loudness = np.sqrt(np.square(wave).mean()) * 10 ** (-utterance.noise / 20)
        wave = wave + (loudness * generator.normal(size=len(wave))).astype(np.float32)
    return frontend.frames(wave * np.float32(10 ** (utterance.gain / 20))).astype(np.float16), formats

"""The utterances of a Kaldi folder: normalised features and targets, read from disk when needed."""

import hashlib
import logging
import os
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.audio.kaldi_ark import Place, lines_of, read_head, read_ints, read_matrix, read_table, scan_archive
from data.cache import prepare_folder

log = logging.getLogger(__name__)

NORMALISATIONS = (None, "utterance", "speaker", "global")
MOST_TARGETS = 1_000_000
NO_TARGETS, OTHER_TARGETS = "without targets", "with another number of targets than of frames"


class Frames:
    """Utterances in the order of feats.scp; headers and targets are checked once, features are read each time.

    Attributes: keys; lengths in frames; input_size; counts, the occurrences of each target; report, the number of
    utterances and of those left out; check, a checksum.

    Args:
        path: the folder, or its feats.scp.
        name: of the folder in messages.
        scored: all: utterances without a target for each frame are left out; some: their targets are -1; none: targets
            are not read.
        cmvn: None, utterance, speaker (with cmvn.scp and utt2spk beside feats.scp), or global, by `stats`.
        input_size: the required number of features of a frame.
        num_targets: the required upper bound of targets.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        scored: str,
        cmvn: str | None,
        input_size: int | None = None,
        num_targets: int | None = None,
    ) -> None:
        self.folder, table = (path, path / "feats.scp") if path.is_dir() else (path.parent, path)
        if not table.is_file():
            raise FileNotFoundError(
                f"{name}: there is no {table}; type the path of a Kaldi folder with feats.scp (docs/tasks/hybrid.md)"
            )
        self.name, self.cmvn = name, cmvn
        self.stats: Any = None  # (2, input_size) for cmvn=global: mean, and scale
        places, absent = read_table(table, "copy-feats")
        left_out = Counter({f"with a missing archive {file}": count for file, count in absent.items()})
        targets = {} if scored == "none" else self.find_targets(required=scored == "all")
        self.keys: list[str] = []
        self.places: list[Place] = []
        self.targets: list[Place | None] = []
        lengths, counts, ratios = [], np.zeros(num_targets or 0, np.int64), []
        for key, place in places.items():
            rows, columns = read_head(place)[1:3]
            if not rows:
                left_out["without a frame"] += 1
                continue
            if input_size is not None and columns != input_size:
                other = f"those of {self.keys[0]} have {input_size}" if self.keys else f"expected {input_size}"
                raise ValueError(
                    f"{name}: the frames of {key} have {columns} features, {other}; compute all features with the same "
                    "configuration"
                )
            target = targets.get(key)
            own = None if target is None else read_ints(target)
            if own is None and scored != "none":
                left_out[NO_TARGETS] += 1
            elif own is not None and len(own) != rows:
                left_out[OTHER_TARGETS] += 1
                ratios.append(rows / max(1, len(own)))
                target = None
            elif own is not None:
                self.require_pdfs(key, own, num_targets)
                counts = np.pad(counts, (0, max(0, int(own.max()) + 1 - len(counts))))
                counts += np.bincount(own, minlength=len(counts))
            if target is None and scored == "all":
                continue
            input_size = columns
            self.keys.append(key)
            self.places.append(place)
            self.targets.append(target)
            lengths.append(rows)
        self.lengths, self.counts, self.input_size = np.array(lengths, np.int64), counts, input_size or 0
        self.report = f"{name} has {len(self.keys):,} utterances, {self.lengths.sum():,} frames"
        for why, count in left_out.items():
            is_kept = scored == "some" and why in (NO_TARGETS, OTHER_TARGETS)
            self.report += f"; {count:,} {why}, {'not scored' if is_kept else 'left out'}"
        if ratios and np.median(ratios) > 1.5:
            self.report += (
                f" (about {np.median(ratios):.0f} frames for each target: alignments of a chain model are subsampled; "
                "use those of the model before it, such as tri4_ali)"
            )
        if not self.keys:
            raise ValueError(f"no utterance can be used: {self.report}")
        if cmvn == "speaker":
            self.find_speakers()
        self.check = zlib.crc32(repr((self.keys, lengths, counts.tolist())).encode())

    def __len__(self) -> int:
        return len(self.keys)

    def find_targets(self, required: bool) -> dict[str, Place]:
        """The places of the targets in ali.scp or ali.ark."""
        table, archive = self.folder / "ali.scp", self.folder / "ali.ark"
        if table.is_file():
            return read_table(table, "copy-int-vector")[0]
        if archive.is_file():
            return scan_archive(archive)
        if required:
            raise FileNotFoundError(
                f"{self.name}: there is neither {table} nor {archive}; write them by ali-to-pdf final.mdl "
                f"'ark:gunzip -c ali.*.gz|' ark,scp:{archive},{table}"
            )
        return {}

    def require_pdfs(self, key: str, targets: np.ndarray, num_targets: int | None) -> None:
        """ValueError unless the targets of an utterance are numbers of pdfs."""
        low, high, limit = int(targets.min()), int(targets.max()), num_targets or MOST_TARGETS
        if low < 0 or high >= limit:
            advice = "targets must be pdfs, as written by ali-to-pdf"
            if num_targets and low >= 0:
                advice = f"type data.num_targets={high + 1} or more"
            wrong = low if low < 0 else high
            raise ValueError(f"{self.name}: utterance {key} has the target {wrong}, outside 0 to {limit - 1}; {advice}")

    def find_speakers(self) -> None:
        """Reads the speaker of each utterance, and the places of the speakers' sums."""
        for file in ("cmvn.scp", "utt2spk"):
            if not (self.folder / file).is_file():
                raise FileNotFoundError(
                    f"{self.name}: data.cmvn=speaker needs {self.folder / file}; run compute-cmvn-stats for cmvn.scp, "
                    "or type data.cmvn=utterance"
                )
        self.sums, _ = read_table(self.folder / "cmvn.scp", "copy-matrix")
        speakers = dict(line.split(maxsplit=1) for line in lines_of(self.folder / "utt2spk") if len(line.split()) == 2)
        for key in self.keys:
            if speakers.get(key) not in self.sums:
                raise ValueError(
                    f"{self.folder}: the speaker {speakers.get(key)} of utterance {key} in utt2spk is not in cmvn.scp, "
                    "or its archive is missing"
                )
        self.speakers = {key: speakers[key] for key in self.keys}
        self.stats_of = lru_cache(maxsize=1024)(self.speaker_stats)

    def speaker_stats(self, speaker: str) -> np.ndarray:
        """Mean and scale (2, input_size) of a speaker."""
        both = read_matrix(self.sums[speaker], np.float64)
        if both.shape != (2, self.input_size + 1) or not both[0, -1] > 0:
            raise ValueError(
                f"{self.folder / 'cmvn.scp'}: the sums of {speaker} must be 2 x {self.input_size + 1} with a count "
                f"above 0, not {' x '.join(map(str, both.shape))}"
            )
        squared = np.square(both[0, :-1]) / both[0, -1]
        if not np.isfinite(both).all() or (squared > 1.001 * both[1, :-1] + 1e-3).any():
            raise ValueError(
                f"{self.folder / 'cmvn.scp'}: the sums of {speaker} are impossible; compute them again by "
                "compute-cmvn-stats"
            )
        return mean_and_scale(both[0, :-1], both[1, :-1], both[0, -1])

    def read(self, i: int) -> np.ndarray:
        """Features (T, input_size) of utterance i without normalisation, float32."""
        place = self.places[i]
        x = read_matrix(place)
        if not np.isfinite(x).all():
            raise ValueError(
                f"{place.path}: the features of utterance {place.key} are not all numbers (NaN or infinity at frame "
                f"{int(np.argwhere(~np.isfinite(x))[0, 0])}); remove {place.key} from {self.folder / 'feats.scp'}"
            )
        return x

    def features(self, i: int) -> np.ndarray:
        """Features (T, input_size) of utterance i, normalised, float32."""
        x = self.read(i)
        if self.cmvn is None:
            return x
        if self.cmvn == "utterance":
            stats = mean_and_scale(x.sum(0, dtype=np.float64), np.square(x, dtype=np.float64).sum(0), len(x))
        elif self.cmvn == "speaker":
            stats = self.stats_of(self.speakers[self.keys[i]])
        else:
            stats = self.stats
        return ((x - stats[0]) * stats[1]).astype(np.float32)

    def align(self, i: int) -> np.ndarray:
        """Targets (T,) of utterance i; -1 if it has none."""
        place = self.targets[i]
        return np.full(self.lengths[i], -1) if place is None else read_ints(place).astype(np.int64)

    def global_stats(self, cache: Path) -> np.ndarray:
        """Mean and scale (2, input_size) over all utterances, from the cache, or computed once."""
        files = {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in {p.path for p in self.places}}
        content = repr((self.keys, self.places, sorted(files.items())))

        def build(folder: Path) -> None:
            log.info("%s: computing mean and variance of all frames, once", self.name)
            sums = np.zeros((2, self.input_size))
            for i in range(len(self)):
                x = self.read(i).astype(np.float64)
                sums += np.stack([x.sum(0), np.square(x).sum(0)])
            np.save(folder / "stats.npy", mean_and_scale(sums[0], sums[1], int(self.lengths.sum())))

        place = cache / "kaldi" / hashlib.sha256(content.encode()).hexdigest()[:32]
        return np.load(prepare_folder(place, build) / "stats.npy")


def mean_and_scale(sums: np.ndarray, squares: np.ndarray, count: float) -> np.ndarray:
    """(2, n): the means, and the reciprocal standard deviations, or 1 for constant features."""
    mean = sums / count
    variance = squares / count - mean**2
    varies = variance > 1e-10 * np.maximum(1.0, mean**2)
    return np.stack([mean, np.where(varies, variance, 1.0) ** -0.5])

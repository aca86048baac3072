"""The utterances of a Kaldi folder: features and targets by frame, read when they are asked for, and normalised."""

import hashlib
import logging
import os
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.audio.kaldi_ark import Place, lines_of, read_head, read_ints, read_matrix, read_table, scan_archive
from data.download import lock, require_writable

log = logging.getLogger(__name__)

NORMALISATIONS = (None, "utterance", "speaker", "global")
MOST_TARGETS = 1_000_000
SCORED = ("all", "some", "none")


class Frames:
    """Utterances in the order of feats.scp, of which heads and targets are read once, and features each time.

    Attributes: keys; lengths in frames; input_size; counts, how often each target occurs; report, what is left out;
    check, a number that another folder would not have.

    Args:
        path: the folder, or its feats.scp.
        name: of the folder in messages.
        scored: all: an utterance without a target for each frame is left out; some: its targets are -1; none: no
            targets are looked for.
        cmvn: None, utterance, speaker (cmvn.scp and utt2spk lie beside feats.scp), or global, by `stats`.
        input_size: features that a frame must have.
        num_targets: targets must lie below.
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
                f"{name}: there is no {table}; type the path of a Kaldi folder that has feats.scp (docs/kaldi.md)"
            )
        self.name, self.cmvn = name, cmvn
        self.stats: np.ndarray | None = None  # (2, input_size) of `global`: mean, and what multiplies
        places, absent = read_table(table, "copy-feats")
        left_out = Counter({f"whose archive {file} is missing": count for file, count in absent.items()})
        targets = {} if scored == "none" else self.find_targets(required=scored == "all")
        self.keys: list[str] = []
        self.places: list[Place] = []
        self.targets: list[Place | None] = []
        lengths, counts, first, ratios = [], np.zeros(num_targets or 0, np.int64), None, []
        for key, place in places.items():
            rows, columns = read_head(place, key)[1:3]
            if not rows:
                left_out["without a frame"] += 1
                continue
            if input_size is not None and columns != input_size:
                other = f"those of {first} have {input_size}" if first else f"needed are {input_size}"
                raise ValueError(
                    f"{name}: the frames of {key} have {columns} features, {other}; make all with the same "
                    "configuration of features"
                )
            input_size, first = columns, first or key
            aligned = None
            if scored != "none":
                found = read_ints(targets[key], key) if key in targets else None
                if found is not None and len(found) == rows:
                    aligned = targets[key]
                    counts = self.add_counts(found, counts, num_targets, key)
                elif found is None:
                    left_out["without targets"] += 1
                else:
                    left_out["with another number of targets than of frames"] += 1
                    ratios.append(rows / max(1, len(found)))
                if aligned is None and scored == "all":
                    continue
            self.keys.append(key)
            self.places.append(place)
            self.targets.append(aligned)
            lengths.append(rows)
        self.lengths, self.counts, self.input_size = np.array(lengths, np.int64), counts, input_size or 0
        self.report = f"{name} has {len(self.keys):,} utterances, {self.lengths.sum():,} frames"
        kept = {"without targets", "with another number of targets than of frames"} if scored == "some" else set()
        self.report += "".join(
            f"; {count:,} {why}, {'not scored' if why in kept else 'left out'}" for why, count in left_out.items()
        )
        if ratios and np.median(ratios) > 1.5:
            self.report += (
                f" (there are about {np.median(ratios):.0f} frames to a target: alignments of a chain model are "
                "subsampled; take those of the model before it, as tri4_ali)"
            )
        if not self.keys:
            raise ValueError(f"nothing is left: {self.report}")
        if cmvn == "speaker":
            self.find_speakers()
        self.check = zlib.crc32(repr((self.keys, lengths, counts.tolist())).encode())

    def __len__(self) -> int:
        return len(self.keys)

    def find_targets(self, required: bool) -> dict[str, Place]:
        """Where the targets lie: ali.scp, or ali.ark."""
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

    def add_counts(self, targets: np.ndarray, counts: np.ndarray, num_targets: int | None, key: str) -> np.ndarray:
        """The counts with those of an utterance."""
        low, high = int(targets.min()), int(targets.max())
        if high >= MOST_TARGETS:
            raise ValueError(
                f"{self.name}: utterance {key} has the target {high}, beyond {MOST_TARGETS:,}: no pdf is that"
            )
        if low < 0 or (num_targets is not None and high >= num_targets):
            told = f"{self.name}: utterance {key} has the target"
            if low < 0 or num_targets is None:
                raise ValueError(f"{told} {low}: targets are 0 or more, as ali-to-pdf writes them")
            raise ValueError(
                f"{told} {high}, which is none of 0 to {num_targets - 1}; type data.num_targets={high + 1} or more"
            )
        found = np.bincount(targets, minlength=len(counts))
        found[: len(counts)] += counts
        return found

    def find_speakers(self) -> None:
        """Where the sums of each utterance's speaker lie."""
        for file in ("cmvn.scp", "utt2spk"):
            if not (self.folder / file).is_file():
                raise FileNotFoundError(
                    f"{self.name}: data.cmvn=speaker needs {self.folder / file}; compute-cmvn-stats makes cmvn.scp, or "
                    "type data.cmvn=utterance"
                )
        sums, _ = read_table(self.folder / "cmvn.scp", "copy-matrix")
        speakers = dict(line.split(maxsplit=1) for line in lines_of(self.folder / "utt2spk") if len(line.split()) == 2)
        for key in self.keys:
            if speakers.get(key) not in sums:
                raise ValueError(
                    f"{self.folder}: the speaker {speakers.get(key)} of utterance {key}, as utt2spk has it, is not in "
                    "cmvn.scp, or its archive is missing"
                )
        self.speakers = {key: speakers[key] for key in self.keys}

        @lru_cache(maxsize=1024)
        def stats(speaker: str) -> np.ndarray:
            both = read_matrix(sums[speaker], speaker, np.float64)
            if both.shape != (2, self.input_size + 1) or not both[0, -1] > 0:
                raise ValueError(
                    f"{self.folder / 'cmvn.scp'}: the sums of {speaker} must be 2 x {self.input_size + 1} with a count "
                    f"above 0, not {' x '.join(map(str, both.shape))}"
                )
            squared = np.square(both[0, :-1]) / both[0, -1]
            if not np.isfinite(both).all() or (squared > 1.001 * both[1, :-1] + 1e-3).any():
                raise ValueError(
                    f"{self.folder / 'cmvn.scp'}: the sums of {speaker} cannot be those of frames; make them anew by "
                    "compute-cmvn-stats"
                )
            return mean_and_scale(both[0, :-1], both[1, :-1], both[0, -1])

        self.stats_of = stats

    def read(self, i: int) -> np.ndarray:
        """Features (T, input_size) of utterance i as they lie there, float32."""
        x, key = read_matrix(self.places[i], self.keys[i]), self.keys[i]
        if not np.isfinite(x).all():
            raise ValueError(
                f"{self.places[i].path}: the features of utterance {key} are not all numbers (NaN or infinity at frame "
                f"{int(np.argwhere(~np.isfinite(x))[0, 0])}); take {key} out of {self.folder / 'feats.scp'}"
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
            assert self.stats is not None
            stats = self.stats
        return ((x - stats[0]) * stats[1]).astype(np.float32)

    def align(self, i: int) -> np.ndarray:
        """Targets (T,) of utterance i; -1 where it has none."""
        place = self.targets[i]
        return np.full(self.lengths[i], -1) if place is None else read_ints(place, self.keys[i]).astype(np.int64)

    def global_stats(self, cache: Path) -> np.ndarray:
        """Mean and scale (2, input_size) over all utterances; read through once, and then kept in the cache."""
        files = {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path, _ in self.places}
        content = repr((self.keys, self.places, sorted(files.items())))
        path = cache / "kaldi" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"
        found = read_cached(path)
        if found is not None:
            return found
        require_writable(path.parent)
        with lock(path):  # a second process waits here, and then finds what the first has computed
            found = read_cached(path)
            if found is None:
                log.info("%s: computing mean and variance of all frames, once", self.name)
                sums = np.zeros((2, self.input_size))
                for i in range(len(self)):
                    x = self.read(i).astype(np.float64)
                    sums += np.stack([x.sum(0), np.square(x).sum(0)])
                temporary = path.with_suffix(".tmp.npy")
                found = mean_and_scale(sums[0], sums[1], int(self.lengths.sum()))
                np.save(temporary, found)
                os.replace(temporary, path)
            return found


def read_cached(path: Path) -> np.ndarray | None:
    """An array of the cache; None if there is none, or it is damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def mean_and_scale(sums: np.ndarray, squares: np.ndarray, count: float) -> np.ndarray:
    """(2, n): the means, and one over the standard deviations; 1 of what does not vary."""
    mean = sums / count
    variance = squares / count - mean**2
    varies = variance > 1e-10 * np.maximum(1.0, mean**2)
    return np.stack([mean, np.where(varies, variance, 1.0) ** -0.5])

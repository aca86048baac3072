"""Spoken digits, recorded, and words that are computed: recordings alone, or put together to strings."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import synthesis
from data.audio.fbank import write
from data.audio.feature_table import Utterance
from data.download import fetch, require_writable, unpack_archive
from data.speech import Recordings

SPLIT_SEED = 1234  # a run's own seed never moves a recording to another split

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class SpokenDigits(Recordings):
    """The Free Spoken Digit Dataset (Jackson et al.): 3,000 digits of six speakers, alone or put together to strings.

    root: of fsdd/, which holds recordings/ or the archive; it is downloaded where absent.
    speakers: who is heard in `val` and `test`, and nobody else is; where that is nobody for val, validation has the
        recordings 0 to 4 of all others. null for the official split, whose test is the recordings 0 to 4 of all, and
        validation, ours, 5 to 9.
    digits: shortest and longest string of one speaker's digits; null for single digits.
    repeats: in how many strings of training each recording is; in validation and test in one.
    """

    def __init__(
        self,
        *,
        root: str,
        url: str,
        archive: str,
        speakers: Mapping[str, Sequence[str]] | None = None,
        digits: Sequence[int] | None = None,
        repeats: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = Path(root).expanduser() / "fsdd"
        self.url, self.archive = url, archive
        both = speakers if isinstance(speakers, Mapping) else {}
        named: list[list[Any]] = [
            [*both[split]] if isinstance(both.get(split), Sequence) else [None] for split in ("val", "test")
        ]
        if speakers is not None and (
            {*both} != {"val", "test"}
            or not all(isinstance(name, str) and len(name) > 1 for names in named for name in names)
            or {*named[0]} & {*named[1]}
        ):
            raise ValueError(
                f"data.speakers={speakers} must name those of val and of test, and nobody for both, or be null: type "
                "'data.speakers={val: [theo], test: [yweweler]}'"
            )
        self.speakers = None if speakers is None else dict(zip(("val", "test"), map(set, named), strict=True))
        lengths = list(digits) if isinstance(digits, Sequence) else []
        whole = len(lengths) == 2 and all(type(n) is int for n in lengths) and 1 <= lengths[0] <= lengths[1]
        if (digits is not None and not whole) or type(repeats) is not int or repeats < 1:
            raise ValueError(
                f"data.digits={digits} must be two whole numbers, as [3,7], or null, and data.repeats={repeats} 1 or "
                "more"
            )
        self.digits, self.repeats = lengths or None, repeats

    def utterances(self) -> dict[str, list[Utterance]]:
        folder = self.folder
        if not (folder / "recordings").is_dir():
            archive = fetch(folder / self.archive, self.url)
            folder = unpack_archive(archive, self.cache / "fsdd" / str(archive.stat().st_size), (".wav",))
        names = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
        found: dict[str, list[Utterance]] = {"train": [], "val": [], "test": []}
        heard = set()
        for path in sorted(folder.rglob("recordings/*.wav")):
            if match := names.fullmatch(path.name):
                digit, speaker, number = int(match[1]), match[2], int(match[3])
                heard.add(speaker)
                if self.speakers is None:
                    split = "test" if number < 5 else "val" if number < 10 else "train"
                else:
                    other = "val" if number < 5 and not self.speakers["val"] else "train"
                    split = next((split for split, known in self.speakers.items() if speaker in known), other)
                found[split].append(Utterance(path.stem, (path,), DIGITS[digit], speaker))
        if not heard:
            raise ValueError(f"{folder} has no recordings/DIGIT_SPEAKER_NUMBER.wav: put the corpus there again")
        for split, known in (self.speakers or {}).items():
            if unknown := sorted(known - heard):
                raise ValueError(f"data.speakers.{split}: {unknown[0]!r} is none of {', '.join(sorted(heard))}")
        if empty := [split for split, own in found.items() if not own]:
            raise ValueError(f"data.speakers leaves nobody for {empty[0]}: there are {', '.join(sorted(heard))}")
        if self.digits is None:
            return found
        return {
            split: strings(recordings, self.digits, self.repeats if split == "train" else 1)
            for split, recordings in found.items()
        }


def strings(recordings: Iterable[Utterance], digits: Sequence[int], repeats: int) -> list[Utterance]:
    """Recordings of one speaker, each in `repeats` strings of a length within `digits`, put together at random."""
    by_speaker: dict[str, list[Utterance]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    found: list[Utterance] = []
    for speaker, own in sorted(by_speaker.items()):
        generator = random.Random(f"{SPLIT_SEED} {speaker}")  # nobody says what another says
        if len(own) < digits[0]:
            raise ValueError(f"data.digits={list(digits)}: {speaker} has {len(own)} recordings only in a split")
        for _ in range(repeats):
            left = generator.sample(own, len(own))
            while left:
                count = generator.randint(*digits)
                # What would be too short for a string is taken in with the last one.
                count = len(left) if len(left) - count < digits[0] else count
                taken, left = left[:count], left[count:]
                files = tuple(path for utterance in taken for path in utterance.files)
                text = " ".join(utterance.text for utterance in taken)
                found.append(Utterance(f"{speaker}-{len(found)}", files, text, speaker))
    return found


class SpokenWords(Recordings):
    """Speech that is computed (data/audio/synthesis.py), written to the cache once: no corpus, no download.

    400 recordings of two to five words by eight speakers, and 40 by two others each for validation and test; with
    unit=label a word each.
    """

    COUNTS = (("train", 400, range(8)), ("val", 40, range(8, 10)), ("test", 40, range(10, 12)))

    def __init__(self, *, root: str = "", **options: Any) -> None:
        super().__init__(**options)

    def utterances(self) -> dict[str, list[Utterance]]:
        is_single = self.unit == "label"
        folder = self.cache / f"speech_sample-{synthesis.VERSION}" / ("words" if is_single else "sentences")
        found: dict[str, list[Utterance]] = {}
        seed = 0
        for split, count, speakers in self.COUNTS:
            found[split] = []
            for i in range(count):
                seed += 1
                speaker = speakers[i % len(speakers)]
                generator = np.random.default_rng(seed)
                words = generator.choice(synthesis.WORDS, 1 if is_single else generator.integers(2, 6)).tolist()
                path = folder / f"{split}-{i}.wav"
                if not path.is_file():
                    require_writable(folder)
                    write(path, synthesis.synthesise(words, speaker, seed)[0], synthesis.RATE)
                found[split].append(Utterance(path.stem, (path,), " ".join(words), str(speaker)))
        return found

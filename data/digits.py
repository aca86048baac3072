"""Recorded digits, single or in strings, and synthetic words."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.audio import synthesis
from data.audio.fbank import write
from data.audio.feature_table import Utterance
from data.download import fetch, require_writable, unpack_archive
from data.speech import Recordings

SPLIT_SEED = 1234  # the seed of a run does not change the splits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class SpokenDigits(Recordings):
    """The Free Spoken Digit Dataset (Jackson et al.): 3,000 digits of six speakers, single or concatenated.

    root: folder with fsdd/, which contains recordings/ or the archive; downloaded if absent.
    speakers: the speakers of `val` and `test`; the others are for training. If val has none, validation uses the
        recordings 0 to 4 of the training speakers. null: the official test set, recordings 0 to 4 of all speakers, and
        recordings 5 to 9 for validation.
    digits: the least and largest number of digits in a string of one speaker; null for single digits.
    repeats: the number of training strings with each recording; in validation and test it is 1.
    """

    def __init__(
        self,
        *,
        url: str,
        archive: str,
        speakers: Mapping[str, Sequence[str]] | None = None,
        digits: Sequence[int] | None = None,
        repeats: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.url, self.archive = url, archive
        if speakers is not None and not are_speakers(speakers):
            raise ValueError(
                f"data.speakers={speakers} must name different speakers for val and test, or be null: type "
                "'data.speakers={val: [theo], test: [yweweler]}'"
            )
        self.speakers = None if speakers is None else {split: {*names} for split, names in speakers.items()}
        lengths = list(digits) if isinstance(digits, Sequence) else []
        whole = len(lengths) == 2 and all(type(n) is int for n in lengths) and 1 <= lengths[0] <= lengths[1]
        if digits is not None and not whole:
            raise ValueError(f"data.digits={digits} must be two whole numbers, such as [3,7], or null")
        self.digits, self.repeats = lengths or None, repeats

    def utterances(self) -> dict[str, list[Utterance]]:
        folder = self.root / "fsdd"
        if not (folder / "recordings").is_dir():
            archive = fetch(folder / self.archive, self.url)
            folder = unpack_archive(archive, self.cache / "fsdd" / str(archive.stat().st_size), (".wav",))
        names = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
        splits: dict[str, list[Utterance]] = {"train": [], "val": [], "test": []}
        speakers = set()
        for path in sorted(folder.rglob("recordings/*.wav")):
            if match := names.fullmatch(path.name):
                digit, speaker, number = int(match[1]), match[2], int(match[3])
                speakers.add(speaker)
                if self.speakers is None:
                    split = "test" if number < 5 else "val" if number < 10 else "train"
                else:
                    other = "val" if number < 5 and not self.speakers["val"] else "train"
                    split = next((split for split, known in self.speakers.items() if speaker in known), other)
                splits[split].append(Utterance(path.stem, (path,), DIGITS[digit], speaker))
        if not speakers:
            raise ValueError(f"{folder} has no recordings/DIGIT_SPEAKER_NUMBER.wav: put the corpus there again")
        for split, known in (self.speakers or {}).items():
            if unknown := sorted(known - speakers):
                raise ValueError(f"data.speakers.{split}: {unknown[0]!r} is none of {', '.join(sorted(speakers))}")
        if empty := [split for split, own in splits.items() if not own]:
            raise ValueError(f"data.speakers leaves no speaker for {empty[0]}: there are {', '.join(sorted(speakers))}")
        if self.digits is None:
            return splits
        return {
            split: strings(recordings, self.digits, self.repeats if split == "train" else 1)
            for split, recordings in splits.items()
        }


def are_speakers(speakers: Any) -> bool:
    """Whether it has lists of names for `val` and `test` without a common name."""
    lists = [*speakers.values()] if isinstance(speakers, Mapping) and {*speakers} == {"val", "test"} else [""]
    if not all(isinstance(names, Sequence) and not isinstance(names, str) for names in lists):
        return False
    return all(isinstance(name, str) for names in lists for name in names) and not {*lists[0]} & {*lists[1]}


def strings(recordings: Iterable[Utterance], digits: Sequence[int], repeats: int) -> list[Utterance]:
    """Random strings of each speaker's recordings, with lengths in `digits`; each recording occurs `repeats` times."""
    by_speaker: dict[str, list[Utterance]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    found: list[Utterance] = []
    for speaker, own in sorted(by_speaker.items()):
        generator = random.Random(f"{SPLIT_SEED} {speaker}")  # speakers have different strings
        if len(own) < digits[0]:
            raise ValueError(f"data.digits={list(digits)}: {speaker} has only {len(own)} recordings in a split")
        for _ in range(repeats):
            left = generator.sample(own, len(own))
            while left:
                count = generator.randint(*digits)
                # A rest that is too short for a string becomes part of this one.
                count = len(left) if len(left) - count < digits[0] else count
                taken, left = left[:count], left[count:]
                files = tuple(path for utterance in taken for path in utterance.files)
                text = " ".join(utterance.text for utterance in taken)
                found.append(Utterance(f"{speaker}-{len(found)}", files, text, speaker))
    return found


class SpokenWords(Recordings):
    """Synthetic speech (data/audio/synthesis.py), written to the cache once: no corpus, no download.

    Training has 400 recordings of two to five words by eight speakers, validation and test 40 each by two others. With
    unit=label a recording is one word.
    """

    COUNTS = (("train", 400, range(8)), ("val", 40, range(8, 10)), ("test", 40, range(10, 12)))

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

"""Recordings of others: listed in manifests, LibriSpeech, Speech Commands, and what lies on the hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.audio.fbank import Part
from data.audio.feature_table import Utterance
from data.download import NO_NETWORK, fetch, lock, require_writable, unpack_archive
from data.speech import Recordings
from data.text.lines import decode, lines_of


class Manifest(Recordings):
    """Recordings listed in files of JSON, a line each: {"audio": PATH, "text": TEXT, "speaker": NAME}.

    train, val, test: these files, below root or paths; PATH is relative to the file that names it. speaker may be left
    out. "offset" and "duration", in seconds, name a part of the file, as in NeMo's manifests: without offset from the
    start, without duration (or with null or 0) to the end. "audio_filepath" is "audio", as there. A key that would mean
    another sound, such as "channel", is refused, and one with a number that is not known to be harmless; any other is
    ignored.
    """

    def __init__(self, *, root: str, train: str, val: str, test: str, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.names = {"train": train, "val": val, "test": test}
        for split, name in self.names.items():
            if not isinstance(name, str):
                raise ValueError(f"data.{split}={name} must be a file of JSON lines: type data.{split}=FILE.jsonl")

    def utterances(self) -> dict[str, list[Utterance]]:
        found = {split: read_manifest(self.locate(split, name)) for split, name in self.names.items()}
        if empty := next((split for split, own in found.items() if not own), None):
            raise ValueError(f"data.{empty}={self.names[empty]} lists no recording: a line is {EXAMPLE}")
        return found

    def locate(self, split: str, name: str) -> Path:
        for path in (self.root / name, Path(name).expanduser()):
            if path.is_file():
                return path
        raise FileNotFoundError(f"data.{split}={name}: there is no such file, neither in {self.root} nor here")


def read_manifest(path: Path) -> list[Utterance]:
    """What a manifest lists; ValueError with the line of the first thing that is not so."""
    found = []
    for number, line in enumerate(lines_of(decode(path.read_bytes(), path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no JSON ({error}): a line is {EXAMPLE}") from error
        where = f"{path}:{number}"
        if isinstance(row, dict) and row.get("audio_filepath") is not None:
            if row.get("audio") not in (None, row["audio_filepath"]):
                raise ValueError(f"{where}: 'audio' and 'audio_filepath' are two files: leave one of them out")
            row["audio"] = row["audio_filepath"]
        for key in ("audio", "text"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or re.search("[\ud800-\udfff\0]", value):
                raise ValueError(f"{where}: {key!r} is no text, but {value!r:.60}: a line is {EXAMPLE}")
        if not row["audio"].strip():
            raise ValueError(f"{where}: 'audio' is empty: name the file of the recording; a line is {EXAMPLE}")
        name = Path(row["audio"]).expanduser() if row["audio"].startswith("~/") else row["audio"]
        audio, part = path.parent / name, part_of(row, where)
        found.append(Utterance(f"{path.stem}-{number}", (audio,), row["text"], str(row.get("speaker", "")), part=part))
    return found


def part_of(row: Mapping[str, Any], where: str) -> Part:
    """The part of its file that a line of a manifest names; ValueError for a key that may mean another sound."""
    values = {"offset": 0.0, "duration": 0.0, "rate": 0}
    for key, value in row.items():
        words = re.sub("(?<=[a-z])(?=[A-Z])", "_", key).lower().replace("-", "_").split("_")
        if value is None or words[-1] == "id":
            continue
        if key in ("offset", "duration") or "_".join(words) in RATES:
            name = key if key in values else "rate"
            unit = "samples a second" if name == "rate" else "seconds"
            if type(value) not in (int, float) or not 0 <= value <= MOST:
                raise ValueError(f"{where}: {key!r} must be {unit}, a number from 0 on, not {value!r:.60}")
            values[name] = value
        elif is_part(words, value):
            raise ValueError(
                f'{where}: {key!r} may change the sound, and is not read. For a part of a file type "offset" and '
                '"duration" in seconds; for anything else write a file of its own, or leave the key out'
            )
    return Part(**values)


def is_part(words: Sequence[str], value: Any) -> bool:
    """Whether a key of these words may say what is heard of a file, or how."""
    found = {*words}
    if "".join(words) in COUNTS:
        return False
    if found & BOUNDS or words[0] in CHANGES or found <= ALONE:
        return True
    if not has_number(value):
        return False
    return not found & (WHOLES if found & LENGTHS else HARMLESS)


def has_number(value: Any, depth: int = 3) -> bool:
    """Whether it is a number, or a list with one, or with lists of them."""
    if isinstance(value, list):
        return depth > 0 and any(has_number(item, depth - 1) for item in value)
    return type(value) in (int, float)


EXAMPLE = '{"audio": "a/1.wav", "text": "what is said", "speaker": "anna"}'
# Keys of manifests that say what is heard of a file: one of these words among those of a key, before all others, or no
# other word.
BOUNDS = {
    *("offset", "offsets", "ofs", "start", "starttime", "begin", "end", "endtime", "stop", "onset", "trim", "crop"),
    *("timestamp", "timestamps", "interval", "intervals", "span", "spans", "seek", "chan", "channel", "channels"),
}
CHANGES = {"duration", "durations", "dur", "segment", "segments", "clip", "speed", "tempo", "pitch", "gain"}
ALONE = {
    *("from", "to", "in", "out", "st", "et", "ts", "te", "t0", "t1", "t", "time", "times", "range", "window", "region"),
    *("cut", "length", "len", "num", "samples", "frames", "ms", "sec", "secs", "seconds", "s"),
}
COUNTS = {"numchannels", "nchannels", "channelcount"}
# Keys with a number that changes no sound: one of these words among those of a key; for a length, what it is that of.
LENGTHS = {"duration", "durations", "dur", "length", "len", "samples", "frames", "ms", "sec", "secs", "seconds"}
WHOLES = {"total", "whole", "full", "original", "orig", "file", "recording", "audio", "wav", "text"}
HARMLESS = {
    *("text", "word", "words", "char", "chars", "token", "tokens", "pred", "label", "labels", "class", "emotion"),
    *("id", "ids", "uid", "idx", "index", "key", "utt", "uttid", "utterance", "line", "row", "session", "chapter"),
    *("book", "page", "speaker", "speakers", "spk", "age", "gender", "sex", "lang", "language", "accent", "dialect"),
    *("locale", "dataset", "corpus", "source", "domain", "split", "subset", "date", "year", "task", "taskname", "pnc"),
    *("itn", "answer", "wer", "cer", "score", "scores", "loss", "prob", "logprob", "confidence", "snr", "mos", "votes"),
    *("bitrate", "filesize", "size", "bits"),
}
RATES = ("rate", "sr", "fs", "samplerate", "sample_rate", "sampling_rate", "sample_rate_hertz", "sample_rate_hz")
MOST = 1e7  # seconds, or samples a second


class LibriSpeech(Recordings):
    """LibriSpeech (Panayotov et al., 2015): root/LibriSpeech/PART/SPEAKER/CHAPTER/*.flac, downloaded where absent.

    train, val, test: parts, as train-clean-100; several are joined by a plus.
    parts: {url, md5, utterances} of each part.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str,
        val: str,
        test: str,
        parts: Mapping[str, Mapping[str, Any]],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.names = {split: names.split("+") for split, names in (("train", train), ("val", val), ("test", test))}
        self.parts = parts
        for split, names in self.names.items():
            if unknown := [name for name in names if name not in parts]:
                raise ValueError(f"data.{split}={unknown[0]} is none of {', '.join(parts)}")

    def utterances(self) -> dict[str, list[Utterance]]:
        return {split: [u for name in names for u in self.part(name)] for split, names in self.names.items()}

    def part(self, name: str) -> list[Utterance]:
        folder = self.root / "LibriSpeech" / name
        if not folder.is_dir():
            known = self.parts[name]
            place = self.cache / "LibriSpeech" / name
            if not place.is_dir():
                archive = fetch(self.root / "LibriSpeech" / f"{name}.tar.gz", known["url"], known["md5"])
                unpack_archive(archive, place, (".flac", ".trans.txt"))
            folder = place / "LibriSpeech" / name
        found = []
        for transcripts in sorted(folder.glob("*/*/*.trans.txt")):
            for line in lines_of(decode(transcripts.read_bytes(), transcripts)):
                key, _, text = line.partition(" ")
                path = transcripts.parent / f"{key}.flac"
                if path.is_file():
                    found.append(Utterance(key, (path,), text, key.partition("-")[0]))
        if len(found) != self.parts[name]["utterances"]:
            expected = self.parts[name]["utterances"]
            raise ValueError(
                f"{folder} has {len(found):,} recordings with transcripts, {name} has {expected:,}: it is not whole"
            )
        return found


class HubSpeech(Recordings):
    """A set on the hub that is plain Parquet, with a column of sound and one of text.

    rows: by split, keywords of datasets.load_dataset. audio, text, speaker: the columns; speaker may be null.
    """

    def __init__(
        self,
        *,
        root: str = "",
        rows: Mapping[str, Mapping[str, Any]],
        audio: str = "audio",
        text: str = "text",
        speaker: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(rows, Mapping) or {*rows} != {"train", "val", "test"}:
            raise ValueError(f"data.rows={rows} must have the keywords of load_dataset for train, val and test")
        self.sets = rows
        self.columns = {"audio": audio, "text": text, "speaker": speaker}

    def utterances(self) -> dict[str, list[Utterance]]:
        return {split: self.split(rows) for split, rows in self.sets.items()}

    def split(self, rows: Mapping[str, Any]) -> list[Utterance]:
        """Each recording's bytes, as they are, in a file of the cache."""
        from datasets import Audio, load_dataset

        name = " ".join(map(str, rows.values()))
        try:
            dataset = load_dataset(**rows)
        except Exception as error:  # the hub's client raises what its layers raise
            reason = str(error).partition("\n")[0]
            raise ConnectionError(
                f"cannot get {name} from the hub: {reason}. Run the same command again. {NO_NETWORK}"
            ) from error
        for key, column in self.columns.items():
            if column is not None and column not in dataset.column_names:
                raise ValueError(f"data.{key}={column}: {name} on the hub has {', '.join(dataset.column_names)}")
        folder = self.cache / "hub" / dataset._fingerprint
        require_writable(folder)
        found = []
        with lock(folder):  # a second process waits here, and then finds what the first has written
            for number, row in enumerate(dataset.cast_column(self.columns["audio"], Audio(decode=False))):
                sound, text = row[self.columns["audio"]], row[self.columns["text"]]
                if not isinstance(text, str) or sound is None or sound["bytes"] is None:
                    raise ValueError(f"row {number} of {name} on the hub has no text, or no sound within it")
                path = folder / f"{number}{Path(sound['path'] or '').suffix}"
                if not path.is_file():
                    part = path.with_name(path.name + ".part")
                    part.write_bytes(sound["bytes"])
                    os.replace(part, path)
                speaker = str(row[self.columns["speaker"]]) if self.columns["speaker"] else ""
                found.append(Utterance(f"{name}-{number}", (path,), text, speaker))
        return found


class SpeechCommands(Recordings):
    """Speech Commands (Warden, 2018): a second of one word each; the official lists say what validation and test are.

    root: of speech_commands/, which holds the words' folders or the archive; it is downloaded where absent.
    words: those that are told apart; null for all.
    """

    def __init__(
        self, *, root: str, url: str, sha256: str, archive: str, words: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.folder = Path(root).expanduser() / "speech_commands"
        self.url, self.sha256, self.archive = url, sha256, archive
        self.words = None if words is None else [*words]

    def utterances(self) -> dict[str, list[Utterance]]:
        folder = self.folder
        if not (folder / "testing_list.txt").is_file():
            place = self.cache / "speech_commands" / self.sha256[:16]
            if not place.is_dir():
                unpack_archive(fetch(folder / self.archive, self.url, self.sha256), place, (".wav", ".txt"))
            folder = place
        lists = {
            split: {*(folder / f"{name}_list.txt").read_text(encoding="utf-8-sig").split()}
            for split, name in (("val", "validation"), ("test", "testing"))
        }
        words = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
        if unknown := sorted({*(self.words or ())} - {*words}):
            raise ValueError(f"data.words: {unknown[0]!r} is none of {', '.join(words)}")
        found: dict[str, list[Utterance]] = {"train": [], "val": [], "test": []}
        for word in self.words or words:
            for path in sorted((folder / word).glob("*.wav")):
                key = f"{word}/{path.name}"
                split = next((split for split, names in lists.items() if key in names), "train")
                found[split].append(Utterance(key, (path,), word, path.name.partition("_")[0]))
        return found

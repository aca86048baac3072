"""Speech corpora: JSON manifests, LibriSpeech, Speech Commands, and datasets on the Hugging Face hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.audio.fbank import Part
from data.audio.feature_table import Utterance
from data.cache import lock, require_writable
from data.download import fetch, find, find_below, load_from_hub, read_bytes, unpack_archive
from data.speech import Recordings
from data.text.lines import decode, lines_of


class Manifest(Recordings):
    """Recordings listed in files of JSON lines: {"audio": PATH, "text": TEXT, "speaker": NAME}.

    train, val, test: these files, below root or paths. PATH is relative to the file that names it; speaker is optional.
    As in NeMo's manifests, "offset" and "duration" in seconds select a part of the file (defaults, also for null or 0:
    the start, and up to the end), and "audio_filepath" is the same as "audio". Keys that may change the sound, such as
    "channel", and unknown keys with numbers are refused; others are ignored.
    """

    def __init__(self, *, train: str, val: str, test: str, **options: Any) -> None:
        super().__init__(**options)
        self.names = {"train": train, "val": val, "test": test}
        for split, name in self.names.items():
            if not isinstance(name, str):
                raise ValueError(f"data.{split}={name} must be a file of JSON lines: type data.{split}=FILE.jsonl")

    def utterances(self) -> dict[str, list[Utterance]]:
        advice = f"type the path of a file of JSON lines, such as {EXAMPLE}"
        paths = {split: find_below(self.root, split, name, advice, find) for split, name in self.names.items()}
        splits = {split: read_manifest(path) for split, path in paths.items()}
        for split, own in splits.items():
            if not own:
                raise ValueError(f"data.{split}={self.names[split]} lists no recording: a line is {EXAMPLE}")
        return splits


def read_manifest(path: Path) -> list[Utterance]:
    """The recordings of a manifest; ValueError with the first wrong line."""
    found = []
    for number, line in enumerate(lines_of(decode(read_bytes(path), path)), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}): a line is {EXAMPLE}") from error
        if isinstance(row, dict) and row.get("audio_filepath") is not None:
            if row.get("audio") not in (None, row["audio_filepath"]):
                raise ValueError(f"{where}: 'audio' and 'audio_filepath' name two files: leave one out")
            row["audio"] = row["audio_filepath"]
        for key in ("audio", "text"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or re.search("[\ud800-\udfff\0]", value):
                raise ValueError(f"{where}: {key!r} must be a text, not {value!r:.60}: a line is {EXAMPLE}")
        if not row["audio"].strip():
            raise ValueError(f"{where}: 'audio' is empty: name the file of the recording; a line is {EXAMPLE}")
        name = Path(row["audio"]).expanduser() if row["audio"].startswith("~/") else row["audio"]
        audio, part = path.parent / name, part_of(row, where)
        found.append(Utterance(f"{path.stem}-{number}", (audio,), row["text"], str(row.get("speaker", "")), part=part))
    return found


def part_of(row: Mapping[str, Any], where: str) -> Part:
    """The part of a file that a manifest's line selects; ValueError for other keys that may change the sound."""
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
    """Whether a key with these words may change the sound of a recording."""
    own = {*words}
    if "".join(words) in COUNTS:
        return False
    if own & BOUNDS or words[0] in CHANGES or own <= ALONE:
        return True
    return has_number(value) and not own & (WHOLES if own & LENGTHS else HARMLESS)


def has_number(value: Any, depth: int = 3) -> bool:
    """Whether it is a number, or contains one in nested lists."""
    if isinstance(value, list):
        return depth > 0 and any(has_number(item, depth - 1) for item in value)
    return type(value) in (int, float)


EXAMPLE = '{"audio": "a/1.wav", "text": "the transcript", "speaker": "anna"}'
# Words in keys that may change the sound: anywhere in the key (BOUNDS), as its first word (CHANGES), or if the key has
# no other words (ALONE).
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
# A number does not change the sound if its key contains one of HARMLESS or, for a length, one of WHOLES.
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
    """LibriSpeech (Panayotov et al., 2015): root/LibriSpeech/PART/SPEAKER/CHAPTER/*.flac, downloaded if absent.

    train, val, test: parts, such as train-clean-100, or several with + between.
    parts: {url, md5, utterances} of each part.
    """

    def __init__(
        self, *, train: str, val: str, test: str, parts: Mapping[str, Mapping[str, Any]], **options: Any
    ) -> None:
        super().__init__(**options)
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
                f"{folder} has {len(found):,} recordings with transcripts, {name} has {expected:,}: it is not complete"
            )
        return found


class HubSpeech(Recordings):
    """A Parquet dataset on the hub with columns of sound and text.

    rows: for each split, keywords of datasets.load_dataset. audio, text, speaker: the columns; speaker may be null.
    """

    def __init__(
        self,
        *,
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
        """Writes each recording's bytes to a file of the cache."""
        from datasets import Audio

        name = " ".join(map(str, rows.values()))
        dataset = load_from_hub(rows)
        for key, column in self.columns.items():
            if column is not None and column not in dataset.column_names:
                raise ValueError(f"data.{key}={column}: {name} on the hub has {', '.join(dataset.column_names)}")
        folder = self.cache / "hub" / dataset._fingerprint
        require_writable(folder)
        found = []
        with lock(folder):
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
    """Speech Commands (Warden, 2018): recordings of one word and one second, with the official splits.

    root: folder with speech_commands/, which contains the words' folders or the archive; downloaded if absent.
    words: the classes; null for all.
    """

    def __init__(
        self, *, url: str, sha256: str, archive: str, words: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.url, self.sha256, self.archive = url, sha256, archive
        self.words = None if words is None else [*words]

    def utterances(self) -> dict[str, list[Utterance]]:
        folder = self.root / "speech_commands"
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

"""The corpora of recordings: their layouts, archives and splits."""

import io
import json
import shutil
import struct
import tarfile

import numpy as np
import pytest
import soundfile
from conftest import real_data
from test_fbank import RATE, said, write

from data import digits
from data.audio.fbank import Frontend, read
from data.audio.feature_table import Utterance
from data.digits import DIGITS, SpokenDigits, SpokenWords, strings
from data.spoken import HubSpeech, LibriSpeech, Manifest, SpeechCommands

# The corpora


def test_a_manifest_lists_recordings(tmp_path):
    write(tmp_path / "sound/a.wav")
    row = {"audio": "sound/a.wav", "text": "ami oso", "speaker": "anna"}
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" + json.dumps(row) + "\r\n\n", encoding="utf-8")
    options = {"root": str(tmp_path), "cache": str(tmp_path / "cache"), "rate": RATE, "num_mels": 24}
    data = Manifest(train="train.jsonl", val=str(tmp_path / "dev.jsonl"), test="test.jsonl", **options)
    (found,) = data.utterances()["train"]
    assert found == Utterance("train-1", (tmp_path / "sound/a.wav",), "ami oso", "anna")
    data.setup()
    with pytest.raises(FileNotFoundError, match=r"data\.train=none.jsonl is neither in .* nor here; .*JSON lines"):
        Manifest(train="none.jsonl", val="dev.jsonl", test="test.jsonl", **options).utterances()
    with pytest.raises(ValueError, match=r"data\.val=None must be a file of JSON lines"):
        Manifest(train="train.jsonl", val=None, test="test.jsonl", **options)
    for content, message in (
        ("{", r"bad.jsonl:1: not JSON"),
        ('{"audio": "a.wav"}', "bad.jsonl:1: 'text' must be a text, not None"),
        ('{"audio": "a.wav", "text": 5}', "'text' must be a text, not 5"),
        ('{"audio": "a.wav", "text": "\\ud800"}', "'text' must be a text"),
        ("\n[1]", "bad.jsonl:2: 'audio' must be a text"),
        ("", r"data\.train=bad.jsonl lists no recording: a line is"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            Manifest(train="bad.jsonl", val="dev.jsonl", test="test.jsonl", **options).utterances()
    (tmp_path / "bad.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        Manifest(train="bad.jsonl", val="dev.jsonl", test="test.jsonl", **options).utterances()


def listing(folder, *rows, **options):
    """A manifest of these lines, as data of 8 kHz whose splits are all the same."""
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = dict.fromkeys(("train", "val", "test"), "m.jsonl")
    return Manifest(root=str(folder), cache=str(folder / "cache"), **{"rate": RATE, "num_mels": 24} | names | options)


@pytest.mark.parametrize("rate", [RATE, 16000])
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_parts_of_a_recording_are_heard_as_files_of_their_own(tmp_path, rate, kind):
    wave = np.random.default_rng(0).normal(0, 0.1, (3 * rate, 2)).astype(np.float32)
    write(tmp_path / f"long.{kind}", wave, rate)
    spans = [(0, 1.0), (0.5, 0.25), (1.25, None), (2.0, 0), (2.5, 0.54), (None, 0.75), (0.0, 3.0)]
    rows = []
    for i, (offset, duration) in enumerate(spans):
        start = round((offset or 0) * rate)
        stop = start + round(duration * rate) if duration else len(wave)
        own = soundfile.read(tmp_path / f"long.{kind}", start=start, stop=min(stop, len(wave)))[0]
        write(tmp_path / f"{i}.wav", own, rate)
        part = {"audio_filepath": f"long.{kind}", "offset": offset, "duration": duration, "text": f"part {i}"}
        rows += [part, {"audio": f"{i}.wav", "text": f"part {i}"}]
    data = listing(tmp_path, *rows, speeds=[0.9, 1.0], noise=None)
    data.setup()
    for split, count in (("train", 4 * len(spans)), ("val", 2 * len(spans))):
        recorded = data.splits[split]
        assert len(recorded) == count
        for i in range(0, count, 2):
            (_, text, part), (_, other, own) = recorded[i], recorded[i + 1]
            assert text == other
            assert part.shape == own.shape
            assert np.allclose(part, own, atol=0.02)  # the file of a part is rounded to 16 bits once more
    assert len({recorded[i][2].tobytes() for i in range(0, count, 2)}) == len(spans)


def test_a_part_has_features_of_its_own_in_the_cache(tmp_path):
    write(tmp_path / "a.wav", np.concatenate([said(), said("umi")]))
    first, second = ({"audio": "a.wav", "text": "x", "offset": offset, "duration": 0.3} for offset in (0, 0.4))
    frames = []
    for row in (first, second, {"audio": "a.wav", "text": "x"}, first):
        data = listing(tmp_path, row)
        data.setup()
        frames.append(data.splits["train"][0][2])
    assert not np.array_equal(frames[0], frames[1])
    assert len(frames[2]) > len(frames[0]) == len(frames[1])
    assert np.array_equal(frames[0], frames[3])


def test_parts_that_a_file_does_not_have_are_left_out_and_counted(tmp_path, caplog):
    write(tmp_path / "a.wav", np.ones(RATE, np.float32) / 4)
    fits = [{}, {"duration": 1.09}, {"offset": 0.5, "duration": 0.5}, {"sample_rate": RATE, "channel": None}]
    absent = [{"offset": 1}, {"offset": 1.0, "duration": 0.05}, {"offset": 0.5, "duration": 1}, {"duration": 3000}]
    absent += [{"offset": 1e7}, {"duration": 1e-9}, {"sr": 16000}, {"offset": 0.995}]
    data = listing(tmp_path, *({"audio": "a.wav", "text": "x"} | part for part in fits + absent))
    data.setup()
    assert len(data.splits["train"]) == len(fits)
    assert "7 left out, damaged" in caplog.text
    assert "a.wav is 1 s long: no part begins at 1 s" in caplog.text
    assert "1 left out, shorter than a frame of 25 ms:" in caplog.text
    assert "a.wav from 0.995 s on" in caplog.text
    with pytest.raises(ValueError, match=r"none of 1 recordings can be .*no part goes from 0.5 s to 1.7 s"):
        listing(tmp_path, {"audio": "a.wav", "text": "x", "offset": 0.5, "duration": 1.2}).setup()


@pytest.mark.parametrize("key", ["offset", "duration", "sample_rate"])
@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), "1.0", True, False, [1], {}, 10**400])
def test_offsets_durations_and_rates_must_be_numbers(tmp_path, key, value):
    row = {"audio": "a.wav", "text": "x", key: value}
    with pytest.raises(ValueError, match=rf"m.jsonl:1: '{key}' must be .*, a number from 0 on, not"):
        listing(tmp_path, row).utterances()


REFUSED = (
    "channel",
    "start",
    "end",
    "begin",
    "stop",
    "speed",
    "start_time",
    "endTime",
    "Offset",
    "frame_offset",
    "segment",
    *("starttime", "endtime", "from", "to", "timestamp", "timestamps", "interval", "span", "range", "t0", "t1", "ts"),
    *("te", "st", "et", "in", "out", "offsets", "durations", "ofs", "num_samples", "length", "chan", "time", "window"),
    *("region", "seek", "cut", "audio_channel", "source_duration", "whatever"),
)


@pytest.mark.parametrize("key", [*REFUSED, "offset_ms", "duration_ms"])
def test_keys_that_may_change_the_sound_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=rf'm.jsonl:1: {key!r} may change the sound.*"offset" and "duration"'):
        listing(tmp_path, {"audio": "a.wav", "text": "x", key: 1}).utterances()


@pytest.mark.parametrize(
    ("key", "value"),
    [("range", "1.0-2.5"), ("from_time", "3"), ("timestamp", [0, 1.5]), ("part", [[0.5, 1]]), ("audio_time", 2.5)],
)
def test_parts_in_other_forms_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"m.jsonl:1: {key!r} may change the sound.*leave the key out"):
        listing(tmp_path, {"audio": "a.wav", "text": "x", key: value}).utterances()


def test_numbers_that_do_not_change_the_sound_are_ignored(tmp_path):
    row = {"speaker": 3, "spk": 4, "age": 30, "wer": 0.5, "pred_text": "y", "score": -1.5, "num_channels": 2}
    row |= {"total_duration": 3.5, "text_length": 5, "scores": [1, 2.5], "up_votes": 2, "utt_id": 1, "noisy": True}
    row |= {"target_lang": "te", "words": [{"word": "x", "start": 0.5}], "note": "from here", "accent": ""}
    row["tree"] = json.loads("[" * 300 + "]" * 300)
    (found,) = listing(tmp_path, {"audio": "a.wav", "text": "x"} | row).utterances()["train"]
    assert found == Utterance("m-1", (tmp_path / "a.wav",), "x", "3")


def test_the_path_of_a_recording_is_read_from_either_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for row, path in (
        ({"audio_filepath": None, "audio": "a.wav"}, tmp_path / "a.wav"),
        ({"audio_filepath": "a.wav", "audio": None}, tmp_path / "a.wav"),
        ({"audio": "~/a.wav"}, tmp_path / "home/a.wav"),
        ({"audio": "~a.wav"}, tmp_path / "~a.wav"),
    ):
        (found,) = listing(tmp_path, row | {"text": "x"}).utterances()["train"]
        assert found.files == (path,)
    for row in ({"audio": ""}, {"audio": " "}, {"audio_filepath": ""}):
        with pytest.raises(ValueError, match=r"m.jsonl:1: 'audio' is empty: name the file"):
            listing(tmp_path, row | {"text": "x"}).utterances()


def test_other_keys_of_a_manifest_are_ignored(tmp_path):
    row = {"audio_filepath": "a.wav", "text": "x", "lang": "en", "id": 7, "segment_id": "3", "start": None, "pnc": "no"}
    (found,) = listing(tmp_path, row | {"audio": "a.wav"}).utterances()["train"]
    assert found == Utterance("m-1", (tmp_path / "a.wav",), "x", "")
    with pytest.raises(ValueError, match=r"m.jsonl:1: 'audio' and 'audio_filepath' name two files"):
        listing(tmp_path, row | {"audio": "b.wav"}).utterances()


PARTS = {
    name: {"url": f"https://localhost/{name}", "md5": None, "utterances": 2} for name in ("train-a", "dev", "test")
}


def librispeech(root, **options):
    return LibriSpeech(
        **{
            "root": str(root),
            "cache": str(root / "cache"),
            "train": "train-a",
            "val": "dev",
            "test": "test",
            "parts": PARTS,
        }
        | options
    )


def write_part(root, part):
    folder = root / "LibriSpeech" / part / "19/198"
    for i in range(2):
        write(folder / f"19-198-000{i}.flac", rate=16000)
    (folder / "19-198.trans.txt").write_text("19-198-0000 AMI OSO\n19-198-0001 UMI\n")


def test_librispeech_is_read_from_its_folders(tmp_path):
    for part in PARTS:
        write_part(tmp_path, part)
    found = librispeech(tmp_path).utterances()
    first = found["train"][0]
    assert (first.id, first.text, first.speaker) == ("19-198-0000", "AMI OSO", "19")
    assert first.files == (tmp_path / "LibriSpeech/train-a/19/198/19-198-0000.flac",)
    assert len(librispeech(tmp_path, train="train-a+dev").utterances()["train"]) == 4
    with pytest.raises(ValueError, match=r"data\.val=dev-noisy is none of train-a, dev, test"):
        librispeech(tmp_path, val="dev-noisy")
    transcripts = tmp_path / "LibriSpeech/dev/19/198/19-198.trans.txt"
    transcripts.write_text("19-198-0000 AMI OSO\n")
    with pytest.raises(ValueError, match="has 1 recordings with transcripts, dev has 2: it is not complete"):
        librispeech(tmp_path).utterances()


def test_librispeech_is_unpacked_from_its_archive(tmp_path):
    for part in PARTS:
        write_part(tmp_path / "packed", part)
        archive = tmp_path / "LibriSpeech" / f"{part}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / "packed/LibriSpeech", "LibriSpeech")
    shutil.rmtree(tmp_path / "packed")
    for _ in range(2):  # unpacked, and found unpacked
        found = librispeech(tmp_path).utterances()
        assert found["test"][0].files[0].is_file()
        assert tmp_path / "cache" in found["test"][0].files[0].parents
    archive.write_bytes(archive.read_bytes()[:300])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"test.tar.gz is damaged"):
        librispeech(tmp_path).utterances()


def test_an_archive_that_is_unpacked_is_not_needed(tmp_path):
    for part in PARTS:
        write_part(tmp_path / "cache/LibriSpeech" / part, part)
    assert len(librispeech(tmp_path).utterances()["test"]) == 2
    (tmp_path / "cache/LibriSpeech/test/LibriSpeech/test/19/198/19-198-0001.flac").unlink()
    with pytest.raises(ValueError, match="has 1 recordings with transcripts, test has 2: it is not complete"):
        librispeech(tmp_path).utterances()


def test_a_system_error_is_not_blamed_on_a_recording(tmp_path, monkeypatch):
    utterance = Utterance("a", (write(tmp_path / "a.wav"),), "a", "")

    def no_more(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("builtins.open", no_more)
    with pytest.raises(OSError, match="Too many open files"):
        read(utterance.files[0])


def test_an_archive_writes_nowhere_else(tmp_path):
    """Names that lead out, links and devices are not unpacked."""
    archive = tmp_path / "fsdd/fsdd.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as file:
        for name in ("../out_0_a_1.wav", "/tmp/sru-out_0_b_1.wav"):
            member = tarfile.TarInfo(name)
            member.size = 4
            file.addfile(member, io.BytesIO(b"RIFF"))
        link = tarfile.TarInfo("recordings/0_link_1.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(ValueError, match=r"fsdd.tar is damaged|has no recordings"):
        SpokenDigits(root=str(tmp_path), cache=str(tmp_path / "cache"), url="", archive="fsdd.tar").utterances()
    assert not (tmp_path / "cache/out_0_a_1.wav").exists()
    assert not list((tmp_path / "cache").rglob("*link*"))


def test_speech_commands_keep_the_official_lists(tmp_path):
    folder = tmp_path / "speech_commands"
    for word in ("yes", "no", "_background_noise_"):
        for i in range(3):
            write(folder / word / f"abc{i}_nohash_0.wav")
    (folder / "validation_list.txt").write_text("yes/abc1_nohash_0.wav\nno/abc1_nohash_0.wav\n")
    (folder / "testing_list.txt").write_text("yes/abc2_nohash_0.wav\nno/abc2_nohash_0.wav\n")
    options = {"root": str(tmp_path), "cache": str(tmp_path), "url": "", "sha256": "0" * 64, "archive": "a.tar.gz"}
    found = SpeechCommands(unit="label", **options).utterances()
    assert {split: [u.id for u in own] for split, own in found.items()} == {
        split: [f"{word}/abc{i}_nohash_0.wav" for word in ("no", "yes")]
        for i, split in enumerate(("train", "val", "test"))
    }
    assert {u.text for u in SpeechCommands(unit="label", words=["yes"], **options).utterances()["train"]} == {"yes"}
    with pytest.raises(ValueError, match=r"data\.words: 'maybe' is none of no, yes"):
        SpeechCommands(unit="label", words=["maybe"], **options).utterances()


def test_recordings_of_the_hub_are_written_down(tmp_path):
    from datasets import Dataset

    sound = io.BytesIO()
    soundfile.write(sound, said(), 16000, format="FLAC")
    rows = [
        {"audio": {"bytes": sound.getvalue(), "path": f"{i}.flac"}, "text": "AMI", "speaker_id": 7} for i in range(2)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "set.parquet")
    split = {
        "path": "parquet",
        "data_files": str(tmp_path / "set.parquet"),
        "split": "train",
        "cache_dir": str(tmp_path),
    }
    data = HubSpeech(
        rows=dict.fromkeys(("train", "val", "test"), split), speaker="speaker_id", cache=str(tmp_path / "cache")
    )
    found = data.utterances()["test"]
    assert [(u.text, u.speaker) for u in found] == [("AMI", "7")] * 2
    assert np.allclose(read(found[1].files[0])[0], said(), atol=1e-4)
    with pytest.raises(ValueError, match=r"data\.text=words: parquet .* on the hub has audio, text, speaker_id"):
        HubSpeech(
            rows=dict.fromkeys(("train", "val", "test"), split), text="words", cache=str(tmp_path / "cache")
        ).utterances()
    with pytest.raises(ValueError, match=r"data\.rows=.* for train, val and test"):
        HubSpeech(rows={"train": split}, cache=str(tmp_path / "cache"))
    nothing = {key: {"path": str(tmp_path / "nothing")} for key in ("train", "val", "test")}
    absent = HubSpeech(rows=nothing, cache=str(tmp_path / "cache"))
    with pytest.raises(ConnectionError, match=r"cannot get .*nothing from the hub"):
        absent.utterances()


def spoken_digits(root, **options):
    return SpokenDigits(**{"root": str(root), "cache": str(root / "cache"), "url": "", "archive": "fsdd.tar"} | options)


@pytest.fixture
def fsdd(tmp_path):
    """Twelve recordings each of three speakers, in an archive."""
    with tarfile.open(tmp_path / "fsdd.tar.xz", "w:xz") as file:
        for speaker in ("anna", "bob", "cleo"):
            for i in range(12):
                path = write(tmp_path / "now.wav", said()[: 1600 + i])
                file.add(path, f"digits-1.0/recordings/{i % 10}_{speaker}_{i}.wav")
    (tmp_path / "fsdd").mkdir()
    (tmp_path / "fsdd.tar.xz").rename(tmp_path / "fsdd/fsdd.tar.xz")
    return tmp_path


def test_spoken_digits_keep_the_official_test(fsdd):
    found = spoken_digits(fsdd).utterances()
    assert {split: len(own) for split, own in found.items()} == {"train": 6, "val": 15, "test": 15}
    assert {u.id.split("_")[2] for u in found["test"]} == {"0", "1", "2", "3", "4"}
    one = next(u for u in found["test"] if u.id.startswith("3_"))
    assert one.text == DIGITS[3]


def test_speakers_and_strings_of_digits(fsdd):
    data = spoken_digits(fsdd, speakers={"val": ["bob"], "test": ["cleo"]}, digits=[3, 5], repeats=4)
    found = data.utterances()
    assert {split: {u.speaker for u in own} for split, own in found.items()} == {
        "train": {"anna"},
        "val": {"bob"},
        "test": {"cleo"},
    }
    for split, times in (("train", 4), ("val", 1)):
        counts = {}
        for utterance in found[split]:
            names = [path.name for path in utterance.files]
            assert utterance.text.split() == [DIGITS[int(name[0])] for name in names]
            assert 3 <= len(names) < 8
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        assert len(counts) == 12
        assert {*counts.values()} == {times}
    assert found == data.utterances()
    orders = [[int(u.id.split("-")[1]), u.text] for own in found.values() for u in own if len(u.text.split()) > 3]
    assert len({text for _, text in orders}) == len(orders)  # of other speakers too
    with pytest.raises(ValueError, match=r"data\.speakers\.test: 'dora' is none of anna, bob, cleo"):
        spoken_digits(fsdd, speakers={"val": ["bob"], "test": ["dora"]}).utterances()
    with pytest.raises(ValueError, match=r"data\.speakers leaves no speaker for train"):
        spoken_digits(fsdd, speakers={"val": ["bob"], "test": ["cleo", "anna"]}).utterances()
    for options, message in (
        ({"digits": [3]}, "must be two whole numbers"),
        ({"digits": [5, 3]}, "must be two whole numbers"),
        ({"speakers": {"test": ["bob"]}}, "must name different speakers for val and test"),
        ({"speakers": {"val": ["bob"], "test": ["bob"]}}, "different speakers for val and test"),
        ({"speakers": {"val": "bob", "test": ["cleo"]}}, "must name different speakers for val and test"),
        ({"digits": 3}, "must be two whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            spoken_digits(fsdd, **options)


def test_a_string_is_heard_as_its_parts(fsdd):
    data = spoken_digits(fsdd, digits=[2, 2], rate=RATE, num_mels=24)
    (one, *_) = strings(data.utterances()["test"][:1], [1, 1], 1)
    data.setup()
    name, _, frames = data.splits["test"][0]
    parts = next(u for u in data.utterances()["test"] if u.id == name).files
    whole = np.concatenate([read(path)[0] for path in parts])
    assert np.allclose(frames, Frontend(rate=RATE, num_mels=24).frames(whole), rtol=2**-10)
    assert one.files


def test_synthetic_speech_is_written_once(tmp_path, monkeypatch):
    assert [(split, count) for split, count, _ in SpokenWords.COUNTS] == [("train", 400), ("val", 40), ("test", 40)]
    monkeypatch.setattr(SpokenWords, "COUNTS", [(split, 4, speakers) for split, _, speakers in SpokenWords.COUNTS])
    found = SpokenWords(cache=str(tmp_path)).utterances()
    assert {split: len(own) for split, own in found.items()} == {"train": 4, "val": 4, "test": 4}
    speakers = {split: {u.speaker for u in own} for split, own in found.items()}
    assert not speakers["train"] & speakers["test"]
    path = found["test"][0].files[0]
    first = path.read_bytes()
    assert SpokenWords(cache=str(tmp_path)).utterances() == found
    assert {len(u.text.split()) for u in SpokenWords(cache=str(tmp_path), unit="label").utterances()["val"]} == {1}
    assert path.read_bytes() == first


def test_the_real_digits(tmp_path):
    found = digits.SpokenDigits(
        root=str(real_data("fsdd")), cache=str(tmp_path), url="", archive="fsdd.tar"
    ).utterances()
    assert {split: len(own) for split, own in found.items()} == {"train": 2400, "val": 300, "test": 300}
    assert len({u.speaker for u in found["train"]}) == 6
    wave, rate, _ = read(found["test"][0].files[0])
    assert rate == 8000
    assert 0.1 < len(wave) / rate < 3
    with open(found["test"][0].files[0], "rb") as file:
        assert struct.unpack("<4s", file.read(4)) == (b"RIFF",)

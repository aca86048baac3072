"""Recordings: reading, features, symbols, the corpora's layouts, and what is damaged."""

import io
import json
import logging
import os
import shutil
import struct
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT

from data import digits, features, synthesis
from data.audio import Damaged, Frontend, StepStream, check_frontend, read, resampled
from data.digits import DIGITS, SpokenDigits, SpokenWords, strings
from data.features import Utterance, perturbed, prepared
from data.speech import Recordings
from data.spoken import HubSpeech, LibriSpeech, Manifest, SpeechCommands
from data.symbols import Symbols, frames_needed

REAL = ROOT.parent / "shared/data"
RATE = synthesis.RATE


def said(words="ami oso", speaker=3, seed=1):
    return synthesis.spoken(words.split(), speaker, seed)[0]


def write(path, wave=None, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, said() if wave is None else wave, rate)
    return path


class Listed(Recordings):
    """Those that a test gives."""

    def __init__(self, cache, **parts):
        options = {"rate": RATE, "num_mels": 24, "frames_per_batch": 600, "eval_frames_per_batch": 600}
        self.parts = {split: parts.pop(split) for split in ("train", "val", "test")}
        super().__init__(cache=str(cache), **options | parts)

    def utterances(self):
        return self.parts


@pytest.fixture
def listed(tmp_path):
    """listed(**options): six sentences to train on, two each for validation and test."""

    def make(**options):
        parts = {}
        for split, count in (("train", 6), ("val", 2), ("test", 2)):
            parts[split] = []
            for i in range(count):
                text = " ".join(synthesis.WORDS[i : i + 1 + i % 3])
                path = tmp_path / split / f"{i}.wav"
                write(path, said(text, i, i))
                parts[split].append(Utterance(f"{split}-{i}", (path,), text, str(i)))
        return Listed(tmp_path / "cache", **parts | options)

    return make


def test_the_sound_is_computed_as_before():
    wave, spans = synthesis.spoken(["ami", "sume"], 2, 7)
    assert wave.dtype == np.float32
    assert np.array_equal(wave, synthesis.spoken(["ami", "sume"], 2, 7)[0])
    assert not np.array_equal(wave[:2000], synthesis.spoken(["ami", "sume"], 3, 7)[0][:2000])
    assert 0.2 < np.abs(wave).max() <= 1
    (first, second), (third, last) = spans
    assert 0 < first < second < third < last < len(wave)
    # The sound is within the words.
    assert np.abs(wave[:first]).mean() < 0.2 * np.abs(wave[first:second]).mean()


# Reading


def test_sound_is_read_with_its_channels_mixed(tmp_path):
    stereo = np.stack([said(), 0.5 * said()], axis=1)
    wave, rate, channels = read(write(tmp_path / "a.wav", stereo))
    assert (rate, channels, wave.dtype) == (RATE, 2, np.float32)
    assert np.allclose(wave, stereo.mean(1), atol=1e-4)
    plain, _, channels = read(write(tmp_path / "a.flac"))
    assert channels == 1
    assert np.allclose(plain, said(), atol=1e-4)


def test_damaged_sound_is_told(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("RIFF or not")
    (tmp_path / "noise.raw").write_bytes(bytes(100))
    write(tmp_path / "short.wav", np.zeros(0, np.float32))
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), RATE, subtype="FLOAT")
    whole = write(tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    for name in ("empty.wav", "text.wav", "noise.raw", "short.wav", "nan.wav", "cut.flac", "missing.wav", "."):
        with pytest.raises(Damaged, match=str(tmp_path)):
            read(tmp_path / name)


def test_wav_files_that_lie_are_told(tmp_path):
    whole = write(tmp_path / "whole.wav").read_bytes()
    place = whole.index(b"data") + 4
    files = {
        "cut": whole[:-1000],
        "huge": whole[:place] + (0x7FFFEFFF).to_bytes(4, "little") + whole[place + 4 :],
        "slow": whole[:24] + (1).to_bytes(4, "little") + whole[28:],
    }
    for name, message in (("cut", "is cut: its header says"), ("huge", "is cut"), ("slow", "1 samples a second")):
        (tmp_path / f"{name}.wav").write_bytes(files[name])
        with pytest.raises(Damaged, match=message):
            read(tmp_path / f"{name}.wav")
    # What was written to a pipe does not know its end.
    (tmp_path / "piped.wav").write_bytes(whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4 :])
    assert len(read(tmp_path / "piped.wav")[0]) == len(said())
    soundfile.write(tmp_path / "loud.wav", np.full(100, 1e30, np.float32), RATE, subtype="FLOAT")
    with pytest.raises(Damaged, match="beyond 1000 times the loudest"):
        read(tmp_path / "loud.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(Damaged, match="no such file"):
        read(tmp_path / "pipe.wav")


# Features


def test_features_are_those_of_kaldi_s_definition():
    """By numpy, step by step: 25 ms frames without their mean, pre-emphasis, Povey's window, power, mel, logarithm."""
    wave = said()[:4000]
    size, step, bins = RATE // 40, RATE // 100, 24
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85
    frames = np.stack([wave[i : i + size] for i in range(0, len(wave) - size + 1, step)]).astype(np.float64) * 32768
    frames -= frames.mean(1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft((frames - 0.97 * before) * window, 256)) ** 2
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(RATE / 2), bins + 2)
    places = mel(np.arange(128) * RATE / 256)
    weights = np.stack(
        [
            np.clip(np.minimum((places - low) / (middle - low), (high - places) / (high - middle)), 0, None)
            for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False)
        ]
    )
    expected = np.log(np.maximum(power[:, :128] @ weights.T, np.finfo(np.float32).eps))
    found = Frontend(rate=RATE, num_mels=bins).frames(wave)
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("level", ["global", "running"])
@pytest.mark.parametrize(("rate", "chunk"), [(RATE, 800), (RATE, 37), (16000, 1600), (11025, 500)])
def test_a_stream_makes_the_steps_of_the_whole(level, rate, chunk):
    mean, deviation = np.full(24, 12, np.float32), np.full(24, 3, np.float32)
    frontend = Frontend(rate=RATE, num_mels=24, stack=3, level=level, mean=mean, deviation=deviation)
    wave = resampled(said(), RATE, rate)
    whole = StepStream(frontend, rate).accept(wave, is_last=True)
    stream = StepStream(frontend, rate)
    pieces = [stream.accept(wave[i : i + chunk], is_last=False) for i in range(0, len(wave), chunk)]
    pieces.append(stream.accept(wave[:0], is_last=True))
    assert whole.shape[1] == frontend.size == 72
    assert np.allclose(np.concatenate(pieces), whole, atol=1e-5)
    # What is learnt from, whole recordings, is what is heard.
    assert np.allclose(frontend.normalised(frontend.frames(resampled(wave, rate, RATE))), whole, atol=1e-5)


def test_levels_by_hand():
    frames = np.array([[4.0], [8.0], [6.0]], np.float32)
    options = {
        "rate": RATE,
        "num_mels": 1,
        "mean": np.array([2.0], np.float32),
        "deviation": np.array([2.0], np.float32),
    }
    assert Frontend(level="global", **options).normalised(frames).ravel().tolist() == [1, 3, 2]
    own = Frontend(level="recording", **options).normalised(frames).ravel()
    assert own == pytest.approx(np.array([-2, 2, 0]) / np.sqrt(8 / 3))
    running = [(4 - 64 / 31) / 2, (8 - 72 / 32) / 2, (6 - 78 / 33) / 2]  # 30 frames of 2 come first
    assert Frontend(level="running", **options).normalised(frames).ravel() == pytest.approx(running)
    assert Frontend(level="running", **options).normalised(frames[1:], (4.0, 1)).ravel() == pytest.approx(running[1:])


def test_a_frontend_that_cannot_be_is_refused():
    for options, message in (
        ({"rate": 100}, "data.rate=100 must be"),
        ({"num_mels": 1.5}, "data.num_mels=1.5"),
        ({"stack": 0}, "data.stack=0"),
        ({"num_mels": 128, "rate": 8000}, "data.num_mels=128 is too many for data.rate=8000"),
        ({"level": "none"}, "data.level=none must be one of global, running, recording"),
    ):
        with pytest.raises(ValueError, match=message):
            check_frontend(**{"rate": 16000, "num_mels": 80, "stack": 3, "level": "running"} | options)


def test_features_are_computed_once_and_read_back(tmp_path, monkeypatch, caplog):
    utterances = [Utterance(f"u{i}", (write(tmp_path / f"{i}.wav", said(seed=i)),), f"text {i}", "") for i in range(70)]
    frontend = Frontend(rate=RATE, num_mels=24)
    found = prepared(utterances, frontend, tmp_path / "cache", "train")
    assert len(found) == 70  # of two record batches
    for i in (0, 63, 64, 69):
        name, text, frames = found[i]
        assert (name, text) == (f"u{i}", f"text {i}")
        expected = frontend.frames(read(tmp_path / f"{i}.wav")[0])
        assert np.allclose(frames, expected, rtol=2**-10)
        assert found.sizes[i] == len(expected)
    every = np.concatenate([frontend.frames(read(u.files[0])[0]) for u in utterances])
    assert np.allclose(found.mean, every.mean(0), rtol=1e-4)
    assert np.allclose(found.deviation, every.std(0), rtol=1e-3)
    monkeypatch.setattr("data.features.write", lambda *_: pytest.fail("computed again"))
    assert prepared(utterances, frontend, tmp_path / "cache", "train").checksum == found.checksum
    # A cut file of the cache is not taken for whole.
    (place,) = (tmp_path / "cache/speech").glob("*/features.arrow")
    monkeypatch.undo()
    place.write_bytes(place.read_bytes()[:-100])
    assert len(prepared(utterances, frontend, tmp_path / "cache", "train")) == 70


def test_parts_that_are_computed_are_kept(tmp_path, monkeypatch):
    """Who breaks off goes on with the part that was begun."""
    utterances = [Utterance(f"u{i}", (write(tmp_path / f"{i}.wav", said(seed=i)),), "", "") for i in range(5)]
    frontend = Frontend(rate=RATE, num_mels=24)
    whole = prepared(utterances, frontend, tmp_path / "whole", "train")
    monkeypatch.setattr("data.features.PART", 2)
    compute, seen = features.features_of, []

    def breaks(utterance, frontend):
        seen.append(utterance.id)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return compute(utterance, frontend)

    monkeypatch.setattr("data.features.features_of", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepared(utterances, frontend, tmp_path / "cache", "train")
    seen.clear()
    monkeypatch.setattr("data.features.features_of", lambda *given: seen.append(given[0].id) or compute(*given))
    found = prepared(utterances, frontend, tmp_path / "cache", "train")
    assert sorted(seen) == ["u2", "u3", "u4"]
    assert found.checksum == whole.checksum
    assert np.allclose(found.mean, whole.mean)
    assert np.allclose(found.deviation, whole.deviation)
    assert all(np.array_equal(found[i][2], whole[i][2]) for i in range(5))


def test_a_damaged_cache_is_told(tmp_path):
    utterance = Utterance("a", (write(tmp_path / "a.wav"),), "a", "")
    frontend = Frontend(rate=RATE, num_mels=24)
    prepared([utterance], frontend, tmp_path / "cache", "train")
    (place,) = (tmp_path / "cache/speech").glob("*/features.arrow")
    content = bytearray(place.read_bytes())
    content[2000:2400] = b"\x7f" * 400
    place.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: `rm -r"):
        prepared([utterance], frontend, tmp_path / "cache", "train")[0]
    for content in ("[]", "null", "{}"):
        (place.parent / "meta.json").write_text(content)
        assert len(prepared([utterance], frontend, tmp_path / "cache", "train")) == 1


def test_another_file_has_other_features(tmp_path):
    utterance = Utterance("a", (write(tmp_path / "a.wav"),), "a", "")
    frontend = Frontend(rate=RATE, num_mels=24)
    first = prepared([utterance], frontend, tmp_path / "cache", "train")
    write(tmp_path / "a.wav", said("umi", 5))
    second = prepared([utterance], frontend, tmp_path / "cache", "train")
    assert not np.array_equal(first[0][2], second[0][2])
    louder = prepared([utterance._replace(gain=20.0)], frontend, tmp_path / "cache", "train")
    # Ten times the amplitude is ln(100) more of every energy that is well above the noise.
    loud = second[0][2] > 12
    assert np.allclose((louder[0][2] - second[0][2])[loud], np.log(100), atol=0.05)
    noisy = prepared([utterance._replace(noise=-40.0)], frontend, tmp_path / "cache", "train")
    # White noise a hundred times as strong as the sound: hardly anything of it is left.
    assert np.corrcoef(noisy[0][2].mean(1), second[0][2].mean(1))[0, 1] < 0.6
    assert noisy[0][2].mean() - second[0][2].mean() > 6
    faster = prepared([utterance._replace(speed=1.25)], frontend, tmp_path / "cache", "train")
    assert faster.sizes[0] == pytest.approx(second.sizes[0] / 1.25, abs=2)


def test_damaged_recordings_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "damaged.wav").write_text("no sound")
    files = {
        "good": write(tmp_path / "good.wav"),
        "damaged": tmp_path / "damaged.wav",
        "missing": tmp_path / "missing.wav",
        "short": write(tmp_path / "short.wav", said()[:100]),
        "other": write(tmp_path / "other.wav", rate=16000),
        "stereo": write(tmp_path / "stereo.wav", np.stack([said(), said()], axis=1)),
    }
    utterances = [Utterance(name, (path,), name, "") for name, path in files.items()]
    for _ in range(2):  # computed, and from the cache
        caplog.clear()
        found = prepared(utterances, Frontend(rate=RATE, num_mels=24), tmp_path / "cache", "val")
        assert [found[i][0] for i in range(len(found))] == ["good", "other", "stereo"]
        for part in ("val: 2 left out, damaged", "damaged.wav", "1 left out, shorter than a frame", "short.wav"):
            assert part in caplog.text
        assert "resampled to 8000 Hz: 1 of 16000 Hz" in caplog.text
        assert "1 of several channels" in caplog.text
    with pytest.raises(ValueError, match=r"data\.train: none of 2 recordings can be used: 2 left out, damaged"):
        prepared(utterances[1:3], Frontend(rate=RATE, num_mels=24), tmp_path / "cache", "train")


# Symbols


def test_symbols_read_and_write():
    characters = Symbols.learnt(["ab", "b c"], "characters", 0)
    assert characters.options["tokens"] == [" ", "a", "b", "c"]
    assert len(characters) == 5
    assert characters.encode("a bxc") == [2, 1, 3, 4]
    assert characters.unknown("a bxc") == {"x"}
    assert characters.decode([2, 0, 1, 3]) == "a b"
    words = Symbols.learnt(["one two", "two"], "words", 0)
    assert words.encode("two three one") == [2, 1]
    assert words.unknown("two three") == {"three"}
    assert words.decode([2, 1]) == "two one"
    assert words.piece(1) == " one"
    for symbols in (characters, words):
        again = Symbols(**symbols.options)
        assert again.decode([1, 2]) == symbols.decode([1, 2])
    with pytest.raises(ValueError, match="all empty"):
        Symbols.learnt(["", ""], "characters", 0)


def test_subwords_read_and_write():
    texts = ["the rain in spain stays mainly in the plain"] * 3
    symbols = Symbols.learnt(texts, "bpe", 290)
    assert len(symbols) == 290
    numbers = symbols.encode("in the rain")
    assert 0 not in numbers  # the blank's
    assert symbols.decode(numbers) == "in the rain"
    assert "".join(map(symbols.piece, numbers)) == " in the rain"
    assert symbols.unknown("日本") == set()
    assert Symbols(**symbols.options).encode("in the rain") == numbers


def test_the_steps_that_are_needed():
    assert [frames_needed(numbers) for numbers in ([], [1], [1, 2], [1, 1], [1, 1, 1, 2])] == [0, 1, 2, 3, 6]


# Batches


def test_a_batch_is_padded_and_says_what_is_said(listed):
    data = listed(level="global")
    dims = data.dims
    assert {name: dims[name] for name in ("input_size", "num_mels")} == {"input_size": 72, "num_mels": 24}
    assert tuple(dims) == data.DIMS
    seen = {}
    for batch in data.train_dataloader():
        steps, count = batch.pad.shape
        assert batch.x.shape == (steps, count, 72)
        assert batch.x.dtype == torch.float32
        assert batch.x[batch.pad].abs().sum() == 0
        assert 3 * steps * count <= 600 or count == 1
        for i, item in enumerate(batch.items):
            numbers = batch.targets[i, : batch.lengths[i]]
            assert dims["decode"](numbers.tolist()) == item.text
            assert batch.targets[i, batch.lengths[i] :].sum() == 0
            seen[item.id] = batch.x[: (~batch.pad[:, i]).sum(), i]
    assert sorted(seen) == [f"train-{i}" for i in range(6)]
    every = torch.cat([*seen.values()]).reshape(-1, 24)
    assert every.mean(0).abs().max() < 0.1  # but for the last frames, that are no whole step
    assert (every.std(0) - 1).abs().max() < 0.1


def test_a_label_is_a_class(listed):
    data = listed(unit="label")
    data.parts["val"] = data.parts["train"][:2]
    data.parts["test"] = data.parts["train"][2:4]
    assert data.dims == {"input_size": 72, "num_classes": 6}
    assert tuple(data.dims) == data.DIMS
    labels = data.vocabulary.labels
    for x, numbers, pad in data.test_dataloader():
        assert x.shape[:2] == pad.shape
        assert {labels[number] for number in numbers} <= {u.text for u in data.parts["test"]}
    other = listed(unit="label")
    other.parts["test"] = [other.parts["test"][0]._replace(text="unheard of")]
    with pytest.raises(ValueError, match=r"'unheard of' of data\.test are none to train on"):
        other.setup()


def test_transcripts_longer_than_the_sound_are_left_out_of_training(listed, caplog):
    data = listed()
    first = data.parts["train"][0]
    data.parts["train"][0] = first._replace(text="a much longer text than anybody says in that time, " * 5)
    data.setup()
    assert "train: 1 left out, too short for their transcripts with data.stack=3" in caplog.text
    assert first.id not in {item.id for batch in data.train_dataloader() for item in batch.items}
    assert sum(len(batch.items) for batch in data.train_dataloader()) == 5
    hopeless = listed(stack=100)
    with pytest.raises(
        ValueError, match=r"all 6 recordings of data\.train are too short.*smaller data\.stack than 100"
    ):
        hopeless.setup()


def test_nothing_to_learn_is_told_before_features_are_computed(listed, monkeypatch):
    monkeypatch.setattr("data.speech.prepared", lambda *_: pytest.fail("computed"))
    for split, options, message in (
        ("train", {}, "transcripts to train on are all empty"),
        ("train", {"unit": "bpe"}, "transcripts to train on are all empty"),
        ("val", {}, r"transcripts of data\.val are all empty"),
        ("train", {"unit": "label"}, r"data\.train has one label, ''"),
    ):
        data = listed(**options)
        data.parts[split] = [utterance._replace(text=" ") for utterance in data.parts[split]]
        with pytest.raises(ValueError, match=message):
            data.setup()


def test_a_test_without_a_step_is_refused(listed):
    data = listed()
    for utterance in data.parts["test"]:
        write(utterance.files[0], said()[:250])
    with pytest.raises(ValueError, match=r"all 2 recordings of data\.test are shorter than a step"):
        data.setup()


def test_what_no_training_transcript_has_is_counted(listed, caplog):
    caplog.set_level(logging.INFO)
    data = listed()
    data.parts["test"][0] = data.parts["test"][0]._replace(text="  Ami   Qé ")
    data.setup()
    assert "which cannot be written" in caplog.text
    assert "'q'" in caplog.text
    items = {item.id: item.text for batch in data.test_dataloader() for item in batch.items}
    assert items["test-0"] == "ami qé"  # as it is compared with what is heard


def test_speeds_and_volume_are_of_training_alone(listed):
    data = listed(speeds=[0.9, 1.0, 1.1], volume=10.0, noise=[5, 30])
    data.setup()
    assert {split: len(found) for split, found in data.recorded.items()} == {"train": 18, "val": 2, "test": 2}
    drawn = perturbed(data.parts["train"], [1.0, 1.1], 10.0, (5.0, 30.0))
    assert [u.speed for u in drawn] == [1.0] * 6 + [1.1] * 6
    assert len({u.gain for u in drawn}) == 12
    assert max(abs(u.gain) for u in drawn) <= 10
    assert all(5 <= u.noise <= 30 for u in drawn)
    assert drawn == perturbed(data.parts["train"], [1.0, 1.1], 10.0, (5.0, 30.0))


def test_a_checkpoint_knows_what_it_was_trained_on(listed):
    data = listed()
    state = data.state_dict()
    listed().load_state_dict(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    vocabulary = Recordings.vocabulary_of(torch.load(buffer, weights_only=True))
    assert {**vocabulary.dims, "decode": 0} == {**data.dims, "decode": 0}
    wave, rate = vocabulary.read(data.parts["test"][0].files[0])
    heard = vocabulary.stream(rate).accept(wave, is_last=True)
    expected = data.vocabulary.frontend.normalised(data.recorded["test"][0][2])
    assert np.allclose(heard, expected, atol=0.02)  # the cache holds float16
    for options, name in (({"stack": 2}, "stack"), ({"unit": "words"}, "symbols"), ({"speeds": [0.9]}, "mean")):
        with pytest.raises(ValueError, match=f"trained on other data: .*{name}"):
            listed(**options).load_state_dict(state)
    other = listed()
    other.parts["test"].reverse()
    with pytest.raises(ValueError, match="trained on other data: recordings differ"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "syllables"}, "data.unit=syllables must be one of characters, words"),
        ({"speeds": []}, "data.speeds=.* must be a list"),
        ({"speeds": 1.0}, "data.speeds=.* must be a list"),
        ({"noise": 5}, "data.noise=5 must be two numbers"),
        ({"speeds": [3.0]}, "0.5 to 2"),
        ({"volume": -1}, "data.volume=-1"),
        ({"noise": [30, 5]}, "data.noise=.* must be two numbers"),
        ({"noise": [5]}, "data.noise=.* must be two numbers"),
        ({"frames_per_batch": 0}, "data.frames_per_batch=0"),
        ({"lowercase": "yes"}, "data.lowercase=yes"),
    ],
)
def test_wrong_options_are_refused(listed, options, message):
    with pytest.raises(ValueError, match=message):
        listed(**options)


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
    with pytest.raises(FileNotFoundError, match=r"data\.train=none.jsonl: there is no such file"):
        Manifest(train="none.jsonl", val="dev.jsonl", test="test.jsonl", **options).utterances()
    with pytest.raises(ValueError, match=r"data\.val=None must be a file of JSON lines"):
        Manifest(train="train.jsonl", val=None, test="test.jsonl", **options)
    for content, message in (
        ("{", r"bad.jsonl:1: no JSON"),
        ('{"audio": "a.wav"}', "bad.jsonl:1: 'text' is no text, but None"),
        ('{"audio": "a.wav", "text": 5}', "'text' is no text, but 5"),
        ('{"audio": "a.wav", "text": "\\ud800"}', "'text' is no text"),
        ("\n[1]", "bad.jsonl:2: 'audio' is no text"),
        ("", "lists no recording"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            Manifest(train="bad.jsonl", val="dev.jsonl", test="test.jsonl", **options).utterances()
    (tmp_path / "bad.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="no UTF-8"):
        Manifest(train="bad.jsonl", val="dev.jsonl", test="test.jsonl", **options).utterances()


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
    with pytest.raises(ValueError, match="has 1 recordings with transcripts, dev has 2: it is not whole"):
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
    with pytest.raises(ValueError, match="has 1 recordings with transcripts, test has 2: it is not whole"):
        librispeech(tmp_path).utterances()


def test_a_fault_of_the_machine_is_none_of_a_recording(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"data\.speakers leaves nobody for train"):
        spoken_digits(fsdd, speakers={"val": ["bob"], "test": ["cleo", "anna"]}).utterances()
    for options, message in (
        ({"digits": [3]}, "must be two whole numbers"),
        ({"digits": [5, 3]}, "must be two whole numbers"),
        ({"repeats": 0}, "data.repeats=0 1 or more"),
        ({"speakers": {"test": ["bob"]}}, "must name those of val and of test"),
        ({"speakers": {"val": ["bob"], "test": ["bob"]}}, "nobody for both"),
        ({"speakers": {"val": "bob", "test": ["cleo"]}}, "must name those of val and of test"),
        ({"digits": 3}, "must be two whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            spoken_digits(fsdd, **options)


def test_a_string_is_heard_as_its_parts(fsdd):
    data = spoken_digits(fsdd, digits=[2, 2], rate=RATE, num_mels=24)
    (one, *_) = strings(data.utterances()["test"][:1], [1, 1], 1)
    data.setup()
    name, _, frames = data.recorded["test"][0]
    parts = next(u for u in data.utterances()["test"] if u.id == name).files
    whole = np.concatenate([read(path)[0] for path in parts])
    assert np.allclose(frames, Frontend(rate=RATE, num_mels=24).frames(whole), rtol=2**-10)
    assert one.files


def test_computed_speech_is_written_once(tmp_path):
    data = SpokenWords(cache=str(tmp_path))
    found = data.utterances()
    assert {split: len(own) for split, own in found.items()} == {"train": 400, "val": 40, "test": 40}
    speakers = {split: {u.speaker for u in own} for split, own in found.items()}
    assert not speakers["train"] & speakers["test"]
    path = found["test"][0].files[0]
    first = path.read_bytes()
    assert SpokenWords(cache=str(tmp_path)).utterances() == found
    assert {len(u.text.split()) for u in SpokenWords(cache=str(tmp_path), unit="label").utterances()["val"]} == {1}
    assert path.read_bytes() == first


@pytest.mark.skipif(not (REAL / "fsdd").is_dir(), reason=f"{REAL}/fsdd is not there")
def test_the_real_digits(tmp_path):
    found = digits.SpokenDigits(root=str(REAL), cache=str(tmp_path), url="", archive="fsdd.tar").utterances()
    assert {split: len(own) for split, own in found.items()} == {"train": 2400, "val": 300, "test": 300}
    assert len({u.speaker for u in found["train"]}) == 6
    wave, rate, _ = read(found["test"][0].files[0])
    assert rate == 8000
    assert 0.1 < len(wave) / rate < 3
    with open(found["test"][0].files[0], "rb") as file:
        assert struct.unpack("<4s", file.read(4)) == (b"RIFF",)

"""Sound: how it is computed, read and resampled, its features, and what is damaged."""

import os

import numpy as np
import pytest
import soundfile

from data.audio import feature_table, synthesis
from data.audio.fbank import Damaged, Frontend, StepStream, check_frontend, read, resample
from data.audio.feature_table import Utterance, prepare

RATE = synthesis.RATE


def said(words="ami oso", speaker=3, seed=1):
    return synthesis.synthesise(words.split(), speaker, seed)[0]


def write(path, wave=None, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, said() if wave is None else wave, rate)
    return path


def test_synthetic_speech_depends_on_its_arguments_alone():
    wave, spans = synthesis.synthesise(["ami", "sume"], 2, 7)
    assert wave.dtype == np.float32
    assert np.array_equal(wave, synthesis.synthesise(["ami", "sume"], 2, 7)[0])
    assert not np.array_equal(wave[:2000], synthesis.synthesise(["ami", "sume"], 3, 7)[0][:2000])
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


def test_damaged_sound_is_refused(tmp_path):
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


def test_wav_files_with_wrong_headers_are_refused(tmp_path):
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
    with pytest.raises(Damaged, match="beyond 1000 times the usual"):
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
    wave = resample(said(), RATE, rate)
    whole = StepStream(frontend, rate).accept(wave, is_last=True)
    stream = StepStream(frontend, rate)
    pieces = [stream.accept(wave[i : i + chunk], is_last=False) for i in range(0, len(wave), chunk)]
    pieces.append(stream.accept(wave[:0], is_last=True))
    assert whole.shape[1] == frontend.size == 72
    assert np.allclose(np.concatenate(pieces), whole, atol=1e-5)
    # What is learnt from, whole recordings, is what is heard.
    assert np.allclose(frontend.normalise(frontend.frames(resample(wave, rate, RATE))), whole, atol=1e-5)


def test_levels_by_hand():
    frames = np.array([[4.0], [8.0], [6.0]], np.float32)
    options = {
        "rate": RATE,
        "num_mels": 1,
        "mean": np.array([2.0], np.float32),
        "deviation": np.array([2.0], np.float32),
    }
    assert Frontend(level="global", **options).normalise(frames).ravel().tolist() == [1, 3, 2]
    own = Frontend(level="recording", **options).normalise(frames).ravel()
    assert own == pytest.approx(np.array([-2, 2, 0]) / np.sqrt(8 / 3))
    running = [(4 - 64 / 31) / 2, (8 - 72 / 32) / 2, (6 - 78 / 33) / 2]  # 30 frames of 2 come first
    assert Frontend(level="running", **options).normalise(frames).ravel() == pytest.approx(running)
    assert Frontend(level="running", **options).normalise(frames[1:], (4.0, 1)).ravel() == pytest.approx(running[1:])


def test_a_wrong_option_of_the_frontend_is_refused():
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
    found = prepare(utterances, frontend, tmp_path / "cache", "train")
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
    monkeypatch.setattr("data.audio.feature_table.write", lambda *_: pytest.fail("computed again"))
    assert prepare(utterances, frontend, tmp_path / "cache", "train").checksum == found.checksum
    # A cut file of the cache is not taken for whole.
    (place,) = (tmp_path / "cache/speech").glob("*/features.arrow")
    monkeypatch.undo()
    place.write_bytes(place.read_bytes()[:-100])
    assert len(prepare(utterances, frontend, tmp_path / "cache", "train")) == 70


def test_an_interrupted_computation_keeps_its_complete_parts(tmp_path, monkeypatch):
    """Who breaks off goes on with the part that was begun."""
    utterances = [Utterance(f"u{i}", (write(tmp_path / f"{i}.wav", said(seed=i)),), "", "") for i in range(5)]
    frontend = Frontend(rate=RATE, num_mels=24)
    whole = prepare(utterances, frontend, tmp_path / "whole", "train")
    monkeypatch.setattr("data.audio.feature_table.PART", 2)
    compute, seen = feature_table.features_of, []

    def breaks(utterance, frontend):
        seen.append(utterance.id)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return compute(utterance, frontend)

    monkeypatch.setattr("data.audio.feature_table.features_of", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare(utterances, frontend, tmp_path / "cache", "train")
    seen.clear()
    monkeypatch.setattr(
        "data.audio.feature_table.features_of", lambda *given: seen.append(given[0].id) or compute(*given)
    )
    found = prepare(utterances, frontend, tmp_path / "cache", "train")
    assert sorted(seen) == ["u2", "u3", "u4"]
    assert found.checksum == whole.checksum
    assert np.allclose(found.mean, whole.mean)
    assert np.allclose(found.deviation, whole.deviation)
    assert all(np.array_equal(found[i][2], whole[i][2]) for i in range(5))


def test_damaged_features_are_refused_or_computed_again(tmp_path):
    utterance = Utterance("a", (write(tmp_path / "a.wav"),), "a", "")
    frontend = Frontend(rate=RATE, num_mels=24)
    prepare([utterance], frontend, tmp_path / "cache", "train")
    (place,) = (tmp_path / "cache/speech").glob("*/features.arrow")
    content = bytearray(place.read_bytes())
    content[2000:2400] = b"\x7f" * 400
    place.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: `rm -r"):
        prepare([utterance], frontend, tmp_path / "cache", "train")[0]
    for content in ("[]", "null", "{}"):
        (place.parent / "meta.json").write_text(content)
        assert len(prepare([utterance], frontend, tmp_path / "cache", "train")) == 1


def test_another_file_has_other_features(tmp_path):
    utterance = Utterance("a", (write(tmp_path / "a.wav"),), "a", "")
    frontend = Frontend(rate=RATE, num_mels=24)
    first = prepare([utterance], frontend, tmp_path / "cache", "train")
    write(tmp_path / "a.wav", said("umi", 5))
    second = prepare([utterance], frontend, tmp_path / "cache", "train")
    assert not np.array_equal(first[0][2], second[0][2])
    louder = prepare([utterance._replace(gain=20.0)], frontend, tmp_path / "cache", "train")
    # Ten times the amplitude is ln(100) more of every energy that is well above the noise.
    loud = second[0][2] > 12
    assert np.allclose((louder[0][2] - second[0][2])[loud], np.log(100), atol=0.05)
    noisy = prepare([utterance._replace(noise=-40.0)], frontend, tmp_path / "cache", "train")
    # White noise a hundred times as strong as the sound: hardly anything of it is left.
    assert np.corrcoef(noisy[0][2].mean(1), second[0][2].mean(1))[0, 1] < 0.6
    assert noisy[0][2].mean() - second[0][2].mean() > 6
    faster = prepare([utterance._replace(speed=1.25)], frontend, tmp_path / "cache", "train")
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
        found = prepare(utterances, Frontend(rate=RATE, num_mels=24), tmp_path / "cache", "val")
        assert [found[i][0] for i in range(len(found))] == ["good", "other", "stereo"]
        for part in ("val: 2 left out, damaged", "damaged.wav", "1 left out, shorter than a frame", "short.wav"):
            assert part in caplog.text
        assert "resampled to 8000 Hz: 1 of 16000 Hz" in caplog.text
        assert "1 with several channels" in caplog.text
    with pytest.raises(ValueError, match=r"data\.train: none of 2 recordings can be used: 2 left out, damaged"):
        prepare(utterances[1:3], Frontend(rate=RATE, num_mels=24), tmp_path / "cache", "train")

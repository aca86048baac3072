"""Speech recognition: the loss, what is hidden in training, runs, predictions, and streams."""

import itertools
import math
import sys
from functools import partial
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from conftest import options
from test_ctc_decoder import every_text

import predict
import tasks.trained
import train
from data.audio import synthesis
from data.audio.fbank import resample
from sru import SRU
from tasks.speech import SpeechRecognition, draw_intervals, read_sound

SMALL = ("task=speech", "depth=1", "width=16", "epochs=1")
FEW = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
MODELS = [name for name in options("model") if name not in ("cnn",)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(configure, cache, monkeypatch):
    """configure(*overrides), with the computed speech of all tests."""
    monkeypatch.setenv("SRU_CACHE", str(cache))
    return partial(configure, *SMALL)


def network(**options):
    torch.manual_seed(1)
    options = {"bidirectional": False, "vocab_size": 4, "input_size": 6, "num_mels": 3} | options
    return SpeechRecognition(
        encoder=partial(SRU, hidden_size=8, num_layers=1),
        optimizer=torch.optim.SGD,
        decode=lambda numbers: "".join(" ab"[number - 1] for number in numbers),
        **options,
    )


def batch(steps, texts):
    """Random recordings of so many steps; texts of symbols."""
    x = torch.randn(max(steps), len(steps), 6)
    pad = torch.arange(max(steps))[:, None] >= torch.tensor(steps)
    targets = torch.zeros(len(steps), max(1, *map(len, texts)), dtype=torch.long)
    for row, text in zip(targets, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.long)
    items = [SimpleNamespace(id=str(i), text="ab") for i in range(len(steps))]
    return x.masked_fill(pad[:, :, None], 0.0), pad, targets, torch.tensor([*map(len, texts)]), items


def test_the_loss_is_that_of_all_alignments():
    """By going through all of them, for recordings of other lengths, one without a word."""
    task = network().eval()
    inputs = batch([4, 5, 3], [[1, 2], [3, 3], []])
    loss, metrics, count = task.loss(inputs)
    assert (metrics, count) == ({}, 12)
    with torch.no_grad():
        log_p, _ = task(inputs[0], inputs[1])
    expected = -sum(
        every_text(log_p[:steps, i])[text] for i, (steps, text) in enumerate([(4, (1, 2)), (5, (3, 3)), (3, ())])
    )
    assert loss.item() == pytest.approx(expected / 12, abs=1e-5)


def test_padding_changes_nothing():
    task = network().eval()
    x, pad, targets, lengths, items = batch([5, 3], [[1], [2]])
    noisy = x.masked_fill(pad[:, :, None], 9.0)
    assert torch.equal(
        task.loss((x, pad, targets, lengths, items))[0], task.loss((noisy, pad, targets, lengths, items))[0]
    )
    alone = task.loss((x[:3, 1:], pad[:3, 1:], targets[1:], lengths[1:], items[1:]))[0]
    first = task.loss((x[:, :1], pad[:, :1], targets[:1], lengths[:1], items[:1]))[0]
    assert task.loss((x, pad, targets, lengths, items))[0].item() == pytest.approx(
        (3 * alone + 5 * first).item() / 8, abs=1e-6
    )


def test_gradients_are_those_of_differences():
    task = network().double().eval()
    x, pad, targets, lengths, _ = batch([4, 3], [[1, 2], [3]])
    x = x.double().requires_grad_()

    class Wide(torch.nn.Module):  # the loss in float64
        def forward(self, x):
            h, _ = task.encoder(x, None, pad)
            log_p = task.output(h).log_softmax(2)
            steps = (~pad).sum(0)
            return torch.nn.functional.ctc_loss(log_p, targets, steps, lengths, reduction="sum")

    assert torch.autograd.gradcheck(Wide(), (x,))


def test_a_text_that_does_not_fit_is_no_infinite_loss():
    task = network().eval()
    inputs = batch([2, 4, 2], [[1, 2, 3], [1], [1, 1]])
    loss, _, count = task.loss(inputs)
    alone, _, steps = task.loss((*(a[:, 1:2] for a in inputs[:2]), *(a[1:2] for a in inputs[2:])))
    assert count == steps == 4  # what adds nothing is not counted
    assert loss.item() == pytest.approx(alone.item(), abs=1e-6)


def test_stretches_lie_within_a_recording():
    torch.manual_seed(0)
    sizes = torch.tensor([10, 4, 0])
    seen = torch.zeros(10, 3)
    for _ in range(300):
        hidden = draw_intervals(sizes, 3, 10)
        assert hidden.sum(0).max() <= 3
        for column in hidden.T.int():  # one stretch
            assert int((column.diff() == 1).sum() + column[0]) <= 1
        seen += hidden
    assert (seen[:, 0] > 0).all()
    assert seen[4:, 1].sum() == 0
    assert (seen[:4, 1] > 0).all()
    assert seen[:, 2].sum() == 0


def test_bands_and_stretches_are_hidden_in_training_alone():
    torch.manual_seed(0)
    task = network(frequency_masks=1, frequency_width=2, time_masks=1, time_width=0.5)
    x = torch.ones(8, 400, 6)
    hidden = task.augment(x, torch.full((400,), 8)) == 0
    frames = hidden.unflatten(2, (2, 3))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])  # a band is hidden in each frame of a step
    bands = frames[:, :, 0].all(0).sum(1)
    assert {*bands[~frames.all((2, 3)).any(0)].tolist()} == {0, 1, 2}
    assert frames.all((2, 3)).sum(0).max() == 4
    inputs = batch([4], [[1]])
    assert torch.equal(task.eval().loss(inputs)[0], task.loss(inputs)[0])
    assert torch.equal(network().augment(x, torch.full((400,), 8)), x)


def test_colour_and_warp_change_a_recording_as_a_whole():
    torch.manual_seed(0)
    steps = torch.full((200,), 5)
    x = torch.linspace(0, 5, 6).repeat(2).expand(5, 200, 12)
    task = network(num_mels=6, input_size=12, colour=0.5)
    change = (task.augment(x, steps) - x).unflatten(2, (2, 6))
    assert torch.allclose(change, change[:1, :, :1].expand_as(change), atol=1e-6)  # of all frames
    assert 0.4 < change.abs().max() <= 0.5
    assert change[0, :, 0].std(0).min() > 0.1  # and of each recording its own
    task = network(num_mels=6, input_size=12, warp=0.2)
    ratio = task.augment(x, steps)[..., 1:5] / x[..., 1:5]
    assert torch.allclose(ratio, ratio[:1, :, :1].expand_as(ratio), atol=1e-5)
    assert 0.8 <= ratio.min() < 0.85
    assert 1.15 < ratio.max() <= 1.2
    assert abs(ratio.mean() - 1) < 0.02
    assert torch.equal(network(num_mels=6, input_size=12).augment(x, steps), x)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.colour=-1", "must be a number, 0 to 10"),
        ("task.warp=1", "must be a number, 0 to 0.9"),
        ("task.warp=-0.1", "must be a number, 0 to 0.9"),
        ("task.beam=0", "must be a whole number, 1 to 1000"),
        ("task.frequency_width=81", "is more than data.num_mels=40"),
        ("task.time_masks=-1", "must be a whole number, 0 to 100"),
        ("task.time_width=2", "must be a number, 0 to 1"),
    ],
)
def test_wrong_options_are_refused(settings, word, message):
    with pytest.raises(Exception, match=f"{word} {message}"):
        train.run(settings(*FEW, word))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_recognises_both_ways(settings, model):
    for both in (False, True):
        if both and model == "transformer_xl":
            continue
        cfg = settings(f"model={model}", *FEW, f"bidirectional={both}".lower(), f"run_dir={settings().run_dir}-{both}")
        assert train.run(cfg) >= 0


def test_a_run_learns_writes_and_is_used(settings, cache, tmp_path, capsys, monkeypatch):
    cfg = settings("epochs=7", "depth=2", "width=64", "task.optimizer.lr=5e-3", "model.forget_bias=1")
    best = train.run(cfg)
    assert best < 60  # per cent of the words of voices that were not heard
    lines = (tmp_path / "run/hypotheses.txt").read_text().splitlines()
    heard = dict(line.split("\t") for line in lines)
    assert len(heard) == 40
    report = capsys.readouterr().out
    said = " ".join(synthesis.WORDS)
    assert {word for text in heard.values() for word in text.split()} & {*said.split()}
    assert "test/wer" in report
    assert "test/cer" in report

    folder = cache / f"speech_sample-{synthesis.VERSION}/sentences"
    for name in ("test-0", "test-5"):
        run = f"checkpoint={tmp_path / 'run'}", f"input={folder / name}.wav"
        predict.main([*run])
        whole = capsys.readouterr().out
        assert whole == f"{heard[name]}\n"
        # A stream writes the same, by likeliest symbols and by a beam, and says how long it takes.
        for more in ([], ["chunk=37"], ["beam=4"]):
            with monkeypatch.context() as patch:  # each chunk takes 2 ms
                patch.setattr("tasks.speech.time", SimpleNamespace(perf_counter=itertools.count(0, 0.002).__next__))
                predict.main([*run, "stream=true", *more])
            out, err = capsys.readouterr()
            assert out.strip() == whole.strip() or more == ["beam=4"]
            length, size = len(soundfile.read(f"{folder / name}.wav")[0]), 8 * (37 if more == ["chunk=37"] else 100)
            assert "takes 2.0 ms at the median, 2.0 at the 95th percentile, 2.0 at most" in err
            assert f"({math.ceil(length / size)} chunks)" in err
        predict.main([*run, "beam=4"])
        assert capsys.readouterr().out == out
    wave, _ = soundfile.read(folder / "test-5.wav", dtype="int16")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=reader(wave.tobytes()))))
    predict.main([run[0], "input=-", "rate=8000", "stream=true"])
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize(("chunk", "sizes"), [(100, [800, 800, 400]), (12.5, [100] * 20), (None, [2000])])
def test_a_chunk_is_of_milliseconds(monkeypatch, chunk, sizes):
    wave = np.arange(2000, dtype="<i2")
    vocabulary = SimpleNamespace(read=lambda path, offset, duration: (wave.astype(np.float32) / 32768, 8000))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=reader(wave.tobytes()))))
    for name in ("file.wav", "-"):
        pieces, rate = read_sound(vocabulary, name, 8000, chunk)
        found = list(pieces)
        assert (rate, [len(piece) for piece in found]) == (8000, sizes)
        assert np.array_equal(np.concatenate(found) * 32768, wave)


def reader(content):
    """read(size) of a pipe."""
    rest = [content]

    def read(size):
        size = len(rest[0]) if size < 0 else size
        piece, rest[0] = rest[0][:size], rest[0][size:]
        return piece

    return read


@pytest.mark.parametrize("model", ["sru", "lstm", "gru", "qrnn", "srupp", "transformer"])
def test_a_stream_hears_what_the_whole_recording_is(settings, model):
    """Probabilities of each step, from chunks and from all at once."""
    cfg = settings(f"model={model}", *FEW)
    train.run(cfg)
    task, vocabulary = tasks.trained.load(cfg.run_dir)
    wave = synthesis.synthesise(["ami", "sume"], 9, 5)[0]
    x = torch.from_numpy(vocabulary.stream(8000).accept(wave, is_last=True))[:, None]
    with torch.inference_mode():
        whole, _ = task(x)
        stream, state, pieces = vocabulary.stream(8000), None, []
        for i in range(0, len(wave) + 1, 800):
            steps = torch.from_numpy(stream.accept(wave[i : i + 800], is_last=i + 800 > len(wave)))
            if len(steps):
                log_p, state = task(steps[:, None], None, state)
                pieces.append(log_p)
    assert len(pieces) > 5
    assert torch.allclose(torch.cat(pieces), whole, atol=1e-5)


def test_a_recording_of_another_rate_is_heard_as_a_whole(settings, tmp_path, capsys, monkeypatch):
    """By a network of both ways: what the resampler gives last belongs to the same recording."""
    train.run(settings(*FEW, "bidirectional=true", "data.level=recording"))
    path = tmp_path / "sound.wav"
    soundfile.write(path, resample(synthesis.synthesise(["ami", "oso"], 9, 5)[0], 8000, 44100), 44100)
    task, vocabulary = tasks.trained.load(str(tmp_path / "run"))
    calls = []
    monkeypatch.setattr(type(task), "forward", lambda self, x, *_: calls.append(x) or (torch.zeros(len(x), 1, 9), None))
    list(task.predict(vocabulary, input=str(path)))
    assert len(calls) == 1
    frontend = vocabulary.frontend
    wave, rate = vocabulary.read(path)
    expected = frontend.normalise(frontend.frames(resample(wave, rate, 8000)))
    assert np.allclose(calls[0][:, 0], expected, atol=1e-5)


def test_predictions_refuse_what_is_wrong(settings, tmp_path):
    train.run(settings(*FEW, "bidirectional=true", "data.level=recording"))
    run = f"checkpoint={tmp_path / 'run'}"
    (tmp_path / "text.wav").write_text("no sound")
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, np.zeros(8000, np.float32), 8000)
    for words, message in (
        ([f"input={tmp_path}/none.wav"], "none.wav is not readable audio"),
        ([f"input={tmp_path}/text.wav"], "text.wav is not readable audio"),
        ([f"input={sound}", "stream=true"], "stream=true needs a one-directional model"),
        ([f"input={sound}", "stream=yes"], "stream=yes must be true or false"),
        ([f"input={sound}", "beam=0"], "beam=0 must be"),
        ([f"input={sound}", "ngram=a.arpa"], "ngram= needs a beam"),
        ([f"input={sound}", "chunk=0"], "chunk=0"),
        ([f"input={sound}", "offset=-1"], "offset=-1.* must be seconds"),
        ([f"input={sound}", "duration=nan"], "duration=nan must be seconds"),
        ([f"input={sound}", "offset=2"], r"sound.wav is 1 s long: no part begins at 2 s"),
        (["input=-", "offset=1"], "offset= and duration= need a file"),
    ):
        with pytest.raises(ValueError, match=message):
            predict.main([run, *words])
    predict.main([run, f"input={sound}"])
    task, vocabulary = tasks.trained.load(str(tmp_path / "run"))
    with torch.no_grad():
        task.output.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="returns NaN"):
        list(task.predict(vocabulary, input=str(sound)))


def test_a_part_of_a_file_is_heard_as_a_file_of_its_own(settings, tmp_path):
    train.run(settings(*FEW))
    wave = np.random.default_rng(0).standard_normal(3 * 8000).astype(np.float32) / 4
    soundfile.write(tmp_path / "long.wav", wave, 8000)
    soundfile.write(tmp_path / "part.wav", wave[4000:14000], 8000)
    soundfile.write(tmp_path / "end.wav", wave[4000:], 8000)
    task, vocabulary = tasks.trained.load(str(tmp_path / "run"))
    with torch.no_grad():
        task.output.weight.mul_(30)  # so that noise is heard as symbols, others at other places
    heard = []
    for stream in (False, True):
        for name, part in (("part", {"offset": 0.5, "duration": 1.25}), ("end", {"offset": 0.5})):
            found = list(task.predict(vocabulary, input=str(tmp_path / "long.wav"), stream=stream, **part))
            assert found == list(task.predict(vocabulary, input=str(tmp_path / f"{name}.wav"), stream=stream))
            heard.append("".join(found))
    whole = "".join(task.predict(vocabulary, input=str(tmp_path / "long.wav")))
    assert heard[0] != heard[1] != whole
    assert len(whole) > 3


def test_silence_shorter_than_a_step_is_an_empty_text(settings, tmp_path, capsys):
    train.run(settings(*FEW))
    soundfile.write(tmp_path / "short.wav", np.zeros(50, np.float32), 8000)
    for more in ([], ["stream=true"], ["beam=3"]):
        predict.main([f"checkpoint={tmp_path / 'run'}", f"input={tmp_path / 'short.wav'}", *more])
        assert capsys.readouterr().out.splitlines()[-1] == ""


def test_error_rates_are_those_of_all_recordings_together(tmp_path):
    task = network()
    task._trainer = SimpleNamespace(default_root_dir=str(tmp_path))
    pairs = {"a": ("one two", "one two three four"), "b": ("five", "five"), "c": ("noise", "")}
    task.hypotheses = dict(pairs)
    found = task.epoch_metrics({"loss": torch.tensor(1.0)}, "test")
    # Two words are missing, one is too many, of five that were said.
    assert float(found["wer"]) == pytest.approx(100 * 3 / 5)
    said, heard = [said for _, said in pairs.values()], [heard for heard, _ in pairs.values()]
    assert float(found["cer"]) == pytest.approx(100 * jiwer.cer(said, heard))
    assert (tmp_path / "hypotheses.txt").read_text() == "a\tone two\nb\tfive\nc\tnoise\n"
    assert task.epoch_metrics({"loss": torch.tensor(1.0)}, "val") == {}


def test_a_resumed_run_is_one_that_never_stopped(settings, tmp_path):
    runs = []
    for name, stops in (("whole", ()), ("parted", ("trainer.max_steps=7",))):
        cfg = settings("epochs=2", "trainer.limit_train_batches=5", f"run_dir={tmp_path / name}", *stops)
        train.run(cfg)
        if stops:
            train.run(
                settings(
                    "epochs=2",
                    "trainer.limit_train_batches=5",
                    f"run_dir={tmp_path / name}",
                    f"resume={tmp_path / name}",
                )
            )
        runs.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


def test_keywords_are_classified(settings):
    cfg = settings("task=keywords", "depth=1", "width=32", "epochs=8", "task.optimizer.lr=1e-2", "data.volume=6")
    assert train.run(cfg) > 40  # per cent; chance is 10


def test_recordings_go_with_their_tasks_alone(settings):
    with pytest.raises(ValueError, match=r"data=speech_sample does not go with task=keywords"):
        train.run(settings("task=keywords", "data.unit=characters"))
    with pytest.raises(ValueError, match=r"data=speech_sample does not go with task=speech.*num_classes"):
        train.run(settings("data.unit=label"))

"""Symbols, and recordings in batches: what is padded, left out, counted, and kept in a checkpoint."""

import io
import logging

import numpy as np
import pytest
import torch
from test_fbank import RATE, said, write

from data.audio import synthesis
from data.audio.feature_table import Utterance, perturb
from data.audio.labels import Symbols, least_steps
from data.speech import Recordings


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


# Symbols


def test_symbols_read_and_write():
    characters = Symbols.learn(["ab", "b c"], "characters", 0)
    assert characters.options["tokens"] == [" ", "a", "b", "c"]
    assert len(characters) == 5
    assert characters.encode("a bxc") == [2, 1, 3, 4]
    assert characters.unknown("a bxc") == {"x"}
    assert characters.decode([2, 0, 1, 3]) == "a b"
    words = Symbols.learn(["one two", "two"], "words", 0)
    assert words.encode("two three one") == [2, 1]
    assert words.unknown("two three") == {"three"}
    assert words.decode([2, 1]) == "two one"
    assert words.piece(1) == " one"
    for symbols in (characters, words):
        again = Symbols(**symbols.options)
        assert again.decode([1, 2]) == symbols.decode([1, 2])
    with pytest.raises(ValueError, match="all empty"):
        Symbols.learn(["", ""], "characters", 0)


def test_subwords_read_and_write():
    texts = ["the rain in spain stays mainly in the plain"] * 3
    symbols = Symbols.learn(texts, "bpe", 290)
    assert len(symbols) == 290
    numbers = symbols.encode("in the rain")
    assert 0 not in numbers  # the blank's
    assert symbols.decode(numbers) == "in the rain"
    assert "".join(map(symbols.piece, numbers)) == " in the rain"
    assert symbols.unknown("日本") == set()
    assert Symbols(**symbols.options).encode("in the rain") == numbers


def test_ctc_needs_a_step_for_each_symbol_and_between_equal_neighbours():
    assert [least_steps(numbers) for numbers in ([], [1], [1, 2], [1, 1], [1, 1, 1, 2])] == [0, 1, 2, 3, 6]


# Batches


def test_a_batch_holds_padded_steps_and_transcripts(listed):
    data = listed(level="global")
    kwargs = data.model_kwargs
    assert {name: kwargs[name] for name in ("input_size", "num_mels")} == {"input_size": 72, "num_mels": 24}
    assert tuple(kwargs) == data.MODEL_KWARGS
    seen = {}
    for batch in data.train_dataloader():
        steps, count = batch.pad.shape
        assert batch.x.shape == (steps, count, 72)
        assert batch.x.dtype == torch.float32
        assert batch.x[batch.pad].abs().sum() == 0
        assert 3 * steps * count <= 600 or count == 1
        for i, item in enumerate(batch.items):
            numbers = batch.targets[i, : batch.lengths[i]]
            assert kwargs["decode"](numbers.tolist()) == item.text
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
    assert data.model_kwargs == {"input_size": 72, "num_classes": 6}
    assert tuple(data.model_kwargs) == data.MODEL_KWARGS
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


def test_empty_transcripts_are_refused_before_features_are_computed(listed, monkeypatch):
    monkeypatch.setattr("data.speech.prepare", lambda *_: pytest.fail("computed"))
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


@pytest.mark.parametrize("unit", ["characters", "label"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_without_a_recording_is_refused(listed, split, unit):
    data = listed(unit=unit)
    data.parts[split] = []
    with pytest.raises(ValueError, match=rf"data\.{split} has no recording: 1 or more are needed"):
        data.setup()


def test_a_test_without_a_step_is_refused(listed):
    data = listed()
    for utterance in data.parts["test"]:
        write(utterance.files[0], said()[:250])
    with pytest.raises(ValueError, match=r"all 2 recordings of data\.test are shorter than a step"):
        data.setup()


def test_characters_that_training_lacks_are_logged(listed, caplog):
    caplog.set_level(logging.INFO)
    data = listed()
    data.parts["test"][0] = data.parts["test"][0]._replace(text="  Ami   Qé ")
    data.setup()
    assert "which cannot be recognised" in caplog.text
    assert "'q'" in caplog.text
    items = {item.id: item.text for batch in data.test_dataloader() for item in batch.items}
    assert items["test-0"] == "ami qé"  # as it is compared with what is heard


def test_speeds_and_volume_are_of_training_alone(listed):
    data = listed(speeds=[0.9, 1.0, 1.1], volume=10.0, noise=[5, 30])
    data.setup()
    assert {split: len(found) for split, found in data.splits.items()} == {"train": 18, "val": 2, "test": 2}
    drawn = perturb(data.parts["train"], [1.0, 1.1], 10.0, (5.0, 30.0))
    assert [u.speed for u in drawn] == [1.0] * 6 + [1.1] * 6
    assert len({u.gain for u in drawn}) == 12
    assert max(abs(u.gain) for u in drawn) <= 10
    assert all(5 <= u.noise <= 30 for u in drawn)
    assert drawn == perturb(data.parts["train"], [1.0, 1.1], 10.0, (5.0, 30.0))


def test_a_checkpoint_refuses_other_data(listed):
    data = listed()
    state = data.state_dict()
    listed().load_state_dict(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    vocabulary = Recordings.vocabulary_of(torch.load(buffer, weights_only=True))
    assert {**vocabulary.model_kwargs, "decode": 0} == {**data.model_kwargs, "decode": 0}
    wave, rate = vocabulary.read(data.parts["test"][0].files[0])
    heard = vocabulary.stream(rate).accept(wave, is_last=True)
    expected = data.vocabulary.frontend.normalise(data.splits["test"][0][2])
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
        ({"noise": [30, 5]}, "data.noise=.* must be two numbers"),
        ({"noise": [5]}, "data.noise=.* must be two numbers"),
    ],
)
def test_wrong_options_are_refused(listed, options, message):
    with pytest.raises(ValueError, match=message):
        listed(**options)

"""Texts for language models: streams, segments, vocabularies, and what a checkpoint keeps of them."""

import random

import numpy as np
import pytest
import torch
from recorder import Recorder, record

from data.lm import Segments, Text, Vocabulary
from data.text import token_array

# In the manner of WikiText: a space begins and ends a line, a blank line is one space.
ARTICLE = " \n = The Lake = \n \n The <unk> lake is deep . \n Senjō no lake is the lake . \n"
SHORT = {"batch_size": 2, "unroll": 3}


def text_of(tmp_path, content, **options):
    """The datamodule of a file that holds `content`, its cache beside it."""
    (tmp_path / "file").write_bytes(content)
    return Text(**{"root": "", "cache": str(tmp_path / "cache"), "unit": "bytes", "path": str(tmp_path / "file"),
                   **SHORT, **options})  # fmt: skip


def words_of(tmp_path, train=ARTICLE, val=ARTICLE, test=ARTICLE, **options):
    """The datamodule of three files of words."""
    files = {}
    for key, content in {"train": train, "val": val, "test": test}.items():
        (tmp_path / f"{key}.txt").write_text(content, encoding="utf-8")
        files[key] = {"name": f"{key}.txt"}
    return Text(
        **{"root": str(tmp_path), "cache": str(tmp_path / "cache"), "unit": "words", "files": files, **SHORT, **options}
    )


def read(segments):
    """The inputs and targets of all segments, as lists by stream."""
    batches = list(segments)
    return tuple(torch.cat([batch[side] for batch in batches]).T.tolist() for side in (0, 1))


# Streams and segments


def test_streams_lie_side_by_side_and_go_on_from_segment_to_segment():
    segments = Segments(np.arange(16, dtype=np.uint8), batch_size=2, unroll=3)  # n = 15 // 2 = 7
    batches = list(segments)
    assert len(segments) == len(batches) == 3
    assert [batch[0].tolist() for batch in batches] == [
        [[0, 7], [1, 8], [2, 9]],
        [[3, 10], [4, 11], [5, 12]],
        [[6, 13]],
    ]
    assert [batch[1].tolist() for batch in batches] == [
        [[1, 8], [2, 9], [3, 10]],
        [[4, 11], [5, 12], [6, 13]],
        [[7, 14]],
    ]
    assert [batch[2] for batch in batches] == [True, False, False]
    assert {side.dtype for batch in batches for side in batch[:2]} == {torch.int64}


@pytest.mark.parametrize(("size", "steps"), [(13, 6), (14, 6), (15, 7), (16, 7), (17, 8)])
def test_two_streams_waste_one_token_at_most(size, steps):
    inputs, targets = read(Segments(np.arange(size, dtype=np.uint8), batch_size=2, unroll=3))
    assert inputs == [list(range(steps)), list(range(steps, 2 * steps))]
    assert targets == [[token + 1 for token in stream] for stream in inputs]


@pytest.mark.parametrize("size", [2, 3, 9, 10, 11, 40])
def test_one_stream_predicts_every_token_but_the_first_once(size):
    tokens = np.random.default_rng(size).integers(0, 200, size).astype(np.uint8)
    inputs, targets = read(Segments(tokens, batch_size=1, unroll=3))
    assert inputs == [tokens[:-1].tolist()]
    assert targets == [tokens[1:].tolist()]


def test_two_processes_cover_what_one_of_twice_the_streams_covers():
    tokens = np.arange(107, dtype=np.uint8)
    whole = read(Segments(tokens, batch_size=4, unroll=5))
    parts = [read(Segments(tokens, batch_size=2, unroll=5, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [parts[0][side] + parts[1][side] for side in (0, 1)] == list(whole)


def test_a_process_takes_its_streams_by_its_rank(tmp_path, monkeypatch):
    data = text_of(tmp_path, bytes(range(200)), batch_size=1)
    data.setup()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert next(iter(data.train_dataloader()))[0].tolist() == [[89], [90], [91]]  # of 180 bytes, 89 a stream


def test_segments_go_on_in_the_middle_and_then_begin_anew():
    tokens = np.arange(100, dtype=np.uint8)
    segments = Segments(tokens, 2, 4)
    running = iter(segments)
    before = [next(running) for _ in range(5)]
    assert segments.state_dict()["position"] == 5
    resumed = Segments(tokens, 2, 4)
    resumed.load_state_dict({"position": 5})  # as older checkpoints have it
    assert resumed.state_dict() == segments.state_dict()
    after = list(resumed)
    everything = list(Segments(tokens, 2, 4))
    assert [batch[0].tolist() for batch in before + after] == [batch[0].tolist() for batch in everything]
    assert [batch[2] for batch in after] == [False] * len(after)
    assert [batch[0].tolist() for batch in resumed] == [batch[0].tolist() for batch in everything]
    resumed.load_state_dict({"position": len(resumed)})  # of an epoch's last step
    assert len(list(resumed)) == len(resumed)


def test_no_random_number_is_drawn(tmp_path):
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    data = text_of(tmp_path, bytes(range(200)))
    for loader in (data.model_kwargs and data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert list(loader)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


@pytest.mark.parametrize(
    ("step", "limit"), [(4, None), (9, None), (13, None), (26, None), (4, 6), (6, 6), (12, 6), (6, 0.67), (9, 20)]
)
def test_a_trainer_resumes_in_the_middle_of_the_text(tmp_path, step, limit):
    def describe(batch):
        return int(batch[0][0, 0]), batch[2]

    path, content = tmp_path / "middle.ckpt", bytes(range(62))
    whole, _ = record(Recorder(describe, step, path), text_of(tmp_path, content), limit=limit)
    epoch = 6 if limit in (6, 0.67) else 9
    assert [first for _, first in whole] == [i % epoch == 0 for i in range(3 * epoch)]
    assert record(Recorder(describe), text_of(tmp_path, content), path, limit=limit)[0] == whole[step:]
    checkpoint = torch.load(path, weights_only=True)
    kept = checkpoint["Text"]
    assert (kept["unit"], kept["tokens"]) == ("bytes", list(range(62)))
    assert kept["checksums"].keys() == {"train", "val", "test"}


# Vocabulary


@pytest.mark.parametrize(
    ("unit", "tokens", "text", "numbers"),
    [
        ("bytes", [97, 98, 195, 169], "abé", [0, 1, 2, 3]),
        ("characters", ["\n", "a", "é"], "aé\n", [1, 2, 0]),
        ("words", ["the", "<eos>", "lake"], "the lake\nthe\n\nlake", [0, 2, 1, 0, 1, 1, 2]),
    ],
)
def test_text_becomes_numbers_and_text_again(unit, tokens, text, numbers):
    vocabulary = Vocabulary(unit, tokens)
    assert vocabulary.encode(text) == numbers
    assert vocabulary.decode(numbers) == text
    assert len(vocabulary) == len(tokens)


def test_half_a_character_is_decoded_as_a_replacement():
    assert Vocabulary("bytes", [97, 195, 169]).decode([0, 1, 0]) == "a�a"


@pytest.mark.parametrize(
    ("unit", "tokens", "message"),
    [
        ("bytes", [97], "b'b' is not in the model's vocabulary of 1 bytes"),
        ("characters", ["a"], "'b' is not in the model's vocabulary of 1 characters"),
        ("words", ["a"], r"'b' is not in the model's vocabulary of 1 words: .*\(data\.min_count=2"),
    ],
)
def test_an_unknown_piece_is_named(unit, tokens, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(unit, tokens).encode("a b" if unit == "words" else "ab")


def test_an_unknown_word_is_unk_where_there_is_one():
    assert Vocabulary("words", ["a", "<unk>"]).encode("a b a") == [0, 1, 0]


def test_all_bytes_and_characters_of_the_text_are_known_in_order(tmp_path):
    content = "the élan ".encode() * 20 + "日".encode() + b"tea " * 3
    data = text_of(tmp_path, content)
    assert data.model_kwargs == {"vocab_size": len(set(content)), "unit": "bytes"}
    assert data.vocabulary.tokens == sorted(set(content))
    data = text_of(tmp_path, content, unit="characters")
    assert data.model_kwargs == {"vocab_size": len(set(content.decode())), "unit": "characters"}
    assert data.vocabulary.tokens == sorted(set(content.decode()))
    numbers = np.concatenate([data.splits[key] for key in ("train", "val", "test")])
    assert data.vocabulary.decode(numbers.tolist()) == content.decode()


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_a_character_or_word_across_two_blocks_stays_whole(tmp_path, monkeypatch, block):
    monkeypatch.setattr(token_array, "BLOCK", block)
    data = text_of(tmp_path, "日本é ".encode() * 20, unit="characters")
    assert data.model_kwargs["vocab_size"] == 4
    data = words_of(tmp_path)
    data.setup()
    assert data.vocabulary.decode(data.splits["train"].tolist()) == "\n".join(
        " ".join(line.split()) for line in ARTICLE.split("\n")
    )


def test_words_are_ranked_by_their_count_in_training_and_a_line_ends_in_eos(tmp_path):
    data = words_of(tmp_path, val=" The deep lake \n")
    assert data.model_kwargs == {"vocab_size": 12, "unit": "words"}
    assert data.vocabulary.tokens == [
        "<eos>", "lake", ".", "=", "is", "<unk>", "Lake", "Senjō", "The", "deep", "no", "the",
    ] or data.vocabulary.tokens[:2] == ["<eos>", "lake"]  # fmt: skip
    counts = np.bincount(data.splits["train"])
    assert (np.diff(counts) <= 0).all()
    assert len(data.splits["train"]) == len(ARTICLE.split()) + ARTICLE.count("\n")
    assert data.vocabulary.decode(data.splits["val"].tolist()) == "The deep lake\n"


@pytest.mark.parametrize("content", ["a b\na", "a b\na\n", "a b\na ", "a b\na \n"])
def test_the_last_line_ends_with_or_without_its_mark(tmp_path, content):
    data = words_of(tmp_path, content, content, content, batch_size=1)
    data.setup()
    assert data.vocabulary.decode(data.splits["train"].tolist()) == "a b\na\n"


def test_rare_words_are_unknown_everywhere(tmp_path):
    data = words_of(tmp_path, train="a a b b c d e a\n", val="a c new\n", test="new b a\n", min_count=2, unroll=1)
    data.setup()
    assert data.vocabulary.tokens == ["<unk>", "a", "b", "<eos>"]
    assert data.splits["val"].tolist() == [1, 0, 0, 3]
    assert data.splits["test"].tolist() == [0, 2, 1, 3]


def test_a_word_that_training_lacks_is_refused_where_nothing_is_unknown(tmp_path):
    with pytest.raises(
        ValueError, match=r"words that the training part's vocabulary has not, 'new'.*data\.min_count=2"
    ):
        words_of(tmp_path, train="a b a b a b\n", val="a new\n").setup()


def test_the_numbers_are_as_narrow_as_the_vocabulary_allows(tmp_path):
    for size, dtype in ((254, np.uint8), (255, np.uint8), (256, np.uint16), (70_000, np.int32)):
        data = words_of(tmp_path, train=" ".join(map(str, range(size - 1))) + " <unk> \n")
        assert data.model_kwargs["vocab_size"] == size + 1
        assert data.splits["train"].dtype == dtype
        assert isinstance(data.splits["train"], np.memmap)


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    data = words_of(tmp_path)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    data.load_state_dict(state)
    assert Text.vocabulary_of(state).decode([0, 1]) == "\nlake"
    changed = state | {"tokens": ["<eos>", "zebra", *state["tokens"][2:]]}
    with pytest.raises(ValueError, match=r"tokens had 12 entries and has 12 \(number 1 was 'zebra'.*data\.path"):
        data.load_state_dict(changed)
    with pytest.raises(ValueError, match=r"unit was bytes and is words; tokens had 1 entries and has 12"):
        data.load_state_dict({"unit": "bytes", "tokens": [97]})


# A person's own text


OWN = {"root": "", "unit": "words", "batch_size": 1, "unroll": 1}


def test_one_text_by_words_has_the_vocabulary_of_what_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("data.text.token_array.BLOCK", 7)
    (tmp_path / "a.txt").write_text("a b b a c\n" * 6 + "late late late\n", encoding="utf-8")
    data = Text(cache=str(tmp_path / "cache"), path=str(tmp_path / "a.txt"), valid_bytes=4, test_bytes=4, **OWN)
    data.setup()
    assert data.vocabulary.tokens == ["a", "b", "<eos>", "c", "<unk>"]
    assert [len(split) for split in data.splits.values()] == [32, 4, 4]
    assert data.vocabulary.decode(data.splits["test"].tolist()) == "<unk> <unk> <unk>\n"
    other = Text(cache=str(tmp_path / "cache"), path=str(tmp_path / "a.txt"), valid_bytes=2, test_bytes=36, **OWN)
    other.setup()
    assert other.vocabulary.tokens == ["<unk>"]
    assert len(other.splits["train"]) == 2
    with pytest.raises(
        ValueError, match=r"words that the training part's vocabulary has not, 'late'.*data\.min_count=2"
    ):
        Text(cache=str(tmp_path / "cache"), path=str(tmp_path / "a.txt"), test_bytes=4, min_count=1, **OWN).setup()
    given = Text(cache=str(tmp_path / "cache"), path=str(tmp_path / "a.txt"), **OWN)
    given.checkpoint_vocabulary = data.vocabulary
    given.setup()
    assert given.vocabulary.tokens == data.vocabulary.tokens


@pytest.mark.parametrize("unit", ["bytes", "characters", "words"])
def test_a_text_of_three_files_is_read(tmp_path, unit):
    files = {"train": "a b\na b a\n", "val": "b a\n", "test": "a b\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    names = {name: str(tmp_path / name) for name in files}
    data = Text(cache=str(tmp_path / "cache"), **OWN | {"unit": unit} | names)
    data.setup()
    decoded = {split: data.vocabulary.decode(tokens.tolist()) for split, tokens in data.splits.items()}
    assert decoded == files
    with pytest.raises(ValueError, match=r"the text has files for test, train: type data\.val=FILE as well"):
        Text(cache="", **OWN | names | {"val": None})


# Preparing


def test_held_out_bytes_are_the_end_of_the_text(tmp_path):
    data = text_of(tmp_path, bytes(range(100)), valid_bytes=10, test_bytes=20)
    data.setup()
    assert [split.tolist() for split in data.splits.values()] == [
        list(range(70)), list(range(70, 80)), list(range(80, 100)),
    ]  # fmt: skip
    data = text_of(tmp_path, bytes(range(100)))  # a twentieth each, prepared already
    data.setup()
    assert [len(split) for split in data.splits.values()] == [90, 5, 5]

"""Pairs of texts: subwords and back, files and faults, batches, the cache, what a checkpoint keeps."""

import gzip
import math
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, real_data
from recorder import Recorder, record

from data import download
from data.text import sentence_pairs
from data.text.subwords import Item, Subwords, batch_of, learn
from data.translation import ParallelText, Sample, sentences_of

SAMPLES = ROOT / "tests/samples"
ENGLISH, GERMAN = (
    (SAMPLES / f"translation-train.{x}").read_text(encoding="utf-8").split("\n")[:-1] for x in ("en", "de")
)
FEW = {"vocab_size": 400, "max_length": 100, "tokens_per_batch": 200}


def write(tmp_path, prefix, english, german, newline="\n"):
    for language, lines in (("en", english), ("de", german)):
        (tmp_path / f"{prefix}.{language}").write_bytes("".join(line + newline for line in lines).encode())
    return prefix


def data_of(tmp_path, english=ENGLISH, german=GERMAN, **options):
    """The datamodule of two files with those lines, for training and evaluation, its cache beside them."""
    names = dict.fromkeys(("train", "val", "test"), write(tmp_path, "text", english, german))
    places = {"root": str(tmp_path), "cache": str(tmp_path / "cache")}
    return ParallelText(**{**places, **names, "source": "en", "target": "de", **FEW, **options})


def read(subwords, batch):
    """Numbers of lines, and the two sides of each as text, after checking marks and padding."""
    lines = []
    for item, source, target in zip(batch.items, batch.source.T.tolist(), batch.target.T.tolist(), strict=True):
        end, last = source.index(3), target.index(3)
        assert not any(source[end + 1 :] + target[last + 1 :])
        assert target[0] == 2
        lines.append((item.number, subwords.decode(source[:end]), subwords.decode(target[1:last])))
    return lines


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def subwords(request):
    return Subwords(model=learn(ENGLISH + GERMAN, request.param, 500), source="en", target="de")


# Subwords


@pytest.mark.parametrize(
    "text",
    [
        "The lake is deep.", "", " ", "  two  spaces ", "日本 👩‍🔬 नमस्ते", "a\tb\u00a0\u2028d\ufeff", "½ ﬁ é e\u0301 ％",
        "▁", "a▁b", " ▁ ▁▁x", "<s> </s> <pad> <unk> <0x41>", "\x00\x7f", "x\r", "⁇",
    ],
)  # fmt: skip
def test_every_text_reads_back_as_it_was(subwords, text):
    numbers = subwords.encode(text)
    assert subwords.decode(numbers) == text
    assert all(number > 3 for number in numbers)


def test_texts_of_all_kinds_of_characters_read_back(subwords):
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(
            generator.choice("ab e▁  \x00é日\t\u2028\u0301👩\u200d�") for _ in range(generator.randint(1, 8))
        )
        assert subwords.decode(subwords.encode(text)) == text


def test_the_marks_have_the_first_numbers(subwords):
    assert [subwords.processor.id_to_piece(i) for i in range(4)] == ["<pad>", "<unk>", "<s>", "</s>"]
    assert subwords.model_kwargs == {"vocab_size": 500, "bos": 2, "eos": 3, "decode": subwords.decode}


def test_marks_are_left_out_of_decoded_text(subwords):
    numbers = subwords.encode("The lake.")
    assert subwords.decode(torch.tensor([2, 1, *numbers, 3, 0, 0])) == "The lake."
    assert subwords.decode([]) == subwords.decode([2, 3, 0]) == ""
    assert subwords.decode([subwords.space[0], subwords.space[0]]) == "��"


def test_a_word_is_the_same_at_the_beginning_and_elsewhere(subwords):
    assert subwords.encode("The The") == subwords.encode("The") * 2


def test_learning_again_gives_the_same_subwords():
    for kind in ("bpe", "unigram"):
        assert learn(iter(GERMAN), kind, 400) == learn(iter(GERMAN), kind, 400)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("asked", "problem"), [(9999, "too large"), (50, "too small")])
def test_an_impossible_number_of_subwords_names_one_that_fits(kind, asked, problem):
    with pytest.raises(ValueError, match=rf"data\.vocab_size={asked} is {problem}.*type data\.vocab_size=\d+") as told:
        learn(ENGLISH, kind, asked)
    fits = int(str(told.value).rpartition("data.vocab_size=")[2].split()[0])
    assert len(Subwords(model=learn(ENGLISH, kind, fits), source="en", target="de")) == fits
    with pytest.raises(ValueError, match=r"data\.vocab_size"):
        learn(ENGLISH, kind, fits + (1 if asked == 9999 else -1))


def test_a_text_without_a_word_teaches_no_subwords(tmp_path):
    for english, german, name in ((["", " "], ["", "\t"], "en"), (["a", "b"], ["", "\t"], "de")):
        with pytest.raises(ValueError, match=rf"no subwords .*: .*text\.{name} has no text, only blank lines"):
            data_of(tmp_path, english, german).setup()


# Batches


def test_a_batch_has_marks_and_padding_where_the_network_expects_them():
    pairs = [(Item(0, "", ""), [5, 6, 7], [8]), (Item(1, "", ""), [], [9, 10]), (Item(2, "", ""), [4], [])]
    batch = batch_of(pairs)
    assert batch.source.T.tolist() == [[5, 6, 7, 3], [3, 0, 0, 0], [4, 3, 0, 0]]
    assert batch.target.T.tolist() == [[2, 8, 3, 0], [2, 9, 10, 3], [2, 3, 0, 0]]
    assert batch.source.dtype == batch.target.dtype == torch.int64


def test_every_pair_comes_once_an_epoch_within_the_budget(tmp_path):
    data = data_of(tmp_path, vocab_size=700)
    data.setup()
    wanted = [(i, *pair) for i, pair in enumerate(zip(ENGLISH, GERMAN, strict=True))]
    for loader, budget in ((data.train_dataloader(), 200), (data.val_dataloader(), 4096)):
        batches = list(loader)
        assert sorted(line for batch in batches for line in read(data.vocabulary, batch)) == wanted
        for batch in batches:
            assert batch.source.numel() <= budget
            assert (batch.target.shape[0] - 1) * batch.target.shape[1] <= budget
    items = sorted((item.number, item.source, item.reference) for batch in batches for item in batch.items)
    assert items == wanted


def test_the_seed_determines_the_order(tmp_path):
    def order(seed):
        data = data_of(tmp_path, seed=seed)
        data.setup()
        return [item.number for batch in data.train_dataloader() for item in batch.items]

    assert order(1) == order(1) != order(2)
    assert sorted(order(2)) == list(range(len(ENGLISH)))


def test_long_pairs_are_not_trained_on_and_all_are_evaluated(tmp_path, caplog):
    caplog.set_level("INFO")
    english, german = [*ENGLISH, "long " * 60, "short"], [*GERMAN, "kurz", "lang " * 60]
    data = data_of(tmp_path, english, german, max_length=50, tokens_per_batch=51, eval_tokens_per_batch=60)
    data.setup()
    assert "162 pairs; 2 with more subwords than data.max_length=50, left out" in caplog.text
    trained = {item.number for batch in data.train_dataloader() for item in batch.items}
    assert trained == set(range(160))
    batches = list(data.test_dataloader())
    assert sorted(item.number for batch in batches for item in batch.items) == list(range(162))
    assert [len(batch.items) for batch in batches if max(batch.source.shape[0], batch.target.shape[0]) > 61] == [1, 1]


def test_a_side_of_the_greatest_length_is_trained_on(tmp_path):
    data = data_of(tmp_path)
    data.setup()
    lengths = [max(len(data.vocabulary.encode(side)) for side in pair) for pair in zip(ENGLISH, GERMAN, strict=True)]
    for data.max_length in range(min(lengths), max(lengths) + 1):
        wanted = [i for i, length in enumerate(lengths) if length <= data.max_length]
        assert data.training_rows(data.splits["train"]).tolist() == wanted


def test_empty_lines_are_logged_and_kept_for_evaluation(tmp_path, caplog):
    caplog.set_level("INFO")
    english, german = ["", *ENGLISH, "a dog", "   "], ["nichts", *GERMAN, "", ""]
    data = data_of(tmp_path, english, german)
    data.setup()
    assert "data.train=text has 163 pairs; 3 without a word on one side or both, left out" in caplog.text
    assert "data.test=text has 163 pairs; 3 without a word on one side or both, kept" in caplog.text
    assert {item.number for batch in data.train_dataloader() for item in batch.items} == set(range(1, 161))
    lines = sorted(line for batch in data.test_dataloader() for line in read(data.vocabulary, batch))
    assert lines == [(i, *pair) for i, pair in enumerate(zip(english, german, strict=True))]


def test_sentences_of_a_person_become_a_batch(subwords):
    batch, lines = subwords.batch(["The lake.", "", "A dog barks at the lake."], 100)
    assert read(subwords, batch) == [(0, "The lake.", ""), (1, "", ""), (2, "A dog barks at the lake.", "")]
    assert [item.source for item in batch.items] == ["The lake.", "", "A dog barks at the lake."]
    assert batch.target.tolist() == [[2, 2, 2], [3, 3, 3]]
    assert lines == [0, 1, 2]
    sentences = ["The lake.", "", "A dog barks at the lake."]
    batch, lines = subwords.batch(sentences, 3)
    numbers = [subwords.encode(sentence) for sentence in sentences]
    assert lines == [i for i, found in enumerate(numbers) for _ in range(max(1, math.ceil(len(found) / 3)))]
    found: list[list[int]] = [[], [], []]
    for line, column in zip(lines, batch.source.T.tolist(), strict=True):
        found[line] += [number for number in column if number > 3]
    assert found == numbers
    with pytest.raises(ValueError, match="contains an unpaired surrogate"):
        subwords.batch(["a\udcff"], 100)


@pytest.mark.parametrize(("step", "limit"), [(3, None), (9, 6), (6, 6)])
def test_a_trainer_resumes_in_the_middle_of_an_epoch(tmp_path, step, limit):
    def describe(batch):
        return [item.number for item in batch.items]

    path = tmp_path / "middle.ckpt"
    whole, _ = record(Recorder(describe, step, path), data_of(tmp_path), limit=limit)
    assert record(Recorder(describe), data_of(tmp_path), path, limit=limit)[0] == whole[step:]


# Files


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_files_are_found_in_the_root_or_by_their_path(tmp_path, monkeypatch, packing, newline):
    (tmp_path / "corpus").mkdir()
    write(tmp_path, "corpus/mine", ENGLISH, GERMAN, newline)
    for path in (tmp_path / "corpus").iterdir():
        content = path.read_bytes()
        path.unlink()
        path.with_name(path.name + packing).write_bytes(gzip.compress(content) if packing else content)
    monkeypatch.chdir(tmp_path / "corpus")
    for root, prefix in ((tmp_path, "corpus/mine"), ("elsewhere", "mine"), ("", str(tmp_path / "corpus/mine"))):
        names = dict.fromkeys(("train", "val", "test"), prefix)
        data = ParallelText(root=str(root), cache=str(tmp_path / "cache"), source="de", target="en", **names, **FEW)
        data.setup()
        batch = data.splits["test"].batch([0])
        assert (batch.items[0].source, batch.items[0].reference) == (GERMAN[0], ENGLISH[0])


def test_the_last_line_may_lack_its_end_and_the_first_have_a_mark(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb")
    assert list(sentence_pairs.lines_of(tmp_path / "file")) == ["a", "\ufeffb"]
    assert sentence_pairs.check_text(tmp_path / "file").lines == 2
    for content, lines in ((b"", 0), (b"\n", 1), (b"a\n\n", 2), (b"a\x0bb\xe2\x80\xa8c\rd\n", 1)):
        (tmp_path / "file").write_bytes(content)
        assert (
            sentence_pairs.check_text(tmp_path / "file").lines
            == len(list(sentence_pairs.lines_of(tmp_path / "file")))
            == lines
        )


def refused(tmp_path, error, message, english=ENGLISH, german=GERMAN, **options):
    with pytest.raises(error, match=message):
        data_of(tmp_path, english, german, **options).setup()


def test_files_of_unequal_length_are_refused_with_both_counts(tmp_path):
    refused(tmp_path, ValueError, r"text\.en has 160 lines, .*text\.de has 159: line n", german=GERMAN[1:])
    refused(tmp_path, ValueError, r"text\.en and .*text\.de are empty", [], [])


def test_a_missing_side_is_named(tmp_path):
    write(tmp_path, "dev", ENGLISH, GERMAN)
    (tmp_path / "dev.de").unlink()
    refused(tmp_path, FileNotFoundError, r"data\.val=dev: .*dev\.de is missing beside .*dev\.en", val="dev")
    refused(tmp_path, FileNotFoundError, r"data\.train=text: .*text\.fr is missing beside .*text\.en", target="fr")


def test_a_prefix_without_files_is_named(tmp_path):
    refused(
        tmp_path,
        FileNotFoundError,
        r"data\.test=no is neither in .* nor here; type the path of the files no\.en and no\.de",
        test="no",
    )
    known = {"x/train.en": {"url": "u", "sha256": "s"}, "x/train.de": {"url": "u", "sha256": "s"}}
    refused(tmp_path, FileNotFoundError, r"or one of x/train, which are downloaded", test="no", files=known)


@pytest.mark.parametrize(("content", "line"), [(b"a\nb\nGr\xfc\xdfe\n", 3), (b"a\nb\xc3", 2), (b"\xff\xffa\n", 1)])
def test_the_line_of_bytes_that_are_not_utf8_is_named(tmp_path, content, line):
    data = data_of(tmp_path)
    write(tmp_path, "dev", ENGLISH, GERMAN)
    (tmp_path / "dev.de").write_bytes(content)
    data.names["val"] = "dev"
    with pytest.raises(ValueError, match=rf"dev\.de:{line}: byte 0x.. is not UTF-8 .*iconv"):
        data.setup()


def test_a_damaged_archive_is_named(tmp_path):
    data = data_of(tmp_path)
    (tmp_path / "text.de").unlink()
    (tmp_path / "text.de.gz").write_bytes(gzip.compress("\n".join(GERMAN).encode())[:-9])
    with pytest.raises(ValueError, match=r"text\.de\.gz is damaged"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "de"}, r"data\.source=de and data\.target=de are the same language"),
        ({"source": None}, r"data\.source=None must be a language.*type data\.source=de"),
        ({"target": False}, r"data\.target=False must be a language.*in quotes"),
        ({"train": None}, r"data\.train=None must be a PREFIX: type data\.train=DIR/NAME for the files DIR/NAME\.en"),
        ({"subword": "words"}, r"data\.subword=words must be one of bpe, unigram"),
        ({"tokens_per_batch": 100}, r"data\.tokens_per_batch=100 does not hold .*type data\.tokens_per_batch=101"),
        ({"vocab_size": 20000}, r"data\.vocab_size=20000 is too large.* type data\.vocab_size="),
        ({"max_length": 1}, r"no pair can be trained on: data\.train=text has 160 pairs; 160 with more subwords"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, message):
    refused(tmp_path, ValueError, message, **options)


def test_a_published_file_has_its_lines(tmp_path):
    known = {f"text.{x}": {"url": "none", "sha256": None, "lines": 5} for x in ("en", "de")}
    refused(tmp_path, ValueError, r"text\.en has 160 lines, expected 5: not the published file", files=known)


def test_the_hub_is_asked_for_each_side(tmp_path, monkeypatch):
    def fetch_from_hub(path, rows, content):
        assert rows == {"path": "wmt/x", "split": "train"}
        listed = [{"translation": {"en": x, "de": y}} for x, y in zip(ENGLISH, GERMAN, strict=True)]
        path.write_bytes(b"".join(content(listed)))
        return path

    monkeypatch.setattr(download, "fetch_from_hub", fetch_from_hub)
    known = {f"hub.{x}": {"lines": 160, "hub": {"path": "wmt/x", "split": "train"}} for x in ("en", "de")}
    data = data_of(tmp_path, files=known, train="hub")
    data.setup()
    assert (tmp_path / "hub.de").read_bytes() == (tmp_path / "text.de").read_bytes()
    assert data.splits["train"].key == data.splits["test"].key


def test_a_row_of_the_hub_is_a_line():
    rows = [{"translation": {"en": "a\r\nb\nc", "de": " x\u2028y "}}, {"translation": {"en": "", "de": "z"}}]
    assert list(sentences_of(rows, "en")) == [b"a b c\n", b"\n"]
    assert list(sentences_of(rows, "de")) == [" x\u2028y \n".encode(), b"z\n"]


# The cache


def test_files_are_prepared_once_and_again_when_they_change(tmp_path, monkeypatch):
    data_of(tmp_path).setup()
    with monkeypatch.context() as patch:
        patch.setattr(sentence_pairs, "learn", None)
        patch.setattr(Subwords, "encode", None)
        data = data_of(tmp_path, max_length=20, tokens_per_batch=300, seed=9)
        data.setup()
    changed = data_of(tmp_path, [*ENGLISH[:-1], "A new line."])
    changed.setup()
    assert changed.splits["train"].batch([159]).items[0].source == "A new line."
    assert changed.splits["train"].key != data.splits["train"].key
    assert {data_of(tmp_path, **options).model_kwargs["vocab_size"] for options in ({"vocab_size": 401}, {})} == {
        400,
        401,
    }
    assert isinstance(data.splits["train"].columns["source"].values.base, np.memmap)


@pytest.mark.parametrize("damage", ["cut", "changed", "other", "gone"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    data = data_of(tmp_path, ["", *ENGLISH], ["", *GERMAN])
    expected = data.state_dict()
    wanted = data.splits["test"].batch(range(161))
    prepared = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(prepared) == 12
    for path in prepared:
        whole = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes({"cut": whole[:-3], "changed": whole[:-2] + b"xx", "other": b"[]"}[damage])
        again = data_of(tmp_path, ["", *ENGLISH], ["", *GERMAN])
        assert again.state_dict() == expected
        assert torch.equal(again.splits["test"].batch(range(161)).target, wanted.target)
        assert path.read_bytes() == whole


def test_subwords_are_learnt_from_training_lines_alone(tmp_path):
    write(tmp_path, "dev", ENGLISH[:20], GERMAN[:20])
    one, other = data_of(tmp_path), data_of(tmp_path, val="dev", test="dev")
    assert one.state_dict()["model"] == other.state_dict()["model"]
    assert one.splits["train"].key == other.splits["train"].key
    assert one.splits["val"].key != other.splits["val"].key


def test_a_large_text_is_learnt_from_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sentence_pairs, "LEARNT", 170)
    data = data_of(tmp_path)
    assert data.state_dict()["model"] == learn(ENGLISH[::2] + GERMAN[::2], "bpe", 400)


def test_a_large_vocabulary_is_kept_in_wider_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Subwords, "__len__", lambda self: 70_000)
    data = data_of(tmp_path)
    data.setup()
    assert data.splits["train"].columns["target"].values.dtype == np.int32
    assert read(data.vocabulary, data.splits["train"].batch([7])) == [(7, ENGLISH[7], GERMAN[7])]


# Checkpoints


def test_a_checkpoint_reads_and_writes_sentences(tmp_path):
    data = data_of(tmp_path)
    torch.save(data.state_dict(), tmp_path / "state")
    kept = torch.load(tmp_path / "state", weights_only=True)
    data.load_state_dict(kept)
    subwords = ParallelText.vocabulary_of(kept)
    assert (len(subwords), subwords.decode([5, 9])) == (
        data.model_kwargs["vocab_size"],
        data.model_kwargs["decode"]([5, 9]),
    )
    assert tuple(data.model_kwargs) == ParallelText.MODEL_KWARGS
    assert subwords.options == {"model": kept["model"], "source": "en", "target": "de"}
    assert subwords.encode(GERMAN[3]) == data.vocabulary.encode(GERMAN[3])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 410}, "model differ; files differ"),
        ({"subword": "unigram"}, "model differ; files differ"),
        ({"source": "de", "target": "en"}, "source was en and is de; target was de and is en; files differ"),
        ({"english": ENGLISH[::-1]}, "files differ"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(tmp_path, change, named):
    kept = data_of(tmp_path).state_dict()
    with pytest.raises(ValueError, match=f"trained on other data: .*({named}).*data.vocab_size"):
        data_of(tmp_path, **change).load_state_dict(kept)


# Corpora


def test_the_sample_has_no_fault():
    texts = {}
    for part, count in (("train", 160), ("dev", 40)):
        sides = [list(sentence_pairs.lines_of(SAMPLES / f"translation-{part}.{x}")) for x in ("en", "de")]
        assert [len(side) for side in sides] == [count, count]
        assert all(line == line.strip() and line[-1] in ".!?" for side in sides for line in side)
        texts[part] = set(zip(*sides, strict=True))
        assert len(texts[part]) == count
    assert not texts["train"] & texts["dev"]


def test_the_sample_is_read_in_both_directions(configure, tmp_path):
    for source, target in (("en", "de"), ("de", "en")):
        overrides = ["data=translation_sample", f"data.source={source}", f"data.target={target}"]
        options = {key: value for key, value in configure(*overrides).data.items() if key != "_target_"}
        data = Sample(**options)
        assert data.model_kwargs["vocab_size"] == options["vocab_size"]
        assert len(data.train_dataloader()) > 5
        assert sum(len(batch.items) for batch in data.val_dataloader()) == 40


def test_the_real_multi30k_is_read_whole(configure, tmp_path):
    root = real_data("multi30k")
    options = {key: value for key, value in configure("data=multi30k").data.items() if key != "_target_"}
    data = ParallelText(**options | {"root": str(root), "cache": str(tmp_path / "cache")})
    data.setup()
    assert {split: len(pairs) for split, pairs in data.splits.items()} == {"train": 29_000, "val": 1_014, "test": 1_000}
    assert len(data.training_rows(data.splits["train"])) == 29_000
    assert data.model_kwargs["vocab_size"] == 10_000
    for split, pairs in data.splits.items():
        for language, column in (("en", "source"), ("de", "target")):
            path = download.find(root / f"{data.names[split]}.{language}")
            for row, line in enumerate(sentence_pairs.lines_of(path)):
                assert data.vocabulary.decode(pairs.columns[column][row].tolist()) == line
                assert pairs.columns[f"{column}_text"][row].tobytes().decode() == line

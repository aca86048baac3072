"""Corpora for classification: reading, splits, batches, vocabulary, and what bad input is told."""

import gzip
import lzma
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, real_data
from recorder import Recorder, record

from data.classification import PythonManual, SentenceClassification, Vocabulary, split_examples
from data.sentences import OwnSentences
from data.text import word_vectors

SAMPLES = Path(__file__).parents[1] / "samples"
REVIEWS = (SAMPLES / "reviews.all").read_bytes()


def corpus(root, names=("reviews.all",), keys=("all",), **options):
    """Samples copied to root/sentcls and read as a corpus; a file that is there already is left."""
    (root / "sentcls").mkdir(parents=True, exist_ok=True)
    for name in names:
        if not list((root / "sentcls").glob(f"{name}*")):
            shutil.copy(SAMPLES / name, root / "sentcls")
    files = {key: {"name": name, "url": None, "sha256": None, "examples": None} for key, name in zip(keys, names)}  # noqa: B905
    options = {"labels": ["negative", "positive"], "files": files} | options
    return SentenceClassification(root=str(root), cache=str(root / "cache"), **options)


def reviews_with(root, content):
    """A corpus whose only file holds `content`."""
    (root / "sentcls").mkdir()
    (root / "sentcls" / "reviews.all").write_bytes(content)
    return corpus(root)


# A person's own sentences


def sentences(folder, content, **options):
    (folder / "mine.txt").write_text(content, encoding="utf-8")
    names = {"path": str(folder / "mine.txt")} | options
    return OwnSentences(root=str(folder), cache=str(folder / "cache"), **names)


def test_labels_of_own_sentences_may_be_any_words(tmp_path):
    lines = "".join(f"{'ham' if i % 3 else 'spam'}{' ' if i % 2 else chr(9)}word{i} again\n" for i in range(40))
    data = sentences(tmp_path, lines, min_count=1)
    data.setup()
    assert data.labels == ["ham", "spam"]
    assert {split: len(own) for split, own in data.splits.items()} == {"train": 33, "val": 3, "test": 4}
    assert sorted(words[0] for own in data.splits.values() for words, _ in own) == sorted(f"word{i}" for i in range(40))
    assert all(label == (int(words[0][4:]) % 3 == 0) for own in data.splits.values() for words, label in own)
    named = sentences(tmp_path, lines, labels=["spam", "ham"])
    named.setup()
    assert named.splits["test"][0][1] == 1 - data.splits["test"][0][1]
    (tmp_path / "test.txt").write_text("spam a\nham b\n")
    three = sentences(tmp_path, lines, path=None, train=tmp_path / "mine.txt", test=str(tmp_path / "test.txt"))
    three.checkpoint_vocabulary = SentenceClassification.vocabulary_of(data.state_dict())
    three.setup()
    assert {split: len(own) for split, own in three.splits.items()} == {"train": 36, "val": 4, "test": 2}
    assert three.labels == data.labels


def test_blank_lines_and_marks_are_not_labels(tmp_path):
    """Blank lines, the marks of files that are joined, and the Ctrl-Z of DOS."""
    mark, end = chr(0xFEFF), chr(0x1A)
    data = sentences(tmp_path, f"\n \t\nneg a\r\n\n{mark}pos b\n  \n{end}{mark}neg c\n{mark}\npos d\n{end}")
    assert data.read()["all"] == [(["a"], 0), (["b"], 1), (["c"], 0), (["d"], 1)]
    assert data.labels == ["neg", "pos"]
    with pytest.raises(ValueError, match=r"mine\.txt:4: expected `label text` with a label of neg, found 'pos b'"):
        sentences(tmp_path, "\nneg a\n\npos b\n", labels=["neg"]).read()
    with pytest.raises(ValueError, match=r"mine\.txt is empty"):
        sentences(tmp_path, f" \n{end}").read()


def test_own_sentences_must_be_utf8(tmp_path):
    data = sentences(tmp_path, "")
    (tmp_path / "mine.txt").write_bytes(b"pos caf\xc3\xa9\n\nneg caf\xe9\n")
    with pytest.raises(ValueError, match=r"mine\.txt:3: byte 0xe9 is not UTF-8.*iconv -f latin1 -t utf-8 FILE > NEW"):
        data.read()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            "a x\n",
            {"path": None},
            r"given: none\. Type data\.path=FILE, or data\.train=FILE data\.test=FILE",
        ),
        ("a x\n", {"path": None, "train": "x"}, r"given: train\. Type data\.path=FILE"),
        ("a x\n", {"path": "absent.txt"}, r"data\.path=absent\.txt is not a file: type data\.path=FILE"),
        ("a x\n", {"labels": ["a", "a"]}, r"data\.labels=\['a', 'a'\] must be different words"),
        ("a x\n", {"labels": ["b", "c"]}, r"mine\.txt:1: expected `label text` with a label of b, c, found 'a x'"),
        ("", {}, r"mine\.txt is empty: give it lines of `label text`"),
        ("\n\r\n", {}, r"mine\.txt is empty"),
        ("a x\n" * 12, {}, r"all 9 training examples have the label a: add examples of another"),
        ("a x\nb y\n" * 5, {}, r"the val split is empty: there is a total of 10"),
        ("".join(f"w{i} x\n" for i in range(30)), {}, r"has 30 different labels in 30 lines, such as w0, w1, w10"),
    ],
)
def test_wrong_files_and_options_of_own_sentences_are_refused(tmp_path, content, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sentences(tmp_path, content, **options).setup()


# Splits


@pytest.mark.parametrize("fold", range(10))
def test_ten_folds_are_disjoint_and_cover_the_corpus(fold):
    splits = split_examples({"all": list(range(107))}, fold)
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == list(range(107))
    assert len(splits["test"]) == (11 if fold < 7 else 10)
    assert len(splits["val"]) == (107 - len(splits["test"])) // 10


def test_the_test_sets_of_ten_folds_are_the_corpus():
    tests = [split_examples({"all": list(range(107))}, fold)["test"] for fold in range(10)]
    assert sorted(item for test in tests for item in test) == list(range(107))


def test_fold_three_holds_every_tenth_item_of_the_shuffled_list():
    import random

    shuffled = list(range(107))
    order = random.Random(1234).sample(shuffled, 107)
    assert split_examples({"all": shuffled}, 3)["test"] == [
        order[i] for i in (3, 13, 23, 33, 43, 53, 63, 73, 83, 93, 103)
    ]


def test_a_given_test_set_stays_and_a_tenth_of_train_is_validation():
    splits = split_examples({"train": list(range(50)), "test": [100, 101]}, 2)
    assert splits["test"] == [100, 101]
    assert len(splits["val"]) == 5
    assert sorted(splits["train"] + splits["val"]) == list(range(50))
    assert splits["val"] != split_examples({"train": list(range(50)), "test": [100, 101]}, 3)["val"]


def test_three_given_splits_stay_as_they_are():
    files = {"train": [1, 2, 3], "val": [4], "test": [5]}
    assert split_examples(files, 0) == files
    with pytest.raises(ValueError, match=r"data.fold=1: this corpus has one fixed split, so only data.fold=0"):
        split_examples(files, 1)


@pytest.mark.parametrize(
    ("count", "fold", "split"), [(0, 0, "train"), (1, 0, "train"), (2, 0, "val"), (3, 9, "val"), (11, 0, "val")]
)
def test_too_few_examples_for_ten_folds_are_refused(count, fold, split):
    with pytest.raises(
        ValueError, match=rf"the {split} split is empty: .* of {count}, and data.fold={fold} of 10 needs 12"
    ):
        split_examples({"all": list(range(count))}, fold)
    for fold in range(10):
        assert all(split_examples({"all": list(range(12))}, fold).values())


@pytest.mark.parametrize(
    ("files", "fold", "message"),
    [
        ({"train": [1], "test": [2]}, 0, "the train split is empty: .* of 1, and data.fold=0 of 10 needs 2"),
        ({"train": [1, 2, 3], "test": [2]}, 5, "the val split is empty: .* of 3, and data.fold=5 of 10 needs 6"),
    ],
)
def test_too_few_examples_to_hold_a_tenth_out_are_refused(files, fold, message):
    with pytest.raises(ValueError, match=message):
        split_examples(files, fold)
    assert split_examples({"train": [1, 2, 3, 4, 5, 6], "test": [2]}, 5)["val"]


def test_the_seed_of_a_run_moves_no_example_to_another_split(tmp_path):
    one, other = corpus(tmp_path, seed=1), corpus(tmp_path, seed=2)
    assert one.model_kwargs["vocab_size"] == other.model_kwargs["vocab_size"]
    assert one.splits == other.splits
    first, second = next(iter(one.train_dataloader())), next(iter(other.train_dataloader()))
    assert first[0].shape != second[0].shape or not torch.equal(first[0], second[0])


# Batches


def test_a_batch_is_time_first_and_padded_on_the_left(tmp_path):
    data = corpus(tmp_path)
    data.setup()
    data.vocabulary = Vocabulary(["<pad>", "<unk>", "the", "tea", "was", "fresh"], data.labels)
    data.splits["test"] = [(["the", "tea"], 1), (["the", "bread", "was", "fresh"], 0)]
    [(tokens, labels)] = data.test_dataloader()
    assert tokens.tolist() == [[0, 2], [0, 1], [2, 4], [3, 5]]
    assert labels.tolist() == [1, 0]
    assert tokens.dtype == labels.dtype == torch.int64


def test_every_example_is_in_one_batch_with_its_label(tmp_path):
    data = corpus(tmp_path, batch_size=4, min_count=1)
    data.setup()
    seen = [
        (tuple(data.vocabulary.words[i] for i in column if i), int(label))
        for tokens, labels in data.train_dataloader()
        for column, label in zip(tokens.T, labels, strict=True)
    ]
    assert sorted(seen) == sorted((tuple(words), label) for words, label in data.splits["train"])


def test_batches_keep_their_order_in_every_epoch_and_leave_the_global_state(tmp_path):
    data = corpus(tmp_path, batch_size=4)
    data.setup()
    loader = data.train_dataloader()
    state = torch.get_rng_state()
    first, second = list(loader), list(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == len(second) == 7  # 25 of the 30 sentences
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_the_same_seed_gives_the_same_batches_and_a_second_setup_changes_nothing(tmp_path):
    one, other = corpus(tmp_path, batch_size=4), corpus(tmp_path, batch_size=4)
    one.setup()
    splits = one.splits
    one.setup()
    other.setup()
    assert one.splits is splits
    pairs = zip(one.train_dataloader(), other.train_dataloader(), strict=True)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_text_is_cleaned_and_lower_cased_unless_told_otherwise(tmp_path):
    line = "It's GOOD; really"
    assert corpus(tmp_path).words_of(line) == ["it", "'s", "good", "really"]
    assert corpus(tmp_path, lowercase=False).words_of(line) == ["It", "'s", "GOOD", "really"]
    assert corpus(tmp_path, clean=False).words_of(line) == ["it's", "good;", "really"]
    assert corpus(tmp_path).words_of("- -") == ["-", "-"]


def test_running_text_is_split_as_the_corpora_are(tmp_path):
    assert word_vectors.tokenise("We didn’t go: it's 5-fold.") == [
        "We",
        "did",
        "n't",
        "go",
        ":",
        "it",
        "'s",
        "5-fold",
        ".",
    ]


def test_given_splits_are_read_from_their_files(tmp_path):
    names = ("questions.train.all", "questions.test.all")
    data = corpus(tmp_path, names, ("train", "test"), labels=list("abcdef"), lowercase=False, fold=1)
    assert data.model_kwargs["num_classes"] == 6
    assert [len(data.splits[key]) for key in ("train", "val", "test")] == [10, 2, 3]
    assert data.splits["test"][1] == (["Who", "found", "the", "river", "?"], 3)


@pytest.mark.parametrize("pack", [None, gzip.compress, lzma.compress])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_plain_gz_and_xz_are_read_in_either_encoding(tmp_path, pack, encoding):
    content = REVIEWS.decode("latin-1").encode(encoding)
    suffix = {None: "", gzip.compress: ".gz", lzma.compress: ".xz"}[pack]
    (tmp_path / "sentcls").mkdir()
    (tmp_path / "sentcls" / f"reviews.all{suffix}").write_bytes(pack(content) if pack else content)
    data = corpus(tmp_path, clean=False)
    data.setup()
    assert any("café" in words for split in data.splits.values() for words, _ in split)


# Vocabulary


def test_words_are_ranked_by_count_and_rare_ones_are_unknown():
    sentences = [["b", "a", "a"], ["b", "c", "<unk>"]]
    assert word_vectors.build_vocabulary(sentences, 1) == ["<pad>", "<unk>", "a", "b", "c"]
    assert word_vectors.build_vocabulary(sentences, 2) == ["<pad>", "<unk>", "a", "b"]


def test_learnt_words_come_from_training_and_fixed_ones_from_everywhere(tmp_path):
    learnt = corpus(tmp_path)
    fixed = corpus(tmp_path, vectors=str(SAMPLES / "vectors.txt"))
    assert learnt.model_kwargs["vectors"] is None
    assert fixed.model_kwargs["vectors"].shape == (len(fixed.vocabulary.words), 4)
    train = [word for words, _ in learnt.splits["train"] for word in words]
    assert set(learnt.vocabulary.words[2:]) == {word for word in train if train.count(word) > 1}
    assert set(fixed.vocabulary.words[2:]) == {
        word for split in fixed.splits.values() for words, _ in split for word in words
    }


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    data = corpus(tmp_path)
    state = data.state_dict()
    assert state["labels"] == ["negative", "positive"]
    assert state["vocabulary"][:2] == ["<pad>", "<unk>"]
    torch.save(state, tmp_path / "state.pt")
    data.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    changed = ["<pad>", "<unk>", "zebra", *state["vocabulary"][3:]]
    with pytest.raises(ValueError, match=r"vocabulary had .* \(number 2 was 'zebra' and is .*data.fold"):
        data.load_state_dict(state | {"vocabulary": changed})
    with pytest.raises(ValueError, match="labels had 1 entries and has 2"):
        data.load_state_dict(state | {"labels": ["negative"]})


def test_a_trainer_saves_the_vocabulary_and_sees_the_batches(tmp_path):
    data = corpus(tmp_path, batch_size=4)
    tokens, trainer = record(Recorder(lambda batch: batch[0]), data, epochs=2)
    assert len(tokens) == 14
    assert all(torch.equal(a, b) for a, b in zip(tokens[:7], tokens[7:], strict=True))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["SentenceClassification"]["vocabulary"] == data.vocabulary.words


# Bad corpora


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"reviews.all is empty: give it lines"),
        (b"1 fine\nno label here\n", r"reviews.all:2: expected `label text` .* found 'no label here'"),
        (b"1 fine\n\n0 bad\n", r"reviews.all:2: .* found ''"),
        (b"2 fine\n", r"reviews.all:1: expected `label text` with a label from 0 to 1, found '2 fine'"),
        (b"-1 fine\n", r"reviews.all:1: "),
        (b"1.0 fine\n", r"reviews.all:1: "),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        _ = reviews_with(tmp_path, content).model_kwargs


def test_a_file_of_another_length_than_published_is_refused(tmp_path):
    files = {"all": {"name": "reviews.all", "url": None, "sha256": None, "examples": 31}}
    with pytest.raises(ValueError, match=r"reviews.all holds 30 examples, expected 31"):
        _ = corpus(tmp_path, files=files).model_kwargs


def test_a_missing_file_without_an_address_is_named(tmp_path):
    files = {"all": {"name": "other.all", "url": None, "sha256": None, "examples": None}}
    with pytest.raises(FileNotFoundError, match=r"sentcls/other.all is missing"):
        _ = corpus(tmp_path, files=files).model_kwargs


def test_a_label_without_words_is_one_unknown_word(tmp_path):
    assert corpus(tmp_path).words_of("") == ["<unk>"]


# The embedded corpus, and the real ones


def test_the_manual_has_ten_topics_and_nothing_to_download(tmp_path):
    options = configuration("pydoc") | {"root": str(tmp_path), "cache": str(tmp_path)}
    data, again = PythonManual(**options), PythonManual(**options)
    assert data.model_kwargs["num_classes"] == len(set(data.labels)) == 10
    assert again.model_kwargs["vocab_size"] == data.model_kwargs["vocab_size"]
    assert again.splits == data.splits
    examples = [example for split in data.splits.values() for example in split]
    assert len(examples) > 1000
    assert {label for _, label in examples} == set(range(10))
    assert min(len(words) for words, _ in examples) > 4
    assert len({tuple(words) for words, _ in examples}) > 0.99 * len(examples)
    sizes = [len(data.splits[key]) / len(examples) for key in ("train", "val", "test")]
    assert sizes == pytest.approx([0.81, 0.09, 0.1], abs=0.01)
    assert list(tmp_path.iterdir()) == []


def configuration(name):
    options = yaml.safe_load((ROOT / "conf" / "data" / "_sentcls.yaml").read_text())
    options |= yaml.safe_load((ROOT / "conf" / "data" / f"{name}.yaml").read_text())
    return {key: value for key, value in options.items() if key not in ("_target_", "defaults")} | {"seed": 1234}


@pytest.mark.parametrize("given", ["corpora", "{}/corpora", ""])
def test_the_variable_names_the_folder_of_the_real_corpora(tmp_path, monkeypatch, given):
    """A relative folder is relative to where the tests are started; without the variable it is beside the project."""
    (tmp_path / "corpora/ptb").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SRU_TEST_DATA", given.format(tmp_path))
    module = runpy.run_path(str(ROOT / "tests/conftest.py"))
    monkeypatch.chdir("/")
    folder = tmp_path / "corpora" if given else ROOT.parent / "shared/data"
    assert (module["REAL"], module["GOLDEN"][1]) == (folder, folder.parent / "golden")
    if given:
        assert module["real_data"]("ptb") == folder
    with pytest.raises(pytest.skip.Exception) as skipped:
        module["real_data"]("no_corpus/*")
    expected = f"{folder}/no_corpus/* is not there; SRU_TEST_DATA names the folder of the real corpora"
    assert str(skipped.value) == expected


@pytest.mark.parametrize("name", ["cr", "mr", "subj", "trec", "mpqa", "sst"])
def test_a_published_corpus_is_whole(name, tmp_path):
    options = configuration(name) | {"cache": str(tmp_path)}
    options["root"] = str(real_data(*(f"sentcls/{file['name']}*" for file in options["files"].values())))
    data = SentenceClassification(**options)
    assert data.model_kwargs["num_classes"] == len(options["labels"])
    assert sum(map(len, data.splits.values())) == sum(file["examples"] for file in options["files"].values())
    assert {label for _, label in data.splits["train"]} == set(range(len(options["labels"])))
    tokens, _ = next(iter(data.train_dataloader()))
    assert (tokens[-1] != 0).all()


def test_real_vectors_cover_a_real_corpus(tmp_path):
    root, vectors = real_data("sentcls/custrev.all.gz", "vectors/glove*"), "vectors/glove.6B.50d.subset.txt.gz"
    options = configuration("cr") | {"root": str(root), "cache": str(tmp_path), "vectors": str(root / vectors)}
    vectors = SentenceClassification(**options).model_kwargs["vectors"]
    assert vectors.shape[1] == 50
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))

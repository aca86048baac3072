"""Corpora for classification: downloads, reading, splits, batches, vocabulary, vectors, and what bad input is told."""

import gzip
import http.server
import lzma
import multiprocessing
import re
import shutil
import socket
import sys
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

from data import text
from data.classification import PythonManual, SentenceClassification, split_examples
from data.fetch import fetch

ROOT = Path(__file__).parent.parent
SAMPLES = Path(__file__).parent / "samples"
REAL = ROOT.parent / "shared" / "data"
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
    with pytest.raises(ValueError, match=r"data.fold=1: this corpus has one given split, so only data.fold=0"):
        split_examples(files, 1)


@pytest.mark.parametrize("fold", [-1, 10])
def test_a_fold_out_of_range_is_refused(fold):
    with pytest.raises(ValueError, match=rf"data.fold={fold} is not one of 0 to 9"):
        split_examples({"all": [1, 2]}, fold)


def test_the_seed_of_a_run_moves_no_example_to_another_split(tmp_path):
    one, other = corpus(tmp_path, seed=1), corpus(tmp_path, seed=2)
    assert one.dims["vocab_size"] == other.dims["vocab_size"]
    assert one.splits == other.splits
    assert not torch.equal(one.encode(["the tea"]), torch.zeros(2, 1))
    first, second = next(iter(one.train_dataloader())), next(iter(other.train_dataloader()))
    assert first[0].shape != second[0].shape or not torch.equal(first[0], second[0])


# Batches


def test_a_batch_is_time_first_and_padded_on_the_left(tmp_path):
    data = corpus(tmp_path)
    data.setup()
    data.index = {word: i for i, word in enumerate(["<pad>", "<unk>", "the", "tea", "was", "fresh"])}
    data.splits["test"] = [(["the", "tea"], 1), (["the", "bread", "was", "fresh"], 0)]
    [(tokens, labels)] = data.test_dataloader()
    assert tokens.tolist() == [[0, 2], [0, 1], [2, 4], [3, 5]]
    assert labels.tolist() == [1, 0]
    assert tokens.dtype == labels.dtype == torch.int64


def test_every_example_is_in_one_batch_with_its_label(tmp_path):
    data = corpus(tmp_path, batch_size=4, min_count=1)
    data.setup()
    seen = [
        (tuple(data.words[i] for i in column if i), int(label))
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
    assert text.tokenise("We didn’t go: it's 5-fold.") == ["We", "did", "n't", "go", ":", "it", "'s", "5-fold", "."]
    data = corpus(tmp_path, min_count=1)
    data.setup()
    words = [[data.words[i] for i in column] for column in data.encode(["It's warm!", "Zebra"]).T]
    assert words == [["it", "'s", "warm", "!"], ["<pad>", "<pad>", "<pad>", "<unk>"]]


def test_given_splits_are_read_from_their_files(tmp_path):
    names = ("questions.train.all", "questions.test.all")
    data = corpus(tmp_path, names, ("train", "test"), labels=list("abcdef"), lowercase=False, fold=1)
    assert data.dims["num_classes"] == 6
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
    assert text.build_vocabulary(sentences, 1) == ["<pad>", "<unk>", "a", "b", "c"]
    assert text.build_vocabulary(sentences, 2) == ["<pad>", "<unk>", "a", "b"]


def test_learnt_words_come_from_training_and_fixed_ones_from_everywhere(tmp_path):
    learnt = corpus(tmp_path)
    fixed = corpus(tmp_path, vectors=str(SAMPLES / "vectors.txt"))
    assert learnt.dims["vectors"] is None
    assert fixed.dims["vectors"].shape == (len(fixed.words), 4)
    train = [word for words, _ in learnt.splits["train"] for word in words]
    assert set(learnt.words[2:]) == {word for word in train if train.count(word) > 1}
    assert set(fixed.words[2:]) == {word for split in fixed.splits.values() for words, _ in split for word in words}


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    data = corpus(tmp_path)
    state = data.state_dict()
    assert state["labels"] == ["negative", "positive"]
    assert state["vocabulary"][:2] == ["<pad>", "<unk>"]
    torch.save(state, tmp_path / "state.pt")
    data.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    changed = ["<pad>", "<unk>", "zebra", *state["vocabulary"][3:]]
    with pytest.raises(ValueError, match=r"vocabulary has .* number 2 was 'zebra' and is .*data.fold"):
        data.load_state_dict(state | {"vocabulary": changed})
    with pytest.raises(ValueError, match="labels has 1 entries, the data's 2"):
        data.load_state_dict(state | {"labels": ["negative"]})


def test_a_trainer_saves_the_vocabulary_and_sees_the_batches(tmp_path):
    class Counter(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.tokens = []

        def training_step(self, batch, _):
            self.tokens.append(batch[0])
            return self.weight**2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data, model = corpus(tmp_path, batch_size=4), Counter()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert len(model.tokens) == 14
    assert all(torch.equal(a, b) for a, b in zip(model.tokens[:7], model.tokens[7:], strict=True))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["SentenceClassification"]["vocabulary"] == data.words


# Vectors

WORDS = ["<pad>", "<unk>", "tea", "the", "zebra"]


def sample_vector(word):
    line = next(line for line in (SAMPLES / "vectors.txt").read_text().splitlines() if line.startswith(word + " "))
    return torch.nn.functional.normalize(torch.tensor([float(x) for x in line.split()[1:]]), dim=0)


def vectors_in(tmp_path, name, content=None, *, member="vectors.txt"):
    """The sample's vectors (or `content`) under a file name whose suffix says how to pack them."""
    content = (SAMPLES / "vectors.txt").read_bytes() if content is None else content
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(content))
    return path


@pytest.mark.parametrize("name", ["v.txt", "v.txt.gz", "v.txt.xz", "v.zip"])
@pytest.mark.parametrize("header", [b"", b"18 4\n"])
def test_vectors_of_a_text_file_have_unit_length_and_their_words(tmp_path, name, header):
    path = vectors_in(tmp_path, name, header + (SAMPLES / "vectors.txt").read_bytes())
    vectors = text.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")
    assert vectors.shape == (5, 4)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(vectors[2], sample_vector("tea"))
    torch.testing.assert_close(vectors[3], sample_vector("the"))


def test_words_without_a_vector_draw_one_by_a_fixed_seed(tmp_path):
    path = str(SAMPLES / "vectors.txt")
    one = text.load_vectors(WORDS, path, tmp_path, tmp_path / "one")
    torch.manual_seed(99)
    other = text.load_vectors(WORDS, path, tmp_path, tmp_path / "other")
    assert torch.equal(one, other)
    assert (one[0] != 0).all()  # padding has a vector like any other
    assert not torch.equal(one[1], one[4])


def test_words_are_looked_up_as_they_are_written(tmp_path):
    vectors = text.load_vectors(["<pad>", "<unk>", "Tea", "tea"], str(SAMPLES / "vectors.txt"), tmp_path, tmp_path)
    assert not torch.allclose(vectors[2], vectors[3])


def test_the_first_of_two_vectors_of_a_word_counts(tmp_path):
    path = vectors_in(tmp_path, "v.txt", b"tea 1 0 0\nthe 0 1 0\ntea 0 0 1\n")
    assert text.load_vectors(WORDS, str(path), tmp_path, tmp_path)[2].tolist() == [1, 0, 0]


def test_the_large_file_is_read_once_for_a_vocabulary(tmp_path, monkeypatch):
    path = vectors_in(tmp_path, "v.txt")
    one = text.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(text, "text_lines", lambda *_: pytest.fail("the file was read again"))
        assert torch.equal(text.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache"), one)
    path.write_bytes(b"tea 1 0 0\nthe 0 1 0\n")  # another file under the same name is read
    assert text.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache").shape == (5, 3)
    assert text.load_vectors([*WORDS, "bread"], str(path), tmp_path, tmp_path / "cache").shape == (6, 3)


def test_a_failed_reading_leaves_nothing_in_the_cache(tmp_path):
    path = vectors_in(tmp_path, "v.txt", b"tea 1 0 0\nthe 0 1\n")
    with pytest.raises(ValueError, match=r"v.txt:2"):
        text.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "vectors").iterdir() if p.is_dir()]


def test_certificates_are_still_verified_after_torchtext(tmp_path):
    import ssl

    text.load_vectors(WORDS, str(SAMPLES / "vectors.txt"), tmp_path, tmp_path)
    assert ssl._create_default_https_context is ssl.create_default_context


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"3 4\n", "is empty"),
        (b"tea 1 2 3\nthe 1 2\n", r"v.txt:2: expected a word and 3 numbers, found b'the 1 2'"),
        (b"tea 1 2 3\nthe 1 2 3 4\n", r"v.txt:2: expected a word and 3 numbers, found b'the 1 2 3 4'"),
        (b"2 4\ntea 1 2 3\n", r"v.txt:2: expected a word and 4 numbers"),
        (b"tea 1 2 3\nthe 1 x 3\n", r"v.txt:2: expected a word and 3 finite numbers"),
        (b"tea 1 2 3\nthe 1 nan 3\n", r"v.txt:2: expected a word and 3 finite numbers"),
        (b"no spaces here\ntea\n", r"v.txt:1|v.txt:2"),
        (b"chat 1 2 3\nchien 1 2 3\n", "has no vector for any of the 3 words"),
    ],
)
def test_bad_vectors_are_refused_by_file_and_line(tmp_path, content, message):
    path = vectors_in(tmp_path, "v.txt", content)
    with pytest.raises(ValueError, match=message):
        text.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")


def test_a_damaged_archive_of_vectors_is_named(tmp_path):
    packed = gzip.compress((SAMPLES / "vectors.txt").read_bytes())
    (tmp_path / "v.txt.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "v.zip").write_bytes(b"PK not really")
    for name in ("v.txt.gz", "v.zip"):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            text.load_vectors(WORDS, str(tmp_path / name), tmp_path, tmp_path / "cache")


def test_vectors_that_are_not_there_are_explained(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data.vectors=glove is neither a file nor one of glove.6B.50d, .*word2vec"
    ):
        text.load_vectors(WORDS, "glove", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"GoogleNews.*code.google.com.*data.vectors=glove.840B.300d"):
        text.load_vectors(WORDS, "word2vec", tmp_path, tmp_path)


def test_a_glove_archive_is_found_by_name_and_checked(tmp_path, monkeypatch):
    path = vectors_in(tmp_path, "glove.6B.zip", member="glove.6B.50d.txt")
    with pytest.raises(ValueError, match=r"glove.6B.zip is not the right file: .* expected 617afb2f"):
        text.load_vectors(WORDS, "glove.6B.50d", tmp_path, tmp_path / "cache")
    checksum = sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(text.GLOVE, "glove.6B.50d", ("glove.6B.zip", "http://127.0.0.1:1/none", checksum))
    vectors = text.load_vectors(WORDS, "glove.6B.50d", tmp_path, tmp_path / "cache")
    torch.testing.assert_close(vectors[2], sample_vector("tea"))


@pytest.mark.parametrize("name", ["v.bin", "v.bin.gz"])
def test_the_binary_format_gives_the_vectors_of_the_text(tmp_path, name):
    models = pytest.importorskip("gensim.models", reason="needs the word2vec extra")
    written = models.KeyedVectors(4)
    numbers = torch.tensor([[1 / 3, 2 / 7, 0.3, -0.4], [1.0, 0.0, 2 / 3, 1e-7], [1.0, 1.0, 1.0, 1.0]])
    written.add_vectors(["tea", "the", "unused"], numbers.numpy())
    written.save_word2vec_format(str(tmp_path / name), binary=True)
    vectors = text.load_vectors(WORDS, str(tmp_path / name), tmp_path, tmp_path / "cache")
    assert torch.equal(vectors[2:4], torch.nn.functional.normalize(numbers[:2], dim=1))


def test_the_binary_format_without_gensim_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim", None)
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    (tmp_path / "v.bin").write_bytes(b"1 2\ntea 00000000")
    with pytest.raises(ImportError, match=re.escape("pip install '.[word2vec]'")):
        text.load_vectors(WORDS, str(tmp_path / "v.bin"), tmp_path, tmp_path / "cache")


# Bad corpora


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"reviews.all holds 0 examples"),
        (b"1 fine\nno label here\n", r"reviews.all:2: expected `label text` .* found 'no label here'"),
        (b"1 fine\n\n0 bad\n", r"reviews.all:2: .* found ''"),
        (b"2 fine\n", r"reviews.all:1: expected `label text` with a label from 0 to 1, found '2 fine'"),
        (b"-1 fine\n", r"reviews.all:1: "),
        (b"1.0 fine\n", r"reviews.all:1: "),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        _ = reviews_with(tmp_path, content).dims


def test_a_file_of_another_length_than_published_is_refused(tmp_path):
    files = {"all": {"name": "reviews.all", "url": None, "sha256": None, "examples": 31}}
    with pytest.raises(ValueError, match=r"reviews.all holds 30 examples, expected 31"):
        _ = corpus(tmp_path, files=files).dims


def test_a_missing_file_without_an_address_is_named(tmp_path):
    files = {"all": {"name": "other.all", "url": None, "sha256": None, "examples": None}}
    with pytest.raises(FileNotFoundError, match=r"sentcls/other.all is missing"):
        _ = corpus(tmp_path, files=files).dims


def test_a_label_without_words_is_one_unknown_word(tmp_path):
    assert corpus(tmp_path).words_of("") == ["<unk>"]


# Downloads


class Server:
    """An HTTP server on this machine whose manners a test can spoil; `asked` lists the Range headers it saw."""

    def __init__(self):
        self.content = REVIEWS * 200
        self.ranges, self.break_at, self.asked = True, None, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.headers.get("Range"))
                if self.path != "/file":
                    return self.send_error(404)
                start = int(outer.asked[-1][6:-1]) if outer.asked[-1] and outer.ranges else 0
                if start >= len(outer.content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start : outer.break_at])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"
        self.sha256 = sha256(self.content).hexdigest()
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_download_is_checked_and_done_once(tmp_path, server):
    path = tmp_path / "new" / "file.txt"
    assert fetch(path, server.url, server.sha256) == path
    assert path.read_bytes() == server.content
    fetch(path, server.url, server.sha256)
    assert server.asked == [None]
    assert visible(path.parent) == ["file.txt"]


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path, server):
    server.break_at = 100_000
    with pytest.raises(ConnectionError, match=r"broke off\. Run the same command again"):
        fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert visible(tmp_path) == ["file.txt.part"]
    assert server.asked == [None, "bytes=65536-"]  # it tried once more, and that brought no whole block
    server.break_at = None
    fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert server.asked[2:] == ["bytes=65536-"]
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_a_server_without_ranges_starts_again(tmp_path, server):
    server.ranges = False
    (tmp_path / "file.txt.part").write_bytes(server.content[:5000])
    fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_a_server_without_ranges_that_breaks_off_is_given_up(tmp_path, server):
    server.ranges, server.break_at = False, 100_000
    with pytest.raises(ConnectionError, match="broke off"):
        fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert len(server.asked) == 2


def test_a_part_longer_than_the_file_is_dropped(tmp_path, server):
    (tmp_path / "file.txt.part").write_bytes(server.content + b"more")
    fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_a_download_with_a_wrong_checksum_is_deleted(tmp_path, server):
    with pytest.raises(ValueError, match=rf"(?s)expected {'0' * 64}.*got {server.sha256}.*came from {server.url}"):
        fetch(tmp_path / "file.txt", server.url, "0" * 64)
    assert visible(tmp_path) == []


def test_a_damaged_file_is_named_and_left(tmp_path, server):
    path = tmp_path / "file.txt"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"file.txt is not the right file: .* expected {server.sha256}.*`rm {path}`"):
        fetch(path, server.url, server.sha256)
    assert path.read_bytes() == b"damaged"
    assert server.asked == []


def test_the_checksum_of_a_packed_file_is_that_of_its_content(tmp_path):
    (tmp_path / "file.txt.gz").write_bytes(gzip.compress(REVIEWS))
    assert fetch(tmp_path / "file.txt", None, sha256(REVIEWS).hexdigest()) == tmp_path / "file.txt.gz"
    (tmp_path / "file.txt.gz").write_bytes(gzip.compress(REVIEWS)[:200])
    with pytest.raises(ValueError, match=r"file.txt.gz is damaged"):
        fetch(tmp_path / "file.txt", None, sha256(REVIEWS).hexdigest())


def test_an_unknown_checksum_is_recorded_and_then_holds(tmp_path, server):
    path = tmp_path / "file.txt"
    fetch(path, server.url)
    assert (tmp_path / "file.txt.sha256").read_text().strip() == server.sha256
    fetch(path, server.url)
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match=rf"expected {server.sha256}"):
        fetch(path, server.url)


def test_a_page_that_is_not_there_is_reported_with_its_address(tmp_path, server):
    url = server.url + "s"
    with pytest.raises(
        ConnectionError, match=rf"cannot download {url} to .*file.txt: the server answers 404 Not Found"
    ):
        fetch(tmp_path / "file.txt", url, server.sha256)


def test_no_network_names_address_place_and_the_corpus_that_needs_none(tmp_path):
    with socket.socket() as closed:  # bound and never listening: it refuses
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        with pytest.raises(ConnectionError, match=rf"{url} to {tmp_path}/file.txt: Connection refused.*data=pydoc"):
            fetch(tmp_path / "file.txt", url, "0" * 64)


def test_a_root_that_cannot_be_written_says_what_to_type(tmp_path, server):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PermissionError, match=r"cannot write to .*data.root=DIR.*SRU_DATA"):
        fetch(tmp_path / "file" / "sentcls" / "cr.all", server.url, server.sha256)


def test_two_processes_download_a_file_once(tmp_path, server):
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=fetch, args=(tmp_path / "file.txt", server.url, server.sha256)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert server.asked == [None]
    assert (tmp_path / "file.txt").read_bytes() == server.content


# The embedded corpus, and the real ones


def test_the_manual_has_ten_topics_and_nothing_to_download(tmp_path):
    options = configuration("pydoc") | {"root": str(tmp_path), "cache": str(tmp_path)}
    data, again = PythonManual(**options), PythonManual(**options)
    assert data.dims["num_classes"] == len(set(data.labels)) == 10
    assert again.dims["vocab_size"] == data.dims["vocab_size"]
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


@pytest.mark.parametrize("name", ["cr", "mr", "subj", "trec", "mpqa", "sst"])
def test_a_published_corpus_is_whole(name, tmp_path):
    options = configuration(name) | {"root": str(REAL), "cache": str(tmp_path)}
    if not all(list((REAL / "sentcls").glob(file["name"] + "*")) for file in options["files"].values()):
        pytest.skip(f"the corpus {name} is not in {REAL}")
    data = SentenceClassification(**options)
    assert data.dims["num_classes"] == len(options["labels"])
    assert sum(map(len, data.splits.values())) == sum(file["examples"] for file in options["files"].values())
    assert {label for _, label in data.splits["train"]} == set(range(len(options["labels"])))
    tokens, _ = next(iter(data.train_dataloader()))
    assert (tokens[-1] != 0).all()


def test_real_vectors_cover_a_real_corpus(tmp_path):
    source = REAL / "vectors" / "glove.6B.50d.subset.txt.gz"
    if not source.is_file() or not (REAL / "sentcls" / "custrev.all.gz").is_file():
        pytest.skip(f"CR or the vectors are not in {REAL}")
    options = configuration("cr") | {"root": str(REAL), "cache": str(tmp_path), "vectors": str(source)}
    vectors = SentenceClassification(**options).dims["vectors"]
    assert vectors.shape[1] == 50
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))

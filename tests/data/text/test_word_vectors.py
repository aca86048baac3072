"""Word vectors: text, packed and binary files, the cache, and what bad files are told."""

import gzip
import lzma
import re
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from data.text import word_vectors

SAMPLES = Path(__file__).parents[2] / "samples"
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
    vectors = word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")
    assert vectors.shape == (5, 4)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(vectors[2], sample_vector("tea"))
    torch.testing.assert_close(vectors[3], sample_vector("the"))


def test_words_without_a_vector_draw_one_by_a_fixed_seed(tmp_path):
    path = str(SAMPLES / "vectors.txt")
    one = word_vectors.load_vectors(WORDS, path, tmp_path, tmp_path / "one")
    torch.manual_seed(99)
    other = word_vectors.load_vectors(WORDS, path, tmp_path, tmp_path / "other")
    assert torch.equal(one, other)
    assert (one[0] != 0).all()  # padding has a vector like any other
    assert not torch.equal(one[1], one[4])


def test_words_are_looked_up_as_they_are_written(tmp_path):
    vectors = word_vectors.load_vectors(
        ["<pad>", "<unk>", "Tea", "tea"], str(SAMPLES / "vectors.txt"), tmp_path, tmp_path
    )
    assert not torch.allclose(vectors[2], vectors[3])


def test_the_first_of_two_vectors_of_a_word_counts(tmp_path):
    path = vectors_in(tmp_path, "v.txt", b"tea 1 0 0\nthe 0 1 0\ntea 0 0 1\n")
    assert word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path)[2].tolist() == [1, 0, 0]


def test_the_large_file_is_read_once_for_a_vocabulary(tmp_path, monkeypatch):
    path = vectors_in(tmp_path, "v.txt")
    one = word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(word_vectors, "text_lines", lambda *_: pytest.fail("the file was read again"))
        assert torch.equal(word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache"), one)
    path.write_bytes(b"tea 1 0 0\nthe 0 1 0\n")  # another file under the same name is read
    assert word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache").shape == (5, 3)
    assert word_vectors.load_vectors([*WORDS, "bread"], str(path), tmp_path, tmp_path / "cache").shape == (6, 3)


def test_a_failed_reading_leaves_nothing_in_the_cache(tmp_path):
    path = vectors_in(tmp_path, "v.txt", b"tea 1 0 0\nthe 0 1\n")
    with pytest.raises(ValueError, match=r"v.txt:2"):
        word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "vectors").iterdir() if p.is_dir()]


def test_certificates_are_still_verified_after_torchtext(tmp_path):
    import ssl

    word_vectors.load_vectors(WORDS, str(SAMPLES / "vectors.txt"), tmp_path, tmp_path)
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
        word_vectors.load_vectors(WORDS, str(path), tmp_path, tmp_path / "cache")


def test_a_damaged_archive_of_vectors_is_named(tmp_path):
    packed = gzip.compress((SAMPLES / "vectors.txt").read_bytes())
    (tmp_path / "v.txt.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "v.zip").write_bytes(b"PK not really")
    for name in ("v.txt.gz", "v.zip"):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            word_vectors.load_vectors(WORDS, str(tmp_path / name), tmp_path, tmp_path / "cache")


def test_vectors_that_are_not_there_are_explained(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data.vectors=glove is neither a file nor one of glove.6B.50d, .*word2vec"
    ):
        word_vectors.load_vectors(WORDS, "glove", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"GoogleNews.*code.google.com.*data.vectors=glove.840B.300d"):
        word_vectors.load_vectors(WORDS, "word2vec", tmp_path, tmp_path)


def test_a_glove_archive_is_found_by_name_and_checked(tmp_path, monkeypatch):
    path = vectors_in(tmp_path, "glove.6B.zip", member="glove.6B.50d.txt")
    with pytest.raises(ValueError, match=r"glove.6B.zip is not the right file: .* expected 617afb2f"):
        word_vectors.load_vectors(WORDS, "glove.6B.50d", tmp_path, tmp_path / "cache")
    checksum = sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(word_vectors.GLOVE, "glove.6B.50d", ("glove.6B.zip", "http://127.0.0.1:1/none", checksum))
    vectors = word_vectors.load_vectors(WORDS, "glove.6B.50d", tmp_path, tmp_path / "cache")
    torch.testing.assert_close(vectors[2], sample_vector("tea"))


@pytest.mark.parametrize("name", ["v.bin", "v.bin.gz"])
def test_the_binary_format_gives_the_vectors_of_the_text(tmp_path, name):
    models = pytest.importorskip("gensim.models", reason="needs the word2vec extra")
    written = models.KeyedVectors(4)
    numbers = torch.tensor([[1 / 3, 2 / 7, 0.3, -0.4], [1.0, 0.0, 2 / 3, 1e-7], [1.0, 1.0, 1.0, 1.0]])
    written.add_vectors(["tea", "the", "unused"], numbers.numpy())
    written.save_word2vec_format(str(tmp_path / name), binary=True)
    vectors = word_vectors.load_vectors(WORDS, str(tmp_path / name), tmp_path, tmp_path / "cache")
    assert torch.equal(vectors[2:4], torch.nn.functional.normalize(numbers[:2], dim=1))


def test_a_binary_file_cut_short_or_within_a_character(tmp_path):
    pytest.importorskip("gensim", reason="needs the word2vec extra")
    record = b" " + torch.tensor([3.0, 4.0, 0.0]).numpy().tobytes()
    whole = b"3 3\nt\xc3" + record + b"tea" + record + b"the" + record
    (tmp_path / "whole.bin").write_bytes(whole)
    vectors = word_vectors.load_vectors(WORDS, str(tmp_path / "whole.bin"), tmp_path, tmp_path / "cache")
    torch.testing.assert_close(vectors[2], torch.tensor([0.6, 0.8, 0.0]))
    (tmp_path / "cut.bin").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "cut.bin"))):
        word_vectors.load_vectors(WORDS, str(tmp_path / "cut.bin"), tmp_path, tmp_path / "cache")


def test_the_binary_format_without_gensim_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim", None)
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    (tmp_path / "v.bin").write_bytes(b"1 2\ntea 00000000")
    with pytest.raises(ImportError, match=re.escape("pip install '.[word2vec]'")):
        word_vectors.load_vectors(WORDS, str(tmp_path / "v.bin"), tmp_path, tmp_path / "cache")

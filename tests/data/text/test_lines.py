"""Text files as they are in the world: marks, encodings and line ends, in every reader of a person's files."""

import codecs
import io
import json
import sys

import numpy as np
import pytest
from test_classification import sentences
from test_lm_data import OWN

from data.audio import kaldi_ark
from data.lm import Text, Vocabulary
from data.spoken import read_manifest
from data.text import lines, sentence_pairs, word_vectors
from data.text.squad_tables import paragraphs_of
from tasks.modules import squad_metrics
from tasks.run import console

ODD = "a b\u2028c\x0cd\x85e\tf\n\n\u00e9 g\nlast h"  # three ends of lines that are none, and an empty line


def variants(content):
    """The same text as editors write it."""
    encoded = content.encode()
    return {
        "plain": encoded,
        "marked": codecs.BOM_UTF8 + encoded,
        "windows": codecs.BOM_UTF8 + encoded.replace(b"\n", b"\r\n"),
        "mac": encoded.replace(b"\n", b"\r"),
        "ended": encoded + b"\n",
        "windows, ended": encoded.replace(b"\n", b"\r\n") + b"\r\n",
        "mac, ended": encoded.replace(b"\n", b"\r") + b"\r",
    }


KINDS = list(variants(""))
OTHERS = {
    "utf-16": (
        ODD.encode("utf-16"),
        "is in UTF-16, not in UTF-8: type `iconv -f UTF-16 -t UTF-8 FILE > NEW`",
    ),
    "utf-16-be": (codecs.BOM_UTF16_BE + ODD.encode("utf-16-be"), "is in UTF-16"),
    "utf-32": (ODD.encode("utf-32"), "is in UTF-32"),
    "unmarked utf-16": ("0 ab\n".encode("utf-16-le"), ":1: the text contains a NUL byte.*iconv -f UTF-16LE -t UTF-8"),
    "nul": (b"0 ab\n1 c\0d\n", ":2: the text contains a NUL byte"),
}
others = pytest.mark.parametrize(("content", "message"), OTHERS.values(), ids=OTHERS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_same_lines_in_every_form(kind):
    assert lines.lines_of(lines.decode(variants(ODD)[kind], "a")) == ODD.split("\n")


def test_lines_by_hand():
    for content, expected in (("", []), ("\n", [""]), ("\r", [""]), ("a\rb\n", ["a\rb"]), ("a\n\n\n", ["a", "", ""])):
        assert lines.lines_of(content) == expected
    assert lines.lines_of("a\n\ufeffb\r\n\ufeff\nc\ufeff") == ["a", "b", "", "c\ufeff"]
    with pytest.raises(ValueError, match=r"a:12: byte 0xe9 is not UTF-8.*iconv -f latin1 -t utf-8"):
        lines.decode(b"\xc3\xa9\n\xe9", "a", 11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["characters", "words"])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_a_text_of_a_language_model_is_the_same_in_every_form(tmp_path, monkeypatch, kind, unit, block):
    monkeypatch.setattr("data.text.token_array.BLOCK", block)
    names = {}
    for name, content in (("train", ODD + "\n"), ("val", variants(ODD)[kind]), ("test", ODD + "\n")):
        names[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    data = Text(cache=str(tmp_path / "cache"), **OWN | {"unit": unit, "min_count": 1} | names)
    data.setup()
    val, train = (data.splits[split].tolist() for split in ("val", "train"))
    assert val == train or (unit == "characters" and "ended" not in kind and val == train[:-1])


def test_bytes_stay_bytes(tmp_path):
    content = codecs.BOM_UTF16_LE + b"a\0\r\n\r\x85" * 20
    (tmp_path / "a").write_bytes(content)
    data = Text(cache=str(tmp_path / "cache"), path=str(tmp_path / "a"), **OWN | {"unit": "bytes"})
    data.setup()
    tokens = np.concatenate([*data.splits.values()])
    assert bytes(data.vocabulary.tokens[token] for token in tokens) == content
    marked = Vocabulary("bytes", range(256)).lines(codecs.BOM_UTF8 + b"a\r\nb\n", "a")
    assert marked == ["\ufeffa\r", "b"]


@others
@pytest.mark.parametrize("unit", ["characters", "words"])
def test_what_is_no_text_is_refused_for_a_language_model(tmp_path, unit, content, message):
    (tmp_path / "a").write_bytes(content * 20)
    data = Text(cache=str(tmp_path / "cache"), path=str(tmp_path / "a"), **OWN | {"unit": unit})
    with pytest.raises(ValueError, match=message):
        data.setup()
    with pytest.raises(ValueError, match=message):
        Vocabulary(unit, []).lines(content, "input=-")


@pytest.mark.parametrize("kind", KINDS)
def test_labelled_sentences_are_the_same_in_every_form(tmp_path, kind):
    content = "no a\u2028b\nyes c\x85d\x0ce\nno f"
    data = sentences(tmp_path, "")
    (tmp_path / "mine.txt").write_bytes(variants(content)[kind])
    assert [words[0] for words, _ in data.read()["all"]] == ["a", "c", "f"]
    assert data.labels == ["no", "yes"]


@others
def test_what_is_no_text_is_refused_for_sentences(tmp_path, content, message):
    data = sentences(tmp_path, "")
    (tmp_path / "mine.txt").write_bytes(content + b"\n\n\n")
    with pytest.raises(ValueError, match=message):
        data.read()


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_texts_stay_in_step_in_every_form(tmp_path, kind):
    (tmp_path / "a").write_bytes(variants(ODD)[kind])
    found = sentence_pairs.check_text(tmp_path / "a")
    assert [*sentence_pairs.lines_of(tmp_path / "a")] == ODD.split("\n")
    assert found.lines == 4


@others
def test_what_is_no_text_is_refused_for_pairs(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sentence_pairs.check_text(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8, b"\n", b"\r", b"a\r\n", b"\r\n"])
def test_the_lines_of_a_short_text_are_counted_as_they_are_read(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert sentence_pairs.check_text(tmp_path / "a").lines == len([*sentence_pairs.lines_of(tmp_path / "a")])


VECTORS = "the 1 2 3\ntea 4 5 6\n\u0085 7 8 9\n"


@pytest.mark.parametrize(
    "content",
    [
        VECTORS.encode(),
        codecs.BOM_UTF8 + VECTORS.encode(),
        codecs.BOM_UTF8 + b"3 3\r\n" + VECTORS.replace("\n", "\r\n").encode() + b"\r\n\r\n",
        VECTORS.replace(" ", "\t").encode(),
        VECTORS.replace(" ", "\t", 1).encode().rstrip(),
    ],
)
def test_vectors_are_the_same_in_every_form(content):
    wanted = {b"the", b"tea", b"\xc2\x85"}
    found = b"".join(word_vectors.text_lines(io.BytesIO(content), "v.txt", wanted))
    assert found == VECTORS.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (VECTORS.encode("utf-16"), r"v\.txt is in UTF-16"),
        (VECTORS.encode("utf-16-le"), r"v\.txt:1: the text contains a NUL byte"),
        (VECTORS.replace("\n", "\r").encode(), r"v\.txt:1: lines end with CR.*tr '.r' '.n'"),
    ],
)
def test_vectors_that_are_no_text_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        [*word_vectors.text_lines(io.BytesIO(content), "v.txt", {b"the"})]


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_and_kaldis_tables_are_the_same_in_every_form(tmp_path, kind):
    rows = [{"audio": "a.wav", "text": "x\u2028y"}, {"audio": "b\x85.wav", "text": "z"}]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "m").write_bytes(variants(content)[kind])
    assert [(u.files[0].name, u.text) for u in read_manifest(tmp_path / "m")] == [
        ("a.wav", "x\u2028y"),
        ("b\x85.wav", "z"),
    ]
    (tmp_path / "utt2spk").write_bytes(variants("u1 s\u20281\n\nu2 s2")[kind])
    assert kaldi_ark.lines_of(tmp_path / "utt2spk") == ["u1 s\u20281", "u2 s2"]


@others
def test_what_is_no_text_is_refused_for_manifests_and_tables(tmp_path, content, message):
    (tmp_path / "m").write_bytes(content)
    for reader in (read_manifest, kaldi_ark.lines_of):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path / "m")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_every_encoding(tmp_path, encoding):
    content = json.dumps({"data": [], "text": "\u00e9"}, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    assert not [*paragraphs_of(content.encode(encoding), "a.json")]
    (tmp_path / "a.json").write_bytes(content.encode(encoding))
    assert squad_metrics.read_json(str(tmp_path / "a.json"))["text"] == "\u00e9"


def test_standard_input_is_read_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + b"\xc3\xa9\r\n"), encoding="ascii"))
    assert Vocabulary("characters", "\u00e9").lines(console.read("-"), "input=-") == ["\u00e9"]
    with pytest.raises(FileNotFoundError, match="input=/nowhere cannot be read"):
        console.read("/nowhere")

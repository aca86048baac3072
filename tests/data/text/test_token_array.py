"""How a text is prepared: packed files, the cache, refusals, and the published corpora."""

import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, real_data
from hydra.utils import instantiate
from test_lm_data import ARTICLE, SHORT, text_of, words_of

from data.lm import PythonManual, Text
from data.text import token_array


def zipped(content, *names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content if name == names[-1] else b"not this")
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zip", lambda content: zipped(content, "anything")),
        (".zip", lambda content: zipped(content, "README", "folder/text")),
    ],
)
def test_a_packed_file_is_read_as_it_is(tmp_path, suffix, pack):
    content = bytes(range(256)) * 4
    (tmp_path / f"text{suffix}").write_bytes(pack(content))
    for name in (f"text{suffix}", "text"):
        data = Text(root="", cache=str(tmp_path / "cache"), unit="bytes", path=str(tmp_path / name), **SHORT)
        data.setup()
        assert np.concatenate(list(data.splits.values())).tobytes() == content


@pytest.mark.parametrize(
    ("suffix", "pack", "message"),
    [
        (".gz", lambda content: gzip.compress(content)[:-200], "is damaged"),
        (".xz", lambda content: lzma.compress(content)[:-20], "is damaged"),
        (".zip", lambda content: zipped(content, "text")[:-20], "is damaged"),
        (".zip", lambda content: zipped(content, "one", "two"), r"holds 2 files \(one, two\): unpack"),
    ],
)
def test_a_damaged_archive_is_named_and_nothing_is_left(tmp_path, suffix, pack, message):
    (tmp_path / f"text{suffix}").write_bytes(pack(random.Random(0).randbytes(5000)))
    with pytest.raises(ValueError, match=rf"text{suffix} {message}"):
        Text(root="", cache=str(tmp_path / "cache"), unit="bytes", path=str(tmp_path / "text"), **SHORT).setup()
    assert [path.suffix for path in (tmp_path / "cache" / "text").iterdir()] in ([], [".lock"])


def prepared_folder(tmp_path):
    (folder,) = (path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir())
    return folder


def test_a_second_setup_builds_nothing_and_a_changed_file_is_prepared_again(tmp_path, monkeypatch):
    data = text_of(tmp_path, bytes(range(100)))
    data.prepare_data()
    data.setup()
    splits = data.splits
    data.setup()
    assert data.splits is splits
    built = []
    build = token_array.build
    monkeypatch.setattr(token_array, "build", lambda *args: built.append(1) or build(*args))
    Text(root="", cache=str(tmp_path / "cache"), unit="bytes", path=str(tmp_path / "file"), unroll=1).setup()
    assert built == []
    data = text_of(tmp_path, bytes(range(120)))
    data.setup()
    assert built == [1]
    assert sum(map(len, data.splits.values())) == 120


@pytest.mark.parametrize("file", ["all", "vocabulary.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_cache_is_built_again(tmp_path, file, damage):
    content = bytes(range(100))
    text_of(tmp_path, content).setup()
    state = (tmp_path / "file").stat()
    path = prepared_folder(tmp_path) / file
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else whole[:-3] + b"9" + whole[-2:])
    data = Text(root="", cache=str(tmp_path / "cache"), unit="bytes", path=str(tmp_path / "file"), **SHORT)
    data.setup()
    assert np.concatenate(list(data.splits.values())).tobytes() == content
    assert path.read_bytes() == whole
    assert (tmp_path / "file").stat().st_mtime_ns == state.st_mtime_ns


def test_a_folder_left_by_a_killed_process_is_not_used(tmp_path, monkeypatch):
    def killed(place, *_):
        (place / "all").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(token_array, "build", killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed outright, it cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            text_of(tmp_path, bytes(range(100))).setup()
    assert prepared_folder(tmp_path).suffix == ".part"
    data = Text(root="", cache=str(tmp_path / "cache"), unit="bytes", path=str(tmp_path / "file"), **SHORT)
    data.setup()
    assert len(data.splits["train"]) == 90
    assert prepared_folder(tmp_path).suffix == ""


TOGETHER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from data.text.token_array import Source, prepare

print("ready", flush=True)
sys.stdin.readline()
folder = Path({path!r})
tokens, arrays = prepare({{"all": Source(root=folder, name="file")}}, folder / "cache" / "text", "bytes", 1)
print(len(tokens), len(arrays["all"]), int(arrays["all"].sum()))
"""


def test_two_processes_prepare_a_text_at_once(tmp_path):
    content = random.Random(0).randbytes(1 << 22)
    (tmp_path / "file").write_bytes(content)
    command = [sys.executable, "-c", TOGETHER.format(root=str(ROOT), path=str(tmp_path))]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    outcomes = [child.communicate(timeout=120) for child in children]
    assert outcomes == [(f"256 {1 << 22} {sum(content)}\n", "")] * 2
    assert prepared_folder(tmp_path).suffix == ""


MEMORY = """
import sys, threading, time
sys.path.insert(0, {root!r})
from data.lm import Text

def watch():
    global most
    while True:
        with open("/proc/self/status") as file:
            most = max(most, next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon")))
        time.sleep(0.002)

most = 0
threading.Thread(target=watch, daemon=True).start()
for unit, suffix in (("bytes", ".gz"), ("characters", ""), ("words", "")):
    for size in ("small", "large"):
        files = {{"train": {{"name": size}}, "val": {{"name": "small"}}, "test": {{"name": "small"}}}}
        source = {{"files": files}} if unit == "words" else {{"path": {folder!r} + "/" + size + suffix}}
        most = 0
        data = Text(root={folder!r}, cache={folder!r} + "/cache", unit=unit, **source)
        data.setup()
        for loader in (data.train_dataloader(), data.val_dataloader()):
            for x, y, first in loader:
                pass
        time.sleep(0.05)
        print(most)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    if not Path("/proc/self/status").is_file() or "RssAnon" not in Path("/proc/self/status").read_text():
        pytest.skip("this system does not tell a process's private memory")
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz" * 20 + "éō日本"  # a few blocks are wide strings, as of real text
    words = ["".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(20_000)]
    megabyte = " ".join(generator.choices(words, k=1 << 18)).encode()[: 1 << 20].rpartition(b" ")[0] + b" \n"
    for name, megabytes in (("small", 1), ("large", 64)):
        content = megabyte * megabytes
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    command = [sys.executable, "-c", MEMORY.format(root=str(ROOT), folder=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = [float(size) for size in done.stdout.split()]
    assert len(used) == 6
    assert all(large < small + 24 for small, large in zip(used[::2], used[1::2], strict=True)), used


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "letters"}, r"data\.unit=letters is not one of bytes, characters, words"),
        ({"valid_bytes": "5k"}, r"data\.valid_bytes=5k must be a whole number, 2 "),
        ({"path": None}, r"type data\.path=FILE"),
        (
            {"path": None, "files": {"all": {"name": "a"}, "test": {"name": "b"}}},
            r"the text has files for all, test: type data\.train",
        ),
        ({"path": None, "train": "/"}, r"data\.train=/ is not a file: type data\.train=FILE"),
        ({"train": "a"}, r"data\.path= is one text.* leave out data\.train=.*, or type data\.path=null"),
        ({"files": {"all": {"name": "a"}}}, r"data\.path= name.* this corpus has its own files: type data=words"),
        ({"min_count": 2}, r"data\.min_count has no effect on bytes: leave it out, or type data=words"),
        ({"path": "/nonexistent"}, r"data\.path=/nonexistent is not a file: type data\.path=FILE"),
        ({"path": "/"}, r"data\.path=/ is not a file"),
        ({"valid_bytes": 60, "test_bytes": 40}, r"data\.valid_bytes=60 and data\.test_bytes=40 leave nothing of 100"),
        ({"valid_bytes": 600}, r"data\.valid_bytes=600 and data\.test_bytes=5 leave nothing of 100"),
        ({"valid_bytes": 0}, r"data\.valid_bytes=0 must be a whole number, 2 "),
        ({"test_bytes": -3}, r"data\.test_bytes=-3 must be a whole number, 2 "),
        ({"batch_size": 90}, r"the train split has 90 bytes, 0 steps in 90 streams: too few for data\.batch_size=90"),
        ({"unroll": 45}, r"44 steps in 2 streams: too few for data\.batch_size=2 and data\.unroll=45"),
        ({"eval_batch_size": 5}, r"the val split has 5 bytes, .* data\.eval_batch_size=5"),
        ({"eval_batch_size": 5}, r"which need 6\. Type data\.eval_batch_size=4 or less, .* larger data\.valid_bytes="),
        (
            {"batch_size": 9, "unroll": 10},
            r"need 91\. Type data\.batch_size=8 data\.unroll=10 or less, or use a longer",
        ),
        ({"batch_size": 9, "unroll": 200}, r"need 1801\. Type data\.batch_size=1 data\.unroll=89 or less"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        text_of(tmp_path, bytes(range(100)), **options).setup()


@pytest.mark.parametrize("unit", ["bytes", "characters", "words"])
@pytest.mark.parametrize("count", range(5))
def test_a_text_of_a_few_tokens_is_refused_with_what_it_needs(tmp_path, unit, count):
    (tmp_path / "text").write_text("ab\n" * count)
    data = Text(root="", cache=str(tmp_path / "cache"), unit=unit, path=str(tmp_path / "text"), batch_size=1, unroll=1)
    with pytest.raises(ValueError, match=r"is empty: name a file|the (train|val) split has . \w+, .*which need 2\. "):
        data.setup()


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"file is empty: name a file with text"):
        text_of(tmp_path, b"").setup()


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_bytes_that_are_not_utf8_are_refused_as_words_or_characters(tmp_path, unit):
    data = words_of(tmp_path) if unit == "words" else text_of(tmp_path, b"", unit=unit)
    (tmp_path / ("train.txt" if unit == "words" else "file")).write_bytes(b"a b \xff c\n" * 9)
    with pytest.raises(
        ValueError, match=r"(train\.txt|file):1: byte 0xff is not UTF-8 .*iconv .*, or type data\.unit="
    ):
        data.setup()


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
@pytest.mark.parametrize("unit", ["words", "characters"])
def test_the_line_of_a_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, unit, block):
    monkeypatch.setattr("data.text.token_array.BLOCK", block)
    with pytest.raises(ValueError, match=r"^file:3: byte 0xe9 is not UTF-8 .*`iconv -f latin1 -t utf-8 FILE > NEW`"):
        text_of(tmp_path, b"caf\xc3\xa9\r\n\r\ncaf\xe9 a\r\nb\r\n", unit=unit).setup()


def test_a_text_of_blank_lines_has_no_words(tmp_path):
    for content in (b"\n", b"\n \n" * 50):
        with pytest.raises(ValueError, match=r"file has no words, only blank lines: name a file with text"):
            text_of(tmp_path, content, unit="words").setup()
    with pytest.raises(ValueError, match=r"val\.txt has no words"):
        words_of(tmp_path, val=" \n").setup()
    for unit in ("bytes", "characters"):
        with pytest.raises(ValueError, match=r"^the text has 1 tokens, at least 2 are needed"):
            text_of(tmp_path, b"\n", unit=unit).setup()


def test_a_text_of_another_size_than_published_is_refused(tmp_path):
    data = words_of(tmp_path)
    data.files["val"]["tokens"] = 99
    with pytest.raises(
        ValueError, match=r"val\.txt holds 22 words, expected 99: not the published file\. .*another data\.root=DIR"
    ):
        data.setup()


@pytest.mark.parametrize(("kind", "length"), [("sha256", 64), ("md5", 32)])
def test_a_file_of_another_checksum_is_refused(tmp_path, kind, length):
    data = words_of(tmp_path)
    data.files["test"][kind] = "0" * length
    with pytest.raises(ValueError, match=rf"test\.txt is not the right file: its {kind} .* expected {'0' * length}\."):
        data.setup()


def test_a_cache_that_cannot_be_written_says_what_to_type(tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(PermissionError, match=r"data\.cache=DIR"):
        text_of(tmp_path, bytes(range(100))).setup()


# The corpora: small files in the format of the real ones, through conf/


@pytest.fixture
def corpora(configure, tmp_path):
    """corpora(*overrides): the datamodule of a configuration, its root below tmp_path, its checksums left out."""

    def made(name, *overrides):
        cfg = configure(
            f"data={name}", f"data.root={tmp_path / 'root'}", "data.batch_size=2", "data.unroll=3", *overrides
        )
        for file in cfg.data.get("files", {}).values():
            for source in (file, file.get("first_of") or {}):
                source.update({key: None for key in ("sha256", "md5") if key in source})
        return instantiate(cfg.data)

    (tmp_path / "root").mkdir()
    return made


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manual_is_a_text_that_needs_no_file(corpora, tmp_path):
    data = corpora("pydoc_text")
    assert isinstance(data, PythonManual)
    assert data.model_kwargs["unit"] == "characters"
    assert 60 < data.model_kwargs["vocab_size"] < 500
    assert sum(map(len, data.splits.values())) > 400_000
    sizes = [len(split) for split in data.splits.values()]
    assert sizes[1] == sizes[2] == sum(sizes) // 20
    assert data.vocabulary_of(data.state_dict()).decode(data.splits["train"][:4].tolist()) == "The "
    assert not (tmp_path / "cache").exists()


def test_enwik8_is_read_from_its_zip_and_the_first_bytes_of_it_too(corpora, tmp_path):
    content = random.Random(0).randbytes(1000)
    (tmp_path / "root" / "enwik8").mkdir()
    (tmp_path / "root" / "enwik8" / "enwik8.zip").write_bytes(zipped(content, "enwik8"))
    before = contents(tmp_path / "root")
    sizes = ("data.valid_bytes=50", "data.test_bytes=40")
    data = corpora("enwik8", *sizes, "data.files.all.tokens=1000")
    data.setup()
    known = np.array(data.vocabulary.tokens, np.uint8)
    assert known[data.splits["train"]].tobytes() == content[:910]
    data = corpora("enwik8_4mb", *sizes, "data.files.all.tokens=300")
    data.setup()
    known = np.array(data.vocabulary.tokens, np.uint8)
    assert known[data.splits["train"]].tobytes() == content[:210]
    assert known[data.splits["test"]].tobytes() == content[260:300]
    with pytest.raises(ValueError, match=r"enwik8\.zip holds 1000 bytes, expected 100000000: not the published file"):
        corpora("enwik8", *sizes).setup()
    (tmp_path / "root" / "enwik8" / "enwik8-first-4150000").write_bytes(bytes(range(200)))
    data = corpora("enwik8_4mb", *sizes, "data.files.all.tokens=200")
    assert data.model_kwargs["vocab_size"] == 200
    (tmp_path / "root" / "enwik8" / "enwik8-first-4150000").unlink()
    assert contents(tmp_path / "root") == before


SHARDS = {
    "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": "the second shard\nis the second\n",
    "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": "the first shard is the first\nis the first\n",
    "heldout-monolingual.tokenized.shuffled/news.en-00000-of-00100": "nobody reads this\n",
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": "the test is new\n",
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": "the shard is the first\n",
}
LM1B = "1-billion-word-language-modeling-benchmark-r13output"
SMALL = ("data.files.train.shards=2", "data.files.train.tokens=null", "data.files.test.tokens=5", "data.unroll=2")


def pack_billion_words(folder, prefix="", leave_out="nothing"):
    folder.mkdir()
    with tarfile.open(folder / f"{LM1B}.tar.gz", "w:gz") as archive:
        for name, content in SHARDS.items():
            if leave_out not in name:
                member = tarfile.TarInfo(f"{prefix}{LM1B}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))


@pytest.mark.parametrize("prefix", ["", "./"])
def test_billion_words_are_read_in_order_from_archive_and_folder(corpora, tmp_path, prefix):
    folder = tmp_path / "root" / "lm1b"
    pack_billion_words(folder, prefix)
    before = contents(tmp_path / "root")
    packed = corpora("lm1b", *SMALL)
    assert packed.model_kwargs == {"vocab_size": 5, "unit": "words"}
    assert packed.vocabulary.tokens == ["the", "<eos>", "<unk>", "first", "is"]
    train = packed.vocabulary.decode(packed.splits["train"].tolist())
    assert train == "the first <unk> is the first\nis the first\nthe <unk> <unk>\nis the <unk>\n"
    assert packed.vocabulary.decode(packed.splits["test"].tolist()) == "the <unk> is <unk>\n"
    assert contents(tmp_path / "root") == before
    for name, content in SHARDS.items():
        (folder / LM1B / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / LM1B / name).write_text(content)
    unpacked = corpora("lm1b", *SMALL)
    unpacked.setup()
    assert unpacked.vocabulary.tokens == packed.vocabulary.tokens
    for split in ("train", "val", "test"):
        assert (unpacked.splits[split] == packed.splits[split]).all()


def test_a_missing_shard_and_a_cut_archive_are_refused(corpora, tmp_path):
    folder = tmp_path / "root" / "lm1b"
    pack_billion_words(folder, leave_out="00002-of-00100")
    with pytest.raises(ValueError, match=r"tar\.gz holds 1 files .*news\.en-\*-of-00100, expected 2"):
        corpora("lm1b", *SMALL).setup()
    path = folder / f"{LM1B}.tar.gz"
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"tar\.gz is damaged"):
        corpora("lm1b", *SMALL).setup()


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103"])
def test_wikitext_of_the_hub_becomes_the_files_it_was_made_from(corpora, tmp_path, monkeypatch, name):
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    folder, version = tmp_path / "hub", {"wikitext2": "wikitext-2-v1", "wikitext103": "wikitext-103-v1"}[name]
    (folder / version).mkdir(parents=True)
    splits = {"train": ARTICLE * 3, "validation": ARTICLE, "test": ARTICLE * 2}
    for split, content in splits.items():
        rows = [line if line.strip() else "" for line in content.splitlines(keepends=True)]
        parquet.write_table(pyarrow.table({"text": rows}), folder / version / f"{split}-00000-of-00001.parquet")
    entries = "".join(f"  - split: {split}\n    path: {version}/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {version}\n  data_files:\n{entries}---\n")
    overrides = [
        f"data.files.{key}.{option}"
        for key in ("train", "val", "test")
        for option in (f"hub.path={folder}", "hub.revision=null", "tokens=null")
    ]
    data = corpora(name, *overrides)
    assert data.model_kwargs["vocab_size"] == 12
    files = {path.name: path.read_text() for path in (tmp_path / "root").rglob("*.txt")}
    assert files == {"train.txt": splits["train"], "valid.txt": splits["validation"], "test.txt": splits["test"]}
    assert len(data.splits["val"]) == len(ARTICLE.split()) + 5


def test_an_unavailable_hub_is_reported_with_what_to_do(corpora, tmp_path):
    overrides = [f"data.files.{key}.hub.path={tmp_path / 'nowhere'}" for key in ("train", "val", "test")]
    with pytest.raises(ConnectionError, match=r"cannot get .*wikitext-2-v1 train .* put the file at .* by hand"):
        corpora("wikitext2", *overrides).setup()


@pytest.mark.parametrize(
    ("name", "file", "vocab_size", "sizes"),
    [
        ("enwik8_4mb", "enwik8/enwik8-first-4150000", 200, [3_900_000, 125_000, 125_000]),
        ("ptb", "ptb/ptb.train.txt", 10_000, [929_589, 73_760, 82_430]),
        ("wikitext2", "wikitext-2/train.txt", 33_278, [2_088_628, 217_646, 245_569]),
    ],
)
def test_a_published_corpus_is_whole(configure, name, file, vocab_size, sizes):
    data = instantiate(configure(f"data={name}", f"data.root={real_data(f'{file}*')}").data)
    assert data.model_kwargs["vocab_size"] == vocab_size
    assert [len(data.splits[key]) for key in ("train", "val", "test")] == sizes
    x, y, first = next(iter(data.train_dataloader()))
    assert x.shape == y.shape == (128, 32)
    assert torch.equal(x[1:], y[:-1])
    assert first
    if name != "enwik8_4mb":
        ids = [data.vocabulary.index[word] for word in ("<unk>", "<eos>", "the")]
        assert max(ids) < 30  # the most frequent come first


def test_the_command_prepares_a_text(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(200)) * 100)
    command = [sys.executable, "scripts/download.py", "data=bytes", f"data.path={tmp_path / 'text'}",
               f"data.cache={tmp_path / 'cache'}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "bytes: ready\n", done.stderr
    tokens = json.loads((prepared_folder(tmp_path) / "vocabulary.json").read_text())
    assert tokens == list(range(200))

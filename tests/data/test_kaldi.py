"""Kaldi's folders: archives of every form, what is refused, normalisation, and utterances cut into streams."""

import logging
import re
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import torch

from data.audio import synthesis
from data.audio.kaldi_ark import Archive, read_matrix, read_table, scan_archive
from data.audio.kaldi_frames import Frames
from data.audio.utterance_batches import Streams
from data.kaldi import Kaldi, SpokenWords

LENGTHS = {"a1": 7, "a2": 12, "b1": 1, "b2": 9}


def features(lengths=LENGTHS, size=3):
    generator = np.random.default_rng(0)
    return {key: generator.normal(size=(length, size)).astype(np.float32) for key, length in lengths.items()}


def alignments(lengths=LENGTHS, count=4):
    generator = np.random.default_rng(1)
    return {key: generator.integers(count, size=length).astype(np.int32) for key, length in lengths.items()}


def write(folder, feats=None, ali=None, **options):
    """A folder of Kaldi's; ali=False: without targets."""
    folder.mkdir(parents=True, exist_ok=True)
    feats = features() if feats is None else feats
    kaldiio.save_ark(str(folder / "feats.ark"), feats, scp=str(folder / "feats.scp"), **options)
    if ali is not False:
        ali = alignments({key: len(x) for key, x in feats.items()}) if ali is None else ali
        kaldiio.save_ark(str(folder / "ali.ark"), ali, scp=str(folder / "ali.scp"))
    return folder


def frames(folder, scored="all", cmvn=None, **options):
    return Frames(folder, name="data.train=x", scored=scored, cmvn=cmvn, **options)


@pytest.fixture
def corpus(tmp_path):
    """corpus(**options): a Kaldi of three folders of tmp_path; those that are not there are written."""

    def made(**options):
        for split in ("train", "val", "test"):
            if not (tmp_path / split).exists():
                write(tmp_path / split)
        places = {split: split for split in ("train", "val", "test")}
        few = {"cmvn": None, "batch_size": 2, "segment": 4}
        return Kaldi(root=str(tmp_path), cache=str(tmp_path / "cache"), **places | few | options)

    return made


@pytest.mark.parametrize("method", [None, 2, 3, 5, "text", "double"])
def test_matrices_of_every_form_are_read(tmp_path, method):
    wanted = features()
    given = {key: x.astype(np.float64) for key, x in wanted.items()} if method == "double" else wanted
    options = (
        {"text": True} if method == "text" else {"compression_method": method if isinstance(method, int) else None}
    )
    found = frames(write(tmp_path / "x", given, alignments(), **options))
    assert found.keys == list(LENGTHS)
    assert found.lengths.tolist() == list(LENGTHS.values())
    steps = {2: 0.1, 3: 1e-4, 5: 0.03, "text": 1e-6}
    for i, key in enumerate(found.keys):
        assert found.read(i).dtype == np.float32
        np.testing.assert_allclose(found.read(i), wanted[key], atol=steps.get(method, 0), rtol=0)
        np.testing.assert_array_equal(found.align(i), alignments()[key])


@pytest.mark.parametrize(("method", "values"), [(4, [-7, 300, 9]), (6, [0, 200, 255]), (7, [0, 1, 1])])
def test_matrices_of_numbers_in_fixed_steps_are_read(tmp_path, method, values):
    x = np.array([values, values[::-1]], np.float32)
    kaldiio.save_ark(str(tmp_path / "x.ark"), {"a": x}, compression_method=method)
    np.testing.assert_allclose(read_matrix(scan_archive(tmp_path / "x.ark")["a"]), x, atol=0.01)


def test_kaldis_own_text_is_read(tmp_path):
    """A matrix whose first number is whole, and numbers without brackets."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "feats.ark").write_text("a  [\n  1 2.5\n  -3 4e-1 ]\nb  [\n  0 0 ]\n")
    (folder / "feats.scp").write_text(f"a {folder}/feats.ark:2\nb {folder}/feats.ark:27\n")
    (folder / "ali.ark").write_text("a 3 0 \nb 1 \n")
    found = frames(folder)
    assert found.read(0).tolist() == [[1, 2.5], [-3, np.float32(0.4)]]
    assert found.read(1).tolist() == [[0, 0]]
    assert [found.align(i).tolist() for i in range(2)] == [[3, 0], [1]]
    assert found.counts.tolist() == [1, 1, 0, 1]


def test_targets_are_found_in_an_archive_without_a_table(tmp_path):
    folder = write(tmp_path / "x")
    (folder / "ali.scp").unlink()
    found = frames(folder)
    assert all((found.align(i) == alignments()[key]).all() for i, key in enumerate(found.keys))


def test_a_relative_archive_lies_below_the_working_directory_or_beside_its_table(tmp_path, monkeypatch):
    folder = write(tmp_path / "x")
    for file in ("feats.scp", "ali.scp"):
        (folder / file).write_text((folder / file).read_text().replace(f"{folder}/", ""))
    assert frames(folder).read(0).tolist() == features()["a1"].tolist()
    other = write(tmp_path / "y", {key: x + 1 for key, x in features().items()})
    monkeypatch.chdir(other)  # as for Kaldi
    assert frames(folder).read(0).tolist() == (features()["a1"] + 1).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("touch {executed} |", "line 2: 'touch .* is a command; commands are not executed"),
        ("| touch {executed}", "line 2: '| touch .* copy-feats scp:.*feats.scp ark,scp:"),
        ("gunzip -c x.gz |", "is a command"),
        ("-", "line 2: standard input is not read"),
        ("feats.ark:3[0:4]", "line 2: parts of a matrix"),
    ],
)
def test_a_table_runs_nothing(tmp_path, name, expected):
    folder = write(tmp_path / "x")
    executed = tmp_path / "executed"
    lines = (folder / "feats.scp").read_text().splitlines()
    lines[1] = "a2 " + name.replace("{executed}", str(executed))
    (folder / "feats.scp").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=expected):
        frames(folder)
    assert not executed.exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("kind", ["pickle", "numpy"])
@pytest.mark.parametrize("file", ["feats", "ali"])
def test_an_archive_runs_nothing(tmp_path, monkeypatch, kind, file):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "x")
    content = {key: np.array([Evil()], dtype=object) if kind == "numpy" else Evil() for key in LENGTHS}
    options = {"write_kwargs": {"allow_pickle": True}} if kind == "numpy" else {}
    kaldiio.save_ark(
        str(folder / f"{file}.ark"), content, scp=str(folder / f"{file}.scp"), write_function=kind, **options
    )
    with pytest.raises(ValueError, match="not an archive of matrices and whole numbers"):
        frames(folder)
    assert not (tmp_path / "executed").exists()


def test_incomplete_utterances_are_left_out_and_reported(tmp_path):
    feats, ali = features() | {"c": np.ones((6, 3), np.float32), "d": np.ones((0, 3), np.float32)}, alignments()
    del ali["a1"]
    folder = write(tmp_path / "x", feats, ali | {"c": np.array([1, 1], np.int32), "d": np.zeros(0, np.int32)})
    (folder / "feats.scp").open("a").write("e nowhere.ark:3\nf nowhere.ark:9\n")
    found = frames(folder)
    assert found.keys == ["a2", "b1", "b2"]
    for told in (
        "3 utterances, 22 frames",
        "2 with a missing archive nowhere.ark, left out",
        "1 without targets, left out",
        "1 with another number of targets than of frames, left out",
        "1 without a frame, left out",
        "(about 3 frames for each target",
    ):
        assert told in found.report
    # A test writes the likelihoods of what it cannot score.
    some = frames(folder, "some")
    assert some.keys == ["a1", "a2", "b1", "b2", "c"]
    assert some.align(0).tolist() == [-1] * 7
    assert "1 without targets, not scored" in some.report


def test_alignments_of_a_chain_model_are_recognised(tmp_path):
    ali = {key: np.zeros(-(-length // 3), np.int32) for key, length in LENGTHS.items() if length > 1}
    with pytest.raises(
        ValueError, match=r"no utterance can be used: .*about 3 frames for each target: .* chain model are subsampled"
    ):
        frames(write(tmp_path / "x", features({"a1": 7, "a2": 12, "b2": 9}), ali))


def damage(folder, what):
    feats, ali = features(), alignments()
    if what == "width":
        feats["b2"] = np.ones((9, 5), np.float32)
    if what == "vector":
        feats["a2"] = np.ones(12, np.float32)
    if what == "negative":
        ali["a2"][3] = -2
    write(folder, feats, ali)
    table = folder / "feats.scp"
    if what == "empty":
        table.write_text("")
    if what == "absent":
        table.unlink()
    if what == "twice":
        table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    if what == "no file":
        table.write_text("a1\n")
    if what == "bytes":
        table.write_bytes(b"a1 \xff\xfe\n")
    if what == "cut":
        (folder / "feats.ark").write_bytes((folder / "feats.ark").read_bytes()[:-5])
    if what == "offset":
        table.write_text(re.sub(r"a2 (.*):\d+", r"a2 \1:12", table.read_text()))
    if what == "beyond":
        table.write_text(re.sub(r"a2 (.*):\d+", r"a2 \1:99999999", table.read_text()))
    if what == "floats":
        kaldiio.save_ark(str(folder / "ali.ark"), feats, scp=str(folder / "ali.scp"))
    if what in ("no targets", "scanned"):
        (folder / "ali.scp").unlink()
    if what == "no targets":
        (folder / "ali.ark").unlink()
    if what == "scanned":
        (folder / "ali.ark").write_bytes((folder / "ali.ark").read_bytes()[7:])


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("width", "the frames of b2 have 5 features, those of a1 have 3"),
        ("vector", "utterance a2, or not an archive of matrices"),
        ("negative", "utterance a2 has the target -2"),
        ("empty", "feats.scp is empty"),
        ("absent", "there is no .*feats.scp; type the path of a Kaldi folder"),
        ("twice", "line 5: duplicate utterance a2"),
        ("no file", "line 1: 'a1' must be an utterance and a file"),
        ("bytes", "feats.scp:1: byte 0xff is not UTF-8"),
        ("cut", "feats.ark is damaged: utterance b2 .* says 9 x 3 values"),
        ("offset", "feats.ark is damaged at byte 12, utterance a2"),
        ("beyond", "feats.ark is damaged at byte 99,999,999"),
        ("floats", "utterance a1 .* is not a vector of whole numbers"),
        ("no targets", "there is neither .*ali.scp nor .*ali.ark; write them by ali-to-pdf"),
        ("scanned", "ali.ark is damaged"),
    ],
)
def test_a_fault_of_a_folder_is_named_when_it_is_opened(tmp_path, what, expected):
    damage(tmp_path / "x", what)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        frames(tmp_path / "x")


@pytest.mark.parametrize("name", ["feats.scp", "feats.ark", "ali.scp", "ali.ark"])
def test_a_file_that_the_system_refuses_is_answered_with_what_to_type(tmp_path, name):
    folder = write(tmp_path / "x")
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")  # every user may open it, and nobody reads its first byte
    with pytest.raises(OSError, match=rf"/{name} cannot be read \(.*\): type chmod u\+r "):
        frames(folder)


def test_targets_beyond_those_of_the_hmm_are_refused(tmp_path, corpus):
    assert frames(write(tmp_path / "x"), num_targets=9).counts.shape == (9,)
    with pytest.raises(ValueError, match=r"has the target 3, outside 0 to 2; type data\.num_targets=4"):
        frames(tmp_path / "x", num_targets=3)
    write(tmp_path / "val", ali={key: found + 5 for key, found in alignments().items()})
    with pytest.raises(ValueError, match=r"data\.val=val: utterance a1 has the target \d, outside 0 to 3"):
        corpus().setup()


def test_the_frame_of_a_nan_is_named(tmp_path):
    feats = features()
    feats["a2"][5, 1] = np.nan
    found = frames(write(tmp_path / "x", feats, alignments()))
    found.features(0)
    with pytest.raises(ValueError, match=r"utterance a2 are not all numbers \(NaN or infinity at frame 5\)"):
        found.features(1)


def test_utterances_are_normalised_over_themselves(tmp_path):
    feats = {"a": np.array([[1, 5], [3, 5]], np.float32)}
    assert frames(write(tmp_path / "x", feats), cmvn="utterance").features(0).tolist() == [[-1, 0], [1, 0]]


def test_utterances_are_normalised_over_their_speaker(tmp_path):
    """Sums 6 and 8 of 2 frames, squares 20 and 40: means 3 and 4, variances 1 and 4."""
    folder = write(tmp_path / "x", {"a": np.array([[4, 4], [2, 8]], np.float32)})
    sums = {"one": np.array([[6, 8, 2], [20, 40, 0]], np.float64)}
    kaldiio.save_ark(str(folder / "cmvn.ark"), sums, scp=str(folder / "cmvn.scp"))
    (folder / "utt2spk").write_text("a one\n")
    assert frames(folder, cmvn="speaker").features(0).tolist() == [[1, 0], [-1, 2]]
    (folder / "utt2spk").write_text("a two\n")
    with pytest.raises(ValueError, match=r"the speaker two of utterance a in utt2spk is not in cmvn\.scp"):
        frames(folder, cmvn="speaker")
    (folder / "utt2spk").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.cmvn=speaker needs .*utt2spk"):
        frames(folder, cmvn="speaker")


def test_a_global_normalisation_is_that_of_training_and_computed_once(tmp_path, corpus, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "val", {key: x + 4 for key, x in features().items()})
    data = corpus(cmvn="global")
    data.setup()
    train = np.concatenate([data.splits["train"].features(i) for i in range(4)])
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
    val = np.concatenate([data.splits["val"].features(i) for i in range(4)])
    assert (val.mean(0) > 2).all()
    again = corpus(cmvn="global")
    assert torch.equal(again.state_dict()["stats"], data.state_dict()["stats"])
    assert caplog.text.count("computing mean") == 1
    config = Kaldi.vocabulary_of(data.state_dict())
    alone, _ = config.read(str(tmp_path / "val/feats.scp"), 100)
    np.testing.assert_array_equal(alone.features(2), data.splits["val"].features(2))


@pytest.mark.parametrize(
    ("segment", "right", "delay", "batch_size"), [(4, 0, 0, 2), (5, 3, 0, 3), (4, 0, 2, 2), (50, 9, 0, 1)]
)
def test_segments_cover_each_frame_once(corpus, segment, right, delay, batch_size):
    data = corpus(segment=segment, right=right, delay=delay, batch_size=batch_size)
    data.setup()
    train, streams = data.splits["train"], data.train_dataloader()
    wanted = {key: data.vocabulary.sequence(train, i) for i, key in enumerate(train.keys)}
    batches = list(streams)
    assert len(batches) == len(streams)
    found, parts = [], []
    for column in range(batch_size):
        for position, batch in enumerate(batches):
            assert batch.x.shape == (segment + right, batch_size, 3)
            length = int((~batch.pad[:segment, column]).sum())
            if not length:
                assert (batch.targets[:, column] == -1).all()
                continue
            assert bool(batch.begins[column]) or position
            if (batch.begins[column] and position) or not parts:
                parts.append([])
            parts[-1].append((batch.x[:length, column], batch.targets[:, column]))
            found.append(batch.x[:length, column])
            # What follows a segment is what the utterance goes on with.
            ahead = batch.x[segment:, column][~batch.pad[segment:, column]]
            rows = torch.cat([batch.x[:length, column], ahead]).numpy()
            assert any(
                (x[i : i + len(rows)] == rows).all()
                for x, _ in wanted.values()
                for i in range(0, len(x), segment)
                if len(x[i : i + len(rows)]) == len(rows)
            )
    everything = np.sort(torch.cat(found).numpy(), axis=0)
    np.testing.assert_array_equal(everything, np.sort(np.concatenate([x for x, _ in wanted.values()]), axis=0))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    counted = torch.bincount(targets[targets >= 0], minlength=4)
    assert counted.tolist() == data.vocabulary.counts.tolist()


def test_a_target_comes_some_frames_late(tmp_path, corpus):
    """Three frames 1 2 3 with targets 2 0 1, two frames late: the third frame is read three times."""
    write(tmp_path / "train", {"a": np.array([[1], [2], [3]], np.float32)}, {"a": np.array([2, 0, 1], np.int32)})
    for split in ("val", "test"):
        write(tmp_path / split, {"a": np.ones((2, 1), np.float32)}, {"a": np.array([1, 1], np.int32)})
    data = corpus(delay=2, batch_size=1)
    data.setup()
    first, second = data.train_dataloader()
    assert first.x[:, 0, 0].tolist() == [1, 2, 3, 3]
    assert first.targets[:, 0].tolist() == [-1, -1, 2, 0]
    assert second.x[:, 0, 0].tolist() == [3, 0, 0, 0]
    assert second.targets[:, 0].tolist() == [1, -1, -1, -1]
    assert second.pad[:, 0].tolist() == [False, True, True, True]
    assert (first.begins.tolist(), second.begins.tolist()) == ([True], [False])
    (whole,) = data.vocabulary.batches(data.splits["train"], 100)
    assert whole.x[:, 0, 0].tolist() == [1, 2, 3, 3, 3]
    assert whole.targets[:, 0].tolist() == [-1, -1, 2, 0, 1]
    assert whole.keys == ("a",)


def test_an_epoch_has_its_own_order_and_goes_on_from_where_it_was_left(corpus):
    data = corpus()
    data.setup()
    whole, parts = data.train_dataloader(), data.train_dataloader()
    epochs = [list(whole) for _ in range(3)]
    assert not all(torch.equal(one.x, two.x) for one, two in zip(*epochs[:2], strict=True))
    parts.load_state_dict({"epoch": 1, "position": 2})
    rest = list(parts)
    assert len(rest) == len(whole) - 2
    for one, two in zip(epochs[1][2:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    assert all(torch.equal(one.x, two.x) for one, two in zip(epochs[2], parts, strict=True))


def test_processes_share_the_streams(corpus):
    data = corpus(batch_size=1)
    data.setup()
    train = data.splits["train"]
    both = list(Streams(data.vocabulary, train, 2, 5))
    parts = [list(Streams(data.vocabulary, train, 1, 5, rank=rank, world_size=2)) for rank in range(2)]
    for whole, *halves in zip(both, *parts, strict=True):
        assert torch.equal(whole.x, torch.cat([half.x for half in halves], dim=1))


def test_too_few_segments_for_the_streams_are_refused(corpus):
    with pytest.raises(ValueError, match=r"9 segments of data\.segment=4 are too few for 10 streams; .*batch_size=9"):
        corpus(batch_size=10).setup()


def test_priors_are_those_of_training_and_a_target_that_never_occurs_occurs_once(tmp_path, corpus):
    write(tmp_path / "train", {"a": np.ones((4, 3), np.float32)}, {"a": np.array([0, 0, 0, 2], np.int32)})
    write(tmp_path / "val", {"a": np.ones((4, 3), np.float32)}, {"a": np.array([0, 0, 0, 2], np.int32)})
    write(tmp_path / "test", {"a": np.ones((4, 3), np.float32)}, False)
    kwargs = corpus(num_targets=4, batch_size=1).model_kwargs
    torch.testing.assert_close(kwargs["log_priors"].exp(), torch.tensor([3, 1, 1, 1]) / 6)
    assert kwargs["num_targets"] == 4


@pytest.mark.parametrize("changed", [{"delay": 1}, {"segment": 5}, {"cmvn": "utterance"}, {"num_targets": 9}, "train"])
def test_a_checkpoint_of_other_frames_is_refused(tmp_path, corpus, changed):
    state = corpus().state_dict()
    corpus().load_state_dict(state)
    if changed == "train":
        write(tmp_path / "train", features({"a1": 8, "a2": 12}))
        changed = {}
    with pytest.raises(ValueError, match="the checkpoint was trained on other data"):
        corpus(**changed).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cmvn": "speakers"}, r"data\.cmvn=speakers must be one of null, utterance, speaker, global"),
        ({"num_targets": 2.5}, r"data\.num_targets=2\.5"),
        ({"train": "nowhere"}, r"data\.train=nowhere is neither in .* nor here"),
    ],
)
def test_options_are_checked(corpus, options, expected):
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        corpus(**options).setup()


def test_an_archive_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "x.ark"
    with Archive(path) as archive:
        archive.write("b", np.ones((2, 3), np.float32))
        archive.write("a", np.zeros((1, 3), np.float32))
    assert [line.split()[0] for line in path.with_suffix(".scp").read_text().splitlines()] == ["a", "b"]
    assert kaldiio.load_scp(str(path.with_suffix(".scp")))["b"].tolist() == np.ones((2, 3)).tolist()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def fail():
        with Archive(path) as archive:
            archive.write("c", np.ones((2, 3), np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"must end in \.ark"):
        Archive(tmp_path / "x.scp")
    with pytest.raises(PermissionError, match="cannot be written"):
        Archive(tmp_path / "nowhere/x.ark").__enter__()


def test_the_sample_is_the_same_everywhere_and_its_voices_are_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(SpokenWords, "UTTERANCES", {"train": 16, "val": 4, "test": 4})
    for name in ("one", "two"):
        data = SpokenWords(cache=str(tmp_path / name), cmvn=None, batch_size=2)
        assert data.model_kwargs["num_targets"] == 31
    content = [
        (tmp_path / name / f"spoken_words-{synthesis.VERSION}/train/feats.ark").read_bytes() for name in ("one", "two")
    ]
    assert content[0] == content[1]
    voices = [{key.partition("-")[0] for key in frames.keys} for frames in data.splits.values()]
    assert not voices[0] & voices[1] | voices[0] & voices[2] | voices[1] & voices[2]
    assert data.vocabulary.counts[0] > data.vocabulary.counts[1:].max()
    (tmp_path / "two").rename(tmp_path / "three")
    assert not read_table(tmp_path / f"three/spoken_words-{synthesis.VERSION}/train/feats.scp", "copy-feats")[1]

"""Files in SQuAD's format: tokens and their characters, faults, features, windows, what a checkpoint keeps."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import real_data

from data.squad import QuestionAnswering, Sample, squad_of
from data.text import squad_tables
from data.text.squad_tables import spans_of

PASSAGE = "Tea was served at 4.30 on the S.S. Great Tea-Boat; it cost 1,250 pounds."


def question(text="What was served?", answer="Tea", start=0, id="1"):
    return {"id": id, "question": text, "answers": [{"text": answer, "answer_start": start}]}


def squad(*paragraphs):
    """The JSON of (context, questions) pairs."""
    listed = [{"context": context, "qas": list(questions)} for context, questions in paragraphs]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": listed}]}, ensure_ascii=False)


def data_of(tmp_path, content, **options):
    """The datamodule of a file with that content, for training and evaluation, its cache beside it."""
    (tmp_path / "file.json").write_text(content, encoding="utf-8")
    names = dict.fromkeys(("train", "val", "test"), str(tmp_path / "file.json"))
    return QuestionAnswering(
        **{"root": str(tmp_path), "cache": str(tmp_path / "cache"), **names, "min_count": 1, **options}
    )


def tokens(text):
    return [text[start:end] for start, end in spans_of(text)]


# Tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It didn't cost the U.S. $1,250.50.", ["It", "did", "n't", "cost", "the", "U.S.", "$", "1,250.50", "."]),
        ("Griffin’s 1912–1914 re-entry", ["Griffin", "’s", "1912", "–", "1914", "re", "-", "entry"]),
        ("IT'S WHAT THEY DIDN'T", ["IT", "'S", "WHAT", "THEY", "DID", "N'T"]),
        ("the 1980s, 42-line", ["the", "1980s", ",", "42", "-", "line"]),
        ("東京タワー is 333m", ["東", "京", "タ", "ワ", "ー", "is", "333m"]),
        ("Москва́ — это", ["Москва", "́", "—", "это"]),
        (" \n\t", []),
    ],
)
def test_a_text_becomes_tokens(text, expected):
    assert tokens(text) == expected


def test_every_character_but_space_is_in_one_token():
    for text in (PASSAGE, "naïve café's «quote» 3.5%… 👩‍🔬 नमस्ते مرحبا"):
        covered = "".join(text[start:end] for start, end in spans_of(text))
        assert covered == re.sub(r"\s", "", text)
        assert [span for pair in spans_of(text) for span in pair] == sorted(s for p in spans_of(text) for s in p)


def test_a_typographic_apostrophe_is_a_plain_one_in_the_vocabulary(tmp_path):
    data = data_of(tmp_path, squad(("The bay’s shape isn’t round.", [question("The bay's?", "bay’s", 4)])))
    data.setup()
    assert {"'s", "n't"} <= set(data.vocabulary.index)
    batch = next(iter(data.train_dataloader()))
    assert batch.features[2, 0, 0] == 1  # ’s of the passage is the question's 's
    item = batch.items[0]
    assert item.text[item.starts[batch.first[0]] : item.ends[batch.last[0]]] == "bay’s"


# Files


def test_an_answer_is_the_tokens_that_cover_it(tmp_path):
    asked = [
        question(answer="S.S. Great", start=30, id="1"),
        question(answer="Boat", start=45, id="2"),
        question(answer=" 1,250 ", start=58, id="3"),
    ]
    data = data_of(tmp_path, squad((PASSAGE, asked)))
    data.setup()
    found = data.splits["train"].reading
    assert found.report["unmatched"] == found.report["misplaced"] == 0
    passage = tokens(PASSAGE)
    spans = zip(found.questions["first"], found.questions["last"], strict=True)
    assert [passage[first : last + 1] for first, last in spans] == [["S.S.", "Great"], ["Boat"], ["1,250"]]


def test_faulty_questions_are_counted_logged_and_kept_for_evaluation(tmp_path, caplog):
    caplog.set_level("INFO")
    asked = [
        question(id="good"),
        question(answer="Great Tea-Boat; i", start=35, id="part of a token"),
        question(answer="Tea", start=1, id="elsewhere"),
        question(answer="pounds", start=500, id="past the end"),
        question(answer="pounds.!", start=len(PASSAGE) - 7, id="over the end"),
        question(answer="Tea", start=-3, id="before the start"),
        {"id": "none", "question": "Why?", "answers": []},
        question("  ", id="empty"),
    ]
    data = data_of(tmp_path, squad((PASSAGE, asked), (" ", [question(id="on nothing", answer="", start=0)])))
    data.setup()
    told = caplog.text
    assert "9 questions on 2 passages" in told
    assert "6 with an answer that does not consist of whole tokens: tested, but not trained on" in told
    assert "1 without an answer" in told
    assert "1 without a word" in told
    assert "1 passages without a word" in told
    assert "4 answers are not at their answer_start" in told
    assert "elsewhere: 'Tea' at 1, where the passage has 'ea '" in told
    assert "past the end: 'pounds' at 500, where the passage has ''" in told
    assert [item.id for batch in data.train_dataloader() for item in batch.items] == ["good"]
    tested = [item.id for batch in data.test_dataloader() for item in batch.items]
    assert Counter(tested) == Counter([*(row["id"] for row in asked), "on nothing"])


def test_the_first_answer_of_whole_tokens_is_trained_on(tmp_path):
    one = question(answer="erved", start=9)
    one["answers"] += [{"text": "served", "answer_start": 8}, {"text": "Tea", "answer_start": 0}]
    data = data_of(tmp_path, squad((PASSAGE, [one])))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert (batch.first.tolist(), batch.last.tolist()) == ([2], [2])
    assert batch.items[0].answers == ["erved", "served", "Tea"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"file\.json is not JSON"),
        ("[]", r"file\.json: 'data' must be a list, found none: not an object, but \[\]"),
        ('{"version": 1}', r"file\.json: 'data' must be a list, found none among \['version'\]"),
        ('{"data": [{"title": "t"}]}', r"data\[0\]: 'paragraphs' must be a list, found none among \['title'\]"),
        (
            squad((PASSAGE, [{"id": "1", "answers": []}])),
            r"paragraphs\[0\]\.qas\[0\]: 'question' must be a text, found",
        ),
        (squad((None, [])), r"data\[0\]\.paragraphs\[0\]: 'context' must be a text, found None among"),
        (squad((PASSAGE, [question(id=7)])), r"qas\[0\]: 'id' must be a text, found 7"),
        (squad((PASSAGE, [question(start="0")])), r"answers\[0\]: 'answer_start' must be a whole number, found '0'"),
        (squad((PASSAGE, [question(), question()])), r"two questions have the id '1'"),
        (squad((PASSAGE, [])), r"data\.train=.* has 0 questions, expected 1 or more: type data\.train=FILE"),
        (squad(), r"data\.train=.* has 0 questions, expected 1 or more: type data\.train=FILE"),
        (squad((PASSAGE, [question(start=1)])), r"no question with an answer to learn from"),
        (
            squad((PASSAGE, [question("\\ud83d?")])).replace("\\\\", "\\"),
            r"qas\[0\]: 'question' contains an unpaired surrogate",
        ),
    ],
)
def test_the_place_of_a_deviation_from_the_format_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, content).setup()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_is_found_in_the_root_or_by_its_path(tmp_path, monkeypatch, suffix):
    content = squad((PASSAGE, [question()])).encode()
    (tmp_path / "squad").mkdir()
    (tmp_path / f"squad/mine.json{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    for name in ("mine.json", f"mine.json{suffix}", str(tmp_path / "squad/mine.json"), f"squad/mine.json{suffix}"):
        monkeypatch.chdir(tmp_path)
        data = QuestionAnswering(root=str(tmp_path), cache=str(tmp_path / "cache"), train=name, val=name, test=name)
        assert data.model_kwargs["num_features"] == 3
    with pytest.raises(FileNotFoundError, match=r"data\.train=yours is neither in .*squad nor here"):
        QuestionAnswering(root=str(tmp_path), cache=str(tmp_path), train="yours", val=name, test=name).setup()


def test_a_file_is_prepared_once_and_again_when_it_changes(tmp_path, monkeypatch):
    data_of(tmp_path, squad((PASSAGE, [question()]))).setup()
    with monkeypatch.context() as patch:
        patch.setattr(squad_tables, "build", None)
        data_of(tmp_path, squad((PASSAGE, [question()]))).setup()
    changed = data_of(tmp_path, squad((PASSAGE, [question("What?")])))
    changed.setup()
    assert changed.splits["train"].reading.questions["text"].to_pylist() == ["What?"]
    (place,) = (
        p for p in (tmp_path / "cache/squad").iterdir() if p.is_dir() and p.name == changed.splits["train"].reading.key
    )
    for name in ("passages.arrow", "questions.arrow", "meta.json", "checksums.json"):
        whole = (place / name).read_bytes()
        for damaged in (whole[:-40], whole[:-9] + b"x" * 9, b"[]"):
            (place / name).write_bytes(damaged)
            data_of(tmp_path, squad((PASSAGE, [question("What?")]))).setup()
            assert (place / name).read_bytes() == whole


def test_the_datasets_library_opens_prepared_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = data_of(tmp_path, squad((PASSAGE, [question()])))
    data.setup()
    table = datasets.Dataset.from_file(
        str(tmp_path / f"cache/squad/{data.splits['train'].reading.key}/questions.arrow")
    )
    assert table[0]["text"] == "What was served?"


def test_rows_of_the_hub_become_the_official_file(tmp_path):
    rows = [
        {
            "id": i,
            "title": title,
            "context": context,
            "question": f"{i}?",
            "answers": {"text": ["Tea"], "answer_start": [0]},
        }
        for i, title, context in (("1", "a", PASSAGE), ("2", "a", PASSAGE), ("3", "b", "Tea"))
    ]
    (tmp_path / "hub.json").write_bytes(b"".join(squad_of(rows)))
    official = json.loads((tmp_path / "hub.json").read_bytes())
    assert [article["title"] for article in official["data"]] == ["a", "b"]
    found = squad_tables.prepare(tmp_path / "hub.json", tmp_path / "cache", None)
    assert found.questions["id"].to_pylist() == ["1", "2", "3"]
    assert found.questions["passage"].tolist() == [0, 0, 1]


# Vocabulary and features


def test_questions_words_come_first_then_those_of_the_passages(tmp_path):
    content = squad(("x x x y y z", [question("Z a a?", "z", 10), question("a Z?", "z", 10, id="2")]))
    data = data_of(tmp_path, content)
    assert data.model_kwargs == {"vocab_size": 7, "num_features": 3, "vectors": None}
    assert list(data.vocabulary.index) == ["<pad>", "<unk>", "a", "z", "?", "x", "y"]


def test_features_are_the_published_ones(tmp_path):
    data = data_of(tmp_path, squad(("The tea and the Tea", [question("the Tea?", "tea", 4)])))
    data.setup()
    features = next(iter(data.train_dataloader())).features[:, 0]
    assert features[:, 0].tolist() == [0, 0, 0, 1, 1]  # as written
    assert features[:, 1].tolist() == [1, 1, 0, 1, 1]  # in lower case
    assert features[:, 2].tolist() == pytest.approx([2 / 5, 2 / 5, 1 / 5, 2 / 5, 2 / 5])  # frequency


def test_padding_matches_nothing(tmp_path):
    content = squad(("Tea is hot", [question("Is tea very hot here?", "hot", 7)]), ("Tea", [question("Who?", id="2")]))
    data = data_of(tmp_path, content)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert [item.id for item in batch.items] == ["2", "1"]  # by length
    assert batch.passage[:, 0].tolist()[1:] == [0, 0]
    assert batch.question[:, 0].tolist()[2:] == [0] * 4
    assert not batch.features[1:, 0].any()
    assert not batch.features[0, 0, :2].any()


def test_vectors_are_looked_up_and_keep_their_length(tmp_path):
    (tmp_path / "vectors.txt").write_text("tea 3 0 0 4\nThe 1 1 1 1\nhot 0 0 0 2\n")
    content = squad(("The tea is hot", [question("The Tea?", "tea", 4)]))
    data = data_of(tmp_path, content, vectors=str(tmp_path / "vectors.txt"), lowercase=False)
    vectors = data.model_kwargs["vectors"]
    index = data.vocabulary.index
    assert vectors.shape == (len(index), 4)
    assert vectors[index["tea"]].tolist() == [3, 0, 0, 4]
    assert vectors[index["The"]].tolist() == [1, 1, 1, 1]
    assert vectors[index["Tea"]].abs().max() <= 0.25


# Windows


def test_a_long_passage_is_read_in_windows_that_overlap(tmp_path):
    words = [f"w{i}" for i in range(23)]
    start = " ".join(words).index("w17")
    data = data_of(tmp_path, squad((" ".join(words), [question("w1?", "w17", start)])), window=10)
    data.setup()
    assert [window[1:] for window in data.splits["test"].windows(0)] == [(0, 10), (5, 15), (10, 20), (13, 23)]
    batch = next(iter(data.test_dataloader()))
    assert batch.first.tolist() == batch.last.tolist() == [-1, -1, 7, 4]
    assert [item.text[item.starts[0] : item.ends[-1]] for item in batch.items] == [
        " ".join(words[begin : begin + 10]) for begin in (0, 5, 10, 13)
    ]
    training = next(iter(data.train_dataloader()))
    assert training.passage.shape == (10, 1)
    assert training.items[0].text[training.items[0].starts[training.first[0]] :].startswith("w17")


# Checkpoints


def test_a_checkpoint_knows_its_data(tmp_path):
    data = data_of(tmp_path, squad((PASSAGE, [question()])))
    state = data.state_dict()
    torch.save(state, tmp_path / "state")
    kept = torch.load(tmp_path / "state", weights_only=True)
    data.load_state_dict(kept)
    reader = QuestionAnswering.vocabulary_of(kept)
    assert reader.model_kwargs == data.model_kwargs
    (batch,) = reader.batches(PASSAGE, "What was served?")
    assert torch.equal(batch.passage, next(iter(data.test_dataloader())).passage)
    assert torch.equal(batch.features, next(iter(data.test_dataloader())).features)
    other = data_of(tmp_path, squad((PASSAGE, [question("What, now?")])))
    with pytest.raises(ValueError, match=r"trained on other data: words .*; files differ"):
        other.load_state_dict(kept)


def test_the_sample_has_no_fault():
    data = Sample(cache="unused", min_count=1)
    for split, (passages, questions) in {"train": (24, 168), "val": (6, 44)}.items():
        tables, meta = squad_tables.build(
            list(squad_tables.paragraphs_of(Path(data.names[split]).read_bytes(), split)), None, split
        )
        report = meta["report"]
        assert (report["passages"], report["questions"]) == (passages, questions)
        assert not any(value for name, value in report.items() if name not in ("passages", "questions"))
        assert len(tables[0]) == passages


def test_the_real_development_set_is_read_whole(tmp_path):
    found = squad_tables.prepare(real_data("squad/dev*") / "squad/dev-v1.1.json.gz", tmp_path, None)
    assert (len(found), len(found.passages["text"])) == (10_570, 2_067)
    assert found.report["misplaced"] == 0
    assert found.report["unmatched"] < 10
    for number in range(0, len(found), 97):
        first, last = (int(found.questions[name][number]) for name in ("first", "last"))
        owner = int(found.questions["passage"][number])
        starts, ends = (found.passages[name][owner] for name in ("starts", "ends"))
        if first >= 0:
            text = found.passages["text"][owner].as_py()[starts[first] : ends[last]]
            assert text in [answer.strip() for answer in found.questions["answers"][number].as_py()]

"""EM and F1 by hand-worked cases, by an independent implementation, and from the command line."""

import gzip
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from tasks.modules import squad_metrics
from tasks.modules.squad_metrics import exact_match, f1, normalise, score_answer

DEV = ROOT / "tests/samples/squad-sample-dev.json"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Danube", ["danube"]),
        ("  an  apple, a day.", ["apple", "day"]),
        ("anthem of the theatre", ["anthem", "of", "theatre"]),  # articles are whole words
        ("twenty-four", ["twentyfour"]),  # a mark leaves no space behind
        ("U.S.A.", ["usa"]),
        ("a.b the-end", ["ab", "theend"]),  # marks go before articles do
        ("“Ja”", ["“ja”"]),  # ASCII's marks only, as in the official evaluation
        ("the", []),
        ("", []),
        ("東京", ["東京"]),
    ],
)
def test_an_answer_is_normalised(text, words):
    assert normalise(text) == words


@pytest.mark.parametrize(
    ("answer", "reference", "em", "overlap"),
    [
        ("the Volga", "Volga.", 1, 1),
        ("Black Sea", "the Black Forest", 0, 1 / 2),  # 1 of 2 and 1 of 2
        ("in the Black Forest of Germany", "Black Forest", 0, 2 * (2 / 5) * 1 / (2 / 5 + 1)),
        ("two two one", "two one one", 0, 2 / 3),  # a word counts as often as both have it
        ("1912", "1913", 0, 0),
        ("", "Volga", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either: the official evaluation calls that equal, and no overlap
    ],
)
def test_exact_match_and_f1(answer, reference, em, overlap):
    assert exact_match(answer, reference) == em
    assert f1(answer, reference) == f1(reference, answer) == pytest.approx(overlap)


def test_each_metric_takes_the_reference_that_suits_it():
    assert score_answer("the Black Sea", ["Black Forest Sea", "black sea", "Sea"]) == (1, 1)
    assert score_answer("Black Sea coast", ["sea", "Black Sea coast road"]) == (0, pytest.approx(6 / 7))
    assert score_answer("anything", []) == (0, 0)


def test_means_are_over_all_questions_of_the_file():
    references = {"1": ["x y"], "2": ["z"], "3": ["w"], "4": ["v"]}
    found = squad_metrics.evaluate(references, {"1": "x", "2": "Z!", "5": "w"})
    assert found == {
        "em": 25,
        "f1": pytest.approx(100 * (2 / 3 + 1) / 4),
        "questions": 4,
        "unanswered": 2,
        "unknown": 1,
    }


def test_an_independent_implementation_agrees():
    torchmetrics = pytest.importorskip("torchmetrics.text")
    references = squad_metrics.read_references(str(DEV))
    ids = list(references)
    # Of some questions a reference, of others one that is cut, of others the next question's answer.
    predictions = {
        id: [texts[-1], texts[0][:-3], references[ids[(i + 1) % len(ids)]][0], f"at {texts[0]}, the"][i % 4]
        for i, (id, texts) in enumerate(references.items())
    }
    other = torchmetrics.SQuAD()(
        [{"id": id, "prediction_text": text} for id, text in predictions.items()],
        [{"id": id, "answers": {"text": texts, "answer_start": [0] * len(texts)}} for id, texts in references.items()],
    )
    found = squad_metrics.evaluate(references, predictions)
    assert found["em"] == pytest.approx(float(other["exact_match"]), abs=1e-4)
    assert found["f1"] == pytest.approx(float(other["f1"]), abs=1e-4)
    assert 20 < found["em"] < 80


def test_any_predictions_are_scored_on_the_command_line(tmp_path):
    references = squad_metrics.read_references(str(DEV))
    kept = dict(list(references.items())[:11])
    (tmp_path / "predictions.json").write_text(json.dumps({id: texts[0] for id, texts in kept.items()} | {"x": "y"}))
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + DEV.read_bytes()))
    command = [sys.executable, "-m", "tasks.squad", str(tmp_path / "dev.json.gz"), str(tmp_path / "predictions.json")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "EM 25.00  F1 25.00  of 44 questions" in told
    assert "33 questions have no prediction and score 0" in told
    assert "1 predictions are for ids that are not in" in told


@pytest.mark.parametrize(
    ("dev", "predictions", "message"),
    [
        ('{"data": 3}', "{}", "is not in SQuAD's format"),
        ('{"data": []}', "{}", "has no questions"),
        ("{", "{}", "is not JSON"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": 3, "answers": []}]}]}]}', "{}", "the id 3 and its answers"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": "3", "answers": [{"text": null}]}]}]}]}', "{}", "must be texts"),
        (
            '{"data": [{"paragraphs": [{"qas": [{"id": "3", "answers": []}, {"id": "3", "answers": []}]}]}]}',
            "{}",
            "two questions have the id '3'",
        ),
        (None, "[1]", 'must be {"question\'s id"'),
        (None, '{"1": 2}', 'must be {"question\'s id"'),
        (None, "", "is not JSON"),
    ],
)
def test_files_in_another_format_are_refused(tmp_path, dev, predictions, message):
    paths = [tmp_path / "dev.json", tmp_path / "predictions.json"]
    paths[0].write_text(DEV.read_text(encoding="utf-8") if dev is None else dev, encoding="utf-8")
    paths[1].write_text(predictions)
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        squad_metrics.main(list(map(str, paths)))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json cannot be read"):
        squad_metrics.main([str(DEV), str(tmp_path / "nowhere.json")])
    with pytest.raises(ValueError, match=r"type python -m tasks\.squad DEV\.json PREDICTIONS\.json"):
        squad_metrics.main([])

"""Exact match and F1 of answers, as in SQuAD's official evaluation (Rajpurkar et al., 2016, section 6.1)."""

import gzip
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def exact_match(answer: str, reference: str) -> float:
    """1 if both consist of the same words, else 0."""
    return float(normalise(answer) == normalise(reference))


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the answer's words; repeated words count as often as they match."""
    ours, theirs = Counter(normalise(answer)), Counter(normalise(reference))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def score_answer(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, each the best over the references; 0 without a reference."""
    em, best_f1 = (max((metric(answer, text) for text in references), default=0.0) for metric in (exact_match, f1))
    return em, best_f1


def evaluate(references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """em and f1: means over all questions in per cent; a question without a prediction scores 0.

    Also the numbers of questions, of unanswered ones, and of predictions for unknown ids, which are ignored.
    """
    pairs = [score_answer(predictions[id], texts) for id, texts in references.items() if id in predictions]
    return {
        "em": 100 * sum(em for em, _ in pairs) / len(references),
        "f1": 100 * sum(f for _, f in pairs) / len(references),
        "questions": len(references),
        "unanswered": len(references) - len(pairs),
        "unknown": len(predictions.keys() - references.keys()),
    }


def read_json(path: str) -> Any:
    """The content of a JSON file, plain or .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(Path(path).expanduser(), "rb") as file:
            return json.loads(file.read())
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, plain or .gz ({error})") from error
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error.strerror}") from error


def read_references(path: str) -> dict[str, list[str]]:
    """{question id: answers} from a file in SQuAD's format; ValueError for another format or a repeated id."""
    references: dict[str, list[str]] = {}
    try:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    id, texts = question["id"], [answer["text"] for answer in question["answers"]]
                    if not all(isinstance(value, str) for value in (id, *texts)):
                        raise TypeError(f"the id {id!r} and its answers {texts!r:.60} must be texts")
                    if id in references:
                        raise TypeError(f"two questions have the id {id!r}")
                    references[id] = texts
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not in SQuAD's format ({type(error).__name__}: {error}); expected "
            '{"data": [{"paragraphs": [{"qas": [{"id": "...", "answers": [{"text": "..."}]}]}]}]}'
        ) from error
    return references


def main(words: Sequence[str]) -> None:
    """Print EM and F1 of a file of predictions."""
    if len(words) != 2:
        raise ValueError(
            "type python -m tasks.squad DEV.json PREDICTIONS.json; predictions are {question's id: answer's text}"
        )
    references, predictions = read_references(words[0]), read_json(words[1])
    pairs = predictions.items() if isinstance(predictions, dict) else [(None, predictions)]
    for id, text in pairs:
        if not isinstance(id, str) or not isinstance(text, str):
            where = f"for {id!r} it has" if id else "it is"
            raise ValueError(f'{words[1]} must be {{"question\'s id": "answer\'s text", ...}}; {where} {text!r:.60}')
    if not references:
        raise ValueError(f"{words[0]} has no questions")
    result = evaluate(references, predictions)
    print(f"EM {result['em']:.2f}  F1 {result['f1']:.2f}  of {result['questions']:,} questions")
    if result["unanswered"]:
        print(f"{result['unanswered']:,} questions have no prediction and score 0")
    if result["unknown"]:
        print(f"{result['unknown']:,} predictions are for ids that are not in {words[0]}, and are ignored")

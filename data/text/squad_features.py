"""Batches of passages and questions: word numbers, features, windows of long passages."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batching import pad_columns
from data.text import squad_tables
from data.text.lines import decode
from data.text.spacy_tagger import Tagger
from data.text.squad_tables import Reading, check_text
from data.text.word_vectors import UNK

Window = tuple[int, int, int]  # a question's number; begin and end of the passage's tokens


class Item(NamedTuple):
    """A question for evaluation: its id, its passage, and the reference answers.

    starts, ends: character positions of the window's tokens in the passage.
    """

    id: str
    text: str
    starts: np.ndarray
    ends: np.ndarray
    answers: list[str]


class Batch(NamedTuple):
    """Windows of passages with a question each, padded at the end with 0.

    passage (T, B), question (Q, B): word numbers; features (T, B, num_features); first, last (B,): the answer's first
    and last token, or -1 if the window does not contain it.
    """

    passage: Tensor
    features: Tensor
    question: Tensor
    first: Tensor
    last: Tensor
    items: list[Item]


class Reader:
    """Converts texts to the network's input, without a corpus.

    words: the vocabulary, which begins with <pad> and <unk>, in lower case if `lowercase`.
    tags, entities: the parts of speech and kinds of named entities that are features.
    spacy_model, identity: the tagging pipeline, and its exact version; None without one.
    window: tokens that the network reads at once. A longer passage is read in windows that overlap by half, so one
        window contains any answer of up to half a window.
    vector_size: of fixed word vectors, or None.
    """

    def __init__(
        self,
        *,
        words: Sequence[str],
        lowercase: bool,
        tags: Sequence[str],
        entities: Sequence[str],
        spacy_model: str | None,
        identity: list[Any] | None,
        window: int,
        vector_size: int | None,
    ) -> None:
        self.options: dict[str, Any] = {"words": list(words), "tags": list(tags), "entities": list(entities)}
        self.options |= {"lowercase": lowercase, "window": window, "vector_size": vector_size}
        self.options |= {"spacy_model": spacy_model, "identity": identity}
        self.index = {word: i for i, word in enumerate(words)}
        self.lowercase, self.window = lowercase, window
        self.tags, self.entities = list(tags), list(entities)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The sizes; `vectors` are zeros, to be replaced by those of the checkpoint."""
        width = self.options["vector_size"]
        return {
            "vocab_size": len(self.index),
            "num_features": 3 if self.options["identity"] is None else 4 + len(self.tags) + len(self.entities),
            "vectors": None if width is None else torch.zeros(len(self.index), width),
        }

    def check(self, tagger: Tagger | None) -> None:
        """ValueError unless the tagger is the one of training."""
        identity = None if tagger is None else tagger.identity
        if identity != self.options["identity"]:
            raise ValueError(
                f"the network was trained with the tagger {self.options['identity']}, but {identity} is installed: "
                "install the one of training"
            )

    def text(self, content: bytes, name: str) -> str:
        """The text of a file, which must be UTF-8."""
        return decode(content, name)

    def batches(self, passage: str, question: str, batch_size: int = 32) -> Iterator[Batch]:
        """One question on one passage, in batches of windows."""
        for name, value in {"passage": passage, "question": question}.items():
            check_text(value, name)
            if not value.strip():
                raise ValueError(f"the {name} is empty: type {name}='some text'")
        tagger = None
        if self.options["identity"] is not None:
            self.check(tagger := Tagger(self.options["spacy_model"]))
        node = {"context": passage, "qas": [{"id": "0", "question": question, "answers": []}]}
        tables, meta = squad_tables.build([node], tagger)
        view = View(self, Reading(*tables, meta))
        windows = view.windows(0)
        for i in range(0, len(windows), batch_size):
            yield view.batch(windows[i : i + batch_size])


class View:
    """The batches of a Reading, in the word numbers of a Reader."""

    def __init__(self, reader: Reader, reading: Reading) -> None:
        self.reading, self.window = reading, reader.window
        lower = [form.lower() for form in reading.forms]
        numbers: dict[str, int] = {}
        words = lower if reader.lowercase else reading.forms
        self.unknown = reader.index[UNK]
        # -1 pads passages and -2 questions. They index the last two entries, so padding never matches a word.
        self.numbers = np.array([*(reader.index.get(word, self.unknown) for word in words), 0, 0])
        self.lower = np.array([*(numbers.setdefault(word, len(numbers)) for word in lower), -2, -1])
        self.one_hot = {
            name: one_hot(getattr(reading, name), getattr(reader, name))
            for name in ("tags", "entities")
            if name in reading.passages
        }

    def windows(self, question: int) -> list[Window]:
        """The windows of a question's passage, at least one."""
        size = int(self.reading.passages["words"].sizes[self.reading.questions["passage"][question]])
        if size <= self.window:
            return [(question, 0, size)]
        half = (self.window + 1) // 2
        return [
            (question, begin, begin + self.window)
            for begin in [*range(0, size - self.window, half), size - self.window]
        ]

    def training_windows(self) -> list[Window]:
        """For each question a window with the answer in its middle, unless one of them is empty, or too long."""
        questions, windows = self.reading.questions, []
        sizes = self.reading.passages["words"].sizes[questions["passage"]]
        is_usable = (questions["first"] >= 0) & (questions["words"].sizes > 0)
        is_usable &= questions["last"] - questions["first"] < self.window
        for question in np.flatnonzero(is_usable).tolist():
            middle = int(questions["first"][question] + questions["last"][question] + 1 - self.window) // 2
            size = int(sizes[question])
            begin = max(0, min(middle, size - self.window))
            windows.append((question, begin, min(size, begin + self.window)))
        return windows

    def batch(self, windows: Sequence[Window]) -> Batch:
        passages, questions = self.reading.passages, self.reading.questions
        owners = [int(questions["passage"][number]) for number, _, _ in windows]

        def of_passages(name: str, fill: float = -1, dtype: Any = np.int64) -> np.ndarray:
            rows = zip(owners, windows, strict=True)
            return pad_columns([passages[name][owner][begin:end] for owner, (_, begin, end) in rows], fill, dtype)

        def of_questions(name: str) -> np.ndarray:
            return pad_columns([questions[name][number] for number, _, _ in windows], -2)

        p, q = of_passages("words"), of_questions("words")
        frequencies = of_passages("frequencies", 0, np.float32)[..., None]
        features = [occurs(p, q), occurs(self.lower[p], self.lower[q]), frequencies]
        if "lemmas" in passages:
            features.append(occurs(of_passages("lemmas"), of_questions("lemmas")))
            features += [vectors[of_passages(name)] for name, vectors in self.one_hot.items()]
        question = self.numbers[q]
        question[0, question[0] == 0] = self.unknown  # an empty question becomes one unknown word
        numbers, begins, ends = np.array(windows).T
        first, last = questions["first"][numbers], questions["last"][numbers]
        is_inside = (begins <= first) & (last < ends)
        first, last = np.where(is_inside, first - begins, -1), np.where(is_inside, last - begins, -1)
        items = [
            Item(
                questions["id"][number].as_py(),
                passages["text"][owner].as_py(),
                passages["starts"][owner][begin:end],
                passages["ends"][owner][begin:end],
                questions["answers"][number].as_py(),
            )
            for owner, (number, begin, end) in zip(owners, windows, strict=True)
        ]
        arrays = self.numbers[p], np.concatenate(features, axis=2), question, first, last
        return Batch(*map(torch.from_numpy, arrays), items)  # type: ignore[call-arg, arg-type]


def occurs(passage: np.ndarray, question: np.ndarray) -> np.ndarray:
    """(T, B, 1): whether a number of passage (T, B) is among those of question (Q, B)."""
    return (passage[:, None] == question).any(axis=1).astype(np.float32)[..., None]


def one_hot(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """A one-hot row for each name, by its place in `known`; the last row, all 0, is for padding."""
    rows = np.zeros((len(names) + 1, len(known)), np.float32)
    for row, name in enumerate(names):
        if name in known:
            rows[row, known.index(name)] = 1
    return rows

"""The output symbols of a recogniser: characters, words or subwords; 0 is the blank of CTC."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from data.text.subwords import SPACE, Subwords, learn

BLANK = 0
UNITS = ("characters", "words", "bpe", "unigram")


class Symbols:
    """Characters or words, numbered from 1, or the subwords of a model; encodes and decodes texts.

    unit: one of UNITS. tokens: the characters or words. model: of the subwords, from `data.text.subwords.learn`.
    """

    def __init__(self, *, unit: str, tokens: Sequence[str] = (), model: bytes | None = None) -> None:
        self.options: dict[str, Any] = {"unit": unit, "tokens": [*tokens], "model": model}
        self.separator = " " if unit == "words" else ""
        self.tokens = [*tokens]
        self.index = {token: i for i, token in enumerate(tokens, start=1)}
        self.subwords = Subwords(model=model, source="", target="") if model else None

    @classmethod
    def learn(cls, texts: Iterable[str], unit: str, vocab_size: int) -> "Symbols":
        """All characters or words of the transcripts, or `vocab_size` subwords."""
        texts = list(texts)
        if not any(texts):
            raise ValueError("the transcripts to train on are all empty")
        if unit not in ("characters", "words"):
            return cls(unit=unit, model=learn(texts, unit, vocab_size, "data.unit"))
        return cls(unit=unit, tokens=sorted({token for text in texts for token in pieces(text, unit)}))

    def __len__(self) -> int:
        """The number of symbols, including the blank."""
        return len(self.subwords) if self.subwords is not None else len(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """The numbers of a text, without unknown characters or words."""
        if self.subwords is not None:
            return self.subwords.encode(text)
        return [self.index[token] for token in pieces(text, self.options["unit"]) if token in self.index]

    def unknown(self, text: str) -> set[str]:
        """The characters or words of a text that are not among the symbols."""
        return set() if self.subwords is not None else set(pieces(text, self.options["unit"])) - self.index.keys()

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of numbers, without blanks."""
        if self.subwords is not None:
            return self.subwords.decode(numbers)
        return self.separator.join(self.tokens[number - 1] for number in numbers if number != BLANK)

    def piece(self, number: int) -> str:
        """The text of one symbol, including the space before it."""
        if self.subwords is not None:
            return self.subwords.processor.id_to_piece(number).replace(SPACE, " ")
        return self.separator + self.tokens[number - 1]


def pieces(text: str, unit: str) -> Sequence[str]:
    return text.split() if unit == "words" else text


def least_steps(symbols: Sequence[int]) -> int:
    """The least number of steps for CTC: one for each symbol, and a blank between equal neighbours."""
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))

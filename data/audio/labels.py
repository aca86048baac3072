"""What a recogniser writes: characters, words or subwords, after the blank of CTC, whose number is 0."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from data.text.subwords import SPACE, Subwords, learn

BLANK = 0
UNITS = ("characters", "words", "bpe", "unigram")


class Symbols:
    """Characters or words in the order of their numbers, from 1 on, or subwords of a model; reads and writes texts.

    unit: one of UNITS. tokens: the characters or words. model: of the subwords, as `data.text.subwords.learn` gives it.
    """

    def __init__(self, *, unit: str, tokens: Sequence[str] = (), model: bytes | None = None) -> None:
        self.options: dict[str, Any] = {"unit": unit, "tokens": [*tokens], "model": model}
        self.separator = " " if unit == "words" else ""
        self.tokens = [*tokens]
        self.index = {token: i for i, token in enumerate(tokens, start=1)}
        self.subwords = Subwords(model=model, source="", target="") if model else None

    @classmethod
    def learn(cls, texts: Iterable[str], unit: str, vocab_size: int) -> "Symbols":
        """Of transcripts: all their characters or words, or vocab_size subwords."""
        texts = list(texts)
        if not any(texts):
            raise ValueError("the transcripts to train on are all empty: nothing can be learnt from them")
        if unit not in ("characters", "words"):
            return cls(unit=unit, model=learn(texts, unit, vocab_size, "data.unit"))
        return cls(unit=unit, tokens=sorted({token for text in texts for token in pieces(text, unit)}))

    def __len__(self) -> int:
        """All numbers, the blank's among them."""
        return len(self.subwords) if self.subwords is not None else len(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """The numbers of a text; what is none of these is left out, see `unknown`."""
        if self.subwords is not None:
            return self.subwords.encode(text)
        return [self.index[token] for token in pieces(text, self.options["unit"]) if token in self.index]

    def unknown(self, text: str) -> set[str]:
        """The characters or words that cannot be written."""
        return set() if self.subwords is not None else set(pieces(text, self.options["unit"])) - self.index.keys()

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of numbers, blanks left out."""
        if self.subwords is not None:
            return self.subwords.decode(numbers)
        return self.separator.join(self.tokens[number - 1] for number in numbers if number != BLANK)

    def piece(self, number: int) -> str:
        """What a symbol adds to a text, the space before it too."""
        if self.subwords is not None:
            return self.subwords.processor.id_to_piece(number).replace(SPACE, " ")
        return self.separator + self.tokens[number - 1]


def pieces(text: str, unit: str) -> Sequence[str]:
    return text.split() if unit == "words" else text


def frames_needed(symbols: Sequence[int]) -> int:
    """The steps that CTC needs at least: one a symbol, and a blank between two that are the same."""
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))

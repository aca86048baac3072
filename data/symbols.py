"""What a recogniser writes: characters, or subwords, after the blank of CTC, whose number is 0."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from data.subwords import SPACE, Subwords, learn

BLANK = 0
UNITS = ("characters", "bpe", "unigram")


class Symbols:
    """Characters in the order of their numbers, from 1 on, or subwords of a model; reads and writes texts."""

    def __init__(self, *, characters: Sequence[str] | None = None, model: bytes | None = None) -> None:
        self.characters = None if characters is None else list(characters)
        self.subwords = None if model is None else Subwords(model=model, source="", target="")
        self.options = {"characters": self.characters} if model is None else {"model": model}
        self.index = {character: i for i, character in enumerate(characters or (), start=1)}

    @classmethod
    def learnt(cls, texts: Iterable[str], unit: str, vocab_size: int) -> "Symbols":
        """Of transcripts: all their characters, or vocab_size subwords."""
        if unit == "characters":
            found = sorted({character for text in texts for character in text})
            if not found:
                raise ValueError("the transcripts to train on are all empty: nothing can be learnt from them")
            return cls(characters=found)
        return cls(model=learn(texts, unit, vocab_size))

    def __len__(self) -> int:
        """All numbers, the blank's among them."""
        return len(self.subwords) if self.subwords is not None else len(self.characters or ()) + 1

    def encode(self, text: str) -> list[int]:
        """The numbers of a text; characters that are none of these are left out, see `unknown`."""
        if self.subwords is not None:
            return self.subwords.encode(text)
        return [self.index[character] for character in text if character in self.index]

    def unknown(self, text: str) -> set[str]:
        """The characters that cannot be written."""
        return set() if self.subwords is not None else set(text) - self.index.keys()

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of numbers, blanks left out."""
        if self.subwords is not None:
            return self.subwords.decode(numbers)
        characters = self.characters or ()
        return "".join(characters[number - 1] for number in numbers if number != BLANK)

    def piece(self, number: int) -> str:
        """What a symbol adds to a text, the space before it too."""
        if self.subwords is None:
            return self.decode([number])
        return self.subwords.processor.id_to_piece(number).replace(SPACE, " ")


def frames_needed(symbols: Sequence[int]) -> int:
    """The steps that CTC needs at least: one a symbol, and a blank between two that are the same."""
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))

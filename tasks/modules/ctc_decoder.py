"""From the symbols' probabilities at each step to a text: the search of connectionist temporal classification."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLANK = 0
NOTHING = -math.inf


def greedy(log_p: Tensor, before: int = BLANK) -> tuple[list[int], int]:
    """The likeliest symbol of each step of log_p (T, V), without blanks and repetitions; and the last of all.

    before: the last of what came earlier, of which a repetition is none of its own.
    """
    best = log_p.argmax(1).tolist()
    kept = [symbol for last, symbol in zip([before, *best], best, strict=False) if symbol not in (BLANK, last)]
    return kept, best[-1] if best else before


class NGramLM:
    """An n-gram of words, in ARPA's or KenLM's own format, that judges a text as it is written.

    path: the file, which package kenlm reads. write: the text of a symbol, with the space before or after a word.
    weight: of its logarithms against the network's. bonus: for each word, as an n-gram prefers few.
    """

    def __init__(self, path: str, write: Callable[[int], str], weight: float, bonus: float) -> None:
        try:
            import kenlm
        except ImportError as error:
            raise ImportError("ngram= needs the package kenlm: type pip install kenlm") from error
        self.kenlm, self.write, self.weight, self.bonus = kenlm, write, weight, bonus
        try:
            self.model = kenlm.Model(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"ngram={path} is no n-gram in ARPA's or KenLM's format: {error}") from error

    def start(self) -> tuple[Any, str]:
        """Before the first word: the n-gram's state, and the letters of the word that is being written."""
        state = self.kenlm.State()
        self.model.BeginSentenceWrite(state)
        return state, ""

    def extend(self, context: tuple[Any, str], symbol: int) -> tuple[tuple[Any, str], float]:
        """The context after a symbol, and what the words that it ends are worth."""
        state, letters = context
        *words, letters = (letters + self.write(symbol)).split(" ")
        worth = 0.0
        for word in filter(None, words):
            state, more = self.word(state, word)
            worth += more
        return (state, letters), worth

    def end(self, context: tuple[Any, str]) -> float:
        """What the last word and the end of the text are worth."""
        state, letters = context
        worth = 0.0
        if letters:
            state, worth = self.word(state, letters)
        return worth + self.word(state, "</s>")[1] - self.bonus

    def word(self, state: Any, word: str) -> tuple[Any, float]:
        after = self.kenlm.State()
        found = self.model.BaseScore(state, word, after)  # a logarithm of base 10
        return after, self.weight * math.log(10) * found + self.bonus


class Node:
    """A prefix: its last symbol, and what came before it. Two prefixes are the same only as one object."""

    __slots__ = ("before", "symbol")

    def __init__(self, before: "Node | None", symbol: int) -> None:
        self.before, self.symbol = before, symbol

    def symbols(self) -> list[int]:
        found, node = [], self
        while node.before is not None:
            found.append(node.symbol)
            node = node.before
        return found[::-1]


class Beam(NamedTuple):
    """A prefix's probability, of the steps that end in a blank, and of those that end in its last symbol."""

    blank: float
    symbol: float
    context: Any = None  # of the n-gram
    worth: float = 0.0  # by it

    @property
    def score(self) -> float:
        return plus(self.blank, self.symbol) + self.worth


class PrefixSearch:
    """The likeliest texts, each with the probability of all the ways to say it (Graves, 2012; Hannun et al., 2014).

    It goes on from piece to piece of a sound, at a cost that does not grow. beam: prefixes that are kept after each
    step; each is gone on with by the `beam` likeliest symbols of the step.
    """

    def __init__(self, beam: int, words: NGramLM | None = None) -> None:
        self.beam, self.words = beam, words
        self.beams = {Node(None, BLANK): Beam(0.0, NOTHING, words and words.start())}

    def accept(self, log_p: Tensor) -> None:
        """Go on by log_p (T, V)."""
        best = log_p.topk(min(self.beam + 1, log_p.shape[1]))
        for row, likely in zip(log_p.tolist(), best.indices.tolist(), strict=True):
            self.step(row, [symbol for symbol in likely if symbol != BLANK])

    def step(self, log_p: Sequence[float], likely: Iterable[int]) -> None:
        # A prefix that was kept goes by its node, a new one by the node before it and its symbol.
        kept = {(node.before, node.symbol): node for node in self.beams}
        found: dict[Node | tuple[Node, int], Beam] = {}
        for node, beam in self.beams.items():
            total = plus(beam.blank, beam.symbol)
            # The same prefix, by a blank or by its last symbol once more.
            before = found.get(node)
            stays = beam._replace(
                blank=total + log_p[BLANK], symbol=NOTHING if node.before is None else beam.symbol + log_p[node.symbol]
            )
            found[node] = stays if before is None else stays._replace(symbol=plus(stays.symbol, before.symbol))
            for symbol in likely:
                # Behind itself a symbol is a new one only after a blank.
                value = (beam.blank if symbol == node.symbol else total) + log_p[symbol]
                if value == NOTHING:
                    continue
                longer = kept.get((node, symbol), (node, symbol))
                if longer in found:
                    found[longer] = found[longer]._replace(symbol=plus(found[longer].symbol, value))
                    continue
                context, worth = beam.context, 0.0
                if self.words is not None:
                    context, worth = self.words.extend(context, symbol)
                found[longer] = Beam(NOTHING, value, context, beam.worth + worth)
        best = sorted(found.items(), key=lambda pair: -pair[1].score)[: self.beam]
        self.beams = {place if isinstance(place, Node) else Node(*place): beam for place, beam in best}

    def best(self) -> list[tuple[float, list[int]]]:
        """The texts' symbols and their scores, the best first."""
        words = self.words
        scored = [
            (beam.score + (words.end(beam.context) if words is not None else 0.0), node.symbols())
            for node, beam in self.beams.items()
        ]
        return sorted(scored, key=lambda pair: -pair[0])


def plus(a: float, b: float) -> float:
    """The logarithm of the sum of two numbers, of their logarithms."""
    if a < b:
        a, b = b, a
    return a if b == NOTHING else a + math.log1p(math.exp(b - a))


def check_beam(beam: int, prefix: str = "") -> None:
    if type(beam) is not int or not 1 <= beam <= 1000:
        raise ValueError(f"{prefix}beam={beam} must be a whole number, 1 (the likeliest symbol of each step) to 1000")


def search(log_p: Tensor, beam: int, words: NGramLM | None = None) -> list[int]:
    """The symbols of the best text of log_p (T, V)."""
    if beam == 1 and words is None:
        return greedy(log_p)[0]
    found = PrefixSearch(beam, words)
    found.accept(log_p.detach().to("cpu", torch.float32))
    return found.best()[0][1]

"""Decoding for connectionist temporal classification: from the symbols' probabilities at each step to a text."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLANK = 0
IMPOSSIBLE = -math.inf


def greedy(log_p: Tensor, before: int = BLANK) -> tuple[list[int], int]:
    """The most likely symbol of each step of log_p (T, V), without blanks and repetitions, and the last step's one.

    before: the last step's symbol of an earlier call, so that its repetition is not counted again.
    """
    best = log_p.argmax(1).tolist()
    symbols = [symbol for last, symbol in zip([before, *best], best, strict=False) if symbol not in (BLANK, last)]
    return symbols, best[-1] if best else before


class NGramLM:
    """A word n-gram that scores a text as it grows, symbol by symbol.

    Args:
        path: a file in ARPA or KenLM format; the package kenlm reads it.
        write: the text of a symbol, including the space before or after a word.
        weight: factor of the n-gram's log-probabilities.
        bonus: added for each word, since n-grams prefer few words.
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
            raise ValueError(f"ngram={path} is not an n-gram in ARPA or KenLM format: {error}") from error

    def start(self) -> tuple[Any, str]:
        """The context before the first word: the n-gram's state, and the letters of the unfinished word."""
        state = self.kenlm.State()
        self.model.BeginSentenceWrite(state)
        return state, ""

    def extend(self, context: tuple[Any, str], symbol: int) -> tuple[tuple[Any, str], float]:
        """The context after a symbol, and the score of the words that it completes."""
        state, letters = context
        *words, letters = (letters + self.write(symbol)).split(" ")
        total = 0.0
        for word in filter(None, words):
            state, score = self.score_word(state, word)
            total += score
        return (state, letters), total

    def end(self, context: tuple[Any, str]) -> float:
        """The score of the last word and of the end of the text."""
        state, letters = context
        total = 0.0
        if letters:
            state, total = self.score_word(state, letters)
        return total + self.score_word(state, "</s>")[1] - self.bonus

    def score_word(self, state: Any, word: str) -> tuple[Any, float]:
        after = self.kenlm.State()
        log10_p = self.model.BaseScore(state, word, after)
        return after, self.weight * math.log(10) * log10_p + self.bonus


class Node:
    """A prefix as a linked list: the prefix before its last symbol, and that symbol. Nodes are compared by identity."""

    __slots__ = ("before", "symbol")

    def __init__(self, before: "Node | None", symbol: int) -> None:
        self.before, self.symbol = before, symbol

    def symbols(self) -> list[int]:
        symbols, node = [], self
        while node.before is not None:
            symbols.append(node.symbol)
            node = node.before
        return symbols[::-1]


class Beam(NamedTuple):
    """Log-probabilities of a prefix: of all alignments that end in a blank, and in its last symbol."""

    blank: float
    symbol: float
    context: Any = None  # of the n-gram
    ngram_score: float = 0.0

    @property
    def score(self) -> float:
        return log_add(self.blank, self.symbol) + self.ngram_score


class PrefixSearch:
    """Prefix beam search: texts by the total probability of their alignments (Graves, 2012; Hannun et al., 2014).

    The search can be continued with further steps at constant cost. Each of the `beam` best prefixes is extended by
    the `beam` most likely symbols of the next step.
    """

    def __init__(self, beam: int, words: NGramLM | None = None) -> None:
        self.beam, self.words = beam, words
        self.beams = {Node(None, BLANK): Beam(0.0, IMPOSSIBLE, words and words.start())}

    def accept(self, log_p: Tensor) -> None:
        """Continue with the steps of log_p (T, V)."""
        best = log_p.topk(min(self.beam + 1, log_p.shape[1]))
        for row, likely in zip(log_p.tolist(), best.indices.tolist(), strict=True):
            self.step(row, [symbol for symbol in likely if symbol != BLANK])

    def step(self, log_p: Sequence[float], likely: Iterable[int]) -> None:
        # The key of a known prefix is its node; a new one has the node before it and its last symbol.
        known = {(node.before, node.symbol): node for node in self.beams}
        beams: dict[Node | tuple[Node, int], Beam] = {}
        for node, beam in self.beams.items():
            total = log_add(beam.blank, beam.symbol)
            # A blank or a repetition of the last symbol leaves the prefix as it is.
            before = beams.get(node)
            same = beam._replace(
                blank=total + log_p[BLANK],
                symbol=IMPOSSIBLE if node.before is None else beam.symbol + log_p[node.symbol],
            )
            beams[node] = same if before is None else same._replace(symbol=log_add(same.symbol, before.symbol))
            for symbol in likely:
                # The same symbol again extends the prefix only after a blank.
                value = (beam.blank if symbol == node.symbol else total) + log_p[symbol]
                if value == IMPOSSIBLE:
                    continue
                longer = known.get((node, symbol), (node, symbol))
                if longer in beams:
                    beams[longer] = beams[longer]._replace(symbol=log_add(beams[longer].symbol, value))
                    continue
                context, score = beam.context, 0.0
                if self.words is not None:
                    context, score = self.words.extend(context, symbol)
                beams[longer] = Beam(IMPOSSIBLE, value, context, beam.ngram_score + score)
        best = sorted(beams.items(), key=lambda pair: -pair[1].score)[: self.beam]
        self.beams = {key if isinstance(key, Node) else Node(*key): beam for key, beam in best}

    def best(self) -> list[tuple[float, list[int]]]:
        """Scores and symbols of the texts, best first."""
        words = self.words
        scored = [
            (beam.score + (words.end(beam.context) if words is not None else 0.0), node.symbols())
            for node, beam in self.beams.items()
        ]
        return sorted(scored, key=lambda pair: -pair[0])


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == IMPOSSIBLE else a + math.log1p(math.exp(b - a))


def search(log_p: Tensor, beam: int, words: NGramLM | None = None) -> list[int]:
    """The symbols of the best text for log_p (T, V)."""
    if beam == 1 and words is None:
        return greedy(log_p)[0]
    prefixes = PrefixSearch(beam, words)
    prefixes.accept(log_p.detach().to("cpu", torch.float32))
    return prefixes.best()[0][1]

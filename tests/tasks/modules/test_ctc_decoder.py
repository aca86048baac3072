"""CTC's search, against all alignments that there are."""

import itertools
import math

import pytest
import torch

from tasks.modules.ctc_decoder import BLANK, NGramLM, PrefixSearch, greedy, log_add, search

LETTERS = {1: "a", 2: "b", 3: " "}
ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<unk>\t0
-99\t<s>\t-0.3
-1.0\t</s>\t0
-0.9\ta\t-0.2
-0.7\tb\t-0.1

\\2-grams:
-0.2\t<s> a
-0.4\ta b
-0.3\tb </s>

\\end\\
"""


def probabilities(steps, symbols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(steps, symbols, generator=generator)).log_softmax(1)


def every_text(log_p):
    """{text: logarithm of its probability}, by going through all alignments."""
    found = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK)
        value = sum(float(log_p[t, symbol]) for t, symbol in enumerate(path))
        found[text] = log_add(found.get(text, -math.inf), value)
    return found


def test_greedy_drops_blanks_and_repetitions():
    def one_hot(*symbols):
        return torch.nn.functional.one_hot(torch.tensor(symbols), 4).float()

    assert greedy(one_hot(1, 1, 0, 1, 2, 2, 0, 0)) == ([1, 1, 2], 0)
    assert greedy(one_hot(0, 0)) == ([], 0)
    assert greedy(one_hot(3, 3), before=3) == ([], 3)
    assert greedy(torch.zeros(0, 4), before=2) == ([], 2)


def test_greedy_goes_on_from_piece_to_piece():
    log_p = probabilities(40, 4)
    whole, _ = greedy(log_p)
    for size in (1, 3, 7):
        pieces, last = [], BLANK
        for piece in log_p.split(size):
            more, last = greedy(piece, last)
            pieces += more
        assert pieces == whole


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_every_text_and_its_probability(seed):
    log_p = probabilities(5, 3, seed)
    found = PrefixSearch(1000)
    found.accept(log_p)
    expected = every_text(log_p)
    assert {tuple(text): pytest.approx(score, abs=1e-5) for score, text in found.best()} == expected
    assert found.best()[0][1] == [*max(expected, key=expected.get)]
    assert sum(math.exp(score) for score, _ in found.best()) == pytest.approx(1, abs=1e-5)


def test_the_search_goes_on_from_piece_to_piece():
    log_p = probabilities(30, 4)
    whole, parted = PrefixSearch(6), PrefixSearch(6)
    whole.accept(log_p)
    for piece in log_p.split(4):
        parted.accept(piece)
    assert parted.best() == whole.best()
    assert search(log_p, 6) == whole.best()[0][1]


def test_the_cost_of_a_step_does_not_grow():
    """A prefix shares what came before it with the others."""
    found = PrefixSearch(4)
    found.accept(probabilities(2000, 3))
    nodes = set()
    for node in found.beams:
        while node is not None:
            nodes.add(id(node))
            node = node.before
    assert len(nodes) < 4 * 2000
    assert max(len(text) for _, text in found.best()) > 500


def test_the_likeliest_text_is_not_that_of_the_likeliest_symbols():
    log_p = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()  # no symbol: 0.36; one: 0.64
    assert search(log_p, 1) == []
    assert search(log_p, 4) == [1]


def test_nothing_is_said_in_no_step():
    assert search(torch.zeros(0, 4), 1) == search(torch.zeros(0, 4), 3) == []


def test_words_are_judged_by_an_n_gram(tmp_path):
    pytest.importorskip("kenlm", reason="pip install kenlm")
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    words = NGramLM(str(path), LETTERS.__getitem__, 0.5, 0.25)
    log_p = probabilities(5, 4, 3)
    found = PrefixSearch(1000, words)
    found.accept(log_p)
    scores = {tuple(text): score for score, text in found.best()}
    heard = every_text(log_p)
    # By the table above: "a b" is <s> a, a b, b </s>; "ab" is unknown, and backs off; "b" begins as no sentence does.
    for text, logarithm, count in (
        ((1, 3, 2), -0.2 - 0.4 - 0.3, 2),
        ((1, 2), -0.3 - 1.0 - 1.0, 1),
        ((2,), -0.3 - 0.7 - 0.3, 1),
        ((), -0.3 - 1.0, 0),
    ):
        expected = heard[text] + 0.5 * math.log(10) * logarithm + 0.25 * count
        assert scores[text] == pytest.approx(expected, abs=1e-4), text


def test_a_file_that_is_not_an_n_gram_is_refused(tmp_path):
    pytest.importorskip("kenlm", reason="pip install kenlm")
    with pytest.raises(ValueError, match=r"ngram=.*none\.arpa is not an n-gram"):
        NGramLM(str(tmp_path / "none.arpa"), str, 1.0, 0.0)

"""Turn text into words, words into a vocabulary, and a vocabulary into fixed vectors."""

import re
from collections import Counter
from collections.abc import Iterable

PAD, UNK = "<pad>", "<unk>"  # indices 0 and 1 of every vocabulary

WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|ve|re|d|ll|m)\b|\w+(?:-\w+)*|[^\w\s]")


def tokenise(text: str) -> list[str]:
    """Words and punctuation marks of running text, contractions split as in the Penn Treebank: do n't, it 's."""
    return WORD.findall(text.replace("’", "'"))


def clean(text: str) -> str:
    """Kim's (2014) filter of the sentence corpora: letters, digits and (),!?'` stay, contractions and marks apart."""
    text = re.sub(r"[^A-Za-z0-9(),!?'`]", " ", text)
    text = re.sub(r"'(?:s|ve|re|d|ll)|n't", r" \g<0>", text)
    return " ".join(re.sub(r"[,!()?]", r" \g<0> ", text).split())


def build_vocabulary(sentences: Iterable[list[str]], min_count: int) -> list[str]:
    """<pad>, <unk>, then the words seen at least `min_count` times, most frequent first, ties in alphabetical order."""
    counts = Counter(word for sentence in sentences for word in sentence)
    words = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    return [PAD, UNK, *(word for word in words if word not in (PAD, UNK))]

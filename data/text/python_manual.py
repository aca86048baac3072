"""Python's reference manual as a corpus: its text, and sentences by topic.

The text is `pydoc_data.topics`, which every Python carries. It and results on it differ a little between Python
versions.
"""

import re

from data.text.word_vectors import tokenise


def manual_text() -> str:
    """The whole manual, by topic."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def manual_sentences() -> dict[str, list[str]]:
    """Tokenised sentences of each of the ten largest topics, without duplicates, code, headings and fragments.

    A topic is left out if most of its sentences occur in a larger one.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    chosen: dict[str, list[str]] = {}
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        sentences: dict[str, None] = {}
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            # Unlike code, grammar and headings, a sentence begins with a capital and ends with a stop.
            running = re.sub(r"^[*\s]+|[*\"“”]|\[\d+\]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", running):
                words = tokenise(sentence)
                if len(words) > 4 and re.match(r"[A-Z].*[a-z)][.!?:]$", sentence) and ">>>" not in sentence:
                    sentences[" ".join(words)] = None
        fresh = [sentence for sentence in sentences if sentence not in seen]
        if 2 * len(fresh) > len(sentences):
            chosen[topic] = fresh
            seen.update(fresh)
        if len(chosen) == 10:
            break
    return chosen

"""Lemmas, parts of speech and names by spaCy, for the features of question answering; optional."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

FEW = 1000  # texts that are not worth a second process


class Tagger:
    """A pipeline of spaCy over tokens that are given, so that they are the same with and without it.

    name: a pipeline that is installed, or the folder of one. ImportError or ValueError say what is missing of it.
    """

    def __init__(self, name: str) -> None:
        try:
            import spacy
        except ImportError as error:
            raise ImportError(
                "data.tagger=spacy needs spaCy: type pip install '.[spacy]', or data.tagger=none"
            ) from error
        try:
            self.pipeline = spacy.load(name)
        except OSError as error:
            raise ValueError(
                f"data.spacy_model={name} is not installed: type python -m spacy download {name}, "
                "or data.tagger=none, which leaves lemmas, parts of speech and names out"
            ) from error
        self.name = name
        meta = self.pipeline.meta
        self.identity = [meta["lang"], meta["name"], meta["version"], spacy.__version__, self.pipeline.pipe_names]

    def annotate(self, texts: Sequence[list[str]]) -> Iterator[dict[str, list[str]]]:
        """For each list of words: lemmas, tags (parts of speech) and entities (kinds of names, "" for none)."""
        from spacy.tokens import Doc

        docs = (Doc(self.pipeline.vocab, words=words) for words in texts)
        processes = (os.cpu_count() or 1) if len(texts) > FEW else 1
        tagged: Any = self.pipeline.pipe(docs, batch_size=64, n_process=processes)
        is_checked = False
        for doc in tqdm(tagged, total=len(texts), desc=f"tagging by {self.name}", delay=1):
            missing = [name for name in ("LEMMA", "TAG", "ENT_IOB") if not doc.has_annotation(name)]
            if len(doc) and not is_checked and missing:
                raise ValueError(
                    f"data.spacy_model={self.name} gives no {', '.join(missing)} (it has {self.pipeline.pipe_names}): "
                    "take one with a lemmatizer, a tagger and a recogniser of names, such as en_core_web_sm, "
                    "or data.tagger=none"
                )
            is_checked |= len(doc) > 0
            yield {
                "lemmas": [token.lemma_ for token in doc],
                "tags": [token.tag_ for token in doc],
                "entities": [token.ent_type_ for token in doc],
            }

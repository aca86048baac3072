"""Lemmas, parts of speech and named entities by spaCy (optional), as features of question answering."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.cache import available_cores

FEW = 1000  # up to so many texts one process is faster


class Tagger:
    """A spaCy pipeline on our tokens, which are the same with and without it.

    name: an installed pipeline, or a folder with one. ImportError or ValueError if something is missing.
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
        except Exception as error:  # spaCy passes on any error that a damaged file causes
            reason = (
                "is not installed" if not os.path.exists(name) else f"is damaged ({' '.join(str(error).split()):.80})"
            )
            raise ValueError(
                f"data.spacy_model={name} {reason}: type python -m spacy download {name}, "
                "or data.tagger=none, which omits lemmas, parts of speech and names"
            ) from error
        self.name = name
        meta = self.pipeline.meta
        self.identity = [meta["lang"], meta["name"], meta["version"], spacy.__version__, *self.pipeline.pipe_names]
        if os.path.isdir(name):  # the user's own pipeline may change without a new version
            digest = hashlib.sha256()
            for path in sorted(path for path in Path(name).rglob("*") if path.is_file()):
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
            self.identity.append(digest.hexdigest())

    def annotate(self, texts: Sequence[list[str]]) -> Iterator[dict[str, list[str]]]:
        """For each list of words: lemmas, tags (parts of speech) and entities (kinds of names, or "")."""
        from spacy.tokens import Doc

        docs = (Doc(self.pipeline.vocab, words=words) for words in texts)
        processes = available_cores() if len(texts) > FEW else 1
        tagged: Any = self.pipeline.pipe(docs, batch_size=64, n_process=processes)
        is_checked = False
        progress = tqdm(tagged, total=len(texts), desc=f"tagging by {self.name}", delay=1)
        for doc, words in zip(progress, texts, strict=True):
            if len(doc) != len(words):
                raise ValueError(
                    f"data.spacy_model={self.name} makes {len(doc)} tokens of {len(words)}: use a pipeline without "
                    f"components that merge or split tokens (it has {self.pipeline.pipe_names}), or data.tagger=none"
                )
            missing = [name for name in ("LEMMA", "TAG", "ENT_IOB") if not doc.has_annotation(name)]
            if len(doc) and not is_checked and missing:
                raise ValueError(
                    f"data.spacy_model={self.name} gives no {', '.join(missing)} (it has {self.pipeline.pipe_names}): "
                    "use one with a lemmatizer, a tagger and named entity recognition, such as en_core_web_sm, "
                    "or data.tagger=none"
                )
            is_checked |= len(doc) > 0
            yield {
                "lemmas": [token.lemma_ for token in doc],
                "tags": [token.tag_ for token in doc],
                "entities": [token.ent_type_ for token in doc],
            }

"""Lemmas, parts of speech and names by spaCy, for the features of question answering; optional."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

FEW = 1000  # texts that are not worth a second process


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hash_of(path: Path) -> bytes:
    return path.name.encode() + hashlib.sha256(path.read_bytes()).digest()


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
        except Exception as error:  # of spaCy, and of what its files lead it to
            reason = (
                "is not installed" if not os.path.exists(name) else f"is damaged ({' '.join(str(error).split()):.80})"
            )
            raise ValueError(
                f"data.spacy_model={name} {reason}: type python -m spacy download {name}, "
                "or data.tagger=none, which leaves lemmas, parts of speech and names out"
            ) from error
        self.name = name
        meta = self.pipeline.meta
        self.identity = [meta["lang"], meta["name"], meta["version"], spacy.__version__, *self.pipeline.pipe_names]
        if os.path.isdir(name):  # one that somebody trained: its version need not tell
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            self.identity.append(hashlib.sha256(b"".join(hash_of(path) for path in files)).hexdigest())

    def annotate(self, texts: Sequence[list[str]]) -> Iterator[dict[str, list[str]]]:
        """For each list of words: lemmas, tags (parts of speech) and entities (kinds of names, "" for none)."""
        from spacy.tokens import Doc

        docs = (Doc(self.pipeline.vocab, words=words) for words in texts)
        processes = cores() if len(texts) > FEW else 1
        tagged: Any = self.pipeline.pipe(docs, batch_size=64, n_process=processes)
        is_checked = False
        progress = tqdm(tagged, total=len(texts), desc=f"tagging by {self.name}", delay=1)
        for doc, words in zip(progress, texts, strict=True):
            if len(doc) != len(words):
                raise ValueError(
                    f"data.spacy_model={self.name} makes {len(doc)} tokens of {len(words)}: take a pipeline without "
                    f"parts that merge or split them (it has {self.pipeline.pipe_names}), or data.tagger=none"
                )
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

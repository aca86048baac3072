"""Pairs of texts to translate one into the other (SRU 2018, section 4.3; SRU++ 2021, Table 8)."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from data import download
from data.batching import Batches
from data.text import sentence_pairs
from data.text.sentence_pairs import Pairs
from data.text.subwords import KINDS, Batch, Subwords

log = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "tests/samples"


class ParallelText(pl.LightningDataModule):
    """Pairs of files PREFIX.source and PREFIX.target, line n of one the translation of line n of the other.

    root: folder of the corpora, which may be read-only.
    cache: folder for what is prepared from them, once for all runs.
    train, val, test: PREFIXes, below root or paths; the files are UTF-8, plain, .gz, .xz or .zip.
    source, target: the languages, as the files' names end.
    files: {url, sha256} or {hub} of the files that are downloaded when absent, by name below root, and in `lines` how
        many lines they have.
    subword, vocab_size: bpe or unigram, and how many subwords both languages have together. They are learnt from the
        training files alone.
    max_length: a training pair with more subwords on a side is left out, and one without a word. In validation and test
        none is.
    tokens_per_batch: a batch has at most so many subwords and </s> on either side, with the padding.
    eval_tokens_per_batch: the same in validation and test, where a pair that is longer comes alone.
    """

    MODEL_KWARGS = ("vocab_size", "bos", "eos", "decode")  # the names in `model_kwargs`
    FIXED_BY_CHECKPOINT = ("subword", "vocab_size")  # by a checkpoint

    def __init__(
        self,
        *,
        root: str,
        cache: str,
        train: str,
        val: str,
        test: str,
        source: str,
        target: str,
        files: Mapping[str, Mapping[str, Any]] | None = None,
        subword: str = "bpe",
        vocab_size: int = 32000,
        max_length: int = 100,
        tokens_per_batch: int = 4096,
        eval_tokens_per_batch: int = 4096,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.names = {"train": train, "val": val, "test": test}
        self.languages = {"source": source, "target": target}
        self.files = dict(files or {})
        for name, language in self.languages.items():
            if not isinstance(language, str) or not language:
                raise ValueError(
                    f"data.{name}={language} must be a language, as its files' names end: type data.{name}=de for "
                    "PREFIX.de (in quotes if YAML reads something else, as of no)"
                )
        if source == target:
            raise ValueError(f"data.source={source} and data.target={target} are the same language: name two")
        for split, prefix in self.names.items():
            if not isinstance(prefix, str) or not Path(prefix).name:
                raise ValueError(
                    f"data.{split}={prefix} must be a PREFIX: type data.{split}=DIR/NAME for the files "
                    f"DIR/NAME.{source} and DIR/NAME.{target}"
                )
        if subword not in KINDS:
            raise ValueError(f"data.subword={subword} must be one of {', '.join(KINDS)}")
        sizes = {"vocab_size": vocab_size, "max_length": max_length, "tokens_per_batch": tokens_per_batch}
        for name, value in (sizes | {"eval_tokens_per_batch": eval_tokens_per_batch}).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number, 1 or more")
        if tokens_per_batch <= max_length:
            raise ValueError(
                f"data.tokens_per_batch={tokens_per_batch} does not hold one sentence of data.max_length={max_length} "
                f"and its </s>: type data.tokens_per_batch={max_length + 1} or more, or a smaller data.max_length"
            )
        self.subword, self.vocab_size, self.max_length = subword, vocab_size, max_length
        self.tokens_per_batch, self.eval_tokens_per_batch, self.seed = tokens_per_batch, eval_tokens_per_batch, seed
        self.checkpoint_vocabulary: Subwords | None = (
            None  # a checkpoint's, to read with; none is made of the corpus then
        )
        self.pairs: dict[str, Pairs] = {}
        self.keys: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Downloads and checks what is absent, and prepares it in the cache; done once for all runs."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens what is prepared, and prepares it where it is not; a second call does nothing."""
        if self.pairs:
            return
        paths = {split: self.locate(split) for split in self.names}
        texts = {
            path: sentence_pairs.check_text(path)
            for path in dict.fromkeys(path for both in paths.values() for path in both)
        }
        files = {split: (texts[source], texts[target]) for split, (source, target) in paths.items()}
        for split, both in files.items():
            sentence_pairs.require_pairs(f"data.{split}={self.names[split]}", *both)
            for language, file in zip(self.languages.values(), both, strict=True):
                lines = self.files.get(f"{self.names[split]}.{language}", {}).get("lines", file.lines)
                if file.lines != lines:
                    raise ValueError(
                        f"{file.path} has {file.lines:,} lines, expected {lines:,}: not the published file. Put "
                        "the right one there, or type another data.root=DIR to download it to"
                    )
        if self.checkpoint_vocabulary is not None:
            self.subwords = self.checkpoint_vocabulary
            if {name: self.subwords.options[name] for name in ("source", "target")} == {
                "source": self.languages["target"],
                "target": self.languages["source"],
            }:
                raise ValueError(
                    f"data.source={self.languages['source']} data.target={self.languages['target']}: the checkpoint "
                    "translates the other way round"
                )
        else:
            model = sentence_pairs.subwords_of(files["train"], self.cache, self.subword, self.vocab_size)
            self.subwords = Subwords(model=model, **self.languages)
        found = {
            both: sentence_pairs.prepare(*both, self.cache, self.subwords) for both in dict.fromkeys(files.values())
        }
        for split, both in files.items():
            log.info("%s", self.report(split, found[both]))
        if self.checkpoint_vocabulary is None and not len(self.training_rows(train := found[files["train"]])):
            raise ValueError(f"there is nothing to learn from: {self.report('train', train)}")
        self.pairs = {split: found[both] for split, both in files.items()}
        self.keys = {split: pairs.key for split, pairs in self.pairs.items()}

    def report(self, split: str, pairs: Pairs) -> str:
        """How many pairs there are, and which of them are not like the others."""
        told = f"data.{split}={self.names[split]} has {len(pairs):,} pairs"
        if len(pairs.empty):
            told += f"; {len(pairs.empty):,} without a word on one side or both, "
            told += "left out" if split == "train" else "kept, for every line is translated"
        if split == "train" and (long := len(pairs) - len(pairs.empty) - len(self.training_rows(pairs))):
            told += f"; {long:,} with more subwords than data.max_length={self.max_length}, left out"
        return told

    def locate(self, split: str) -> tuple[Path, Path]:
        """The files of a split; downloaded if absent and known where from."""
        prefix = self.names[split]
        names = [f"{prefix}.{language}" for language in self.languages.values()]
        if all(name in self.files for name in names):
            source, target = map(self.download, names)
            return source, target
        wanted = [[folder / Path(name).expanduser() for name in names] for folder in (self.root, Path())]
        for paths in wanted:
            found = [download.find(path) for path in paths]
            if found[0] and found[1]:
                return found[0], found[1]
            if present := found[0] or found[1]:
                raise FileNotFoundError(
                    f"data.{split}={prefix}: {paths[found.index(None)]} is missing beside {present}; put it "
                    "there (plain, .gz, .xz or .zip), or name other languages by data.source and data.target"
                )
        known = sorted({name.rpartition(".")[0] for name in self.files})
        raise FileNotFoundError(
            f"data.{split}={prefix}: there are no files {names[0]} and {names[1]}, neither in {self.root} nor here; "
            f"type the path of two such files without the language"
            + (f", or one of {', '.join(known)}, which are downloaded" if known else "")
        )

    def download(self, name: str) -> Path:
        """A file that is known, from where it lies or from where it comes."""
        path, known = self.root / name, self.files[name]
        if "hub" in known:
            rows_to_lines = partial(sentences_of, language=name.rpartition(".")[2])
            return download.find(path) or download.fetch_from_hub(path, known["hub"], rows_to_lines)
        return download.fetch(path, known["url"], known.get("sha256"))

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: vocab_size, bos and eos. Prepares the data first."""
        self.setup()
        return self.subwords.model_kwargs

    def training_rows(self, pairs: Pairs) -> np.ndarray:
        """The pairs that can be learnt from."""
        fits = pairs.sizes <= self.max_length + 1
        fits[pairs.empty] = False
        return np.flatnonzero(fits)

    def train_dataloader(self) -> Batches[Batch]:
        pairs = self.pairs["train"]
        rows = self.training_rows(pairs)
        batches = Batches(pairs.batch, rows, pairs.sizes[rows], budget=self.tokens_per_batch, seed=self.seed)
        if self.trainer is not None:
            batches.limit(self.trainer.limit_train_batches)
        return batches

    def val_dataloader(self) -> Batches[Batch]:
        return self.evaluation("val")

    def test_dataloader(self) -> Batches[Batch]:
        return self.evaluation("test")

    def evaluation(self, split: str) -> Batches[Batch]:
        pairs = self.pairs[split]
        return Batches(pairs.batch, range(len(pairs)), pairs.sizes, budget=self.eval_tokens_per_batch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read and write sentences, and to know the files that it was trained on."""
        self.setup()
        return self.subwords.options | {"files": self.keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on other files, or has other subwords."""
        now = self.state_dict()
        if changed := [name for name in now if now[name] != state_dict.get(name)]:
            then = len(self.vocabulary_of(state_dict)) if "model" in state_dict else "no"
            raise ValueError(
                f"the checkpoint was trained on other data: {', '.join(changed)} differ ({then} subwords then, "
                f"{len(self.subwords)} now). Use the files and options of the checkpoint's run (data.train, data.val, "
                "data.test, data.source, data.target, data.subword, data.vocab_size), or train again."
            )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Subwords:
        """The subwords in a `state_dict`."""
        return Subwords(**{name: value for name, value in state_dict.items() if name != "files"})


class Sample(ParallelText):
    """The sentences in tests/samples, written for this project: no download."""

    def __init__(self, *, root: str = "", **options: Any) -> None:
        train, dev = (str(SAMPLES / f"translation-{part}") for part in ("train", "dev"))
        super().__init__(root=root, train=train, val=dev, test=dev, **options)


def sentences_of(rows: Iterable[Mapping[str, Any]], language: str) -> Iterator[bytes]:
    """One side of a translation set on the hub, a sentence a line."""
    for row in rows:
        yield (re.sub("[\r\n]+", " ", row["translation"][language]) + "\n").encode()

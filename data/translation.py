"""Parallel texts for translation (SRU 2018, section 4.3; SRU++ 2021, Table 8)."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data import download
from data.base import DataModule
from data.batching import Batches
from data.text import sentence_pairs
from data.text.sentence_pairs import Pairs
from data.text.subwords import KINDS, Batch, Subwords

log = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "tests/samples"


class ParallelText(DataModule[Batches]):
    """Pairs of files PREFIX.source and PREFIX.target; line n of one translates line n of the other.

    root: folder of the corpora, may be read-only.
    cache: folder for prepared data, shared by all runs.
    train, val, test: PREFIXes, below root or paths; the files are UTF-8, plain, .gz, .xz or .zip.
    source, target: the languages, which are the suffixes of the files.
    files: {url, sha256} or {hub} of files that are downloaded if absent, by name below root; `lines`: their length.
    subword, vocab_size: bpe or unigram, and the number of subwords of both languages, learnt from the training files.
    max_length: training pairs with more subwords on one side, or without a word, are left out. Validation and test use
        all pairs.
    tokens_per_batch: the largest size of a batch on either side, in subwords, </s> and padding.
    eval_tokens_per_batch: the same in validation and test; a longer pair is a batch of its own.
    """

    MODEL_KWARGS = ("vocab_size", "bos", "eos", "decode")
    FIXED_BY_CHECKPOINT = ("subword", "vocab_size")
    SPLIT_OPTIONS = ("train", "val", "test", "source", "target")

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
                    f"data.{name}={language} must be a language, the suffix of its files: type data.{name}=de for "
                    "PREFIX.de (in quotes if YAML reads it otherwise, such as 'no')"
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
        if tokens_per_batch <= max_length:
            raise ValueError(
                f"data.tokens_per_batch={tokens_per_batch} does not hold one sentence of data.max_length={max_length} "
                f"and its </s>: type data.tokens_per_batch={max_length + 1} or more, or a smaller data.max_length"
            )
        self.subword, self.vocab_size, self.max_length = subword, vocab_size, max_length
        self.tokens_per_batch, self.eval_tokens_per_batch, self.seed = tokens_per_batch, eval_tokens_per_batch, seed

    def load(self) -> None:
        """Prepares each pair of files once; `splits` are `Pairs`."""
        paths = {split: self.locate(split) for split in self.names}
        texts = {path: sentence_pairs.check_text(path) for path in dict.fromkeys(sum(paths.values(), ()))}
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
            self.vocabulary = self.checkpoint_vocabulary
            known, (source, target) = self.vocabulary.options, self.languages.values()
            if (known["source"], known["target"]) == (target, source):
                raise ValueError(
                    f"data.source={source} data.target={target}: the checkpoint translates the other way round"
                )
        else:
            model = sentence_pairs.subwords_of(files["train"], self.cache, self.subword, self.vocab_size)
            self.vocabulary = Subwords(model=model, **self.languages)
        pairs = {
            both: sentence_pairs.prepare(*both, self.cache, self.vocabulary) for both in dict.fromkeys(files.values())
        }
        splits = {split: pairs[both] for split, both in files.items()}
        for split, own in splits.items():
            log.info("%s", self.report(split, own))
        if self.checkpoint_vocabulary is None and not len(self.training_rows(splits["train"])):
            raise ValueError(f"no pair can be trained on: {self.report('train', splits['train'])}")
        self.splits = splits

    def report(self, split: str, pairs: Pairs) -> str:
        """The numbers of pairs, of empty ones, and of those left out."""
        report = f"data.{split}={self.names[split]} has {len(pairs):,} pairs"
        if len(pairs.empty):
            report += f"; {len(pairs.empty):,} without a word on one side or both, "
            report += "left out" if split == "train" else "kept, since every line is translated"
        if split == "train" and (long := len(pairs) - len(pairs.empty) - len(self.training_rows(pairs))):
            report += f"; {long:,} with more subwords than data.max_length={self.max_length}, left out"
        return report

    def locate(self, split: str) -> tuple[Path, Path]:
        """The files of a split; downloaded if they are absent and in `files`."""
        prefix = self.names[split]
        names = [f"{prefix}.{language}" for language in self.languages.values()]
        if all(name in self.files for name in names):
            source, target = (
                download.fetch_source(
                    self.root / name, self.files[name], partial(sentences_of, language=name.rpartition(".")[2])
                )
                for name in names
            )
            return source, target

        def find_both(path: Path) -> tuple[Path, Path] | None:
            paths = [path.parent / f"{path.name}.{language}" for language in self.languages.values()]
            source, target = map(download.find, paths)
            if source and target:
                return source, target
            if source or target:
                raise FileNotFoundError(
                    f"data.{split}={prefix}: {paths[1] if source else paths[0]} is missing beside {source or target}; "
                    "put it there (plain, .gz, .xz or .zip), or name other languages by data.source and data.target"
                )
            return None

        known = ", ".join(sorted({name.rpartition(".")[0] for name in self.files}))
        advice = f"type the path of the files {names[0]} and {names[1]} without the language"
        advice += f", or one of {known}, which are downloaded" if known else ""
        return download.find_below(self.root, split, prefix, advice, find_both)

    def training_rows(self, pairs: Pairs) -> np.ndarray:
        """The numbers of the pairs to train on."""
        fits = pairs.sizes <= self.max_length + 1
        fits[pairs.empty] = False
        return np.flatnonzero(fits)

    def train_loader(self) -> Batches[Batch]:
        pairs = self.splits["train"]
        rows = self.training_rows(pairs)
        return Batches(pairs.batch, rows, pairs.sizes[rows], budget=self.tokens_per_batch, seed=self.seed)

    def evaluation(self, split: str) -> Batches[Batch]:
        pairs = self.splits[split]
        return Batches(pairs.batch, range(len(pairs)), pairs.sizes, budget=self.eval_tokens_per_batch)

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        return self.vocabulary.options | {"files": {split: pairs.key for split, pairs in self.splits.items()}}

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Subwords:
        return Subwords(**{name: value for name, value in state_dict.items() if name != "files"})


class Sample(ParallelText):
    """The bundled sentences in tests/samples, written for this project: no download."""

    def __init__(self, *, root: str = "", **options: Any) -> None:
        train, dev = (str(SAMPLES / f"translation-{part}") for part in ("train", "dev"))
        super().__init__(root=root, train=train, val=dev, test=dev, **options)


def sentences_of(rows: Iterable[Mapping[str, Any]], language: str) -> Iterator[bytes]:
    """One side of a translation dataset on the hub, a sentence a line."""
    for row in rows:
        yield (re.sub("[\r\n]+", " ", row["translation"][language]) + "\n").encode()

"""Sentence classification: the six corpora of SRU (2018), Table 1, and the bundled Python manual."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.base import DataModule
from data.batching import FixedBatches, pad_columns, rank_and_world_size
from data.download import fetch, read_bytes
from data.text import word_vectors
from data.text.lines import lines_of, refuse_nul, strip_byte_order_mark
from data.text.python_manual import manual_sentences

SPLIT_SEED = 1234  # of the published folds; the seed of a run does not change the splits
FOLDS = 10

Example = tuple[list[str], int]  # words and class
Item = TypeVar("Item")


class Vocabulary:
    """The words and labels that a network knows, in the order of their indices.

    vector_size: of fixed word vectors, which a checkpoint contains; None if the embedding is trained.
    """

    def __init__(self, words: Sequence[str], labels: Sequence[str], vector_size: int | None = None) -> None:
        self.words, self.labels, self.vector_size = list(words), list(labels), vector_size
        self.index = {word: i for i, word in enumerate(words)}

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The sizes; `vectors` are zeros, to be replaced by those of the checkpoint."""
        return {
            "vocab_size": len(self.words),
            "num_classes": len(self.labels),
            "vectors": None if self.vector_size is None else torch.zeros(len(self.words), self.vector_size),
            "pad": self.index[word_vectors.PAD],
        }


class SentenceClassification(DataModule[FixedBatches]):
    """Files of `label text` lines as fixed batches (SRU 2018, section 4.1 and its published code).

    A batch is (tokens (T, B) int64, labels (B,) int64), padded on the LEFT so that the last step is a real word.
    Training batches are made once, from the list shuffled by `seed`, and have the same order in every epoch, as in the
    published code. Validation and test batches keep the order of the split.

    root: folder of the corpora, may be read-only; files lie in root/sentcls and are downloaded if absent.
    cache: folder for prepared word vectors.
    labels: names of the classes; a file's label is an index into them.
    files: {name, url, sha256, examples} for the keys `all` (10-fold cross-validation), `train` and `test` (a tenth of
        train is validation), or `train`, `val` and `test`.
    fold: 0 to 9, the tenth that is the test set (or validation set, see `split_examples`).
    vectors: None (trained), or fixed word vectors: see `word_vectors.load_vectors`.
    min_count: without vectors, training words with fewer occurrences become <unk>, which is thereby trained.
    lowercase, clean: normalisation of the text; see `word_vectors.clean`.
    """

    MODEL_KWARGS = ("vocab_size", "num_classes", "vectors", "pad")
    FIXED_BY_CHECKPOINT = ("vectors", "min_count", "lowercase")
    SPLIT_OPTIONS = ("fold",)
    ADDED_STATE = ("vector_size",)

    def __init__(
        self,
        *,
        root: str,
        cache: str,
        labels: Sequence[str],
        files: Mapping[str, Mapping[str, Any]],
        fold: int = 0,
        batch_size: int = 32,
        seed: int = SPLIT_SEED,
        vectors: str | None = None,
        min_count: int = 2,
        lowercase: bool = True,
        clean: bool = True,
    ) -> None:
        super().__init__()
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.labels = list(labels)
        self.files = files
        self.fold = fold
        self.batch_size, self.seed = batch_size, seed
        self.vectors, self.min_count = vectors, min_count
        self.lowercase, self.clean = lowercase, clean
        self.embedding: Tensor | None = None

    def load(self) -> None:
        splits = split_examples(self.read(), self.fold)
        self.vocabulary = self.checkpoint_vocabulary or self.build_vocabulary(splits)
        if self.vocabulary.labels != self.labels:
            raise ValueError(
                f"the labels of the data are {', '.join(self.labels)}, those of the checkpoint "
                f"{', '.join(self.vocabulary.labels)}: name data with the same"
            )
        self.splits = splits

    def build_vocabulary(self, splits: Mapping[str, Sequence[Example]]) -> Vocabulary:
        """The vocabulary of the training examples, or, with fixed vectors, of all; sets `embedding` to the vectors."""
        if len(classes := {label for _, label in splits["train"]}) < 2:
            raise ValueError(
                f"all {len(splits['train'])} training examples have the label {self.labels[classes.pop()]}: "
                "add examples of another"
            )
        if self.vectors is None:
            words = word_vectors.build_vocabulary((sentence for sentence, _ in splits["train"]), self.min_count)
            return Vocabulary(words, self.labels)
        words = word_vectors.build_vocabulary((words for split in splits.values() for words, _ in split), 1)
        self.embedding = word_vectors.load_vectors(words, self.vectors, self.root / "vectors", self.cache)
        return Vocabulary(words, self.labels, self.embedding.shape[1])

    def read(self) -> dict[str, list[Example]]:
        """The examples of each file in order; downloads absent files."""
        return {key: self.read_file(self.locate(key), file["examples"]) for key, file in self.files.items()}

    def locate(self, key: str) -> Path:
        file = self.files[key]
        return fetch(self.root / "sentcls" / file["name"], file["url"], file["sha256"])

    def read_file(self, path: Path, expected: int | None) -> list[Example]:
        """(words, class) of each line; ValueError with path and line number of the first that is not `label text`."""
        examples = []
        for where, label, sentence in self.lines_of(path):
            number = self.number_of(label)
            if number is None:
                raise ValueError(
                    f"{where}: expected `label text` with a label {self.known_labels}, "
                    f"found {f'{label} {sentence}'[:80].strip()!r}"
                )
            examples.append((self.words_of(sentence), number))
        if not examples and not expected:
            raise ValueError(f"{path} is empty: give it lines of `label text`, at least one for each split")
        if len(examples) != (expected or len(examples)):
            raise ValueError(
                f"{path} holds {len(examples)} examples, expected {expected}: not the published file. "
                "Put the right file there, or type another data.root=DIR to download it to."
            )
        return examples

    def lines_of(self, path: Path) -> Iterator[tuple[str, str, str]]:
        """(path:number, label, text) of each line."""
        content = self.decode(read_bytes(path), path)
        for number, line in enumerate(lines_of(content.rstrip("\r\n")), start=1):
            label, *sentence = re.split("[ \t]", line.strip(), maxsplit=1)
            yield f"{path}:{number}", label, "".join(sentence)

    def decode(self, content: bytes, name: Path) -> str:
        """The text of a published file: UTF-8, or Latin-1 for a few accents in MR, SUBJ and TREC."""
        content = strip_byte_order_mark(content, name)
        refuse_nul(content, name)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")

    def number_of(self, label: str) -> int | None:
        """The class of a file's label; None if there is no such class."""
        return int(label) if re.fullmatch("[0-9]{1,9}", label) and int(label) < len(self.labels) else None

    @property
    def known_labels(self) -> str:
        return f"from 0 to {len(self.labels) - 1}"

    def words_of(self, sentence: str) -> list[str]:
        """The words of a sentence with spaces between tokens."""
        words = word_vectors.clean(sentence).split() if self.clean else []
        # A sentence of other signs only keeps them; CR contains an empty sentence.
        words = words or sentence.split() or [word_vectors.UNK]
        return [word.lower() for word in words] if self.lowercase else words

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return super().model_kwargs | {"vectors": self.embedding}

    def collate(self, sentences: Sequence[list[str]]) -> Tensor:
        """Word indices (T, B), each sentence at the end of its column."""
        index = self.vocabulary.index
        backwards = [[index.get(word, index[word_vectors.UNK]) for word in words[::-1]] for words in sentences]
        return torch.from_numpy(pad_columns(backwards, index[word_vectors.PAD])[::-1].copy())

    def batches(self, examples: Sequence[Example]) -> FixedBatches[tuple[Tensor, Tensor]]:
        """Batches as tensors; they are the same in every epoch.

        Each of W processes takes its part of batches of W times the size, padded as for one process.
        """
        rank, processes = rank_and_world_size()
        size = self.batch_size * processes
        groups = [examples[i : i + size] for i in range(0, len(examples), size)]
        if len(groups) > 1 and len(groups[-1]) < processes:  # each process needs an example
            groups[-2:] = [[*groups[-2], *groups[-1]]]
        if len(groups[-1]) < processes:
            raise ValueError(
                f"{len(examples)} examples are too few for {processes} processes: type fewer trainer.devices"
            )
        return FixedBatches(
            [
                (
                    self.collate([words for words, _ in group])[:, rank::processes],
                    torch.tensor([label for _, label in group])[rank::processes],
                )
                for group in groups
            ]
        )

    def train_loader(self) -> FixedBatches[tuple[Tensor, Tensor]]:
        examples = self.splits["train"]
        return self.batches(random.Random(self.seed).sample(examples, len(examples)))

    def evaluation(self, split: str) -> FixedBatches[tuple[Tensor, Tensor]]:
        return self.batches(self.splits[split])

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        known = self.vocabulary
        return {"vocabulary": known.words, "labels": known.labels, "vector_size": known.vector_size}

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Vocabulary:
        return Vocabulary(state_dict["vocabulary"], state_dict["labels"], state_dict.get("vector_size"))


def split_examples(files: Mapping[str, list[Item]], fold: int) -> dict[str, list[Item]]:
    """Training, validation and test examples by the published rules (the paper's code; SRU 2018, section 4.1).

    {all}: shuffled; test is every item i with i mod 10 == fold, validation a random tenth of the rest.
    {train, test}: train shuffled; validation is every item i with i mod 10 == fold (TREC).
    {train, val, test}: as they are, fold 0 only (SST).

    ValueError if a split is empty.
    """
    generator = random.Random(SPLIT_SEED)
    if set(files) == {"train", "val", "test"}:
        if fold != 0:
            raise ValueError(f"data.fold={fold}: this corpus has one fixed split, so only data.fold=0 exists")
        return dict(files)
    source = "train" if set(files) == {"train", "test"} else "all"
    shuffled = generator.sample(files[source], len(files[source]))
    held_out = shuffled[fold::FOLDS]
    rest = [item for i, item in enumerate(shuffled) if i % FOLDS != fold]
    size, needed = len(rest) // FOLDS, FOLDS + 2
    if source == "train":
        splits, needed = {"train": rest, "val": held_out, "test": files["test"]}, max(2, fold + 1)
    else:
        rest = generator.sample(rest, len(rest))
        splits = {"train": rest[size:], "val": rest[:size], "test": held_out}
    if empty := next((split for split, own in splits.items() if not own), None):
        raise ValueError(
            f"the {empty} split is empty: there is a total of {len(files[source])}, and data.fold={fold} of {FOLDS} "
            f"needs {needed} examples. Add some, or type data=sentences data.train=FILE data.val=FILE data.test=FILE"
        )
    return splits


class PythonManual(SentenceClassification):
    """Sentences of Python's reference manual, labelled by topic (data/text/python_manual.py): no file, no download.

    The classes are the ten largest topics, in order of size. Split like the corpora without a fixed test set.
    """

    def __init__(self, *, cache: str, fold: int = 0, root: str = "", **options: Any) -> None:
        self.topics = manual_sentences()
        super().__init__(root=root, cache=cache, labels=list(self.topics), files={}, fold=fold, **options)

    def read(self) -> dict[str, list[Example]]:
        pairs = [(sentence, label) for label, sentences in enumerate(self.topics.values()) for sentence in sentences]
        return {"all": [(self.words_of(sentence), label) for sentence, label in pairs]}

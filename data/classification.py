"""Sentence classification: the six corpora of SRU (2018), Table 1, and one that is embedded in Python."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from data.batching import FixedBatches, rank_and_world_size
from data.download import fetch, find, read_bytes
from data.text import word_vectors
from data.text.lines import lines_of, refuse_nul, strip_byte_order_mark

SPLIT_SEED = 1234  # of the published folds; a run's own seed never moves an example to another split
FOLDS = 10

Example = tuple[list[str], int]
Item = TypeVar("Item")


class Vocabulary:
    """The words and labels that a network knows, in the order of their numbers; needs no corpus.

    vector_size: of its fixed word vectors, whose numbers a checkpoint has; None where words are learnt.
    """

    def __init__(self, words: Sequence[str], labels: Sequence[str], vector_size: int | None = None) -> None:
        self.words, self.labels, self.vector_size = list(words), list(labels), vector_size

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know, as the data's."""
        return {
            "vocab_size": len(self.words),
            "num_classes": len(self.labels),
            "vectors": None if self.vector_size is None else torch.zeros(len(self.words), self.vector_size),
            "pad": self.words.index(word_vectors.PAD),
        }


class SentenceClassification(pl.LightningDataModule):
    """Files of `label text` lines as fixed batches (SRU 2018, section 4.1 and its published code).

    A batch is (tokens (T, B) int64, labels (B,) int64), padded on the LEFT so that the last step is a real word.
    Training batches are made once, from the list shuffled by `seed`, and come in the same order in every epoch, as
    published; validation and test batches keep the order of the split.

    root: folder of the corpora, which may be read-only; files lie in root/sentcls and are downloaded when absent.
    cache: folder for what is derived from them.
    labels: names of the classes; a file's label is an index into them.
    files: {name, url, sha256, examples} for the keys `all` (10-fold cross-validation), `train` and `test` (a tenth of
        train is validation), or `train`, `val` and `test`.
    fold: 0 to 9, which tenth is the test set (or validation set, see `split_examples`).
    vectors: None (words are learnt), or fixed word vectors: see `text.load_vectors`.
    min_count: without vectors, training words seen less often become <unk>, which so gets trained.
    lowercase, clean: how the text is normalised; see `text.clean`.
    """

    MODEL_KWARGS = ("vocab_size", "num_classes", "vectors", "pad")  # the names in `model_kwargs`
    FIXED_BY_CHECKPOINT = ("vectors", "min_count", "lowercase")  # by a checkpoint

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
        self.folder = Path(root).expanduser() / "sentcls"
        self.vectors_folder = Path(root).expanduser() / "vectors"
        self.cache = Path(cache).expanduser()
        self.labels = list(labels)
        self.files = files
        self.fold = fold
        self.batch_size = batch_size
        self.seed = seed
        self.vectors = vectors
        self.min_count = min_count
        self.lowercase = lowercase
        self.clean = clean
        self.splits: dict[str, list[Example]] = {}
        self.embedding: Tensor | None = None
        self.checkpoint_vocabulary: Vocabulary | None = (
            None  # a checkpoint's, to read with; none is made of the corpus then
        )
        if batch_size < 1 or min_count < 1:
            raise ValueError(f"data.batch_size={batch_size} and data.min_count={min_count} must be 1 or more")

    def prepare_data(self) -> None:
        """Downloads what is absent, checks what is there, and keeps the word vectors that are needed in the cache."""
        for file in self.files.values():
            fetch(self.folder / file["name"], file["url"], file["sha256"])
        if self.vectors is not None and self.checkpoint_vocabulary is None:
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Reads the corpus and builds splits, vocabulary and vectors; a second call does nothing."""
        if self.splits:
            return
        splits = split_examples(self.read(), self.fold)
        if self.checkpoint_vocabulary is not None:
            if self.checkpoint_vocabulary.labels != self.labels:
                raise ValueError(
                    f"the labels of the data are {', '.join(self.labels)}, those of the checkpoint "
                    f"{', '.join(self.checkpoint_vocabulary.labels)}: name data with the same"
                )
            self.words = self.checkpoint_vocabulary.words
            self.index = {word: i for i, word in enumerate(self.words)}
            self.splits = splits
            return
        if len(classes := {label for _, label in splits["train"]}) < 2:
            raise ValueError(
                f"the train split has one label, {self.labels[classes.pop()]}, in all it has ({len(splits['train'])}): "
                "there is nothing to tell apart. Give it examples of another"
            )
        known = splits["train"] if self.vectors is None else [example for split in splits.values() for example in split]
        min_count = self.min_count if self.vectors is None else 1  # a fixed vector needs no examples to be trained on
        self.words = word_vectors.build_vocabulary((sentence for sentence, _ in known), min_count)
        self.index = {word: i for i, word in enumerate(self.words)}
        if self.vectors is not None:
            self.embedding = word_vectors.load_vectors(self.words, self.vectors, self.vectors_folder, self.cache)
        self.splits = splits

    def read(self) -> dict[str, list[Example]]:
        """The examples of each file, in the file's order."""
        return {key: self.read_file(self.folder / file["name"], file["examples"]) for key, file in self.files.items()}

    def read_file(self, path: Path, expected: int | None) -> list[Example]:
        """(words, label) of each line; ValueError with path and line number at the first that is not `label text`."""
        present = find(path) or path
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
            raise ValueError(f"{present} is empty: give it lines of `label text`, at least one for each split")
        if len(examples) != (expected or len(examples)):
            raise ValueError(
                f"{present} holds {len(examples)} examples, expected {expected}: not the published file. "
                "Put the right file there, or type another data.root=DIR to download it to."
            )
        return examples

    def lines_of(self, path: Path) -> Iterator[tuple[str, str, str]]:
        """The place of each line of a file, its label and its text."""
        present = find(path)
        if present is None:
            raise FileNotFoundError(f"{path} is missing: call prepare_data() first")
        content = self.decode(read_bytes(present), present)
        for number, line in enumerate(lines_of(content.rstrip("\r\n")), start=1):
            label, *sentence = re.split("[ \t]", line.strip(), maxsplit=1)
            yield f"{present}:{number}", label, "".join(sentence)

    def decode(self, content: bytes, name: Path) -> str:
        """The text of a published file: UTF-8, or latin-1, in which MR, SUBJ and TREC hold a few accents."""
        content = strip_byte_order_mark(content, name)
        refuse_nul(content, name)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")

    def number_of(self, label: str) -> int | None:
        """The class of a label as it is written in a file; None if there is none such."""
        return int(label) if re.fullmatch("[0-9]{1,9}", label) and int(label) < len(self.labels) else None

    @property
    def known_labels(self) -> str:
        return f"from 0 to {len(self.labels) - 1}"

    def words_of(self, sentence: str) -> list[str]:
        """The words of a sentence whose tokens are separated by spaces."""
        words = word_vectors.clean(sentence).split() if self.clean else []
        words = words or sentence.split() or [word_vectors.UNK]  # one that is all marks keeps them; CR has an empty one
        return [word.lower() for word in words] if self.lowercase else words

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: vocab_size, num_classes, vectors (V, n) or None, pad. Prepares the data first."""
        if not self.splits:
            self.prepare_data()
            self.setup()
        return {
            "vocab_size": len(self.words),
            "num_classes": len(self.labels),
            "vectors": self.embedding,
            "pad": self.index[word_vectors.PAD],
        }

    def collate(self, sentences: Sequence[list[str]]) -> Tensor:
        """Word indices (T, B), each sentence at the end of its column."""
        tokens = torch.full((max(map(len, sentences)), len(sentences)), self.index[word_vectors.PAD])
        unknown = self.index[word_vectors.UNK]
        for column, words in enumerate(sentences):
            if words:
                tokens[-len(words) :, column] = torch.tensor([self.index.get(word, unknown) for word in words])
        return tokens

    def loader(self, examples: Sequence[Example], *, train: bool = False) -> FixedBatches[tuple[Tensor, Tensor]]:
        """Batches that are tensors already: collating again in every epoch would cost more than it varies.

        W processes have parts of batches of W times the size, padded alike: what one process would have.
        """
        rank, processes = rank_and_world_size()
        size = self.batch_size * processes
        groups = [examples[i : i + size] for i in range(0, len(examples), size)]
        if len(groups) > 1 and len(groups[-1]) < processes:  # each process has an example
            groups[-2:] = [[*groups[-2], *groups[-1]]]
        if len(groups[-1]) < processes:
            raise ValueError(
                f"{len(examples)} examples are too few for {processes} processes: type fewer trainer.devices"
            )
        batches = [
            (
                self.collate([words for words, _ in group])[:, rank::processes],
                torch.tensor([y for _, y in group])[rank::processes],
            )
            for group in groups
        ]
        loader = FixedBatches(batches)
        if train and self.trainer is not None:
            loader.limit(self.trainer.limit_train_batches)
        return loader

    def train_dataloader(self) -> FixedBatches[tuple[Tensor, Tensor]]:
        examples = self.splits["train"]
        return self.loader(random.Random(self.seed).sample(examples, len(examples)), train=True)

    def val_dataloader(self) -> FixedBatches[tuple[Tensor, Tensor]]:
        return self.evaluation("val")

    def test_dataloader(self) -> FixedBatches[tuple[Tensor, Tensor]]:
        return self.evaluation("test")

    def evaluation(self, split: str) -> FixedBatches[tuple[Tensor, Tensor]]:
        return self.loader(self.splits[split])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read its own outputs: the words in the order of their index, and the labels."""
        self.model_kwargs  # noqa: B018  prepares
        size = None if self.embedding is None else self.embedding.shape[1]
        return {"vocabulary": self.words, "labels": self.labels, "vector_size": size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on another vocabulary or other labels."""
        for name, now in (("vocabulary", self.state_dict()["vocabulary"]), ("labels", self.labels)):
            then = state_dict[name]
            if now != then:
                place = next((i for i, pair in enumerate(zip(now, then, strict=False)) if pair[0] != pair[1]), None)
                where = "" if place is None else f"; number {place} was {then[place]!r} and is {now[place]!r}"
                raise ValueError(
                    f"the checkpoint's {name} has {len(then)} entries, the data's {len(now)}{where}: the corpus or its "
                    "options have changed. Use the options of the checkpoint's run (data=, data.fold, data.vectors, "
                    "data.min_count), or train again."
                )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Vocabulary:
        """The vocabulary in a `state_dict`."""
        return Vocabulary(state_dict["vocabulary"], state_dict["labels"], state_dict.get("vector_size"))


def split_examples(files: Mapping[str, list[Item]], fold: int) -> dict[str, list[Item]]:
    """Training, validation and test examples by the published rules (papers' code; SRU 2018, section 4.1).

    {all}: shuffled; test is every item i with i mod 10 == fold, validation a random tenth of the rest.
    {train, test}: train shuffled; validation is every item i with i mod 10 == fold (TREC).
    {train, val, test}: as they are, fold 0 only (SST).

    ValueError where a split would be empty.
    """
    if fold not in range(FOLDS):
        raise ValueError(f"data.fold={fold} is not one of 0 to {FOLDS - 1}")
    generator = random.Random(SPLIT_SEED)
    if set(files) == {"train", "val", "test"}:
        if fold != 0:
            raise ValueError(f"data.fold={fold}: this corpus has one given split, so only data.fold=0 exists")
        return dict(files)
    source = "train" if set(files) == {"train", "test"} else "all"
    if source not in files:
        raise ValueError(
            f"data.files has the keys {sorted(files)}: expected all, or train and test, or train, val and test"
        )
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
            f"takes {needed} examples. Add some, or type data=sentences data.train=FILE data.val=FILE data.test=FILE"
        )
    return splits


class PythonManual(SentenceClassification):
    """Sentences of Python's reference manual, labelled by their topic: no file, no download.

    The text is `pydoc_data.topics`, which every Python carries; it differs a little between Python versions, and the
    numbers reached on it with it. The classes are the ten largest topics, in order of size, leaving out a topic whose
    text is mostly part of a larger one. Split as the corpora that have no given test set.
    """

    def __init__(self, *, cache: str, fold: int = 0, root: str = "", **options: Any) -> None:
        topics = manual_sentences()
        self.topics = topics
        super().__init__(root=root, cache=cache, labels=list(topics), files={}, fold=fold, **options)

    def read(self) -> dict[str, list[Example]]:
        pairs = [(s, label) for label, sentences in enumerate(self.topics.values()) for s in sentences]
        return {"all": [(self.words_of(sentence), label) for sentence, label in pairs]}


def manual_sentences(classes: int = 10, min_words: int = 4) -> dict[str, list[str]]:
    """Tokenised sentences of each of the largest topics, no sentence twice; code, headings and fragments left out."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    chosen: dict[str, list[str]] = {}
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        sentences: dict[str, None] = {}
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            # Code, grammar and headings do not begin with a capital and end with a stop, as sentences do.
            running = re.sub(r"^[*\s]+|[*\"“”]|\[\d+\]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", running):
                words = word_vectors.tokenise(sentence)
                if len(words) > min_words and re.match(r"[A-Z].*[a-z)][.!?:]$", sentence) and ">>>" not in sentence:
                    sentences[" ".join(words)] = None
        fresh = [sentence for sentence in sentences if sentence not in seen]
        if 2 * len(fresh) > len(sentences):
            chosen[topic] = fresh
            seen.update(fresh)
        if len(chosen) == classes:
            break
    return chosen

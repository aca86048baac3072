"""Question answering on files in SQuAD's format (SRU 2018, section 4.2)."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data import download
from data.base import DataModule
from data.batching import Batches
from data.text import squad_tables, word_vectors
from data.text.spacy_tagger import Tagger
from data.text.squad_features import Batch, Reader, View, Window
from data.text.squad_tables import Reading

log = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "tests/samples"


class QuestionAnswering(DataModule[Batches]):
    """Files in SQuAD's format as `Batch`es.

    root: folder of the corpora, may be read-only; the files lie in root/squad.
    cache: folder for prepared data, shared by all runs.
    train, val, test: names of files in root/squad, or paths; plain, .gz, .xz or .zip.
    files: {url, sha256 or md5} or {hub, questions: the published number} of files that are downloaded if absent.
    tagger: spacy, or none, without the features lemma, part of speech and named entity.
    spacy_model: the name of a pipeline, or its folder.
    vectors: None (trained), or fixed word vectors: see `word_vectors.load_vectors`. They are not normalised.
    lowercase: the vocabulary ignores case.
    min_count: without vectors, training words with fewer occurrences become <unk>, which is thereby trained.
    window: see Reader. All passages of SQuAD 1.1 are shorter than 1000 tokens.
    """

    MODEL_KWARGS = ("vocab_size", "num_features", "vectors")
    FIXED_BY_CHECKPOINT = ("tagger", "spacy_model", "vectors", "lowercase", "min_count", "window")
    SPLIT_OPTIONS = ("train", "val", "test")

    def __init__(
        self,
        *,
        root: str,
        cache: str,
        train: str,
        val: str,
        test: str,
        files: Mapping[str, Mapping[str, Any]] | None = None,
        tagger: str = "none",
        spacy_model: str = "en_core_web_sm",
        vectors: str | None = None,
        lowercase: bool = True,
        min_count: int = 2,
        window: int = 1000,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.root, self.cache = Path(root).expanduser(), Path(cache).expanduser()
        self.names = {"train": train, "val": val, "test": test}
        self.files = dict(files or {})
        for split, name in self.names.items():
            if not name:
                raise ValueError(f"data.{split}={name} must name a file in SQuAD's format: type data.{split}=FILE.json")
        if tagger not in ("spacy", "none"):
            raise ValueError(f"data.tagger={tagger} must be spacy or none")
        if tagger == "spacy" and (not isinstance(spacy_model, str) or not spacy_model):
            raise ValueError(
                f"data.spacy_model={spacy_model} must name a pipeline, such as en_core_web_sm, or its folder"
            )
        self.spacy_model = spacy_model if tagger == "spacy" else None
        self.vectors, self.lowercase, self.min_count, self.window = vectors, lowercase, min_count, window
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.embedding: Tensor | None = None

    def load(self) -> None:
        """Prepares each file once; `splits` are `View`s."""
        tagger = None if self.spacy_model is None else Tagger(self.spacy_model)
        if self.checkpoint_vocabulary is not None:
            self.checkpoint_vocabulary.check(tagger)
        paths = {split: self.locate(split) for split in self.names}
        readings = {path: squad_tables.prepare(path, self.cache, tagger) for path in dict.fromkeys(paths.values())}
        for path, reading in readings.items():
            for line in report_lines(path, reading.report):
                log.info(line)
        self.vocabulary = self.checkpoint_vocabulary or self.build_reader(
            readings[paths["train"]], [*readings.values()], tagger
        )
        for split, path in paths.items():
            expected = self.files.get(self.names[split], {}).get("questions")
            count = len(readings[path])
            if not count or count != (expected or count):
                raise ValueError(
                    f"data.{split}={self.names[split]} ({path}) has {count:,} questions, expected "
                    f"{f'{expected:,}' if expected else '1 or more'}: type data.{split}=FILE for another file"
                )
        views = {path: View(self.vocabulary, reading) for path, reading in readings.items()}
        if self.checkpoint_vocabulary is None and not views[paths["train"]].training_windows():
            raise ValueError(f"data.train={self.names['train']} has no question with an answer to learn from")
        self.splits = {split: views[path] for split, path in paths.items()}

    def build_reader(self, train: Reading, readings: list[Reading], tagger: Tagger | None) -> Reader:
        """The reader for the words and tags of these texts; sets `embedding` to their vectors."""
        if self.vectors is None:
            words = vocabulary(train, [train], self.lowercase, self.min_count)
        else:
            words, folder = vocabulary(train, readings, self.lowercase, 1), self.root / "vectors"
            self.embedding = word_vectors.load_vectors(words, self.vectors, folder, self.cache, unit_length=False)
        return Reader(
            words=words,
            lowercase=self.lowercase,
            tags=sorted(train.tags),
            entities=sorted(set(train.entities) - {""}),
            spacy_model=self.spacy_model,
            identity=None if tagger is None else tagger.identity,
            window=self.window,
            vector_size=None if self.embedding is None else self.embedding.shape[1],
        )

    def locate(self, split: str) -> Path:
        """The file of a split; downloaded if it is absent and in `files`."""
        name = self.names[split]
        if name in self.files:
            return download.fetch_source(self.root / "squad" / name, self.files[name], squad_of)
        known = f", or one of {', '.join(self.files)}, which are downloaded" if self.files else ""
        advice = f"type the path of a file in SQuAD's format{known}"
        return download.find_below(self.root / "squad", split, name, advice, download.find)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return super().model_kwargs | {"vectors": self.embedding}

    def train_loader(self) -> Batches[Batch]:
        view = self.splits["train"]
        return self.batches(view, view.training_windows(), self.batch_size, self.seed)

    def evaluation(self, split: str) -> Batches[Batch]:
        view = self.splits[split]
        windows = [window for i in range(len(view.reading)) for window in view.windows(i)]
        return self.batches(view, windows, self.eval_batch_size)

    def batches(self, view: View, windows: list[Window], batch_size: int, seed: int | None = None) -> Batches[Batch]:
        sizes = [end - begin for _, begin, end in windows]
        return Batches(view.batch, windows, sizes, batch_size=batch_size, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        self.setup()
        return self.vocabulary.options | {"files": {split: view.reading.key for split, view in self.splits.items()}}

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Reader:
        return Reader(**{name: value for name, value in state_dict.items() if name != "files"})


class Sample(QuestionAnswering):
    """The bundled texts in tests/samples, written for this project: no download."""

    def __init__(self, *, root: str = "", **options: Any) -> None:
        train, dev = (str(SAMPLES / f"squad-sample-{part}.json") for part in ("train", "dev"))
        super().__init__(root=root, train=train, val=dev, test=dev, **options)


def vocabulary(train: Reading, readings: Sequence[Reading], lowercase: bool, min_count: int) -> list[str]:
    """<pad>, <unk>, then the words, by their number in training questions, then by their number in all texts."""
    in_questions: Counter[str] = Counter()
    everywhere: Counter[str] = Counter()
    for reading in readings:
        for table in (reading.passages, reading.questions):
            counts = np.bincount(table["words"].values, minlength=len(reading.forms))
            for number in np.flatnonzero(counts):
                word = reading.forms[number].lower() if lowercase else reading.forms[number]
                everywhere[word] += int(counts[number])
                if reading is train and table is reading.questions:
                    in_questions[word] += int(counts[number])
    words = [word for word, count in everywhere.items() if count >= min_count]
    return [
        word_vectors.PAD,
        word_vectors.UNK,
        *sorted(words, key=lambda word: (-in_questions[word], -everywhere[word], word)),
    ]


def report_lines(path: Path, report: Mapping[str, Any]) -> Iterator[str]:
    """The size and the faults of a file, for the log."""
    counts = {
        "unmatched": "with an answer that does not consist of whole tokens: tested, but not trained on",
        "unanswered": "without an answer: not trained on, and wrong in a test",
        "empty_questions": "without a word",
        "empty_passages": "passages without a word",
    }
    faults = [f"{report[name]:,} {meaning}" for name, meaning in counts.items() if report[name]]
    yield f"{path.name}: {report['questions']:,} questions on {report['passages']:,} passages" + (
        f" ({'; '.join(faults)})" if faults else ""
    )
    if report["misplaced"]:
        yield f"{path.name}: {report['misplaced']:,} answers are not at their answer_start, for example:"
        yield from (f"    {example}" for example in report["misplaced_examples"])


def squad_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The rows of rajpurkar/squad on the hub in the format of the official file."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        pairs = zip(row["answers"]["answer_start"], row["answers"]["text"], strict=True)
        answers = [{"answer_start": start, "text": answer} for start, answer in pairs]
        question = {"answers": answers, "question": row["question"], "id": row["id"]}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(question)
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    yield json.dumps({"data": data, "version": "1.1"}, ensure_ascii=False).encode()

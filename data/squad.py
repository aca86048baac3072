"""Question answering on files in SQuAD's format (SRU 2018, section 4.2)."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from data import download
from data.batching import Batches
from data.text import squad_tables, word_vectors
from data.text.spacy_tagger import Tagger
from data.text.squad_features import Batch, Reader, View, Window
from data.text.squad_tables import Reading

log = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent.parent / "tests/samples"


class QuestionAnswering(pl.LightningDataModule):
    """Files in SQuAD's format as `Batch`es.

    root: folder of the corpora, which may be read-only; the files lie in root/squad.
    cache: folder for what is prepared from them, once for all runs.
    train, val, test: names of files in root/squad, or paths; plain, .gz, .xz or .zip.
    files: {url, sha256 or md5} or {hub, questions: the published count} of the names that are downloaded when absent.
    tagger: spacy, or none, which leaves out the features that it would give: lemmas, parts of speech, kinds of names.
    spacy_model: the pipeline's name, or its folder.
    vectors: None (words are learnt), or word vectors: see `text.load_vectors`. Their length is left as it is.
    lowercase: the vocabulary has one word for Word and word.
    min_count: without vectors, training words seen less often become <unk>, which so gets trained.
    window: see Reader. SQuAD 1.1 has no passage of 1000 tokens.
    """

    MODEL_KWARGS = ("vocab_size", "num_features", "vectors")  # the names in `model_kwargs`
    FIXED_BY_CHECKPOINT = ("tagger", "spacy_model", "vectors", "lowercase", "min_count", "window")  # by a checkpoint

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
        if not isinstance(lowercase, bool):
            raise ValueError(f"data.lowercase={lowercase} must be true or false")
        if tagger == "spacy" and (not isinstance(spacy_model, str) or not spacy_model):
            raise ValueError(
                f"data.spacy_model={spacy_model} must name a pipeline, such as en_core_web_sm, or its folder"
            )
        for name, value in {"window": window, "batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"data.{name}={value} must be a whole number, 1 or more")
        self.spacy_model = spacy_model if tagger == "spacy" else None
        self.vectors, self.lowercase, self.min_count, self.window = vectors, lowercase, min_count, window
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.checkpoint_vocabulary: Reader | None = (
            None  # a checkpoint's, to read with; none is made of the corpus then
        )
        self.views: dict[str, View] = {}
        self.keys: dict[str, str] = {}
        self.embedding: Tensor | None = None

    def prepare_data(self) -> None:
        """Downloads and checks what is absent, and prepares it in the cache; done once for all runs."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens what is prepared, and prepares it where it is not; a second call does nothing."""
        if self.views:
            return
        tagger = None if self.spacy_model is None else Tagger(self.spacy_model)
        if self.checkpoint_vocabulary is not None:
            self.checkpoint_vocabulary.check(tagger)
        paths = {split: self.locate(split) for split in self.names}
        readings = {path: squad_tables.prepare(path, self.cache, tagger) for path in dict.fromkeys(paths.values())}
        for path, found in readings.items():
            for line in complaints(path, found.report):
                log.info(line)
        self.reader = self.checkpoint_vocabulary or self.build_reader(
            readings[paths["train"]], [*readings.values()], tagger
        )
        views = {path: View(self.reader, found) for path, found in readings.items()}
        self.keys = {split: readings[path].key for split, path in paths.items()}
        self.views = {split: views[path] for split, path in paths.items()}
        for split, path in paths.items():
            expected = self.files.get(self.names[split], {}).get("questions")
            count = len(readings[path])
            if not count or count != (expected or count):
                raise ValueError(
                    f"data.{split}={self.names[split]} ({path}) has {count:,} questions, expected "
                    f"{f'{expected:,}' if expected else '1 or more'}: type data.{split}=FILE for another file"
                )
        if self.checkpoint_vocabulary is None and not self.training_windows():
            raise ValueError(f"data.train={self.names['train']} has no question with an answer to learn from")

    def build_reader(self, train: Reading, all_splits: list[Reading], tagger: Tagger | None) -> Reader:
        """The reader of the words and tags of these texts; sets `embedding` where they have vectors."""
        known = [train] if self.vectors is None else all_splits
        words = vocabulary(train, known, self.lowercase, self.min_count if self.vectors is None else 1)
        if self.vectors is not None:
            folder = self.root / "vectors"
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
        """The file of a split; downloaded if absent and known where from."""
        name = self.names[split]
        path = self.root / "squad" / Path(name).expanduser()
        if name in self.files:
            source = self.files[name]
            if "hub" in source:
                return download.find(path) or download.fetch_from_hub(path, source["hub"], squad_of)
            return download.fetch(path, source["url"], source.get("sha256") or source.get("md5"))
        for candidate in (path, Path(name).expanduser()):
            if (found := download.find(candidate)) is not None:
                return found
        raise FileNotFoundError(
            f"data.{split}={name} is no file, neither in {self.root / 'squad'} nor here; type the path of a file in "
            f"SQuAD's format{', or one of ' + ', '.join(self.files) + ', which are downloaded' if self.files else ''}"
        )

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What a network must know: vocab_size, num_features, vectors (V, n) or None. Prepares the data first."""
        self.setup()
        return self.reader.model_kwargs | {"vectors": self.embedding}

    def training_windows(self) -> list[Window]:
        view = self.views["train"]
        return [window for i in range(len(view.reading)) if (window := view.training_window(i)) is not None]

    def train_dataloader(self) -> Batches[Batch]:
        batches = self.batches(self.views["train"], self.training_windows(), self.batch_size, self.seed)
        if self.trainer is not None:
            batches.limit(self.trainer.limit_train_batches)
        return batches

    def val_dataloader(self) -> Batches[Batch]:
        return self.evaluation("val")

    def test_dataloader(self) -> Batches[Batch]:
        return self.evaluation("test")

    def evaluation(self, split: str) -> Batches[Batch]:
        view = self.views[split]
        windows = [window for i in range(len(view.reading)) for window in view.windows(i)]
        return self.batches(view, windows, self.eval_batch_size)

    def batches(self, view: View, windows: list[Window], batch_size: int, seed: int | None = None) -> Batches[Batch]:
        sizes = [end - begin for _, begin, end in windows]
        return Batches(view.batch, windows, sizes, batch_size=batch_size, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read texts, and to know the files that it was trained on."""
        self.setup()
        return self.reader.options | {"files": self.keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the checkpoint was trained on other files, or read them otherwise."""
        now = self.state_dict()
        if changed := [name for name in now if now[name] != state_dict.get(name)]:
            raise ValueError(
                f"the checkpoint was trained on other data: {', '.join(changed)} differ"
                f" ({len(state_dict.get('words', []))} words then, {len(now['words'])} now). Use the files and options "
                "of the checkpoint's run (data.train, .val, .test, .tagger, .spacy_model, .vectors, .lowercase, "
                ".min_count, .window), or train again."
            )

    @staticmethod
    def vocabulary_of(state_dict: dict[str, Any]) -> Reader:
        """The reader in a `state_dict`."""
        return Reader(**{name: value for name, value in state_dict.items() if name != "files"})


class Sample(QuestionAnswering):
    """The texts in tests/samples, written for this project: no download."""

    def __init__(self, *, root: str = "", **options: Any) -> None:
        train, dev = (str(SAMPLES / f"squad-sample-{part}.json") for part in ("train", "dev"))
        super().__init__(root=root, train=train, val=dev, test=dev, **options)


def vocabulary(train: Reading, known: Sequence[Reading], lowercase: bool, min_count: int) -> list[str]:
    """<pad>, <unk>, then words by how often training's questions have them, and then by how often any text does."""
    in_questions: Counter[str] = Counter()
    everywhere: Counter[str] = Counter()
    for found in dict.fromkeys([train, *known]):
        for table in (found.passages, found.questions):
            counts = np.bincount(table["words"].values, minlength=len(found.forms))
            for number in np.flatnonzero(counts):
                word = found.forms[number].lower() if lowercase else found.forms[number]
                everywhere[word] += int(counts[number])
                if found is train and table is found.questions:
                    in_questions[word] += int(counts[number])
    words = [word for word, count in everywhere.items() if count >= min_count]
    return [
        word_vectors.PAD,
        word_vectors.UNK,
        *sorted(words, key=lambda word: (-in_questions[word], -everywhere[word], word)),
    ]


def complaints(path: Path, report: Mapping[str, Any]) -> Iterator[str]:
    """What to tell of a file."""
    counts = {
        "unmatched": "whose answer is no run of whole tokens: not trained on, but tested",
        "unanswered": "without an answer: not trained on, and wrong in a test",
        "empty_questions": "without a word",
        "empty_passages": "passages without a word",
    }
    faults = [f"{report[name]:,} {meaning}" for name, meaning in counts.items() if report[name]]
    yield f"{path.name}: {report['questions']:,} questions on {report['passages']:,} passages" + (
        f" ({'; '.join(faults)})" if faults else ""
    )
    if report["misplaced"]:
        yield f"{path.name}: {report['misplaced']:,} answers do not stand where answer_start says, for example:"
        yield from (f"    {example}" for example in report["misplaced_examples"])


def squad_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The rows of rajpurkar/squad on the hub as the official file has them."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        answers = row["answers"]
        pairs = zip(answers["answer_start"], answers["text"], strict=True)
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(
            {
                "answers": [{"answer_start": start, "text": answer} for start, answer in pairs],
                "question": row["question"],
                "id": row["id"],
            }
        )
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    yield json.dumps({"data": data, "version": "1.1"}, ensure_ascii=False).encode()

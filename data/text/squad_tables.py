"""Passages and questions of a SQuAD file as Arrow tables in a memory map, prepared once."""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.cache import checksum, open_or_build
from data.download import read_bytes
from data.text.spacy_tagger import Tagger

FORMAT = 1  # version of the prepared folder; increase it when its content changes
EXAMPLES = 5  # of misplaced answers in the log
TABLES = ("passages", "questions")
FILES = (*(f"{name}.arrow" for name in TABLES), "meta.json")

# Chinese and Japanese have no spaces: each character is a token.
SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(
    rf"""[^\W{SIGNS}]+?(?=n't\b) | n't\b | '(?:s|ve|re|d|ll|m)\b  # did n't, it 's
    | (?:[^\W\d_]\.){{2,}}                                       # U.S.
    | \d+(?:[.,]\d+)*(?!\w)                                      # 1,250 or 3.5
    | [{SIGNS}] | [^\W{SIGNS}]+ | [^\w\s]""",
    re.VERBOSE | re.IGNORECASE,
)


def spans_of(text: str) -> list[tuple[int, int]]:
    """(start, end) of each token in characters: words, numbers, marks. Hyphens separate words, as in some answers."""
    return [match.span() for match in TOKEN.finditer(text.replace("’", "'"))]


class Lists:
    """A column of lists; rows are views of one array."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = column.offsets.to_numpy()
        self.values = column.values.to_numpy()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)


class Reading:
    """The columns of passages and questions, read-only.

    forms: all words and lemmas; `words` and `lemmas` below are indices into it.
    passages: text; words, starts, ends and frequencies (share of the passage, ignoring case) of its tokens; with a
        tagger lemmas, tags and entities, the latter two as indices into `tags` and `entities`.
    questions: id, passage, text, words, lemmas, answers (texts), first and last (tokens of the first answer that
        consists of whole tokens; -1 if there is none).
    report: numbers of passages, of questions, and of faults.
    key: identifies the file's content and how it was read.
    """

    def __init__(self, passages: pa.Table, questions: pa.Table, meta: dict[str, Any], key: str = "") -> None:
        self.key = key
        self.passages, self.questions = (
            {name: as_array(table.column(name)) for name in table.column_names} for table in (passages, questions)
        )
        self.forms: list[str] = meta["forms"]
        self.tags: list[str] = meta["tags"]
        self.entities: list[str] = meta["entities"]
        self.report: dict[str, Any] = meta["report"]

    def __len__(self) -> int:
        return len(self.questions["id"])


def as_array(column: pa.ChunkedArray) -> Any:
    """Numbers as a numpy array, lists of numbers as Lists, texts as an Arrow array."""
    chunk = column.chunk(0) if column.num_chunks else column.combine_chunks()  # an empty table has no chunk
    if pa.types.is_list(chunk.type) and not pa.types.is_string(chunk.type.value_type):
        return Lists(chunk)
    return chunk.to_numpy() if pa.types.is_primitive(chunk.type) else chunk


def prepare(path: Path, cache: Path, tagger: Tagger | None) -> Reading:
    """The content of a file, plain or packed, from the cache, or read, tokenised and tagged."""
    content = read_bytes(path)
    identity = [FORMAT, TOKEN.pattern, hashlib.sha256(content).hexdigest(), tagger and tagger.identity]
    place = cache / "squad" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    def write(folder: Path) -> None:
        tables, meta = build(paragraphs_of(content, path.name), tagger, path.name)
        folder.mkdir()
        for name, table in zip(TABLES, tables, strict=True):
            # The format of the datasets library: datasets.Dataset.from_file opens it too.
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        (folder / "checksums.json").write_text(json.dumps({name: checksum(folder / name) for name in FILES}))

    return open_or_build(place, open_prepared, write)


def open_prepared(place: Path) -> Reading | None:
    """The content of a prepared folder; None if it is absent or damaged."""
    try:
        if {name: checksum(place / name) for name in FILES} != json.loads((place / "checksums.json").read_bytes()):
            return None
        meta = json.loads((place / "meta.json").read_bytes())
        passages, questions = (
            pa.ipc.open_stream(pa.memory_map(str(place / f"{name}.arrow"))).read_all() for name in TABLES
        )
        return Reading(passages, questions, meta, place.name)
    except (OSError, ValueError):
        return None


def paragraphs_of(content: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The paragraphs of a file in SQuAD's format; ValueError with the place of the first deviation."""
    try:
        node = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}); expected a file like SQuAD's train-v1.1.json") from error
    for i, article in enumerate(require(node, "data", list, name)):
        for j, paragraph in enumerate(require(article, "paragraphs", list, f"{name}: data[{i}]")):
            place = f"{name}: data[{i}].paragraphs[{j}]"
            require(paragraph, "context", str, place)
            for k, question in enumerate(require(paragraph, "qas", list, place)):
                where = f"{place}.qas[{k}]"
                require(question, "id", str, where)
                require(question, "question", str, where)
                for n, answer in enumerate(require(question, "answers", list, where)):
                    require(answer, "text", str, f"{where}.answers[{n}]")
                    require(answer, "answer_start", int, f"{where}.answers[{n}]")
            yield paragraph


def require(node: Any, key: str, kind: type, place: str) -> Any:
    """node[key], if it has this type."""
    if not isinstance(node, dict) or type(node.get(key)) is not kind:
        found = f"{node[key]!r:.60}" if isinstance(node, dict) and key in node else "none"
        keys = f" among {sorted(node)}" if isinstance(node, dict) else f": not an object, but {node!r:.60}"
        kind_name = {str: "text", int: "whole number", list: "list"}[kind]
        raise ValueError(f"{place}: {key!r} must be a {kind_name}, found {found}{keys}")
    if kind is str:
        check_text(node[key], f"{place}: {key!r}")
    return node[key]


def check_text(text: str, name: str) -> None:
    """ValueError for half a surrogate pair, which JSON and a command line can contain, but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} contains an unpaired surrogate, {text[error.start]!r} at {error.start}: take it out"
        ) from error


class Columns:
    """Columns of lists of numbers, built row by row."""

    def __init__(self, **types: str) -> None:
        self.values = {name: array(type_) for name, type_ in types.items()}
        self.offsets = {name: array("i", [0]) for name in types}

    def add(self, **lists: Sequence[Any]) -> None:
        for name, numbers in lists.items():
            self.values[name].extend(numbers)
            self.offsets[name].append(len(self.values[name]))

    def tables(self) -> dict[str, pa.ListArray]:
        return {
            name: pa.ListArray.from_arrays(
                np.frombuffer(self.offsets[name], np.int32), pa.array(np.frombuffer(values, values.typecode))
            )
            for name, values in self.values.items()
        }


class Numbering(dict[str, int]):
    """Numbers texts in the order of their first look-up."""

    def __missing__(self, key: str) -> int:
        self[key] = len(self)
        return self[key]


def build(
    paragraphs: Iterator[dict[str, Any]] | list[dict[str, Any]], tagger: Tagger | None, name: str = "text"
) -> tuple[tuple[pa.Table, pa.Table], dict[str, Any]]:
    """Tables of passages and of questions, and the `meta` of `Reading`; ValueError for a duplicate id."""
    forms, tags, entities = Numbering(), Numbering(), Numbering()
    passages = Columns(words="i", starts="i", ends="i", frequencies="f")
    questions = Columns(words="i")
    texts: list[str] = []
    rows: dict[str, list[Any]] = {key: [] for key in ("id", "passage", "text", "answers", "first", "last")}
    misplaced: list[str] = []
    unmatched: list[str] = []
    places: dict[str, str] = {}

    def words_of(text: str, spans: list[tuple[int, int]]) -> list[int]:
        plain = text.replace("’", "'")
        return [forms[plain[start:end]] for start, end in spans]

    for paragraph in paragraphs:
        text = paragraph["context"]
        spans = spans_of(text)
        words = words_of(text, spans)
        lower = [text[start:end].lower() for start, end in spans]
        counts = Counter(lower)
        passages.add(
            words=words,
            starts=[start for start, _ in spans],
            ends=[end for _, end in spans],
            frequencies=[counts[word] / len(lower) for word in lower],
        )
        first_at = {start: i for i, (start, _) in enumerate(spans)}
        last_at = {end: i for i, (_, end) in enumerate(spans)}
        for question in paragraph["qas"]:
            id_ = question["id"]
            if id_ in places:
                raise ValueError(
                    f"{name}: two questions have the id {id_!r}, {places[id_]!r:.60} and {question['question']!r:.60}; "
                    "predictions are matched by id: give each question its own"
                )
            places[id_] = question["question"]
            questions.add(words=words_of(question["question"], spans_of(question["question"])))
            span = None
            for answer in question["answers"]:
                start, wanted = answer["answer_start"], answer["text"]
                if start < 0 or text[start : start + len(wanted)] != wanted:
                    there = text[start : start + len(wanted)] if 0 <= start < len(text) else ""
                    misplaced.append(f"{id_}: {wanted!r:.40} at {start}, where the passage has {there!r:.40}")
                    continue
                start += len(wanted) - len(wanted.lstrip())
                end = start + len(wanted.strip())
                if span is None and start in first_at and end in last_at and start < end:
                    span = first_at[start], last_at[end]
            if span is None and question["answers"]:
                unmatched.append(id_)
            rows["id"].append(id_)
            rows["passage"].append(len(texts))
            rows["text"].append(question["question"])
            rows["answers"].append([answer["text"] for answer in question["answers"]])
            rows["first"].append(-1 if span is None else span[0])
            rows["last"].append(-1 if span is None else span[1])
        texts.append(text)
    columns = passages.tables(), questions.tables()
    if tagger is not None:
        written = list(forms)
        for lists, wanted in zip(columns, (("lemmas", "tags", "entities"), ("lemmas",)), strict=True):
            more = Columns(**dict.fromkeys(wanted, "i"))
            numberings = {"lemmas": forms, "tags": tags, "entities": entities}
            words_of_texts = [[written[number] for number in row.as_py()] for row in lists["words"]]
            for annotation in tagger.annotate(words_of_texts):
                more.add(**{key: [numberings[key][value] for value in annotation[key]] for key in wanted})
            lists.update(more.tables())
    types = {"passage": pa.int32(), "first": pa.int32(), "last": pa.int32(), "answers": pa.list_(pa.string())}
    meta = {
        "forms": list(forms),
        "tags": list(tags),
        "entities": list(entities),
        "report": {
            "passages": len(texts),
            "questions": len(rows["id"]),
            "unanswered": sum(not answers for answers in rows["answers"]),
            "unmatched": len(unmatched),
            "misplaced": len(misplaced),
            "misplaced_examples": misplaced[:EXAMPLES],
            "empty_passages": sum(not text.strip() for text in texts),
            "empty_questions": sum(not text.strip() for text in rows["text"]),
        },
    }
    return (
        pa.table({"text": pa.array(texts, pa.string()), **columns[0]}),
        pa.table({**{key: pa.array(row, types.get(key, pa.string())) for key, row in rows.items()}, **columns[1]}),
    ), meta

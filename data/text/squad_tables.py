"""Passages and questions of a SQuAD file as Arrow tables in a memory map, prepared once."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.cache import prepare_folder
from data.download import read_bytes
from data.text.columns import Numbering, Ragged
from data.text.spacy_tagger import Tagger

FORMAT = 1  # version of the prepared folder; increase it when its content changes
EXAMPLES = 5  # of misplaced answers in the log
TABLES = ("passages", "questions")
TYPES = {  # of their columns; the others are texts
    **dict.fromkeys(("words", "lemmas", "tags", "entities", "starts", "ends"), pa.list_(pa.int32())),
    **dict.fromkeys(("passage", "first", "last"), pa.int32()),
    "frequencies": pa.list_(pa.float32()),
    "answers": pa.list_(pa.string()),
}

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
    """Numbers as a numpy array, lists of numbers as Ragged, texts as an Arrow array."""
    chunk = column.chunk(0) if column.num_chunks else column.combine_chunks()  # an empty table has no chunk
    if pa.types.is_list(chunk.type) and not pa.types.is_string(chunk.type.value_type):
        return Ragged(chunk.values.to_numpy(), chunk.offsets.to_numpy())
    return chunk.to_numpy() if pa.types.is_primitive(chunk.type) else chunk


def prepare(path: Path, cache: Path, tagger: Tagger | None) -> Reading:
    """The content of a file, plain or packed, from the cache, or read, tokenised and tagged."""
    content = read_bytes(path)
    identity = [FORMAT, TOKEN.pattern, hashlib.sha256(content).hexdigest(), tagger and tagger.identity]

    def write(folder: Path) -> None:
        tables, meta = build(paragraphs_of(content, path.name), tagger, path.name)
        for name, table in zip(TABLES, tables, strict=True):
            # The format of the datasets library: datasets.Dataset.from_file opens it too.
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")

    place = prepare_folder(cache / "squad" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24], write)
    passages, questions = (
        pa.ipc.open_stream(pa.memory_map(str(place / f"{name}.arrow"))).read_all() for name in TABLES
    )
    return Reading(passages, questions, json.loads((place / "meta.json").read_bytes()), place.name)


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


def build(
    paragraphs: Iterable[dict[str, Any]], tagger: Tagger | None, name: str = "text"
) -> tuple[tuple[pa.Table, pa.Table], dict[str, Any]]:
    """Tables of passages and of questions, and the `meta` of `Reading`; ValueError for a duplicate id."""
    numberings = {"lemmas": Numbering(), "tags": Numbering(), "entities": Numbering()}
    forms = numberings["lemmas"]
    passages: dict[str, list[Any]] = {key: [] for key in ("text", "words", "starts", "ends", "frequencies")}
    questions: dict[str, list[Any]] = {
        key: [] for key in ("id", "passage", "text", "answers", "first", "last", "words")
    }
    misplaced: list[str] = []
    unmatched = 0
    asked: dict[str, str] = {}  # by id

    def words_of(text: str, spans: list[tuple[int, int]]) -> np.ndarray:
        plain = text.replace("’", "'")
        return np.array([forms[plain[start:end]] for start, end in spans], np.int32)

    for paragraph in paragraphs:
        text = paragraph["context"]
        spans = spans_of(text)
        lower = [text[start:end].lower() for start, end in spans]
        counts = Counter(lower)
        first_at = {start: i for i, (start, _) in enumerate(spans)}
        last_at = {end: i for i, (_, end) in enumerate(spans)}
        add_row(
            passages,
            text=text,
            words=words_of(text, spans),
            starts=np.array([*first_at], np.int32),
            ends=np.array([*last_at], np.int32),
            frequencies=np.array([counts[word] / len(lower) for word in lower], np.float32),
        )
        for question in paragraph["qas"]:
            id_ = question["id"]
            if id_ in asked:
                raise ValueError(
                    f"{name}: two questions have the id {id_!r}, {asked[id_]!r:.60} and {question['question']!r:.60}; "
                    "predictions are matched by id: give each question its own"
                )
            asked[id_] = question["question"]
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
            unmatched += span is None and bool(question["answers"])
            first, last = span or (-1, -1)
            add_row(
                questions,
                id=id_,
                passage=len(passages["text"]) - 1,
                text=question["question"],
                answers=[answer["text"] for answer in question["answers"]],
                first=first,
                last=last,
                words=words_of(question["question"], spans_of(question["question"])),
            )
    if tagger is not None:
        written = list(forms)
        for columns, wanted in ((passages, ("lemmas", "tags", "entities")), (questions, ("lemmas",))):
            columns |= {key: [] for key in wanted}
            for annotation in tagger.annotate([[written[number] for number in row] for row in columns["words"]]):
                numbers = {key: [numberings[key][value] for value in annotation[key]] for key in wanted}
                add_row(columns, **{key: np.array(row, np.int32) for key, row in numbers.items()})
    meta = {
        "forms": list(forms),
        "tags": list(numberings["tags"]),
        "entities": list(numberings["entities"]),
        "report": {
            "passages": len(passages["text"]),
            "questions": len(questions["id"]),
            "unanswered": sum(not answers for answers in questions["answers"]),
            "unmatched": unmatched,
            "misplaced": len(misplaced),
            "misplaced_examples": misplaced[:EXAMPLES],
            "empty_passages": sum(not text.strip() for text in passages["text"]),
            "empty_questions": sum(not text.strip() for text in questions["text"]),
        },
    }
    return (table_of(passages), table_of(questions)), meta


def add_row(columns: dict[str, list[Any]], **row: Any) -> None:
    for name, value in row.items():
        columns[name].append(value)


def table_of(columns: dict[str, list[Any]]) -> pa.Table:
    return pa.table({name: pa.array(rows, TYPES.get(name, pa.string())) for name, rows in columns.items()})

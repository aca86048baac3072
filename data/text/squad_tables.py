"""The passages and questions of a SQuAD file as Arrow tables in a memory map, prepared once."""

import hashlib
import json
import os
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.download import lock, read_bytes, require_writable
from data.text.spacy_tagger import Tagger
from data.text.token_array import checksum

FORMAT = 1  # of the prepared folder; a change of what is written in it counts it up
SHOWN = 5  # examples of each fault
TABLES = ("passages", "questions")
FILES = (*(f"{name}.arrow" for name in TABLES), "meta.json")

# A Chinese or Japanese text has no spaces: each of its signs is a token.
SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(
    rf"""[^\W{SIGNS}]+?(?=n't\b) | n't\b | '(?:s|ve|re|d|ll|m)\b  # did n't, it 's
    | (?:[^\W\d_]\.){{2,}}                                       # U.S.
    | \d+(?:[.,]\d+)*(?!\w)                                      # 1,250 or 3.5
    | [{SIGNS}] | [^\W{SIGNS}]+ | [^\w\s]""",
    re.VERBOSE | re.IGNORECASE,
)


def spans_of(text: str) -> list[tuple[int, int]]:
    """(start, end) of each token, in characters: words, numbers and marks; a hyphen parts words, for answers do too."""
    return [match.span() for match in TOKEN.finditer(text.replace("’", "'"))]


class Lists:
    """A column of lists as one array; no copy is made of either."""

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
    """Passages and questions by number, read-only.

    forms: the words as they are written, and the lemmas; words and lemmas below are numbers in it.
    passages: text; words, starts, ends and frequencies (share of the passage, upper and lower case together) of its
        tokens, and with a tagger lemmas, tags and entities, the latter two numbers in `tags` and `entities`.
    questions: id, passage, text, words, lemmas, answers (texts), first and last (tokens of the first answer that is
        made of whole tokens; -1: none).
    report: how many there are, and what is wrong with them.
    key: of the file and of how it was read.
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
    """Numbers as numpy's array, lists of numbers as Lists, texts as Arrow's array."""
    chunk = column.chunk(0) if column.num_chunks else column.combine_chunks()  # one was written, or none of no rows
    if pa.types.is_list(chunk.type) and not pa.types.is_string(chunk.type.value_type):
        return Lists(chunk)
    return chunk.to_numpy() if pa.types.is_primitive(chunk.type) else chunk


def prepare(path: Path, cache: Path, tagger: Tagger | None) -> Reading:
    """What a file holds, plain or packed; read, tokenised and tagged if that is not in the cache yet."""
    content = read_bytes(path)
    identity = [FORMAT, TOKEN.pattern, hashlib.sha256(content).hexdigest(), tagger and tagger.identity]
    place = cache / "squad" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    found = open_prepared(place)
    if found is None:
        require_writable(place.parent)
        with lock(place):  # a second process waits here, and then finds what the first has built
            found = open_prepared(place)
            if found is None:
                tables, meta = build(paragraphs_of(content, path.name), tagger, path.name)
                scratch = place.with_name(place.name + ".part")
                for leftover in (scratch, place):  # of a process that was killed, or damaged since
                    shutil.rmtree(leftover, ignore_errors=True)
                    leftover.unlink(missing_ok=True)
                scratch.mkdir()
                for name, table in zip(TABLES, tables, strict=True):
                    # As datasets keeps its own: datasets.Dataset.from_file opens it too.
                    with (
                        pa.OSFile(str(scratch / f"{name}.arrow"), "wb") as file,
                        pa.ipc.new_stream(file, table.schema) as writer,
                    ):
                        writer.write_table(table)
                (scratch / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
                (scratch / "checksums.json").write_text(json.dumps({name: checksum(scratch / name) for name in FILES}))
                os.rename(scratch, place)
                found = open_prepared(place)
    assert found is not None
    return found


def open_prepared(place: Path) -> Reading | None:
    """What a prepared folder holds; None if there is none, or it is damaged."""
    try:
        if {name: checksum(place / name) for name in FILES} != json.loads((place / "checksums.json").read_bytes()):
            return None
        meta = json.loads((place / "meta.json").read_bytes())
        passages, questions = (
            pa.ipc.open_stream(pa.memory_map(str(place / f"{name}.arrow"))).read_all() for name in TABLES
        )
        return Reading(passages, questions, meta, place.name)
    except (OSError, ValueError):  # a file is missing, or no JSON
        return None


def paragraphs_of(content: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The paragraphs of a file in SQuAD's format; ValueError with the place of the first thing that is not so."""
    try:
        node = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error}); expected a file like SQuAD's train-v1.1.json") from error
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
    """node[key], if it is of that kind."""
    if not isinstance(node, dict) or type(node.get(key)) is not kind:
        found = f"{node[key]!r:.60}" if isinstance(node, dict) and key in node else "none"
        keys = f" among {sorted(node)}" if isinstance(node, dict) else f", and no object but {node!r:.60}"
        kind_name = {str: "text", int: "whole number", list: "list"}[kind]
        raise ValueError(f"{place}: {key!r} must be a {kind_name}, found {found}{keys}")
    if kind is str:
        check_text(node[key], f"{place}: {key!r}")
    return node[key]


def check_text(text: str, name: str) -> None:
    """ValueError for what no file in UTF-8 can hold: JSON and a command line can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character, {text[error.start]!r} at {error.start}: take it out") from error


class Columns:
    """Columns of lists of numbers, growing."""

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
    """Numbers of texts, in the order in which they were asked for."""

    def __missing__(self, key: str) -> int:
        self[key] = len(self)
        return self[key]


def build(
    paragraphs: Iterator[dict[str, Any]] | list[dict[str, Any]], tagger: Tagger | None, name: str = "text"
) -> tuple[tuple[pa.Table, pa.Table], dict[str, Any]]:
    """Tables of passages and of questions, and what `Reading` takes beside them; ValueError for an id that recurs."""
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
                    "predictions are told apart by it: give each its own"
                )
            places[id_] = question["question"]
            questions.add(words=words_of(question["question"], spans_of(question["question"])))
            found = None
            for answer in question["answers"]:
                start, wanted = answer["answer_start"], answer["text"]
                if start < 0 or text[start : start + len(wanted)] != wanted:
                    there = text[start : start + len(wanted)] if 0 <= start < len(text) else "no passage"
                    misplaced.append(f"{id_}: {wanted!r:.40} at {start}, where {there!r:.40} stands")
                    continue
                start += len(wanted) - len(wanted.lstrip())
                end = start + len(wanted.strip())
                if found is None and start in first_at and end in last_at and start < end:
                    found = first_at[start], last_at[end]
            if found is None and question["answers"]:
                unmatched.append(id_)
            rows["id"].append(id_)
            rows["passage"].append(len(texts))
            rows["text"].append(question["question"])
            rows["answers"].append([answer["text"] for answer in question["answers"]])
            rows["first"].append(-1 if found is None else found[0])
            rows["last"].append(-1 if found is None else found[1])
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
            "misplaced_examples": misplaced[:SHOWN],
            "empty_passages": sum(not text.strip() for text in texts),
            "empty_questions": sum(not text.strip() for text in rows["text"]),
        },
    }
    return (
        pa.table({"text": pa.array(texts, pa.string()), **columns[0]}),
        pa.table({**{key: pa.array(row, types.get(key, pa.string())) for key, row in rows.items()}, **columns[1]}),
    ), meta

"""The documents: every Python block runs, links lead somewhere, and the table of arguments matches the code.

The blocks of a file are one program, in order, in a directory of its own. A block whose first line is
`# needs NAME ...` is skipped where one of these modules cannot be imported.
"""

import ast
import importlib.util
import inspect
import re

import pytest
import yaml
from conftest import ROOT

from sru import SRU, SRUCell, official_format

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
BLOCKS = {name: [(match.start(1), match[1]) for match in BLOCK.finditer(text)] for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Of each file: its directory, its names, and how many of its blocks have run."""
    return {name: [tmp_path_factory.mktemp("docs"), {"__name__": name}, 0] for name in BLOCKS}


def missing(code: str) -> list[str]:
    """The modules that a block needs and that cannot be imported."""
    first = code.partition("\n")[0]
    names = first.removeprefix("# needs ").split() if first.startswith("# needs ") else []
    return [name for name in names if importlib.util.find_spec(name) is None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "number"), [(name, i) for name, blocks in BLOCKS.items() for i in range(len(blocks))])
def test_a_block_of_the_documents_runs(name, number, programs, monkeypatch):
    program = programs[name]
    directory, names, done = program
    program[2] = number + 1
    monkeypatch.chdir(directory)
    for start, code in BLOCKS[name][done : number + 1]:  # those before it too, if they were not selected
        if not missing(code):
            above = "\n" * TEXTS[name].count("\n", 0, start)  # so that an error tells the line of the file
            exec(compile(above + code, ROOT / name, "exec"), names)
    if missing(code):
        pytest.skip(f"{', '.join(missing(code))} is not installed")


def test_every_python_block_is_found():
    for name, text in TEXTS.items():
        fences = re.findall(r"^.*``` *py.*$", text, re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(BLOCKS[name]), f"{name}: write ```python and ``` at the start of a line: {fences}"
    assert BLOCKS["docs/layer.md"]
    assert BLOCKS["docs/migrating.md"]


def arguments() -> dict[str, dict[str, str]]:
    """The rows of the table of arguments in docs/migrating.md, by argument."""
    lines = TEXTS["docs/migrating.md"].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| argument |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    header, _, *rows = rows
    assert header[:5] == ["argument", "class", "2.6.0", "3.0.0.dev", "here"]
    names = [row[0].strip("`") for row in rows]
    assert len(set(names)) == len(names)
    return {name: dict(zip(header, row, strict=True)) for name, row in zip(names, rows, strict=True)}


@pytest.mark.parametrize(("owner", "classes"), [(SRU, ("both", "`SRU`")), (SRUCell, ("both", "`SRUCell`"))])
def test_the_table_of_arguments_is_that_of_the_code(owner, classes):
    parameters = {n: p.default for n, p in inspect.signature(owner).parameters.items() if p.kind is not p.VAR_KEYWORD}
    parameters |= {n: default for n, default in official_format.OPTIONS.items() if (owner, n) != (SRU, "n_proj")}
    rows = {name: row for name, row in arguments().items() if row["class"] in classes}
    assert set(rows) == set(parameters), "docs/migrating.md must have a row for every argument, and no other"
    for name, default in parameters.items():
        stated = rows[name]["here"]
        if default is inspect.Parameter.empty:
            assert stated == "required", name
            continue
        value = ast.literal_eval(stated.strip("`"))
        assert (type(value), value) == (type(default), default), name


def test_every_class_of_the_table_is_known():
    assert {row["class"] for row in arguments().values()} == {"both", "`SRU`", "`SRUCell`"}


LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)")


def anchors(path):
    """The anchors of a page's headings, as forges and MkDocs write them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_between_the_documents_lead_somewhere(name):
    for target, anchor in LINK.findall(TEXTS[name]):
        path = ROOT / name if not target else (ROOT / name).parent / target
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_a_link_to_a_missing_page_or_heading_is_found():
    assert LINK.findall("[a](b.md) ![c](d.png) [e](#f) [g](h.md#i) [j](https://k.l)") == [
        ("b.md", ""),
        ("d.png", ""),
        ("", "f"),
        ("h.md", "i"),
    ]
    assert "against-the-official-package" in anchors(ROOT / "docs/speed.md")


def test_the_site_has_every_page_once():
    def pages(entry):
        entries = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for each in entries for page in pages(each)]

    outside = {"CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md"}
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(named) == len(set(named))
    there = {str(path.relative_to(ROOT / "docs")) for path in FILES[1:]}
    assert set(named) == there | outside, "mkdocs.yml must list every page of docs/"
    assert all((ROOT / page).is_file() for page in outside)


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_every_test_that_the_documents_name_exists():
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for text in TEXTS.values() for name in re.findall(r"`(test_\w+)`", text)}
    assert named
    assert not {name for name in named if f"def {name}(" not in there}


def test_no_number_is_left_to_fill_in():
    texts = {**TEXTS, "NOTES": (ROOT / "bench/NOTES.md").read_text(encoding="utf-8")}
    for name, text in texts.items():
        assert not re.findall(r"\b[A-Z]+_(?:TABLE|ROWS|TEXT|S)\b", text), name

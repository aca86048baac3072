"""The commands of docs/: each `python train.py ...` composes, and those of the quick start run, in their order."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from tasks.run import config_checks

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
QUICKSTART = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGES["quickstart.md"], re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def commands(text):
    """The words after `python train.py`, of lines, rows of tables and code within a sentence."""
    text = re.sub(r"\\\n\s*", "", text)
    of_lines = re.findall(r"^(?: {4}|> )?python train\.py(.*)$", text, re.MULTILINE)
    of_sentences = re.findall(r"`python train\.py([^`]*)`", text)
    return [shlex.split(words, comments=True) for words in [*of_lines, *of_sentences]]


def is_row(words):
    """A row of a paper and no more: tests/test_papers.py has those."""
    return len(words) == 1 and words[0].startswith("experiment=")


ALL = sorted({(name, shlex.join(words)) for name, text in PAGES.items() for words in commands(text) if words})
TRAIN = [(name, words) for name, words in ALL if not is_row(shlex.split(words))]


@pytest.mark.parametrize(("page", "words"), TRAIN)
def test_a_command_of_the_documents_composes(configure, page, words):
    # What goes on with a run has that run's words. tests/tasks/test_own_task.py composes the task that is added there.
    flags = {"-m", "--cfg", "job", "--help"}
    given = [word for word in shlex.split(words) if word not in flags and not word.startswith("resume=")]
    if any(word.startswith(("sweep=", "hydra", "+hydra")) for word in given):
        # tests/tasks/test_sweep.py composes the jobs of conf/sweep/ and runs the launchers.
        given = [word for word in given if "interval(" not in word and not word.lstrip("+").startswith("hydra")]
        config_checks.check(configure(*given))
        return
    given = ["task=image" if word == "task=forecast" else word for word in given]
    # Without -m a value with commas is an error, as on the command line.
    if "-m" in shlex.split(words):
        overrides = OverridesParser.create().parse_overrides(given)
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        assert len(jobs) > 1
    else:
        jobs = [given]
    for job in jobs[:: max(1, len(jobs) - 1)]:  # the first and the last
        config_checks.check(configure(*job))


def test_commands_are_found_on_every_page_that_has_some():
    found = {page for page, _ in ALL}
    assert found >= {
        "sru_2018.md",
        "sru_2017.md",
        "srupp_2021.md",
        "quickstart.md",
        "own_task.md",
        "troubleshooting.md",
    }
    assert len(QUICKSTART) > 8


def test_every_script_that_a_block_of_the_quick_start_runs_exists():
    for words in QUICKSTART:
        assert words[0] == "python"
        assert words[1] == "-m" or (ROOT / words[1]).is_file()


@pytest.mark.slow
def test_the_quick_start_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("SRU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "runs").mkdir()
    output = {}
    for words in QUICKSTART:
        script = words[1:] if words[1] == "-m" else [str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(
            [sys.executable, *script], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
        output[shlex.join(words)] = done.stdout
    assert (
        re.search(r"^epochs +(\d+)", output["python train.py resume=runs/first trainer.max_epochs=8"], re.M)[1] == "8"
    )
    table = next(text for command, text in output.items() if "results.py" in command)
    assert len(re.findall(r"^\| image", table, re.MULTILINE)) >= 4
    assert (tmp_path / "runs/curves.png").stat().st_size > 1000
    (said,) = (text for command, text in output.items() if "predict.py" in command)
    assert said.startswith("The ")
    assert len(said.rstrip("\n")) >= 40


def templates(path):
    """The texts of a file, with ... for what is put into them; parts that are written one after another are one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


MESSAGES = [
    line
    for block in re.findall(r"^```text\n(.*?)^```$", PAGES["troubleshooting.md"], re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def said():
    files = [ROOT / "predict.py", *(path for name in ("sru", "tasks", "data") for path in (ROOT / name).rglob("*.py"))]
    return {text for path in files for text in templates(path)}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_of_troubles_is_one_of_the_program(said, message):
    assert any(message in text for text in said), "no text of the source says so: correct docs/troubleshooting.md"


def test_the_page_of_troubles_has_messages():
    assert len(MESSAGES) > 20
    assert all(len(message.replace("...", "")) > 20 for message in MESSAGES)

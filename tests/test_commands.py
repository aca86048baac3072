"""The commands of README.md and docs/: `python train.py ...` composes, other scripts have the options, and those of the
quick start run, in their order."""

import ast
import inspect
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class

import evaluate
from tasks.run import config_checks

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
QUICKSTART = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGES["docs/quickstart.md"], re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
ENTRIES = ("train.py", "predict.py", "evaluate.py")


def with_variables(text):
    """The text with each $NAME that an earlier line sets in the shell's way, NAME=value, in its place."""
    values: dict[str, str] = {}
    lines = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        line = re.sub(r"\$([A-Z]+)\b", lambda found: values.get(found[1], found[0]), line)
        if assigned := re.fullmatch(r"([A-Z]+)=(\"?)([^\"]*)\2", line.strip()):
            values[assigned[1]] = assigned[3]
        lines.append(line)
    return "\n".join(lines)


def commands(text, script="train.py"):
    """The words after `python SCRIPT`, of lines, rows of tables and code within a sentence."""
    text, script = with_variables(text), re.escape(script)
    of_lines = re.findall(rf"^(?: {{4}}|> )?(?:[A-Z_]+=\S+ )*(?:[^`\n]*\| )?python {script}(.*)$", text, re.MULTILINE)
    of_sentences = re.findall(rf"`(?:[A-Z_]+=\S+ )*python {script}([^`]*)`", text)
    return [shlex.split(words, comments=True) for words in [*of_lines, *of_sentences]]


def is_row(words):
    """A row of a paper and no more: tests/scripts/test_papers.py has those."""
    return len(words) == 1 and words[0].startswith("experiment=")


ALL = sorted({(name, shlex.join(words)) for name, text in PAGES.items() for words in commands(text) if words})
TRAIN = [(name, words) for name, words in ALL if not is_row(shlex.split(words))]
OTHERS = sorted(
    {
        (name, script, shlex.join(words))
        for name, text in PAGES.items()
        for script in [*ENTRIES[1:], *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]
        for words in commands(text, script)
        if words
    }
)


@pytest.mark.parametrize(("page", "words"), TRAIN)
def test_a_command_of_the_documents_composes(configure, page, words):
    # What goes on with a run has that run's words. tests/tasks/test_own_task.py composes the task that is added there.
    flags = {"-m", "--cfg", "job", "--help"}
    given = [word for word in shlex.split(words) if word not in flags and not word.startswith("resume=")]
    if any(word.startswith(("sweep=", "hydra", "+hydra")) for word in given):
        # tests/tasks/run/test_sweep.py composes the jobs of conf/sweep/ and runs the launchers.
        given = [word for word in given if "interval(" not in word and not word.lstrip("+").startswith("hydra")]
        config_checks.check(configure(*given))
        return
    given = ["task=image" if word == "task=forecast" else word for word in given]
    if any(word.startswith("loggers.wandb.") for word in given):
        given.append("logger=wandb")  # the default, which `configure` replaces
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
    names = ("classification", "lm", "squad", "translation", "speech", "hybrid", "image")
    tasks = {f"docs/tasks/{name}.md" for name in names}
    papers = {f"docs/{name}.md" for name in ("sru_2017", "sru_2018", "srupp_2021")}
    others = {f"docs/{name}.md" for name in ("quickstart", "own_task", "troubleshooting", "runs", "sweeps", "cluster")}
    assert found >= {"README.md", "docs/results.md", *tasks, *papers, *others}
    assert len(QUICKSTART) > 8


def test_variables_of_the_shell_are_replaced():
    text = 'R=a,b\nR="$R c=1"\nOMP_NUM_THREADS=1 python train.py x=$R \\\n  y=$OTHER  # z'
    assert commands(text) == [["x=a,b", "c=1", "y=$OTHER"]]


def predict_options():
    """The options of predict.py, of all tasks."""
    names = {"checkpoint", "device"}
    for path in (ROOT / "conf/task").glob("*.yaml"):
        task = get_class(yaml.safe_load(path.read_text(encoding="utf-8"))["task"]["_target_"])
        if hasattr(task, "predict"):
            names |= set(inspect.signature(task.predict).parameters) - {"self", "vocabulary"}
    return names


@pytest.fixture(scope="module")
def told():
    """told(script): what it prints with --help."""
    told = {}

    def help_of(script):
        if script not in told:
            command = [sys.executable, str(ROOT / script), "--help"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
            told[script] = done.stdout
        return told[script]

    return help_of


@pytest.mark.parametrize(("page", "script", "words"), OTHERS)
def test_a_command_of_the_documents_has_the_options_of_its_script(configure, told, page, script, words):
    given = shlex.split(words)
    keys = [word.partition("=")[0] for word in given]
    if script == "predict.py":
        assert set(keys) <= predict_options()
    elif script == "evaluate.py":
        assert all(key in evaluate.OWN or re.match(r"(data|task|model)\.\w", key) for key in keys)
    elif script == "scripts/download.py":
        config_checks.check(configure(*(word for word in given if "..." not in word)))
    else:
        options = {word for word in given if word.startswith("--")}
        sections = set(given[:1]) - options if script == "scripts/benchmark.py" else set()
        assert options | sections <= set(re.findall(r"--\w+|\w+", told(script)))


def test_commands_of_every_script_are_found():
    scripts = {f"scripts/{name}.py" for name in ("benchmark", "convert", "download", "results", "wandb_report")}
    assert {script for _, script, _ in OTHERS} >= {*ENTRIES[1:], *scripts}


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
    for block in re.findall(r"^```text\n(.*?)^```$", PAGES["docs/troubleshooting.md"], re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def said():
    folders = ("sru", "tasks", "data", "scripts")
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    return {text for path in [*files, *(ROOT / entry for entry in ENTRIES)] for text in templates(path)}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_of_troubles_is_one_of_the_program(said, message):
    assert any(message in text for text in said), "no text of the source says so: correct docs/troubleshooting.md"


def test_the_page_of_troubles_has_messages():
    assert len(MESSAGES) > 20
    assert all(len(message.replace("...", "")) > 20 for message in MESSAGES)

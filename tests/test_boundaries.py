"""Who may import whom (CONTRIBUTING.md), and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"sru", "data", "tasks", "scripts", "tests", "train", "evaluate", "predict"}
ALLOWED = {"sru": {"sru"}, "tasks": {"tasks"}, "data": {"data"}, "scripts": {"sru", "data", "tasks", "train"}}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_meet_in_the_configuration_only(path):
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & OURS <= ALLOWED[package]


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "predict.py"])
def test_the_commands_know_the_tasks_alone(name):
    assert imported(ROOT / name) & OURS <= {"tasks"}


def test_hydra_stays_at_the_door():
    names = {path.name for path in FILES if path.parent.name in ("tasks", "data", "sru") and "hydra" in imported(path)}
    assert names <= {"door.py", "hints.py", "messages.py", "processes.py", "sweep.py", "trained.py"}


def test_the_library_needs_torch_numpy_and_numba_only():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "sru":
            # llvmlite is a part of numba.
            extra = {"cuda.py": {"cupy"}, "cpu_kernels.py": {"llvmlite"}}.get(path.name, set())
            assert imported(path) - sys.stdlib_module_names <= {"sru", "torch", "numpy", "numba", *extra}, path


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("torchtext", "text.py"),
        ("spacy", "tagging.py"),
        ("sentencepiece", "subwords.py"),
        ("kaldiio", "archives.py"),
        ("kaldi_native_fbank", "audio.py"),
        ("soxr", "audio.py"),
        ("soundfile", "audio.py"),
    ],
)
def test_what_may_be_missing_or_die_out_is_imported_in_one_file(package, file):
    assert [path.name for path in FILES if package in imported(path)] == [file]


def test_importing_sru_compiles_nothing_and_touches_no_gpu():
    code = (
        "import sys, sru; assert not {'numba', 'cupy', 'pytorch_lightning'} & set(sys.modules), 'heavy import';"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""Who may import whom (CONTRIBUTING.md), and what importing costs."""

import ast
import os
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


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def modules_of(path: Path) -> set[str]:
    """Our modules that a file imports, but for the packages it lies in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES or {node.module} & MODULES
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
    return {name for name in found if not module_name(path).startswith(f"{name}.")} - {module_name(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_meet_in_the_configuration_only(path):
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & OURS <= ALLOWED[package]


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "predict.py"])
def test_the_commands_know_the_tasks_alone(name):
    assert imported(ROOT / name) & OURS <= {"tasks"}


def test_hydra_stays_with_what_reads_commands():
    names = {
        str(path.relative_to(ROOT / "tasks"))
        for path in FILES
        if "hydra" in imported(path) and "scripts" not in path.parts
    }
    run = {f"run/{name}.py" for name in ("config_checks", "config_hints", "distributed", "errors", "sweep")}
    assert names <= {*run, "trained.py"}


def test_no_import_goes_up_from_the_parts_to_the_tasks():
    tasks = {f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("[!_]*.py")}
    for folder in ("modules", "run"):
        for path in (ROOT / "tasks" / folder).glob("*.py"):
            assert not modules_of(path) & tasks, path


def test_no_modules_import_one_another_in_a_circle():
    edges = {module_name(path): modules_of(path) for path in FILES}
    while leaves := [name for name in edges if not edges[name] & edges.keys()]:
        for name in leaves:
            del edges[name]
    # What is left is in a circle, or leads to one.
    assert not edges


def test_the_library_needs_torch_numpy_and_numba_only():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "sru":
            # llvmlite is a part of numba.
            extra = {"cuda.py": {"cupy"}, "cpu_kernels.py": {"llvmlite"}}.get(path.name, set())
            assert imported(path) - sys.stdlib_module_names <= {"sru", "torch", "numpy", "numba", *extra}, path


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("torchtext", "word_vectors.py"),
        ("spacy", "spacy_tagger.py"),
        ("sentencepiece", "subwords.py"),
        ("kaldiio", "kaldi_ark.py"),
        ("kaldi_native_fbank", "fbank.py"),
        ("soxr", "fbank.py"),
        ("soundfile", "fbank.py"),
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


@pytest.mark.parametrize(
    ("words", "status", "text"), [(["-m", "gpu"], 5, "needs the package nosuch"), ([], 2, "error")]
)
def test_a_missing_package_skips_a_file_of_the_gpu_tests_only(tmp_path, words, status, text):
    (tmp_path / "test_x.py").write_text("import nosuch.part\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "conftest", "-c", "/dev/null", "test_x.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert text in done.stdout

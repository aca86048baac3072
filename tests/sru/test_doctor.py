"""python -m sru.doctor: a sound installation, and broken ones, each reported as what it is."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import sru.kernels
from sru import doctor
from sru.kernels import cpu, reference


def run(code=None, **environment):
    """A process of its own, which runs the doctor, or code."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "sru.doctor"])]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def rows(text):
    """The table as {name: what is said of it}."""
    return {line[:20].split("  ")[0]: line for line in text.splitlines() if line}


def test_a_sound_installation_passes():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    for name in ("backend reference", "backend cpu"):
        assert table[name].endswith("works, forward and backward"), table[name]
    if torch.version.cuda is None:
        assert "torch is built without CUDA" in table["backend cuda"]
    assert torch.__version__ in table["torch"]
    assert table["auto on cpu"].endswith(" cpu for float32, float64, float16, bfloat16")
    assert table["compiled code"].endswith("(writable)")
    assert "All is well." in table
    assert done.stderr == ""


def test_without_numba_the_doctor_says_what_to_type_and_the_reference_is_enough():
    done = run("import sys; sys.modules['numba'] = None; from sru import doctor; sys.exit(doctor.main())")
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert table["backend cpu"].endswith("numba is not installed; type: pip install numba")
    assert table["auto on cpu"].endswith(" reference for float32, float64, float16, bfloat16")
    assert "FAILS" not in done.stdout


def test_a_numba_that_cannot_be_imported_is_reported(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba/__init__.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less.\\nGot 9.9.')")
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    table = rows(done.stdout)
    problem = "FAILS: ImportError: Numba needs NumPy 2.3 or less. Got 9.9. (with float32)"
    assert table["backend cpu"].endswith(problem)
    assert problem in table["auto on cpu"]
    assert table["backend reference"].endswith("works, forward and backward")
    assert "backend='reference'" in done.stdout
    assert "Traceback" not in done.stderr


def test_where_no_folder_can_be_written_the_doctor_says_that_each_process_compiles(tmp_path):
    """No folder can be made below a regular file, whoever asks."""
    shutil.copytree(ROOT / "sru", tmp_path / "sru", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "sru/kernels/__pycache__"
    file.write_text("")
    folders = dict.fromkeys(("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME"), str(file / "below"))
    environment = os.environ | folders | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "sru.doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert str(tmp_path) in table["sru"]
    assert table["backend cpu"].endswith("works, forward and backward")
    assert "nowhere, so every process compiles: set NUMBA_CACHE_DIR" in table["compiled code"]


def test_a_kernel_that_raises_fails(monkeypatch, capsys):
    def broken(*_, **__):
        raise OSError(2, "cannot load\nlibllvm")

    monkeypatch.setattr(cpu, "run_forward", broken)
    assert doctor.main() == 1
    table = rows(capsys.readouterr().out)
    assert table["backend cpu"].endswith("FAILS: FileNotFoundError: [Errno 2] cannot load libllvm (with float32)")
    assert table["backend reference"].endswith("works, forward and backward")


@pytest.mark.parametrize("pass_", ["run_forward", "run_backward"])
@pytest.mark.parametrize("change", [1.001, float("nan")])
def test_a_kernel_that_computes_something_else_fails(pass_, change, monkeypatch):
    sound = getattr(cpu, pass_)

    def wrong(*args, **options):
        first, *others = sound(*args, **options)
        return first * change, *others

    monkeypatch.setattr(cpu, pass_, wrong)
    table, healthy = doctor.examine()
    assert not healthy
    assert table["backend cpu"].startswith("FAILS: wrong numbers with float32")
    assert "FAILS" in table["auto on cpu"]


def test_a_kernel_that_is_wrong_with_one_dtype_only_fails(monkeypatch):
    sound = cpu.run_forward

    def wrong(arguments, **options):
        h, c, c_last = sound(arguments, **options)
        return (h + 1e-9 if h.dtype == torch.float64 else h), c, c_last

    monkeypatch.setattr(cpu, "run_forward", wrong)
    assert doctor.examine()[0]["backend cpu"].startswith("FAILS: wrong numbers with float64")


def test_a_gpu_that_torch_counts_but_cannot_use_fails(monkeypatch, capsys):
    if torch.version.cuda is not None:
        pytest.skip("this torch may be able to use it")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.main() == 1
    table = rows(capsys.readouterr().out)
    assert "FAILS: AssertionError: Torch not compiled with CUDA" in table["auto on cuda:0"]
    assert table["auto on cpu"].endswith("bfloat16")


def test_the_doctor_changes_no_random_state_and_warns_of_nothing(recwarn):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    doctor.examine()
    assert torch.equal(torch.rand(1), expected)
    assert not recwarn.list


def test_the_doctor_runs_the_reference_too(monkeypatch):
    sound = reference.recurrence

    def wrong(arguments):
        if arguments.u.dtype == torch.float16:
            raise RuntimeError("no half")
        return sound(arguments)

    monkeypatch.setattr(sru.kernels.reference, "recurrence", wrong)
    assert doctor.examine()[0]["backend reference"] == "FAILS: RuntimeError: no half (with float16)"

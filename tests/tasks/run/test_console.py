"""The output of commands: UTF-8 in files and pipes, and escapes for characters that a terminal lacks."""

import ast
import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from tasks.run import console

TEXT = "caf\u00e9 \u2026 \u4e2d \U0001f600"
LOCALES = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "cp1252:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
]


class Terminal(io.BytesIO):
    def isatty(self):
        return True


def test_a_file_gets_utf8_and_a_terminal_gets_escapes(monkeypatch):
    for raw, encoding, expected in (
        (io.BytesIO(), "latin-1", (TEXT + " x\udce9 \\ud800\n").encode("utf-8", "surrogateescape")),
        (Terminal(), "utf-8", (TEXT + " x\udce9 \\ud800\n").encode("utf-8", "surrogateescape")),
        (Terminal(), "latin-1", b"caf\xe9 \\u2026 \\u4e2d \\U0001f600 x\xe9 \\ud800\n"),
        (Terminal(), "ascii", b"caf\\xe9 \\u2026 \\u4e2d \\U0001f600 x\xe9 \\ud800\n"),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
        console.use_utf8()
        print(TEXT, "x\udce9", "\ud800", flush=True)
        written = raw.getvalue()
        monkeypatch.undo()
        assert written == expected


@pytest.mark.parametrize("locale", LOCALES, ids=str)
def test_a_command_writes_utf8_in_any_locale(tmp_path, locale):
    done = subprocess.run(
        [sys.executable, "predict.py", f"checkpoint={tmp_path}/none {TEXT}"],
        cwd=ROOT,
        env={**os.environ, **locale},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"none {TEXT} is neither a run's folder" in done.stderr.decode()


def test_a_typed_text_is_read_as_utf8(monkeypatch):
    assert console.decode_argument(TEXT) == TEXT
    assert console.decode_argument("x\udce9") == "x\udce9"
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert console.decode_argument("caf\u00e9".encode().decode("ascii", "surrogateescape")) == "caf\u00e9"
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1", "surrogateescape"))
    assert console.decode_argument("caf\u00e9".encode().decode("latin-1")) == "caf\u00e9"
    assert console.decode_argument("caf\u00e9") == "caf\u00e9"


def test_every_command_calls_use_utf8():
    commands = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *(ROOT / "tasks").rglob("*.py")]
    for path in commands:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) and path.name != "benchmark.py":
                assert "console.use_utf8()" in ast.unparse(node), path

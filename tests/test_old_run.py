"""A run folder of version 0.1, before the modules of tasks/ were renamed, resumes, evaluates and predicts."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from tasks.run.run_dir import MOVED, rename_moved

OLD = ROOT / "tests/samples/old_run"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the old run, next to its training text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SRU_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "tests/samples/translation-train.en", "text.txt")
    shutil.copytree(OLD, "run")
    return tmp_path / "run"


def command(script, *words):
    done = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_names_renamed_modules():
    text = (OLD / "config.yaml").read_text() + (OLD / "run.json").read_text()
    assert {name for name in MOVED if name in text} >= {
        "tasks.clock.Clock",
        "tasks.record.Checkpoint",
        "tasks.newbob.newbob",
    }


@pytest.mark.parametrize("old", MOVED)
def test_a_renamed_class_exists(old):
    module, _, name = MOVED[old].rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert rename_moved(f"a={old}, {old}s x.{old}") == f"a={MOVED[old]}, {old}s x.{old}"


def test_it_resumes(folder):
    before = json.loads((folder / "metrics.json").read_text())
    output = command("train.py", f"resume={folder}", "trainer.max_epochs=3")
    after = json.loads((folder / "metrics.json").read_text())
    assert (before["epochs"], after["epochs"]) == (2, 3)
    assert after["seconds"] > before["seconds"]  # the time continues
    assert after["metrics"]["val/loss"] < before["metrics"]["val/loss"]
    assert "tasks.clock" not in output  # a renamed class is not a change
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["task"]["scheduler"]["_target_"] == MOVED["tasks.newbob.newbob"]


def test_it_evaluates_and_predicts(folder):
    expected = json.loads((folder / "metrics.json").read_text())["metrics"]["test/bpc"]
    command("evaluate.py", f"checkpoint={folder}", "output=found.json")
    found = json.loads((folder.parent / "found.json").read_text())["metrics"]["test/bpc"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(command("predict.py", f"checkpoint={folder}/checkpoints/best.ckpt", "prompt=A man", "length=20")) >= 20

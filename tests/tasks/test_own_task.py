"""docs/own_task.md: its two files are a task that trains, in a copy of the project that has nothing else new."""

import csv
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from sru import SRU

PAGE = (ROOT / "docs/own_task.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`((?:tasks|conf)/\S+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """train.py, conf/ and tasks/ with the page's files among them; sru/ and data/ as they are."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("conf", "tasks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    for name in ("sru", "data"):
        (folder / name).symlink_to(ROOT / name)
    for path, content in FILES.items():
        assert not (folder / path).exists()
        (folder / path).write_text(content, encoding="utf-8")
    return folder


def test_the_page_has_two_files():
    assert set(FILES) == {"tasks/forecast.py", "conf/task/forecast.yaml"}


def test_the_task_of_the_page_learns_with_two_models(project, tmp_path):
    words = ["-m", "task=forecast", "model=sru,lstm", "epochs=4", "logger=csv", f"hydra.sweep.dir={tmp_path}"]
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for number, model in enumerate(("sru.SRU", "sru.LSTM")):
        folder = tmp_path / str(number)
        assert f"_target_: {model}\n" in (folder / "config.yaml").read_text()
        metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
        assert metrics["test/loss"] < 0.7 * metrics["test/repeated"]
        saved = 100 * (1 - metrics["test/loss"] / metrics["test/repeated"])
        assert metrics["test/skill"] == pytest.approx(saved, rel=1e-4)
        with (folder / "metrics.csv").open(newline="") as file:
            losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
        assert len(losses) == 4
        assert losses[-1] < losses[0]


def test_the_task_of_the_page_refuses_what_would_see_the_future():
    names = {}
    exec(FILES["tasks/forecast.py"], names)
    encoder = partial(SRU, hidden_size=4, num_layers=1, bidirectional=True)
    with pytest.raises(ValueError, match="type bidirectional=false"):
        names["Forecast"](encoder=encoder, optimizer=torch.optim.Adam, input_size=3, num_classes=2)

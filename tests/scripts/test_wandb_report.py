"""The report of scripts/wandb_report.py, built without a server."""

import builtins
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts import wandb_report


def specification(tmp_path, *words):
    pytest.importorskip("wandb_workspaces", reason="pip install -e '.[report]'")
    path = tmp_path / "report.json"
    wandb_report.main([*words, "--json", str(path)])
    return [block["metadata"] for block in json.loads(path.read_text())["blocks"] if block["type"] == "panel-grid"]


def test_the_report_compares_groups_with_the_published_value_by_steps_seconds_and_epochs(tmp_path):
    results, curves, costs, differences = specification(tmp_path, "classification", "--data", "trec")

    def panels(grid):
        return [(panel["viewType"], panel["config"]) for panel in grid["panelBankSectionConfig"]["panels"]]

    bars, above = (config for _, config in panels(results))
    assert bars["metrics"] == ["test/accuracy", "published/test/accuracy"]
    assert above["metrics"] == ["difference/test/accuracy"]
    lines = [config for kind, config in panels(curves) if kind == "Run History Line Plot"]
    assert [line["xAxis"] for line in lines[:3]] == ["trainer/global_step", "seconds", "epoch"]
    assert all(line["metrics"] == ["val/accuracy", "published/test/accuracy"] for line in lines[:3])
    costly = {name for _, config in panels(costs) for name in config.get("metrics", [])}
    assert {"examples_per_second", "tokens_per_second", "seconds_per_epoch", "peak_memory_mb"} <= costly
    assert [config["yAxis"] for kind, config in panels(costs) if kind == "Scatter Plot"] == [
        "summary:test/accuracy"
    ] * 2
    for _, config in panels(results) + panels(costs):
        assert config.get("groupBy", "group") == "group"
    assert [kind for kind, _ in panels(differences)] == [
        "Parallel Coordinates Plot",
        "Parameter Importance",
        "Run Comparer",
    ]
    columns = [column["accessor"] for column in panels(differences)[0][1]["columns"]]
    assert {"config:depth.value", "config:task.value.optimizer.lr"} <= set(columns)


def test_the_report_is_of_one_task_grouped_and_sorted_by_its_metric(tmp_path):
    grids = specification(tmp_path, "speech", "--data", "fsdd_strings")
    for grid in grids:
        (runs,) = grid["runSets"]
        assert [f["value"] for f in runs["filters"]["filters"]] == [["speech"], ["fsdd_strings"]]
        (key,) = runs["sort"]["keys"]
        assert key == {"key": {"section": "summary", "name": "test/wer"}, "ascending": True}  # fewer errors first
        assert runs["runFeed"]["columnOrder"][0] == "summary:test/wer"
        assert {"summary:parameters", "summary:commit"} <= set(runs["runFeed"]["columnOrder"])
    assert [bool(grid["runSets"][0]["grouping"]) for grid in grids] == [True, False, False, False]
    assert grids[0]["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]


@pytest.mark.parametrize(
    ("words", "metric", "rising"),
    [
        (["lm"], "test/bpc", False),
        (["lm", "--metric", "test/perplexity"], "test/perplexity", False),
        (["squad"], "test/em", True),
        (["translation"], "test/bleu", True),  # which is not what its best epoch is chosen by
    ],
)
def test_the_report_has_the_metric_and_direction_of_the_papers(tmp_path, words, metric, rising):
    (runs,) = specification(tmp_path, *words)[0]["runSets"]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": metric}, "ascending": not rising}]


def test_every_metric_of_the_report_is_one_that_runs_log(tmp_path):
    """By the names in tasks/; of a task whose test says something else than its monitor, --metric tells."""
    grids = specification(tmp_path, "lm", "--metric", "test/bpc")
    text = json.dumps(grids)
    source = " ".join(path.read_text() for path in (ROOT / "tasks").rglob("*.py"))
    for name in (
        "seconds_per_epoch",
        "encoder_seconds_per_epoch",
        "peak_memory_mb",
        "best_epoch",
        "encoder_parameters",
    ):
        assert name in text
        assert f'"{name}"' in source
    assert '"published/test/bpc"' in text
    units = re.findall(r'    unit = "(\w+)"', source)
    assert {f"{name}_per_second" for name in units} == set(wandb_report.SPEEDS)


def test_a_missing_package_is_answered_by_the_command_to_install_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("wandb_workspaces"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SystemExit, match=r"pip install -e '.\[report\]'"):
        wandb_report.main(["lm", "--json", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, "type `wandb login`"),
        pytest.param("x" * 40, "Are you online", marks=pytest.mark.slow),
    ],
)
def test_without_a_login_or_a_network_an_error_says_so(tmp_path, key, expected):
    pytest.importorskip("wandb_workspaces", reason="pip install -e '.[report]'")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment |= {"WANDB_API_KEY": key} if key else {}
    done = subprocess.run(
        [sys.executable, "scripts/wandb_report.py", "classification"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_task_is_refused_by_the_list_of_tasks(capsys):
    with pytest.raises(SystemExit):
        wandb_report.main(["clasification"])
    assert "classification" in capsys.readouterr().err

"""The table and the learning curves of scripts/results.py, on small run folders whose numbers are worked by hand."""

import copy
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import results
import yaml
from reporting.curves import shorten_labels
from reporting.runs import find_runs, group_runs, read_runs

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "seed": 1,
    "depth": 2,
    "width": 128,
    "run_dir": "",
    "resume": None,
    "paper": None,
    "choices": {"task": "classification", "data": "cr", "model": "sru", "ablation": [], "experiment": None},
    "data": {"root": "/a", "cache": "/b", "fold": 0, "seed": 1, "vectors": None, "batch_size": 32},
    "model": {"hidden_size": 128, "num_layers": 2, "has_vc_term": True},
    "task": {"optimizer": {"lr": 0.001}},
    "trainer": {"max_epochs": 100, "callbacks": [], "logger": [], "default_root_dir": ""},
    "callbacks": {"best": {"dirpath": ""}},
    "loggers": {},
}
PAPER = {"source": "SRU (2018), Table 1", "metric": "test/accuracy", "value": {"cr": 84.9, "mr": 82.3}}


def write_run(folder, accuracy, changes=(), curve=((1.0, 50.0), (2.0, 60.0)), **record):
    """A finished run; changes are (dotted key, value) pairs, curve the (seconds, val/accuracy) of each epoch."""
    config = copy.deepcopy(CONFIG)
    config["run_dir"] = config["trainer"]["default_root_dir"] = config["callbacks"]["best"]["dirpath"] = str(folder)
    config["trainer"]["callbacks"] = [config["callbacks"]["best"]]
    config["trainer"]["logger"] = [{"path": f"{folder}/metrics.csv"}]
    for key, value in dict(changes).items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    default = {
        "metrics": {"val/accuracy": 70.0, "test/accuracy": accuracy},
        "monitor": "val/accuracy",
        "encoder_parameters": 203776,
        "seconds_per_epoch": 1.0,
    }
    (folder / "metrics.json").write_text(json.dumps(default | record))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epoch", "seconds", "val/accuracy", "test/accuracy"])
        writer.writeheader()
        for epoch, (seconds, value) in enumerate(curve):
            writer.writerow({"step": epoch, "epoch": epoch, "seconds": seconds, "val/accuracy": value})
        writer.writerow({"step": len(curve), "epoch": len(curve), "test/accuracy": accuracy})


def show(capsys, *arguments):
    """Exit code, the table as a list of {column: cell}, standard output and standard error."""
    code, message = 0, ""
    try:
        results.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code, message = 1, str(stop.code)
    out, err = capsys.readouterr()
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines() if line.startswith("|")
    ]
    return code, [dict(zip(lines[0], line, strict=True)) for line in lines[2:]], out, err + message


def test_mean_spread_and_difference_are_those_worked_by_hand(tmp_path, capsys):
    for fold, accuracy in enumerate([84.0, 85.0, 89.0]):
        changes = {"seed": fold, "data.seed": fold, "data.fold": fold, "paper": PAPER}
        write_run(tmp_path / str(fold), accuracy, changes, seconds_per_epoch=1.0 + fold)
    code, rows, out, err = show(capsys, tmp_path)
    # Mean 258 / 3 = 86; squares 4 + 1 + 9 = 14, over n - 1 = 2 is 7, whose root is 2.6458; 86 - 84.9 = 1.1.
    assert rows == [
        {
            "task": "classification",
            "data": "cr",
            "model": "sru",
            "depth": "2",
            "ablation": "",
            "vectors": "random",
            "metric": "test/accuracy",
            "mean": "86.00",
            "std": "2.65",
            "n": "3",
            "parameters": "203,776",
            "s/epoch": "2.00",
            "published": "84.9",
            "difference": "+1.10",
        }
    ]
    assert code == 0
    assert err == ""
    assert "Published: SRU (2018), Table 1." in out
    assert "per cent" in out
    assert "repeat" not in out


def test_a_single_run_has_no_spread_and_no_published_value(tmp_path, capsys):
    write_run(tmp_path / "a", 84.0)
    _, (row,), _, _ = show(capsys, tmp_path)
    assert (row["std"], row["n"]) == ("", "1")
    assert not {"published", "difference", "differs"} & set(row)


def test_paths_progress_bars_and_loggers_do_not_separate_runs(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0)
    changes = {"data.root": "/c", "data.cache": "/d", "data.fold": 3, "resume": "x", "loggers": {"wandb": 1}}
    write_run(tmp_path / "deeper/b", 82.0, changes | {"trainer.enable_progress_bar": False})
    _, rows, _, _ = show(capsys, tmp_path)
    assert [(row["mean"], row["n"]) for row in rows] == [("81.00", "2")]


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"task.optimizer.lr": 0.01}, ["task.optimizer.lr=0.001", "task.optimizer.lr=0.01"]),
        ({"width": 256, "model.hidden_size": 256}, ["width=128", "width=256"]),
        ({"model.n": 3, "data.batch_size": 8}, ["data.batch_size=32", "data.batch_size=8, model.n=3"]),
    ],
)
def test_rows_with_equal_names_list_the_options_that_differ(tmp_path, capsys, changes, differs):
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 82.0, changes)
    write_run(tmp_path / "c", 70.0, {"depth": 4, "task.optimizer.lr": 0.1})
    _, rows, _, _ = show(capsys, tmp_path)
    assert [row["differs"] for row in rows] == [*differs, ""]


def test_runs_whose_epoch_was_chosen_by_another_metric_have_their_own_row(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0, {"paper": PAPER})
    write_run(tmp_path / "b", 82.0, {"paper": PAPER}, monitor="val/loss")
    _, rows, _, _ = show(capsys, tmp_path)
    assert [row["differs"] for row in rows] == ["monitor=val/accuracy", "monitor=val/loss"]


def test_vectors_have_a_column_of_their_own(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 82.0, {"data.vectors": "word2vec"})
    _, rows, _, _ = show(capsys, tmp_path)
    assert [(row["vectors"], row["mean"]) for row in rows] == [("random", "80.00"), ("word2vec", "82.00")]
    assert "differs" not in rows[0]


def test_rows_are_sorted_and_the_order_of_ablations_makes_no_difference(tmp_path, capsys):
    write_run(tmp_path / "a", 1.0, {"depth": 10})
    write_run(tmp_path / "b", 1.0, {"choices.data": "mr"})
    write_run(tmp_path / "c", 1.0, {"choices.model": "lstm"})
    write_run(tmp_path / "d", 1.0, {"choices.ablation": ["no_vc", "no_highway"]})
    write_run(tmp_path / "e", 1.0, {"choices.ablation": ["no_highway", "no_vc"], "seed": 2})
    write_run(tmp_path / "f", 1.0)
    _, rows, _, _ = show(capsys, tmp_path)
    assert [(row["data"], row["model"], row["depth"], row["ablation"], row["n"]) for row in rows] == [
        ("cr", "lstm", "2", "", "1"),
        ("cr", "sru", "2", "", "1"),
        ("cr", "sru", "2", "no_highway no_vc", "2"),
        ("cr", "sru", "10", "", "1"),
        ("mr", "sru", "2", "", "1"),
    ]


def test_the_published_value_is_that_of_the_data_set(tmp_path, capsys):
    write_run(tmp_path / "a", 82.0, {"choices.data": "mr", "paper": PAPER})
    write_run(tmp_path / "b", 90.0, {"choices.data": "subj", "paper": PAPER})
    _, rows, _, _ = show(capsys, tmp_path)
    assert [(row["published"], row["difference"]) for row in rows] == [("82.3", "-0.30"), ("", "")]


def test_an_unverified_value_is_marked_and_explained(tmp_path, capsys):
    paper = {"source": "Table 4", "metric": "test/bpc", "value": 1.26, "verified": False}
    metrics = {"val/bpc": 1.3, "test/bpc": 1.2712, "test/accuracy": 70.0}
    write_run(tmp_path / "a", 0.0, {"paper": paper}, metrics=metrics, monitor="val/bpc")
    _, (row,), out, _ = show(capsys, tmp_path)
    assert (row["metric"], row["mean"], row["published"], row["difference"]) == ("test/bpc", "1.271", "1.26?", "+0.011")
    assert "not verified" in out


def test_translators_chosen_by_their_loss_are_reported_by_bleu(tmp_path, capsys):
    metrics = {"val/loss": 1.6, "test/loss": 1.7, "test/perplexity": 5.5, "test/bleu": 37.77, "test/chrf": 61.8}
    write_run(tmp_path / "a", 0.0, metrics=metrics, monitor="val/loss")
    _, (row,), _, _ = show(capsys, tmp_path)
    assert (row["metric"], row["mean"]) == ("test/bleu", "37.77")


def test_a_run_without_test_value_shows_its_marked_validation_value_in_its_own_row(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0, {"paper": PAPER})
    write_run(tmp_path / "b", 0.0, {"paper": PAPER, "seed": 2}, metrics={"val/accuracy": 70.0})
    _, rows, out, _ = show(capsys, tmp_path)
    assert [(row["metric"], row["mean"], row["n"], row["difference"]) for row in rows] == [
        ("test/accuracy", "80.00", "1", "-4.90"),
        ("val/accuracy †", "70.00", "1", ""),
    ]
    assert "no test value" in out


def test_repeated_seeds_and_folds_are_counted(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 80.0)
    _, rows, out, _ = show(capsys, tmp_path)
    assert rows[0]["n"] == "2"
    assert "in their group: 1." in out


def test_a_diverged_run_has_the_mean_nan(tmp_path, capsys):
    write_run(tmp_path / "a", float("nan"))
    write_run(tmp_path / "b", float("inf"), {"seed": 2})
    code, (row,), _, _ = show(capsys, tmp_path)
    assert (code, row["mean"], row["n"]) == (0, "nan", "2")


def test_a_bar_in_a_cell_is_escaped(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0, {"data.vectors": "a|b"})
    _, (row,), _, _ = show(capsys, tmp_path)
    assert row["vectors"] == r"a\|b"


def test_unfinished_runs_are_named_below_the_table(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 90.0)
    (tmp_path / "b/metrics.json").unlink()
    code, rows, out, _ = show(capsys, tmp_path)
    assert code == 0
    assert [row["mean"] for row in rows] == ["80.00"]
    assert "1 unfinished" in out
    assert f"- `{tmp_path / 'b'}`" in out


def test_debug_runs_are_counted_and_left_out(tmp_path, capsys):
    write_run(tmp_path / "a", 20.0, {"trainer.limit_test_batches": 2})
    code, rows, out, err = show(capsys, tmp_path)
    assert (code, rows) == (1, [])
    assert "1 tested in part (on a few batches only" in out
    assert "python train.py data=" in err
    write_run(tmp_path / "b", 80.0, {"trainer.limit_test_batches": None})
    code, rows, out, _ = show(capsys, tmp_path)
    assert (code, [row["mean"] for row in rows]) == (0, ["80.00"])
    assert f"- `{tmp_path / 'a'}`" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "depth: [", "flow"),
        ("config.yaml", "just text", "string indices"),
        ("config.yaml", "seed: 1", "no 'choices'"),
        ("metrics.json", '{"metrics": {', "line 1"),
        ("metrics.json", '{"metrics": {}, "monitor": "val/accuracy"}', "no 'test/accuracy'"),
        ("metrics.json", "[]", "list"),
        ("metrics.json", "[" * 100_000, "recursion"),
        ("metrics.json", '{"metrics": {"test/accuracy": 1%s}, "monitor": "val/accuracy"}' % ("0" * 400), "too large"),
        ("metrics.json", "\udcff", "utf-8"),
    ],
)
def test_a_damaged_file_is_named_and_other_runs_are_shown(tmp_path, capsys, name, content, message):
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 90.0)
    (tmp_path / "b" / name).write_text(content, errors="surrogateescape")
    code, rows, out, err = show(capsys, tmp_path)
    assert code == 0
    assert [row["mean"] for row in rows] == ["80.00"]
    assert f"skipped: {tmp_path / 'b' / name}: " in err
    assert message in err
    assert "1 damaged" in out


def test_folders_of_hydra_and_wandb_are_not_runs_and_a_folder_counts_once(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0)
    for folder in ("a/.hydra", "a/wandb/run-1/files"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("seed: 1")
    _, rows, out, err = show(capsys, tmp_path, tmp_path / "a/../a")
    assert [row["n"] for row in rows] == ["1"]
    assert "unfinished" not in out
    assert err == ""


def test_the_output_file_has_the_printed_table(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 80.0)
    _, _, out, _ = show(capsys, tmp_path / "runs", "--output", tmp_path / "new/table.md")
    assert (tmp_path / "new/table.md").read_text(encoding="utf-8") == out
    (tmp_path / "folder.md").mkdir()
    assert show(capsys, tmp_path / "runs", "--output", tmp_path / "folder.md")[0] == 1


def test_a_curve_is_the_mean_of_both_axes_over_the_epochs_that_all_runs_have(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def watched(self, *values, **options):
        drawn.append((options["label"], values))
        return plot(self, *values, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    write_run(tmp_path / "a", 80.0, curve=[(1.0, 50.0), (2.0, 60.0), (3.0, 90.0)])
    write_run(tmp_path / "b", 80.0, {"seed": 2}, curve=[(3.0, 52.0), (6.0, 64.0)])
    results.main([str(tmp_path), "--png", str(tmp_path / "curves.png")])
    ((label, (x, y, _)),) = drawn
    assert label == "sru, 2 layers"
    assert list(x) == [2.0, 4.0]
    assert list(y) == [51.0, 62.0]


def test_the_png_has_a_panel_a_data_set_and_a_line_a_group(tmp_path, monkeypatch, capsys):
    from matplotlib import image
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def watched(self, *values, **options):
        figures.append(self)
        return savefig(self, *values, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 80.0, {"choices.model": "lstm"})
    write_run(tmp_path / "c", 80.0, {"choices.data": "mr"})
    path = tmp_path / "new/curves.png"
    results.main([str(tmp_path), "--png", str(path)])
    assert f"{path} was drawn" in capsys.readouterr().err
    axes = figures[0].axes
    assert [(panel.get_title(), len(panel.lines)) for panel in axes] == [("cr", 2), ("mr", 1)]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["lstm, 2 layers", "sru, 2 layers"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("training time (s)", "val/accuracy")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] > 100
    assert pixels[..., :3].std() > 0.01
    results.main([str(tmp_path), "--png", str(path), "--curve", "epoch"])
    panel = figures[1].axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("steps", "epoch")
    assert [list(line.get_xdata()) for line in panel.lines] == [[0, 1], [0, 1]]


def test_labels_name_only_options_that_distinguish_the_curves(tmp_path):
    write_run(tmp_path / "a", 80.0, {"callbacks.best.patience": 9, "model.forget_bias": 1.0, "width": 64})
    write_run(tmp_path / "b", 80.0, {"callbacks.best.patience": 8, "model.forget_bias": 2.0, "width": 64})
    write_run(tmp_path / "c", 80.0, {"choices.model": "lstm", "data.vectors": "word2vec"})
    groups = group_runs(read_runs(find_runs([tmp_path])).runs)
    names = ["lstm, 2 layers, word2vec", "sru, 2 layers, random, model.forget_bias=1.0"]
    assert shorten_labels(groups) == [*names, "sru, 2 layers, random, model.forget_bias=2.0"]


def test_a_damaged_curve_is_named_and_its_row_stays(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0)
    write_run(tmp_path / "b", 82.0, {"seed": 2})
    (tmp_path / "b/metrics.csv").write_text("epoch,seconds,val/accuracy\n0,one,2\n")
    code, rows, _, err = show(capsys, tmp_path, "--png", tmp_path / "c.png")
    assert (code, rows[0]["n"]) == (0, "2")
    assert f"no curve: {tmp_path / 'b/metrics.csv'}: " in err
    assert (tmp_path / "c.png").exists()


def test_without_any_curve_a_message_says_that_nothing_was_drawn(tmp_path, capsys):
    write_run(tmp_path / "a", 80.0, curve=())
    _, rows, _, err = show(capsys, tmp_path, "--png", tmp_path / "c.png")
    assert len(rows) == 1
    assert "was not drawn" in err
    assert not (tmp_path / "c.png").exists()


def test_a_missing_matplotlib_is_answered_by_the_command_to_install_it(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "a", 80.0)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, rows, _, err = show(capsys, tmp_path, "--png", tmp_path / "c.png")
    assert (code, len(rows)) == (1, 1)
    assert "pip install -e '.[train]'" in err


def test_without_runs_an_error_names_the_command_to_type(tmp_path, capsys):
    assert show(capsys, tmp_path / "absent")[0] == 1
    code, _, out, err = show(capsys, tmp_path)
    assert (code, out) == (1, "")
    assert str(tmp_path) in err
    assert "python train.py" in err
    write_run(tmp_path / "a", 80.0)
    (tmp_path / "a/metrics.json").unlink()
    code, _, out, err = show(capsys, tmp_path)
    assert code == 1
    assert "1 unfinished" in out
    assert "resume=" in err


def test_the_command_line_exits_with_the_code(tmp_path):
    def command(*arguments):
        words = [sys.executable, ROOT / "scripts/results.py", *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert command(tmp_path).returncode == 1
    assert command().returncode == 2
    write_run(tmp_path / "a", 80.0)
    done = command(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("| task | data | model |")


def test_importing_needs_neither_torch_nor_matplotlib():
    code = "import sys, results; assert not {'torch', 'matplotlib', 'hydra', 'sru'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", check=True)

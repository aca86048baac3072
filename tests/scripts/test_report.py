"""The rows of the papers and the page of scripts/results.py; tests/scripts/test_report_browser.py opens it."""

import html.parser
import json
import math
import re
import sys
import time

import pytest
import results
from conftest import ROOT
from omegaconf import OmegaConf
from reporting import markdown, paper_rows
from reporting.runs import find_runs, read_runs
from test_results import write_run

EVIL = "<script>alert(1)</script>\"'&"
BENCH = {
    "machines": [{"device": "cpu <x>"}],
    "levels": {
        "layer": [
            {
                "shape": [32, 16, 256],
                "mode": "fp32",
                "cells": {
                    "SRU": {"infer": {"eager": {"median": 0.0015}}, "train": {"eager": {"median": 0.004}}},
                    "LSTM": {"infer": {"eager": {"median": 0.003}}, "train": {"failed": "no"}},
                },
            }
        ]
    },
}


@pytest.fixture(scope="module")
def rows():
    """Makes the rows of one experiment afresh."""
    made = paper_rows.compose_rows("classification_sru_2l")
    return lambda: [
        paper_rows.Row(**vars(row) | {"runs": [], "others": {}, "substitutes": set(), "std": None}) for row in made
    ]


@pytest.fixture
def write_row(configure, tmp_path):
    """write_row(name, accuracy, *overrides): a finished run, as train.py leaves it, of that experiment."""

    def write(name, accuracy, *overrides):
        cfg = configure("experiment=classification_sru_2l", *overrides)
        folder = tmp_path / "runs" / name
        write_run(folder, accuracy, seconds=1800.0, examples_per_second=700.0)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        origin = {"overrides": [f"run_dir={folder}", *overrides], "machine": "cpu", "threads": 2, "torch": "2.13"}
        (folder / "run.json").write_text(json.dumps(origin))
        return folder

    return write


def found(*paths):
    return read_runs(find_runs(list(paths)))


def report(tmp_path, rows, monkeypatch, *paths):
    monkeypatch.setattr(paper_rows, "compose_rows", rows)
    results.main([*map(str, paths), "--html", str(tmp_path / "new/report.html")])
    return (tmp_path / "new/report.html").read_text(encoding="utf-8")


def test_a_run_counts_for_a_row_with_all_its_options_and_is_otherwise_listed_below(tmp_path, rows, write_row):
    write_row("a", 84.0, "seed=1", "data.fold=3", "data.root=/elsewhere")
    write_row("b", 86.0, "trainer.accelerator=cpu")
    write_row("c", 99.0, "epochs=3")
    write_row("d", 99.0, "data.vectors=null", "callbacks.clock.max_seconds=900")
    cr, subj, *_ = paper_rows.match(rows(), found(tmp_path).runs)
    assert (cr.data, len(cr.runs), cr.state) == ("cr", 2, "reached")  # 85.0 on average, 84.9 published
    assert {differs: len(runs) for differs, runs in cr.others.items()} == {
        "epochs=3": 1,
        "callbacks.clock.max_seconds=900, data.vectors=null": 1,
    }
    assert (subj.data, subj.runs, subj.others, subj.state) == ("subj", [], {}, "not run")


def test_a_row_with_other_vectors_is_run_with_substitutes(tmp_path, rows, write_row):
    """Neither reached nor missed; without pretrained vectors, or stopped early, it is another experiment."""
    glove = ("data.vectors=glove.6B.100d",)
    write_row("a", 99.0, *glove, "seed=1")
    write_row("b", 97.0, *glove, "seed=2")
    write_row("c", 50.0, "data.vectors=null")
    write_row("d", 60.0, *glove, "trainer=patient")
    cr = paper_rows.match(rows(), found(tmp_path).runs)[0]
    assert (cr.state, cr.substitute, len(cr.counted_runs)) == ("run with substitutes", "data.vectors=glove.6B.100d", 2)
    assert len(cr.others) == 3
    write_row("e", 84.9)
    cr = paper_rows.match(rows(), found(tmp_path).runs)[0]
    assert (cr.state, cr.substitute, len(cr.counted_runs)) == ("reached", "", 1)


def test_the_order_of_a_tables_rows_is_judged_by_pairs_and_ranks(rows):
    cr = rows()[0]

    def row(value, *accuracies, substitute=""):
        runs = [type("Run", (), {"record": {"metrics": {cr.metric: accuracy}}}) for accuracy in accuracies]
        made = paper_rows.Row(**vars(cr) | {"value": value, "runs": [] if substitute else runs})
        made.others, made.substitutes = ({substitute: runs}, {substitute}) if substitute else ({}, set())
        return made

    table = [row(80.0, 70.0, 72.0), row(81.0, 75.0), row(82.0, 74.0), row(82.0, 76.0), row(83.0)]
    (sentence,) = paper_rows.judge_orders(table)
    # Of five pairs with different values one is the other way around: 81 was ahead of one 82.
    assert sentence == (
        "SRU (2018), Table 1, cr, test/accuracy: 4 of 5 pairs of rows come in the published order, "
        "rank correlation 0.63."  # ranks 1, 2, 3.5, 3.5 and 1, 3, 2, 4: 3 / sqrt(4.5 * 5)
    )
    assert paper_rows.judge_orders(table[:2]) == []
    others = [row(80.0 + i, 70.0 + i, substitute="data.vectors=x") for i in range(3)]
    (sentence,) = paper_rows.judge_orders([*table[:2], *others])
    assert "with data.vectors=x: 3 of 3 pairs" in sentence


def test_a_run_by_several_processes_is_a_row_where_their_batches_are_the_published_one(tmp_path, rows, write_row):
    several = ("trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2")
    write_row("a", 84.0, *several, "data.batch_size=4")  # 32 together
    write_row("b", 84.0, *several)
    cr = paper_rows.match(rows(), found(tmp_path).runs)[0]
    assert [run.place.path.name for run in cr.runs] == ["a"]
    assert list(cr.others) == ["data.batch_size=256"]


def test_published_digits_and_places_in_a_figure_are_kept():
    (six,) = paper_rows.compose_rows("enwik8_sru_6l")
    assert (paper_rows.format_published(six), paper_rows.judge(six, 1.304)) == ("1.30?", "reached")
    one = paper_rows.compose_rows("enwik8_srupp_one_attention")
    assert [(row.value, row.words[-1]) for row in one][::9] == [
        (1.173, "model.attention_layers=[0]"),
        (1.053, "model.attention_layers=[9]"),
    ]
    two = paper_rows.compose_rows("enwik8_srupp_two_attentions")
    assert [(paper_rows.format_published(row), row.words[-1]) for row in two][4] == (
        "1.050",
        "model.attention_layers=[5,9]",
    )
    assert len(two) == 8  # of nine places the figure leaves out the first


def test_a_run_with_the_same_options_counts_and_one_without_the_metric_does_not(tmp_path, rows, write_row):
    write_row("a", 80.0)
    path = write_row("b", 80.0) / "metrics.json"
    path.write_text(path.read_text().replace("test/accuracy", "test/f1"))
    config = tmp_path / "runs/a/config.yaml"
    config.write_text(config.read_text().replace("experiment: classification_sru_2l", "experiment: null"))
    cr = paper_rows.match(rows(), found(tmp_path).runs)[0]
    assert (len(cr.runs), cr.state) == (1, "not reached")
    assert list(cr.others) == ["no test/accuracy"]


@pytest.mark.parametrize(
    ("metric", "value", "std", "mean", "state"),
    [
        ("test/accuracy", 84.9, None, 84.86, "reached"),
        ("test/accuracy", 84.9, None, 84.84, "not reached"),
        ("test/accuracy", 82.0, None, 81.6, "not reached"),
        ("test/accuracy", 84.9, 1.6, 83.4, "reached"),
        ("test/accuracy", 84.9, 1.6, 83.2, "not reached"),
        ("test/em", 71.4, None, 80.0, "reached"),
        ("test/bpc", 1.19, None, 1.194, "reached"),
        ("test/bpc", 1.19, None, 1.2, "not reached"),
        ("test/bpc", 1.3, None, 1.345, "not reached"),  # published as 1.30
        ("test/perplexity", 60.3, None, 20.0, "reached"),
        ("test/accuracy", 84.9, None, math.nan, "not reached"),
    ],
)
def test_reached_is_no_worse_to_the_published_digits_or_within_the_deviation(rows, metric, value, std, mean, state):
    row = rows()[0]
    row.metric, row.value, row.std, row.digits = metric, value, std, 2 if "bpc" in metric else 1
    assert paper_rows.judge(row, mean) == state


def test_every_published_number_has_its_row():
    rows = paper_rows.compose_rows("squad_sru_*")
    assert [(row.value, row.verified) for row in rows if row.experiment == "squad_sru_4l_no_vc"] == [(70.6, False)]
    assert {row.experiment for row in rows} == {
        path.stem for path in (ROOT / "conf/experiment").glob("squad_sru_*.yaml")
    }
    assert {(row.task, row.data, row.metric) for row in rows} == {("squad", "squad", "test/em")}
    assert paper_rows.compose_rows("multi30k_sru") == []


def test_the_table_of_the_papers_has_state_difference_hours_and_command(tmp_path, rows, write_row, monkeypatch, capsys):
    write_row("a", 84.0, "seed=1")
    write_row("b", 87.0, "seed=2")
    write_row("c", 99.0, "epochs=3")
    monkeypatch.setattr(paper_rows, "compose_rows", rows)
    results.main([str(tmp_path), "--papers", "--output", str(tmp_path / "table.md")])
    out = capsys.readouterr().out
    head, _, cr, other, subj, *_ = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.split("\n")]
    cr, other, subj = (dict(zip(head, line, strict=True)) for line in (cr, other, subj))
    assert (cr["mean"], cr["std"], cr["n"], cr["difference"]) == ("85.50", "2.12", "2", "+0.60")
    assert (cr["hours"], cr["hardware"]) == ("0.5", "cpu, 2 threads, torch 2.13")
    assert (other["row"], other["mean"], other["state"]) == ("– with epochs=3", "99.00", "–")
    assert (subj["state"], subj["mean"]) == ("not run", "")
    assert subj["command"] == "`python train.py experiment=classification_sru_2l data=subj`"
    assert "6 rows of the papers: 1 reached, 0 not reached, 0 run with substitutes, 5 not run." in out
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == out


class Balanced(html.parser.HTMLParser):
    """Fails where an element is closed that is not open; keeps what is loaded from elsewhere."""

    VOID = ("meta", "input")

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for key, value in attrs if key in ("src", "href", "srcset") and not value.startswith("#")]
        self.scripts += tag == "script"
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_charts(text):
    """The specifications that the page gives to Plotly."""
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', text)[1])


def test_the_page_is_valid_loads_nothing_and_escapes_names(tmp_path, rows, write_row, monkeypatch):
    write_row("a", 84.0, "seed=1")
    write_row("c", 99.0, "epochs=3")
    write_run(tmp_path / "runs/e", 50.0, {"choices.model": EVIL, "choices.data": EVIL, "choices.task": EVIL})
    write_run(tmp_path / "runs/f", 50.0, {"choices.model": "sru", "width": EVIL}, examples_per_second=1.0)
    write_run(tmp_path / "runs/g", 50.0, {"choices.model": "sru", "width": 3})
    text = report(tmp_path, rows, monkeypatch, tmp_path / "runs")
    page = Balanced()
    page.feed(text)
    page.close()
    assert (page.open, page.loaded, page.scripts) == ([], [], 3)  # Plotly, the charts, the filters
    assert "alert(1)" in text
    assert "<script>alert" not in text
    traces = [trace for chart in read_charts(text) for trace in chart["data"]]
    assert any("alert(1)" in trace["name"] for trace in traces)
    assert not any("<script" in trace["name"] for trace in traces)
    row = (
        r'<tr data-task="classification" data-model="sru" data-state="not reached"><td class="state">✗ not reached</td>'
    )
    assert re.search(row, text)
    assert '<tr data-task="classification" data-model="sru" data-state="not reached" class="other">' in text
    assert "↳ with epochs=3" in text
    assert text.count('data-state="not run"><td') == 5
    assert text.index("Finished runs, in groups") < text.index("↳ with epochs=3") < text.index('data-state="not run"')
    assert '<option value="classification">' in text


def test_the_page_shows_curves_parts_and_speed_of_runs(tmp_path, rows, monkeypatch):
    for i, parts in enumerate([[], ["no_vc"], ["no_highway"], ["no_scaling"]]):
        for seed in (1, 2):
            changes = {"choices.ablation": parts, "seed": seed, "model.has_vc_term": "no_vc" not in parts}
            folder = tmp_path / f"runs/{i}{seed}"
            write_run(folder, 80.0 - i + seed, changes, examples_per_second=1234.0)
    write_run(tmp_path / "runs/lstm", 70.0, {"choices.model": "lstm"}, curve=[(1.0, math.nan), (2.0, 3.0)])
    write_run(tmp_path / "runs/left", 70.0)
    (tmp_path / "runs/left/metrics.json").unlink()
    (tmp_path / "runs/failed").mkdir()
    (tmp_path / "runs/failed/failed.json").write_text('{"error": "why"}')
    text = report(tmp_path, rows, monkeypatch, tmp_path / "runs")
    curves, parts, speed = read_charts(text)
    assert [trace["meta"]["model"] for trace in curves["data"]] == ["lstm", *["sru"] * 4]
    lstm, sru, *_ = curves["data"]
    assert (lstm["x"], lstm["y"], lstm["meta"]["steps"]) == ([1.0, 2.0], [None, 3.0], [0.0, 1.0])
    assert (sru["x"], sru["y"], sru["name"]) == ([1.0, 2.0], [50.0, 60.0], "sru, 2 layers, random (2 runs)")
    assert (curves["layout"]["xaxis"]["title"]["text"], curves["layout"]["meta"]["steps"]) == (
        "training time (s)",
        "steps of the optimiser",
    )
    assert [trace["name"] for trace in parts["data"]] == ["full", "no_vc", "no_highway", "no_scaling"]
    full = parts["data"][0]
    assert (full["x"], full["y"], full["text"]) == (["2 layers"], [81.5], ["81.5 ± 0.71, n=2"])
    assert full["error_y"]["array"] == [pytest.approx(math.sqrt(0.5))]
    # From 78.5 - 0.71 to 81.5 + 0.71, and a third of that below.
    assert parts["layout"]["yaxis"]["range"][0] == pytest.approx(77.793 - 0.35 * 4.414, abs=0.01)
    assert "the axis starts at 76.2" in parts["layout"]["yaxis"]["title"]["text"]
    assert [(trace["x"], trace["text"]) for trace in speed["data"]] == [([1234.0], ["1,234 examples/s, n=2, on ?"])] * 4
    assert "whole runs logged" in text
    left_out = text.split('<section id="runs-left-out">')[1]
    for state, name in (("unfinished", "left"), ("failed", "failed")):
        assert re.search(rf'<td class="state">{state}</td>.*<td class="run">\S*/runs/{name}</td>', left_out)


def test_speed_comes_from_the_benchmark_where_there_is_one(tmp_path, rows, monkeypatch, capsys):
    write_run(tmp_path / "runs/a", 70.0, examples_per_second=1234.0)
    (tmp_path / "cpu.json").write_text(json.dumps(BENCH))
    (tmp_path / "bad.json").write_text("[]")
    text = report(tmp_path, rows, monkeypatch, tmp_path / "runs", tmp_path / "cpu.json", tmp_path / "bad.json")
    assert "One layer: 32 steps, 16 sequences, 256 features, fp32" in text
    assert "cpu &lt;x&gt;" in text
    _, speed = read_charts(text)
    bars = [(trace["name"], trace["meta"]["model"], trace["x"], trace["y"]) for trace in speed["data"]]
    assert bars == [("SRU", "sru", ["forward", "and backward"], [1.5, 4.0]), ("LSTM", "lstm", ["forward"], [3.0])]
    assert "whole runs logged" not in text
    assert f"skipped: {tmp_path / 'bad.json'}" in capsys.readouterr().err


def test_two_hundred_runs_make_a_page_of_sensible_size(tmp_path, rows, monkeypatch):
    from plotly.offline import get_plotlyjs

    curve = [(i * 1.234567, 50 + math.sin(i)) for i in range(300)]
    for i in range(200):
        write_run(tmp_path / f"runs/{i}", 50.0 + i / 100, {"width": i // 2, "seed": i}, curve=curve)
    start = time.perf_counter()
    text = report(tmp_path, rows, monkeypatch, tmp_path / "runs")
    assert len(text.encode()) - len(get_plotlyjs().encode()) < 3_000_000
    assert time.perf_counter() - start < 60
    assert [len(trace["x"]) for trace in read_charts(text)[0]["data"]] == [150] * 100


def test_a_missing_plotly_is_answered_by_the_command_to_install_it(tmp_path, rows, monkeypatch):
    for name in ("reporting.html", "reporting.figures", "plotly.graph_objects"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(paper_rows, "compose_rows", rows)
    with pytest.raises(SystemExit, match=r"this needs plotly\S*: pip install -e '\.\[train\]'"):
        results.main([str(tmp_path), "--html", str(tmp_path / "report.html")])
    assert not list(tmp_path.iterdir())


def test_a_page_without_runs_says_so(tmp_path, rows, monkeypatch):
    text = report(tmp_path, rows, monkeypatch, tmp_path)
    assert "0 reached, 0 not reached, 0 run with substitutes, 6 not run. 0 finished runs." in text
    assert "No run here has a learning curve." in text


def test_a_row_of_the_training_loss_has_the_value_that_training_ended_with(configure, tmp_path):
    (row,) = paper_rows.compose_rows("scaling_sru_5l")
    folder = tmp_path / "a"
    write_run(folder, 80.0)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(configure("experiment=scaling_sru_5l"), resolve=True))
    (folder / "metrics.csv").write_text("step,seconds,train/loss,test/loss\n50,1.0,0.69,\n100,2.0,0.25,\n100,,,0.5\n")
    (row,) = paper_rows.match([row], found(tmp_path).runs)
    assert (paper_rows.summarise(row.metric, row.runs), row.state) == ((0.25, None), "reached")


def test_a_table_of_a_paper_is_written_into_a_page_from_kept_runs(tmp_path, write_row):
    glove = "data.vectors=glove.6B.100d"
    write_row("a", 84.0, glove, "seed=1")
    write_row("b", 85.0, glove, "seed=2")
    write_row("c", 90.0, glove, "data=trec", "data.lowercase=true")
    write_row("d", 50.0, "data.vectors=null", "data=subj")
    results.main([str(tmp_path / "runs"), "--keep", str(tmp_path / "table1.jsonl")])
    marker = '<!-- results: table1.jsonl paper="SRU (2018), Table 1" -->\n<!-- end -->\n'
    lines = markdown.fill(marker, tmp_path).splitlines()
    assert lines[2:8] == [
        "| experiment | cr | trec |",
        "| --- | ---: | ---: |",
        "| classification_sru_2l | 84.5 ± 0.7 (n = 2; 84.9 ± 1.6) | 90.0 (n = 1; 94.0 ± 0.5) |",
        "",
        "In brackets: runs, and the published value.",
        "",
    ]
    assert lines[8] == f"- With substitutes: {glove}; {glove}, data.lowercase=true."
    with pytest.raises(markdown.DamagedError, match="none is of an experiment of Nobody"):
        markdown.fill(marker.replace("SRU (2018)", "Nobody"), tmp_path)

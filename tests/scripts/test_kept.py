"""Kept runs, and the README's tables that are written from them, by scripts/results.py."""

import errno
import functools
import json
import os

import pytest
import results
from reporting import markdown
from reporting.runs import DamagedError, find_runs, group_runs, read_runs
from reporting.table import tabulate
from test_results import PAPER, write_run


def found(*paths):
    return read_runs(find_runs(list(paths)))


def test_kept_runs_equal_their_folders_without_the_paths(tmp_path, capsys):
    curve = [(float(i), i / 7) for i in range(1, 1001)]
    changes = {"data.root": "/home/anna/corpora", "data.vectors": "/home/anna/corpora/vectors/a.txt", "paper": PAPER}
    write_run(tmp_path / "runs/cr/a", 84.0, changes, curve=curve)
    write_run(tmp_path / "runs/cr/b", 86.0, changes | {"seed": 2, "data.path": "/mnt/anna/b.txt"}, curve=curve[:150])
    origin = {"machine": "cpu", "overrides": ["depth=2", "run_dir=/home/anna/x", "data.path=/mnt/anna/b.txt"]}
    (tmp_path / "runs/cr/b/run.json").write_text(json.dumps(origin | {"callbacks.best.monitor": "val/loss"}))
    file = tmp_path / "kept/cr.jsonl"
    results.main([str(tmp_path / "runs"), "--keep", str(file)])
    assert "keeps 2 runs" in capsys.readouterr().err
    text = file.read_text(encoding="utf-8")
    assert "anna" not in text
    assert str(tmp_path) not in text
    a, b = map(json.loads, text.splitlines())
    assert (a["run"], a["config.yaml"]["data"]["vectors"]) == ("runs/cr/a", "vectors/a.txt")
    assert not {"run_dir", "resume", "loggers"} & set(a["config.yaml"])
    assert "root" not in a["config.yaml"]["data"]
    assert b["config.yaml"]["data"]["path"] == "b.txt"
    assert b["run.json"]["overrides"] == ["depth=2"]
    assert a["metrics.json"] == json.loads((tmp_path / "runs/cr/a/metrics.json").read_text())
    seconds = a["metrics.csv"]["seconds"]
    assert (len(seconds), seconds[0], seconds[-1]) == (200, 1, 1000)
    assert len(b["metrics.csv"]["seconds"]) == 150
    assert found(file).runs[0].value == 84.0

    folders, kept = (found(path).runs for path in (tmp_path / "runs", file))
    assert [run.value for run in kept] == [run.value for run in folders]
    again = tmp_path / "kept/again.jsonl"
    results.main([str(file), "--keep", str(again)])
    assert again.read_text() == text


def test_a_kept_run_without_paths_of_its_own_gives_the_table_of_its_folder(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"runs/{seed}", 80.0 + seed, {"seed": seed})
    file = tmp_path / "kept.jsonl"
    results.main([str(tmp_path / "runs"), "--keep", str(file)])
    folders, kept, both = (
        tabulate(group_runs(found(*p).runs)) for p in ([tmp_path / "runs"], [file], [tmp_path, file])
    )
    assert "| 81.50 | 0.71 | 2 |" in folders
    assert folders == kept == both  # a run and its copy count once


def test_a_run_whose_metric_is_from_its_curve_equals_its_kept_copy(tmp_path):
    write_run(tmp_path / "runs/a", 80.0, {"paper": PAPER | {"metric": "train/loss"}})
    path = tmp_path / "runs/a/metrics.csv"
    path.write_text("step,seconds,train/loss\n1,1.0,0.7\n2,2.0,0.30000001\n")
    file = tmp_path / "kept.jsonl"
    results.main([str(tmp_path / "runs"), "--keep", str(file)])
    (run,) = found(tmp_path / "runs", file).runs
    assert run.value == 0.30000001


@pytest.mark.parametrize("option", ["--html", "--png", "--output", "--keep"])
def test_an_output_with_the_wrong_ending_is_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        results.main([str(tmp_path), option, str(tmp_path / "runs.csv")])
    assert f"{option} {tmp_path / 'runs.csv'} must end in ." in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_run(tmp_path / "runs/a", 80.0)
    path = tmp_path / "table.md"
    path.write_text("old")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=f"{path} cannot be read or written: No space left on device"):
        results.main([str(tmp_path / "runs"), "--output", str(path)])
    assert path.read_text() == "old"


@pytest.mark.parametrize("value", ["72", True, None])
def test_a_run_whose_metric_is_not_a_number_is_damaged(tmp_path, capsys, value):
    write_run(tmp_path / "runs/a", value)
    with pytest.raises(SystemExit, match="no finished run"):
        results.main([str(tmp_path / "runs")])
    assert "metrics.json: test/accuracy is" in capsys.readouterr().err


def test_keep_refuses_to_lose_runs_of_the_file(tmp_path):
    file, runs = tmp_path / "kept.jsonl", tmp_path / "runs"
    write_run(runs / "a", 80.0)
    results.main([str(runs), "--keep", str(file)])
    before = file.read_text()
    (runs / "a").rename(tmp_path / "elsewhere")
    write_run(runs / "b", 82.0, {"seed": 2})
    message = "has 1 runs that are not among these and would be lost; name it too, to keep both: python "
    with pytest.raises(SystemExit, match=f"{message}scripts/results.py {runs} {file} --keep {file}"):
        results.main([str(runs), "--keep", str(file)])
    assert file.read_text() == before
    results.main([str(runs), str(file), "--keep", str(file)])
    assert [run.value for run in found(file).runs] == [82.0, 80.0]


def test_a_damaged_line_is_named_and_other_runs_are_shown(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 80.0)
    file = tmp_path / "kept.jsonl"
    results.main([str(tmp_path / "runs"), "--keep", str(file)])
    file.write_text('{"config.yaml": {\n' + file.read_text() + '{"config.yaml": {}}\n')
    results.main([str(file)])
    out, err = capsys.readouterr()
    assert "| 80.00 |" in out
    assert "2 damaged" in out
    assert f"skipped: {file}:1, config.yaml: " in err
    assert f"skipped: {file}:3, config.yaml: no 'choices' in it" in err


def test_a_kept_text_may_have_any_character(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 80.0, {"choices.model": "a\u2028b\x85c"})
    results.main([str(tmp_path / "runs"), "--keep", str(tmp_path / "kept.jsonl")])
    results.main([str(tmp_path / "kept.jsonl")])
    assert "damaged" not in capsys.readouterr().out


def test_a_run_that_cannot_be_kept_is_named_and_the_others_are(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 80.0)
    write_run(tmp_path / "runs/b", 90.0)
    (tmp_path / "runs/b/run.json").write_text('{"overrides": null}')
    results.main([str(tmp_path / "runs"), "--keep", str(tmp_path / "kept.jsonl")])
    assert "runs/b/run.json: " in capsys.readouterr().err
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 1


MARKED = """# Numbers

<!-- results: kept.jsonl rows=model,depth columns=data places=2 -->
old
<!-- end -->
"""


@pytest.fixture
def kept(tmp_path):
    for seed, value in ((1, 80.0), (2, 82.0)):
        write_run(tmp_path / f"runs/a{seed}", value, {"seed": seed})
        write_run(tmp_path / f"runs/b{seed}", value + 5, {"seed": seed, "choices.data": "mr"})
    write_run(tmp_path / "runs/c", 70.0, {"choices.model": "lstm", "depth": 3})
    results.main([str(tmp_path / "runs"), "--keep", str(tmp_path / "kept.jsonl")])
    return tmp_path


def test_a_table_of_the_readme_is_written_between_its_markers(kept):
    text = markdown.fill(MARKED, kept)
    assert text.splitlines()[2:] == [
        MARKED.splitlines()[2],
        "",
        "| model | depth | cr | mr |",
        "| --- | ---: | ---: | ---: |",
        "| lstm | 3 | 70.00 |  |",
        "| sru | 2 | 81.00 ± 1.41 | 86.00 ± 1.41 |",
        "",
        "<!-- end -->",
    ]
    assert markdown.fill(text, kept) == text


def test_a_table_may_have_several_metrics(kept):
    words = "kept.jsonl rows=model,data metric=test/accuracy,encoder_parameters places=1,0 cell=mean"
    assert markdown.write_table(words, kept)[0] == "| model | data | test/accuracy | encoder_parameters |"
    assert markdown.write_table(words, kept)[-1] == "| sru | mr | 86.0 | 203,776 |"
    with pytest.raises(DamagedError, match="with columns= one metric"):
        markdown.write_table(f"{words} columns=data", kept)


def test_a_column_may_have_a_title_and_an_option_that_some_models_lack(kept):
    write_run(kept / "runs/e", 75.0, {"model.bias": "2"})
    results.main([str(kept / "runs"), "--keep", str(kept / "kept.jsonl")])
    lines = markdown.write_table("kept.jsonl rows=data,model,model.bias:bias metric=test/accuracy:score", kept)
    assert lines[0] == "| data | model | bias | score |"
    assert lines[3:5] == ["| cr | sru |  | 81.0 ± 1.4 |", "| cr | sru | 2 | 75.0 |"]


def test_the_command_rewrites_the_file_once(kept, monkeypatch, capsys):
    path = kept / "README.md"
    path.write_text(MARKED.replace("kept.jsonl", str(kept / "kept.jsonl")), encoding="utf-8")
    results.main(["--readme", str(path)])
    assert "1 tables, rewritten" in capsys.readouterr().out
    assert "81.00 ± 1.41" in path.read_text(encoding="utf-8")
    results.main(["--readme", str(path)])
    assert "1 tables, unchanged" in capsys.readouterr().out
    path.write_text(MARKED)
    with pytest.raises(SystemExit, match=r"kept\.jsonl, which a table names"):
        results.main(["--readme", str(path)])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- end -->", "", "lacks its line"),
        ("rows=model,depth", "rows=data", r"two groups in one cell \(cr: lstm, 3 layers, random / cr: sru, 2 layers"),
        ("rows=model,depth", "rows=model,deep", "no run has an option deep"),
        ("places=2", "metric=test/f1 places=2", "has no test/f1; it has val/accuracy, test/accuracy"),
        ("kept.jsonl", "absent.jsonl", "no file .*absent.jsonl"),
        ("places=2", "places=x", "cannot be read .invalid literal"),
        ("places=2", "places=1,2", "needs one of places= for each metric"),
        ("places=2", "task=lm", "cannot be read .no option task"),
        ("places=2", "cell=median", "cannot be read .cell= can be mean only"),
        ("places=2", "places='2", "cannot be read .No closing quotation"),
        ("places=2", "metric=monitor places=2", "has no monitor; it has"),
    ],
)
def test_a_wrong_marker_is_refused(kept, old, new, message):
    with pytest.raises(results.DamagedError, match=message):
        markdown.fill(MARKED.replace(old, new), kept)


def test_the_tables_of_the_documents_are_those_of_the_kept_runs(monkeypatch):
    monkeypatch.setattr(markdown, "write_table", functools.cache(markdown.write_table))  # two pages have one table
    for page in markdown.find_pages():
        text = page.read_text(encoding="utf-8")
        assert markdown.fill(text) == text, f"{page}: python scripts/results.py --readme"


def test_tables_are_found_in_every_folder_of_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    (tmp_path / "docs/tasks").mkdir(parents=True)
    (tmp_path / "README.md").write_text("no table")
    (tmp_path / "docs/plain.md").write_text("no table")
    for name in ("docs/results.md", "docs/tasks/lm.md"):
        (tmp_path / name).write_text(MARKED)
    assert [str(path.relative_to(tmp_path)) for path in markdown.find_pages()] == [
        "docs/results.md",
        "docs/tasks/lm.md",
    ]


def test_kept_runs_are_read_as_an_editor_writes_them(tmp_path):
    write_run(tmp_path / "runs/a", 80.0, {"choices.model": "a\u2028b"})
    file = tmp_path / "kept.jsonl"
    results.main([str(tmp_path / "runs"), "--keep", str(file)])
    file.write_bytes(file.read_text(encoding="utf-8").replace("\n", "\r\n").encode("utf-8-sig"))
    (run,) = found(file).runs
    assert run.value == 80.0

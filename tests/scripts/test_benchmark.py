"""The device benchmark: its arithmetic by hand-worked cases, and a whole run of it on the CPU with tiny shapes."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarks import cuts, device, device_report, kernels, scaling, targets, timing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/benchmark.py"
# A Python in place of the one that measures: the SRU ends it at a graph, the LSTM in any case, bf16 without a message.
DYING = """#!{python}
import json, sys
order = json.loads(sys.argv[-1])
say = lambda **record: print(json.dumps(record), flush=True)
say(about={{"device": "x"}})
for mode in order["modes"]:
    if "SRU" not in order["eager"]:
        say(trying="SRU", graph=True)
        sys.exit("no such graph")
    if "LSTM" not in order["refused"]:
        say(trying="LSTM")
        sys.exit("Traceback\\nillegal access")
    say(trying=None)
    if mode == "bf16":
        sys.exit(3)
    say(mode=mode, cells={{"LSTM": order["refused"]["LSTM"]}})
"""


def run(*words, folder):
    """The files of a run, by their endings, and its output."""
    command = [sys.executable, str(SCRIPT), *words, "--seconds", "0.001", "--out", str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in folder.glob("*")}, done.stdout


@pytest.mark.parametrize(("size", "expected"), [(4, [20, 24, 40]), (2, [10, 14, 22])])
def test_a_pass_moves_the_bytes_that_the_notes_on_speed_list(size, expected):
    assert [device.necessary_bytes(kind, size) for kind in device.PASSES["recurrence"]] == expected


def test_figures_equal_a_hand_worked_case():
    # 1000 elements of 20 bytes in 10 us, where a copy moves 4 GB/s, which would be 5 us.
    found = device_report.compute_figures("infer", [10, 2, 50], "fp32", 10e-6, 4e9)
    assert found == pytest.approx({"ns a step": 1000, "GB/s": 2, "of copy": 0.5, "floor, us": 5, "over floor": 2})
    assert device_report.compute_figures("backward", [10, 2, 50], "bf16", 10e-6, 4e9)["floor, us"] == pytest.approx(5.5)


def test_a_step_on_many_gpus_equals_a_hand_worked_case(monkeypatch, capsys):
    # 8 bytes at 1 byte/s over 4 GPUs: 2 * 3 messages of 2 bytes, and 3 seconds each to begin.
    assert scaling.ring(8, 4, 1, 3) == 6 * (2 + 3)
    network = scaling.sru(2, 100)
    assert network.parameters == 2 * 30_000
    monkeypatch.setattr(scaling, "MATRIX", 120_000)
    for name in ("MEMORY", "NVLINK"):
        monkeypatch.setattr(scaling, name, float("inf"))
    monkeypatch.setattr(scaling, "LAUNCH", 0)
    assert network.compute(2) == (2, 4)  # forward has 2 * 60,000 * 2 operations
    assert scaling.step(network, 2, 1, 1.0) == (6, 0)
    monkeypatch.setattr(scaling, "LATENCY", {"within": 0, "between": 0})
    # 240,000 bytes, an eighth a GPU, over 2 machines, at 100 bytes/s: 300 seconds, of which backward hides 3.6.
    computing, waiting = scaling.step(network, 2, 16, 100.0)
    assert (computing, waiting) == (6, pytest.approx(300 - 3.6))
    assert scaling.needed_accumulation(network, 2, 16, 100.0, share=0.5) == 50  # 50 * 6 > 300 - 3.6
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "scaling", "--tokens", "128"])
    benchmark.main(benchmark.parse())
    assert "A model, not a measurement: 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Conv1d k=3", "Conv2d k=3", "Conv1d k=2", "Conv2d k=2", "attention"])
def test_contenders_keep_the_shape_and_do_not_look_ahead(name):
    torch.manual_seed(0)
    network = device.list_contenders("stack", [7, 2, 128], "cpu", False)[name]()
    x = torch.randn(7, 2, 128)
    changed = x.clone()
    changed[4:] += 1.0
    h, other = network(x), network(changed)
    assert h.shape == x.shape
    assert h.is_contiguous()
    torch.testing.assert_close(other[:4], h[:4])
    assert not torch.allclose(other[4], h[4])


def test_long_sequences_have_no_eager_contender():
    short, long = (device.list_contenders("layer", [steps, 1, 8], "cpu", False) for steps in (256, 257))
    assert short.keys() - long.keys() == {device.EAGER}


def test_a_contender_that_ends_the_process_fails_alone(tmp_path):
    python = tmp_path / "python"
    python.write_text(DYING.format(python=sys.executable))
    python.chmod(0o755)
    cells = {"fp32": {}, "bf16": {}}
    machines = device_report.measure_apart(str(python), {"level": "step", "official": False}, cells)
    assert cells["fp32"] == {"LSTM": "exit status 1: illegal access"}
    assert cells["bf16"] == {"all": {"infer": {"failed": "exit status 3: no message"}}}
    assert machines == [{"device": "x"}] * 3


def test_a_failed_process_still_gives_tables(tmp_path):
    cells = {"fp32": {}}
    order = {"level": "recurrence", "official": False}
    assert device_report.measure_apart("false", order, cells) == []
    row = {"shape": [1, 2, 3], "mode": "fp32", "cells": cells["fp32"]}
    found = {"options": {"device": "cuda"}, "machines": [], "levels": {"recurrence": [row]}, "left out": ["E"]}
    assert device_report.save(found, tmp_path).count("failed: exit status 1: no message") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cuda-recurrence.json", "cuda-recurrence.md"]
    assert "Left out for want of time: E." in (tmp_path / "cuda-recurrence.md").read_text()


def test_figures_leave_out_the_time_of_an_empty_replay():
    spread = {"median": 12e-6, "p10": 11e-6, "p90": 13e-6, "graph": True}
    passes = {kind: {"device": dict(spread), "eager": {"median": 1e-3}} for kind in device.PASSES["recurrence"]}
    row = {"shape": [10, 2, 50], "mode": "fp32", "cells": {"SRU": passes}}
    device_report.format_table("recurrence", [row], 4e9, empty=2e-6)
    assert passes["infer"]["figures"]["GB/s"] == pytest.approx(2)  # 20,000 bytes in 10 us


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "look"), [("tiles", 2), ("ring", 1), ("registers", 0)])
def test_thresholds_force_each_cut(monkeypatch, name, look, mode):
    from sru.kernels import cuda

    for threshold, value in cuts.FORCED[name].items():
        monkeypatch.setattr(cuda, threshold, value)
    size = device.DTYPES[mode].itemsize
    for steps, batch, width in cuts.list_shapes():
        assert cuda.cut(steps, batch * width, 4, [size, size], False).look == (look if size * 4 >= 4 else 0)


def test_the_best_thresholds_are_those_of_the_fastest_cuts():
    def seconds(steps, columns):
        tiles, registers = columns <= 2048 and steps >= 128, columns >= 65536
        return {"tiles": 1 if tiles else 9, "ring": 2, "registers": 1 if registers else 9}

    times = {(t, b * d): seconds(t, b * d) for t, b, d in cuts.list_shapes()}
    expected = {"TILED_COLUMNS": 2048, "TILED_STEPS": 128, "WIDE_BYTES": 65536 * 4}
    assert cuts.find_thresholds(times, 4) == expected


def test_the_hour_on_a_gpu_lists_its_parts_without_one(tmp_path):
    script = ROOT / "scripts/gpu_hour.sh"
    done = subprocess.run([script, tmp_path / "out", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    parts = dict(re.findall(r"(\w+) \(at most (\d+) s\)", done.stdout))
    assert list(parts) == [
        *("doctor", "tests", "races", "accuracy", "recurrence", "layer", "stack", "step", "cuts", "profile", "table")
    ]
    assert all(int(seconds) <= 600 for seconds in parts.values())
    assert sum(map(int, parts.values())) <= 3600
    assert subprocess.run([script], capture_output=True).returncode == 2


def test_the_hour_on_a_gpu_goes_on_where_it_stopped(tmp_path):
    """With an interpreter that fails in the benchmarks of steps, and then does not."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = scripts/benchmarks/targets.py ] && exec {sys.executable} "$@"\n[ "$2" != step ]\n'
    )
    python.chmod(0o755)
    command, env = [ROOT / "scripts/gpu_hour.sh", tmp_path / "out"], os.environ | {"PYTHON": str(python)}
    first = subprocess.run(command, env=env, capture_output=True, text=True)
    assert first.returncode == 1
    assert "failed: step; start the script again" in first.stdout
    assert "| 16384x1x1024 | E: at most 650 us forward | forward | 560 to 640 | not measured | – |" in first.stdout
    python.write_text("#!/bin/sh\n")
    second = subprocess.run(command, env=env, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout
    assert second.stdout.count("done before") == first.stdout.count("  done\n")


def test_what_was_found_stands_beside_targets_and_predictions(tmp_path):
    cell = {"device": {"median": 205e-6}, "figures": {"of copy": 0.91}}
    row = {"shape": [256, 64, 2048], "mode": "fp32", "cells": {"SRU": {"forward": cell, "backward": {"failed": "why"}}}}
    (tmp_path / "gpu-recurrence.json").write_text(json.dumps({"levels": {"recurrence": [row]}}))
    times = {name: {"train": {"device": {"median": ms}}} for name, ms in {"SRU": 0.5, "LSTM": 6.0}.items()}
    layer = {"shape": [1, 2, 3], "mode": "bf16", "cells": times}
    (tmp_path / "gpu-layer.json").write_text(json.dumps({"levels": {"layer": [layer]}}))
    lines = targets.compare_recurrence(tmp_path)
    assert "| 256x64x2048 | C: at least 88 % of copy | forward | 200 to 210 | 205.0 | 91% |" in lines
    assert "| 256x64x2048 | C: at least 88 % of copy | backward | 335 to 355 | why | – |" in lines
    assert targets.compare_layers(tmp_path)[-1] == "| 1x2x3 | bf16 | LSTM 12.0x |"


def test_no_shape_starts_when_the_minutes_are_over(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(
        device_report, "measure_apart", lambda python, order, cells, limit: measured.append(order) or []
    )
    monkeypatch.setattr(sys, "argv", f"benchmark.py step --device cpu --minutes 0.1 --out {tmp_path}".split())
    benchmark.main(benchmark.parse())
    assert not measured
    assert "Left out for want of time: 1x1x512, 1x8x512, 1x64x512." in (tmp_path / "cpu-step.md").read_text()


def test_a_table_shows_failures_and_missing_graphs():
    slow = {"eager": {"median": 0.002}, "device": {"median": 0.001, "graph": False}}
    cells = {"SRU": {"infer": slow}, "LSTM": {"infer": {"failed": "a | b"}}, "GRU": {"infer": {}}}
    table = device_report.format_table("step", [{"shape": [1, 2, 3], "mode": "fp32", "cells": cells}], 1e9)
    assert table.splitlines()[-1] == "| (1, 2, 3) | fp32 | infer | 1* (2) | failed: a / b | – |"


@pytest.mark.slow
def test_recurrence_on_the_cpu(tmp_path):
    files, printed = run("recurrence", "--device", "cpu", "--shapes", "6x2x8", "--modes", "bf16", folder=tmp_path)
    assert sorted(files) == [".json", ".md"]
    found = json.loads(files[".json"].read_text())
    copy = sorted(machine["copy, bytes/s"] for machine in found["machines"])
    (row,) = found["levels"]["recurrence"]
    assert (row["shape"], row["mode"]) == ([6, 2, 8], "bf16")
    for kind, size in {"infer": 10, "forward": 14, "backward": 22}.items():
        cell = row["cells"]["SRU"][kind]
        speed = 6 * 2 * 8 * size / cell["eager"]["median"]
        assert cell["figures"]["GB/s"] == pytest.approx(speed / 1e9)
        assert cell["figures"]["of copy"] == pytest.approx(2 * speed / sum(copy))
    assert printed.strip() in files[".md"].read_text()


@pytest.mark.slow
def test_all_levels_on_the_cpu(tmp_path):
    """And an --official Python that holds no official package, whose cells say so."""
    words = ["--device", "cpu", "--shapes", "6x2x64", "--official", sys.executable]
    run(*words, folder=tmp_path)
    levels: dict[str, list] = {}
    for path in tmp_path.glob("*.json"):
        levels |= json.loads(path.read_text())["levels"]
    assert levels.keys() == {"accuracy", "recurrence", "layer", "stack", "step"}
    limits = {"fp32": 1e-4, "bf16": 1e-2}
    for row in levels["accuracy"]:
        assert max(row["cells"]["SRU"]["errors"]["errors"].values()) < limits[row["mode"]]
    for level, count in {"layer": 11, "stack": 11, "step": 6}.items():
        for row in levels[level]:
            cells = dict(row["cells"])
            assert len(cells) == count
            theirs = cells.pop("SRU (official)")
            assert all("this project's sru" in cell["failed"] for cell in theirs.values())
            assert all("eager" in cell for contender in cells.values() for cell in contender.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--shapes", "Z"], "--shapes Z"),
        (["--device", "cpu", "--modes", "fp16"], "--modes fp16"),
        (["--device", "cpu", "epoch"], "epoch is measured without"),
        (["stack"], "needs --device"),
        pytest.param(
            ["--device", "cuda"],
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_wrong_option_is_refused_in_a_line(tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        benchmark.main(benchmark.parse())
    assert message in f"{refused.value.code} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tables(monkeypatch):
    """tables(level, SHAPES=...): the tables of a level of scripts/benchmark.py, where a call takes what TAKES says."""
    takes = {"copy": 0.01, "infer": 2e-6, "forward": 3e-6, "backward": 5e-6, "reference": 8e-5, "call": 0.004}
    takes |= {"sru infer": 0.002, "lstm infer": 0.006, "sru train": 0.004, "lstm train": 0.01}
    takes |= {"sru infer, bfloat16": 0.001, "sru train, bfloat16": 0.003}
    found = []
    monkeypatch.setattr(kernels, "medians", lambda calls, seconds=2.0: {name: takes[name] for name in calls})
    monkeypatch.setattr(kernels, "print_table", lambda head, rows: found.append((head, rows)))
    monkeypatch.setattr(kernels, "SHAPES", [(2, 3, 4)])
    monkeypatch.setattr(kernels, "LAYER_SHAPES", [(2, 3, 4)])
    monkeypatch.setattr(kernels, "layer_calls", lambda *_: {kind: lambda: None for kind in ("infer", "train")})
    return lambda level: getattr(kernels, f"run_{level}")(SimpleNamespace(official=None)) or found


def test_the_table_of_the_recurrence_has_nanoseconds_and_shares_of_the_copy(tables, capsys):
    ((_, rows),) = tables("recurrence")
    # 64 MiB are read and written in 10 ms; of 24 elements each reads and writes 20, 24, and 40 bytes.
    bandwidth = 2 * 64 * 2**20 / 0.01
    assert f"{bandwidth / 1e9:.0f} GB/s" in capsys.readouterr().out
    shares = [bytes_ * 24 / seconds / bandwidth for bytes_, seconds in ((20, 2e-6), (24, 3e-6), (40, 5e-6))]
    assert [f"{share:.0%}" for share in shares] == ["2%", "1%", "1%"]
    assert rows == [["(2, 3, 4)", "83.33 (2%)", "125.00 (1%)", "208.33 (1%)", "10x"]]


def test_the_table_of_a_layer_has_milliseconds_and_the_ratio_to_the_lstm(tables):
    (head, rows), (_, callers) = tables("layer")
    assert head[:3] == ["(T, B, D)", "inference, ms", "LSTM / SRU"]
    assert rows == [["(2, 3, 4)", "2", "3.0x", "1", "4", "2.5x", "3"]]
    assert [row[:2] for row in callers] == [["SRU", "4"], ["LSTM", "4"]]


def test_a_step_of_the_framework_is_timed_and_its_operations_are_counted(tmp_path):
    pytest.importorskip("hydra")
    from benchmarks import framework

    words = ("task=image", "data._target_=benchmarks.framework.Rows")
    run = framework.Run(framework.configure(tmp_path, *words), steps=2)
    assert run.time_plain() > 0
    assert run.time_train()["step"] > 0
    # The pixels need no gradient; the first layer has four matrices, since its sizes differ, the second one three.
    layers = 28 * 32 * (2 * 28 * 4 * 128 + 3 * 128 * 3 * 128)
    assert run.count_operations() == 2 * (layers + 32 * 3 * 128 * 10)


@pytest.mark.parametrize("name", benchmark.SECTIONS)
def test_every_section_has_its_function(name):
    pytest.importorskip("hydra")
    assert callable(benchmark.load(benchmark.SECTIONS[name]))


def test_networks_are_compared_at_equal_size_with_the_baseline(monkeypatch, capsys):
    takes = {"square": 0.01, "LSTM": 0.04}
    monkeypatch.setattr(timing, "medians", lambda calls, seconds: {name: takes[name] for name in calls})
    depths = []

    def make(factor, *, hidden_size, num_layers, input_size):
        depths.append(num_layers)
        return torch.nn.Linear(input_size, factor * hidden_size, bias=False)

    options = SimpleNamespace(depth=None, parameters=6400, seconds=0.1)
    encoders = {"square": partial(make, 1), "LSTM": partial(make, 4)}
    compared = timing.Comparison(
        options,
        encoders,
        lambda encoder, width: encoder(input_size=width),
        None,
        100,
        "tokens",
        depth=3,
        parameters=1e6,
    )
    assert set(depths) == {3}
    compared.print("Title", {"half": lambda name: f"{compared.trained[name] / 2:.3f}"})
    printed = capsys.readouterr().out
    assert "| square | 80 | 0.01M | 10,000 | 4.00x | 0.005 |" in printed  # 80 * 80 parameters
    assert "| LSTM | 40 | 0.01M | 2,500 | 1.00x | 0.020 |" in printed  # 40 * 160

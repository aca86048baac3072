"""SRU and other networks on one device: `python scripts/benchmark.py --device cuda`.

Each shape is measured in a separate process (scripts/benchmarks/device.py): a crash costs one cell of the tables.
"""

import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reporting.kept_runs import replace_file

from benchmarks.device import DTYPES, PASSES, necessary_bytes
from benchmarks.timing import ROOT

NAMED = {"A": "32x32x128", "B": "128x32x512", "C": "256x64x2048", "D": "1024x4x3072", "E": "16384x1x1024"}
SHAPES = {  # in the order of their worth, if --minutes cuts the list
    "accuracy": "13x3x40,150x1x64,4x64x1024",  # one for each way in which the CUDA kernels divide the work
    "cuda": "C,D,B,A,1024x16x768,32x32x256,E,35x20x640,512x128x1024,4096x8x2048",
    "cuda recurrence": "C,D,B,A,E,1024x16x768,32x32x256,35x20x640,512x128x1024,4096x8x2048,65536x1x256",
    "cuda stack": "C,B,1024x16x768,D,A,32x32x256",
    "cuda step": ",".join(f"1x{batch}x{size}" for size in (512, 2048) for batch in (1, 8, 64, 512)),
    "cpu": "A,32x32x256,35x20x640,32x1x512,B",
    "cpu stack": "A,32x32x256",
    "cpu step": "1x1x512,1x8x512,1x64x512",
}
MODES = {"cuda": "fp32,tf32,bf16,fp16", "cpu": "fp32,bf16"}
TIMES = (
    "Milliseconds on the device (* without a CUDA graph), in brackets until the caller continues; on a CPU only that."
)
NOTES = dict.fromkeys(PASSES, TIMES) | {"accuracy": "Largest error against float64, over max(1, the largest value)."}
LIMIT = 400.0  # seconds for one shape; the first one compiles
LEAST = 20.0  # with less time left, no further shape starts


def compute_figures(kind: str, shape: list[int], mode: str, seconds: float, copy: float) -> dict[str, float]:
    """Figures of a pass of the recurrence that takes `seconds`, where a copy moves `copy` bytes per second."""
    moved = necessary_bytes(kind, DTYPES[mode].itemsize) * math.prod(shape)
    return {
        "ns a step": seconds / shape[0] * 1e9,
        "GB/s": moved / seconds / 1e9,
        "of copy": moved / seconds / copy,
        "floor, us": moved / copy * 1e6,
        "over floor": seconds * copy / moved,
    }


def measure_apart(python: str, order: dict, cells: dict[str, dict], limit: float = LIMIT) -> list[dict]:
    """Fill the cells {mode: {contender: ...}} by processes of a Python; returns their descriptions of the machine.

    A process may take `limit` seconds.
    After a crash while capturing a graph, the contender is repeated without graphs; after any other crash, its cells
    say that it failed.
    """
    folders = [str(ROOT / "scripts"), *([] if order["official"] else [str(ROOT)])]
    code = f"import json, sys; sys.path[:0] = {folders}; from benchmarks import device; "
    code += "device.work(json.loads(sys.argv[1]))"
    modes, refused, eager, machines = list(cells), dict[str, str](), list[str](), list[dict]()
    while modes:
        argument = json.dumps(order | {"modes": modes, "refused": refused, "eager": eager})
        # In an empty folder: a folder `sru` would hide the installed package.
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as out:
            command, message = [python, "-W", "ignore", "-c", code, argument], f"not finished after {limit:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(command, cwd=empty, stdout=out, stderr=subprocess.PIPE, text=True, timeout=limit)
                last_line = (done.stderr.strip() or "no message").splitlines()[-1]
                message = f"exit status {done.returncode}: {last_line}"[:400]
            out.seek(0)
            records = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        machines += [record["about"] for record in records if "about" in record]
        for record in [record for record in records if "cells" in record]:
            modes.remove(record["mode"])
            cells[record["mode"]] |= record["cells"]
        last = records[-1] if records else {}
        if modes and last.get("graph"):
            eager.append(last["trying"])
        elif modes and last.get("trying"):
            refused[last["trying"]] = message
        elif modes:  # while contenders took turns, or between them
            cells[modes.pop(0)]["all"] = {kind: {"failed": message} for kind in PASSES[order["level"]]}
    return machines


def format_cell(cell: dict) -> str:
    """The text of a cell, as TIMES says."""
    if "eager" not in cell:
        failed = f"failed: {cell['failed'][:80]}".replace("|", "/") if "failed" in cell else "–"
        return f"{max(cell['errors'].values()):.1e}" if "errors" in cell else failed
    eager, device = f"{cell['eager']['median'] * 1e3:.3g}", cell.get("device")
    return f"{device['median'] * 1e3:.3g}{'' if device['graph'] else '*'} ({eager})" if device else eager


def format_table(level: str, rows: list[dict], copy: float, empty: float = 0.0) -> str:
    """The table of a level; also adds the figures of a recurrence to `rows`, without the time of an `empty` replay."""
    names = list(dict.fromkeys(name for row in rows for name in row["cells"]))
    columns = ["p10, us", "p90, us", "warm, us", "ns a step", "GB/s", "of copy", "floor, us", "over floor"]
    columns = [*columns, "peak, MB", "first call, s"] if level == "recurrence" else []
    lines = [["(T, B, D)", "mode", "pass", *names, *columns], ["---"] * (3 + len(names) + len(columns))]
    for row, kind in ((row, kind) for row in rows for kind in PASSES[level]):
        cells = [row["cells"].get(name, {}).get(kind, {}) for name in names]
        values: dict[str, float] = {}
        if columns and "eager" in (cell := row["cells"].get("SRU", {}).get(kind, {})):
            best = cell.get("device", cell["eager"])
            net = best["median"] - (empty if best.get("graph") and best["median"] > empty else 0)
            cell["figures"] = compute_figures(kind, row["shape"], row["mode"], net, copy)
            values = cell | cell["figures"] | {f"{k}, us": best[k] * 1e6 for k in best.keys() & {"p10", "p90"}}
            values |= {"warm, us": cell["warm"]["median"] * 1e6} if "warm" in cell else {}
        line = [str(tuple(row["shape"])), row["mode"], kind, *map(format_cell, cells)]
        lines.append(line + [f"{values[name]:.3g}" if name in values else "–" for name in columns])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save(results: dict, folder: Path) -> str:
    """Write the results of a level so far to FOLDER/DEVICE-LEVEL.json and .md; returns the table."""
    none = {"device": results["options"]["device"], "copy, bytes/s": math.nan}
    machines = results["machines"] or [none]  # if all processes failed
    machine, copies = machines[0], [record["copy, bytes/s"] for record in machines]
    ((level, rows),) = results["levels"].items()
    empty = machine.get("replay of an empty kernel, s", 0.0)
    text = f"# {machine['device']}\n\n{', '.join(f'{key} {value}' for key, value in machine.items())}.\n\n"
    text += f"Copies in this run: {min(copies) / 1e9:.4g} to {max(copies) / 1e9:.4g} GB/s, read and written.\n"
    if results["left out"]:
        text += f"Left out for want of time: {', '.join(results['left out'])}.\n"
    table = f"\n## {level}\n\n{NOTES[level]}\n\n{format_table(level, rows, statistics.median(copies), empty)}"
    stem = re.sub("[^a-z0-9]+", "-", f"{machine['device']}-{level}".lower()).strip("-")
    replace_file(folder / f"{stem}.json", json.dumps(results, indent=1).encode())
    replace_file(folder / f"{stem}.md", (text + table).encode())
    return table


def run(options: argparse.Namespace) -> None:
    """Measure the levels, a file for each; the results are saved after each shape."""
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"error: --device cuda: torch {torch.__version__} sees no GPU; look at nvidia-smi, or type --device cpu"
        )
    modes = (options.modes or MODES[device]).split(",")
    if unknown := set(modes) - set(MODES[device].split(",")):
        sys.exit(f"error: --modes {','.join(sorted(unknown))}: the modes on {device} are {MODES[device]}")
    for name in (options.shapes or "A").split(","):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", NAMED.get(name, name)):
            sys.exit(f"error: --shapes {name}: must be one of {','.join(NAMED)}, or TxBxD, such as 32x32x256")
    end = time.monotonic() + 60 * options.minutes
    for level in PASSES if options.section == "all" else [options.section]:
        rows: list[dict] = []
        results: dict[str, Any] = {"options": vars(options), "machines": [], "levels": {level: rows}, "left out": []}
        # TF32 concerns matrix products, which these levels do not have.
        here = [mode for mode in modes if mode != "tf32" or level not in ("accuracy", "recurrence")]
        default = SHAPES.get(level) or SHAPES.get(f"{device} {level}") or SHAPES[device]
        for name in (default if level == "accuracy" else options.shapes or default).split(","):
            left = end - time.monotonic()
            if left < LEAST:
                results["left out"].append(name)
                continue
            shape = [int(size) for size in NAMED.get(name, name).split("x")]
            shape[0] = 1 if level == "step" else shape[0]
            cells: dict[str, dict] = {mode: {} for mode in here}
            order = {"level": level, "device": device, "seconds": options.seconds, "shape": shape, "official": False}
            results["machines"] += measure_apart(sys.executable, order, cells, min(LIMIT, left))
            if options.official and level in ("layer", "stack", "step"):
                theirs: dict[str, dict] = {mode: {} for mode in here}
                results["official"] = measure_apart(options.official, order | {"official": True}, theirs)
                for mode, cell in theirs.items():
                    cells[mode] |= {name.replace("all", "SRU (official)"): value for name, value in cell.items()}
            rows += [{"shape": shape, "mode": mode, "cells": cells[mode]} for mode in here]
            save(results, Path(options.out))
        print(save(results, Path(options.out)), flush=True)

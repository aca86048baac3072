"""Speed on one device, the SRU beside other networks: `python scripts/benchmark.py --device cuda`.

Each shape is measured in a process of its own (scripts/benchmarks/device.py), so that a kernel that ends its process
costs one cell.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import DTYPES, EAGER, KINDS
from benchmarks.timing import ROOT

NAMED = {"A": "32x32x128", "B": "128x32x512", "C": "256x64x2048", "D": "1024x4x3072", "E": "16384x1x1024"}
SHAPES = {
    "accuracy": "13x3x40,150x1x64,4x64x1024",  # one for each way in which the CUDA kernels cut the work
    "cuda": "A,32x32x256,B,C,D,E,35x20x640,1024x16x768,512x128x1024,4096x8x2048",
    "cuda recurrence": "A,32x32x256,B,C,D,E,35x20x640,1024x16x768,512x128x1024,4096x8x2048,65536x1x256",
    "cuda stack": "A,32x32x256,B,C,D,1024x16x768",
    "cuda step": ",".join(f"1x{batch}x{size}" for size in (512, 2048) for batch in (1, 8, 64, 512)),
    "cpu": "A,32x32x256,35x20x640,32x1x512,B",
    "cpu stack": "A,32x32x256",
    "cpu step": "1x1x512,1x8x512,1x64x512",
}
MODES = {"cuda": "fp32,tf32,bf16,fp16", "cpu": "fp32,bf16"}
TIMES = "Milliseconds on the device (* without a graph), in brackets as a caller waits for them; on a CPU only these."
NOTES = dict.fromkeys(KINDS, TIMES) | {"accuracy": "Largest error against float64, over max(1, the largest value)."}
LIMIT = 400.0  # seconds for one shape; the first of all compiles


def necessary_bytes(kind: str, *, u: int, x: int, h: int, c: int) -> int:
    """Bytes that a pass must move for one (t, b, d), of the sizes of an element of u, x, h and the state.

    Forward reads u0 u1 u2 x and writes h, for training also c. Backward reads u0 u1 u2 x c and h's gradient, and
    writes the gradients of u0 u1 u2 x.
    """
    return {"infer": 3 * u + x + h, "forward": 3 * u + x + h + c, "backward": 6 * u + 2 * x + h + c}[kind]


def compute_figures(kind: str, shape: list[int], mode: str, seconds: float, copy: float) -> dict[str, float]:
    """Figures of a pass of the recurrence by its time, where a copy moves `copy` bytes a second."""
    size = DTYPES[mode].itemsize
    moved = necessary_bytes(kind, u=size, x=size, h=size, c=4) * math.prod(shape)
    found = {"ns a step": seconds / shape[0] * 1e9, "GB/s": moved / seconds / 1e9, "of copy": moved / seconds / copy}
    return found | {"floor, us": moved / copy * 1e6, "over floor": seconds * copy / moved}


def measure_apart(python: str, order: dict, cells: dict[str, dict]) -> list[dict]:
    """Fill the cells {mode: {contender: ...}} by processes of a Python; returns their descriptions of the machine.

    A contender that ends a process goes on without graphs if it was at one, and else has failed with this shape.
    """
    folders = [str(ROOT / "scripts"), *([] if order["official"] else [str(ROOT)])]
    code = f"import json, sys; sys.path[:0] = {folders}; from benchmarks import device; "
    code += "device.work(json.loads(sys.argv[1]))"
    modes, refused, eager, machines = list(cells), dict[str, str](), list[str](), list[dict]()
    while modes:
        argument = json.dumps(order | {"modes": modes, "refused": refused, "eager": eager})
        with tempfile.TemporaryDirectory() as elsewhere, tempfile.TemporaryFile("w+") as out:  # no folder `sru` there
            command, said = [python, "-W", "ignore", "-c", code, argument], f"no end within {LIMIT:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    command, cwd=elsewhere, stdout=out, stderr=subprocess.PIPE, text=True, timeout=LIMIT
                )
                said = f"exit status {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1]}"[:400]
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
            refused[last["trying"]] = said
        elif modes:  # while all took turns, or between them
            cells[modes.pop(0)]["all"] = {kind: {"failed": said} for kind in KINDS[order["level"]]}
    return machines


def format_cell(cell: dict) -> str:
    """Milliseconds on the device, with * where no graph was replayed, and in brackets as its caller waits for them."""
    if "eager" not in cell:
        failed = f"failed: {cell['failed'][:80]}".replace("|", "/") if "failed" in cell else "–"
        return f"{max(cell['errors'].values()):.1e}" if "errors" in cell else failed
    eager, device = f"{cell['eager']['median'] * 1e3:.3g}", cell.get("device")
    return f"{device['median'] * 1e3:.3g}{'' if device['graph'] else '*'} ({eager})" if device else eager


def format_table(level: str, rows: list[dict], copy: float) -> str:
    """The table of a level; a recurrence's rows get their figures, also in `rows`."""
    names = list(dict.fromkeys(name for row in rows for name in row["cells"]))
    columns = ["p10, us", "p90, us", "warm, us", "ns a step", "GB/s", "of copy", "floor, us", "over floor"]
    columns = [*columns, "peak, MB", "first call, s"] if level == "recurrence" else []
    lines = [["(T, B, D)", "mode", "pass", *names, *columns], ["---"] * (3 + len(names) + len(columns))]
    for row, kind in ((row, kind) for row in rows for kind in KINDS[level]):
        cells = [row["cells"].get(name, {}).get(kind, {}) for name in names]
        values: dict[str, float] = {}
        if columns and "eager" in (cell := row["cells"].get("SRU", {}).get(kind, {})):
            best = cell.get("device", cell["eager"])
            cell["figures"] = compute_figures(kind, row["shape"], row["mode"], best["median"], copy)
            values = cell | cell["figures"] | {f"{k}, us": best[k] * 1e6 for k in best.keys() & {"p10", "p90"}}
            values |= {"warm, us": cell["warm"]["median"] * 1e6} if "warm" in cell else {}
        line = [str(tuple(row["shape"])), row["mode"], kind, *map(format_cell, cells)]
        lines.append(line + [f"{values[name]:.3g}" if name in values else "–" for name in columns])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: list[dict]) -> bytes:
    """Bars of one layer's forward pass, and of forward and backward: a column a shape, a row a mode."""
    from matplotlib.figure import Figure

    shapes, modes = (list(dict.fromkeys(str(row[key]) for row in rows)) for key in ("shape", "mode"))
    figure = Figure(figsize=(4 * len(shapes), 3 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), len(shapes), squeeze=False)
    for row in rows:
        axis = axes[modes.index(row["mode"])][shapes.index(str(row["shape"]))]
        axis.set_title("l={}, d={}, batch {}, {}".format(*row["shape"][::2], row["shape"][1], row["mode"]), fontsize=9)
        names = [name for name in row["cells"] if name != EAGER]
        for offset, kind, label in ((0.2, "infer", "forward"), (-0.2, "train", "forward and backward")):
            cells = [row["cells"][name][kind] for name in names]
            times = [c.get("device", c["eager"])["median"] * 1e3 if "eager" in c else 0.0 for c in cells]
            axis.barh([offset - i for i in range(len(names))], times, 0.4, label=label)
        axis.set_yticks([-i for i in range(len(names))], names, fontsize=8)
        axis.set_xlabel("ms")
    axes[0][0].legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def save(found: dict, folder: Path, picture: bytes | None = None) -> str:
    """Write the results so far to FOLDER/NAME.json, .md and, if given, .png; returns the last table."""
    machines = found["machines"] or [{"device": found["options"]["device"], "copy, bytes/s": math.nan}]  # all failed
    machine, copies = machines[0], [record["copy, bytes/s"] for record in machines]
    text = f"# {machine['device']}\n\n{', '.join(f'{key} {value}' for key, value in machine.items())}.\n\n"
    text += f"Copies in this run: {min(copies) / 1e9:.4g} to {max(copies) / 1e9:.4g} GB/s, read and written.\n"
    table = ""
    for level, rows in found["levels"].items():
        table = f"\n## {level}\n\n{NOTES[level]}\n\n{format_table(level, rows, statistics.median(copies))}"
        text += table
    stem = re.sub("[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"json": json.dumps(found, indent=1).encode(), "md": text.encode(), "png": picture}
    for kind, content in files.items():
        if content is not None:
            (folder / f"{stem}.{kind}.part").write_bytes(content)
            os.replace(folder / f"{stem}.{kind}.part", folder / f"{stem}.{kind}")
    return table


def run(options: argparse.Namespace) -> None:
    """Measure the levels, and save the results after each shape."""
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"error: --device cuda: torch {torch.__version__} sees no GPU; look at nvidia-smi, or take --device cpu"
        )
    modes = (options.modes or MODES[device]).split(",")
    if unknown := set(modes) - set(MODES[device].split(",")):
        sys.exit(f"error: --modes {','.join(sorted(unknown))}: on {device} there are {MODES[device]}")
    for name in (options.shapes or "A").split(","):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", NAMED.get(name, name)):
            sys.exit(f"error: --shapes {name}: take of {','.join(NAMED)}, or TxBxD, such as 32x32x256")
    found: dict[str, Any] = {"options": vars(options), "machines": [], "levels": {}}
    for level in KINDS if options.section == "all" else [options.section]:
        rows, table = found["levels"].setdefault(level, []), ""
        # The first two have no matrix product.
        here = [mode for mode in modes if mode != "tf32" or level not in ("accuracy", "recurrence")]
        default = SHAPES.get(level) or SHAPES.get(f"{device} {level}") or SHAPES[device]
        for name in (default if level == "accuracy" else options.shapes or default).split(","):
            shape = [int(size) for size in NAMED.get(name, name).split("x")]
            shape[0] = 1 if level == "step" else shape[0]
            cells: dict[str, dict] = {mode: {} for mode in here}
            order = {"level": level, "device": device, "seconds": options.seconds, "shape": shape, "official": False}
            found["machines"] += measure_apart(sys.executable, order, cells)
            if options.official and level in ("layer", "stack", "step"):
                theirs: dict[str, dict] = {mode: {} for mode in here}
                found["official"] = measure_apart(options.official, order | {"official": True}, theirs)
                for mode, cell in theirs.items():
                    cells[mode] |= {name.replace("all", "SRU (official)"): value for name, value in cell.items()}
            rows += [{"shape": shape, "mode": mode, "cells": cells[mode]} for mode in here]
            table = save(found, Path(options.out))
        if level == "layer" and importlib.util.find_spec("matplotlib"):
            save(found, Path(options.out), draw(rows))
        print(table, flush=True)

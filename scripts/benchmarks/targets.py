"""Targets and predictions of the CUDA kernels beside what scripts/gpu_hour.sh found: `targets.py FOLDER`.

The predictions are those of bench/NOTES.md, made before any run on a GPU, for a device with 4.3 TB/s of copy bandwidth.
"""

import json
import sys
from pathlib import Path

# shape: (target, [predicted us: forward, backward]); float32.
EXPECTED: dict[str, tuple[str, list[str]]] = {
    "32x32x128": ("A: at most 5 us", ["4.5 to 5", "5"]),
    "128x32x512": ("B: at least 70 % of copy", ["16 to 19", "24 to 29"]),
    "256x64x2048": ("C: at least 88 % of copy", ["200 to 210", "335 to 355"]),
    "1024x4x3072": ("D: at least 88 % of copy", ["85 to 95", "130 to 145"]),
    "16384x1x1024": ("E: at most 650 us forward", ["560 to 640", "230 to 280"]),
}


def find_rows(folder: Path, level: str) -> list[dict]:
    """The rows of a level in the files of scripts/benchmark.py --device cuda."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-{level}.json"))]
    return [row for results in files for row in results["levels"][level]]


def compare_recurrence(folder: Path) -> list[str]:
    """A line for each pass of each shape with an expectation; "not measured" without a time."""
    rows = {("x".join(map(str, row["shape"])), row["mode"]): row for row in find_rows(folder, "recurrence")}
    lines = ["| shape, float32 | target | pass | predicted, us | found, us | of copy |", "| --- " * 6 + "|"]
    for shape, (target, predicted) in EXPECTED.items():
        passes = rows.get((shape, "fp32"), {"cells": {}})["cells"].get("SRU", {})
        for kind, expected in zip(("forward", "backward"), predicted, strict=True):
            cell = passes.get(kind, {})
            found = f"{cell['device']['median'] * 1e6:.1f}" if "device" in cell else cell.get("failed", "not measured")
            share = f"{cell['figures']['of copy']:.0%}" if "figures" in cell else "–"
            lines.append(f"| {shape} | {target} | {kind} | {expected} | {found} | {share} |")
    return lines


def compare_layers(folder: Path) -> list[str]:
    """How many times as long as the SRU's forward and backward pass each other network's takes."""
    lines = ["", "| layer | mode | network / SRU, forward and backward |", "| --- " * 3 + "|"]
    for row in find_rows(folder, "layer"):
        times = {
            name: passes["train"]["device"]["median"]
            for name, passes in row["cells"].items()
            if "device" in passes.get("train", {})
        }
        if ours := times.pop("SRU", None):
            cells = ", ".join(f"{name} {seconds / ours:.1f}x" for name, seconds in times.items())
            lines.append(f"| {'x'.join(map(str, row['shape']))} | {row['mode']} | {cells} |")
    return lines if len(lines) > 3 else []


if __name__ == "__main__":
    print("\n".join(compare_recurrence(Path(sys.argv[1])) + compare_layers(Path(sys.argv[1]))))

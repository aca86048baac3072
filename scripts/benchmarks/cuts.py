"""Which cut of the CUDA kernels is fastest where: `python scripts/benchmark.py cuts --device cuda`.

Each of the three ways to divide the work (sru.kernels.cuda.cut) is forced on a grid of shapes. The result is the
thresholds to set in sru/kernels/cuda.py: TILED_COLUMNS, TILED_STEPS and WIDE_BYTES.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting.kept_runs import replace_file

from benchmarks import device, timing

# The thresholds that force each cut. A cut that needs more alignment than a shape has falls back; cut() tells.
FORCED = {
    "tiles": {"TILED_COLUMNS": 2**62, "TILED_STEPS": 0},
    "ring": {"TILED_COLUMNS": 0, "WIDE_BYTES": 2**62},
    "registers": {"TILED_COLUMNS": 0, "WIDE_BYTES": 0},
}
COLUMNS = 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072
STEPS = 32, 128, 1024


def list_shapes() -> list[tuple[int, int, int]]:
    """(T, B, D) with all numbers of columns and steps, one sequence being 512 columns; small ones first."""
    return [(steps, columns // 512, 512) for steps in STEPS for columns in COLUMNS if steps * columns <= 2**26]


def find_thresholds(times: dict[tuple[int, int], dict[str, float]], size: int) -> dict[str, int]:
    """The thresholds that lose least, from the seconds {(steps, columns): {cut: seconds}} with numbers of `size` bytes.

    Tried are all pairs of columns and steps for tiles, and all numbers of columns for registers.
    """
    columns, steps = sorted({key[1] for key in times}), sorted({key[0] for key in times})

    def loss(most: int, least: int, wide: int) -> float:
        """The product of how many times as long as the best cut each shape takes."""
        total = 0.0
        for (t, n), found in times.items():
            chosen = "tiles" if n <= most and t >= least else "registers" if n >= wide else "ring"
            total += math.log(found[chosen] / min(found.values()))
        return total

    every = [(m, s, w) for m in (0, *columns) for s in steps for w in (*columns, 2 * columns[-1])]
    most, least, wide = min(every, key=lambda choice: loss(*choice))
    return {"TILED_COLUMNS": most, "TILED_STEPS": least, "WIDE_BYTES": wide * size}


def measure_shape(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> dict[str, dict[str, float]]:
    """Seconds {pass: {cut: seconds}} on the device."""
    from sru.kernels import cuda, recurrence

    pool, replays = torch.cuda.graph_pool_handle(), dict[Any, Any]()
    kept = {name: getattr(cuda, name) for name in ("TILED_COLUMNS", "TILED_STEPS", "WIDE_BYTES")}
    try:
        for name, thresholds in FORCED.items():
            for threshold, value in (kept | thresholds).items():
                setattr(cuda, threshold, value)
            cuda.plan.cache_clear()  # it depends on the thresholds
            inputs, grads = device.draw_inputs(list(shape), dtype)
            passes = device.build_passes(partial(recurrence, backend="cuda"), inputs, grads, "cuda")
            for kind in ("forward", "backward"):
                passes[kind]()
                replays[kind, name] = device.capture(passes[kind], pool)
    finally:
        for threshold, value in kept.items():
            setattr(cuda, threshold, value)
        cuda.plan.cache_clear()
    flush = torch.zeros(64 * 2**20, device="cuda")
    spreads = device.time_in_turns(replays, seconds, flush)
    return {kind: {name: spreads[kind, name]["median"] for name in FORCED} for kind in ("forward", "backward")}


def run(options: argparse.Namespace) -> None:
    """Measure float32 and bfloat16; print a row for each shape and pass, and the thresholds of each dtype."""
    torch.manual_seed(0)
    results: dict[str, Any] = {"machine": timing.describe_machine() | {"device": torch.cuda.get_device_name()}}
    with torch.cuda.stream(torch.cuda.Stream()):
        for mode in ("fp32", "bf16"):
            dtype, totals = device.DTYPES[mode], dict[tuple[int, int], dict[str, float]]()
            for shape in list_shapes():
                found = measure_shape(shape, dtype, options.seconds)
                steps, columns = shape[0], shape[1] * shape[2]
                for kind, times in found.items():
                    cells = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in times.items())
                    print(f"{mode} {steps} steps, {columns} columns, {kind}, us: {cells}", flush=True)
                totals[steps, columns] = {name: sum(times[name] for times in found.values()) for name in FORCED}
            best = find_thresholds(totals, dtype.itemsize)
            print(f"{mode}: {best}", flush=True)
            rows = [{"steps": t, "columns": n, "seconds": times} for (t, n), times in totals.items()]
            results[mode] = {"thresholds": best, "forward and backward": rows}
    replace_file(Path(options.out) / "cuts.json", json.dumps(results, indent=1).encode())

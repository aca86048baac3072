"""The elementwise kernel compared with the copy bandwidth, and a layer compared with LSTM and the official package."""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from benchmarks.device import PASSES, build_passes, draw_inputs, necessary_bytes
from benchmarks.timing import ROOT, Call, import_official, medians, print_table, under_bfloat16

SHAPES = [(1, 1, 512), (1, 32, 128), (32, 32, 128), (40, 32, 128), (333, 16, 416), (128, 32, 512), (256, 16, 1024)]
# Layers as wide as their input; the last shape is a single step.
LAYER_SHAPES = [(32, 32, 128), (128, 32, 512), (256, 16, 1024), (1, 1, 512)]


def run_recurrence(_: argparse.Namespace) -> None:
    """ns per element, its share of the copy bandwidth, and the eager reference for comparison."""
    from sru.kernels import recurrence

    large = torch.randn(64 * 2**20 // 4)
    target = torch.empty_like(large)
    copy = 2 * large.numel() * 4 / medians({"copy": lambda: target.copy_(large)})["copy"]
    print(f"Recurrence, float32, highway. Copy bandwidth of this run: {copy / 1e9:.0f} GB/s.\n")
    rows = []
    for steps, batch, size in SHAPES:
        inputs, grads = draw_inputs([steps, batch, size], torch.float32)
        kernel = build_passes(partial(recurrence, backend="cpu"), inputs, grads, "cpu")
        reference = build_passes(partial(recurrence, backend="reference"), inputs, grads, "cpu")
        times = medians({name: kernel[name] for name in PASSES["recurrence"]})
        # Alone: the reference returns its memory to the system, and the next contender would pay for new pages.
        times |= medians({"reference": reference["train"]}, seconds=1.0)
        elements = steps * batch * size
        cells = [f"({steps}, {batch}, {size})"]
        for name in PASSES["recurrence"]:
            share = necessary_bytes(name, 4) * elements / times[name] / copy
            cells.append(f"{times[name] / elements * 1e9:.2f} ({share:.0%})")
        rows.append([*cells, f"{times['reference'] / (times['forward'] + times['backward']):.0f}x"])
    head = ["(T, B, D)", "inference, ns (of copy)", "forward, ns", "backward, ns", "reference / kernel, both passes"]
    print_table(head, rows)


def layer_calls(network: nn.Module, steps: int, batch: int, size: int) -> dict[str, Call]:
    """Inference, and forward and backward, of a network that is called like torch.nn.LSTM."""
    x, grad = torch.randn(2, steps, batch, size)
    passes = build_passes(network, [x], [grad], "cpu")
    return {"infer": passes["infer"], "train": passes["train"]}


def print_official(threads: int) -> None:
    """Print the official package's seconds, a line of JSON per shape; runs in that package's environment."""
    official = import_official()
    torch.set_num_threads(threads)
    for shape in LAYER_SHAPES:
        print(json.dumps(medians(layer_calls(official.SRU(shape[2], shape[2], num_layers=1), *shape))))


def time_official(python: str) -> list[dict[str, float]]:
    """The official package's seconds for each of LAYER_SHAPES, measured by another Python."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); from benchmarks import kernels; "
    code += f"kernels.print_official({torch.get_num_threads()})"
    with tempfile.TemporaryDirectory() as elsewhere:  # a folder without `sru`, which would hide the package
        command = [python, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=elsewhere, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_layer(options: argparse.Namespace) -> None:
    """A layer with its matrix product, compared with torch.nn.LSTM and, with --official, the official package."""
    from sru import SRU

    official = time_official(options.official) if options.official else []
    rows = []
    for i, shape in enumerate(LAYER_SHAPES):
        calls: dict[str, Call] = {}
        for name, network in (("sru", SRU(shape[2], shape[2], 1)), ("lstm", nn.LSTM(shape[2], shape[2]))):
            calls |= {f"{name} {kind}": call for kind, call in layer_calls(network, *shape).items()}
        calls |= {f"{name}, bfloat16": under_bfloat16(call) for name, call in calls.items() if name.startswith("sru")}
        times = medians(calls)
        cells = [str(shape)]
        for kind in ("infer", "train"):
            ours = times[f"sru {kind}"]
            cells += [f"{ours * 1e3:.3g}", f"{times[f'lstm {kind}'] / ours:.1f}x"]
            cells += [f"{official[i][kind] / ours:.1f}x"] if official else []
            cells += [f"{times[f'sru {kind}, bfloat16'] * 1e3:.3g}"]
        rows.append(cells)
    print(f"One layer, float32, input as wide as the layer, {torch.get_num_threads()} threads.\n")
    ratios = ["LSTM / SRU", *(["official / SRU"] if official else []), "in bfloat16, ms"]
    print_table(["(T, B, D)", "inference, ms", *ratios, "forward and backward, ms", *ratios], rows)
    compare_callers((512, 16, 256))


def time_call(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare_callers(shape: tuple[int, int, int]) -> None:
    """One caller, and ten at once, each with its own sequence, as in a server."""
    from sru import SRU

    rows = []
    for name, network in {"SRU": SRU(shape[2], shape[2], 2), "LSTM": nn.LSTM(shape[2], shape[2], 2)}.items():
        call = layer_calls(network, *shape)["infer"]
        alone = medians({"call": call}, seconds=1.0)["call"]
        with ThreadPoolExecutor(10) as pool:
            together = statistics.median(pool.map(time_call, [call] * 100))
        rows.append([name, f"{alone * 1e3:.3g}", f"{together * 1e3:.3g}", f"{together / alone:.1f}x"])
    print(f"Two layers, inference of {shape}, one caller and ten at once.\n")
    print_table(["network", "alone, ms", "among ten, ms", "slower by"], rows)

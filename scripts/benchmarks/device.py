"""Measurements of `python scripts/benchmark.py --device`: SRU and other networks on one shape.

scripts/benchmarks/device_report.py runs this module in a separate process per shape.
"""

import contextlib
import gc
import json
import math
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timing

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = {
    "accuracy": ["errors"],
    "recurrence": ["infer", "forward", "backward"],
    "layer": ["infer", "train"],
    "stack": ["infer", "train"],
    "step": ["infer"],
}
EAGER = "SRU (eager)"


class Convolutions(nn.Sequential):
    """Causal convolutions of x (T, B, D), with the transposes to (B, D, T), or to 2D in channels-last, and back."""

    def forward(self, x: Tensor) -> Tensor:
        steps, flat = x.shape[0], isinstance(self[0], nn.Conv1d)
        x = x.permute(1, 2, 0).contiguous() if flat else x.permute(1, 2, 0)[..., None]
        for layer in self:
            x = layer(x if flat else x.contiguous(memory_format=torch.channels_last))[:, :, :steps]
        return x.flatten(2).permute(2, 0, 1).contiguous()


class Attention(nn.Sequential):
    """Causal attention with heads of 64 features; the modules are pairs of an input and an output projection."""

    def forward(self, x: Tensor) -> Tensor:
        heads = 1 if x.shape[2] % 64 else x.shape[2] // 64
        for enter, leave in zip(list(self)[::2], list(self)[1::2], strict=True):
            q, k, v = enter(x).unflatten(2, (3, heads, -1)).permute(2, 1, 3, 0, 4)
            x = leave(F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2))
        return x


def list_contenders(level: str, shape: list[int], device: str, official: bool) -> dict[str, Callable]:
    """Functions that build each network, or return the recurrence."""
    n, layers = shape[2], 4 if level == "stack" else 1
    if official:
        return {"SRU (official)": lambda: timing.import_official().SRU(n, n, num_layers=layers)}
    from sru import SRU, kernels
    from sru.baselines import recurrent

    def conv2d(width: int) -> nn.Module:
        made = (nn.Conv2d(n, n, (width, 1), padding=(width - 1, 0)) for _ in range(layers))
        return Convolutions(*made).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # backend="auto" would fall back on the reference.
    if level in ("accuracy", "recurrence"):
        return {"SRU": lambda: partial(kernels.recurrence, backend=device)}
    makers: dict[str, Callable] = {"SRU": lambda: SRU(n, n, layers, backend=device)}
    if shape[0] <= 256:  # a loop in Python; with more steps it would take longer than all others together
        makers[EAGER] = lambda: SRU(n, n, layers, backend="reference")
    makers["QRNN (ours)"] = lambda: recurrent.QRNN(n, n, layers)
    makers |= {"LSTM": lambda: nn.LSTM(n, n, layers), "GRU": lambda: nn.GRU(n, n, layers)}
    if level == "step":  # the others cannot compute one step from a state
        return makers
    for w in (2, 3):
        makers[f"Conv1d k={w}"] = lambda w=w: Convolutions(*(nn.Conv1d(n, n, w, padding=w - 1) for _ in range(layers)))
        makers[f"Conv2d k={w}"] = partial(conv2d, w)
    return makers | {"attention": lambda: Attention(*(nn.Linear(n, k * n) for _ in range(layers) for k in (3, 1)))}


def necessary_bytes(kind: str, size: int) -> int:
    """Bytes that a pass of the recurrence must move for one (t, b, d): its numbers have `size` bytes, the state 4.

    Forward reads u0 u1 u2 x and writes h, in training also c. Backward reads u0 u1 u2 x c and h's gradient, and writes
    the gradients of u0 u1 u2 x.
    """
    return {"infer": 5 * size, "forward": 5 * size + 4, "backward": 9 * size + 4}[kind]


def draw_inputs(shape: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """u, x, v, b, c0, and the gradients of h and c_last. Parameters and states are float32, as in the kernels."""
    steps, batch, size = shape
    u, x, gh = (torch.randn(steps, batch, *k, size).to(dtype) for k in ((3,), (), ()))
    return [u, x, *(torch.randn(n, size) for n in (2, 2, batch))], [gh, torch.randn(batch, size)]


def build_passes(network: Any, inputs: list[Tensor], grads: list[Tensor], to: Any) -> dict[str, Callable]:
    """The calls to measure; each returns its results. Gradients are those of all inputs and parameters."""
    inputs, grads = [a.to(to).requires_grad_() for a in inputs], [a.to(to) for a in grads]
    wanted = [*inputs, *(network.parameters() if isinstance(network, nn.Module) else [])]
    wanted = [a for a in wanted if a.requires_grad]

    def forward():
        network.training = torch.is_grad_enabled()  # cuDNN stores less in inference
        h = network(*inputs)
        return [h] if isinstance(h, Tensor) else list(h)[: len(grads)]

    def infer():
        with torch.no_grad():
            return forward()

    def backward(outputs: list[Tensor], keep: bool):
        return torch.autograd.grad(outputs, wanted, [g.to(o) for g, o in zip(grads, outputs, strict=True)], keep)

    calls = {"infer": infer, "forward": forward, "train": lambda: backward(forward(), False)}
    # Backward alone only for the recurrence: with retain_graph, cuDNN copies what it stored in the forward pass.
    return calls if isinstance(network, nn.Module) else calls | {"backward": partial(backward, forward(), True)}


def measure_errors(network: Any, inputs: list[Tensor], grads: list[Tensor], device: str) -> dict[str, float]:
    """The kernel's largest errors against the reference in float64, divided by max(1, the largest exact value)."""
    from sru.kernels import recurrence

    results = []
    for function, to in ((partial(recurrence, backend="reference"), torch.float64), (network, device)):
        calls = build_passes(function, inputs, grads, to)
        results.append([a.detach().cpu().double() for a in (*calls["forward"](), *calls["train"]())])
    names = ["h", "c_last", "grad u", "grad x", "grad v", "grad b", "grad c0"]
    worst = {
        n: float((b - a).abs().max() / a.abs().max().clamp(min=1)) for n, a, b in zip(names, *results, strict=True)
    }
    if not all(map(math.isfinite, worst.values())):
        raise ValueError(f"not finite: {worst}")
    return worst


def time_in_turns(calls: dict, seconds: float, flush: Tensor | None = None, share: int = 1, wall: bool = False) -> dict:
    """The spread of each call's seconds, divided by `share`: on the device or, with `wall`, until the caller continues.

    Contenders take turns, one call each: 25 calls to warm up and 100 to measure, or as many as fit into `seconds`, but
    at least 10. Reading `flush` before each call replaces the contents of the device's cache; writing would leave
    lines that the call has to write back.
    """
    times: dict[Any, list] = {}
    counts = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        fitting = seconds / (time.perf_counter() - start)
        times[name], counts[name] = [], round(min(100, max(10, fitting)))
        for _ in range(round(min(25, fitting))):
            call()
    for turn in range(max(counts.values(), default=0)):
        for name in [name for name in calls if turn < counts[name]]:
            if flush is not None:
                flush.sum()
            if wall:
                torch.cuda.synchronize()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start = time.perf_counter()
            first.record()
            calls[name]()
            last.record()
            if wall:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start, first, last))
    torch.cuda.synchronize()
    spreads = {}
    for name, triples in times.items():
        taken = sorted((s if wall else first.elapsed_time(last) / 1e3) / share for s, first, last in triples)
        tenth, median = len(taken) // 10, statistics.median(taken)
        spreads[name] = {"median": median, "p10": taken[tenth], "p90": taken[-1 - tenth], "n": len(taken)}
    return spreads


def capture(call: Callable, pool: Any = None, times: int = 1) -> Callable:
    """The replay of `times` calls as a CUDA graph; RuntimeError if the replay does not write the first result."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # thread_local: the backward pass runs in another thread.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        for _ in range(times):
            result = call()[0].detach()
    result.fill_(math.nan)
    graph.replay()
    if result.isnan().all():
        raise RuntimeError("the graph does not contain the computation")
    return graph.replay


def measure(order: dict, mode: str) -> dict[str, dict]:
    """A row: {contender: {pass: {figure: value}}}."""
    level, device, seconds, shape = order["level"], order["device"], order["seconds"], order["shape"]
    on_gpu, dtype = device == "cuda", DTYPES[mode]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    cells: dict[str, dict] = {}
    calls, replays, tens = dict[Any, Callable](), dict[Any, Callable](), dict[Any, Callable]()
    for name, make in list_contenders(level, shape, device, order["official"]).items():
        cells[name], passes = {kind: {} for kind in PASSES[level]}, dict[str, Callable]()
        for kind, cell in cells[name].items():
            if name in order["refused"]:
                cell["failed"] = order["refused"][name]
                continue
            print(json.dumps({"trying": name}), flush=True)
            try:
                if not passes:
                    network, (inputs, grads) = make(), draw_inputs(shape, dtype)
                    if isinstance(network, nn.Module):
                        network, inputs, grads = network.to(device, dtype), inputs[1:2], grads[:1]
                    if level == "accuracy":
                        cell["errors"] = measure_errors(network, inputs, grads, device)
                        continue
                    passes = build_passes(network, inputs, grads, device)
                call, start = passes[kind], time.perf_counter()
                call()
                if on_gpu:
                    torch.cuda.synchronize()
                cell["first call, s"] = time.perf_counter() - start
                if on_gpu:
                    held = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    call()
                    cell["peak, MB"] = (torch.cuda.max_memory_allocated() - held) / 1e6
                calls[name, kind] = call
                # A graph does not capture work on streams other than torch's, such as the official kernels.
                if on_gpu and not order["official"] and name not in order["eager"]:
                    print(json.dumps({"trying": name, "graph": True}), flush=True)
                    replays[name, kind] = capture(call, pool)
                    if level == "recurrence":
                        tens[name, kind] = capture(call, pool, 10)
            except Exception as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
                cell["not captured" if (name, kind) in calls else "failed"] = text
            if on_gpu and cell.keys() & {"failed", "not captured"}:
                gc.collect()
                # Raises, and so ends the process, if the device cannot continue.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    print(json.dumps({"trying": None}), flush=True)
    if on_gpu and calls:
        flush = torch.zeros(64 * 2**20, device=device)
        cold = {key: v | {"graph": key in replays} for key, v in time_in_turns(calls | replays, seconds, flush).items()}
        times = {
            "device": cold,
            "warm": time_in_turns(tens, seconds, share=10),
            "eager": time_in_turns(calls, seconds, wall=True),
        }
    else:
        times = {"eager": {key: {"median": m} for key, m in timing.medians(calls, seconds).items()} if calls else {}}
    for key, spreads in times.items():
        for (name, kind), spread in spreads.items():
            cells[name][kind][key] = spread
    return cells


def describe_machine(order: dict) -> dict[str, Any]:
    """The machine, and its current copy bandwidth: bytes read and written per second."""
    device, seconds = order["device"], order["seconds"]
    record = timing.describe_machine()
    record = {"device": record["cpu"]} | record | {"cuda": torch.version.cuda}
    if order["official"]:  # the process of this project's kernels reports the rest
        return record
    source = torch.ones((2**30 if device == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[Any, Callable] = {"copy": lambda: target.copy_(source)}
    if device == "cpu":
        return record | {"copy, bytes/s": 2 * source.nbytes / timing.medians(calls, seconds)["copy"]}
    record["copy, bytes/s"] = 2 * source.nbytes / time_in_turns(calls, seconds)["copy"]["median"]
    with contextlib.suppress(RuntimeError):  # in that case no contender has a graph, and the cells say so
        empty = capture(lambda: [target[:1].zero_()])
        record["replay of an empty kernel, s"] = time_in_turns({0: empty}, seconds)[0]["median"]
    record |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    if shutil.which("nvidia-smi"):
        query = "driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        record[query] = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
    return record


def work(order: dict) -> None:
    """Measure a shape in every mode; print each attempt and each result as a line of JSON."""
    warnings.filterwarnings("error", "The SRU's .* kernels cannot run")  # the cell shows the error
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    # One stream for all: a graph captures a backward pass only on the stream of its forward pass.
    captures = order["device"] == "cuda" and not order["official"]
    with torch.cuda.stream(torch.cuda.Stream()) if captures else contextlib.nullcontext():
        print(json.dumps({"about": describe_machine(order)}), flush=True)
        for mode in order["modes"]:
            print(json.dumps({"mode": mode, "cells": measure(order, mode)}), flush=True)
            gc.collect()
        print(json.dumps({"about": describe_machine(order)}), flush=True)

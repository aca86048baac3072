"""The measuring part of `python scripts/benchmark.py --device cuda`: the SRU beside other networks on one shape.

Runs in a process of its own, which scripts/benchmarks/device_report.py starts.
"""

import contextlib
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import import_official, medians

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"accuracy": ["errors"], "recurrence": ["infer", "forward", "backward"], "step": ["infer"]}
KINDS = {level: KINDS.get(level, ["infer", "train"]) for level in ("accuracy", "recurrence", "layer", "stack", "step")}
EAGER = "SRU (eager)"


class Convolutions(nn.Sequential):
    """Causal, over x (T, B, D), with the transposes to (B, D, T), or to channels last in two dimensions, and back."""

    def forward(self, x: Tensor) -> Tensor:
        steps, flat = x.shape[0], isinstance(self[0], nn.Conv1d)
        x = x.permute(1, 2, 0).contiguous() if flat else x.permute(1, 2, 0)[..., None]
        for layer in self:
            x = layer(x if flat else x.contiguous(memory_format=torch.channels_last))[:, :, :steps]
        return x.flatten(2).permute(2, 0, 1).contiguous()


class Attention(nn.Sequential):
    """Causal, with its projections, which are the layers by twos, and nothing around it; heads of 64."""

    def forward(self, x: Tensor) -> Tensor:
        heads = 1 if x.shape[2] % 64 else x.shape[2] // 64
        for enter, leave in zip(list(self)[::2], list(self)[1::2], strict=True):
            q, k, v = enter(x).unflatten(2, (3, heads, -1)).permute(2, 1, 3, 0, 4)
            x = leave(F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2))
        return x


def list_contenders(level: str, shape: list[int], device: str, official: bool) -> dict[str, Callable]:
    """Functions that make each network, or the recurrence alone."""
    n, layers = shape[2], 4 if level == "stack" else 1

    if official:
        return {"SRU (official)": lambda: import_official().SRU(n, n, num_layers=layers)}
    from sru import SRU, kernels
    from sru.baselines import recurrent

    def conv2d(width: int) -> nn.Module:
        made = (nn.Conv2d(n, n, (width, 1), padding=(width - 1, 0)) for _ in range(layers))
        return Convolutions(*made).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # The device by name, since auto falls back on the reference.
    if level in ("accuracy", "recurrence"):
        return {"SRU": lambda: partial(kernels.recurrence, backend=device)}
    found: dict[str, Callable] = {"SRU": lambda: SRU(n, n, layers, backend=device)}
    if shape[0] <= 256:  # a loop in Python: beyond, it takes the time of all others
        found[EAGER] = lambda: SRU(n, n, layers, backend="reference")
    found["QRNN (ours)"] = lambda: recurrent.QRNN(n, n, layers)
    found |= {"LSTM": lambda: nn.LSTM(n, n, layers), "GRU": lambda: nn.GRU(n, n, layers)}
    if level == "step":  # of the others it needs more than a state
        return found
    for w in (2, 3):
        found[f"Conv1d k={w}"] = lambda w=w: Convolutions(*(nn.Conv1d(n, n, w, padding=w - 1) for _ in range(layers)))
        found[f"Conv2d k={w}"] = partial(conv2d, w)
    return found | {"attention": lambda: Attention(*(nn.Linear(n, k * n) for _ in range(layers) for k in (3, 1)))}


def draw_inputs(shape: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """u, x, v, b, c0 and the gradients of h and c_last; parameters and states are float32, as the kernels keep them."""
    steps, batch, size = shape
    u, x, gh = (torch.randn(steps, batch, *k, size).to(dtype) for k in ((3,), (), ()))
    return [u, x, *(torch.randn(n, size) for n in (2, 2, batch))], [gh, torch.randn(batch, size)]


def build_passes(network: Any, inputs: list[Tensor], grads: list[Tensor], to: Any) -> dict[str, Callable]:
    """The calls to measure; each returns its results. Gradients of all inputs and parameters are required."""
    inputs, grads = [a.to(to).requires_grad_() for a in inputs], [a.to(to) for a in grads]
    wanted = [*inputs, *(network.parameters() if isinstance(network, nn.Module) else [])]
    wanted = [a for a in wanted if a.requires_grad]

    def forward():
        network.training = torch.is_grad_enabled()  # cuDNN keeps less in inference
        h = network(*inputs)
        return [h] if isinstance(h, Tensor) else list(h)[: len(grads)]

    def infer():
        with torch.no_grad():
            return forward()

    def backward(outputs: list[Tensor], keep: bool):
        return torch.autograd.grad(outputs, wanted, [g.to(o) for g, o in zip(grads, outputs, strict=True)], keep)

    calls = {"infer": infer, "forward": forward, "train": lambda: backward(forward(), False)}
    # By itself for the recurrence only: cuDNN would copy what it keeps of the forward pass, to keep it on.
    return calls if isinstance(network, nn.Module) else calls | {"backward": partial(backward, forward(), True)}


def measure_errors(network: Any, inputs: list[Tensor], grads: list[Tensor], device: str) -> dict[str, float]:
    """The kernel's largest errors against the reference in float64, over max(1, the largest exact value)."""
    from sru.kernels import recurrence

    found = []
    for function, to in ((partial(recurrence, backend="reference"), torch.float64), (network, device)):
        calls = build_passes(function, inputs, grads, to)
        found.append([a.detach().cpu().double() for a in (*calls["forward"](), *calls["train"]())])
    results = ["h", "c_last", "grad u", "grad x", "grad v", "grad b", "grad c0"]
    worst = {
        n: float((b - a).abs().max() / a.abs().max().clamp(min=1)) for n, a, b in zip(results, *found, strict=True)
    }
    if not all(map(math.isfinite, worst.values())):
        raise ValueError(f"not finite: {worst}")
    return worst


def time_in_turns(calls: dict, seconds: float, flush: Tensor | None = None, share: int = 1, wall: bool = False) -> dict:
    """The spread of each call's seconds on the device, divided by `share`, or with `wall` as the caller waits for them.

    One call of each contender after the other: 25 to warm up and 100 that count, or as many, but at least 10, as take
    `seconds`. Writing `flush` empties the device's cache before each call.
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
                flush.zero_()
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
    found = {}
    for name, triples in times.items():
        taken = sorted((s if wall else first.elapsed_time(last) / 1e3) / share for s, first, last in triples)
        tenth = len(taken) // 10
        found[name] = {
            "median": statistics.median(taken),
            "p10": taken[tenth],
            "p90": taken[-1 - tenth],
            "n": len(taken),
        }
    return found


def capture(call: Callable, pool: Any = None, times: int = 1) -> Callable:
    """The replay of `times` calls as a CUDA graph; RuntimeError if it leaves the call's first result unwritten."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # thread_local: backward runs in a thread of its own.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        for _ in range(times):
            result = call()[0].detach()
    result.fill_(math.nan)
    graph.replay()
    if result.isnan().all():
        raise RuntimeError("the graph does not hold the work")
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
        cells[name], made = {kind: {} for kind in KINDS[level]}, dict[str, Callable]()
        for kind, cell in cells[name].items():
            if name in order["refused"]:
                cell["failed"] = order["refused"][name]
                continue
            print(json.dumps({"trying": name}), flush=True)
            try:
                if not made:
                    network, (inputs, grads) = make(), draw_inputs(shape, dtype)
                    if isinstance(network, nn.Module):
                        network, inputs, grads = network.to(device, dtype), inputs[1:2], grads[:1]
                    if level == "accuracy":
                        cell["errors"] = measure_errors(network, inputs, grads, device)
                        continue
                    made = build_passes(network, inputs, grads, device)
                call, start = made[kind], time.perf_counter()
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
                # A graph does not see work on another stream than torch's, such as the official kernels.
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
                # Raises, and so ends the process, where the device is beyond going on.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    print(json.dumps({"trying": None}), flush=True)
    if on_gpu and calls:
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        cold = {key: v | {"graph": key in replays} for key, v in time_in_turns(calls | replays, seconds, flush).items()}
        found = {
            "device": cold,
            "warm": time_in_turns(tens, seconds, share=10),
            "eager": time_in_turns(calls, seconds, wall=True),
        }
    else:
        found = {"eager": {key: {"median": median} for key, median in medians(calls, seconds).items()} if calls else {}}
    for key, spreads in found.items():
        for (name, kind), spread in spreads.items():
            cells[name][kind][key] = spread
    return cells


def describe_machine(order: dict) -> dict[str, Any]:
    """The machine, and the bytes a second that a copy reads and writes on it, in this minute."""
    device, seconds = order["device"], order["seconds"]
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = (re.findall(r"model name\s*:\s*(.*)", cpuinfo) or [platform.processor() or "cpu"])[0]
    record = {"device": name, "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    record |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("numba", "cupy", "cupy-cuda12x", "cupy-cuda13x", "sru"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            record[package] = importlib.metadata.version(package)
    if order["official"]:  # the process of this project's kernels reports the rest
        return record
    source = torch.ones((2**30 if device == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[Any, Callable] = {"copy": lambda: target.copy_(source)}
    if device == "cpu":
        return record | {"copy, bytes/s": 2 * source.nbytes / medians(calls, seconds)["copy"]}
    record["copy, bytes/s"] = 2 * source.nbytes / time_in_turns(calls, seconds)["copy"]["median"]
    with contextlib.suppress(RuntimeError):  # then no contender has a graph either, and the cells say so
        empty = capture(lambda: [target[:1].zero_()])
        record["replay of an empty kernel, s"] = time_in_turns({0: empty}, seconds)[0]["median"]
    record |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    if shutil.which("nvidia-smi"):
        asked = "driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        record[asked] = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
    return record


def work(order: dict) -> None:
    """Measure a shape in every mode; print each attempt and each result as a line of JSON."""
    warnings.filterwarnings("error", "The SRU's .* kernels cannot run")  # a cell is to say so
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    # One stream for all, since a graph holds a backward pass only on the stream of its forward pass.
    aside = order["device"] == "cuda" and not order["official"]
    with torch.cuda.stream(torch.cuda.Stream()) if aside else contextlib.nullcontext():
        print(json.dumps({"about": describe_machine(order)}), flush=True)
        for mode in order["modes"]:
            print(json.dumps({"mode": mode, "cells": measure(order, mode)}), flush=True)
            gc.collect()
        print(json.dumps({"about": describe_machine(order)}), flush=True)

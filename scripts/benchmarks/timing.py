"""Shared by the benchmarks: timing in turns, models of equal size, and tables."""

import argparse
import bisect
import contextlib
import itertools
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[[], object]


def medians(contenders: Mapping[Any, Call], seconds: float = 2.0) -> dict[Any, float]:
    """Median seconds per call. Contenders take turns of a few calls, so that a disturbance affects all of them.

    The first call of a turn is not counted: it finds the caches full of another contender's data.
    """
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in contenders.items():
            call()
            for _ in range(5):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def time_loading(loader: Iterable[Any]) -> float:
    """Median seconds to load a batch."""
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return medians({"load": lambda: next(batches)}, seconds=0.5)["load"]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for cells in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(cells) + " |")
    print()


def describe_machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = (re.findall(r"model name\s*:\s*(.*)", cpuinfo) or [platform.processor() or "cpu"])[0]
    record = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    record |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numba", "cupy", "cupy-cuda12x", "cupy-cuda13x", "sru"):
        with contextlib.suppress(PackageNotFoundError):
            record[package] = version(package)
    return record


def under_bfloat16(call: Call) -> Call:
    """The call under autocast."""

    def cast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call()

    return cast


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread, without gradients. Decoding makes hundreds of small calls; a second thread only adds noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def import_official() -> Any:
    """The official package sru, in an environment that has it."""
    import sru

    if ROOT in Path(sru.__file__).resolve().parents:
        raise RuntimeError(f"{sys.executable} holds this project's sru, not the official package")
    return sru


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def build_of_size(build: Callable[[int], Any], parameters: int) -> tuple[int, Any]:
    """The multiple of 8 for which build(width) comes nearest to this number of parameters, and that network."""

    def excess(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(width)) - parameters

    widths = range(16, 4096, 8)
    first = bisect.bisect_left(widths, 0, key=excess)
    width = min(widths[max(0, first - 1) : first + 1], key=lambda width: abs(excess(width)))
    return width, build(width)


def training_step(task: Any, batch: Any) -> Call:
    """A call that computes the loss and the gradients of a batch."""

    def step() -> None:
        for parameter in task.parameters():
            parameter.grad = None
        task.loss(batch)[0].backward()

    task.train()
    return step


class Comparison:
    """Networks of equal size and depth: seconds of a training step, and a table with further columns.

    Args:
        encoders: {name: factory}, called with input_size, hidden_size and num_layers.
        build: makes the network of a task from an encoder(input_size=...) and a width.
        batch: the training batch, of `count` `unit`s.
        depth, parameters: defaults of --depth and --parameters.
        baseline: the name of the network that ratios refer to.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        encoders: Mapping[str, Callable[..., Any]],
        build: Callable[[Callable[..., Any], int], Any],
        batch: Any,
        count: int,
        unit: str,
        *,
        depth: int,
        parameters: float,
        baseline: str = "LSTM",
    ) -> None:
        self.depth, self.baseline = options.depth or depth, baseline
        size = int(options.parameters or parameters)
        self.size = f"about {size / 1e6:g}M parameters, float32"

        def build_task(encoder: Callable[..., Any], width: int) -> Any:
            return build(partial(encoder, hidden_size=width, num_layers=self.depth), width)

        chosen = {name: build_of_size(partial(build_task, encoder), size) for name, encoder in encoders.items()}
        self.tasks = {name: task for name, (_, task) in chosen.items()}
        self.trained = medians(
            {name: training_step(task, batch) for name, task in self.tasks.items()}, seconds=options.seconds * 4
        )
        self.columns: dict[str, Callable[[str], str]] = {
            "model": str,
            "width": lambda name: str(chosen[name][0]),
            "parameters": lambda name: f"{count_parameters(self.tasks[name]) / 1e6:.2f}M",
            f"training, {unit}/s": lambda name: f"{count / self.trained[name]:,.0f}",
            "/ LSTM's": lambda name: self.ratio(self.trained, name),
        }

    def ratio(self, times: dict[str, float], name: str) -> str:
        """How many times as fast as the baseline."""
        return f"{times[self.baseline] / times[name]:.2f}x"

    def print(self, title: str, columns: dict[str, Callable[[str], str]]) -> None:
        """Print the table; `columns` adds {head: cell of a network's name}."""
        print(f"{title}\n")
        columns = self.columns | columns
        print_table([*columns], [[cell(name) for cell in columns.values()] for name in self.tasks])

"""What the benchmarks share: timing in turns, networks of equal size, and tables."""

import argparse
import bisect
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[[], object]


def medians(contenders: dict[Any, Call], seconds: float = 2.0) -> dict[Any, float]:
    """Median seconds a call; contenders take turns of a few calls, so that a disturbance meets them all.

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


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for cells in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(cells) + " |")
    print()


def under_bfloat16(call: Call) -> Call:
    """The call under autocast."""

    def cast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call()

    return cast


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread, without gradients: decoding makes hundreds of small calls, which a second thread makes noisier."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def import_official() -> Any:
    """The official package, in an environment that holds it."""
    import sru

    if ROOT in Path(sru.__file__).resolve().parents:
        raise RuntimeError(f"{sys.executable} holds this project's sru, not the official package")
    return sru


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def build_of_size(network: Callable[[int], Any], parameters: int) -> tuple[int, Any]:
    """The width, a multiple of 8, with which `network` has the nearest number of parameters, and that network."""

    def excess(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(network(width)) - parameters

    widths = range(16, 4096, 8)
    first = bisect.bisect_left(widths, 0, key=excess)
    width = min(widths[max(0, first - 1) : first + 1], key=lambda width: abs(excess(width)))
    return width, network(width)


def training_step(task: Any, batch: Any) -> Call:
    """Forward and backward of a batch."""

    def step() -> None:
        for parameter in task.parameters():
            parameter.grad = None
        task.loss(batch)[0].backward()

    task.train()
    return step


class Comparison:
    """Networks of equal size and depth, side by side: their seconds of a training step, and a table.

    `build(name, depth, width)` makes the network of a name; `prepare(task)` its training step, of `count` `unit`s.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        names: list[str],
        build: Callable[[str, int, int], Any],
        prepare: Callable[[Any], Call],
        count: int,
        unit: str,
        *,
        depth: int,
        parameters: float,
        baseline: str,
    ) -> None:
        self.depth, self.baseline, size = options.depth or depth, baseline, int(options.parameters or parameters)
        self.size = f"about {size / 1e6:g}M parameters, float32"
        chosen = {name: build_of_size(partial(build, name, self.depth), size) for name in names}
        self.tasks = {name: task for name, (_, task) in chosen.items()}
        steps = {name: prepare(task) for name, task in self.tasks.items()}
        self.trained = medians(steps, seconds=options.seconds * 4)
        self.head = ["model", "width", "parameters", f"training, {unit}/s", "/ LSTM's"]
        self.rows = {
            name: [
                name,
                str(width),
                f"{count_parameters(task) / 1e6:.2f}M",
                f"{count / self.trained[name]:,.0f}",
                self.ratio(self.trained, name),
            ]
            for name, (width, task) in chosen.items()
        }

    def ratio(self, times: dict[str, float], name: str) -> str:
        """How many times as fast as the baseline."""
        return f"{times[self.baseline] / times[name]:.2f}x"

    def print(self, title: str, columns: dict[str, Callable[[str], str]]) -> None:
        """Print the table with further columns, by functions of a network's name."""
        print(f"{title}\n")
        cells = [[*row, *(column(name) for column in columns.values())] for name, row in self.rows.items()]
        print_table([*self.head, *columns], cells)

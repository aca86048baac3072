"""Training through the framework: a step of train.py compared with a plain loop, and epochs of classification."""

import argparse
import contextlib
import copy
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from reporting.paper_rows import compose_config
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.timing import medians, print_table, time_loading
from data.images import Digits
from sru.kernels.linear import linear
from tasks.run.malloc import keep_freed_memory

STEPS = 150  # of a turn, at most
LARGE_STEPS = 10  # the same for the large network
VECTOR_SIZES = 300, 100  # as published, and the smallest of GloVe's for 6 billion words
EPOCH_MODELS = {
    "SRU, 2 layers": ["model=sru"],
    "LSTM, 2 layers": ["model=lstm"],
    "QRNN + highway, 2 layers": ["model=qrnn", "model.highway=true"],
    "CNN": ["model=cnn"],
}


class Rows(Digits):
    """Random images of MNIST's shape, one row per step."""

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        noise = np.random.default_rng(0)
        return {
            split: (noise.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10)
            for split, count in (("train", 32 * STEPS + 64), ("test", 64))
        }


def corpus_words(options: argparse.Namespace) -> list[str]:
    """The corpus of --data and --root as overrides of train.py."""
    return [f"data={options.data}", *([f"data.root={options.root}"] if options.root else [])]


def configure(folder: Path, *words: str) -> DictConfig:
    """The configuration of a run of one epoch, with one batch of validation and one of test."""
    limits = [f"trainer.limit_{split}_batches=1" for split in ("val", "test")]
    return compose_config("epochs=1", "trainer.enable_progress_bar=false", f"run_dir={folder}", *limits, *words)


def write_vectors(folder: Path, options: argparse.Namespace, size: int) -> list[str]:
    """Overrides for the corpus with random vectors of `size` features; the values do not change the speed."""
    corpus = corpus_words(options)
    data = instantiate(compose_config(*corpus).data)
    data.prepare_data()
    data.setup()
    words = {word for split in data.splits.values() for sentence, _ in split for word in sentence}
    path = folder / f"vectors{size}.txt"
    with path.open("w", encoding="utf-8") as file:
        for word, vector in zip(sorted(words), torch.randn(len(words), size).tolist(), strict=True):
            file.write(" ".join([word, *(f"{value:.4f}" for value in vector)]) + "\n")
    return [*corpus, f"data.vectors={path}", f"data.cache={folder}/{size}"]


class Run:
    """A configuration, run by a plain loop and by train.py."""

    def __init__(self, cfg: DictConfig, steps: int | None = None) -> None:
        self.cfg = copy.deepcopy(cfg)
        self.data = instantiate(cfg.data)
        kwargs = self.data.model_kwargs
        torch.manual_seed(0)
        self.task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **kwargs)
        batches = len(self.data.train_dataloader())
        self.steps = batches if steps is None else min(steps, batches)
        self.cfg.trainer.limit_train_batches = self.steps
        self.turns = 0

    def time_plain(self) -> float:
        """Seconds of a step that computes the same as train.py, and nothing else."""
        task = copy.deepcopy(self.task).train()
        optimizer: Any = task.configure_optimizers()
        clip = self.cfg.trainer.gradient_clip_val
        batches = itertools.islice(self.data.train_dataloader(), self.steps)  # creates the batches, maybe
        start = time.perf_counter()
        for batch in batches:
            loss = task.loss(batch)[0]
            optimizer.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(task.parameters(), clip)
            optimizer.step()
        return (time.perf_counter() - start) / self.steps

    def time_train(self, precision: str = "32-true") -> dict[str, float]:
        """The metrics.json of a run of train.py, and `step`: its seconds per step."""
        cfg = copy.deepcopy(self.cfg)
        cfg.trainer.precision = precision
        self.turns += 1
        cfg.run_dir = f"{cfg.run_dir}/{self.turns}"
        with contextlib.redirect_stdout(io.StringIO()):
            train.run(cfg)
        record = json.loads((Path(cfg.run_dir) / "metrics.json").read_text(encoding="utf-8"))
        return record | {"step": record["seconds"] / self.steps}

    def count_operations(self) -> float:
        """Floating-point operations of the matrix products of a step."""
        counter = FlopCounterMode(display=False)
        task = copy.deepcopy(self.task).train()
        batches = list(itertools.islice(self.data.train_dataloader(), min(self.steps, 20)))
        with counter:
            for batch in batches:
                task.loss(batch)[0].backward()
        return counter.get_total_flops() / len(batches)


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()  # as train.py does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = {size: write_vectors(folder, options, size) for size in VECTOR_SIZES}
        runs = {
            f"{options.data}, fixed vectors of {size}": Run(configure(folder / f"words{size}", *words[size]), STEPS)
            for size in VECTOR_SIZES
        }
        rows = ["task=image", "data._target_=benchmarks.framework.Rows"]
        runs["rows of 28 x 28 pixels"] = Run(configure(folder / "rows", *rows), STEPS)
        runs["characters, (128, 32)"] = Run(configure(folder / "characters", "task=lm"), LARGE_STEPS)
        compare_steps(runs, options.turns)


def compare_steps(runs: dict[str, Run], turns: int) -> None:
    """Print the seconds per step of every run, in turns."""
    a, b = torch.randn(2, 1024, 1024)
    product = 1 / medians({"product": lambda: linear(a, b)}, seconds=1.0)["product"] * 2 * 1024**3
    head = ["data", "plain loop, ms", "train.py, ms", "train.py / plain", "its products, ms", "plain / products"]
    rows = []
    for name, own in runs.items():
        floor = own.count_operations() / product
        times = []
        for turn in range(turns + 1):
            plain, framed, cast = own.time_plain(), own.time_train(), own.time_train("bf16-mixed")
            if turn:  # turn 0 warms up
                times.append((plain, framed["step"], cast["step"]))
        plain, step, _ = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(step / alone for alone, step, _ in times)
        gain = statistics.median(step / cast for _, step, cast in times)
        cells = [name, f"{plain * 1e3:.2f}", f"{step * 1e3:.2f}", f"{ratio:.2f}x"]
        rows.append([*cells, f"{floor * 1e3:.2f}", f"{plain / floor:.2f}x", f"{gain:.2f}x"])
    print(
        f"A training step, SRU in the tasks' default sizes, float32, {torch.get_num_threads()} threads; medians of "
        f"{turns} turns of at most {STEPS} steps each. Products of 1024 x 1024 x 1024: {product / 1e9:.0f} GFLOP/s.\n"
    )
    print_table([*head, "bf16-mixed"], rows)


def run_epochs(options: argparse.Namespace) -> None:
    """Epochs of classification with fixed vectors and the published sizes, by train.py, loading included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = write_vectors(folder, options, 300)
        runs = {
            name: Run(configure(folder / str(i), *words, *model))
            for i, (name, model) in enumerate(EPOCH_MODELS.items())
        }
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.turns + 1):
            for name, run in runs.items():
                speed = run.time_train()["examples_per_second"]
                if turn:  # turn 0 warms up
                    speeds[name].append(speed)
    loading = time_loading(run.data.train_dataloader()) / run.data.batch_size
    speed_of = {name: statistics.median(values) for name, values in speeds.items()}
    examples = len(run.data.splits["train"])
    print(f"Training, data={options.data}: {examples} examples, batch 32, fixed 300-dimensional vectors.\n")
    rows = [
        [name, f"{speed:.0f}", f"{speed / speed_of['LSTM, 2 layers']:.2f}x", f"{loading * speed:.2%}"]
        for name, speed in speed_of.items()
    ]
    print_table(["model", "examples/s", "/ LSTM's", "loading, share of the epoch"], rows)

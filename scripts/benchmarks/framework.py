"""Training through the framework: a step of train.py beside a plain loop's, and epochs of classification."""

import argparse
import contextlib
import copy
import io
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.timing import ROOT, medians, print_table
from data.images import Digits
from sru.kernels.linear import linear
from tasks.run.malloc import keep_freed_memory
from tasks.run.throughput import ThroughputMonitor

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
    """Noise of MNIST's shape, a row a step."""

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        noise = np.random.default_rng(0)
        return {
            split: (noise.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10)
            for split, count in (("train", 32 * STEPS + 64), ("test", 64))
        }


def corpus_words(options: argparse.Namespace) -> list[str]:
    """The command line's choice of a corpus, in the words of train.py."""
    return [f"data={options.data}", *([f"data.root={options.root}"] if options.root else [])]


def configure(folder: Path, *words: str) -> DictConfig:
    """The configuration that train.py makes of these words, for one epoch and a batch of validation and of test."""
    limits = [f"trainer.limit_{split}_batches=1" for split in ("val", "test")]
    run = ["logger=csv", "epochs=1", "trainer.enable_progress_bar=false", f"run_dir={folder}", *limits]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=[*run, *words], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def write_vectors(folder: Path, corpus: list[str], size: int) -> Path:
    """Fixed vectors for the words of a corpus; their values do not change the speed."""
    data = instantiate(configure(folder / "unused", *corpus).data)
    data.prepare_data()
    data.setup()
    words = {word for split in data.splits.values() for sentence, _ in split for word in sentence}
    path = folder / f"vectors{size}.txt"
    with path.open("w", encoding="utf-8") as file:
        for word, vector in zip(sorted(words), torch.randn(len(words), size).tolist(), strict=True):
            file.write(" ".join([word, *(f"{value:.4f}" for value in vector)]) + "\n")
    return path


class Run:
    """A configuration, run by a plain loop and by train.py."""

    def __init__(self, cfg: DictConfig, steps: int = STEPS) -> None:
        self.cfg = copy.deepcopy(cfg)
        self.data = instantiate(cfg.data)
        kwargs = self.data.model_kwargs
        torch.manual_seed(0)
        self.task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **kwargs)
        self.steps = min(steps, len(self.data.train_dataloader()))
        self.cfg.trainer.limit_train_batches = self.steps
        self.turns = 0

    def batches(self) -> Any:
        return itertools.islice(self.data.train_dataloader(), self.steps)

    def time_plain(self) -> float:
        """Seconds of a step that computes what train.py computes, and nothing else."""
        task = copy.deepcopy(self.task).train()
        optimizer: Any = task.configure_optimizers()
        clip = self.cfg.trainer.gradient_clip_val
        batches = self.batches()  # which may be made now
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
        """The metrics.json of a run of train.py, and its seconds of a step."""
        cfg = copy.deepcopy(self.cfg)
        cfg.trainer.precision = precision
        self.turns += 1
        cfg.run_dir = f"{cfg.run_dir}/{self.turns}"
        with contextlib.redirect_stdout(io.StringIO()):
            train.run(cfg)
        found = json.loads((Path(cfg.run_dir) / "metrics.json").read_text(encoding="utf-8"))
        return found | {"step": found["seconds"] / self.steps}

    def count_operations(self) -> float:
        """Floating-point operations of the matrix products of a step."""
        counter = FlopCounterMode(display=False)
        task, batches = copy.deepcopy(self.task).train(), list(itertools.islice(self.batches(), 20))
        with counter:
            for batch in batches:
                task.loss(batch)[0].backward()
        return counter.get_total_flops() / len(batches)


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()  # as train.py does
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), corpus_words(options)
        words = {
            size: [*corpus, f"data.vectors={write_vectors(folder, corpus, size)}", f"data.cache={folder}/{size}"]
            for size in VECTOR_SIZES
        }
        runs = {
            f"{options.data}, fixed vectors of {size}": Run(configure(folder / f"words{size}", *words[size]))
            for size in VECTOR_SIZES
        }
        rows = ["task=image", "data._target_=benchmarks.framework.Rows"]
        runs["rows of 28 x 28 pixels"] = Run(configure(folder / "rows", *rows))
        runs["characters, (128, 32)"] = Run(configure(folder / "characters", "task=lm"), LARGE_STEPS)
        lstm = Run(configure(folder / "lstm", *words[VECTOR_SIZES[0]], "model=lstm"))
        compare_steps(runs, lstm, options.turns)


def compare_steps(runs: dict[str, Run], lstm: Run, turns: int) -> None:
    """Print the steps of every run, by turns, and the speed of the first beside an LSTM's."""
    a, b = torch.randn(2, 1024, 1024)
    product = 1 / medians({"product": lambda: linear(a, b)}, seconds=1.0)["product"] * 2 * 1024**3
    cells, sru = [], next(iter(runs.values()))
    speeds: list[tuple[float, float]] = []
    for name, own in runs.items():
        floor = own.count_operations() / product
        found = []
        for turn in range(turns + 1):
            plain, framed, cast = own.time_plain(), own.time_train(), own.time_train("bf16-mixed")
            other = lstm.time_train() if own is sru else framed
            if turn:  # the first one warms up
                found.append((plain, framed["step"], cast["step"]))
                speeds += [(framed["examples_per_second"], other["examples_per_second"])] if own is sru else []
        plain, step, _ = (statistics.median(times) for times in zip(*found, strict=True))
        ratio = statistics.median(step / alone for alone, step, _ in found)
        gain = statistics.median(step / cast for _, step, cast in found)
        cells.append([name, f"{plain * 1e3:.2f}", f"{step * 1e3:.2f}", f"{ratio:.2f}x"])
        cells[-1] += [f"{floor * 1e3:.2f}", f"{plain / floor:.2f}x", f"{gain:.2f}x"]
    print(
        f"A training step, SRU of the tasks' own sizes, float32, {torch.get_num_threads()} threads; medians of {turns} "
        f"turns of at most {STEPS} steps each. Products of 1024 x 1024 x 1024: {product / 1e9:.0f} GFLOP/s.\n"
    )
    head = ["data", "plain loop, ms", "train.py, ms", "train.py / plain", "its products, ms", "plain / products"]
    print_table([*head, "bf16-mixed"], cells)
    ours, theirs = (statistics.median(found) for found in zip(*speeds, strict=True))
    ratio = statistics.median(own / other for own, other in speeds)
    print(
        f"Two layers on {next(iter(runs))}, by train.py: SRU {ours:.0f} examples/s, LSTM {theirs:.0f}: {ratio:.2f}x.\n"
    )


def run_epochs(options: argparse.Namespace) -> None:
    """Epochs of classification with fixed vectors and the published sizes, through the trainer, loading included."""
    import pytorch_lightning as pl

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        overrides = [*corpus_words(options), "run_dir=."]
        configs = {name: compose("config", overrides=[*overrides, *words]) for name, words in EPOCH_MODELS.items()}
    data = instantiate(next(iter(configs.values())).data)
    kwargs = data.model_kwargs
    # The vectors' values do not change the speed.
    kwargs["vectors"] = torch.nn.functional.normalize(torch.randn(kwargs["vocab_size"], 300))
    loader = data.train_dataloader()
    tasks = {name: instantiate(cfg.task)(encoder=instantiate(cfg.model), **kwargs) for name, cfg in configs.items()}
    speeds: dict[str, list[float]] = {name: [] for name in tasks}
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for turn in range(options.turns + 1):
        for name, task in tasks.items():
            clock = ThroughputMonitor()
            trainer = pl.Trainer(
                max_epochs=1, accelerator="cpu", callbacks=[clock], enable_model_summary=False, **quiet
            )
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit(task, loader)
            if turn:  # the first one warms up
                speeds[name].append(clock.speed)
    start = time.perf_counter()
    for _ in loader:
        pass
    loading = time.perf_counter() - start
    examples, speed_of = len(data.splits["train"]), {name: statistics.median(found) for name, found in speeds.items()}
    print(f"Training, data={options.data}: {examples} examples, batch 32, fixed 300-dimensional vectors.\n")
    rows = [
        [name, f"{speed:.0f}", f"{speed / speed_of['LSTM, 2 layers']:.2f}x", f"{loading * speed / examples:.2%}"]
        for name, speed in speed_of.items()
    ]
    print_table(["model", "examples/s", "against LSTM", "loading, share of the epoch"], rows)

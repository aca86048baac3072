"""What `scripts/benchmark.py squad` measures: the readers of SRU (2018), Table 2, beside one another."""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import hydra
import torch
from benchmark import in_bfloat16, medians, table

from data.reader import Batch
from data.squad import Sample
from tasks import door
from tasks.squad import QuestionAnswering

EXPERIMENTS = {
    "SRU, 3 layers": "squad_sru_3l",
    "SRU, 4 layers": "squad_sru_4l",
    "SRU, 6 layers": "squad_sru_6l",
    "QRNN + highway, 4 layers": "squad_qrnn_4l",
    "QRNN + highway, 6 layers": "squad_qrnn_6l",
    "LSTM, 3 layers": "squad_lstm_3l",
}
# With spaCy's en_core_web_sm: 50 parts of speech, 18 kinds of names.
NUM_FEATURES = 4 + 50 + 18
WIDTH = 300  # of GloVe's vectors


def reader(experiment: str, vocab_size: int) -> tuple[QuestionAnswering, torch.optim.Optimizer]:
    """The network of an experiment, with vectors that are drawn, and its optimiser."""
    cfg = hydra.compose("config", overrides=[f"experiment={experiment}"])
    sizes = {"vocab_size": vocab_size, "num_features": NUM_FEATURES, "vectors": torch.randn(vocab_size, WIDTH)}
    task = hydra.utils.instantiate(cfg.task)(encoder=hydra.utils.instantiate(cfg.model), **sizes)
    return task.train(), task.configure_optimizers()


def training(task: QuestionAnswering, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> Callable[[], None]:
    """A training step of each batch."""

    def steps() -> None:
        for batch in batches:
            optimizer.zero_grad()
            task.loss(batch)[0].backward()
            optimizer.step()

    return steps


def encoding(task: QuestionAnswering, batches: list[Batch]) -> Callable[[], None]:
    """Forward and backward of the two encoders alone, on inputs of the batches' shapes."""
    inputs: list[Any] = [
        (encoder, torch.randn(*words.shape, size, requires_grad=True), words == 0)
        for batch in batches
        for encoder, words, size in zip(
            task.encoders, (batch.passage, batch.question), (2 * WIDTH + NUM_FEATURES, WIDTH), strict=True
        )
    ]

    def steps() -> None:
        for encoder, x, pad in inputs:
            encoder(x, None, pad)[0].sum().backward()

    return steps


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        data = Sample(cache=cache, min_count=1)
        vocab_size = data.dims["vocab_size"]
        loader = data.train_dataloader()
        batches = list(itertools.islice(loader, 2))
    batches = [batch._replace(features=torch.rand(*batch.passage.shape, NUM_FEATURES)) for batch in batches]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(door.ROOT / "conf")):
        readers = {name: reader(experiment, vocab_size) for name, experiment in EXPERIMENTS.items()}
    contenders: dict[str, Callable[[], object]] = {name: training(*pair, batches) for name, pair in readers.items()}
    cast = {f"{name}, bfloat16": in_bfloat16(steps) for name, steps in contenders.items()}
    trained = medians(contenders | cast, seconds=options.seconds * 4)
    encoded = medians(
        {name: encoding(task, batches) for name, (task, _) in readers.items()}, seconds=options.seconds * 4
    )
    again = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
    load = medians({"load": lambda: next(again)}, seconds=0.5)["load"]
    steps = ", ".join(str(len(batch.passage)) for batch in batches)
    print(
        f"Readers of Table 2, float32: training steps of {len(batches)} batches of {data.batch_size} passages of "
        f"{steps} tokens, vectors fixed but for 1000 words.\n"
    )
    rows = []
    for name, (task, _) in readers.items():
        count = sum(p.numel() for part, p in task.named_parameters() if not part.startswith("embedding."))
        step = trained[name] / len(batches)
        rows.append(
            [
                name,
                f"{count / 1e6:.1f}M",
                f"{data.batch_size / step:,.1f}",
                f"{trained['LSTM, 3 layers'] / trained[name]:.2f}x",
                f"{1e3 * encoded[name] / len(batches):,.0f} ms",
                f"{encoded['LSTM, 3 layers'] / encoded[name]:.2f}x",
                f"{encoded[name] / trained[name]:.0%}",
                f"{load / step:.2%}",
                f"{trained[name] / trained[f'{name}, bfloat16']:.2f}x",
            ]
        )
    speeds = [
        "examples/s",
        "/ LSTM's",
        "encoders alone",
        "LSTM's / this",
        "share of a step",
        "loading, share of a step",
        "in bfloat16",
    ]
    table(["reader", "parameters", *speeds], rows)

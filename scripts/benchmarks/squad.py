"""The readers of SRU (2018), Table 2, side by side: training, and the encoders' share of it."""

import argparse
import itertools
import tempfile
from typing import Any

import torch

from benchmarks.timing import ROOT, Call, medians, print_table, under_bfloat16
from data.squad import Sample
from data.text.squad_features import Batch
from tasks.squad import QuestionAnswering

EXPERIMENTS = {
    "SRU, 3 layers": "squad_sru_3l",
    "SRU, 4 layers": "squad_sru_4l",
    "SRU, 6 layers": "squad_sru_6l",
    "QRNN + highway, 4 layers": "squad_qrnn_4l",
    "QRNN + highway, 6 layers": "squad_qrnn_6l",
    "LSTM, 3 layers": "squad_lstm_3l",
}
LSTM = "LSTM, 3 layers"
# With spaCy's en_core_web_sm: 50 parts of speech, 18 kinds of names.
NUM_FEATURES = 4 + 50 + 18
WIDTH = 300  # of GloVe's vectors


def build(experiment: str, vocab_size: int) -> QuestionAnswering:
    """The network of an experiment, with random vectors."""
    from hydra import compose
    from hydra.utils import instantiate

    cfg = compose("config", overrides=[f"experiment={experiment}"])
    sizes = {"vocab_size": vocab_size, "num_features": NUM_FEATURES, "vectors": torch.randn(vocab_size, WIDTH)}
    return instantiate(cfg.task)(encoder=instantiate(cfg.model), **sizes).train()


def prepare_training(task: QuestionAnswering, batches: list[Batch]) -> Call:
    """A training step of each batch."""
    optimizer: Any = task.configure_optimizers()

    def steps() -> None:
        for batch in batches:
            optimizer.zero_grad()
            task.loss(batch)[0].backward()
            optimizer.step()

    return steps


def prepare_encoding(task: QuestionAnswering, batches: list[Batch]) -> Call:
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
    from hydra import initialize_config_dir

    with tempfile.TemporaryDirectory() as cache:
        data = Sample(cache=cache, min_count=1)
        vocab_size = data.model_kwargs["vocab_size"]
        batches = list(itertools.islice(data.train_dataloader(), 2))
    batches = [batch._replace(features=torch.rand(*batch.passage.shape, NUM_FEATURES)) for batch in batches]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        readers = {name: build(experiment, vocab_size) for name, experiment in EXPERIMENTS.items()}
    steps: dict[Any, Call] = {name: prepare_training(task, batches) for name, task in readers.items()}
    cast = {(name, "bfloat16"): under_bfloat16(step) for name, step in steps.items()}
    trained = medians(steps | cast, seconds=options.seconds * 4)
    encoders: dict[Any, Call] = {name: prepare_encoding(task, batches) for name, task in readers.items()}
    encoded = medians(encoders, seconds=options.seconds * 4)
    again = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
    load = medians({"load": lambda: next(again)}, seconds=0.5)["load"]
    lengths = ", ".join(str(len(batch.passage)) for batch in batches)
    print(
        f"Readers of Table 2, float32: training steps of {len(batches)} batches of {data.batch_size} passages of "
        f"{lengths} tokens, vectors fixed but for 1000 words.\n"
    )
    rows = []
    for name, task in readers.items():
        count = sum(p.numel() for part, p in task.named_parameters() if not part.startswith("embedding."))
        step = trained[name] / len(batches)
        cells = [name, f"{count / 1e6:.1f}M", f"{data.batch_size / step:,.1f}"]
        cells += [f"{trained[LSTM] / trained[name]:.2f}x", f"{1e3 * encoded[name] / len(batches):,.0f} ms"]
        cells += [f"{encoded[LSTM] / encoded[name]:.2f}x", f"{encoded[name] / trained[name]:.0%}"]
        rows.append([*cells, f"{load / step:.2%}", f"{trained[name] / trained[name, 'bfloat16']:.2f}x"])
    head = ["reader", "parameters", "examples/s", "/ LSTM's", "encoders alone", "LSTM's / this", "share of a step"]
    print_table([*head, "loading, share of a step", "in bfloat16"], rows)

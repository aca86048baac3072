"""The readers of SRU (2018), Table 2: training, and the share of the encoders in it."""

import argparse
import itertools
import tempfile
from typing import Any

import torch
from hydra.utils import instantiate
from reporting.paper_rows import compose_config

from benchmarks.timing import Call, medians, print_table, time_loading, under_bfloat16
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
# With spaCy's en_core_web_sm: 50 parts of speech, 18 types of named entities.
NUM_FEATURES = 4 + 50 + 18
WIDTH = 300  # of GloVe's vectors


def prepare_training(task: QuestionAnswering, batches: list[Batch]) -> Call:
    """A call that trains a step on each batch."""
    optimizer: Any = task.configure_optimizers()

    def train_steps() -> None:
        for batch in batches:
            optimizer.zero_grad()
            task.loss(batch)[0].backward()
            optimizer.step()

    return train_steps


def prepare_encoding(task: QuestionAnswering, batches: list[Batch]) -> Call:
    """A call that runs only the two encoders, forward and backward, on inputs of the batches' shapes."""
    inputs: list[Any] = []
    for batch in batches:
        for encoder, words, size in (
            (task.passage_encoder, batch.passage, 2 * WIDTH + NUM_FEATURES),
            (task.question_encoder, batch.question, WIDTH),
        ):
            inputs.append((encoder, torch.randn(*words.shape, size, requires_grad=True), words == 0))

    def encode() -> None:
        for encoder, x, pad in inputs:
            encoder(x, None, pad)[0].sum().backward()

    return encode


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        data = Sample(cache=cache, min_count=1)
        vocab_size = data.model_kwargs["vocab_size"]
        batches = list(itertools.islice(data.train_dataloader(), 2))
    batches = [batch._replace(features=torch.rand(*batch.passage.shape, NUM_FEATURES)) for batch in batches]
    readers = {}
    for name, experiment in EXPERIMENTS.items():
        cfg = compose_config(f"experiment={experiment}")
        sizes = {"vocab_size": vocab_size, "num_features": NUM_FEATURES, "vectors": torch.randn(vocab_size, WIDTH)}
        readers[name] = instantiate(cfg.task)(encoder=instantiate(cfg.model), **sizes).train()
    steps: dict[Any, Call] = {name: prepare_training(task, batches) for name, task in readers.items()}
    cast = {(name, "bfloat16"): under_bfloat16(step) for name, step in steps.items()}
    trained = medians(steps | cast, seconds=options.seconds * 4)
    encoders = {name: prepare_encoding(task, batches) for name, task in readers.items()}
    encoded = medians(encoders, seconds=options.seconds * 4)
    load = time_loading(data.train_dataloader())
    lengths = ", ".join(str(len(batch.passage)) for batch in batches)
    print(
        f"Readers of Table 2, float32: training steps on {len(batches)} batches of {data.batch_size} passages of "
        f"{lengths} tokens; vectors are fixed except for 1000 words.\n"
    )
    rows = []
    for name, task in readers.items():
        count = sum(p.numel() for part, p in task.named_parameters() if not part.startswith("embedding."))
        step = trained[name] / len(batches)
        cells = {
            "reader": name,
            "parameters": f"{count / 1e6:.1f}M",
            "examples/s": f"{data.batch_size / step:,.1f}",
            "/ LSTM's": f"{trained[LSTM] / trained[name]:.2f}x",
            "encoders alone": f"{1e3 * encoded[name] / len(batches):,.0f} ms",
            "LSTM's / this": f"{encoded[LSTM] / encoded[name]:.2f}x",
            "share of a step": f"{encoded[name] / trained[name]:.0%}",
            "loading, share of a step": f"{load / step:.2%}",
            "in bfloat16": f"{trained[name] / trained[name, 'bfloat16']:.2f}x",
        }
        rows.append([*cells.values()])
    print_table([*cells], rows)

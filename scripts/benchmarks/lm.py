"""Language models of as many parameters side by side: training and generation."""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import sru
from benchmarks.timing import Call, Comparison, medians, training_step
from data.lm import Segments
from sru.kernels.linear import linear
from tasks.lm import LanguageModelling

VOCABULARY = 205  # of enwik8
STEPS, BATCH = 128, 32
TOKENS = 10  # of a call that generates
ENCODERS: dict[str, Callable[..., Any]] = {
    "SRU": partial(sru.SRU, highway_bias=-3.0),
    "SRU++": partial(sru.SRUppEncoder, memory_length=STEPS),
    "SRU++, attention in the last layer": partial(sru.SRUppEncoder, memory_length=STEPS),
    "QRNN": sru.QRNN,
    "GRU": sru.GRU,
    "LSTM": sru.LSTM,
    "Transformer-XL": partial(sru.TransformerXL, num_heads=4, memory_length=STEPS),
}


def build(name: str, depth: int, width: int) -> LanguageModelling:
    """A language model of bytes: an embedding as wide as the layers, and a softmax with weights of its own."""
    sparse = {"attention_every_n_layers": depth} if name.endswith("in the last layer") else {}
    return LanguageModelling(
        encoder=partial(ENCODERS[name], hidden_size=width, num_layers=depth, **sparse),
        optimizer=torch.optim.SGD,
        vocab_size=VOCABULARY,
        unit="bytes",
        embedding_size=width,
        linear=linear,
    )


def prepare_training(task: LanguageModelling) -> Call:
    """Forward and backward of a segment in the middle of a text."""
    tokens = torch.randint(VOCABULARY, (STEPS + 1, BATCH))
    task.train().loss((tokens[:-1], tokens[1:], True))
    return training_step(task, (tokens[:-1], tokens[1:], False))


def prepare_generation(task: LanguageModelling) -> Call:
    """Ten tokens of one text, after a prompt that fills the memory."""
    stream = task.eval().generate(torch.randint(VOCABULARY, (STEPS,)).tolist(), temperature=0)
    next(stream)
    return lambda: list(itertools.islice(stream, TOKENS))


def time_loading() -> float:
    """Seconds to load a batch."""
    loader = Segments(np.random.default_rng(0).integers(0, VOCABULARY, 2**22, np.uint8), BATCH, STEPS)
    batches = iter(itertools.chain.from_iterable(itertools.repeat(loader)))
    return medians({"load": lambda: next(batches)}, seconds=0.5)["load"]


def run(options: argparse.Namespace) -> None:
    models = Comparison(
        options, [*ENCODERS], build, prepare_training, STEPS * BATCH, "tokens", depth=4, parameters=1e6, baseline="LSTM"
    )
    with torch.inference_mode():
        calls: dict[Any, Call] = {name: prepare_generation(task) for name, task in models.tasks.items()}
        generated = medians(calls, seconds=options.seconds)
    load = time_loading()
    models.print(
        f"Language models of {models.depth} layers and {models.size}, {VOCABULARY} bytes; "
        f"training: forward and backward of ({STEPS}, {BATCH}); "
        "generation: one text, token by token.",
        {
            "generation, tokens/s": lambda name: f"{TOKENS / generated[name]:,.0f}",
            "generation / LSTM's": lambda name: models.ratio(generated, name),
            "loading, share of a step": lambda name: f"{load / models.trained[name]:.2%}",
        },
    )

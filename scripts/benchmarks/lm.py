"""Language models with the same number of parameters: training and generation."""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import sru
from benchmarks.timing import Call, Comparison, medians, time_loading
from data.lm import Segments
from sru.kernels.linear import linear
from tasks.lm import LanguageModelling

VOCABULARY = 205  # bytes that occur in enwik8
STEPS, BATCH = 128, 32
TOKENS = 10  # generated per call


def attend_in_last_layer(num_layers: int, **sizes: Any) -> Any:
    return sru.SRUppEncoder(num_layers=num_layers, attention_every_n_layers=num_layers, memory_length=STEPS, **sizes)


ENCODERS: dict[str, Callable[..., Any]] = {
    "SRU": partial(sru.SRU, highway_bias=-3.0),
    "SRU++": partial(sru.SRUppEncoder, memory_length=STEPS),
    "SRU++, attention in the last layer": attend_in_last_layer,
    "QRNN": sru.QRNN,
    "GRU": sru.GRU,
    "LSTM": sru.LSTM,
    "Transformer-XL": partial(sru.TransformerXL, num_heads=4, memory_length=STEPS),
}


def build(encoder: Callable[..., Any], width: int) -> LanguageModelling:
    """A byte-level language model; its embedding is as wide as its layers and not tied to the softmax."""
    return LanguageModelling(
        encoder=encoder,
        optimizer=torch.optim.SGD,
        vocab_size=VOCABULARY,
        unit="bytes",
        embedding_size=width,
        linear=linear,
    )


def prepare_generation(task: LanguageModelling) -> Call:
    """A call that generates TOKENS tokens, after a prompt that fills the memory."""
    stream = task.eval().generate(torch.randint(VOCABULARY, (STEPS,)).tolist(), temperature=0)
    next(stream)
    return lambda: list(itertools.islice(stream, TOKENS))


def run(options: argparse.Namespace) -> None:
    tokens = torch.randint(VOCABULARY, (STEPS + 1, BATCH))
    batch = tokens[:-1], tokens[1:], False
    models = Comparison(options, ENCODERS, build, batch, STEPS * BATCH, "tokens", depth=4, parameters=1e6)
    with torch.inference_mode():
        calls = {name: prepare_generation(task) for name, task in models.tasks.items()}
        generated = medians(calls, seconds=options.seconds)
    load = time_loading(Segments(np.random.default_rng(0).integers(0, VOCABULARY, 2**22, np.uint8), BATCH, STEPS))
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

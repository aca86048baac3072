"""What `scripts/benchmark.py lm` measures: language models of as many parameters beside one another."""

import argparse
import bisect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmark import medians, table

import sru
from data.lm import Segments
from sru.kernels.linear import linear
from tasks.lm import LanguageModelling

VOCABULARY = 205  # of enwik8
STEPS, BATCH = 128, 32


def network(name: str, depth: int, width: int) -> LanguageModelling:
    """A language model of bytes: an embedding as wide as the layers, and a softmax with weights of its own."""
    encoders: dict[str, Callable[..., Any]] = {
        "SRU": partial(sru.SRU, highway_bias=-3.0),
        "SRU++": partial(sru.SRUppEncoder, memory_length=STEPS),
        "SRU++, attention in the last layer": partial(
            sru.SRUppEncoder, memory_length=STEPS, attention_every_n_layers=depth
        ),
        "QRNN": sru.QRNN,
        "GRU": sru.GRU,
        "LSTM": sru.LSTM,
        "Transformer-XL": partial(sru.TransformerXL, num_heads=4, memory_length=STEPS),
    }
    encoder = partial(encoders[name], hidden_size=width, num_layers=depth)
    return LanguageModelling(
        encoder=encoder,
        optimizer=torch.optim.SGD,
        vocab_size=VOCABULARY,
        unit="bytes",
        embedding_size=width,
        linear=linear,
    )


def of_size(network: Callable[[int], Any], parameters: int) -> tuple[int, Any]:
    """The width, a multiple of 8, with which `network` has the nearest number of parameters, and that network."""

    def excess(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in network(width).parameters()) - parameters

    widths = range(16, 4096, 8)
    first = bisect.bisect_left(widths, 0, key=excess)
    width = min(widths[max(0, first - 1) : first + 1], key=lambda width: abs(excess(width)))
    return width, network(width)


def training(task: LanguageModelling) -> Callable[[], None]:
    """Forward and backward of a segment in the middle of a text."""
    tokens = torch.randint(VOCABULARY, (STEPS + 1, BATCH))
    batch = tokens[:-1], tokens[1:]
    task.train().loss((*batch, True))

    def step() -> None:
        for parameter in task.parameters():
            parameter.grad = None
        task.loss((*batch, False))[0].backward()

    return step


def generation(task: LanguageModelling) -> Callable[[], None]:
    """Ten tokens of one text, behind a prompt that fills the memory."""
    stream = task.eval().generate(torch.randint(VOCABULARY, (STEPS,)).tolist(), temperature=0)
    next(stream)

    def step() -> None:
        for _ in itertools.islice(stream, 10):
            pass

    return step


def loading() -> float:
    """Seconds that a batch takes to load."""
    loader = Segments(np.random.default_rng(0).integers(0, VOCABULARY, 2**22, np.uint8), BATCH, STEPS)
    batches = iter(itertools.chain.from_iterable(itertools.repeat(loader)))
    return medians({"load": lambda: next(batches)}, seconds=0.5)["load"]


def run(options: argparse.Namespace) -> None:
    names = "SRU", "SRU++", "SRU++, attention in the last layer", "QRNN", "GRU", "LSTM", "Transformer-XL"
    depth, size = options.depth or 4, int(options.parameters or 1e6)
    chosen = {name: of_size(partial(network, name, depth), size) for name in names}
    trained = medians({name: training(task) for name, (_, task) in chosen.items()}, seconds=options.seconds * 4)
    with torch.inference_mode():
        generated = medians({name: generation(task) for name, (_, task) in chosen.items()}, seconds=options.seconds)
    load = loading()
    print(
        f"Language models of {depth} layers and about {size / 1e6:g}M parameters, float32, {VOCABULARY} bytes; "
        f"training: forward and backward of ({STEPS}, {BATCH}); generation: one text, token by token.\n"
    )
    rows = []
    for name, (width, task) in chosen.items():
        count = sum(p.numel() for p in task.parameters())
        rows.append(
            [
                name,
                str(width),
                f"{count / 1e6:.2f}M",
                f"{STEPS * BATCH / trained[name]:,.0f}",
                f"{trained['LSTM'] / trained[name]:.2f}x",
                f"{10 / generated[name]:,.0f}",
                f"{generated['LSTM'] / generated[name]:.2f}x",
                f"{load / trained[name]:.2%}",
            ]
        )
    speeds = ["training, tokens/s", "training / LSTM's", "generation, tokens/s", "generation / LSTM's"]
    table(["model", "width", "parameters", *speeds, "loading, share of a step"], rows)

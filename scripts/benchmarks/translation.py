"""What `scripts/benchmark.py translation` measures: translators of as many parameters beside one another."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark import medians, table
from torch import Tensor

import sru
from benchmarks.lm import of_size
from sru.kernels.linear import linear
from tasks.memory import keep_freed_memory
from tasks.search import beam_search
from tasks.translation import Translation

VOCABULARY, BOS, EOS = 8000, 2, 3
WORDS, SENTENCES = 30, 64  # of a batch in training
TRANSLATED, BEAM = 16, 5  # sentences, of as many words, that are decoded at once


ENCODERS: dict[str, Callable[..., Any]] = {
    "Transformer": partial(sru.Transformer, num_heads=4),
    "Transformer + SRU": partial(sru.TransformerSRU, num_heads=4),
    "SRU++": sru.SRUppEncoder,
    "SRU, attention": sru.SRU,
    "QRNN, attention": sru.QRNN,
    "GRU, attention": sru.GRU,
    "LSTM, attention": sru.LSTM,
}


def network(name: str, depth: int, width: int) -> Translation:
    """A translator with one matrix for all words."""
    return Translation(
        encoder=partial(ENCODERS[name], hidden_size=width, num_layers=depth),
        optimizer=torch.optim.SGD,
        vocab_size=VOCABULARY,
        bos=BOS,
        eos=EOS,
        decode=lambda words: "",
        bidirectional=True,
        embedding_size=width,
        label_smoothing=0.1,
        linear=linear,
    )


def sentences(count: int) -> Tensor:
    """(WORDS, count) of random words."""
    return torch.randint(4, VOCABULARY, (WORDS, count))


def training(task: Translation) -> Callable[[], None]:
    """Forward and backward of a batch of pairs."""
    source, target = sentences(SENTENCES), sentences(SENTENCES)
    task.train()

    def step() -> None:
        for parameter in task.parameters():
            parameter.grad = None
        task.loss((source, target, []))[0].backward()

    return step


class Recomputing:
    """A decoder that keeps the words alone: each step reads all of them, and what the encoder gave, again."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def step(self, x: Tensor, state: tuple[Tensor] | None, source: Any) -> tuple[Tensor, tuple[Tensor]]:
        words = x[None] if state is None else torch.cat([state[0], x[None]])
        return self.decoder(words, None, None, self.decoder.read(*source))[0][-1], (words,)


def decoding(task: Translation, decoder: Any, beam: int) -> Callable[[], None]:
    """Translations of exactly WORDS words: the end of a sentence is made unlikely."""
    source = sentences(TRANSLATED)

    def step(words: Tensor, state: Any, seen: Any) -> tuple[Tensor, Any]:
        h, state = decoder.step(task.target_embedding(words), state, seen)
        logits = task.logits(task.readout(h))
        logits[:, EOS] -= 1e4
        return logits, state

    def translate() -> None:
        task.eval()
        if isinstance(decoder, Recomputing):
            state, seen = None, (task.encoder(task.source_embedding(source))[0], source == 0)
        else:
            state, seen = task.read(source)
        limits = torch.full((TRANSLATED,), WORDS)
        found = beam_search(step, state, seen, limits, bos=BOS, eos=EOS, beam=beam, length_penalty=0.6)
        assert all(len(sentence) == WORDS - 1 for ((_, sentence),) in found)

    return translate


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()  # as train.py does
    depth, size = options.depth or 3, int(options.parameters or 6e6)
    chosen = {name: of_size(partial(network, name, depth), size) for name in ENCODERS}
    trained = medians({name: training(task) for name, (_, task) in chosen.items()}, seconds=options.seconds * 4)
    calls: dict[Any, Callable[[], object]] = {}
    for name, (_, task) in chosen.items():
        calls[name, "greedy"] = decoding(task, task.decoder, 1)
        calls[name, "beam"] = decoding(task, task.decoder, BEAM)
        calls[name, "without"] = decoding(task, Recomputing(task.decoder), BEAM)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step is some hundred small calls: a second thread gains a quarter, and noise
    with torch.inference_mode():
        decoded = medians(calls, seconds=options.seconds)
    torch.set_num_threads(threads)
    print(
        f"Translators of {depth} layers a side and about {size / 1e6:g}M parameters, float32, {VOCABULARY} words; "
        f"training: forward and backward of {SENTENCES} pairs of {WORDS} words; decoding: {TRANSLATED} sentences of "
        f"{WORDS} words at once, by one thread.\n"
    )
    rows = []
    for name, (width, task) in chosen.items():
        beam = decoded[name, "beam"]
        rows.append(
            [
                name,
                str(width),
                f"{sum(p.numel() for p in task.parameters()) / 1e6:.2f}M",
                f"{(WORDS - 1) * SENTENCES / trained[name]:,.0f}",
                f"{trained['LSTM, attention'] / trained[name]:.2f}x",
                f"{TRANSLATED / decoded[name, 'greedy']:,.0f}",
                f"{TRANSLATED / beam:,.0f}",
                f"{decoded['LSTM, attention', 'beam'] / beam:.2f}x",
                f"{decoded[name, 'without'] / beam:.1f}x",
            ]
        )
    head = ["model", "width", "parameters", "training, tokens/s", "/ LSTM's", "greedy, sentences/s"]
    table([*head, f"beam {BEAM}, sentences/s", "/ LSTM's", "without a state: slower by"], rows)

"""Translators of as many parameters side by side: training, and decoding with and without a decoder's state."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sru
from benchmarks.timing import Call, Comparison, medians, one_thread, training_step
from sru.kernels.linear import linear
from tasks.modules.beam_search import beam_search
from tasks.run.malloc import keep_freed_memory
from tasks.translation import Translation

VOCABULARY, BOS, EOS = 8000, 2, 3
WORDS, SENTENCES = 30, 64  # of a batch in training
TRANSLATED, BEAM = 16, 5  # sentences, of as many words, decoded at once
ENCODERS: dict[str, Callable[..., Any]] = {
    "Transformer": partial(sru.Transformer, num_heads=4),
    "Transformer + SRU": partial(sru.TransformerSRU, num_heads=4),
    "SRU++": sru.SRUppEncoder,
    "SRU, attention": sru.SRU,
    "QRNN, attention": sru.QRNN,
    "GRU, attention": sru.GRU,
    "LSTM, attention": sru.LSTM,
}


def build(name: str, depth: int, width: int) -> Translation:
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


def draw_sentences(count: int) -> Tensor:
    """(WORDS, count) of random words."""
    return torch.randint(4, VOCABULARY, (WORDS, count))


def prepare_training(task: Translation) -> Call:
    return training_step(task, (draw_sentences(SENTENCES), draw_sentences(SENTENCES), []))


class Recomputing:
    """A decoder whose state is the words alone: each step decodes all of them again."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def step(self, x: Tensor, state: tuple[Tensor] | None, source: Any) -> tuple[Tensor, tuple[Tensor]]:
        words = x[None] if state is None else torch.cat([state[0], x[None]])
        return self.decoder(words, None, None, self.decoder.read(*source))[0][-1], (words,)


def prepare_decoding(task: Translation, decoder: Any, beam: int) -> Call:
    """Translations of exactly WORDS words: the end of a sentence is made unlikely."""
    source = draw_sentences(TRANSLATED)

    def step(words: Tensor, state: Any, memory: Any) -> tuple[Tensor, Any]:
        h, state = decoder.step(task.target_embedding(words), state, memory)
        logits = task.logits(task.readout(h))
        logits[:, EOS] -= 1e4
        return logits, state

    def translate() -> None:
        task.eval()
        if isinstance(decoder, Recomputing):
            state, memory = None, (task.encoder(task.source_embedding(source))[0], source == 0)
        else:
            state, memory = task.encode(source)
        limits = torch.full((TRANSLATED,), WORDS)
        found = beam_search(step, state, memory, limits, bos=BOS, eos=EOS, beam=beam, length_penalty=0.6)
        assert all(len(sentence) == WORDS - 1 for ((_, sentence),) in found)

    return translate


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()  # as train.py does
    models = Comparison(
        options,
        [*ENCODERS],
        build,
        prepare_training,
        (WORDS - 1) * SENTENCES,
        "tokens",
        depth=3,
        parameters=6e6,
        baseline="LSTM, attention",
    )
    calls: dict[Any, Call] = {}
    for name, task in models.tasks.items():
        calls[name, "greedy"] = prepare_decoding(task, task.decoder, 1)
        calls[name, "beam"] = prepare_decoding(task, task.decoder, BEAM)
        calls[name, "without"] = prepare_decoding(task, Recomputing(task.decoder), BEAM)
    with one_thread():
        decoded = medians(calls, seconds=options.seconds)
    beam = {name: decoded[name, "beam"] for name in ENCODERS}
    models.print(
        f"Translators of {models.depth} layers a side and {models.size}, {VOCABULARY} words; training: forward and "
        f"backward of {SENTENCES} pairs of {WORDS} words; decoding: {TRANSLATED} sentences of {WORDS} words at once, "
        "by one thread.",
        {
            "greedy, sentences/s": lambda name: f"{TRANSLATED / decoded[name, 'greedy']:,.0f}",
            f"beam {BEAM}, sentences/s": lambda name: f"{TRANSLATED / beam[name]:,.0f}",
            "beam / LSTM's": lambda name: models.ratio(beam, name),
            "without a state: slower by": lambda name: f"{decoded[name, 'without'] / beam[name]:.1f}x",
        },
    )

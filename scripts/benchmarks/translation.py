"""Translation models with the same number of parameters: training, and decoding with and without a decoder's state."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sru
from benchmarks.timing import Call, Comparison, medians, one_thread
from sru.kernels.linear import linear
from tasks.modules.beam_search import beam_search
from tasks.run.malloc import keep_freed_memory
from tasks.translation import Translation

VOCABULARY, BOS, EOS = 8000, 2, 3
WORDS, SENTENCES = 30, 64  # of a training batch
TRANSLATED, BEAM = 16, 5  # sentences decoded at once, each of WORDS words
ENCODERS: dict[str, Callable[..., Any]] = {
    "Transformer": partial(sru.Transformer, num_heads=4),
    "Transformer + SRU": partial(sru.TransformerSRU, num_heads=4),
    "SRU++": sru.SRUppEncoder,
    "SRU, attention": sru.SRU,
    "QRNN, attention": sru.QRNN,
    "GRU, attention": sru.GRU,
    "LSTM, attention": sru.LSTM,
}


def build(encoder: Callable[..., Any], width: int) -> Translation:
    """A translation model with one embedding matrix for source, target and softmax."""
    return Translation(
        encoder=encoder,
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
    """(WORDS, count) random words."""
    return torch.randint(4, VOCABULARY, (WORDS, count))


def step_without_state(decoder: Any, x: Tensor, state: tuple[Tensor] | None, source: Any) -> tuple[Tensor, Any]:
    """A decoder step whose state is the words so far: it decodes all of them again."""
    words = x[None] if state is None else torch.cat([state[0], x[None]])
    return decoder(words, None, None, decoder.read(*source))[0][-1], (words,)


def prepare_decoding(task: Translation, beam: int, *, has_state: bool = True) -> Call:
    """A call that translates to exactly WORDS words: the end of a sentence is made unlikely."""
    source = draw_sentences(TRANSLATED)
    decode = task.decoder.step if has_state else partial(step_without_state, task.decoder)

    def step(words: Tensor, state: Any, memory: Any) -> tuple[Tensor, Any]:
        h, state = decode(task.target_embedding(words), state, memory)
        logits = task.logits(task.readout(h))
        logits[:, EOS] -= 1e4
        return logits, state

    def translate() -> None:
        task.eval()
        if has_state:
            state, memory = task.encode(source)
        else:
            state, memory = None, (task.encoder(task.source_embedding(source))[0], source == 0)
        limits = torch.full((TRANSLATED,), WORDS)
        results = beam_search(step, state, memory, limits, bos=BOS, eos=EOS, beam=beam, length_penalty=0.6)
        assert all(len(sentence) == WORDS - 1 for ((_, sentence),) in results)

    return translate


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()  # as train.py does
    batch: Any = (draw_sentences(SENTENCES), draw_sentences(SENTENCES), [])
    count, baseline = (WORDS - 1) * SENTENCES, "LSTM, attention"
    models = Comparison(options, ENCODERS, build, batch, count, "tokens", depth=3, parameters=6e6, baseline=baseline)
    calls: dict[Any, Call] = {}
    for name, task in models.tasks.items():
        calls[name, "greedy"] = prepare_decoding(task, 1)
        calls[name, "beam"] = prepare_decoding(task, BEAM)
        calls[name, "without"] = prepare_decoding(task, BEAM, has_state=False)
    with one_thread():
        decoded = medians(calls, seconds=options.seconds)
    beam = {name: decoded[name, "beam"] for name in ENCODERS}
    models.print(
        f"Translation models of {models.depth} layers per side and {models.size}, {VOCABULARY} words; training: "
        f"forward and backward of {SENTENCES} pairs of {WORDS} words; decoding: {TRANSLATED} sentences of {WORDS} "
        "words at once, on one thread.",
        {
            "greedy, sentences/s": lambda name: f"{TRANSLATED / decoded[name, 'greedy']:,.0f}",
            f"beam {BEAM}, sentences/s": lambda name: f"{TRANSLATED / beam[name]:,.0f}",
            "beam / LSTM's": lambda name: models.ratio(beam, name),
            "without a state: slower by": lambda name: f"{decoded[name, 'without'] / beam[name]:.1f}x",
        },
    )

"""Speech: features, speech recognition models with the same number of parameters, streaming, and long sequences."""

import argparse
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import sru
from benchmarks.timing import Call, Comparison, medians, one_thread, print_table
from data.audio.fbank import Frontend, StepStream
from data.audio.synthesis import WORDS, synthesise
from tasks.classification import Classification
from tasks.modules.ctc_decoder import BLANK, greedy
from tasks.run.malloc import keep_freed_memory
from tasks.speech import SpeechRecognition

RATE, MELS, STACK = 16000, 80, 3
SYMBOLS = 29
RECORDINGS, SECONDS, LETTERS = 16, 10, 120  # recordings of a batch; their length; letters of each
CHUNK = RATE // 10
ENCODERS: dict[str, Callable[..., Any]] = {"SRU": sru.SRU, "QRNN": sru.QRNN, "GRU": sru.GRU, "LSTM": sru.LSTM}
LENGTHS = 1000, 4000, 16000


def build(encoder: Callable[..., Any], width: int) -> SpeechRecognition:
    return SpeechRecognition(
        encoder=encoder,
        optimizer=torch.optim.SGD,
        input_size=MELS * STACK,
        num_mels=MELS,
        vocab_size=SYMBOLS,
        decode=lambda symbols: "",
        bidirectional=False,
    )


def draw_batch() -> tuple[Any, ...]:
    steps = 100 * SECONDS // STACK
    return (
        torch.randn(steps, RECORDINGS, MELS * STACK),
        torch.zeros(steps, RECORDINGS, dtype=torch.bool),
        torch.randint(1, SYMBOLS, (RECORDINGS, LETTERS)),
        torch.full((RECORDINGS,), LETTERS),
        [SimpleNamespace(id=str(i), text="") for i in range(RECORDINGS)],
    )


def prepare_streaming(task: SpeechRecognition) -> Call:
    """A call that processes a chunk of 100 ms: features, network and search."""
    mean, deviation = np.zeros(MELS, np.float32), np.ones(MELS, np.float32)
    frontend = Frontend(rate=RATE, num_mels=MELS, stack=STACK, level="running", mean=mean, deviation=deviation)
    stream, wave = StepStream(frontend, RATE), synthesise_speech(1)
    chunks: Iterator[np.ndarray] = cycle(wave[i : i + CHUNK] for i in range(0, RATE, CHUNK))
    state, last = None, BLANK
    task.eval()

    def recognise() -> None:
        nonlocal state, last
        x = torch.from_numpy(stream.accept(next(chunks), is_last=False))
        log_p, state = task(x[:, None], None, state)
        _, last = greedy(log_p[:, 0], last)

    return recognise


def synthesise_speech(seconds: int) -> np.ndarray:
    wave, _ = synthesise(WORDS, 3, 1)
    return np.resize(wave, seconds * RATE)


def time_features(threads: int) -> float:
    """Seconds of sound whose features are computed per second."""
    frontend, wave = Frontend(rate=RATE, num_mels=MELS), synthesise_speech(10)
    with ThreadPoolExecutor(threads) as pool:
        return 200 / medians({"features": lambda: list(pool.map(frontend.frames, [wave] * 20))}, 0.5)["features"]


def time_long(steps: int) -> tuple[float, float]:
    """Seconds of a training step on 8 sequences of `steps` numbers, and its peak memory in MiB; for a new process."""
    keep_freed_memory()
    task = Classification(
        encoder=partial(sru.SRU, hidden_size=128, num_layers=3),
        optimizer=torch.optim.SGD,
        num_classes=10,
        input_size=1,
        dropout=0.1,
    )
    batch = torch.randn(steps, 8, 1), torch.zeros(8, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = medians({"step": lambda: task.loss(batch)[0].backward()}, 0.1)["step"]
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()  # as train.py does
    one, two = time_features(1), time_features(2)
    print(f"Features ({MELS} log-mel energies): {one:,.0f}x real time with one thread, {two:,.0f}x with two.\n")
    frames = 100 * SECONDS * RECORDINGS
    models = Comparison(options, ENCODERS, build, draw_batch(), frames, "frames", depth=4, parameters=2e6)
    with one_thread():
        calls = {name: prepare_streaming(task) for name, task in models.tasks.items()}
        chunk = medians(calls, seconds=options.seconds)
    models.print(
        f"Speech recognition models of {models.depth} layers and {models.size}; "
        f"training: forward and backward of {RECORDINGS} recordings of {SECONDS} s, "
        f"{STACK} frames per step, CTC of {LETTERS} letters; streaming: 100 ms of sound to letters, one thread.",
        {"100 ms chunk, ms": lambda name: f"{1000 * chunk[name]:.2f}"},
    )
    print("An SRU of 3 layers of 128 on 8 sequences of single numbers, forward and backward:\n")
    rows = []
    for steps in LENGTHS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, memory = pool.submit(time_long, steps).result()
        rows.append([f"{steps:,}", f"{seconds:.3f}", f"{1e6 * seconds / steps:.1f}", f"{memory:,.0f}"])
    print_table(["steps", "seconds", "us per step", "memory, MiB"], rows)

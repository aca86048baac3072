"""Speech recognition from end to end, by connectionist temporal classification (Graves et al., 2006)."""

import inspect
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.modules.ctc_decoder import BLANK, NGramLM, PrefixSearch, check_beam, greedy, search
from tasks.modules.layers import Dropout
from tasks.run.distributed import all_gather_object, rank
from tasks.run.files import write_text
from tasks.translation import MEMORY

POINTS = 5
NO_SOUND = np.zeros(0, np.float32)


class SpeechRecognition(Task):
    """Encoder, and a softmax over the symbols and a blank at each step; metrics: wer and cer in per cent.

    A batch is (x (T, B, input_size), pad (T, B), targets (B, L), lengths (B,), items), where items have the `id` and
    the `text` of a recording. The loss is a mean over steps. In validation and test a recording that has fewer steps
    than its text needs adds nothing to the loss; to the error rates each counts.

    Args:
        encoder: builds the encoder from `input_size` and `bidirectional`.
        optimizer, scheduler: as in Task.
        input_size, num_mels: of the data: features of a step, and of each frame in it.
        vocab_size: of the data: symbols, and the blank.
        decode: of the data: the text of symbols.
        bidirectional: the encoder reads both ways; it then needs the whole recording.
        dropout: before the softmax (the encoder has its own, between layers).
        frequency_masks, frequency_width: SpecAugment (Park et al., 2019): so many bands of up to so many frequencies
            are hidden from the network in training.
        time_masks, time_width: and so many stretches of up to this part of a recording.
        colour: FilterAugment (Nam et al., 2022): in training a recording is louder or softer by up to so many
            deviations at each of POINTS frequencies, and evenly between them.
        warp: and its frequencies are stretched or pressed by up to this part, as by another vocal tract (Jaitly and
            Hinton, 2013).
        beam: prefixes that are kept in validation and test; 1 takes the likeliest symbol of each step.
    """

    unit = "steps"
    test_artifacts = ("hypotheses.txt",)

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        input_size: int,
        num_mels: int,
        vocab_size: int,
        decode: Callable[[Iterable[int]], str],
        bidirectional: bool,
        dropout: float = 0.0,
        frequency_masks: int = 0,
        frequency_width: int = 0,
        time_masks: int = 0,
        time_width: float = 0.0,
        colour: float = 0.0,
        warp: float = 0.0,
        beam: int = 1,
    ) -> None:
        super().__init__(optimizer, scheduler)
        check_beam(beam, "task.")
        counts = {"frequency_masks": frequency_masks, "frequency_width": frequency_width, "time_masks": time_masks}
        for name, value in counts.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"task.{name}={value} must be a whole number, 0 or more")
        if frequency_width > num_mels:
            raise ValueError(
                f"task.frequency_width={frequency_width} is more than the {num_mels} that data.num_mels has"
            )
        if type(time_width) not in (int, float) or not 0 <= time_width <= 1:
            raise ValueError(f"task.time_width={time_width} must be a part of a recording, 0 to 1")
        if type(colour) not in (int, float) or not 0 <= colour <= 10:
            raise ValueError(f"task.colour={colour} must be a number of deviations, 0 to 10")
        if type(warp) not in (int, float) or not 0 <= warp < 1:
            raise ValueError(f"task.warp={warp} must be a part of a frequency, 0 or more and below 1")
        self.colour, self.warp = colour, warp
        self.num_mels, self.decode, self.beam, self.bidirectional = num_mels, decode, beam, bidirectional
        self.frequency_masks, self.frequency_width = frequency_masks, frequency_width
        self.time_masks, self.time_width = time_masks, time_width
        known = inspect.signature(encoder).parameters
        # What attends sees all that was heard, in a stream too.
        memory = {name: None for name in MEMORY if name in known}
        self.encoder = encoder(input_size=input_size, bidirectional=bidirectional, **memory)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(self.encoder.output_size, vocab_size)
        self.hypotheses: dict[str, tuple[str, str]] = {}  # by recording: what is heard, and what was said

    def forward(self, x: Tensor, pad: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """Logarithms of the symbols' probabilities (T, B, vocab_size), and the encoder's state."""
        h, state = self.encoder(x, state, pad)
        return self.output(self.dropout(h)).float().log_softmax(2), state

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        x, pad, targets, lengths, items = batch
        steps = (~pad).sum(0)
        x = self.augment(x, steps) if self.training else x
        log_p, _ = self(x, pad if pad.any() else None)
        losses = F.ctc_loss(log_p, targets, steps, lengths, reduction="none", zero_infinity=True)
        # What has fewer steps than its symbols need has an infinite loss, which is taken for 0, and so do its steps.
        repeated = (targets[:, 1:] == targets[:, :-1]) & (targets[:, 1:] != BLANK)
        count = int(steps[steps >= lengths + repeated.sum(1)].sum())
        if not self.training:
            for i, item in enumerate(items):
                self.hypotheses[item.id] = self.decode(search(log_p[: steps[i], i], self.beam)), item.text
        return losses.sum() / max(1, count), {}, count

    def augment(self, x: Tensor, steps: Tensor) -> Tensor:
        """x (T, B, n), each recording, of `steps` (B,), in another colour, without some frequencies and some times."""
        frames = x.unflatten(2, (-1, self.num_mels))
        batch, device = x.shape[1], x.device
        if self.warp:
            factors = 1 + self.warp * (2 * torch.rand(batch, 1, device=device) - 1)
            places = (torch.arange(self.num_mels, device=device) * factors).clamp(max=self.num_mels - 1)
            below, part = places.long(), places.frac()[:, None]
            low, high = (
                frames.gather(3, index[:, None].expand(frames.shape))
                for index in (below, (below + 1).clamp(max=self.num_mels - 1))
            )
            frames = low + part * (high - low)
        if self.colour:
            points = self.colour * (2 * torch.rand(1, batch, POINTS, device=device) - 1)
            curve = F.interpolate(points, self.num_mels, mode="linear", align_corners=True)
            frames = frames + curve[:, :, None]
        hidden = torch.zeros(1, batch, self.num_mels, dtype=torch.bool, device=device)
        for _ in range(self.frequency_masks):
            hidden |= stretch(
                torch.full((batch,), self.num_mels, device=device), self.frequency_width, self.num_mels
            ).T[None]
        frames = frames.masked_fill(hidden[:, :, None], 0.0)  # the mean
        silent = torch.zeros(x.shape[:2], dtype=torch.bool, device=device)
        for _ in range(self.time_masks):
            silent |= stretch(steps, self.time_width * steps, len(x))
        return frames.masked_fill(silent[:, :, None, None], 0.0).flatten(2)

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":
            return {}
        for part in all_gather_object(self.hypotheses):
            self.hypotheses |= part
        if not self.hypotheses:
            return {}
        import jiwer

        found = dict(sorted(self.hypotheses.items()))
        self.hypotheses = {}
        if stage == "test" and not rank():
            lines = "".join(f"{name}\t{heard}\n" for name, (heard, _) in found.items())
            write_text(Path(self.trainer.default_root_dir) / "hypotheses.txt", lines)
        heard, said = (list(texts) for texts in zip(*found.values(), strict=True))
        if not any(said):
            return {}
        words, characters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
        rates = {"wer": 100 * words.wer, "cer": 100 * characters.cer}
        return {name: torch.tensor(rate, device=self.device) for name, rate in rates.items()}

    @torch.inference_mode()
    def predict(
        self,
        vocabulary: Any,
        *,
        input: str,
        stream: bool = False,
        chunk: float = 100.0,
        beam: int = 1,
        ngram: str = "",
        ngram_weight: float = 0.5,
        word_bonus: float = 0.0,
        rate: int = 16000,
        offset: float = 0.0,
        duration: float = 0.0,
    ) -> Iterator[str]:
        """Write down what is said in a recording; texts to be printed.

        Args:
            input: a file of sound (wav, flac, ogg, mp3, ...), of any rate; or - for standard input, which is raw sound
                of 16 bits, one channel, and `rate` samples a second.
            stream: true hears the sound in chunks as they come, by a model of one direction, and writes what it hears
                at once, or with a beam or an n-gram at the end: the same text. Standard error says how long a chunk
                took, by one thread.
            chunk: milliseconds of a chunk (100).
            beam: texts that are kept while searching; 1 takes the likeliest symbol of each step (1).
            ngram: an n-gram of words, in ARPA's or KenLM's format; it needs a beam, 16 say, and package kenlm.
            ngram_weight: of its logarithms (0.5).
            word_bonus: added for each word (0), as an n-gram prefers few.
            rate: of raw sound on standard input (16000).
            offset, duration: the part of the file that is heard, in seconds, as in a manifest; duration=0 is all up to
                the end (0, 0).
        """
        check_beam(beam)
        if stream and (self.bidirectional or not hasattr(self.encoder, "step")):
            raise ValueError("stream=true needs a model of one direction: this one hears the whole first; leave it out")
        if not 0 < chunk < 1e6 or not 1000 <= rate <= 1_000_000:
            raise ValueError(f"chunk={chunk} must be milliseconds above 0, and rate={rate} samples a second, from 1000")
        if not math.isfinite(ngram_weight) or not math.isfinite(word_bonus):
            raise ValueError(f"ngram_weight={ngram_weight} and word_bonus={word_bonus} must be numbers")
        if ngram and beam == 1:
            raise ValueError("ngram= needs a beam: type beam=16")
        if not (0 <= offset < 1e7 and 0 <= duration < 1e7):
            raise ValueError(f"offset={offset} and duration={duration} must be seconds, numbers from 0 on")
        if (offset or duration) and input == "-":
            raise ValueError("offset= and duration= are of a file: standard input is heard from its start to its end")
        words = NGramLM(ngram, vocabulary.symbols.piece, ngram_weight, word_bonus) if ngram else None
        found = PrefixSearch(beam, words) if beam > 1 else None
        pieces, rate = sound(vocabulary, input, rate, chunk if stream else None, offset, duration)
        steps, state = vocabulary.stream(rate), None
        symbols: list[int] = []
        last, written = BLANK, ""
        seconds = []
        if stream:
            if vocabulary.frontend.level == "recording":
                raise ValueError("stream=true does not go with data.level=recording, which needs the whole of it first")
            torch.set_num_threads(1)  # a chunk is too little for more
            # What runs for the first time is compiled.
            self(torch.zeros(1, 1, vocabulary.frontend.size, device=self.device))
            parts: Iterable[tuple[np.ndarray, bool]] = ((p, p is NO_SOUND) for p in itertools.chain(pieces, [NO_SOUND]))
        else:  # at once, for a network that reads both ways
            parts = [(np.concatenate([NO_SOUND, *pieces]), True)]
        for wave, is_last in parts:
            start = time.perf_counter()
            x = torch.from_numpy(steps.accept(wave, is_last=is_last))
            more: list[int] = []
            if len(x):
                log_p, state = self(x[:, None].to(self.device), None, state)
                log_p = log_p[:, 0].cpu()
                if not torch.isfinite(log_p).all():
                    raise ValueError("the network gives no number: its checkpoint is damaged, or its training was")
                if found is not None:
                    found.accept(log_p)
                else:
                    more, last = greedy(log_p, last)
                    symbols += more
            text = vocabulary.symbols.decode(symbols) if more else written
            seconds.append(time.perf_counter() - start)
            if len(text) > len(written):
                yield text[len(written) :]
                written = text
        yield "\n" if found is None else vocabulary.symbols.decode(found.best()[0][1]) + "\n"
        if stream and len(seconds) > 1:
            median, high, most = (1000 * float(np.quantile(seconds[:-1], q)) for q in (0.5, 0.95, 1.0))
            print(
                f"a chunk of {chunk:g} ms takes {median:.1f} ms at the median, {high:.1f} at the 95th percentile, "
                f"{most:.1f} at most ({len(seconds) - 1} chunks)",
                file=sys.stderr,
            )


def stretch(sizes: Tensor, most: Tensor | float, length: int) -> Tensor:
    """(length, B): in each column, of which `sizes` (B,) are there, one stretch of up to `most`, drawn at random."""
    wide = (torch.rand(len(sizes), device=sizes.device) * (most + 1)).floor().minimum(sizes)
    first = (torch.rand(len(sizes), device=sizes.device) * (sizes - wide + 1)).floor()
    places = torch.arange(length, device=sizes.device)[:, None]
    return (places >= first) & (places < first + wide)


def sound(
    vocabulary: Any, input: str, rate: int, chunk: float | None, offset: float = 0.0, duration: float = 0.0
) -> tuple[Iterator[np.ndarray], int]:
    """Pieces of `chunk` milliseconds, or one of all there is, of a part of a file, or of standard input; and samples a
    second."""
    if input == "-":
        size = -1 if chunk is None else 2 * max(1, round(rate * chunk / 1000))
        return (
            np.frombuffer(piece[: len(piece) // 2 * 2], "<i2").astype(np.float32) / 32768
            for piece in iter(lambda: sys.stdin.buffer.read(size), b"")
        ), rate
    wave, rate = vocabulary.read(input, offset, duration)
    size = len(wave) if chunk is None else max(1, round(rate * chunk / 1000))
    return (wave[i : i + size] for i in range(0, len(wave), size)), rate

"""End-to-end speech recognition by connectionist temporal classification (CTC; Graves et al., 2006)."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import NOT_FINITE, Task
from tasks.modules.ctc_decoder import BLANK, NGramLM, PrefixSearch, greedy, search
from tasks.modules.encoders import remove_memory_limits
from tasks.modules.layers import Dropout
from tasks.run.distributed import all_gather_object

POINTS = 5  # frequencies at which FilterAugment draws a gain
NO_SOUND = np.zeros(0, np.float32)


class SpeechRecognition(Task):
    """Encoder, and a softmax over symbols and blank at each step; metrics: word and character error rate (wer, cer).

    A batch is (x (T, B, input_size), pad (T, B), targets (B, L), lengths (B,), items); an item has the `id` and `text`
    of a recording. The loss is a mean over steps. Recordings with fewer steps than CTC needs for their text are left
    out of the loss, but not of the error rates, which are in per cent.

    Args:
        encoder: builds the encoder from `input_size` and `bidirectional`.
        optimizer, scheduler: see Task.
        input_size, num_mels: features of a step, and of each of the frames in it.
        vocab_size: number of symbols, including blank.
        decode: text of a list of symbols.
        bidirectional: the encoder reads in both directions, and needs the whole recording.
        dropout: before the softmax. (The encoder has its own, between layers.)
        frequency_masks, frequency_width: SpecAugment (Park et al., 2019): in training, mask this many bands of up to
            this many frequencies.
        time_masks, time_width: mask this many time intervals of up to this fraction of a recording.
        colour: FilterAugment (Nam et al., 2022): in training, change the level at each of POINTS frequencies by up to
            this many standard deviations, and linearly in between.
        warp: vocal tract length perturbation (Jaitly and Hinton, 2013): in training, scale the frequency axis by up to
            this fraction.
        beam: prefixes kept in validation and test; 1 takes the most likely symbol of each step.
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
        if frequency_width > num_mels:
            raise ValueError(f"task.frequency_width={frequency_width} is more than data.num_mels={num_mels}")
        self.colour, self.warp = colour, warp
        self.num_mels, self.decode, self.beam, self.bidirectional = num_mels, decode, beam, bidirectional
        self.frequency_masks, self.frequency_width = frequency_masks, frequency_width
        self.time_masks, self.time_width = time_masks, time_width
        self.encoder = remove_memory_limits(encoder)(input_size=input_size, bidirectional=bidirectional)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(self.encoder.output_size, vocab_size)
        self.hypotheses: dict[str, tuple[str, str]] = {}  # {recording: (recognised text, reference)}

    def forward(self, x: Tensor, pad: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """Log-probabilities of the symbols (T, B, vocab_size), and the encoder's state."""
        h, state = self.encoder(x, state, pad)
        return self.output(self.dropout(h)).float().log_softmax(2), state

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        x, pad, targets, lengths, items = batch
        steps = (~pad).sum(0)
        x = self.augment(x, steps) if self.training else x
        log_p, _ = self(x, pad if pad.any() else None)
        losses = F.ctc_loss(log_p, targets, steps, lengths, reduction="none", zero_infinity=True)
        # A recording that is too short for its text has an infinite loss: count neither the loss nor its steps.
        repeated = (targets[:, 1:] == targets[:, :-1]) & (targets[:, 1:] != BLANK)
        count = int(steps[steps >= lengths + repeated.sum(1)].sum())
        if not self.training:
            for i, item in enumerate(items):
                self.hypotheses[item.id] = self.decode(search(log_p[: steps[i], i], self.beam)), item.text
        return losses.sum() / max(1, count), {}, count

    def augment(self, x: Tensor, steps: Tensor) -> Tensor:
        """Recordings x (T, B, n) of lengths `steps` (B,) with random changes: warp, colour and masks."""
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
        bands = torch.zeros(self.num_mels, batch, dtype=torch.bool, device=device)
        for _ in range(self.frequency_masks):
            sizes = torch.full((batch,), self.num_mels, device=device)
            bands |= draw_intervals(sizes, self.frequency_width, self.num_mels)
        frames = frames.masked_fill(bands.T[None, :, None], 0.0)  # 0 is the mean
        times = torch.zeros(x.shape[:2], dtype=torch.bool, device=device)
        for _ in range(self.time_masks):
            times |= draw_intervals(steps, self.time_width * steps, len(x))
        return frames.masked_fill(times[:, :, None, None], 0.0).flatten(2)

    def epoch_metrics(self, means: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        if stage == "train":
            return {}
        for part in all_gather_object(self.hypotheses):
            self.hypotheses |= part
        if not self.hypotheses:
            return {}
        import jiwer

        texts = dict(sorted(self.hypotheses.items()))
        self.hypotheses = {}
        if stage == "test":
            lines = "".join(f"{name}\t{hypothesis}\n" for name, (hypothesis, _) in texts.items())
            self.write_artifact("hypotheses.txt", lines)
        hypotheses, references = (list(column) for column in zip(*texts.values(), strict=True))
        if not any(references):
            return {}
        wer = jiwer.process_words(references, hypotheses).wer
        cer = jiwer.process_characters(references, hypotheses).cer
        return {name: torch.tensor(100 * rate, device=self.device) for name, rate in (("wer", wer), ("cer", cer))}

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
        """Transcribe a recording; yields the text to print.

        Args:
            input: an audio file (wav, flac, ogg, mp3, ...) of any sampling rate, or - for standard input: raw 16-bit
                samples, one channel, `rate` per second.
            stream: true reads the sound in chunks and prints symbols as they are recognised (with a beam or an n-gram
                at the end); the text is the same. It needs a one-directional model. Standard error gets the time per
                chunk on one thread.
            chunk: length of a chunk in milliseconds (100).
            beam: prefixes kept in the search; 1 takes the most likely symbol of each step (1).
            ngram: file of a word n-gram in ARPA or KenLM format; needs a beam, for example 16, and the package kenlm.
            ngram_weight: weight of the n-gram's log-probabilities (0.5).
            word_bonus: added to the score for each word (0), since n-grams prefer few words.
            rate: sampling rate of standard input (16000).
            offset, duration: the part of a file to transcribe, in seconds; duration=0 means up to the end (0, 0).
        """
        if not 1 <= beam <= 1000:
            raise ValueError(f"beam={beam} must be a whole number, 1 (the most likely symbol of each step) to 1000")
        if stream and (self.bidirectional or not hasattr(self.encoder, "step")):
            raise ValueError("stream=true needs a one-directional model, and this one reads the whole first")
        if not 0 < chunk < 1e6 or not 1000 <= rate <= 1_000_000:
            raise ValueError(f"chunk={chunk} must be milliseconds above 0, and rate={rate} samples a second, from 1000")
        if not math.isfinite(ngram_weight) or not math.isfinite(word_bonus):
            raise ValueError(f"ngram_weight={ngram_weight} and word_bonus={word_bonus} must be finite numbers")
        if ngram and beam == 1:
            raise ValueError("ngram= needs a beam: type beam=16")
        if not (0 <= offset < 1e7 and 0 <= duration < 1e7):
            raise ValueError(f"offset={offset} and duration={duration} must be seconds, 0 or more")
        if (offset or duration) and input == "-":
            raise ValueError("offset= and duration= need a file: standard input is read from start to end")
        if stream and vocabulary.frontend.level == "recording":
            raise ValueError("stream=true does not go with data.level=recording, which needs the whole recording first")
        words = NGramLM(ngram, vocabulary.symbols.piece, ngram_weight, word_bonus) if ngram else None
        prefixes = PrefixSearch(beam, words) if beam > 1 else None
        pieces, rate = read_sound(vocabulary, input, rate, chunk if stream else None, offset, duration)
        steps, state = vocabulary.stream(rate), None
        symbols: list[int] = []
        last, written = BLANK, ""
        seconds = []
        if stream:
            torch.set_num_threads(1)  # a chunk is too small for more
            # The first call compiles the kernels.
            self(torch.zeros(1, 1, vocabulary.frontend.size, device=self.device))
            parts: Iterable[tuple[np.ndarray, bool]] = ((p, p is NO_SOUND) for p in itertools.chain(pieces, [NO_SOUND]))
        else:
            parts = [(np.concatenate([NO_SOUND, *pieces]), True)]
        for wave, is_last in parts:
            start = time.perf_counter()
            x = torch.from_numpy(steps.accept(wave, is_last=is_last))
            new: list[int] = []
            if len(x):
                log_p, state = self(x[:, None].to(self.device), None, state)
                log_p = log_p[:, 0].cpu()
                if not torch.isfinite(log_p).all():
                    raise ValueError(NOT_FINITE)
                if prefixes is not None:
                    prefixes.accept(log_p)
                else:
                    new, last = greedy(log_p, last)
                    symbols += new
            text = vocabulary.symbols.decode(symbols) if new else written
            seconds.append(time.perf_counter() - start)
            if len(text) > len(written):
                yield text[len(written) :]
                written = text
        yield "\n" if prefixes is None else vocabulary.symbols.decode(prefixes.best()[0][1]) + "\n"
        if stream and len(seconds) > 1:
            median, high, most = (1000 * float(np.quantile(seconds[:-1], q)) for q in (0.5, 0.95, 1.0))
            print(
                f"a chunk of {chunk:g} ms takes {median:.1f} ms at the median, {high:.1f} at the 95th percentile, "
                f"{most:.1f} at most ({len(seconds) - 1} chunks)",
                file=sys.stderr,
            )


def draw_intervals(sizes: Tensor, longest: Tensor | float, length: int) -> Tensor:
    """A mask (length, B): in column b one random interval of up to `longest` steps, among the first sizes[b] steps."""
    widths = (torch.rand(len(sizes), device=sizes.device) * (longest + 1)).floor().minimum(sizes)
    first = (torch.rand(len(sizes), device=sizes.device) * (sizes - widths + 1)).floor()
    places = torch.arange(length, device=sizes.device)[:, None]
    return (places >= first) & (places < first + widths)


def read_sound(
    vocabulary: Any, input: str, rate: int, chunk: float | None, offset: float = 0.0, duration: float = 0.0
) -> tuple[Iterator[np.ndarray], int]:
    """Pieces of `chunk` milliseconds, or one of the whole, of a file or of standard input; and the sampling rate."""
    if input == "-":
        size = -1 if chunk is None else 2 * max(1, round(rate * chunk / 1000))
        return (
            np.frombuffer(piece[: len(piece) // 2 * 2], "<i2").astype(np.float32) / 32768
            for piece in iter(lambda: sys.stdin.buffer.read(size), b"")
        ), rate
    wave, rate = vocabulary.read(input, offset, duration)
    size = len(wave) if chunk is None else max(1, round(rate * chunk / 1000))
    return (wave[i : i + size] for i in range(0, len(wave), size)), rate

"""Read sound files, and compute Kaldi's log-mel features of recordings and of streams."""

import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

SYSTEM_ERROR = 2  # libsndfile's code for errors of the system
LOUDEST = 1000  # samples beyond are damage; the usual range is -1 to 1
PIPED = 0x7FFFF000  # headers written to a pipe have placeholder sizes of at least so many bytes
SCALE = 32768  # Kaldi expects the range of 16-bit samples
# Normalise by the mean of the training set; by the running mean of the recording, which a stream can compute; or by
# mean and deviation of the recording.
LEVELS = ("global", "running", "recording")
PRIOR = 30  # a running mean begins with so many frames of the training set's mean
ROUNDING = 0.1  # seconds that a part may exceed its file: manifests round, and mp3 decoders differ


class Damaged(ValueError):
    """A sound file that cannot be used."""


class Part(NamedTuple):
    """A part of a sound file: start and length in seconds; duration 0: to the end.

    rate: the required sampling rate of the file; 0: any.
    """

    offset: float = 0.0
    duration: float = 0.0
    rate: float = 0


WHOLE = Part()


def read(path: Path, part: Part = WHOLE) -> tuple[np.ndarray, int, int]:
    """(samples, sampling rate, number of channels) of a file or a part of it; samples are float32 in -1 to 1, averaged
    over channels. `Damaged` if the file cannot be read or does not contain the part."""
    import soundfile

    if not path.is_file():
        raise Damaged(f"{path} is not readable audio: there is no such file")
    try:
        with open(path, "rb") as file:  # raises OSError if the system is at fault, as with too many open files
            check_riff(file, path)
        info = soundfile.info(path)
        rate = info.samplerate
        if not 1000 <= rate <= 1_000_000:
            raise Damaged(f"{path} is not readable audio: its header says {rate} samples a second")
        if part.rate not in (0, rate):
            raise Damaged(f"{path} has {rate} samples a second, not {part.rate:g}")
        start, count = round(part.offset * rate), round(part.duration * rate) if part.duration else -1
        if start and start >= info.frames:
            raise Damaged(f"{path} is {info.frames / rate:g} s long: no part begins at {part.offset:g} s")
        wave, rate = soundfile.read(path, count, start, dtype="float32", always_2d=True)
    except Damaged:
        raise
    # TypeError: a suffix of raw sound; MemoryError: a header with an impossible length.
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        if getattr(error, "code", None) == SYSTEM_ERROR:
            raise OSError(f"{path} cannot be read: {error}") from error
        raise Damaged(f"{path} is not readable audio: {getattr(error, 'error_string', error)}") from error
    if not len(wave):
        raise Damaged(f"{path} has no sample" + (f" in {part.duration:g} s" if part.duration else ""))
    if len(wave) < count - ROUNDING * rate:
        end = part.offset + part.duration
        raise Damaged(f"{path} is {info.frames / rate:g} s long: no part goes from {part.offset:g} s to {end:g} s")
    if not np.abs(wave).max() <= LOUDEST:
        raise Damaged(f"{path} has samples that are NaN, or beyond {LOUDEST} times the usual range")
    return wave.mean(1), rate, wave.shape[1]


def check_riff(file: IO[bytes], path: Path) -> None:
    """`Damaged` for a wav file that is shorter than its header says, unless it was written to a pipe."""
    if file.read(4) != b"RIFF":
        return
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            there = path.stat().st_size - file.tell()
            if there < size < PIPED:
                raise Damaged(f"{path} is cut: its header says {size:,} bytes of sound, the file has {there:,}")
            return
        file.seek(size + size % 2, os.SEEK_CUR)


def write(path: Path, wave: np.ndarray, rate: int) -> None:
    """Writes a sound file in one step, so that several processes may write it at once."""
    import soundfile

    part = path.with_name(f"{path.stem}-{os.getpid()}.part{path.suffix}")
    soundfile.write(part, wave, rate)
    os.replace(part, path)


def resample(wave: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """The same sound at another sampling rate."""
    import soxr

    if rate == wanted:
        return wave
    # As in StepStream, so that training and streaming have the same samples.
    return soxr.ResampleStream(rate, wanted, 1, dtype="float32").resample_chunk(wave, last=True)


class Frontend:
    """The network's input: log-mel energies of 25 ms every 10 ms, normalised, `stack` frames in a step.

    rate: sampling rate; other sound is resampled.
    num_mels: energies of a frame.
    stack: consecutive frames of a step of the network; incomplete steps at the end are dropped.
    level: the mean that is subtracted, see LEVELS; it removes the effect of the room and the microphone.
    mean, deviation: (num_mels,) of the training set's frames; None for no normalisation.

    Features are those of Kaldi's compute-fbank-feats without dither, with snip-edges.
    """

    def __init__(
        self,
        *,
        rate: int,
        num_mels: int,
        stack: int = 1,
        level: str = "global",
        mean: np.ndarray | None = None,
        deviation: np.ndarray | None = None,
    ) -> None:
        self.rate, self.num_mels, self.stack = rate, num_mels, stack
        self.level, self.mean, self.deviation = level, mean, deviation

    @property
    def size(self) -> int:
        """Features of a step."""
        return self.num_mels * self.stack

    def steps(self, frames: int | np.ndarray) -> Any:
        """The number of steps in `frames` frames."""
        return frames // self.stack

    def frames(self, wave: np.ndarray) -> np.ndarray:
        """Features (T, num_mels) of a whole recording at `rate`, not normalised."""
        return FrameStream(self).accept(wave)

    def normalise(self, frames: np.ndarray, previous: tuple[Any, int] = (0.0, 0)) -> np.ndarray:
        """Steps (T // stack, size), float32, of frames (T, num_mels).

        previous: sum and number of the frames before these, for a running mean.
        """
        frames = frames[: len(frames) // self.stack * self.stack].astype(np.float32)
        if self.mean is not None and self.deviation is not None:
            mean, deviation = self.mean, self.deviation
            if self.level == "running":
                sums = previous[0] + frames.cumsum(0, dtype=np.float64) + PRIOR * self.mean
                mean = (sums / (PRIOR + previous[1] + np.arange(1, len(frames) + 1)[:, None])).astype(np.float32)
            elif self.level == "recording" and len(frames):
                mean, deviation = frames.mean(0), np.maximum(frames.std(0), 0.1)
            frames = (frames - mean) / deviation
        return frames.reshape(-1, self.size)


class FrameStream:
    """Features of sound that arrives in pieces, equal to those of the whole."""

    def __init__(self, frontend: Frontend) -> None:
        import kaldi_native_fbank as fbank

        options = fbank.FbankOptions()
        options.frame_opts.samp_freq = frontend.rate
        options.frame_opts.dither = 0.0
        options.mel_opts.num_bins = frontend.num_mels
        self.fbank = fbank.OnlineFbank(options)
        self.rate, self.num_mels = frontend.rate, frontend.num_mels
        self.taken = 0

    def accept(self, wave: np.ndarray) -> np.ndarray:
        """The frames (T, num_mels) completed by the next piece, float32 in -1 to 1 at the frontend's rate."""
        if len(wave):
            self.fbank.accept_waveform(self.rate, wave * SCALE)
        ready = self.fbank.num_frames_ready
        frames = [np.array(self.fbank.get_frame(i)) for i in range(self.taken, ready)]
        self.fbank.pop(ready - self.taken)
        self.taken = ready
        return np.stack(frames) if frames else np.zeros((0, self.num_mels), np.float32)


class StepStream:
    """The network's steps of sound that arrives in pieces, at any sampling rate."""

    def __init__(self, frontend: Frontend, rate: int) -> None:
        import soxr

        self.frontend = frontend
        self.frames = FrameStream(frontend)
        self.resampler = None
        if rate != frontend.rate:
            self.resampler = soxr.ResampleStream(rate, frontend.rate, 1, dtype="float32")
        self.left = np.zeros((0, frontend.num_mels), np.float32)  # frames of an incomplete step
        self.previous: tuple[Any, int] = 0.0, 0

    def accept(self, wave: np.ndarray, *, is_last: bool) -> np.ndarray:
        """The steps (T, size) completed by the next piece, float32 in -1 to 1; the last piece may be empty."""
        if self.resampler is not None:
            wave = self.resampler.resample_chunk(wave, last=is_last)
        frames = np.concatenate([self.left, self.frames.accept(wave)])
        whole = len(frames) // self.frontend.stack * self.frontend.stack
        self.left = frames[whole:]
        steps = self.frontend.normalise(frames[:whole], self.previous)
        self.previous = self.previous[0] + frames[:whole].sum(0, dtype=np.float64), self.previous[1] + whole
        return steps


def check_frontend(rate: int, num_mels: int, stack: int, level: str) -> None:
    """ValueError for wrong options, some of which would crash Kaldi's code."""
    for name, value, low, high in (
        ("rate", rate, 1000, 200_000),
        ("num_mels", num_mels, 4, 256),
        ("stack", stack, 1, 100),
    ):
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"data.{name}={value} must be a whole number, {low} to {high}")
    if level not in LEVELS:
        raise ValueError(f"data.level={level} must be one of {', '.join(LEVELS)}")
    try:
        FrameStream(Frontend(rate=rate, num_mels=num_mels))
    except ValueError as error:
        raise ValueError(
            f"data.num_mels={num_mels} is too many for data.rate={rate}: some bands are empty; type 40 or less"
        ) from error

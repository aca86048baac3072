"""Sound from files, and Kaldi's log-mel features of it: of whole recordings, and of sound as it comes."""

import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

SYSTEM_ERROR = 2  # of libsndfile
LOUDEST = 1000
PIPED = 0x7FFFF000  # bytes that a header says where it was written before the sound
SCALE = 32768  # Kaldi computes on 16-bit numbers
# The mean of all the training set's frames; of those of the recording so far, as a stream has it; or mean and deviation
# of all its own.
LEVELS = ("global", "running", "recording")
PRIOR = 30  # frames of the training set's mean that a running mean begins with
ROUNDING = 0.1  # seconds that a part may end behind its file: manifests round, and mp3 decoders differ


class Damaged(ValueError):
    """A file that holds no sound that can be read."""


class Part(NamedTuple):
    """A part of a file of sound, in seconds: its start, and its length; 0: all up to the end.

    rate: samples a second that the file must have; 0: any.
    """

    offset: float = 0.0
    duration: float = 0.0
    rate: float = 0


WHOLE = Part()


def read(path: Path, part: Part = WHOLE) -> tuple[np.ndarray, int, int]:
    """The sound of a file, or of a part of it: float32 samples in -1 to 1, the mean of its channels; samples a second;
    and channels. `Damaged` where the file does not have that part."""
    import soundfile

    if not path.is_file():
        raise Damaged(f"{path} is no sound that can be read: there is no such file")
    try:
        with open(path, "rb") as file:  # a fault of the machine, as too many open files, is no fault of the recording
            check_riff(file, path)
        info = soundfile.info(path)
        rate = info.samplerate
        if not 1000 <= rate <= 1_000_000:
            raise Damaged(f"{path} is no sound that can be read: it says it has {rate} samples a second")
        if part.rate not in (0, rate):
            raise Damaged(f"{path} has {rate} samples a second, not {part.rate:g}")
        start, count = round(part.offset * rate), round(part.duration * rate) if part.duration else -1
        if start and start >= info.frames:
            raise Damaged(f"{path} is {info.frames / rate:g} s long: no part begins at {part.offset:g} s")
        wave, rate = soundfile.read(path, count, start, dtype="float32", always_2d=True)
    except Damaged:
        raise
    # TypeError: a name that ends as raw sound does; MemoryError: a header that says there is more than there can be.
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        if getattr(error, "code", None) == SYSTEM_ERROR:
            raise OSError(f"{path} cannot be read: {error}") from error
        raise Damaged(f"{path} is no sound that can be read: {getattr(error, 'error_string', error)}") from error
    if not len(wave):
        raise Damaged(f"{path} has no sample" + (f" in {part.duration:g} s" if part.duration else ""))
    if len(wave) < count - ROUNDING * rate:
        end = part.offset + part.duration
        raise Damaged(f"{path} is {info.frames / rate:g} s long: no part goes from {part.offset:g} s to {end:g} s")
    if not np.abs(wave).max() <= LOUDEST:
        raise Damaged(f"{path} has samples that are no numbers, or beyond {LOUDEST} times the loudest that is usual")
    return wave.mean(1), rate, wave.shape[1]


def check_riff(file: IO[bytes], path: Path) -> None:
    """Refuse a wav file that ends before its header says so; one that was written to a pipe does not know its end."""
    if file.read(4) != b"RIFF":
        return
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            there = path.stat().st_size - file.tell()
            if there < size < PIPED:
                raise Damaged(f"{path} is cut: its header says {size:,} bytes of sound, and {there:,} are there")
            return
        file.seek(size + size % 2, os.SEEK_CUR)


def write(path: Path, wave: np.ndarray, rate: int) -> None:
    """Replace a file of sound in one step; two processes may write it at once."""
    import soundfile

    part = path.with_name(f"{path.stem}-{os.getpid()}.part{path.suffix}")
    soundfile.write(part, wave, rate)
    os.replace(part, path)


def resample(wave: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """The same sound at another number of samples a second."""
    import soxr

    if rate == wanted:
        return wave
    # As a stream is, so that what is learnt and what is heard as it comes are the same numbers.
    return soxr.ResampleStream(rate, wanted, 1, dtype="float32").resample_chunk(wave, last=True)


class Frontend:
    """What a network hears: log-mel energies of 25 ms every 10 ms, of mean 0 and deviation 1, `stack` frames a step.

    rate: samples a second, to which other sound is resampled.
    num_mels: energies of a frame.
    stack: so many frames, one behind the other, are a step of the network; what is left at the end is dropped.
    level: what is taken from each frame, see LEVELS: what the room and the microphone add to all of a recording.
    mean, deviation: (num_mels,) of the training set's frames; None for features as they are.

    Features are those of Kaldi's compute-fbank-feats without dither; frames lie wholly within the sound.
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
        """The steps of so many frames."""
        return frames // self.stack

    def frames(self, wave: np.ndarray) -> np.ndarray:
        """Features (T, num_mels), as they are, of a whole sound at `rate`."""
        return FrameStream(self).accept(wave)

    def normalise(self, frames: np.ndarray, heard: tuple[Any, int] = (0.0, 0)) -> np.ndarray:
        """Steps (T // stack, size), float32, of frames (T, num_mels).

        heard: the sum and the number of the frames before these, for a running mean.
        """
        frames = frames[: len(frames) // self.stack * self.stack].astype(np.float32)
        if self.mean is not None and self.deviation is not None:
            mean, deviation = self.mean, self.deviation
            if self.level == "running":
                sums = heard[0] + frames.cumsum(0, dtype=np.float64) + PRIOR * self.mean
                mean = (sums / (PRIOR + heard[1] + np.arange(1, len(frames) + 1)[:, None])).astype(np.float32)
            elif self.level == "recording" and len(frames):
                mean, deviation = frames.mean(0), np.maximum(frames.std(0), 0.1)
            frames = (frames - mean) / deviation
        return frames.reshape(-1, self.size)


class FrameStream:
    """Features of sound that comes in pieces; those of all pieces are those of the whole."""

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
        """The frames (T, num_mels) that a next piece of sound, float32 in -1 to 1 at the frontend's rate, completes."""
        if len(wave):
            self.fbank.accept_waveform(self.rate, wave * SCALE)
        ready = self.fbank.num_frames_ready
        frames = [np.array(self.fbank.get_frame(i)) for i in range(self.taken, ready)]
        self.fbank.pop(ready - self.taken)
        self.taken = ready
        return np.stack(frames) if frames else np.zeros((0, self.num_mels), np.float32)


class StepStream:
    """A network's steps of sound that comes in pieces, at any rate."""

    def __init__(self, frontend: Frontend, rate: int) -> None:
        import soxr

        self.frontend = frontend
        self.frames = FrameStream(frontend)
        self.resampler = None
        if rate != frontend.rate:
            self.resampler = soxr.ResampleStream(rate, frontend.rate, 1, dtype="float32")
        self.left = np.zeros((0, frontend.num_mels), np.float32)  # frames that are no whole step yet
        self.heard: tuple[Any, int] = 0.0, 0

    def accept(self, wave: np.ndarray, *, is_last: bool) -> np.ndarray:
        """The steps (T, size) that a next piece, float32 in -1 to 1, completes; the last may be empty."""
        if self.resampler is not None:
            wave = self.resampler.resample_chunk(wave, last=is_last)
        frames = np.concatenate([self.left, self.frames.accept(wave)])
        whole = len(frames) // self.frontend.stack * self.frontend.stack
        self.left = frames[whole:]
        steps = self.frontend.normalise(frames[:whole], self.heard)
        self.heard = self.heard[0] + frames[:whole].sum(0, dtype=np.float64), self.heard[1] + whole
        return steps


def check_frontend(rate: int, num_mels: int, stack: int, level: str) -> None:
    """ValueError for what Kaldi's code would stop the process at, and for what is no number of anything."""
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
            f"data.num_mels={num_mels} is too many for data.rate={rate}: some have no frequency; type 40, or less"
        ) from error

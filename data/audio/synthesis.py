"""Synthetic speech for tests and samples: ten words of seven sounds in different voices."""

from collections.abc import Sequence

import numpy as np

VERSION = 1  # increase it when the sound changes
RATE = 8000  # samples a second
# The frequencies (Hz) of two formants, and the share of noise.
SOUNDS = {
    "a": (750, 1250, 0.0),
    "e": (480, 1900, 0.0),
    "i": (300, 2300, 0.0),
    "o": (480, 900, 0.0),
    "u": (320, 700, 0.0),
    "m": (220, 1050, 0.1),
    "s": (2600, 3500, 1.0),
}
WORDS = ("ami", "asu", "emo", "isa", "oma", "umi", "masi", "muse", "oso", "sume")
SPEAKERS = 12


def synthesise(words: Sequence[str], speaker: int, seed: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The concatenated words, float32 in -1 to 1 at RATE, and the begin and end of each word in samples.

    The speaker determines the pitch and the formants, the seed the length of sounds and pauses, and the noise.
    """
    generator = np.random.default_rng([seed, speaker])
    pitch, tract = 95 + 12 * speaker, 0.88 + 0.02 * ((5 * speaker) % SPEAKERS)
    pieces, spans, position = [], [], 0

    def add(piece: np.ndarray) -> None:
        nonlocal position
        pieces.append(piece)
        position += len(piece)

    def pause() -> None:
        add(np.zeros((int(RATE * generator.uniform(0.04, 0.15)), 3)))

    pause()
    for word in words:
        begin = position
        for letter in word:
            first, second, rough = SOUNDS[letter]
            add(np.tile([first * tract, second * tract, 1 + rough], (int(RATE * generator.uniform(0.07, 0.13)), 1)))
        spans.append((begin, position))
        pause()
    track = np.concatenate(pieces)
    # Transitions between sounds take 20 ms.
    window = np.hanning(RATE // 50 + 2)[1:-1]
    low, high, gain = (np.convolve(column, window / window.sum(), "same") for column in track.T)
    sounding, noise = np.minimum(gain, 1), np.maximum(gain - 1, 0)
    steps = np.arange(len(track)) / RATE
    phase = np.cumsum(pitch * (1 + 0.04 * np.sin(2 * np.pi * 3 * steps + generator.uniform(0, 6)))) / RATE
    wave = np.zeros(len(track))
    for harmonic in range(1, int(0.45 * RATE / pitch)):
        frequency = harmonic * pitch
        strength = sum(1 / (1 + ((frequency - formant) / 90) ** 2) for formant in (low, high))
        wave += strength * np.sin(2 * np.pi * harmonic * phase)
    hiss = np.diff(generator.normal(size=len(track) + 1))
    wave = sounding * ((1 - noise) * wave + 0.7 * noise * hiss) + 0.01 * generator.normal(size=len(track))
    return (0.3 * wave / max(1.0, np.abs(wave).max())).astype(np.float32), spans

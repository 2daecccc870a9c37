"""What can be measured of speech: pitch, pace, silence, errors in words, likeness of voices."""

from __future__ import annotations

import re
from collections.abc import Sequence

import librosa
import numpy as np

from tortoise_jax.audio import SAMPLE_RATE, sounding_part
from tortoise_jax.text.cleaners import clean

LOWEST_HZ, HIGHEST_HZ = 60, 450
SHORTEST = 4096  # samples in which a pitch can be found


def pitch(waveform: np.ndarray) -> float:
    """Median fundamental frequency in Hz of the louder half of a clip (samples,), by YIN.

    nan where it is too short, or equally loud all through.
    """
    if len(waveform) < SHORTEST:
        return float("nan")
    loudness = librosa.feature.rms(y=waveform, frame_length=2048, hop_length=512)[0]
    louder = loudness > np.median(loudness)
    if not louder.any():
        return float("nan")
    found = librosa.yin(waveform, fmin=LOWEST_HZ, fmax=HIGHEST_HZ, sr=SAMPLE_RATE)
    return float(np.median(found[louder]))


def trailing_silence(waveform: np.ndarray) -> float:
    """Seconds at the end of a clip (samples,) in which nobody speaks."""
    return (len(waveform) - sounding_part(waveform)[1]) / SAMPLE_RATE if len(waveform) else 0.0


def pace(text: str, waveform: np.ndarray) -> float:
    """Letters and digits of a cleaned text per second of a clip (samples,), silence at its ends not counted."""
    start, end = sounding_part(waveform) if len(waveform) else (0, 0)
    letters = sum(character.isalnum() for character in text)
    return letters * SAMPLE_RATE / (end - start) if end > start else float("nan")


def words_of(text: str, cleaner: str) -> list[str]:
    """The words of a text as they are spoken: cleaned, numbers spelled out, without punctuation."""
    return re.findall(r"\w+(?:'\w+)*", clean(text, cleaner).lower())


def word_errors(said: Sequence[str], expected: Sequence[str]) -> int:
    """The fewest words to leave out, put in or replace that turn one list into the other."""
    row = np.arange(len(expected) + 1)
    for count, word in enumerate(said, start=1):
        before, row = row, np.full(len(row), count)
        for i, other in enumerate(expected, start=1):
            row[i] = min(before[i] + 1, row[i - 1] + 1, before[i - 1] + (word != other))
    return int(row[-1])


def mean_likeness(embeddings: np.ndarray, references: np.ndarray, same: Sequence[int]) -> np.ndarray:
    """Mean cosine (n,) of each of n clips' embeddings (n, e) to those of a speaker's recordings (r, e).

    All are of length 1. same: which recording says what a clip says and is not counted for it, -1 where none does; nan
    where none is left.
    """
    cosines = embeddings @ references.T
    counted = np.arange(len(references)) != np.asarray(same)[:, None]
    number = counted.sum(axis=1)
    return np.where(number > 0, (cosines * counted).sum(axis=1) / np.maximum(number, 1), np.nan)

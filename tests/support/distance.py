"""How far two sounds are apart, by their log-mels."""

from __future__ import annotations

import math

import numpy as np

DECIBELS = 10 / math.log(10)  # of a natural logarithm of power


def distance(mel: np.ndarray, other: np.ndarray, mel_norms: np.ndarray) -> float:
    """Mean absolute difference in dB of two log-mels (t, 80), over the frames both have."""
    frames = min(len(mel), len(other))
    return float(np.abs((mel[:frames] - other[:frames]) * mel_norms).mean() * DECIBELS)

"""Lengths padded to few sizes, so that few programs are compiled; lengths like LJSpeech's, to plan without data."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from tortoise_jax.audio import SAMPLE_RATE, SAMPLES_PER_CODE

N = TypeVar("N", int, np.ndarray)
LJSPEECH_CLIPS = 13_100
MEAN_SECONDS, SIGMA, SHORTEST, LONGEST = 6.5, 0.35, 1.0, 10.0  # before the cut; sigma: of the logarithm
TOKENS_PER_SECOND = 9  # of English read aloud


def round_up(number: N, unit: int) -> N:
    """The next multiple of `unit`, `number` itself if it is one."""
    return -(-number // unit) * unit


def ljspeech_seconds(clips: int = LJSPEECH_CLIPS) -> np.ndarray:
    """Durations in seconds like LJSpeech's, (clips,) float64: lognormal, from 1 to 10 s. Always the same."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEAN_SECONDS) - SIGMA**2 / 2, SIGMA, 2 * clips + 100)
    return drawn[(drawn >= SHORTEST) & (drawn <= LONGEST)][:clips]


def ljspeech_lengths(clips: int = LJSPEECH_CLIPS) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens and codes of clips like LJSpeech's, both (clips,) int64, without start and stop."""
    seconds = ljspeech_seconds(clips)
    codes = (seconds * SAMPLE_RATE).astype(np.int64) // SAMPLES_PER_CODE + 1
    return np.round(TOKENS_PER_SECOND * seconds).astype(np.int64), codes

"""Which of several candidates to keep: flagged ones last, then by what the model itself thinks of them."""

from __future__ import annotations

import dataclasses

import numpy as np

from tortoise_jax.audio import SAMPLE_RATE, SAMPLES_PER_CODE, SILENCE_BELOW_PEAK_DB

LOOP_SECONDS = 2.0  # the same few codes over and over for so long are no speech
LONGEST_PERIOD = 16  # codes
REPEATS = 3
SILENT_NEPERS = np.log(10.0 ** (SILENCE_BELOW_PEAK_DB / 10))  # in the log of power
SILENT_SECONDS = 1.0  # more of it at the end than a pause is flagged

SECONDS_A_CODE = SAMPLES_PER_CODE / SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Judged:
    """A candidate: its row among the samples, what is wrong with it (nothing: empty), the model's own opinion."""

    row: int
    flags: tuple[str, ...]
    log_likelihood: float


def rank(judged: list[Judged]) -> list[Judged]:
    """Those without flags first; within each kind the likeliest first."""
    return sorted(judged, key=lambda one: (bool(one.flags), -one.log_likelihood, one.row))


def flags(codes: np.ndarray, stopped: bool, mel: np.ndarray, mel_norms: np.ndarray) -> tuple[str, ...]:
    """What is wrong with codes (c,) and the mel (4 c, m) they decode to, in words."""
    found = []
    if not len(codes):
        return ("says nothing",)
    if not stopped:
        found.append("never stops")
    looping = longest_loop(codes) * SECONDS_A_CODE
    if looping >= LOOP_SECONDS:
        found.append(f"loops for {looping:.1f} s")
    silence = trailing_silence(mel, mel_norms) * SECONDS_A_CODE * len(codes) / len(mel)
    if silence > SILENT_SECONDS:
        found.append(f"{silence:.1f} s of silence behind")
    return tuple(found)


def longest_loop(codes: np.ndarray) -> int:
    """Codes in the longest stretch that repeats a pattern of at most 16 codes three times or more."""
    longest = 0
    for period in range(1, LONGEST_PERIOD + 1):
        run = 0
        for same in codes[period:] == codes[:-period]:
            run = run + 1 if same else 0
            if run + period >= REPEATS * period:
                longest = max(longest, run + period)
    return longest


def trailing_silence(mel: np.ndarray, mel_norms: np.ndarray) -> int:
    """Frames at the end of a mel (t, m) that are 40 dB below the loudest one."""
    power = np.exp(np.asarray(mel, np.float64) * mel_norms).sum(axis=1)
    loud = np.flatnonzero(np.log(power) > np.log(power.max()) - SILENT_NEPERS)
    return len(power) - 1 - int(loud[-1])

"""Which of several candidates to keep: flagged ones last, then by the model's own likelihood."""

from __future__ import annotations

import dataclasses

import numpy as np

from tortoise_jax.audio import HOP, SAMPLE_RATE, SAMPLES_PER_CODE, SILENCE_BELOW_PEAK_DB

LOOP_SECONDS = 2.0  # the same few codes again and again for so long are no speech
LONGEST_PERIOD = 16  # codes
REPEATS = 3
SILENT_NEPERS = np.log(10.0 ** (SILENCE_BELOW_PEAK_DB / 10))  # in the log of power
SILENT_SECONDS = 1.0  # longer silence at the end than a pause is flagged


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to say a text: its number among the candidates, what is wrong with it (nothing: empty), how likely it is.

    log_likelihood: the model's own mean log-probability per code. codes (c,) int32, without the stop. score: CLVP's,
    None where it was not asked. stopped: whether the stop came.
    """

    index: int
    flags: tuple[str, ...]
    log_likelihood: float
    codes: np.ndarray
    score: float | None = None
    stopped: bool = True


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Those without flags first; within each group the likeliest first."""
    return sorted(candidates, key=lambda one: (bool(one.flags), -one.log_likelihood, one.index))


def by_score(candidates: list[Candidate], stopped_first: bool = False) -> list[Candidate]:
    """Best first by CLVP's score alone, as upstream ranks them; or those first that stopped."""
    return sorted(candidates, key=lambda one: (stopped_first and not one.stopped, -(one.score or 0.0), one.index))


def flags(codes: np.ndarray, stopped: bool, mel: np.ndarray | None, mel_norms: np.ndarray) -> tuple[str, ...]:
    """What is wrong with codes (c,) and the log-mel (4 c, m) they decode to, where there is one, in words."""
    found = []
    if not len(codes):
        return ("says nothing",)
    if not stopped:
        found.append("never stops")
    looping = longest_loop(codes) * SAMPLES_PER_CODE / SAMPLE_RATE
    if looping >= LOOP_SECONDS:
        found.append(f"loops for {looping:.1f} s")
    silence = trailing_silence(mel, mel_norms) if mel is not None else 0.0
    if silence > SILENT_SECONDS:
        found.append(f"{silence:.1f} s of silence after")
    return tuple(found)


def longest_loop(codes: np.ndarray) -> int:
    """Codes in the longest stretch of codes (c,) that repeats a pattern of at most 16 codes three times or more."""
    longest = 0
    for period in range(1, LONGEST_PERIOD + 1):
        run = 0
        for same in codes[period:] == codes[:-period]:
            run = run + 1 if same else 0
            if run + period >= REPEATS * period:
                longest = max(longest, run + period)
    return longest


def trailing_silence(mel: np.ndarray, mel_norms: np.ndarray) -> float:
    """Seconds at the end of a log-mel (t, m) whose frames are 40 dB or more below the loudest; 0 where t is 0."""
    if not len(mel):
        return 0.0
    power = np.exp(np.asarray(mel, np.float64) * mel_norms).sum(axis=1)
    loud = np.flatnonzero(np.log(power) > np.log(power.max()) - SILENT_NEPERS)
    return (len(power) - 1 - int(loud[-1])) * HOP / SAMPLE_RATE

"""Which candidates are kept, and what is wrong with the others."""

from __future__ import annotations

import numpy as np
import pytest

from tortoise_jax.audio import default_mel_norms
from tortoise_jax.synthesis import ranking
from tortoise_jax.synthesis.ranking import Candidate

NORMS = default_mel_norms()
VARIED = np.random.default_rng(0).integers(0, 8192, 80)


def test_ranked_by_flags_then_likelihood() -> None:
    found = [(("never stops",), -1.0), ((), -3.0), ((), -2.0), (("loops",), -0.5)]
    candidates = [Candidate(i, flags, likelihood, VARIED) for i, (flags, likelihood) in enumerate(found)]
    assert [one.index for one in ranking.rank(candidates)] == [2, 1, 3, 0]


def test_ranked_by_score_as_upstream_or_those_that_stopped_first() -> None:
    found = [(0.9, False), (0.5, True), (0.7, True)]
    candidates = [Candidate(i, (), 0.0, VARIED, score, stopped) for i, (score, stopped) in enumerate(found)]
    assert [one.index for one in ranking.by_score(candidates)] == [0, 2, 1]
    assert [one.index for one in ranking.by_score(candidates, stopped_first=True)] == [2, 1, 0]


def loud(codes: int, silent: int = 0) -> np.ndarray:
    """A mel of so many codes, the last of them silent."""
    power = np.full((4 * codes, 80), 0.0)
    power[4 * (codes - silent) :] = -11.5
    return (power / NORMS).astype(np.float32)


@pytest.mark.parametrize(
    ("codes", "stopped", "silent", "expected"),
    [
        pytest.param(VARIED, True, 0, (), id="fine"),
        pytest.param(VARIED, True, 20, (), id="a short silence after"),
        pytest.param(VARIED, False, 0, ("never stops",), id="never stops"),
        pytest.param(VARIED, True, 30, ("1.4 s of silence after",), id="a long silence after"),
        pytest.param(np.tile([1, 2, 3], 20), True, 0, ("loops for 2.8 s",), id="loops"),
        pytest.param(np.full(60, 5), False, 0, ("never stops", "loops for 2.8 s"), id="one code, without end"),
        pytest.param(np.tile(VARIED[:14], 3), True, 0, (), id="three times the same, below two seconds"),
        pytest.param(np.tile(VARIED[:17], 3), True, 0, (), id="a long phrase three times"),
        pytest.param(VARIED[:0], True, 0, ("says nothing",), id="nothing"),
    ],
)
def test_flags(codes: np.ndarray, stopped: bool, silent: int, expected: tuple[str, ...]) -> None:
    assert ranking.flags(codes, stopped, loud(len(codes), silent), NORMS) == expected


@pytest.mark.parametrize(("frames", "silent"), [(40, 0), (40, 10), (40, 39), (1, 0)])
def test_trailing_silence_is_in_seconds(frames: int, silent: int) -> None:
    mel = np.zeros((frames, 80), np.float32)
    mel[frames - silent :] = -11.5 / NORMS
    assert ranking.trailing_silence(mel, NORMS) == pytest.approx(silent * 256 / 22050)


def test_only_the_end_counts_and_nothing_has_no_silence() -> None:
    mel = np.zeros((9, 80), np.float32)
    mel[2:5] = -11.5 / NORMS
    assert ranking.trailing_silence(mel, NORMS) == 0
    assert ranking.trailing_silence(mel[:0], NORMS) == 0

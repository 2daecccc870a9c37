"""Pitch, pace, silence, errors in words, likeness: of sounds made so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tortoise_jax.audio import SAMPLE_RATE, trim_silence
from tortoise_jax.evaluation import measures


def vowel(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """A buzz with overtones, louder in its second half."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sound = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 9))
    return (np.where(time < seconds / 2, 0.1, 0.2) * sound).astype(np.float32)


def with_silence(waveform: np.ndarray, before: float, after: float) -> np.ndarray:
    return np.pad(waveform, (round(before * SAMPLE_RATE), round(after * SAMPLE_RATE)))


@pytest.mark.parametrize("hertz", [85, 120, 210, 330])
def test_pitch(hertz: float) -> None:
    assert measures.pitch(vowel(hertz)) == pytest.approx(hertz, rel=0.02)


def test_nothing_has_no_pitch() -> None:
    assert np.isnan(measures.pitch(np.zeros(SAMPLE_RATE, np.float32)))
    assert np.isnan(measures.pitch(vowel(120, 0.1)))
    assert np.isnan(measures.pitch(np.zeros(0, np.float32)))


def test_silence_and_pace_do_not_mix() -> None:
    spoken = with_silence(vowel(120, 2.0), 0.5, 0.75)
    assert measures.trailing_silence(spoken) == pytest.approx(0.75, abs=0.05)
    assert measures.trailing_silence(vowel(120)) == pytest.approx(0, abs=0.02)
    assert measures.pace("one, two three", spoken) == pytest.approx(11 / 2, rel=0.05)
    assert measures.trailing_silence(np.zeros(0, np.float32)) == 0
    assert np.isnan(measures.pace("one", np.zeros(0, np.float32)))
    assert len(trim_silence(spoken)) == pytest.approx(2.2 * SAMPLE_RATE, rel=0.03)


def test_words_as_they_are_spoken() -> None:
    assert measures.words_of("It's 12 o'clock, Dr. Ö!", "tortoise") == ["it's", "twelve", "o'clock", "doctor", "o"]
    assert measures.words_of("Größe – 3", "basic") == ["größe", "3"]


@pytest.mark.parametrize(
    ("said", "expected", "errors"),
    [
        ("one two three", "one two three", 0),
        ("one three", "one two three", 1),
        ("one two two three", "one two three", 1),
        ("one four three", "one two three", 1),
        ("", "one two three", 3),
        ("one", "", 1),
        ("three one two", "one two three", 2),
    ],
)
def test_errors_in_words(said: str, expected: str, errors: int) -> None:
    assert measures.word_errors(said.split(), expected.split()) == errors
    assert measures.word_errors(expected.split(), said.split()) == errors


def test_a_clip_is_not_compared_with_the_recording_that_says_the_same() -> None:
    recordings = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    found = measures.mean_likeness(np.array([[1.0, 0.0], [1.0, 0.0]]), recordings, [0, -1])
    np.testing.assert_allclose(found, [(0 + 0.6) / 2, 1.6 / 3])
    assert np.isnan(measures.mean_likeness(recordings[:1], recordings[:1], [0])).all()

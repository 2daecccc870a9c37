"""The bundled voice is what its README says, and what preparing, training and the demo expect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from tortoise_jax.audio import SAMPLE_RATE, read_audio
from tortoise_jax.text.cleaners import clean_tortoise
from tortoise_jax.text.tokenizer import Tokenizer

VOICE = Path(__file__).parent.parent / "examples" / "voice"
LINES = [line.split("|") for line in (VOICE / "metadata.csv").read_text(encoding="utf-8").splitlines()]


def test_every_clip_has_one_line_and_every_line_one_clip():
    assert sorted(name for name, _, _ in LINES) == sorted(path.stem for path in (VOICE / "wavs").iterdir())
    assert len({clean_tortoise(text) for _, text, _ in LINES}) == len(LINES) == 48


def test_it_stays_small():
    assert sum(path.stat().st_size for path in VOICE.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("name", [name for name, _, _ in LINES])
def test_clip(name):
    path = VOICE / "wavs" / f"{name}.flac"
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE, 1, "PCM_16")
    waveform = np.abs(read_audio(path))
    assert 1.2 <= len(waveform) / SAMPLE_RATE <= 3.5
    assert 0.75 < waveform.max() < 0.95
    loud = np.flatnonzero(waveform > 0.01)
    assert loud[0] < 0.2 * SAMPLE_RATE
    assert len(waveform) - loud[-1] < 0.2 * SAMPLE_RATE


def test_the_cleaner_says_what_was_spoken():
    for name, text, spoken in LINES:
        assert clean_tortoise(text) == clean_tortoise(spoken), name
    assert sum(text != spoken for _, text, spoken in LINES) >= 10  # numbers and abbreviations


def test_every_character_is_known():
    tokenizer = Tokenizer.default()
    assert [c for _, text, _ in LINES for c in tokenizer.unknown_characters(text)] == []

"""Recordings and checkpoints for tests that prepare data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import soundfile

from tests.support.parity import Twin
from tortoise_jax.audio import SAMPLE_RATE, default_mel_norms, read_audio
from tortoise_jax.checkpoints.parts import Part, abstract_tree
from tortoise_jax.checkpoints.pretrained import Pretrained, save_pretrained
from tortoise_jax.text.tokenizer import Tokenizer

VOICE = Path(__file__).parents[2] / "examples" / "voice"
RECORDINGS = sorted((VOICE / "wavs").iterdir())


def write_speech(path: Path, number: int) -> None:
    """About two seconds of the example voice: another recording for every number up to 47."""
    soundfile.write(path, read_audio(RECORDINGS[number]), SAMPLE_RATE, subtype="PCM_16")


def checkpoint_at(path: Path, dvae: Twin, voice: Twin) -> Path:
    """A converted checkpoint of a tiny dVAE, with the dimensions of an AR model that holds 11.6 s."""
    config = dataclasses.replace(voice.config, text_tokens=256, text_positions=404, mel_positions=608)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_tree(config))
    parts = {"ar": Part.of_tree(config, zeros), "dvae": dvae.part}
    save_pretrained(Pretrained(parts, Tokenizer.default(), default_mel_norms(), {}), path)
    return path

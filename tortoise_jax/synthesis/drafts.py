"""Codes to a draft waveform: the dVAE's decoder, then Griffin-Lim."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tortoise_jax.audio import SAMPLE_RATE, griffin_lim
from tortoise_jax.files import write_atomically
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig

Tree = Any


def decode_mel(dvae_variables: Tree, config: DVAEConfig, codes: np.ndarray) -> np.ndarray:
    """Codes (b, c), each below the codebook's size -> log-mel (b, 4 c, m), mel norms applied."""
    return np.asarray(apply(DiscreteVAE(config), "decode", dvae_variables, np.asarray(codes, np.int32)))


def draft_mel(dvae_variables: Tree, config: DVAEConfig, codes: np.ndarray) -> np.ndarray:
    """Codes (c,) -> log-mel (4 c, m), mel norms applied.

    What is no code of the dVAE (a model may draw its own start token) is left out and not counted.
    """
    codes = codes[(codes >= 0) & (codes < config.codes)]
    if not len(codes):
        return np.zeros((0, config.channels), np.float32)
    return decode_mel(dvae_variables, config, codes[None])[0]


def draft(dvae_variables: Tree, config: DVAEConfig, mel_norms: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes (c,) -> a draft waveform float32 (1024 c - 256,), which is c codes long; counted as in `draft_mel`."""
    return draft_waveform(draft_mel(dvae_variables, config, codes), mel_norms)


def draft_waveform(mel: np.ndarray, mel_norms: np.ndarray) -> np.ndarray:
    """A log-mel (t, m) -> a draft waveform float32 (256 (t - 1),), without samples where t is 0."""
    return griffin_lim(mel, mel_norms) if len(mel) else np.zeros(0, np.float32)


def write_wav(path: str | Path, waveform: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes a waveform (samples,) in [-1, 1] with 16 bits."""
    content = io.BytesIO()
    soundfile.write(content, waveform, rate, format="WAV", subtype="PCM_16")
    write_atomically(Path(path), content.getvalue())

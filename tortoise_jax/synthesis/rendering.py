"""From drawn codes to 24 kHz speech, stage by stage: CLVP's scores, the diffusion decoder, the vocoder.

Lengths go in a few buckets and are masked, so that a new sentence compiles nothing, and changes nothing: a padded row
comes out as it would alone. Axis letters: c codes, s codes of a row in its bucket, t mel frames, l latent width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax.checkpoints.parts import Part
from tortoise_jax.models import vocoder
from tortoise_jax.models.clvp import CLVP
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.diffusion import DiffusionDecoder
from tortoise_jax.models.layers import codes_of, frames_of
from tortoise_jax.models.random_voice import RandomVoice
from tortoise_jax.synthesis import denoising
from tortoise_jax.synthesis.diffusion_inputs import DIFFUSION_CODES, repaired

TEXT_BUCKET = 32  # text ids a row of CLVP's text side is padded to a multiple of
CODE_BUCKET = 50  # codes a row of the diffusion decoder is padded to a multiple of
SCORED_AT_ONCE = 16
RENDERED_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Preset:
    """What upstream's preset of this name asks for. guidance: its strength, None for none."""

    candidates: int
    steps: int
    guidance: float | None


PRESETS = {
    "ultra_fast": Preset(candidates=16, steps=30, guidance=None),
    "fast": Preset(candidates=96, steps=80, guidance=2.0),
    "standard": Preset(candidates=256, steps=200, guidance=2.0),
    "high_quality": Preset(candidates=256, steps=400, guidance=2.0),
}


def scores(
    clvp: Part, text_ids: Sequence[int], codes: Sequence[np.ndarray], total: int = DIFFUSION_CODES
) -> np.ndarray:
    """How well each row of codes (c,), without stops, says the text: (rows,) float32, higher is better.

    As upstream: of the repaired codes with all their padding, and of the text with an extra 0. A row with a code that
    CLVP's table has not (a model may draw its own start token) scores -inf: upstream would end there.
    """
    model = CLVP(clvp.config)
    ids = [*text_ids, 0]
    padded = np.zeros((1, -(-len(ids) // TEXT_BUCKET) * TEXT_BUCKET), np.int32)
    padded[0, : len(ids)] = ids
    mask = np.arange(padded.shape[1])[None] < len(ids)
    latent = apply(model, "text_latent", clvp.variables, padded, mask)[0]
    fixed = np.stack([repaired(row, total) for row in codes])
    known = (fixed < clvp.config.speech_tokens).all(axis=1)
    fixed = np.minimum(fixed, clvp.config.speech_tokens - 1)
    found = []
    for first in range(0, len(fixed), SCORED_AT_ONCE):
        batch = fixed[first : first + SCORED_AT_ONCE]
        filled = np.concatenate([batch, np.repeat(batch[-1:], SCORED_AT_ONCE - len(batch), axis=0)])
        found.append(np.asarray(apply(model, "score", clvp.variables, latent, filled))[: len(batch)])
    return np.where(known, np.concatenate(found), -np.inf).astype(np.float32)


def bucket(codes: int) -> int:
    """The length that so many codes are padded to."""
    return max(1, -(-codes // CODE_BUCKET)) * CODE_BUCKET


def keys_of(seed: int, rows: Sequence[int], stage: int) -> jax.Array:
    """One key for each row, by its number, so that what a row draws depends on nothing else."""
    root = jax.random.fold_in(jax.random.key(seed), stage)
    return jax.vmap(lambda row: jax.random.fold_in(root, row))(jnp.asarray(rows, jnp.int32))


def diffuse(
    diffusion: Part,
    latents: Sequence[np.ndarray],
    voice: np.ndarray,
    preset: Preset,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Hidden states (s, l) of each row and the voice's diffusion vector (2 d,) -> log-mels (t, m), t = frames_of(s).

    rows: numbers that the rows' noise is drawn by, 0, 1, … by default.
    """
    lengths = np.array([len(row) for row in latents], np.int32)
    s = bucket(int(lengths.max()))
    padded = np.stack([np.pad(row, ((0, s - len(row)), (0, 0))) for row in latents]).astype(np.float32)
    voices = np.repeat(np.asarray(voice, np.float32)[None], len(latents), axis=0)
    decoder = DiffusionDecoder(diffusion.config)
    frames = [frames_of(int(length)) for length in lengths]
    mask = np.arange(frames_of(s))[None] < np.array(frames)[:, None]
    mel = denoising.denoise(
        decoder,
        diffusion.variables,
        denoising.align(decoder, diffusion.variables, padded, voices, frames_of(s), lengths),
        mask,
        keys_of(seed, rows if rows is not None else range(len(latents)), stage=0),
        denoising.coefficients(preset.steps, preset.guidance),
        np.float32(temperature),
        preset.guidance is not None,
    )
    return [row[:t] for row, t in zip(np.asarray(mel), frames, strict=True)]


def vocode(
    part: Part, mels: Sequence[np.ndarray], seed: int = 0, rows: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Log-mels (t, m) at 24 kHz -> waveforms (t hop,) float32 in [-1, 1]."""
    config = part.config
    lengths = np.array([len(mel) for mel in mels], np.int32)
    longest = frames_of(bucket(codes_of(int(lengths.max()))))
    padded = np.stack([np.pad(mel, ((0, longest - len(mel)), (0, 0))) for mel in mels]).astype(np.float32)
    shape = (longest + vocoder.TAIL_FRAMES, config.noise_channels)
    keys = keys_of(seed, rows if rows is not None else range(len(mels)), stage=1)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    waveforms = apply(vocoder.UnivNet(config), "vocode", part.variables, padded, noise, lengths)
    return [row[: n * config.hop] for row, n in zip(np.asarray(waveforms), lengths, strict=True)]


def random_vector(part: Part, seed: int, stage: int) -> np.ndarray:
    """One half of a voice out of nothing, (d,) float32; the two halves are unrelated, as upstream draws them."""
    noise = jax.random.normal(keys_of(seed, [0], stage)[0], (1, part.config.width))
    return np.asarray(apply(RandomVoice(part.config), "__call__", part.variables, noise))[0]

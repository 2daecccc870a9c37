"""From drawn codes to 24 kHz speech, stage by stage: CLVP's scores, the diffusion decoder, the vocoders.

Lengths go in a few buckets and are masked, so that a new sentence compiles nothing, and changes nothing: a padded row
comes out as it would alone. Rows are shared out over this host's devices.

All is float32 by default. dtype "bfloat16" is for the products of CLVP's and the diffusion decoder's blocks; sums,
norms, the softmax, the sampler's state and the vocoders stay float32. Its effect, of random weights (4 layers, width
256, 5 s): one evaluation moves by 0.6 % of its largest value, a mel of 30 steps by 0.08 dB on average and 2.3 dB at
most, guided 0.16 and 4.7 dB; CLVP (6 layers, width 256) by 1 % of the scores' standard deviation, which left the order
of 16 candidates as it was; the AR model's latents (6 layers, width 256) by 1.1 % of their largest value.

Axis letters: c codes, s codes of a row in its bucket, t mel frames, l latent width, v width of the AR model's voice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import Part
from tortoise_jax.models import hifigan, vocoder
from tortoise_jax.models.clvp import CLVP
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.diffusion import DiffusionConfig, DiffusionDecoder
from tortoise_jax.models.layers import HIGH, Array, Compute, codes_of, frames_of, mask_of
from tortoise_jax.synthesis import denoising
from tortoise_jax.synthesis.diffusion_inputs import DIFFUSION_CODES, bucket, repaired

TEXT_BUCKET = 32  # text ids a row of CLVP's text side is padded to a multiple of
SCORED_AT_ONCE = 16  # rows of a device
RENDERED_AT_ONCE = 4
DIFFUSION_NOISE, VOCODER_NOISE = 0, 1  # each stage draws its own

Progress = Callable[[int], None]


def unseen(done: int) -> None:
    """No progress is shown."""


def scores(
    clvp: Part,
    text_ids: Sequence[int],
    codes: Sequence[np.ndarray],
    total: int = DIFFUSION_CODES,
    progress: Progress = unseen,
    dtype: str = "float32",
) -> np.ndarray:
    """How well each row of codes (c,), without stops, says the text: (rows,) float32, higher is better.

    As upstream: of the repaired codes with all their padding, and of the text with an extra 0. A row with a code that
    CLVP's table has not (a model may draw its own start token) scores -inf: upstream would end there.
    """
    ids = [*text_ids, 0]
    padded = np.zeros((1, -(-len(ids) // TEXT_BUCKET) * TEXT_BUCKET), np.int32)
    padded[0, : len(ids)] = ids
    mask = np.arange(padded.shape[1])[None] < len(ids)
    model = CLVP(clvp.config, Compute(dtype=dtype))
    latent = np.asarray(apply(model, "text_latent", clvp.variables, padded, mask)[0])
    fixed = np.stack([repaired(row, total) for row in codes])
    known = (fixed < clvp.config.speech_tokens).all(axis=1)
    fixed = np.minimum(fixed, clvp.config.speech_tokens - 1)
    alike = (clvp.variables, latent)
    found = parallel.run_by_rows(_scorer(model), alike, (fixed,), SCORED_AT_ONCE, progress)
    return np.where(known, found, -np.inf).astype(np.float32)


@functools.cache
def _scorer(model: CLVP) -> Callable[..., Any]:
    def score(variables: Any, latent: Array, codes: Array) -> Any:
        with jax.default_matmul_precision(HIGH):
            return model.apply(variables, latent, codes, method="score")

    return score


def keys_of(seed: int, rows: Sequence[int], stage: int) -> np.ndarray:
    """One key's data for each row (b, 2), by its number, so that what a row draws depends on nothing else."""
    root = jax.random.fold_in(jax.random.key(seed), stage)
    keys = jax.vmap(lambda row: jax.random.fold_in(root, row))(jnp.asarray(rows, jnp.int32))
    return np.asarray(jax.random.key_data(keys))


def padded_to(length: int, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows (n, d) of several lengths -> (b, length, d) float32, zeros after each."""
    return np.stack([np.pad(row, ((0, length - len(row)), (0, 0))) for row in rows]).astype(np.float32)


def lengths_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.int32)


def diffuse(
    diffusion: Part,
    latents: Sequence[np.ndarray],
    voice: np.ndarray,
    steps: int,
    guidance: float | None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    temperature: float = 1.0,
    progress: Progress = unseen,
    dtype: str = "float32",
) -> list[np.ndarray]:
    """Hidden states (s, l) of each row and the voice's diffusion vector (2 d,) -> log-mels (t, m), t = frames_of(s).

    guidance: its strength, None for none. rows: numbers that the rows' noise is drawn by, 0, 1, … by default.
    """
    lengths = lengths_of(latents)
    alike = (diffusion.variables, denoising.coefficients(steps, guidance), np.float32(temperature))
    keys = keys_of(seed, range(len(latents)) if rows is None else rows, DIFFUSION_NOISE)
    voices = np.broadcast_to(np.asarray(voice, np.float32), (len(latents), len(voice)))
    mels = [np.empty(0)] * len(latents)
    for s, index in of_like_length(lengths):
        denoise = _denoiser(diffusion.config, frames_of(s), guidance is not None, dtype)
        given = (padded_to(s, [latents[i] for i in index]), voices[index], lengths[index], keys[index])
        made = parallel.run_by_rows(denoise, alike, given, RENDERED_AT_ONCE, progress)
        for i, mel in zip(index, made, strict=True):
            mels[i] = mel[: frames_of(int(lengths[i]))]
    return mels


def of_like_length(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows that are rendered at once, the longest first: the bucket they are padded to, and which they are.

    None is padded to the double of its own bucket or more: what a row costs grows with the square of its length.
    """
    buckets = np.array([bucket(int(length)) for length in lengths])
    while buckets.any():
        longest = int(buckets.max())
        (index,) = np.nonzero(2 * buckets > longest)
        buckets[index] = 0
        yield longest, index


@functools.cache
def _denoiser(config: DiffusionConfig, frames: int, guided: bool, dtype: str = "float32") -> Callable[..., Any]:
    decoder = DiffusionDecoder(config, Compute(dtype=dtype))

    def denoise(
        variables: Any, steps: Any, temperature: Array, latents: Array, voices: Array, lengths: Array, keys: Array
    ) -> Array:
        with jax.default_matmul_precision(HIGH):
            aligned = denoising.align(decoder, variables, latents, voices, frames, lengths)
            mask: Any = mask_of(frames_of(lengths), frames)
            drawn_by = jax.random.wrap_key_data(keys)
            return denoising.denoise(decoder, variables, aligned, mask, drawn_by, steps, temperature, guided)

    return denoise


def vocode(
    part: Part,
    mels: Sequence[np.ndarray],
    seed: int = 0,
    rows: Sequence[int] | None = None,
    progress: Progress = unseen,
) -> list[np.ndarray]:
    """Log-mels (t, m) at 24 kHz -> waveforms (t hop,) float32 in [-1, 1]."""
    lengths = lengths_of(mels)
    frames = frames_of(bucket(codes_of(int(lengths.max()))))
    keys = keys_of(seed, range(len(mels)) if rows is None else rows, VOCODER_NOISE)
    given = (padded_to(frames, mels), keys, lengths)
    waveforms = parallel.run_by_rows(_vocoder(part.config), (part.variables,), given, RENDERED_AT_ONCE, progress)
    return [waveform[: len(mel) * part.config.hop] for waveform, mel in zip(waveforms, mels, strict=True)]


@functools.cache
def _vocoder(config: vocoder.VocoderConfig) -> Callable[..., Any]:
    def vocode(variables: Any, mels: Array, keys: Array, lengths: Array) -> Any:
        shape = (mels.shape[1] + vocoder.TAIL_FRAMES, config.noise_channels)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(jax.random.wrap_key_data(keys))
        return vocoder.UnivNet(config).apply(variables, mels, noise, lengths, method="vocode")

    return vocode


def vocode_latents(
    part: Part, latents: Sequence[np.ndarray], voice: np.ndarray, progress: Progress = unseen
) -> list[np.ndarray]:
    """The fast path: hidden states (c, l) of each row, the stop's too, and the AR model's voice (v,) -> waveforms.

    Each is (frames_of(c) hop,) float32 in [-1, 1].
    """
    lengths = lengths_of(latents)
    s = bucket(int(lengths.max()))
    voices = np.broadcast_to(np.asarray(voice, np.float32), (len(latents), len(voice)))
    decode, given = _fast_decoder(part.config, frames_of(s)), (padded_to(s, latents), voices, lengths)
    waveforms = parallel.run_by_rows(decode, (part.variables,), given, RENDERED_AT_ONCE, progress)
    return [made[: frames_of(len(row)) * part.config.hop] for made, row in zip(waveforms, latents, strict=True)]


@functools.cache
def _fast_decoder(config: hifigan.HifiganConfig, frames: int) -> Callable[..., Any]:
    def decode(variables: Any, latents: Array, voices: Array, lengths: Array) -> Any:
        return hifigan.Hifigan(config).apply(variables, latents, voices, frames, lengths, method="decode")

    return decode

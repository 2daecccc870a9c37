"""Random crops of clips, which the dVAE is trained on. What is in a batch depends on (seed, step) and the data."""

from __future__ import annotations

import zlib

import numpy as np

from tortoise_jax.audio import MEL_FRAMES_PER_CODE, SAMPLES_PER_CODE, code_count
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.splits import VALIDATION

Batch = dict[str, np.ndarray]


def make_crops(
    dataset: Dataset,
    indices: np.ndarray,
    samples: int,
    rows: int,
    seed: int,
    step: int,
    host: slice = slice(None),
) -> Batch:
    """The rows `host` of the batch of the clips `indices` (at most `rows` of them), filled up with padding rows.

    wav (b, samples) int16, zeros after a shorter clip; frames (b,) int32, how many mel frames of it are the clip's, in
    whole codes, 0 in padding rows; row (b,) int32, where in the batch of all hosts it stands; example (b,) int32, the
    clip or -1. samples: a multiple of 1024. (seed, step, clip) draw a training crop, a validation clip alone its own.
    """
    members = [int(index) for index in indices] + [-1] * (rows - len(indices))
    numbered = list(enumerate(members))[host]
    made = [_row_of(dataset, index, samples, seed, step) | {"row": np.array(row, np.int32)} for row, index in numbered]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def _row_of(dataset: Dataset, index: int, samples: int, seed: int, step: int) -> Batch:
    wav, frames = np.zeros(samples, np.int16), 0
    if index >= 0:
        waveform = dataset.waveform(index)
        start = int(_rng(dataset, index, seed, step).integers(max(0, len(waveform) - samples) + 1))
        crop = waveform[start : start + samples]
        wav[: len(crop)] = crop
        frames = min(code_count(len(crop)), samples // SAMPLES_PER_CODE) * MEL_FRAMES_PER_CODE
    return {"wav": wav, "frames": np.array(frames, np.int32), "example": np.array(index, np.int32)}


def _rng(dataset: Dataset, index: int, seed: int, step: int) -> np.random.Generator:
    clip = dataset.clips[index]
    if clip.split == VALIDATION:
        return np.random.default_rng(zlib.crc32(clip.id.encode()))
    return np.random.default_rng([seed, step, index])

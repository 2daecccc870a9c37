"""What is in a batch: the rows of its clips, and waveforms to condition them on. Depends on (seed, step) and the data.

A row is joined without gaps, so that it means the same whatever it is batched with:

    index      0             1 .. t + 2                 t + 3 .. t + c + 4      then
    token      -             start, text ids, stop      start, codes, stop      padding
    type       CONDITIONING  TEXT                       MEL                     CONDITIONING
    position   0             0, 1, 2 ..                 0, 1, 2 ..              0
    target     -             text ids, stop, -          codes, stop, -          -
    weight     0             1 .. 1, 1, 0               1 .. 1, 1, 0            0

A clip of n samples has c = n // 1024 + 1 codes, so the first stop target of its codes is the one at n // 1024 + 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tortoise_jax.audio import CONDITIONING_SAMPLES, crop_conditioning
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.lengths import N
from tortoise_jax.data.splits import TRAIN, VALIDATION
from tortoise_jax.models.unified_voice import CONDITIONING, CONDITIONING_VECTORS, MEL, TEXT, UnifiedVoiceConfig

CONDITIONING_CLIPS = 2
T = TypeVar("T")
Batch = dict[str, np.ndarray]


def row_length(text_tokens: N, codes: N) -> N:
    """Positions of a row: conditioning, text between start and stop, codes between start and stop."""
    return CONDITIONING_VECTORS + (text_tokens + 2) + (codes + 2)


# --- what is in a batch -----------------------------------------------------------------------------------------------


def row(text_ids: np.ndarray, codes: np.ndarray, length: int, config: UnifiedVoiceConfig) -> Batch:
    """One row of the table above: tokens, token_types, positions, targets (s,) int32 and weights (s,) float32."""
    n = CONDITIONING_VECTORS
    text = np.array([config.start_text, *text_ids, config.stop_text], np.int32)
    mel = np.array([config.start_mel, *codes, config.stop_mel], np.int32)
    arrays = padding_row(length)
    for start, stream, token_type in ((n, text, TEXT), (n + len(text), mel, MEL)):
        end = start + len(stream)
        arrays["tokens"][start:end] = stream
        arrays["token_types"][start:end] = token_type
        arrays["positions"][start:end] = np.arange(len(stream))
        arrays["targets"][start : end - 1] = stream[1:]
        arrays["weights"][start : end - 1] = 1.0
    return arrays


def padding_row(length: int) -> Batch:
    """A row that counts for nothing."""
    zeros = {name: np.zeros(length, np.int32) for name in ("tokens", "token_types", "positions", "targets")}
    return zeros | {"token_types": np.full(length, CONDITIONING, np.int32), "weights": np.zeros(length, np.float32)}


def make_batch(
    dataset: Dataset,
    indices: np.ndarray,
    length: int,
    rows: int,
    config: UnifiedVoiceConfig,
    seed: int,
    step: int,
    conditioning_clips: int = CONDITIONING_CLIPS,
    host: slice = slice(None),
) -> Batch:
    """The rows `host` of the batch of the clips `indices` (at most `rows` of them), filled up with padding rows.

    b rows, s = `length` positions, u = `conditioning_clips`: tokens, token_types, positions, targets (b, s) int32;
    weights (b, s) float32; example (b,) int32, the clip's index or -1 in a padding row; conditioning_wav
    (b, u, 132300) int16 at 22050 Hz. No other host's clips are read. Dropout and crops depend on (seed, step, example)
    alone.
    """
    members = [int(index) for index in indices] + [-1] * (rows - len(indices))
    made = [_row_of(dataset, index, length, config, seed, step, conditioning_clips) for index in members[host]]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def _row_of(
    dataset: Dataset, index: int, length: int, config: UnifiedVoiceConfig, seed: int, step: int, clips: int
) -> Batch:
    if index < 0:
        arrays = padding_row(length)
        crops = np.zeros((clips, CONDITIONING_SAMPLES), np.int16)
    else:
        arrays = row(dataset.text_ids(index), dataset.codes(index), length, config)
        crops = conditioning_crops(dataset, index, seed, step, clips)
    return arrays | {"example": np.array(index, np.int32), "conditioning_wav": crops}


# --- conditioning -----------------------------------------------------------------------------------------------------


def conditioning_crops(
    dataset: Dataset, index: int, seed: int, step: int, clips: int = CONDITIONING_CLIPS
) -> np.ndarray:
    """Six-second crops of other clips of the speaker, (clips, 132300) int16 at 22050 Hz, zeros after shorter clips.

    In training (seed, step, index) draws them; in validation the clip alone, so that losses can be compared. The crops
    come from different clips if there are enough, and not from validation clips if the speaker has others.
    """
    rng = _conditioning_rng(dataset, index, seed, step)
    candidates = conditioning_candidates(dataset, index)
    chosen = rng.choice(candidates, size=clips, replace=len(candidates) < clips)
    return np.stack([crop_conditioning(dataset.waveform(int(other)), rng) for other in chosen])


def conditioning_candidates(dataset: Dataset, index: int) -> np.ndarray:
    """Indices (n,) int64 of the clips that may condition a clip: the speaker's other train clips.

    If there are none: for a validation clip, the speaker's other validation clips; else the clip itself.
    """
    clip = dataset.clips[index]
    splits = (TRAIN, VALIDATION) if clip.split == VALIDATION else (TRAIN,)
    for split in splits:
        others = dataset.of_speaker(clip.speaker, split)
        others = others[others != index]
        if len(others):
            return others
    return np.array([index])


def conditioned_on_themselves(dataset: Dataset, split: str = TRAIN) -> int:
    """How many clips of a split are conditioned on themselves, because their speaker has no other clip."""
    return sum(bool((conditioning_candidates(dataset, int(i)) == i).all()) for i in dataset.split(split))


def _conditioning_rng(dataset: Dataset, index: int, seed: int, step: int) -> np.random.Generator:
    clip = dataset.clips[index]
    if clip.split == VALIDATION:
        return np.random.default_rng(zlib.crc32(clip.id.encode()))
    return np.random.default_rng([seed, step, index])


# --- ahead of time ----------------------------------------------------------------------------------------------------


def prefetch(make: Callable[[int], T], steps: Iterable[int], ahead: int = 2) -> Generator[T, None, None]:
    """make(step) for every step, in order; threads make the next `ahead` meanwhile.

    An error in `make` is raised in the place of its result.
    """
    executor = ThreadPoolExecutor(max_workers=max(1, ahead), thread_name_prefix="batch")
    pending: list[Future[T]] = []
    try:
        for step in steps:
            pending.append(executor.submit(make, step))
            if len(pending) > ahead:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)

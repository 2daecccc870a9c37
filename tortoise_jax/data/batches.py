"""Clips to batches of a few fixed shapes: a pure function of (seed, step) and the data set.

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

import functools
import zlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tortoise_jax.audio import CONDITIONING_SAMPLES, crop_conditioning
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import CONDITIONING, CONDITIONING_VECTORS, MEL, TEXT, UnifiedVoiceConfig

BUCKET = 32
CONDITIONING_CLIPS = 2
VALIDATION = "validation"
T = TypeVar("T")
N = TypeVar("N", int, np.ndarray)
Batch = dict[str, np.ndarray]
Epoch = list[tuple[int, np.ndarray]]  # (padded length, members) of each batch


def row_length(text_tokens: N, codes: N) -> N:
    """Positions of a row: conditioning, text between start and stop, codes between start and stop."""
    return CONDITIONING_VECTORS + (text_tokens + 2) + (codes + 2)


def row_lengths(dataset: Dataset, clips: np.ndarray) -> np.ndarray:
    """`row_length` of these clips, int64."""
    return np.array([row_length(dataset.clips[i].text_tokens, dataset.clips[i].codes) for i in clips], np.int64)


def padded_length(length: N, bucket: int = BUCKET) -> N:
    """The next multiple of `bucket`."""
    return -(-length // bucket) * bucket


# --- which clips, in which order --------------------------------------------------------------------------------------


class Plan:
    """Which clips a step reads and the length they are padded to; the same on every host, and for any number of them.

    `batch_size` clips a batch, clamped to the data set; `rows` is that rounded up to a multiple of `unit` (hosts x
    local devices x accumulation), which every batch is filled to with rows of weight 0; `batches_per_epoch` of them
    hold every clip exactly once.
    """

    def __init__(self, clips: np.ndarray, batch_size: int, unit: int, epoch: Callable[[int], Epoch]) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected 1 or more")
        self.batch_size = max(1, min(batch_size, len(clips)))
        self.rows = _round_up(self.batch_size, unit)
        self.batches_per_epoch = -(-len(clips) // self.batch_size)
        self._clips = clips
        self._epoch = functools.lru_cache(maxsize=2)(epoch)  # the loader is at most one epoch ahead

    @classmethod
    def for_training(
        cls, dataset: Dataset, clips: np.ndarray, batch_size: int, seed: int, unit: int = 1, bucket: int = BUCKET
    ) -> Plan:
        """Shuffled anew every epoch, by (seed, epoch). clips: indices into the data set."""
        lengths, size = row_lengths(dataset, clips), max(1, min(batch_size, len(clips)))
        return cls(clips, batch_size, unit, lambda epoch: training_epoch(lengths, size, seed, epoch, bucket))

    @classmethod
    def for_validation(
        cls, dataset: Dataset, clips: np.ndarray, batch_size: int, unit: int = 1, bucket: int = BUCKET
    ) -> Plan:
        """The same batches every time."""
        lengths, size = row_lengths(dataset, clips), max(1, min(batch_size, len(clips)))
        return cls(clips, batch_size, unit, lambda epoch: validation_epoch(lengths, size, bucket))

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """(padded length, clip indices: `batch_size` of them or, once an epoch, fewer); steps count over all epochs."""
        if not self.batches_per_epoch:
            raise UserError("there is no clip to make a batch of: this split of the data set is empty")
        epoch, place = divmod(step, self.batches_per_epoch)
        length, members = self._epoch(epoch)[place]
        return length, self._clips[members]


def training_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, bucket: int = BUCKET) -> Epoch:
    """Batches of clips of one bucket of lengths each, in random order; members are places in `lengths`.

    What is left over in a bucket moves up to the next, so that only one batch an epoch can be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled, padded = rng.permutation(len(lengths)), padded_length(lengths, bucket)
    batches: Epoch = []
    left_over = shuffled[:0]
    for length in np.unique(padded):
        pool = np.concatenate([left_over, shuffled[padded[shuffled] == length]])
        whole = len(pool) // batch_size * batch_size
        batches += [(int(length), pool[i : i + batch_size]) for i in range(0, whole, batch_size)]
        left_over = pool[whole:]
    if len(left_over):
        batches.append((int(padded[left_over].max()), left_over))
    return [batches[i] for i in rng.permutation(len(batches))]


def validation_epoch(lengths: np.ndarray, batch_size: int, bucket: int = BUCKET) -> Epoch:
    """Batches in the order of length, without chance."""
    padded = padded_length(lengths, bucket)
    order = np.argsort(padded, kind="stable")
    cuts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [(int(padded[cut].max()), cut) for cut in cuts]


def real_share(epoch: Epoch, lengths: np.ndarray, rows: int) -> float:
    """Which part of the positions computed in an epoch is real, where every batch has `rows` rows."""
    real = sum(int(lengths[members].sum()) for _, members in epoch)
    return real / sum(length * rows for length, _ in epoch)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# --- what is in a batch -----------------------------------------------------------------------------------------------


def row(text_ids: np.ndarray, codes: np.ndarray, length: int, config: UnifiedVoiceConfig) -> Batch:
    """One row of the table above: tokens, token_types, positions, targets (s,) int32 and weights (s,) float32."""
    n = CONDITIONING_VECTORS
    text = np.array([config.start_text, *text_ids, config.stop_text], np.int32)
    mel = np.array([config.start_mel, *codes, config.stop_mel], np.int32)
    arrays = {name: np.zeros(length, np.int32) for name in ("tokens", "token_types", "positions", "targets")}
    arrays["token_types"][:] = CONDITIONING
    arrays["weights"] = np.zeros(length, np.float32)
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
    """The rows `host` of a batch of `rows` rows, reading no others.

    tokens, token_types, positions, targets (b, s) int32; weights (b, s) float32; example (b,) int32, the clip's index,
    or -1 in a padding row; conditioning_wav (b, u, 132300) int16. Dropout and crops follow (seed, step, example) alone.
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
    """Random crops of other clips of the speaker, (clips, 132300) int16, shorter ones with zeros behind.

    Drawn by (seed, step, clip) in training; by the clip alone in validation, so that its loss can be compared. The
    crops come from different clips while there are enough, and never from validation clips if the speaker has others.
    """
    rng = _conditioning_rng(dataset, index, seed, step)
    candidates = conditioning_candidates(dataset, index)
    chosen = rng.choice(candidates, size=clips, replace=len(candidates) < clips)
    return np.stack([crop_conditioning(dataset.waveform(int(other)), rng) for other in chosen])


def conditioning_candidates(dataset: Dataset, index: int) -> np.ndarray:
    """Clips that may condition a clip: the speaker's other train clips; else others of a validation clip's split; else
    the clip itself."""
    clip = dataset.clips[index]
    splits = ("train", VALIDATION) if clip.split == VALIDATION else ("train",)
    for split in splits:
        others = dataset.of_speaker(clip.speaker, split)
        others = others[others != index]
        if len(others):
            return others
    return np.array([index])


def conditioned_on_themselves(dataset: Dataset, split: str = "train") -> int:
    """How many clips of a split have no other clip of their speaker to be conditioned on."""
    return sum(bool((conditioning_candidates(dataset, int(i)) == i).all()) for i in dataset.split(split))


def _conditioning_rng(dataset: Dataset, index: int, seed: int, step: int) -> np.random.Generator:
    clip = dataset.clips[index]
    if clip.split == VALIDATION:
        return np.random.default_rng(zlib.crc32(clip.id.encode()))
    return np.random.default_rng([seed, step, index])


# --- ahead of time ----------------------------------------------------------------------------------------------------


def prefetch(make: Callable[[int], T], steps: Iterable[int], ahead: int = 2) -> Generator[T, None, None]:
    """make(step) for every step, in order, the next `ahead` being made in threads meanwhile.

    What `make` raises is raised where its result would have come.
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

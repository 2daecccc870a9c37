"""Which clips are in which batch, padded to which length: a function of (seed, step) and the clips' lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from tortoise_jax.data.batches import row_length
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.lengths import round_up
from tortoise_jax.errors import UserError

BUCKET = 32  # rows are padded to multiples of it
Epoch = list[tuple[int, np.ndarray]]  # (padded length, members) of each batch; members: indices into the lengths


def row_lengths(dataset: Dataset, clips: np.ndarray) -> np.ndarray:
    """`row_length` of each of these clips, indices into the data set (n,): (n,) int64."""
    return np.array([row_length(dataset.clips[i].text_tokens, dataset.clips[i].codes) for i in clips], np.int64)


class BatchPlan:
    """Which clips a step reads and the length they are padded to; the same on every host, and for any number of them.

    batch_size: clips per batch, at most all there are. rows: that rounded up to a multiple of `unit` (hosts x local
    devices x accumulation); rows without a clip have weight 0. batches_per_epoch: so many hold every clip exactly once.
    """

    def __init__(self, clips: np.ndarray, batch_size: int, unit: int, epoch: Callable[[int], Epoch]) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected 1 or more")
        self.batch_size = max(1, min(batch_size, len(clips)))
        self.rows = round_up(self.batch_size, unit)
        self.batches_per_epoch = -(-len(clips) // self.batch_size)
        self._clips = clips
        self._epoch = functools.lru_cache(maxsize=2)(epoch)  # the loader is at most one epoch ahead

    @classmethod
    def for_training(
        cls, dataset: Dataset, clips: np.ndarray, batch_size: int, seed: int, unit: int = 1, bucket: int = BUCKET
    ) -> BatchPlan:
        """Shuffled anew every epoch, by (seed, epoch). clips: indices into the data set (n,)."""
        return cls._of_lengths(clips, row_lengths(dataset, clips), batch_size, unit, seed, bucket)

    @classmethod
    def for_validation(
        cls, dataset: Dataset, clips: np.ndarray, batch_size: int, unit: int = 1, bucket: int = BUCKET
    ) -> BatchPlan:
        """The same batches every time."""
        return cls._of_lengths(clips, row_lengths(dataset, clips), batch_size, unit, None, bucket)

    @classmethod
    def of_crops(
        cls, clips: np.ndarray, batch_size: int, samples: int, unit: int = 1, seed: int | None = None
    ) -> BatchPlan:
        """All of one length; shuffled anew every epoch by (seed, epoch), or always the same without a seed."""
        return cls._of_lengths(clips, np.full(len(clips), samples, np.int64), batch_size, unit, seed, bucket=1)

    @classmethod
    def _of_lengths(
        cls, clips: np.ndarray, lengths: np.ndarray, batch_size: int, unit: int, seed: int | None, bucket: int
    ) -> BatchPlan:
        size = max(1, min(batch_size, len(clips)))
        if seed is None:
            return cls(clips, batch_size, unit, lambda epoch: validation_epoch(lengths, size, bucket))
        return cls(clips, batch_size, unit, lambda epoch: training_epoch(lengths, size, seed, epoch, bucket))

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """(padded length, indices of the step's clips): `batch_size` clips, fewer once per epoch at most.

        step: counted over all epochs, from 0.
        """
        if not self.batches_per_epoch:
            raise UserError("there is no clip to make a batch of: this split of the data set is empty")
        epoch, index = divmod(step, self.batches_per_epoch)
        length, members = self._epoch(epoch)[index]
        return length, self._clips[members]


def training_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, bucket: int = BUCKET) -> Epoch:
    """Batches in random order, each of clips whose lengths (n,) pad to the same multiple of `bucket`.

    Clips that are left over at one padded length move up to the next, so that at most one batch per epoch is smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled, padded = rng.permutation(len(lengths)), round_up(lengths, bucket)
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
    """Batches in the order of length, always the same."""
    padded = round_up(lengths, bucket)
    order = np.argsort(padded, kind="stable")
    cuts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [(int(padded[cut].max()), cut) for cut in cuts]


def real_share(epoch: Epoch, lengths: np.ndarray, rows: int) -> float:
    """Which part of the positions computed in an epoch is not padding, if every batch has `rows` rows."""
    real = sum(int(lengths[members].sum()) for _, members in epoch)
    return real / sum(length * rows for length, _ in epoch)

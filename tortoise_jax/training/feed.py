"""What a run reads: the batches of a step and of an evaluation, this host's rows laid out for its devices."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from tortoise_jax import parallel
from tortoise_jax.data import batches, crops
from tortoise_jax.data.batches import Batch
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.plan import BatchPlan
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig


class Batches(Protocol):
    """What a loop reads. Batches are (devices, a, b, …) as training/step.py or training/dvae_step.py describe them."""

    @property
    def training(self) -> BatchPlan: ...
    @property
    def validation(self) -> BatchPlan: ...
    def training_batch(self, step: int) -> Batch: ...
    def validation_batch(self, index: int) -> Batch: ...
    def clip_ids(self, batch: Batch) -> list[str]: ...


def clip_ids(dataset: Dataset, batch: Batch) -> list[str]:
    """Ids of the clips that this host feeds to a step, sorted."""
    return sorted({dataset.clips[i].id for i in np.reshape(batch["example"], -1) if i >= 0})


@dataclasses.dataclass(frozen=True)
class Feed:
    """Rows of the AR model. training, validation: which clips are in which batch."""

    dataset: Dataset
    training: BatchPlan
    validation: BatchPlan
    model: UnifiedVoiceConfig
    seed: int
    conditioning_clips: int
    gradient_accumulation_steps: int

    def training_batch(self, step: int) -> Batch:
        return self._batch(self.training, step)

    def validation_batch(self, index: int) -> Batch:
        return self._batch(self.validation, index)

    def clip_ids(self, batch: Batch) -> list[str]:
        return clip_ids(self.dataset, batch)

    def _batch(self, plan: BatchPlan, step: int) -> Batch:
        length, indices = plan.batch(step)
        batch = batches.make_batch(
            self.dataset,
            indices,
            length,
            rows=plan.rows,
            config=self.model,
            seed=self.seed,
            step=step,
            conditioning_clips=self.conditioning_clips,
            host=parallel.host_rows(plan.rows),
        )
        return parallel.split_rows(batch, self.gradient_accumulation_steps)


@dataclasses.dataclass(frozen=True)
class CropFeed:
    """Crops for the dVAE. training, validation: which clips are in which batch."""

    dataset: Dataset
    training: BatchPlan
    validation: BatchPlan
    seed: int
    gradient_accumulation_steps: int

    def training_batch(self, step: int) -> Batch:
        return self._batch(self.training, step)

    def validation_batch(self, index: int) -> Batch:
        return self._batch(self.validation, index)

    def clip_ids(self, batch: Batch) -> list[str]:
        return clip_ids(self.dataset, batch)

    def _batch(self, plan: BatchPlan, step: int) -> Batch:
        samples, indices = plan.batch(step)
        host = parallel.host_rows(plan.rows)
        batch = crops.make_crops(self.dataset, indices, samples, plan.rows, self.seed, step, host)
        return parallel.split_rows(batch, self.gradient_accumulation_steps)

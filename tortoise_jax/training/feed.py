"""What a run reads: the batches of a step and of an evaluation, this host's rows laid out for its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tortoise_jax import parallel
from tortoise_jax.data.batches import Batch
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.plan import BatchPlan


@dataclasses.dataclass(frozen=True)
class Feed:
    """training, validation: which clips are in which batch.

    make(data set, indices, length, rows=, step=, host=) -> the rows `host` of a batch, as `batches.make_batch` or
    `crops.make_crops`. Batches are (devices, a, b, …), as training/step.py or training/dvae_step.py describe them.
    """

    dataset: Dataset
    training: BatchPlan
    validation: BatchPlan
    gradient_accumulation_steps: int
    make: Callable[..., Batch]

    def training_batch(self, step: int) -> Batch:
        return self._batch(self.training, step)

    def validation_batch(self, index: int) -> Batch:
        return self._batch(self.validation, index)

    def clip_ids(self, batch: Batch) -> list[str]:
        """Ids of the clips that this host feeds to a step, sorted."""
        return sorted({self.dataset.clips[i].id for i in np.reshape(batch["example"], -1) if i >= 0})

    def _batch(self, plan: BatchPlan, step: int) -> Batch:
        length, indices = plan.batch(step)
        host = parallel.host_rows(plan.rows)
        batch = self.make(self.dataset, indices, length, rows=plan.rows, step=step, host=host)
        return parallel.split_rows(batch, self.gradient_accumulation_steps)
